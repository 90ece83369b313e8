"""Every image family against the literal twin, and what all families must do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import transformers as t
from packaging.version import Version
from torch import Tensor, nn

from captum_globenc import LOCAL_SCORES, GlobEnc, LayerGlobEnc
from captum_globenc.adapters import to_image
from tests import oracle
from tests.conftest import left_behind
from tests.models import randomize

EXACT = {"rtol": 1e-12, "atol": 0}
LIMIT = {torch.float64: 1e-10, torch.float32: 1e-4}
SIDE, PATCH, PATCHES = 12, 4, 9
TEXT = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 36,
    "image_size": SIDE,
    "patch_size": PATCH,
    "num_labels": 3,
}


@dataclass(frozen=True)
class Family:
    """An image model, where the oracle finds its weights, and since when."""

    build: Callable[[], nn.Module]
    encoder: str
    recipes: tuple[oracle.Recipe, ...]
    since: str = "5.0"


def hugging(kind: str, head: str, **options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = getattr(t, f"{kind}Config")(**{**SIZES, **options})
        return getattr(t, kind + head)(config)

    return build


_ALL = {
    "vit": Family(
        hugging("ViT", "ForImageClassification"),
        "vit",
        (oracle.VIT, oracle.VIT_OLD),
    ),
    "deit": Family(
        hugging("DeiT", "ForImageClassification"),
        "deit",
        (oracle.VIT, oracle.VIT_OLD),
    ),
    "deit-teacher": Family(
        hugging("DeiT", "ForImageClassificationWithTeacher"),
        "deit",
        (oracle.VIT, oracle.VIT_OLD),
    ),
    "dinov2": Family(
        hugging("Dinov2", "ForImageClassification", mlp_ratio=2),
        "dinov2",
        (oracle.DINOV2, oracle.DINOV2_OLD),
    ),
    "dinov2-swiglu": Family(
        hugging("Dinov2", "ForImageClassification", use_swiglu_ffn=True),
        "dinov2",
        (oracle.DINOV2, oracle.DINOV2_OLD),
    ),
    "dinov2-registers": Family(
        hugging("Dinov2WithRegisters", "ForImageClassification", num_register_tokens=4),
        "dinov2_with_registers",
        (oracle.DINOV2, oracle.DINOV2_OLD),
    ),
    "beit": Family(
        hugging(
            "Beit", "ForImageClassification", use_shared_relative_position_bias=True
        ),
        "beit",
        (replace(oracle.BEIT, final=""),),
        "5.9",
    ),
    "beit-layers-bias": Family(
        hugging("Beit", "ForImageClassification", use_relative_position_bias=True),
        "beit",
        (replace(oracle.BEIT, final=""),),
        "5.9",
    ),
    "beit-class-token": Family(
        hugging(
            "Beit",
            "ForImageClassification",
            use_mean_pooling=False,
            use_absolute_position_embeddings=True,
        ),
        "beit",
        (replace(oracle.BEIT, bias=None),),
        "5.9",
    ),
    "clip-projection": Family(
        lambda: t.CLIPVisionModelWithProjection(
            t.CLIPVisionConfig(**{**SIZES, "projection_dim": 3})
        ),
        "vision_model",
        (oracle.CLIP,),
    ),
    "clip-classifier": Family(
        lambda: t.CLIPForImageClassification(
            t.CLIPConfig(text_config=TEXT, vision_config=SIZES, num_labels=3)
        ),
        "vision_model",
        (oracle.CLIP,),
    ),
    "siglip-classifier": Family(
        lambda: t.SiglipForImageClassification(
            t.SiglipConfig(text_config=TEXT, vision_config=SIZES, num_labels=3)
        ),
        "vision_model",
        (oracle.SIGLIP_VISION,),
    ),
    # Its head attends to all patches with a query of its own.
    "siglip-tower": Family(
        lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**SIZES)),
        "",
        (oracle.SIGLIP_VISION,),
    ),
}
FAMILIES = {
    name: family
    for name, family in _ALL.items()
    if Version(t.__version__) >= Version(family.since)
}


def build(
    name: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa"
) -> nn.Module:
    """A random model in which every part matters, the vectors of LayerScale, too."""
    torch.manual_seed(5)
    model = randomize(FAMILIES[name].build())
    generator = torch.Generator().manual_seed(6)
    for part, parameter in model.named_parameters():
        if part.split(".")[-1].startswith(("lambda", "relative", "cls", "register")):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = 0.5 * noise + float("lambda" in part)
    model.set_attn_implementation(attention)
    return model.to(dtype).eval()


def images(count: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, SIDE, SIDE, generator=generator).to(dtype)


def encoder_of(name: str, model: nn.Module) -> tuple[nn.Module, oracle.Recipe]:
    """The module that holds the layers, and how it computes them."""
    encoder = model.get_submodule(FAMILIES[name].encoder)
    # As in older releases of transformers.
    encoder = getattr(encoder, "vision_model", encoder)
    for recipe in FAMILIES[name].recipes:
        try:
            layer = encoder.get_submodule(recipe.layers)[0]
            layer.get_submodule(recipe.value)
        except AttributeError:
            continue
        return encoder, recipe
    raise LookupError(name)


def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    output = model(pixels)
    for name in ("image_embeds", "logits", "pooler_output"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    raise LookupError(name)


def shares_by_hand(name: str, model: nn.Module, image: Tensor, target: int) -> Tensor:
    """(tokens): each one's part of the norms of the gradient of an output."""
    encoder, recipe = encoder_of(name, model)
    layers = encoder.get_submodule(recipe.layers)
    last = encoder.get_submodule(recipe.final) if recipe.final else layers[-1]
    leaves: list[Tensor] = []

    def cut(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> object:
        states = output[0] if isinstance(output, tuple) else output
        leaves.append(states.detach().requires_grad_())
        rest = output[1:] if isinstance(output, tuple) else None
        return leaves[0] if rest is None else (leaves[0], *rest)

    hook = last.register_forward_hook(cut)
    output = logits(model, image[None])
    hook.remove()
    (gradient,) = torch.autograd.grad(output[0, target], leaves[0])
    norms = gradient[0].double().norm(dim=-1)
    return norms / norms.sum()


@functools.cache
def literal(name: str, dtype: torch.dtype) -> list[list[oracle.Layer]]:
    """The layers of every image by the oracle."""
    encoder, recipe = encoder_of(name, build(name, dtype))
    return [
        oracle.run_encoder(encoder, recipe, image, "pixel_values")
        for image in images(2, dtype)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_oracle_computes_the_model(name: str) -> None:
    model = build(name)
    encoder, recipe = encoder_of(name, model)
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(
            lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in encoder.get_submodule(recipe.layers)
    ]
    with torch.no_grad():
        final = encoder(images()[:1]).last_hidden_state
    for hook in hooks:
        hook.remove()
    layers = oracle.run_encoder(encoder, recipe, images()[0], "pixel_values")
    assert len(layers) == len(seen) == 3
    for layer, state in zip(layers, [*seen[:-1], final]):
        torch.testing.assert_close(
            layer.output, state.reshape(layer.output.shape), rtol=1e-11, atol=1e-11
        )


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("score", LOCAL_SCORES)
@pytest.mark.parametrize("name", FAMILIES)
def test_local_scores_and_rollout(name: str, score: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    globenc = GlobEnc(lambda pixels: logits(model, pixels), encoder=model, local=score)
    found = globenc.decompose(images(2, dtype))
    pixels = globenc.attribute(images(2, dtype), target=1)
    for row, layers in enumerate(literal(name, dtype)):
        expected = [oracle.local_score(layer, score) for layer in layers]
        for index, local in enumerate(expected):
            error = (found.local[row, index].double() - local).abs()
            assert (error / local).nan_to_num().max() <= LIMIT[dtype]
        whole = oracle.rollout(expected)
        read = shares_by_hand(name, model, images(2, dtype)[row], 1) @ whole
        patches = to_image(read[None, -PATCHES:], (3, 3), (SIDE, SIDE)) / 3
        error = (pixels[row].double() - patches[0]).abs() / patches[0]
        assert error.max() <= LIMIT[dtype]


@pytest.mark.parametrize("name", FAMILIES)
def test_batch_attention_closure(name: str) -> None:
    model, batch = build(name), images(2)
    method = GlobEnc(lambda pixels: logits(model, pixels))
    expected = method.attribute(batch, 1)
    singles = [method.attribute(image[None], 1) for image in batch]
    torch.testing.assert_close(torch.cat(singles), expected, **EXACT)
    other = build(name, attention="eager")
    eager = GlobEnc(lambda pixels: logits(other, pixels)).attribute(batch, 1)
    # Eager attention takes its softmax in float32 whatever the model's dtype is.
    torch.testing.assert_close(eager, expected, rtol=1e-5, atol=0)
    if name != "siglip-tower":
        # A head of its own for each class, and one output for all.
        given = GlobEnc(model).attribute(batch, 1)
        torch.testing.assert_close(given, expected, **EXACT)
    layer = encoder_of(name, model)[0].embeddings
    tokens = LayerGlobEnc(model, layer).attribute(batch)
    assert tokens.shape[:1] + tokens.shape[2:] == (2, 24)
    assert not left_behind(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    scores = GlobEnc(model).attribute(images(2, dtype))
    assert scores.dtype == dtype
    assert scores.isfinite().all()
    precise = GlobEnc(build(name, torch.float32)).attribute(images(2, torch.float32))
    assert torch.corrcoef(torch.stack([scores.float().flatten(), precise.flatten()]))[
        0, 1
    ] > (0.99 if dtype == torch.float16 else 0.9)
