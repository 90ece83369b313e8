"""Long texts: what a mask hides is left out, and memory grows with the tokens."""

from __future__ import annotations

import functools
import gc
import json
import runpy
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from captum_globenc import ALTI, LOCAL_SCORES, GlobEnc, record
from captum_globenc.contributions import rollout
from captum_globenc.recording import grouping, windows
from captum_globenc.recording.windows import Window
from tests import oracle
from tests.models import FAMILIES, build, encoder_of, padded, sentence

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "long_inputs.py"
REACH = 3
#: As the oracle computes a BERT with local windows.
LOCAL_BERT = replace(oracle.BERT_LIKE, window=lambda index: REACH)
#: Families with local windows, and with causal masks.
MASKED = [name for name in ("modernbert", "llama", "gpt2") if name in FAMILIES]
#: The shortest is inside of every window.
LENGTHS = (19, 11, 2)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for windows in texts of any length, and make small ones."""
    for name, value in {"_FEW": 0, "_CELL": 2, "_PREPARED": 1}.items():
        monkeypatch.setattr(windows, name, value)
    monkeypatch.setattr(grouping, "_HELD", 1)  # One layer at a time.


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest elementwise relative difference; what is 0 must be 0."""
    assert not found[expected == 0].any()
    some = expected != 0
    return float(((found.double() - expected)[some] / expected[some]).abs().max())


def band(tokens: int, reach: int) -> Tensor:
    """True where a receiver and a source are close, (1, 1, receivers, sources)."""
    positions = torch.arange(tokens)
    return ((positions[:, None] - positions).abs() <= reach)[None, None]


def seen(mask: Tensor, tokens: int) -> list[Window]:
    """The windows, after what they must be in any case."""
    found = windows.windows(mask, tokens)
    covered = [i for block, _ in found for i in range(tokens)[block]]
    assert covered == list(range(tokens))
    assert all(
        sources.start <= block.start and block.stop <= sources.stop
        for block, sources in found
    )
    return found


# The windows of a mask


def masks(kind: str, tokens: int) -> Tensor:
    """A mask that hides some sources, another one for each example and head."""
    generator = torch.Generator().manual_seed(0)
    shown = torch.rand(2, 3, tokens, tokens, generator=generator) < 0.02
    shown |= band(tokens, 1)
    shown[1, 2, 5:9] = False  # These see nothing.
    if kind == "bool":
        return shown
    lowest = -torch.inf if kind == "-inf" else torch.finfo(torch.float32).min
    bias = torch.randn(2, 3, tokens, tokens, generator=generator)
    return bias.masked_fill(~shown, lowest)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("kind", ["bool", "-inf", "lowest"])
def test_all_that_is_not_masked_is_inside(kind: str) -> None:
    mask = masks(kind, 37)
    for block, sources in seen(mask, 37):
        for i in range(37)[block]:
            logits = mask[:, :, i]
            if kind == "bool":
                logits = torch.zeros(2, 3, 37).masked_fill(~logits, -torch.inf)
            weights = logits.softmax(-1).nan_to_num(0)
            weights[..., sources] = 0
            assert not weights.any()


@pytest.mark.parametrize("added", [False, True])
def test_local_windows_are_narrow(added: bool) -> None:
    mask = band(1_000, 64)
    if added:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo().min)
    for block, sources in seen(mask, 1_000):
        assert len(range(1_000)[block]) < 300
        assert len(range(1_000)[sources]) <= len(range(1_000)[block]) + 2 * 128


def test_what_a_causal_mask_hides_is_outside() -> None:
    found = seen(torch.ones(1, 1, 2_000, 2_000, dtype=torch.bool).tril(), 2_000)
    assert len(found) > 1
    assert all(block.stop == sources.stop for block, sources in found)


def test_without_a_band_there_is_one_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is read, but of a mask that could have one."""
    whole = [Window(slice(0, 600), slice(0, 600))]
    assert windows.windows(torch.ones(1, 1, 600, 600, dtype=torch.bool), 600) == whole
    assert windows.windows(torch.zeros(2, 4, 600, 600), 600) == whole
    monkeypatch.setattr(windows, "_spans", None)
    assert windows.windows(None, 600) == whole
    assert windows.windows(torch.ones(2, 1, 1, 600, dtype=torch.bool), 600) == whole
    assert windows.windows(band(200, 2), 200) == [Window(slice(0, 200), slice(0, 200))]


# The scores


def check(
    recipe: oracle.Recipe,
    encoder: nn.Module,
    examples: list[Tensor],
    name: str,
    found: Tensor,
    local: Tensor,
    reads: Callable[[Tensor], Tensor],
) -> None:
    """Scores and local scores of a padded batch against the literal twin."""
    for row, example in enumerate(examples):
        n = len(example)
        layers = oracle.run_encoder(encoder, recipe, example)
        expected = [oracle.local_score(layer, name) for layer in layers]
        for index, values in enumerate(expected):
            assert relative(local[row, index, :n, :n], values) <= 1e-10
        read = reads(example) @ oracle.rollout(expected)
        assert relative(found[row, :n], read) <= 1e-10
        assert not found[row, n:].any()
        assert not local[row, :, n:].any()
        assert not local[row, :, :, n:].any()


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", LOCAL_SCORES)
@pytest.mark.parametrize("family", MASKED)
def test_windows_against_the_literal_twin(family: str, name: str) -> None:
    """Padded batches, and texts shorter than the window."""
    model, described = build(family), FAMILIES[family]
    examples = [sentence(n, seed=n) for n in LENGTHS]
    ids, mask = padded(examples, extra=1)
    method = GlobEnc(model, local=name)
    found = method.attribute(ids, 1, (mask,))
    local = method.decompose(ids, (mask,)).local
    encoder = encoder_of(family, model)
    check(described.recipe, encoder, examples, name, found, local, described.reads)


def four_dimensional(kind: str, mask: Tensor) -> Tensor:
    """A window and padding as BERT takes them, (batch, 1, tokens, tokens)."""
    shown = band(mask.shape[1], REACH) & mask[:, None, None].bool()
    if kind == "bool":
        return shown
    lowest = -torch.inf if kind == "-inf" else torch.finfo(torch.float64).min
    return torch.zeros(shown.shape).double().masked_fill(~shown, lowest)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", LOCAL_SCORES)
@pytest.mark.parametrize(
    ("attention", "kind"),
    [("sdpa", "bool"), ("sdpa", "-inf"), ("sdpa", "lowest"), ("eager", "lowest")],
)
def test_a_mask_of_ones_own(attention: str, kind: str, name: str) -> None:
    """Also where receivers of padding see nothing, or everything."""
    model = build("bert", attention=attention)
    # Eager attention does not tell such padding from tokens.
    lengths, extra = (LENGTHS, 1) if attention == "sdpa" else (LENGTHS[:1], 0)
    examples = [sentence(n, seed=n) for n in lengths]
    ids, mask = padded(examples, extra)
    run = record(model, ids, (four_dimensional(kind, mask),))
    method = GlobEnc(model, local=name)
    found, local = method.attribute(run, 1), method.decompose(run).local
    encoder, reads = encoder_of("bert", model), FAMILIES["bert"].reads
    check(LOCAL_BERT, encoder, examples, name, found, local, reads)


@pytest.mark.parametrize("make", [ALTI, functools.partial(GlobEnc, class_aware=True)])
@pytest.mark.parametrize("family", MASKED)
def test_windows_give_what_all_pairs_give(
    family: str, make: Callable[..., GlobEnc], request: pytest.FixtureRequest
) -> None:
    model = build(family)
    method = make(model)
    ids, mask = padded([sentence(n, seed=n) for n in LENGTHS])
    run = record(model, ids, (mask,))
    expected = method.attribute(run, 1)
    request.getfixturevalue("narrow")
    torch.testing.assert_close(method.attribute(run, 1), expected, rtol=1e-9, atol=0)


def test_a_narrowed_record_is_that_of_its_tokens() -> None:
    """Whatever attention left behind: weights, or queries and keys."""
    mask = torch.ones(1, 16, dtype=torch.long)
    hidden = four_dimensional("lowest", mask)
    for attention in ("sdpa", "eager"):
        model = build("bert", attention=attention)
        for layer in record(model, sentence(16)[None], (hidden,)).layers:
            expected = layer.attention(slice(6, 8))
            found = layer.narrowed(slice(3, 11)).attention(slice(3, 5))
            assert not expected[..., :3].any()
            assert not expected[..., 11:].any()
            torch.testing.assert_close(found, expected[..., 3:11])


# The script


@pytest.mark.skipif("modernbert" not in FAMILIES, reason="there is no ModernBERT")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_script_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output, figure = tmp_path / "long.json", tmp_path / "long.svg"
    given = ["--tokens", "20", "300", "--layers", "2", "--rounds", "1"]
    given += ["--output", str(output), "--figure", str(figure)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    short, long = json.loads(output.read_text("utf-8"))["results"]
    assert (short["tokens"], long["tokens"]) == (20, 300)
    for result in (short, long):
        forward, globenc = result["methods"].values()
        assert forward["ratio_to_forward"] == 1
        assert globenc["median_seconds"] > 0
        assert globenc["peak_bytes"] >= forward["peak_bytes"] > 2**20
    assert "GlobEnc" in figure.read_text("utf-8")


# What is not done


class Sizes(TorchDispatchMode):
    """How many numbers are made: the most at once, and all together."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.largest = max(self.largest, result.numel())
            self.total += result.numel()
        return result


@functools.cache
def long_bert() -> nn.Module:
    model = build("bert", torch.float32).bert
    model.embeddings.position_embeddings = nn.Embedding(2_048, 24)
    model.embeddings.register_buffer("position_ids", torch.arange(2_048)[None], False)
    model.embeddings.register_buffer(
        "token_type_ids", torch.zeros(1, 2_048).long(), False
    )
    return model


def sizes_of_a_sweep(tokens: int, mask: Tensor, make: Callable[..., GlobEnc]) -> Sizes:
    run = record(long_bert(), sentence(tokens)[None], (mask,))
    with Sizes() as sizes:
        make(long_bert()).attribute(run, token_index="mean")
    return sizes


@pytest.mark.parametrize("make", [GlobEnc, ALTI])
def test_a_window_costs_what_it_shows(
    make: Callable[..., GlobEnc], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the tokens take twice the numbers, and far fewer than all pairs have."""
    monkeypatch.setattr(rollout, "_HELD", 2**17)
    short, long = (
        sizes_of_a_sweep(tokens, band(tokens, 20), make) for tokens in (1_024, 2_048)
    )
    assert long.total < 2.2 * short.total
    everything = band(2_048, 2_048)
    assert long.total < sizes_of_a_sweep(2_048, everything, make).total / 5


@pytest.mark.parametrize("mask", ["window", "causal", "full"])
def test_nothing_is_made_of_all_pairs(
    mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is held at once does not grow with the square of the tokens."""
    monkeypatch.setattr(rollout, "_HELD", 2**17)
    tokens = 2_048
    shown = {
        "window": band(tokens, 20),
        "causal": band(tokens, tokens).tril(),
        "full": band(tokens, tokens),
    }[mask]
    assert sizes_of_a_sweep(tokens, shown, GlobEnc).largest <= 2**18


def test_layers_share_the_search_in_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    spans = windows._spans

    def counted(mask: Tensor) -> list[Window]:
        calls.append(mask)
        return spans(mask)

    monkeypatch.setattr(windows, "_spans", counted)
    run = record(long_bert(), sentence(300)[None], (band(300, 20),))
    GlobEnc(long_bert()).attribute(run, token_index=0)
    assert len(run.layers) == 3
    assert len(calls) == 1


@pytest.mark.parametrize(
    "family", [name for name in ("gpt2", "llama") if name in FAMILIES]
)
def test_layers_share_a_causal_mask(family: str) -> None:
    run = record(build(family), sentence(12)[None])
    (mask, *others) = (layer.call.mask for layer in run.layers)
    assert mask is not None
    assert all(other is mask for other in others)
    kept = weakref.ref(mask)
    del run, mask, others
    gc.collect()
    assert kept() is None
