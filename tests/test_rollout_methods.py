"""ALTI, Value Zeroing, attention rollout and class-aware GlobEnc: what they compute."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import transformers as t
from torch import Tensor, nn

from captum_globenc import (
    ALTI,
    AttentionRollout,
    GlobEnc,
    InputError,
    LayerGlobEnc,
    UnsupportedModelError,
    ValueZeroing,
    record,
)
from captum_globenc.contributions import alti as alti_module
from captum_globenc.contributions import rollout
from captum_globenc.recording import grouping
from tests import oracle, oracles_rollout
from tests.conftest import left_behind
from tests.models import FAMILIES, SIZES, build, encoder_of, padded, randomize, sentence
from tests.test_images import images, layers_of, literal, recipe, vit
from tests.test_oracle import relative
from tests.test_properties import Shapes

EXACT = {"rtol": 1e-12, "atol": 0}
LIMIT = {torch.float64: 1e-10, torch.float32: 1e-3}
LENGTHS = (6, 4, 2)
IDS, MASK = padded([sentence(8), sentence(5)])
WITHOUT_SIGN = {ALTI: oracles_rollout.alti, ValueZeroing: oracles_rollout.value_zeroing}


@functools.cache
def steps(family: str, dtype: torch.dtype) -> list[list[oracles_rollout.Step]]:
    """The layers of every example by the oracle."""
    encoder = encoder_of(family, build(family, dtype))
    how = FAMILIES[family].recipe
    examples = [sentence(n, seed=n) for n in LENGTHS]
    return [
        oracles_rollout.steps_of(encoder, how, oracle.run_encoder(encoder, how, ids))
        for ids in examples
    ]


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("method", WITHOUT_SIGN)
@pytest.mark.parametrize("family", FAMILIES)
def test_contributions_and_rollout(family: str, method, dtype: torch.dtype) -> None:
    """Against loops, in a padded batch."""
    model = build(family, dtype)
    # Eager attention may take its softmax in float32 in older releases.
    is_eager = family == "layoutlm" and model.config._attn_implementation == "eager"
    limit = LIMIT[torch.float32 if is_eager else dtype]
    sentences = [sentence(n, seed=n) for n in LENGTHS]
    ids, mask = padded(sentences, extra=1)
    found = method(model).decompose(ids, mask)
    scores = method(model).attribute(ids, 1, mask)
    assert found.local.shape == (3, 3, 7, 7)
    for row, example in enumerate(sentences):
        n = len(example)
        expected = [WITHOUT_SIGN[method](step) for step in steps(family, dtype)[row]]
        for index, local in enumerate(expected):
            got = found.local[row, index, :n, :n].double()
            # Relative to the row, which sums to one: what is small was subtracted.
            assert (got - local).abs().max() <= limit
            assert not got[local == 0].any()
        read = FAMILIES[family].reads(example) @ oracle.rollout(expected)
        assert (scores[row, :n].double() - read).abs().max() <= limit
        assert not scores[row, n:].any()
        assert not found.local[row, :, n:].any()
        assert not found.local[row, :, :, n:].any()


@pytest.mark.parametrize("method", WITHOUT_SIGN)
def test_images(method) -> None:
    model, batch = vit(), images(2)
    pixels = method(model).attribute(batch, target=1)
    for row, image in enumerate(batch):
        found = oracles_rollout.steps_of(
            model.vit, recipe(model), literal(model, image)
        )
        expected = oracle.rollout([WITHOUT_SIGN[method](step) for step in found])[0]
        patches = pixels[row].unfold(1, 4, 4).unfold(2, 4, 4).sum((0, 3, 4)).flatten()
        torch.testing.assert_close(patches, expected[1:], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", WITHOUT_SIGN)
def test_layer_scale(method) -> None:
    sizes = {k: v for k, v in SIZES.items() if k.startswith(("hidden", "num", "inter"))}
    config = t.Dinov2Config(**sizes, image_size=12, patch_size=4, mlp_ratio=2)
    model = randomize(t.Dinov2ForImageClassification(config)).double().eval()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lambda" in name:
            values = torch.randn(parameter.shape, generator=generator).double()
            parameter.data.copy_(1 + 0.5 * values)
    image, encoder = images(1)[0], model.dinov2
    is_old = hasattr(encoder.get_submodule("encoder.layer")[0].attention, "attention")
    how = oracle.DINOV2_OLD if is_old else oracle.DINOV2
    how = oracle.replace(how, feed_forward="mlp", up="", down="", final="layernorm")
    with torch.no_grad():
        x = encoder.embeddings(image[None])[0].double()
    layers = oracle.run_layers(encoder, how, x)
    found = method(model).decompose(image[None]).local[0]
    for local, step in zip(found, oracles_rollout.steps_of(encoder, how, layers)):
        expected = WITHOUT_SIGN[method](step)
        torch.testing.assert_close(local, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", WITHOUT_SIGN)
@pytest.mark.parametrize("family", ["bert", "roberta-prelayernorm"])
def test_rms_norms(family: str, method) -> None:
    model = build(family)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm):
            norm = nn.RMSNorm(24, eps=1e-3, dtype=torch.float64)
            norm.weight.data.copy_(module.weight)
            model.set_submodule(path, norm)
    encoder, how, example = encoder_of(family, model), FAMILIES[family].recipe, IDS[0]
    layers = oracle.run_encoder(encoder, how, example)
    found = method(model).decompose(example[None]).local[0]
    for local, step in zip(found, oracles_rollout.steps_of(encoder, how, layers)):
        torch.testing.assert_close(
            local, WITHOUT_SIGN[method](step), rtol=1e-9, atol=1e-10
        )


# By hand


def two_tokens(output_bias: tuple[float, float] = (0, 0)) -> nn.TransformerEncoder:
    """A pre-LN layer of two dimensions that attends evenly and adds no feed-forward.

    A value is (2, 0) where a token's first entry is the larger one, else (-2, 0).
    """
    layer = nn.TransformerEncoderLayer(
        2, 1, 2, dropout=0, batch_first=True, norm_first=True, layer_norm_eps=1e-14
    )
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    encoder = encoder.double().eval()
    (layer,) = encoder.layers
    with torch.no_grad():
        for parameter in (*layer.self_attn.parameters(), *layer.linear2.parameters()):
            parameter.zero_()
        layer.self_attn.in_proj_weight[4, 0] = 2.0
        layer.self_attn.out_proj.weight.copy_(torch.eye(2))
        layer.self_attn.out_proj.bias.copy_(torch.tensor(output_bias))
    return encoder


def rows_of(method, tokens: list[list[float]], *bias: float) -> Tensor:
    x = torch.tensor([tokens], dtype=torch.float64)
    return method(two_tokens(bias or (0, 0))).decompose(x).local[0, 0]


def test_alti_by_hand() -> None:
    # y = (5, 1) and (4, 0); vectors (4, 1), (1, 0) and (1, 0), (3, 0).
    found = rows_of(ALTI, [[3, 1], [2, 0]])
    expected = torch.tensor([[5 / 6, 1 / 6], [1 / 4, 3 / 4]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_alti_of_clipped_rows_by_hand() -> None:
    # The bias turns y into (-1, 0) and (-2, -1): farther from each vector than from 0.
    found = rows_of(ALTI, [[3, 1], [2, 0]], -6, -1)
    assert torch.equal(found, torch.eye(2).double())
    # y = (1, 1) and (0, 0): the first row keeps what is near, the second nothing.
    found = rows_of(ALTI, [[3, 1], [2, 0]], -4, 0)
    expected = torch.tensor([[0, 1], [0, 1]]).double()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_value_zeroing_by_hand() -> None:
    # x' = (3, 1); without a value (2, 1), (4, 1). x' = (0, 2); (-1, 2), (1, 2).
    found = rows_of(ValueZeroing, [[3, 1], [0, 2]])
    first = 1 - 7 / math.sqrt(50), 1 - 13 / math.sqrt(170)
    shares = [s / sum(first) for s in first]
    expected = torch.tensor([shares, [0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_value_zeroing_where_nothing_turns_by_hand() -> None:
    # x' = (4, 0), and (3, 0) without either value: the same direction.
    found = rows_of(ValueZeroing, [[3, 1], [2, 0]])
    torch.testing.assert_close(found[0], torch.tensor([0.5, 0.5]).double())
    assert found[1].tolist() == [0, 1]


# ALTI, blocks; Value Zeroing, batches


def test_alti_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few vectors are held at once."""
    model = build("bert")
    expected = ALTI(model).decompose(IDS, MASK).local
    monkeypatch.setattr(alti_module, "_HELD", 24 * 3)
    monkeypatch.setattr(rollout, "_HELD", 4 * 8 * 3)
    torch.testing.assert_close(
        ALTI(model).decompose(IDS, MASK).local, expected, rtol=1e-9, atol=1e-14
    )
    scores = ALTI(model).attribute(IDS, 1, MASK)
    rolled = ALTI(model).decompose(IDS, MASK).rollout()[:, 0]
    torch.testing.assert_close(scores, rolled, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("make", [ALTI, functools.partial(GlobEnc, class_aware=True)])
def test_nothing_quadratic_is_built(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """No vectors of all pairs, and no attention matrix of all receivers."""
    monkeypatch.setattr(alti_module, "_HELD", 24 * 40 * 4)
    monkeypatch.setattr(rollout, "_HELD", 4 * 40 * 8)
    monkeypatch.setattr(grouping, "_HELD", 40 * 24)
    model = Head(encoder_of("bert", build("bert")))
    ids = torch.stack([sentence(40, seed=s) for s in (1, 2)])
    with Shapes() as shapes:
        make(model).attribute(ids, 1, torch.ones_like(ids))
    assert not [shape for shape in shapes.seen if shape.count(40) > 1]
    largest = max(torch.Size(shape).numel() for shape in shapes.seen)
    assert largest < 40 * 40 * 24


def test_value_zeroing_replays_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("bert")
    expected = ValueZeroing(model).attribute(IDS, 1, MASK)
    monkeypatch.setattr(rollout, "_HELD", 1)
    torch.testing.assert_close(
        ValueZeroing(model).attribute(IDS, 1, MASK), expected, **EXACT
    )
    part = record(model, IDS, MASK).layers[0].examples(slice(0, 1))
    with pytest.raises(InputError, match="replays=True"):
        part.replay(lambda call: call.context)


def test_value_zeroing_leaves_the_model_as_it_was() -> None:
    model = build("bert").train()
    ValueZeroing(model).attribute(IDS, 1, (MASK,))
    assert all(module.training for module in model.modules())
    assert not left_behind(model)
    assert all(p.grad is None for p in model.parameters())


def test_a_layer_under_autocast_runs_again_under_it() -> None:
    model = build("bert", torch.float32)

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids, mask).logits

    run = record(forward, IDS, MASK)
    again = run.replay(0, lambda call: call.context)
    kept = MASK.bool()
    assert torch.equal(again[kept], run.layers[1].hidden[kept])


# Attention rollout


@pytest.mark.parametrize("family", ["bert", "modernbert", "t5", "gpt2", "deberta"])
def test_attention_rollout_is_w_fixed_res(family: str) -> None:
    if family not in FAMILIES:
        pytest.skip("not in this release of transformers")
    model = build(family)
    other = GlobEnc(model, local="W_FIXED_RES")
    method = AttentionRollout(model)
    run = record(lambda ids, mask: model(ids, attention_mask=mask).logits, IDS, MASK)
    assert torch.equal(method.attribute(run, 1), other.attribute(run, 1))
    assert torch.equal(method.decompose(run).local, other.decompose(run).local)


# Class-aware GlobEnc


class Head(nn.Module):
    """Two classes: linear in the first token; curved in all that are no padding."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator).double())

        self.encoder, self.first, self.all = encoder, draw(24), draw(24)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.read(states, mask)

    def read(self, states: Tensor, mask: Tensor) -> Tensor:
        linear = states[:, 0] @ self.first + 0.7
        curved = ((states @ self.all).tanh() * mask).sum(-1) / mask.sum(-1)
        return torch.stack([linear, curved], -1)


@pytest.mark.parametrize("target", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_class_aware(family: str, target: int) -> None:
    """Against loops, for a head that reads a token and one that reads all."""
    encoder = encoder_of(family, build(family))
    model = Head(encoder)
    sentences = [sentence(n, seed=n) for n in LENGTHS]
    ids, mask = padded(sentences, extra=1)
    scores = GlobEnc(model, encoder=encoder, class_aware=True).attribute(
        ids, target, mask
    )
    for row, example in enumerate(sentences):
        n = len(example)
        layers = [step.layer for step in steps(family, torch.float64)[row]]
        final = layers[-1].output.clone().requires_grad_()
        output = model.read(final[None], torch.ones(1, n).double())[0, target]
        (gradient,) = torch.autograd.grad(output, final)
        *_, expected = oracles_rollout.class_aware(layers, gradient)
        # LayoutLM's eager attention takes its softmax in float32 in older releases.
        limit = 1e-4 if family == "layoutlm" else 1e-10
        error = (scores[row, :n] - expected).abs().max()
        assert error <= limit * expected.abs().max()
        assert not scores[row, n:].any()


def test_one_layer_and_a_linear_head_give_the_logit() -> None:
    """Σ_j r_j, and what biases and the feed-forward part add, is the logit."""
    config = t.BertConfig(**{**SIZES, "num_hidden_layers": 1})
    encoder = randomize(t.BertModel(config)).double().eval()
    model, ids = Head(encoder), sentence(7)
    method = GlobEnc(model, class_aware=True)
    scores = method.attribute(ids[None], 0, torch.ones(1, 7).long())[0]
    (layer,) = oracle.run_encoder(encoder, oracle.BERT_LIKE, ids)
    gradient = torch.zeros(7, 24).double()
    gradient[0] = model.first.detach()
    expected = oracles_rollout.top_projection(layer, gradient)
    assert relative(scores, expected) <= 1e-10
    # γ2 C(γ1 C(b_O) / s1 + β1 + FFN(z)) / s2 + β2 of the first token.
    module = encoder.encoder.layer[0]
    output, norm2 = module.attention.output, module.output.LayerNorm
    z, norm1 = oracle.norm_of(layer.y, output.LayerNorm)
    rest = oracle.through(output.dense.bias, norm1, 0) + output.LayerNorm.bias
    up, down = module.intermediate.dense, module.output.dense
    rest = rest + oracle.linear(oracle.gelu(oracle.linear(z, up)), down)[0]
    rest = oracle.through(rest, layer.norms2[0], 0) + norm2.bias
    with torch.no_grad():
        logit = model(ids[None], torch.ones(1, 7).long())[0, 0]
        share = rest @ model.first + 0.7
    torch.testing.assert_close(scores.sum() + share, logit, rtol=1e-11, atol=1e-11)


def test_class_aware_scores_have_the_sign_of_the_class() -> None:
    """Of two classes with opposite weights, the scores are opposite, too."""
    model = build("bert")
    with torch.no_grad():
        model.classifier.weight[1] = -model.classifier.weight[0]
    method = GlobEnc(model, class_aware=True)
    one, other = (method.attribute(IDS, target, (MASK,)) for target in (0, 1))
    torch.testing.assert_close(one, -other, **EXACT)
    plain = GlobEnc(model).attribute(IDS, 0, (MASK,))
    assert torch.equal(plain, GlobEnc(model).attribute(IDS, 1, (MASK,)))
    assert not torch.allclose(one.abs(), plain)


def test_class_aware_layers() -> None:
    """From gradient times state at the top down to the global scores."""
    encoder = encoder_of("bert", build("bert"))
    model = Head(encoder)
    layers = list(encoder.encoder.layer)
    method = LayerGlobEnc(model, [encoder.embeddings, *layers], class_aware=True)
    found = [part.sum(-1) for part in method.attribute(IDS, 1, MASK)]
    torch.testing.assert_close(
        found[0], GlobEnc(model, class_aware=True).attribute(IDS, 1, MASK), **EXACT
    )
    below = method.attribute(IDS, 1, MASK, attribute_to_layer_input=True)
    torch.testing.assert_close(below[1].sum(-1), found[0], **EXACT)
    run = record(model, IDS, MASK)
    state = (run.gradient(1) * run.final).sum(-1)
    torch.testing.assert_close(found[-1], state.detach(), rtol=1e-11, atol=1e-14)
    local = GlobEnc(model).decompose(run).local
    for upper, lower, index in ((found[2], found[1], 1), (found[1], found[0], 0)):
        stepped = torch.bmm(upper[:, None], local[:, index])[:, 0]
        torch.testing.assert_close(lower, stepped, rtol=1e-11, atol=1e-14)
    shares = LayerGlobEnc(model, layers, class_aware=True, normalize=True)
    for part in shares.attribute(IDS, 1, MASK):
        sizes = part.sum(-1).abs().sum(-1)
        torch.testing.assert_close(sizes, torch.ones(2).double(), **EXACT)


def test_class_aware_images() -> None:
    model, batch = vit(), images(2)
    pixels = GlobEnc(model, class_aware=True).attribute(batch, target=1)
    weight = model.classifier.weight[1].detach()
    for row, image in enumerate(batch):
        layers = literal(model, image)
        gradient = torch.zeros(10, 24).double()
        gradient[0] = weight
        *_, expected = oracles_rollout.class_aware(layers, gradient)
        patches = pixels[row].unfold(1, 4, 4).unfold(2, 4, 4).sum((0, 3, 4)).flatten()
        torch.testing.assert_close(patches, expected[1:], rtol=1e-9, atol=1e-9)
    assert len(layers_of(model)) == 3


def test_class_aware_decomposition_has_no_class() -> None:
    model = build("bert")
    found = GlobEnc(model, class_aware=True).decompose(IDS, MASK).local
    assert torch.equal(found, GlobEnc(model).decompose(IDS, MASK).local)


def test_class_aware_at_a_token() -> None:
    """The gradient at that token alone; a mean is the mean of the tokens."""
    model = Head(encoder_of("bert", build("bert")))
    method = GlobEnc(model, class_aware=True)

    def scores(index: object, rows: int = 2) -> Tensor:
        return method.attribute(IDS[:rows], 1, MASK[:rows], token_index=index)

    whole = method.attribute(IDS[:1], 1, MASK[:1])
    tokens = torch.stack([scores(index, 1) for index in range(8)])
    torch.testing.assert_close(tokens.sum(0), whole, rtol=1e-9, atol=1e-12)
    mean = scores("mean", 1)
    torch.testing.assert_close(tokens.mean(0), mean, rtol=1e-9, atol=1e-12)
    each = scores(torch.tensor([6, 1]))
    torch.testing.assert_close(each[:1], tokens[6], rtol=1e-9, atol=1e-12)
    with pytest.raises(InputError, match=r"example 0 does not depend .* names, 3"):
        method.attribute(IDS, 0, MASK, token_index=3)


def test_class_aware_needs() -> None:
    model = build("bert")
    with pytest.raises(InputError, match="needs local=\"N_ENC\", got 'N'"):
        GlobEnc(model, local="N", class_aware=True)
    with pytest.raises(InputError, match="needs readout=\"gradient\", got 'pooling'"):
        GlobEnc(model, readout="pooling", class_aware=True)
    with pytest.raises(AssertionError, match="target None selects 3 of them"):
        GlobEnc(model, class_aware=True).attribute(IDS, None, (MASK,))
    tokens = build("bert", head=t.BertForTokenClassification)
    with pytest.raises(AssertionError, match="target 2 selects 3 of them"):
        GlobEnc(tokens, class_aware=True).attribute(IDS, 2, (MASK,))
    # One output of each example needs no target.
    one = GlobEnc(lambda i, m: model(i, m).logits[:, 1], class_aware=True)
    expected = GlobEnc(model, class_aware=True).attribute(IDS, 1, (MASK,))
    torch.testing.assert_close(one.attribute(IDS, None, MASK), expected, **EXACT)


def test_class_aware_heads_that_are_refused() -> None:
    model = build("bert")
    last = model.classifier.weight[1].detach()

    def numpy_head(ids, mask):
        states = model.bert(ids, mask).last_hidden_state[:, 0]
        return torch.from_numpy(states.detach().numpy() @ last.numpy())

    def detached(ids, mask):
        logits = model(ids, mask).logits
        return logits + float(logits.sum())

    def lower(ids, mask):
        states = model.bert(ids, mask, output_hidden_states=True).hidden_states
        return torch.stack([(states[1] + states[3])[:, 0] @ last] * 2, -1)

    def beside(ids, mask):
        logits = model(ids, mask).logits
        return logits + model.get_input_embeddings()(ids).sum((1, 2))[:, None]

    def constant(ids, mask):
        return model(ids, mask).logits * 0

    for head, words in (
        (numpy_head, "gradient of the selected output"),
        (detached, "leave torch"),
        (lower, r"also reads hidden states of layer 1"),
        (beside, "the inputs by themselves|tokens by themselves"),
        (constant, "none, or it is 0, in an example"),
    ):
        target = None if head is numpy_head else 1
        with pytest.raises(UnsupportedModelError, match=words):
            GlobEnc(head, class_aware=True).attribute(IDS, target, MASK)


def test_class_aware_head_that_reads_padding() -> None:
    model = build("bert")

    def last_position(ids, mask):
        return model.bert(ids, mask).last_hidden_state[:, -1, :3]

    method = GlobEnc(last_position, class_aware=True)
    with pytest.raises(InputError, match="token 7 of example 1, which is padding"):
        method.attribute(IDS, 1, MASK)


def test_class_aware_multiple_choice() -> None:
    """Every choice by its own output, whatever the target."""
    model = build("bert", head=t.BertForMultipleChoice)
    choices = torch.stack([IDS[0], IDS[0].roll(1)])[None]
    scores = GlobEnc(model, class_aware=True).attribute(choices, 1)
    assert scores.shape == choices.shape
    single = GlobEnc(
        lambda ids: model(ids[:, None]).logits[:, 0], encoder=model, class_aware=True
    )
    torch.testing.assert_close(scores[0, :1], single.attribute(choices[0, :1]), **EXACT)
