"""DecompX against the literal twin: families, biases, padding and corners."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import captum_globenc
from tests.models import padded
from tests.networks import CASES, TwoTokens, error, example, logits
from tests.oracle_decompx import RULES, decompose

LIMIT = 1e-10
LENGTHS = (7, 4, 2)
CLASS, TOKEN = 1, 11
SPREAD = [
    name
    for name in (
        "bert",
        "bert-relu",
        "roberta",
        "distilbert",
        "torch",
        "modernbert",
        "modernbert-biased",
        "llama",
        "llama-biased",
    )
    if name in CASES
]
# One backward pass, of any model.
ANY = [*SPREAD, *(name for name in ("gpt2", "t5", "t5-relu") if name in CASES)]
PAIRS = [(name, "none") for name in ANY]
PAIRS += [(name, rule) for name in SPREAD for rule in RULES[1:]]


@functools.cache
def literal(name: str, tokens: int, biases: str) -> tuple[Tensor, Tensor]:
    """The logit and the relevance of every token for it."""
    inputs = example(name, tokens)
    network = CASES[name].network(CASES[name].build(), inputs)
    output, relevance = decompose(network, biases)
    target = TOKEN if name == "gpt2" else CLASS
    return output[target], relevance[:, target]


def targets(name: str, lengths: tuple[int, ...]) -> int | list[tuple[int, int]]:
    """A class, or the logit of the token behind each sentence."""
    return [(n - 1, TOKEN) for n in lengths] if name == "gpt2" else CLASS


@pytest.mark.parametrize(("name", "biases"), PAIRS)
def test_ids(name: str, biases: str) -> None:
    """Single sentences, and the same in a padded batch."""
    sentences = [example(name, n) for n in LENGTHS]
    ids, mask = padded(sentences, extra=1)
    method = captum_globenc.DecompX(CASES[name].build(), biases=biases)
    batch, deltas = method.attribute(
        ids,
        target=targets(name, LENGTHS),
        additional_forward_args=(mask,),
        return_convergence_delta=True,
    )
    assert batch.shape == ids.shape
    assert deltas.shape == (len(LENGTHS),)
    for row, n in enumerate(LENGTHS):
        output, expected = literal(name, n, biases)
        assert error(batch[row, :n], expected) <= LIMIT
        assert not batch[row, n:].any()
        alone, delta = method.attribute(
            sentences[row][None],
            target=targets(name, LENGTHS[row : row + 1]),
            return_convergence_delta=True,
        )
        assert error(alone[0], expected) <= LIMIT
        # What the biases have.
        left = output - expected.sum()
        for found in (deltas[row], delta[0]):
            torch.testing.assert_close(found, left, rtol=LIMIT, atol=LIMIT)
        if biases != "none":
            assert abs(left) <= LIMIT * expected.abs().max()


@pytest.mark.parametrize("biases", ["none", "absdot"])
def test_every_class(biases: str) -> None:
    model, ids = CASES["bert"].build(), example("bert")
    _, expected = decompose(CASES["bert"].network(model, ids), biases)
    for target in range(3):
        found = captum_globenc.DecompX(model, biases=biases).attribute(
            ids[None], target=target
        )
        assert error(found[0], expected[:, target]) <= LIMIT


@pytest.mark.parametrize("biases", ["none", "absdot"])
def test_a_saturated_pooler(biases: str) -> None:
    model, ids = CASES["bert"].build(), example("bert")
    with torch.no_grad():
        model.bert.pooler.dense.weight *= 200
        pooled = model.bert(ids[None]).pooler_output
    assert (pooled.abs() == 1).any()
    output, expected = decompose(CASES["bert"].network(model, ids), biases)
    assert error(output, logits("bert", model, ids)) <= LIMIT
    found = captum_globenc.DecompX(model, biases=biases).attribute(
        ids[None], target=CLASS
    )
    assert error(found[0], expected[:, CLASS]) <= LIMIT


def test_two_tokens_by_hand() -> None:
    """x = (1, 2) has the weights 1/3 and 2/3 in attention, and gives 1 + 4."""
    x = torch.tensor([[[1.0], [2.0]]], dtype=torch.float64)
    found = captum_globenc.DecompX(TwoTokens().double()).attribute(x, target=0)
    expected = torch.tensor([1.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(found[0, :, 0], expected)
