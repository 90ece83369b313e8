"""DecompX with biases: its literal twin, sums, padding, blocks, modes, refusals."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from captum_globenc import DecompX
from captum_globenc.errors import (
    ConservationError,
    InputError,
    NonFiniteActivationError,
    UnsupportedModelError,
)
from captum_globenc.linearization.run import propagate
from captum_globenc.linearization.spreading import decomposition, shares, spread
from captum_globenc.linearization.spreading.spread import decompose
from captum_globenc.linearization.spreading.steps import Linear
from captum_globenc.recording.outputs import output_tensor
from tests import oracle_decompx
from tests.conftest import left_behind
from tests.models import FAMILIES, build, padded, randomize, sentence, within
from tests.networks import CASES, error, example
from tests.test_image_families import FAMILIES as IMAGES

RULES = ("absdot", "abssim", "norm", "equal", "cls")
LENGTHS = (7, 4)
EXACT = {"rtol": 0, "atol": 1e-10}


def first(output: Tensor) -> Tensor:
    return output[:, 1]


def backward(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Relevance without biases, of one backward pass."""
    run = propagate(
        model, (ids,), (mask,), ["block"], first, "cp", keeps_own_biases=True
    )
    relevance = (run.values[0] * run.gradients[0]).sum(-1)
    return relevance.T if run.is_turned[0] else relevance


@functools.cache
def model_of(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return build(name, dtype)


def has_sdpa(name: str) -> bool:
    return bool(getattr(FAMILIES[name].head, "_supports_sdpa", True))


@functools.cache
def batch() -> tuple[Tensor, Tensor]:
    return padded([sentence(n, n) for n in LENGTHS], extra=1)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_sums_and_padding(name: str) -> None:
    """Relevance sums to the output, and a batch gives what its examples give."""
    model, (ids, mask) = model_of(name), batch()
    for rule in RULES:
        found = spread(model, (ids,), (mask,), first, rule)
        torch.testing.assert_close(found.relevance.sum(1), found.output, **EXACT)
        with torch.no_grad():
            logits = output_tensor(model(ids, attention_mask=mask))
        torch.testing.assert_close(found.output, logits[:, 1], **EXACT)
        for row, n in enumerate(LENGTHS):
            assert not found.relevance[row, n:].any()
        alone = spread(
            model, (ids[1:, : LENGTHS[1]],), (mask[1:, : LENGTHS[1]],), first, rule
        )
        torch.testing.assert_close(
            alone.relevance[0],
            found.relevance[1, : LENGTHS[1]],
            **within(model, EXACT),
        )
    assert not left_behind(model)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_float32(name: str) -> None:
    model, (ids, mask) = model_of(name, torch.float32), batch()
    exact = model_of(name)
    for rule in ("absdot", "norm"):
        found = spread(model, (ids,), (mask,), first, rule)
        assert found.relevance.dtype == torch.float32
        error = (found.relevance.sum(1) - found.output).abs().max()
        assert error <= 1e-4 * max(1, found.output.abs().max())
        expected = spread(exact, (ids,), (mask,), first, rule).relevance
        assert (found.relevance - expected).abs().max() <= 2e-3 * expected.abs().max()


@pytest.mark.parametrize("name", list(FAMILIES))
def test_without_biases(name: str) -> None:
    """The forward decomposition is the backward pass, and biases keep the rest."""
    model, (ids, mask) = model_of(name), batch()
    found, kept = decompose(model, (ids,), (mask,), first, "none")
    torch.testing.assert_close(found.relevance, backward(model, ids, mask), **EXACT)
    torch.testing.assert_close(found.relevance.sum(1) + kept, found.output, **EXACT)


@pytest.mark.parametrize(
    "name",
    [name for name in FAMILIES if build(name).config._attn_implementation == "sdpa"],
)
def test_eager_attention(name: str) -> None:
    """Some take the softmax in float32, whatever the model's dtype is."""
    model, ids = build(name, attention="eager"), sentence(7)[None]
    found = spread(model, (ids,), (), first, "absdot")
    expected = spread(model_of(name), (ids,), (), first, "absdot")
    torch.testing.assert_close(found.relevance, expected.relevance, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in IMAGES if n != "siglip-tower"])
@pytest.mark.parametrize("rule", ["absdot", "cls"])
def test_images(name: str, rule: str) -> None:
    """A vector of the first layer's input is a patch or a special token."""
    model = randomize(IMAGES[name].build()).double().eval()
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    found = spread(model, (images,), (), first, rule)
    assert found.relevance.shape[1] >= 9
    torch.testing.assert_close(found.relevance.sum(1), found.output, **EXACT)
    alone = spread(model, (images[1:],), (), first, rule)
    torch.testing.assert_close(alone.relevance[0], found.relevance[1], **EXACT)


def test_a_pooling_attention() -> None:
    """SigLIP's tower reads its tokens by attention with a query of its own."""
    model = randomize(IMAGES["siglip-tower"].build()).double().eval()
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)

    def pooled(images: Tensor) -> Tensor:
        return model(images).pooler_output

    found = spread(pooled, (images,), (), first, "absdot")
    torch.testing.assert_close(found.relevance.sum(1), found.output, **EXACT)


class TorchClassifier(nn.Module):
    """Torch's own layers behind an embedding; the head reads the first token."""

    def __init__(self, batch_first: bool = True, **options: object) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            24, 4, 36, batch_first=batch_first, activation="gelu", **options
        )
        self.words = nn.Embedding(97, 24)
        self.stack = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(24, 3)
        self.batch_first = batch_first

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.words(ids)
        states = states if self.batch_first else states.transpose(0, 1)
        states = self.stack(states, src_key_padding_mask=mask == 0)
        return self.head(states[:, 0] if self.batch_first else states[0])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_torch_layers(batch_first: bool, norm_first: bool, bias: bool) -> None:
    model = TorchClassifier(batch_first, norm_first=norm_first, bias=bias)
    model = randomize(model).double().eval()
    for layer in model.stack.layers:
        if bias:
            nn.init.normal_(layer.self_attn.in_proj_bias)
            nn.init.normal_(layer.self_attn.out_proj.bias)
    ids, mask = batch()
    for rule in RULES:
        found = spread(model, (ids,), (mask,), first, rule)
        torch.testing.assert_close(found.relevance.sum(1), found.output, **EXACT)
        assert not found.relevance[1, LENGTHS[1] :].any()
    one = ids[:1], mask[:1]
    none, _ = decompose(model, one[:1], one[1:], first, "none")
    torch.testing.assert_close(none.relevance, backward(model, *one), **EXACT)


def test_embeddings_as_inputs() -> None:
    model, (ids, mask) = model_of("bert"), batch()
    embeddings = model.get_input_embeddings()(ids).detach()

    def forward(embeddings: Tensor, mask: Tensor) -> Tensor:
        return model(inputs_embeds=embeddings, attention_mask=mask).logits

    found = spread(forward, (embeddings,), (mask,), first, "absdot")
    expected = spread(model, (ids,), (mask,), first, "absdot")
    torch.testing.assert_close(found.relevance, expected.relevance, **EXACT)


@pytest.mark.parametrize("name", sorted({"bert", "modernbert", "gpt2"} & set(FAMILIES)))
def test_small_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = model_of(name), batch()
    expected = spread(model, (ids,), (mask,), first, "absdot")
    monkeypatch.setattr(decomposition, "BLOCK", 1)
    found = spread(model, (ids,), (mask,), first, "absdot")
    torch.testing.assert_close(found.relevance, expected.relevance, **EXACT)


def test_only_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The top layer's feed-forward part makes one row, that of the head's token."""
    rows: list[int] = []
    parts = Linear.parts

    def counted(self: Linear, wanted: Tensor, parts_of: object) -> Tensor:
        if "intermediate" in self.where:
            rows.append(len(wanted))
        return parts(self, wanted, parts_of)

    monkeypatch.setattr(Linear, "parts", counted)
    spread(model_of("bert"), (sentence(7)[None],), (), first, "absdot")
    assert rows == [7, 7, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    ids, mask = batch()
    expected = spread(model_of("bert"), (ids,), (mask,), first, "absdot").relevance
    model = copy.deepcopy(model_of("bert", torch.float32)).to(dtype)
    found = spread(model, (ids,), (mask,), first, "absdot")
    assert found.relevance.dtype == dtype
    assert (found.relevance - expected).abs().max() <= 0.1 * expected.abs().max()


def test_autocast() -> None:
    model, (ids, mask) = model_of("bert", torch.float32), batch()
    expected = spread(model, (ids,), (mask,), first, "absdot").relevance
    with torch.autocast("cpu", torch.bfloat16):
        found = spread(model, (ids,), (mask,), first, "absdot")
    assert (found.relevance - expected).abs().max() <= 0.1 * expected.abs().max()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_modes(context: Callable[[], object]) -> None:
    model, (ids, mask) = build("bert"), batch()
    expected = spread(model, (ids,), (mask,), first, "absdot")
    model.train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with context():
        found = spread(model, (ids.clone(),), (mask.clone(),), first, "absdot")
        assert torch.equal(found.relevance, expected.relevance)
    assert model.training
    assert not left_behind(model)
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name])


def test_other_threads() -> None:
    """They run the same model at the same time and get its ordinary output."""
    model, (ids, mask) = model_of("bert"), batch()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    outputs: list[Tensor] = []
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            with torch.no_grad():
                outputs.append(model(ids, attention_mask=mask).logits)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        found = spread(model, (ids,), (mask,), first, "absdot")
    finally:
        ended.set()
        thread.join()
    assert all(torch.equal(output, expected) for output in outputs)
    torch.testing.assert_close(found.output, expected[:, 1], **EXACT)


class Squared(nn.Module):
    """Multiplies two values that depend on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(36))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x * x


class Sigmoid(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        (Squared(), r"no rule for 'mul' in .*1.intermediate.*act_fn' \(Squared"),
        (Sigmoid(), r"no rule for 'sigmoid' in .*1.intermediate.*act_fn' \(Sigmoid"),
        (nn.Sigmoid(), r"not 0 where .* in .*1.intermediate.*act_fn' \(Sigmoid"),
    ],
)
def test_operations_that_are_not_known(activation: nn.Module, message: str) -> None:
    model = build("bert", torch.float32)
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = activation
    with pytest.raises(UnsupportedModelError, match=message):
        spread(model, (sentence(5)[None],), (), first, "absdot")


def test_probabilities_are_refused() -> None:
    model = model_of("bert")

    def forward(ids: Tensor) -> Tensor:
        return model(ids).logits.softmax(-1)

    with pytest.raises(UnsupportedModelError, match="return logits"):
        spread(forward, (sentence(5)[None],), (), first, "absdot")


def test_mixed_examples_are_refused() -> None:
    model = model_of("bert")

    def forward(ids: Tensor) -> Tensor:
        logits = model(ids).logits
        return logits + logits.flip(0)

    with pytest.raises(UnsupportedModelError, match=r"several examples .*\[0, 1\]"):
        spread(forward, (batch()[0],), (), first, "absdot")


def test_no_layers_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(97, 8), nn.Flatten(), nn.Linear(40, 3))
    with pytest.raises(UnsupportedModelError, match="no stack of layers"):
        spread(model, (sentence(5)[None],), (), first, "absdot")


def test_unknown_rules_are_refused() -> None:
    for rule in ("none", "absdott"):
        with pytest.raises(InputError, match="absdot"):
            spread(model_of("bert"), (sentence(5)[None],), (), first, rule)


def test_infinity_is_refused() -> None:
    model = build("bert")
    nn.init.constant_(model.classifier.bias, torch.inf)
    with pytest.raises(NonFiniteActivationError):
        spread(model, (sentence(5)[None],), (), first, "absdot")


def test_the_sum_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(sources: Tensor, biases: Tensor) -> Tensor:
        return torch.full(sources.shape[:-1], 1e-12).to(sources)

    monkeypatch.setitem(shares.WEIGHTS, "equal", half)
    with pytest.raises(ConservationError, match="do not sum to the output"):
        spread(model_of("bert"), (sentence(5)[None],), (), first, "equal")


def test_dead_activations() -> None:
    """A bias behind them meets no vector, and waits for the next sum."""
    model = build("bert")
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.ReLU()
        nn.init.constant_(layer.intermediate.dense.bias, -1e4)
    found = spread(model, (sentence(5)[None],), (), first, "absdot")
    torch.testing.assert_close(found.relevance.sum(1), found.output, **EXACT)


@pytest.mark.parametrize("rule", RULES)
def test_shares_by_hand(rule: str) -> None:
    """Sources (1, 0), (0, 2), (0, 0) meet the bias (3, 1)."""
    parts = torch.tensor([[1.0, 0], [0, 2], [0, 0], [3, 1]], dtype=torch.float64)
    weights = {
        "absdot": [3, 2, 0],
        "abssim": [3 / 10**0.5, 1 / 10**0.5, 0],
        "norm": [1, 2, 0],
        "equal": [1, 1, 0],
        "cls": [1, 0, 0],
    }[rule]
    shared = torch.tensor(weights, dtype=torch.float64)[:, None] / sum(weights)
    expected = parts[:3] + shared * parts[3]
    found = shares.spread(parts[:, None].clone(), rule)[:, 0]
    torch.testing.assert_close(found[:3], expected, **EXACT)
    assert not found[3].any()


def test_left_padding() -> None:
    """The first token of the rule cls is the first that is not padding."""
    model = build("llama")
    ids, mask = batch()
    left, left_mask = ids.clone(), mask.clone()
    for row, n in enumerate(LENGTHS):
        left[row], left_mask[row] = ids[row].roll(-n), mask[row].roll(-n)
    positions = (left_mask.cumsum(1) - 1).clamp(min=0)

    def forward(ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        return model(ids, attention_mask=mask, position_ids=positions).logits

    for rule in RULES:
        found = spread(forward, (left,), (left_mask, positions), first, rule)
        expected = spread(model, (ids,), (mask,), first, rule)
        for row, n in enumerate(LENGTHS):
            torch.testing.assert_close(
                found.relevance[row, -n:], expected.relevance[row, :n], **EXACT
            )
            assert not found.relevance[row, :-n].any()


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("rule", ["none", *RULES])
def test_the_literal_twin(name: str, rule: str) -> None:
    model = CASES[name].build()
    row, target = (-1, 11) if name == "gpt2" else (..., 1)
    for tokens in (7, 2):
        inputs = example(name, tokens)
        network = CASES[name].network(model, inputs)
        _, expected = oracle_decompx.decompose(network, rule)

        def select(output: Tensor) -> Tensor:
            return output[:, row, target]

        found, _ = decompose(model, (inputs[None],), (), select, rule)
        assert error(found.relevance[0], expected[:, target]) <= 1e-10


def test_embeddings_that_go_past_the_layers_are_refused() -> None:
    """What goes around them would pass for a bias."""
    model, ids = model_of("bert"), sentence(6)[None]
    embeddings = model.get_input_embeddings()(ids).detach()

    def through(x: Tensor) -> Tensor:
        return model(inputs_embeds=x).logits

    def around(x: Tensor) -> Tensor:
        return through(x) + 100 * x.sum(1)[:, :3]

    found = DecompX(through, biases="absdot").attribute(embeddings, target=1)
    output = through(embeddings)[:, 1].detach()
    torch.testing.assert_close(found.sum((1, 2)), output, **EXACT)
    with pytest.raises(UnsupportedModelError, match="is not all that the output"):
        DecompX(around, biases="absdot").attribute(embeddings, target=1)
