"""GlobEnc in the hands of Captum's own objects."""

from __future__ import annotations

import functools

import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LayerConductance,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    NoiseTunnel,
    ShapleyValueSampling,
)
from captum.metrics import infidelity, sensitivity_max

from captum_globenc import ALTI, AttentionRollout, GlobEnc, ValueZeroing
from tests.conftest import left_behind
from tests.models import PAD, build, padded, sentence

EXACT = {"rtol": 1e-12, "atol": 0}
METHODS = {
    "GlobEnc": GlobEnc,
    "class-aware": functools.partial(GlobEnc, class_aware=True),
    "ALTI": ALTI,
    "attention rollout": AttentionRollout,
    "Value Zeroing": ValueZeroing,
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
IDS, MASK = padded([sentence(8), sentence(5)])
MODEL = build("bert")
EMBEDDINGS = MODEL.get_input_embeddings()(IDS).detach()


def on_ids(ids, mask):
    return MODEL(ids, attention_mask=mask).logits


def on_embeddings(embeddings, mask):
    return MODEL(inputs_embeds=embeddings, attention_mask=mask).logits


def some_padded(ids):
    """About a third of the ids replaced."""
    replaced = torch.rand(ids.shape) < 0.3
    return replaced, ids.masked_fill(replaced, PAD)


@every_method
@pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq", "vargrad"])
def test_noise_tunnel(kind: str, make) -> None:
    """Without noise, the tunnel's mean is the attribution and its variance zero."""
    method = make(on_embeddings)
    plain = method.attribute(EMBEDDINGS, [1, 2], MASK)
    tunnel = NoiseTunnel(method)
    options = {"nt_type": kind, "nt_samples": 3, "target": [1, 2]}
    options["additional_forward_args"] = (MASK,)
    still = tunnel.attribute(EMBEDDINGS, stdevs=1e-9, **options)
    expected = {"smoothgrad": plain, "smoothgrad_sq": plain**2, "vargrad": 0 * plain}
    torch.testing.assert_close(still, expected[kind], rtol=1e-6, atol=1e-12)
    noisy = tunnel.attribute(EMBEDDINGS, stdevs=0.5, **options)
    assert noisy.shape == EMBEDDINGS.shape
    assert not torch.allclose(noisy, expected[kind], rtol=1e-3)


@every_method
def test_infidelity(make) -> None:
    """The definition, with the perturbations that Captum drew."""
    drawn: list[tuple[torch.Tensor, torch.Tensor]] = []

    def perturb(ids):
        replaced, perturbed = some_padded(ids)
        drawn.append((replaced.double(), perturbed))
        return drawn[-1]

    attributions = make(on_ids).attribute(IDS, 1, MASK)
    found = infidelity(
        on_ids,
        perturb,
        IDS,
        attributions,
        additional_forward_args=(MASK,),
        target=1,
        n_perturb_samples=1,
    )
    ((replaced, perturbed),) = drawn
    with torch.no_grad():
        change = on_ids(IDS, MASK)[:, 1] - on_ids(perturbed, MASK)[:, 1]
    expected = ((replaced * attributions).sum(-1) - change) ** 2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@every_method
def test_infidelity_on_embeddings(make) -> None:
    """Noise on the embeddings: the definition, with what Captum drew."""
    drawn: list[torch.Tensor] = []

    def perturb(embeddings):
        drawn.append(0.1 * torch.randn_like(embeddings))
        return drawn[-1], embeddings - drawn[-1]

    attributions = make(on_embeddings).attribute(EMBEDDINGS, 1, MASK)
    found = infidelity(
        on_embeddings,
        perturb,
        EMBEDDINGS,
        attributions,
        additional_forward_args=(MASK,),
        target=1,
        n_perturb_samples=1,
    )
    (noise,) = drawn
    with torch.no_grad():
        before, after = (
            on_embeddings(e, MASK)[:, 1] for e in (EMBEDDINGS, EMBEDDINGS - noise)
        )
    expected = ((noise * attributions).sum((1, 2)) - (before - after)) ** 2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@every_method
def test_sensitivity(make) -> None:
    on_tokens = sensitivity_max(
        make(on_ids).attribute,
        IDS,
        perturb_func=lambda ids, *_: some_padded(ids)[1],
        target=1,
        additional_forward_args=(MASK,),
        n_perturb_samples=3,
    )
    assert on_tokens.shape == (2,)
    assert (on_tokens > 0).all()
    in_space = [
        sensitivity_max(
            make(on_embeddings).attribute,
            EMBEDDINGS,
            perturb_radius=radius,
            target=1,
            additional_forward_args=(MASK,),
            n_perturb_samples=3,
        )
        for radius in (1e-9, 0.1)
    ]
    assert (in_space[0] < 1e-6).all()
    assert (in_space[1] > in_space[0]).all()


def test_captums_methods_give_the_same_before_and_after() -> None:
    layer = MODEL.bert.embeddings.word_embeddings
    blank = torch.full_like(IDS, PAD)

    def observe() -> list[torch.Tensor]:
        torch.manual_seed(3)
        common = {"target": 1, "additional_forward_args": (MASK,)}
        return [
            FeatureAblation(on_ids).attribute(IDS, baselines=blank, **common),
            ShapleyValueSampling(on_ids).attribute(
                IDS, baselines=blank, n_samples=2, **common
            ),
            LayerIntegratedGradients(on_ids, layer).attribute(
                IDS, baselines=blank, n_steps=4, **common
            ),
            LayerGradientXActivation(on_ids, layer).attribute(IDS, **common),
            LayerConductance(on_embeddings, MODEL.bert.encoder.layer[1]).attribute(
                EMBEDDINGS.requires_grad_(), n_steps=4, **common
            ),
        ]

    before = observe()
    GlobEnc(on_ids).attribute(IDS, 1, MASK)
    GlobEnc(MODEL).decompose(IDS, MASK)
    for old, new in zip(before, observe()):
        assert torch.equal(old, new)
    assert not left_behind(MODEL)
