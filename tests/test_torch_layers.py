"""Torch's own encoder layers, in all forms, and blocks built on its attention."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from captum_globenc import (
    LOCAL_SCORES,
    GlobEnc,
    LayerGlobEnc,
    register_architecture,
)
from captum_globenc.encoders import registry
from tests import oracle
from tests.conftest import left_behind
from tests.models import padded, randomize, sentence

EXACT = {"rtol": 1e-12, "atol": 0}
HIDDEN, HEADS = 24, 4
LENGTHS = (7, 4)
POST = oracle.Recipe(
    layers="layers",
    value="attention",
    fused=True,
    output="self_attn.out_proj",
    norm1="norm1",
    feed_forward="feed_forward",
    norm2="norm2",
)
PRE = oracle.Recipe(
    layers="layers",
    value="attention",
    fused=True,
    output="self_attn.out_proj",
    before="norm1",
    middle="norm2",
    feed_forward="feed_forward",
)


class Classifier(nn.Module):
    """Token and position embeddings, torch layers, a head on the first token."""

    def __init__(self, stack: nn.Module, batch_first: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(97, HIDDEN)
        self.positions = nn.Embedding(40, HIDDEN)
        self.stack = stack
        self.head = nn.Linear(HIDDEN, 3)
        self.batch_first = batch_first

    def run(self, states: Tensor, **masks: Tensor | bool | None) -> Tensor:
        if isinstance(self.stack, nn.TransformerEncoder):
            return self.stack(states, **masks)
        if "mask" in masks:
            masks["src_mask"] = masks.pop("mask")
        alone = isinstance(self.stack, nn.TransformerEncoderLayer)
        for layer in [self.stack] if alone else self.stack:
            states = layer(states, **masks)
        return states

    def forward(
        self, ids: Tensor, attended: Tensor | None = None, **masks: Tensor | bool
    ) -> Tensor:
        states = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        if not self.batch_first:
            states = states.transpose(0, 1)
        hidden = None if attended is None else attended == 0
        mask = masks.get("mask")
        if hidden is not None and mask is not None and mask.is_floating_point():
            hidden = torch.zeros(hidden.shape).to(mask).masked_fill(hidden, -torch.inf)
        states = self.run(states, src_key_padding_mask=hidden, **masks)
        if not self.batch_first:
            states = states.transpose(0, 1)
        return self.head(states[:, 0])


def layer(norm_first: bool = False, batch_first: bool = True, **options: object):
    return nn.TransformerEncoderLayer(
        HIDDEN,
        HEADS,
        36,
        activation="gelu",
        norm_first=norm_first,
        batch_first=batch_first,
        **options,
    )


def build(
    norm_first: bool = False,
    batch_first: bool = True,
    final: bool = False,
    kind: str = "encoder",
    dtype: torch.dtype = torch.float64,
) -> Classifier:
    torch.manual_seed(1)
    one = layer(norm_first, batch_first)
    norm = nn.LayerNorm(HIDDEN) if final else None
    stack: nn.Module = {
        "encoder": lambda: nn.TransformerEncoder(
            one, 3, norm, enable_nested_tensor=False
        ),
        "nested": lambda: nn.TransformerEncoder(one, 3, norm),
        "layer": lambda: one,
        "list": lambda: nn.ModuleList(copy.deepcopy(one) for _ in range(3)),
        "sequential": lambda: nn.Sequential(
            *(copy.deepcopy(one) for _ in range(3)),
        ),
    }[kind]()
    model = Classifier(stack, batch_first)
    randomize(model)
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            for parameter in (module.in_proj_weight, module.in_proj_bias):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data = 0.3 * noise
    return model.to(dtype).eval()


class Described(nn.Module):
    """A torch layer's weights under the names that the oracle's recipes use."""

    def __init__(self, original: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.self_attn = original.self_attn
        self.norm1, self.norm2 = original.norm1, original.norm2
        self.attention = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.attention.weight = original.self_attn.in_proj_weight
        self.attention.bias = original.self_attn.in_proj_bias
        self.feed_forward = nn.Sequential(original.linear1, nn.GELU(), original.linear2)


@torch.no_grad()
def literal(
    model: Classifier, ids: Tensor, norm_first: bool = False, causal: bool = False
) -> list[oracle.Layer]:
    """The layers on one unpadded sentence by the oracle."""
    stack = model.stack
    layers = [
        Described(module)
        for module in stack.modules()
        if isinstance(module, nn.TransformerEncoderLayer)
    ]
    encoder = nn.Module()
    encoder.layers = nn.ModuleList(layers)
    encoder.config = SimpleNamespace(
        num_attention_heads=HEADS, num_hidden_layers=len(layers)
    )
    final = getattr(stack, "norm", None)
    if isinstance(final, nn.Module):
        encoder.norm = final
    x = model.tokens(ids) + model.positions(torch.arange(len(ids)))
    recipe = oracle.replace(
        PRE if norm_first else POST,
        causal=causal,
        final="norm" if isinstance(final, nn.Module) else "",
    )
    return oracle.run_layers(encoder, recipe, x.double())


FORMS = list(itertools.product((False, True), (True, False), (False, True)))


@pytest.mark.parametrize(("norm_first", "batch_first", "final"), FORMS)
def test_the_oracle_computes_the_model(
    norm_first: bool, batch_first: bool, final: bool
) -> None:
    model, ids = build(norm_first, batch_first, final), sentence(6)
    last = literal(model, ids, norm_first)[-1].output
    with torch.no_grad():
        expected = model.head(last[0])
        torch.testing.assert_close(model(ids[None])[0], expected, rtol=1e-11, atol=0)


def check(
    model: Classifier,
    norm_first: bool,
    score: str = "N_ENC",
    causal: bool = False,
    limit: float = 1e-10,
    **masks: Tensor | bool,
) -> None:
    """Scores and rollout of a padded batch against the oracle."""
    sentences = [sentence(n, seed=n) for n in LENGTHS]
    ids, attended = padded(sentences)

    def forward(ids: Tensor, attended: Tensor) -> Tensor:
        return model(ids, attended, **masks)

    globenc = GlobEnc(forward, local=score)
    found = globenc.decompose(ids, additional_forward_args=(attended,)).local
    scores = globenc.attribute(ids, 1, (attended,))
    for row, example in enumerate(sentences):
        n = len(example)
        layers = literal(model, example, norm_first, causal)
        expected = [oracle.local_score(one, score) for one in layers]
        for index, local in enumerate(expected):
            torch.testing.assert_close(
                found[row, index, :n, :n].double(), local, rtol=limit, atol=1e-14
            )
        whole = oracle.rollout(expected)[0]
        torch.testing.assert_close(
            scores[row, :n].double(), whole, rtol=limit, atol=1e-14
        )
        assert not scores[row, n:].any()
    assert not left_behind(model)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("score", LOCAL_SCORES)
@pytest.mark.parametrize(("norm_first", "batch_first", "final"), FORMS)
def test_encoder(norm_first: bool, batch_first: bool, final: bool, score: str) -> None:
    check(build(norm_first, batch_first, final), norm_first, score)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", ["layer", "list", "sequential"])
def test_stacks(kind: str, norm_first: bool) -> None:
    check(build(norm_first, kind=kind), norm_first)


def test_nested_tensors() -> None:
    """Torch's fast way to leave padding out."""
    check(build(kind="nested"), norm_first=False)


@pytest.mark.parametrize("kind", ["encoder", "layer", "list"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_causal(kind: str, batch_first: bool) -> None:
    model = build(batch_first=batch_first, kind=kind)
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
    check(model, False, causal=True, mask=hidden)
    added = torch.zeros(7, 7).double().masked_fill(hidden, -torch.inf)
    check(model, False, causal=True, mask=added, is_causal=True)


def test_the_fast_path_and_the_slow_one_are_the_same_model() -> None:
    """Torch fuses layers in evaluation mode: a run that is explained does not."""
    model = build()
    ids, attended = padded([sentence(n) for n in LENGTHS])
    with torch.no_grad():
        fused = model(ids, attended)
    seen: list[Tensor] = []

    def forward(ids: Tensor, attended: Tensor) -> Tensor:
        seen.append(model(ids, attended))
        return seen[-1]

    GlobEnc(forward).attribute(ids, 1, (attended,))
    torch.testing.assert_close(seen[0].detach(), fused, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm_first", [False, True])
def test_dtypes(norm_first: bool, dtype: torch.dtype) -> None:
    model = build(norm_first, dtype=dtype)
    if dtype == torch.float32:
        check(model, norm_first, limit=1e-4)
        return
    ids, attended = padded([sentence(n) for n in LENGTHS])
    scores = GlobEnc(model).attribute(ids, 1, (attended,))
    precise = GlobEnc(build(norm_first)).attribute(ids, 1, (attended,))
    error = (scores.double() - precise).norm() / precise.norm()
    assert error < (0.02 if dtype == torch.float16 else 0.15)


def test_batch_rows_are_single_runs() -> None:
    model = build(norm_first=True)
    sentences = [sentence(n) for n in LENGTHS]
    ids, attended = padded(sentences, extra=2)
    scores = GlobEnc(model).attribute(ids, 1, (attended,))
    for row, example in enumerate(sentences):
        alone = GlobEnc(model).attribute(example[None], 1)
        torch.testing.assert_close(scores[row, : len(example)], alone[0], **EXACT)


def test_layer_globenc_on_an_embedding() -> None:
    model = build()
    ids, attended = padded([sentence(n) for n in LENGTHS])
    found = LayerGlobEnc(model, model.tokens).attribute(ids, 1, (attended,))
    assert found.shape == (2, 7, HIDDEN)
    scores = GlobEnc(model).attribute(ids, 1, (attended,))
    torch.testing.assert_close(found.sum(-1), scores, rtol=1e-9, atol=0)


def test_a_head_that_takes_the_maximum() -> None:
    model = build()
    model.forward = lambda ids: model.head(  # type: ignore[method-assign]
        model.stack(model.tokens(ids)).max(1).values
    )
    ids = sentence(5)[None]
    states = model.stack(model.tokens(ids)).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.head(states.max(1).values)[0, 1], states)
    weights = gradient.norm(dim=-1) / gradient.norm(dim=-1).sum()
    rollout = GlobEnc(model).decompose(ids).rollout()
    scores = GlobEnc(model).attribute(ids, 1)
    torch.testing.assert_close(scores, (weights[:, None] @ rollout)[:, 0], **EXACT)


class Block(nn.Module):
    """As in torchvision's VisionTransformer, which needs no attention weights."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(HIDDEN)
        self.self_attention = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True)
        self.ln_2 = nn.LayerNorm(HIDDEN)
        self.mlp = nn.Sequential(
            nn.Linear(HIDDEN, 36), nn.GELU(), nn.Linear(36, HIDDEN)
        )
        self.need_weights = need_weights
        self.weights: Tensor | None = None

    def forward(self, states: Tensor) -> Tensor:
        x = self.ln_1(states)
        mixed, self.weights = self.self_attention(
            x, x, x, need_weights=self.need_weights
        )
        states = states + mixed
        return states + self.mlp(self.ln_2(states))


class Encoder(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 10, HIDDEN))
        self.dropout = nn.Dropout(0.1)
        self.layers = nn.Sequential(*(Block(need_weights) for _ in range(3)))
        self.ln = nn.LayerNorm(HIDDEN)

    def forward(self, states: Tensor) -> Tensor:
        return self.ln(self.layers(self.dropout(states + self.position)))


class VisionTransformer(nn.Module):
    """The layout of torchvision's: a convolution, a class token, blocks, a head."""

    def __init__(self, need_weights: bool = False) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, HIDDEN, 4, 4)
        self.class_token = nn.Parameter(torch.randn(1, 1, HIDDEN))
        self.encoder = Encoder(need_weights)
        self.heads = nn.Linear(HIDDEN, 3)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)
        start = self.class_token.expand(len(images), -1, -1)
        return self.heads(self.encoder(torch.cat([start, patches], 1))[:, 0])


def blocks(need_weights: bool = False) -> VisionTransformer:
    torch.manual_seed(3)
    model = randomize(VisionTransformer(need_weights))
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            nn.init.normal_(module.in_proj_weight, std=0.3)
            nn.init.normal_(module.in_proj_bias, std=0.3)
    return model.double().eval()


TORCHVISION = "torchvision.models.vision_transformer.VisionTransformer"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row of torchvision's class, for the class here, too."""
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
    described = registry._TABLE[TORCHVISION].layouts[0]
    register_architecture(VisionTransformer, described)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("score", LOCAL_SCORES)
@pytest.mark.usefixtures("registered")
def test_vision_blocks(score: str, need_weights: bool) -> None:
    model = blocks(need_weights)
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    found = GlobEnc(model, local=score).decompose(images).local
    pixels = GlobEnc(model, local=score).attribute(images, 1)
    for row, image in enumerate(images):
        layers = vision_layers(model, image)
        expected = [oracle.local_score(one, score) for one in layers]
        for index, local in enumerate(expected):
            torch.testing.assert_close(found[row, index], local, rtol=1e-10, atol=1e-14)
        patches = oracle.rollout(expected)[0, 1:].view(3, 3)
        spread = patches.repeat_interleave(4, 0).repeat_interleave(4, 1) / 16 / 3
        torch.testing.assert_close(
            pixels[row], spread.expand(3, 12, 12), rtol=1e-10, atol=0
        )


@torch.no_grad()
def vision_layers(model: VisionTransformer, image: Tensor) -> list[oracle.Layer]:
    encoder = nn.Module()
    encoder.layers = nn.ModuleList()
    for block in model.encoder.layers:
        described = nn.Module()
        described.attention = nn.Linear(HIDDEN, 3 * HIDDEN)
        described.attention.weight = block.self_attention.in_proj_weight
        described.attention.bias = block.self_attention.in_proj_bias
        described.self_attn = block.self_attention
        described.norm1, described.norm2 = block.ln_1, block.ln_2
        described.feed_forward = block.mlp
        encoder.layers.append(described)
    encoder.norm = model.encoder.ln
    encoder.config = SimpleNamespace(num_attention_heads=HEADS, num_hidden_layers=3)
    patches = model.conv_proj(image[None]).flatten(2).transpose(1, 2)
    x = torch.cat([model.class_token, patches], 1) + model.encoder.position
    return oracle.run_layers(encoder, oracle.replace(PRE, final="norm"), x[0])


@pytest.mark.usefixtures("registered")
def test_blocks_get_the_weights_that_they_ask_for() -> None:
    model = blocks(need_weights=True)
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        model(images)
    plain = [block.weights for block in model.encoder.layers]
    GlobEnc(model).attribute(images, 1)
    for block, expected in zip(model.encoder.layers, plain):
        assert expected is not None
        torch.testing.assert_close(block.weights.detach(), expected)
    assert not left_behind(model)
