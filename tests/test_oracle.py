"""The scores against the literal twin, over families, scores and dtypes."""

from __future__ import annotations

import functools
from operator import attrgetter

import pytest
import torch
from torch import nn

from captum_globenc import LOCAL_SCORES, GlobEnc, record
from tests import oracle
from tests.models import FAMILIES, build, encoder_of, padded, sentence

LIMIT = {torch.float64: 1e-10, torch.float32: 1e-4}
NAMES = ["W", "W_FIXED_RES", "W_RES", "N", "N_FIXED_RES", "N_RES", "N_RES_LN", "N_ENC"]
LENGTHS = (9, 5, 2)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest elementwise relative difference; what is 0 must be 0."""
    assert not actual[expected == 0].any()
    some = expected != 0
    return float(((actual.double() - expected)[some] / expected[some]).abs().max())


@functools.cache
def literal(family: str, dtype: torch.dtype) -> list[list[oracle.Layer]]:
    """The layers of every example by the oracle."""
    encoder = encoder_of(family, build(family, dtype))
    examples = [sentence(n, seed=n) for n in LENGTHS]
    recipe = FAMILIES[family].recipe
    return [oracle.run_encoder(encoder, recipe, example) for example in examples]


def test_the_eight_scores_are_there() -> None:
    assert sorted(LOCAL_SCORES) == sorted(NAMES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_computes_the_model(family: str) -> None:
    model = build(family)
    encoder = encoder_of(family, model)
    ids = sentence(8)
    layers = oracle.run_encoder(encoder, FAMILIES[family].recipe, ids)
    seen: list[torch.Tensor] = []
    modules = encoder.get_submodule(FAMILIES[family].recipe.layers)
    hooks = [
        layer.register_forward_hook(
            lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in modules
    ]
    with torch.no_grad():
        final = encoder(ids[None]).last_hidden_state
    for hook in hooks:
        hook.remove()
    assert len(layers) == len(seen) == 3
    # LayoutLM's eager attention takes its softmax in float32 in older releases.
    is_eager = encoder.config._attn_implementation == "eager"
    limit = 1e-4 if is_eager and family == "layoutlm" else 1e-11
    if not FAMILIES[family].recipe.batch_first:
        seen = [state.transpose(0, 1) for state in seen]
    for layer, state in zip(layers, [*seen[:-1], final]):
        torch.testing.assert_close(layer.output, state[0], rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_local_scores_and_rollout(family: str, name: str, dtype: torch.dtype) -> None:
    model = build(family, dtype)
    # LayoutLM's eager attention takes its softmax in float32 in older releases.
    is_eager = family == "layoutlm" and model.config._attn_implementation == "eager"
    limit = LIMIT[torch.float32 if is_eager else dtype]
    sentences = [sentence(n, seed=n) for n in LENGTHS]
    ids, mask = padded(sentences, extra=1)
    globenc = GlobEnc(model, local=name)
    found = globenc.decompose(ids, additional_forward_args=(mask,))
    scores = globenc.attribute(ids, target=1, additional_forward_args=(mask,))
    assert found.local.shape == (3, 3, 10, 10)
    assert found.local.dtype == dtype
    for row, example in enumerate(sentences):
        n = len(example)
        layers = literal(family, dtype)[row]
        expected = [oracle.local_score(layer, name) for layer in layers]
        for index, local in enumerate(expected):
            assert relative(found.local[row, index, :n, :n], local) <= limit
            partial = oracle.rollout(expected[: index + 1])
            got = found.rollout(stop=index + 1)[row, :n, :n]
            assert relative(got, partial) <= limit
        read = FAMILIES[family].reads(example) @ oracle.rollout(expected)
        assert relative(scores[row, :n], read) <= limit
        assert not scores[row, n:].any()
        assert not found.local[row, :, n:].any()
        assert not found.local[row, :, :, n:].any()
        assert not found.rollout()[row, :, n:].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vectors_rebuild_the_true_input_of_the_first_norm(family: str) -> None:
    """Σ_j (Σ_h α f + δ x) + b_O, from what the package records."""
    model = build(family)
    ids, mask = padded([sentence(7), sentence(4)])
    encoder = encoder_of(family, model)
    recipe = FAMILIES[family].recipe
    seen: list[torch.Tensor] = []
    modules = encoder.get_submodule(recipe.layers)
    # What takes the sum of the first residual.
    hooks = [
        layer.get_submodule(recipe.norm1 or recipe.middle).register_forward_hook(
            lambda _, args, __: seen.append(
                args[0] if recipe.batch_first else args[0].transpose(0, 1)
            )
        )
        for layer in modules
    ]
    run = record(model, ids, mask)
    for hook in hooks:
        hook.remove()
    assert len(run.layers) == len(seen) == 3
    for index, (layer, true) in enumerate(zip(run.layers, seen)):
        alpha = layer.attention(slice(0, 7))
        weight, bias = oracle.matrix(
            attrgetter(recipe.output)(modules[index % len(modules)])
        )
        f = torch.einsum("dhe,bhje->bhjd", weight.view(24, 4, 6), layer.call.value)
        a = torch.einsum("bhij,bhjd->bijd", alpha, f)
        rebuilt = a.sum(2) + layer.hidden + bias
        kept = mask.bool()
        torch.testing.assert_close(
            rebuilt.detach()[kept], true[kept], rtol=1e-11, atol=1e-11
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["bert", "roberta-prelayernorm"])
def test_layers_with_rms_norms(family: str, name: str) -> None:
    """A norm that takes no mean away and adds nothing, after a residual or before."""
    model = build(family)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm):
            norm = nn.RMSNorm(24, eps=1e-3, dtype=torch.float64)
            norm.weight.data.copy_(module.weight)
            model.set_submodule(path, norm)
    encoder, recipe = encoder_of(family, model), FAMILIES[family].recipe
    example = sentence(7)
    layers = oracle.run_encoder(encoder, recipe, example)
    expected = [oracle.local_score(layer, name) for layer in layers]
    globenc = GlobEnc(model, local=name)
    found = globenc.decompose(example[None]).local[0]
    for local, literally in zip(found, expected, strict=True):
        assert relative(local, literally) <= LIMIT[torch.float64]
    scores = globenc.attribute(example[None], target=1)[0]
    assert relative(scores, oracle.rollout(expected)[0]) <= LIMIT[torch.float64]


def test_one_token_takes_everything_from_itself() -> None:
    model = build("bert")
    ids = sentence(1)[None]
    for name, expected in (("W_RES", 1.0), ("W", 1.0), ("N_FIXED_RES", 1.0)):
        scores = GlobEnc(model, local=name).attribute(ids, target=0)
        assert scores.tolist() == [[expected]]
