"""How many operations a call takes, and the script that measures the price."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as t
from torch.utils._python_dispatch import TorchDispatchMode

from captum_globenc import LOCAL_SCORES, AttnLRP, DecompX, GlobEnc
from captum_globenc.recording import grouping

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "cost.py"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_script_runs(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "cost.json"
    given = ["--shapes", "six-layer:1x6", "six-layer:2x4", "--rounds", "1"]
    given += ["--slow-shapes", "six-layer:1x6", "--slow-rounds", "1"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given, "--output", str(output)])
    script = runpy.run_path(str(SCRIPT), run_name="__main__")
    first, other = json.loads(output.read_text("utf-8"))["results"]
    assert first["largest_relative_difference_to_textbook"] < 1e-4
    assert other["largest_relative_difference_to_textbook"] is None
    assert len(first["methods"]) == len(other["methods"]) + 2 == 10
    assert (other["model"], other["batch"], other["tokens"]) == ("six-layer", 2, 4)
    for result in (first, other):
        assert result["methods"]["forward pass"]["median_ratio_to_forward"] == 1
        assert result["methods"]["AttnLRP"]["rounds"] == 1
    every, signed = script["markdown"]([first, other]).strip().split("\n\n")
    assert capsys.readouterr().out == f"{every}\n\n{signed}\n"
    assert [line.count("|") for line in every.splitlines()] == [4] * 12
    assert every.splitlines()[-1].endswith(" \N{EN DASH} |")
    ratio = first["methods"]["DecompX"]["median_ratio_to_forward_and_backward"]
    assert f"| **DecompX** | {ratio:.2f}" in signed or ratio >= 10


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(call: Callable[[], object]) -> int:
    """How many operations a call takes once weights are prepared."""
    call()
    with Operations() as operations:
        call()
    return operations.count


def deep_bert() -> t.BertForSequenceClassification:
    sizes = {"hidden_size": 48, "num_attention_heads": 12, "intermediate_size": 192}
    config = t.BertConfig(num_hidden_layers=12, vocab_size=100, **sizes)
    return t.BertForSequenceClassification(config).eval()


def test_twelve_layers_take_about_twice_the_operations_of_the_model() -> None:
    model, ids = deep_bert(), torch.randint(1, 100, (1, 16))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        forward = operations(lambda: model(ids, attention_mask=mask))
    globenc = GlobEnc(model)
    # As many per layer in the model; of all layers together what is left.
    own = operations(lambda: globenc.attribute(ids, 1, mask)) - forward
    assert own <= 520
    if forward <= 487:
        assert forward + own <= 1_000


READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"}


class Reads(TorchDispatchMode):
    """Counts what would wait for an accelerator: numbers that Python reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        # They copy memory, which is no operation on the CPU.
        for name in ("tolist", "numpy", "__array__"):
            counted = self.counting(getattr(torch.Tensor, name))
            monkeypatch.setattr(torch.Tensor, name, counted)

    def counting(self, read: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **kwargs: object) -> object:
            self.count += 1
            return read(*args, **kwargs)

        return counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8)
            for index in args[1]
        )
        self.count += name in READS or by_mask
        return func(*args, **(kwargs or {}))


def reads(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many numbers, or tensors of them, Python reads."""
    with monkeypatch.context() as patched, Reads(patched) as counter:
        call()
    return counter.count


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [*({"local": name} for name in LOCAL_SCORES), {"class_aware": True}],
    ids=lambda options: str(*options.values()),
)
def test_numbers_are_read_once_at_the_end(
    attention: str,
    dtype: torch.dtype,
    options: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = deep_bert()
    model.set_attn_implementation(attention)
    model = model.to(dtype)
    ids = torch.randint(1, 100, (3, 16))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    with torch.no_grad():
        forward = reads(lambda: model(ids, attention_mask=mask), monkeypatch)
    globenc = GlobEnc(model, **options)

    def attribute() -> torch.Tensor:
        return globenc.attribute(ids, 1, mask)

    first, second = attribute(), attribute()  # They look at what is assumed later.
    assert reads(attribute, monkeypatch) == forward + 1
    # At the size of the model's own layers none are stacked.
    monkeypatch.setattr(grouping, "_HELD", 1)
    assert reads(attribute, monkeypatch) == forward + 1
    torch.testing.assert_close(first, second)


def test_a_read_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.ones(3)
    assert reads(lambda: values.sum().item(), monkeypatch) == 1
    assert reads(lambda: values.tolist(), monkeypatch) == 1
    assert reads(lambda: values.numpy(), monkeypatch) == 1
    assert reads(lambda: values.nonzero(), monkeypatch) == 1
    assert reads(lambda: values[values > 0], monkeypatch) == 1
    assert reads(lambda: bool((values > 0).all()), monkeypatch) == 1


@pytest.mark.parametrize("kind", [AttnLRP, DecompX])
def test_signed_methods_take_at_most_twice_the_operations_of_a_gradient(
    kind: type[AttnLRP] | type[DecompX],
) -> None:
    """With all checks; a forward and a backward pass to the embeddings is one."""
    model, ids = deep_bert(), torch.randint(1, 100, (1, 16))
    mask = torch.ones_like(ids)

    def gradient() -> torch.Tensor:
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings, attention_mask=mask).logits
        return torch.autograd.grad(logits[:, 1].sum(), embeddings)[0]

    method = kind(model)
    own = operations(lambda: method.attribute(ids, 1, mask))
    assert own <= 2 * operations(gradient)


@pytest.mark.parametrize("name", LOCAL_SCORES)
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 2e-6), (torch.float64, 1e-12)], ids=str
)
def test_groups_of_layers_give_what_single_layers_give(
    name: str, dtype: torch.dtype, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a padded batch; one layer after another takes far more operations."""
    ids = torch.randint(1, 100, (3, 16))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    globenc = GlobEnc(deep_bert().to(dtype), local=name)

    def attribute() -> torch.Tensor:
        return globenc.attribute(ids, 1, mask)

    scores, together = attribute(), operations(attribute)
    monkeypatch.setattr(grouping, "_HELD", 1)
    assert operations(attribute) > 2 * together
    torch.testing.assert_close(scores, attribute(), rtol=limit, atol=0)
