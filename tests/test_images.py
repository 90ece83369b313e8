"""Image classifiers: pre-LN layers, patches, pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as t
from captum.attr import LayerAttribution, NoiseTunnel, visualization
from torch import Tensor, nn

from captum_globenc import (
    LOCAL_SCORES,
    GlobEnc,
    InputError,
    LayerGlobEnc,
    ReconstructionError,
    UnsupportedModelError,
    register_architecture,
)
from captum_globenc.adapters import shaped_like, to_image
from captum_globenc.encoders.registry import _TABLE
from captum_globenc.recording.records import Grid
from tests import oracle
from tests.conftest import left_behind
from tests.models import build, randomize, sentence

EXACT = {"rtol": 1e-12, "atol": 0}
LIMIT = {torch.float64: 1e-10, torch.float32: 1e-4}
GRID, PATCH = (3, 3), 4
PATCHES, TOKENS = 9, 10


def vit(dtype: torch.dtype = torch.float64, attention: str = "sdpa") -> nn.Module:
    config = t.ViTConfig(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=36,
        image_size=GRID[0] * PATCH,
        patch_size=PATCH,
        num_labels=3,
    )
    config._attn_implementation = attention
    torch.manual_seed(5)
    return randomize(t.ViTForImageClassification(config)).to(dtype).eval()


def images(count: int = 2, side: int = 12, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, 3, side, side, generator=generator).to(dtype)


def recipe(model: nn.Module) -> oracle.Recipe:
    return oracle.VIT if hasattr(model.vit, "layers") else oracle.VIT_OLD


@torch.no_grad()
def literal(model: nn.Module, image: Tensor) -> list[oracle.Layer]:
    """The layers of one image by the oracle, the final norm in the last."""
    x = model.vit.embeddings(image[None])[0].double()
    return oracle.run_layers(model.vit, recipe(model), x)


def layers_of(model: nn.Module) -> nn.ModuleList:
    return model.vit.get_submodule(recipe(model).layers)


def test_the_oracle_computes_the_model() -> None:
    model, image = vit(), images(1)
    layers = literal(model, image[0])
    seen = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: seen.append(out[0]))
        for layer in layers_of(model)
    ]
    with torch.no_grad():
        last = model.vit(image).last_hidden_state[0]
    for hook in hooks:
        hook.remove()
    for layer, state in zip([*layers[:-1]], seen[:-1]):
        torch.testing.assert_close(layer.output, state, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layers[-1].output, last, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("name", LOCAL_SCORES)
def test_local_scores_and_rollout(name: str, dtype: torch.dtype) -> None:
    model, batch = vit(dtype), images(2, dtype=dtype)
    globenc = GlobEnc(model, local=name)
    found = globenc.decompose(batch)
    assert found.local.shape == (2, 3, TOKENS, TOKENS)
    pixels = globenc.attribute(batch, target=1)
    for row, image in enumerate(batch):
        expected = [oracle.local_score(x, name) for x in literal(model, image)]
        for index, local in enumerate(expected):
            relative = (found.local[row, index].double() - local) / local
            assert relative.abs().max() <= LIMIT[dtype]
        patches = oracle.rollout(expected)[0, 1:].view(GRID)
        for y in range(12):
            for x in range(12):
                share = patches[y // PATCH, x // PATCH] / PATCH**2 / 3
                for channel in range(3):
                    error = (pixels[row, channel, y, x].double() - share) / share
                    assert abs(error) <= LIMIT[dtype]


def test_norms_are_those_of_the_residual_inside_the_stack() -> None:
    model, batch = vit(), images(1)
    residual, first, whole = (
        GlobEnc(model, local=name).decompose(batch).local
        for name in ("N_RES", "N_RES_LN", "N_ENC")
    )
    torch.testing.assert_close(residual, first, **EXACT)
    torch.testing.assert_close(residual[:, :2], whole[:, :2], **EXACT)
    assert not torch.allclose(residual[:, 2], whole[:, 2], rtol=0.01)


def test_pixels() -> None:
    model, batch = vit(), images(3)
    method = GlobEnc(model)
    found = method.attribute(batch, [0, 1, 2])
    assert found.shape == batch.shape
    assert found.dtype == batch.dtype
    assert found.is_contiguous()
    tokens = method.decompose(batch).rollout()[:, 0]
    torch.testing.assert_close(found.sum((1, 2, 3)), tokens[:, 1:].sum(-1), **EXACT)
    for row in range(3):
        alone = method.attribute(batch[row : row + 1], row)
        torch.testing.assert_close(alone[0], found[row], **EXACT)
    parts = method.attribute(batch, [0, 1, 2], internal_batch_size=2)
    torch.testing.assert_close(parts, found, **EXACT)
    (single,) = method.attribute((batch,), [0, 1, 2])
    assert torch.equal(single, found)
    patch = method.attribute(batch, 0, token_index=4)
    assert not torch.allclose(patch, found)
    assert not left_behind(model)


def test_implementations_and_closures_give_the_same() -> None:
    batch = images(2)
    expected = GlobEnc(vit()).attribute(batch, 1)
    model = vit(attention="eager")
    found = GlobEnc(model).attribute(batch, 1)
    # Eager attention takes its softmax in float32 whatever the model's dtype is.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    closure = GlobEnc(lambda image: model(pixel_values=image).logits)
    torch.testing.assert_close(closure.attribute(batch, 1), found, **EXACT)
    base = GlobEnc(model.vit)
    torch.testing.assert_close(base.attribute(batch), found, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    batch = images(2)
    expected = GlobEnc(vit()).attribute(batch, 1)
    found = GlobEnc(vit(dtype)).attribute(batch.to(dtype), 1)
    assert found.dtype == dtype
    both = torch.stack([expected[:, 0].flatten(), found[:, 0].flatten().double()])
    assert torch.corrcoef(both)[0, 1] > 0.98


def test_a_closure_that_prepares_the_image() -> None:
    """The pixels that were given, whatever size the model saw."""
    model = vit()

    def forward(image: Tensor) -> Tensor:
        small = nn.functional.interpolate(image, size=(12, 12))
        return model((small - 0.5) / 0.5).logits

    found = GlobEnc(forward).attribute(images(2, side=30), 1)
    assert found.shape == (2, 3, 30, 30)
    patches = found[:, 0, 5::10, 5::10]
    expected = to_image(patches.flatten(1), GRID, (30, 30)) * 100
    torch.testing.assert_close(found, expected.expand(-1, 3, -1, -1), **EXACT)
    assert found[0, 0].unique().numel() == PATCHES


def test_images_of_another_size() -> None:
    model = vit()

    def forward(image: Tensor) -> Tensor:
        return model(image, interpolate_pos_encoding=True).logits

    found = GlobEnc(forward).attribute(images(2, side=20), 1)
    assert found.shape == (2, 3, 20, 20)
    assert found[0, 0].unique().numel() == 25


def test_layers() -> None:
    model, batch = vit(), images(2)
    local = GlobEnc(model).decompose(batch).local
    layers = list(layers_of(model))
    found = LayerGlobEnc(model, layers).attribute(batch, 1)
    product = torch.eye(TOKENS, dtype=torch.float64).expand(2, -1, -1)
    for index in reversed(range(3)):
        assert found[index].shape == (2, TOKENS, 24)
        torch.testing.assert_close(found[index].sum(-1), product[:, 0], **EXACT)
        product = product @ local[:, index]
    inputs = LayerGlobEnc(model, layers[0]).attribute(
        batch, 1, attribute_to_layer_input=True
    )
    torch.testing.assert_close(inputs.sum(-1), product[:, 0], **EXACT)


def test_embeddings_and_their_parts() -> None:
    model, batch = vit(), images(2)
    tokens = GlobEnc(model).decompose(batch).rollout()[:, 0]
    embeddings = model.vit.embeddings
    parts = [
        embeddings,
        embeddings.patch_embeddings,
        embeddings.patch_embeddings.projection,
    ]
    whole, patches, maps = LayerGlobEnc(model, parts).attribute(batch, 1)
    torch.testing.assert_close(whole.sum(-1), tokens, **EXACT)
    torch.testing.assert_close(patches.sum(-1), tokens[:, 1:], **EXACT)
    assert maps.shape == (2, 24, 3, 3)
    torch.testing.assert_close(maps.sum(1).flatten(1), tokens[:, 1:], **EXACT)
    pixels = LayerGlobEnc(model, embeddings).attribute(
        batch, 1, attribute_to_layer_input=True
    )
    torch.testing.assert_close(pixels, GlobEnc(model).attribute(batch, 1), **EXACT)


def test_captums_pictures() -> None:
    """What a user of visualize_image_attr and interpolate writes."""
    model, batch = vit(), images(1)
    pixels = GlobEnc(model).attribute(batch, 1)
    _, axes = visualization.visualize_image_attr(
        pixels[0].permute(1, 2, 0).numpy(),
        batch[0].sigmoid().permute(1, 2, 0).numpy(),
        method="blended_heat_map",
        sign="positive",
        use_pyplot=False,
    )
    shown = np.asarray(axes.images[-1].get_array())
    assert shown.shape == (12, 12)
    strongest = pixels[0].sum(0).argmax()
    assert np.unravel_index(shown.argmax(), shown.shape)[0] // PATCH == (
        strongest // 12 // PATCH
    )
    tokens = LayerGlobEnc(model, model.vit.embeddings).attribute(batch, 1).sum(-1)
    grid = tokens[:, 1:].view(1, 1, *GRID)
    enlarged = LayerAttribution.interpolate(grid, (12, 12))
    torch.testing.assert_close(enlarged / PATCH**2, pixels.sum(1, keepdim=True))


@pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq", "vargrad"])
def test_noise_tunnel(kind: str) -> None:
    model, batch = vit(), images(2)
    plain = GlobEnc(model).attribute(batch, [1, 2])
    still = NoiseTunnel(GlobEnc(model)).attribute(
        batch, nt_type=kind, nt_samples=2, stdevs=1e-9, target=[1, 2]
    )
    expected = {"smoothgrad": plain, "smoothgrad_sq": plain**2, "vargrad": 0 * plain}
    torch.testing.assert_close(still, expected[kind], rtol=1e-6, atol=1e-12)


def test_wrong_inputs() -> None:
    model, ids = vit(), sentence(8)[None]
    with pytest.raises(InputError, match=r"takes images.*got shape \(1, 8\)"):
        GlobEnc(model).attribute(ids, 1)
    with pytest.raises(InputError, match=r"takes images.*got shape \(1, 8\)"):
        GlobEnc(lambda ids: model(ids).logits).attribute(ids, 1)
    with pytest.raises(InputError, match=r"takes images.*\(1, 4, 24\)"):
        GlobEnc(model).attribute(torch.randn(1, 4, 24), 1)
    with pytest.raises(InputError, match="input ids must be integers"):
        GlobEnc(build("bert")).attribute(images(1), 1)
    with pytest.raises(InputError, match=r"images of 3 by 3 patches"):
        GlobEnc(lambda image: model(image[:1]).logits).attribute(images(2), 1)
    with pytest.raises(InputError, match="got shape"):
        GlobEnc(model).attribute(images(1)[None], 1)
    assert not left_behind(model)


def doubled(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return 2 * output


@pytest.mark.parametrize("part", ["layernorm_after", "layer", "output"])
def test_a_layer_that_is_not_as_described(part: str) -> None:
    model = vit()
    layer = layers_of(model)[1]
    if part == "layernorm_after":
        # What it gets is no longer the first residual.
        layer.layernorm_after.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    elif part == "layer":
        layer.register_forward_hook(doubled)
    else:
        layer.get_submodule(recipe(model).output).register_forward_hook(doubled)
    with pytest.raises(ReconstructionError):
        GlobEnc(model).attribute(images(1), 1)


def test_a_hook_behind_the_last_layer_is_a_part_of_the_head() -> None:
    model = vit()
    expected = GlobEnc(model).attribute(images(1), 1)
    model.vit.layernorm.register_forward_hook(doubled)
    found = GlobEnc(model).attribute(images(1), 1)
    torch.testing.assert_close(found, expected, **EXACT)
    model.vit.layernorm.register_forward_hook(lambda _, __, out: out.roll(1, 1))
    rolled = GlobEnc(model).attribute(images(1), 1)
    last = GlobEnc(vit()).attribute(images(1), 1, token_index=PATCHES)
    torch.testing.assert_close(rolled, last, **EXACT)


def test_parts_that_are_missing_or_do_not_run() -> None:
    model = vit()
    del layers_of(model)[1].layernorm_after
    with pytest.raises(UnsupportedModelError, match="feed_forward_norm"):
        GlobEnc(model).attribute(images(1), 1)
    model = vit()
    model.vit.layernorm = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"final_norm.*LayerNorm"):
        GlobEnc(model).attribute(images(1), 1)
    model = vit()
    model.vit.layernorm.forward = lambda x: x
    with pytest.raises(ReconstructionError, match="output of the final norm"):
        GlobEnc(model).attribute(images(1), 1)


def test_a_final_norm_that_is_not_described(monkeypatch) -> None:
    """Without it the last layer is explained up to its output, as registered."""
    model = vit()
    layout = next(a for a in _TABLE["vit"].layouts if a.layers == recipe(model).layers)
    others = {name: row for name, row in _TABLE.items() if name != "vit"}
    monkeypatch.setattr("captum_globenc.encoders.registry._TABLE", others)
    register_architecture("vit", replace(layout, final_norm=None))
    local = GlobEnc(model).decompose(images(1)).local
    expected = GlobEnc(model, local="N_RES").decompose(images(1)).local
    torch.testing.assert_close(local, expected, **EXACT)


@pytest.mark.parametrize(
    "change",
    [
        {"output_norm": "layernorm_after"},
        {"feed_forward_norm": None},
        {"attention_norm": "a"},
    ],
    ids=str,
)
def test_norms_in_two_places(change: dict) -> None:
    with pytest.raises(ValueError, match="either attention_norm and output_norm"):
        replace(_TABLE["vit"].layouts[0], **change)


def test_sizes_that_do_not_divide() -> None:
    scores = torch.rand(2, 6, dtype=torch.float64)
    image = to_image(scores, (2, 3), (5, 7))
    torch.testing.assert_close(image.sum((1, 2, 3)), scores.sum(-1), **EXACT)
    assert image[0].unique().numel() == 6
    with pytest.raises(InputError, match="smaller than its grid"):
        to_image(scores, (2, 3), (5, 2))
    with pytest.raises(InputError, match=r"got shapes \(2, 6\) and \(2, 5, 7\)"):
        shaped_like(scores, torch.zeros(2, 1, 5, 7))


@pytest.mark.parametrize("patch", [3, 16, 41, 47])
def test_every_pixel_belongs_to_its_patch(patch: int) -> None:
    scores = torch.arange(1.0, 15 * 14 + 1, dtype=torch.float64)[None]
    image = to_image(scores, (15, 14), (15 * patch, 14 * patch))[0, 0] * patch**2
    blocks = scores.view(15, 14).repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    torch.testing.assert_close(image, blocks, **EXACT)


@pytest.mark.parametrize("size", [(15, 13), (14, 14), (23, 12)])
def test_pixels_that_make_no_whole_patch_get_nothing(size: tuple[int, int]) -> None:
    model = vit()
    image = torch.randn(1, 3, *size, dtype=torch.float64)

    def forward(image: Tensor) -> Tensor:
        return model(image, interpolate_pos_encoding=True).logits

    found = GlobEnc(forward).attribute(image, 1)
    rows, columns = size[0] // PATCH, size[1] // PATCH
    assert not found[..., rows * PATCH :, :].any()
    assert not found[..., :, columns * PATCH :].any()
    seen = found[..., : rows * PATCH, : columns * PATCH]
    tokens = GlobEnc(forward).decompose(image).rollout()[:, 0, 1:]
    expected = to_image(tokens, (rows, columns), tuple(seen.shape[-2:])) / 3
    torch.testing.assert_close(seen, expected.expand(-1, 3, -1, -1), **EXACT)
    assert shaped_like(tokens, image[:, 0:1], Grid(rows, columns)).all()


def test_integer_images() -> None:
    model = vit(torch.float32)
    with pytest.raises(InputError, match=r"got torch.uint8: pass images.float\(\)"):
        GlobEnc(model).attribute(torch.ones(1, 3, 12, 12, dtype=torch.uint8), 1)
