"""A part of the campaign of mutations, and its truth against the literal twin."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

from benchmarks.mutations.campaign import EITHER, Case, deviation, run
from benchmarks.mutations.catalogue import CASES, part
from benchmarks.mutations.models import HEADS, HIDDEN, TEXT, TORCH, Subject, subject
from tests import oracle
from tests.models import FAMILIES

PART, OF = 3, 7
# Paths and families of the campaign are those of newer releases.
pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.20"),
    reason="the campaign is of newer releases of transformers",
)


@pytest.mark.parametrize("case", part(PART, OF), ids=lambda case: case.title)
def test_mutation(case: Case) -> None:
    result = run(case)
    assert result.is_good, f"{result.outcome}: {result.detail}"


def test_the_campaign_is_large_and_names_no_case_twice() -> None:
    titles = [case.title for case in CASES]
    assert len(titles) >= 300
    assert len(set(titles)) == len(titles)
    assert len(part(PART, OF)) >= len(titles) // OF
    # The part has cases of every kind.
    assert {case.kind for case in part(PART, OF)} == {case.kind for case in CASES}
    assert all(case.accept <= EITHER for case in CASES)


@pytest.mark.parametrize("family", [name for name in TEXT if name in FAMILIES])
def test_the_truth_is_the_oracle_s(family: str) -> None:
    one = subject(family)
    rollout, local = one.twin().rollout(), one.twin().local()
    assert one.mask is not None
    for row, n in enumerate(one.mask.sum(-1).tolist()):
        example = one.inputs[row, :n]
        layers = oracle.run_encoder(one.encoder, one.recipe, example)
        expected = [oracle.local_score(layer, "N_ENC") for layer in layers]
        for index, one_layer in enumerate(expected):
            assert deviation(local[row, index, :n, :n], one_layer) < 1e-10
        read = FAMILIES[family].reads(example)
        whole = oracle.rollout(expected)
        assert deviation(rollout[row, :n, :n], whole) < 1e-10
        truth = one.truth()[row, :n]
        assert deviation(truth[None], (read @ whole)[None]) < 1e-10


@pytest.mark.parametrize("family", TORCH)
def test_the_truth_of_torch_s_layers(family: str) -> None:
    one = subject(family, lengths=(6,))
    recipe = oracle.replace(
        one.recipe, value="together", fused=True, feed_forward="feed_forward"
    )
    layers = oracle.run_layers(described(one), recipe, one.twin().states[0][0])
    expected = [oracle.local_score(layer, "N_ENC") for layer in layers]
    assert deviation(one.truth(), oracle.rollout(expected)[:1]) < 1e-10


def described(one: Subject) -> nn.Module:
    """Torch's layers with parts under names that a recipe can have."""
    encoder = nn.Module()
    encoder.layers = nn.ModuleList()
    for layer in one.layers:
        part = nn.Module()
        part.together = nn.Linear(HIDDEN, 3 * HIDDEN)
        part.together.weight = layer.self_attn.in_proj_weight
        part.together.bias = layer.self_attn.in_proj_bias
        part.self_attn, part.norm1, part.norm2 = (
            layer.self_attn,
            layer.norm1,
            layer.norm2,
        )
        part.feed_forward = nn.Sequential(layer.linear1, nn.GELU(), layer.linear2)
        encoder.layers.append(part)
    encoder.config = SimpleNamespace(
        num_attention_heads=HEADS, num_hidden_layers=len(one.layers)
    )
    return encoder


def test_what_is_no_truth_is_seen() -> None:
    """The comparison itself: another row, another scale, another shape, NaN."""
    truth = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert deviation(truth, truth) == 0
    assert deviation(truth.flip(0), truth) > 0.5
    assert deviation(2 * truth, truth) == 1
    assert deviation(2 * truth, truth, by_share=True) < 1e-6
    assert deviation(truth[:1], truth) == float("inf")
    assert deviation(torch.full_like(truth, torch.nan), truth) == float("inf")
