"""AttnLRP against the literal twin: families, places, padding, zeros and dead rows."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor, nn

import captum_globenc
from tests.models import padded, sentence
from tests.networks import CASES, TwoTokens, error, example, whole_image
from tests.oracle_attnlrp import Explained, explain
from tests.test_decoders import left_padded

LIMIT = 1e-10
LENGTHS = (7, 4, 2)
NAMES = [
    name
    for name in (
        "bert",
        "bert-relu",
        "modernbert",
        "modernbert-biased",
        "t5",
        "t5-relu",
        "gpt2",
        "llama",
        "llama-biased",
    )
    if name in CASES
]
ATTENTION = ("attnlrp", "cp")
PLACES = {"word_embeddings": "words", "block": "block"}
CLASS, TOKEN = 1, 11


def targets(name: str, lengths: tuple[int, ...]) -> int | list[tuple[int, int]]:
    """A class, or the logit of the token behind each sentence."""
    return [(n - 1, TOKEN) for n in lengths] if name == "gpt2" else CLASS


@functools.cache
def literal(name: str, tokens: int, attention: str) -> Explained:
    network = CASES[name].network(CASES[name].build(), example(name, tokens))
    return explain(network, TOKEN if name == "gpt2" else CLASS, attention)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", NAMES)
def test_ids(name: str, attention: str, place: str) -> None:
    """Single sentences, and the same in a padded batch."""
    sentences = [example(name, n) for n in LENGTHS]
    ids, mask = padded(sentences, extra=1)
    method = captum_globenc.AttnLRP(
        CASES[name].build(), attention=attention, place=place
    )
    batch = method.attribute(
        ids, target=targets(name, LENGTHS), additional_forward_args=(mask,)
    )
    assert batch.shape == ids.shape
    for row, n in enumerate(LENGTHS):
        found = getattr(literal(name, n, attention), PLACES[place])
        expected = found.sum(-1)
        assert error(batch[row, :n], expected) <= LIMIT
        assert not batch[row, n:].any()
        alone = method.attribute(
            sentences[row][None], target=targets(name, LENGTHS[row : row + 1])
        )
        assert error(alone[0], expected) <= LIMIT


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", NAMES)
def test_embeddings(name: str, attention: str) -> None:
    """Every entry of the word embeddings, and their sums as for ids."""
    model = CASES[name].build()
    lengths = LENGTHS[:1] if name.startswith("llama") else LENGTHS

    def forward(vectors: Tensor, mask: Tensor) -> Tensor:
        return model(inputs_embeds=vectors, attention_mask=mask).logits

    ids, mask = padded([example(name, n) for n in lengths])
    vectors = model.get_input_embeddings()(ids).detach()
    found = captum_globenc.AttnLRP(forward, attention=attention).attribute(
        vectors, target=targets(name, lengths), additional_forward_args=(mask,)
    )
    assert found.shape == vectors.shape
    for row, n in enumerate(lengths):
        expected = literal(name, n, attention).words
        assert error(found[row, :n], expected) <= LIMIT
        assert not found[row, n:].any()


@pytest.mark.parametrize("attention", ATTENTION)
def test_pixels(attention: str) -> None:
    case = CASES["vit"]
    images = torch.stack([example("vit", seed) for seed in (1, 2)])
    method = captum_globenc.AttnLRP(case.build(), attention=attention)
    batch = method.attribute(images, target=CLASS)
    assert batch.shape == images.shape
    for row, seed in enumerate((1, 2)):
        words = literal("vit", seed, attention).words
        expected = whole_image(words[1:], images[row].shape, 4)
        assert error(batch[row], expected) <= LIMIT
        alone = method.attribute(images[row : row + 1], target=CLASS)
        assert error(alone[0], expected) <= LIMIT


@pytest.mark.parametrize("attention", ATTENTION)
def test_patches(attention: str) -> None:
    """The first layer's input, as the input."""
    model = CASES["vit"].build()
    images = torch.stack([example("vit", seed) for seed in (1, 2)])
    with torch.no_grad():
        states = model.vit.embeddings(images)

    # The model starts from them, then.
    model.vit.embeddings.forward = lambda states, **_: states

    def forward(states: Tensor) -> Tensor:
        return model(states).logits

    found = captum_globenc.AttnLRP(forward, attention=attention).attribute(
        states, target=CLASS
    )
    for row, seed in enumerate((1, 2)):
        assert error(found[row], literal("vit", seed, attention).block) <= LIMIT


@pytest.mark.parametrize("attention", ATTENTION)
def test_receivers_that_see_nothing(attention: str) -> None:
    """Behind a causal mask, padding on the left has no source at all."""
    case = CASES["llama"]
    model = case.build()
    ids, mask, sentences = left_padded()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def forward(ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        return model(ids, attention_mask=mask, position_ids=positions).logits

    found = captum_globenc.AttnLRP(forward, attention=attention).attribute(
        ids, target=CLASS, additional_forward_args=(mask, positions)
    )
    for row, ids_of_one in enumerate(sentences):
        n = len(ids_of_one)
        expected = explain(case.network(model, ids_of_one), CLASS, attention).words
        assert error(found[row, -n:], expected.sum(-1)) <= LIMIT
        assert not found[row, :-n].any()


def changed_bert(change: str) -> nn.Module:
    model = CASES["bert"].build()
    bert = model.bert
    with torch.no_grad():
        if change == "saturated tanh":
            bert.pooler.dense.weight *= 200
        elif change == "zero activation":
            # The first two entries of each token are equal up to the first
            # feed-forward, whose first unit takes their difference.
            first, embeddings = bert.encoder.layer[0], bert.embeddings
            for table in (
                embeddings.word_embeddings,
                embeddings.position_embeddings,
                embeddings.token_type_embeddings,
            ):
                table.weight[:, 1] = table.weight[:, 0]
            for norm in (embeddings.LayerNorm, first.attention.output.LayerNorm):
                norm.weight[1], norm.bias[1] = norm.weight[0], norm.bias[0]
            first.attention.output.dense.weight[:2] = 0
            first.attention.output.dense.bias[:2] = 0
            first.intermediate.dense.weight[0] = 0
            first.intermediate.dense.weight[0, 0] = 1
            first.intermediate.dense.weight[0, 1] = -1
            first.intermediate.dense.bias[0] = 0
        else:  # one ReLU that no token reaches
            model.config.hidden_act = "relu"
            for layer in bert.encoder.layer:
                layer.intermediate.intermediate_act_fn = nn.ReLU()
                layer.intermediate.dense.bias[0] = -1e3
    return model


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("change", ["saturated tanh", "zero activation", "dead unit"])
def test_corners_of_activations(change: str, attention: str) -> None:
    model, ids = changed_bert(change), sentence(6)
    is_pooler = change == "saturated tanh"
    module = (
        model.bert.pooler if is_pooler else model.bert.encoder.layer[0].intermediate
    )
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda _, __, output: seen.append(output))
    vectors = model.get_input_embeddings()(ids[None]).detach()
    with torch.no_grad():
        model(ids[None])
    hook.remove()
    if is_pooler:
        assert (seen[0].abs() == 1).any()
    else:
        assert not seen[0][..., 0].any()
    expected = explain(CASES["bert"].network(model, ids), CLASS, attention).words

    def forward(vectors: Tensor) -> Tensor:
        return model(inputs_embeds=vectors).logits

    found = captum_globenc.AttnLRP(forward, attention=attention).attribute(
        vectors, target=CLASS
    )
    assert error(found[0], expected) <= LIMIT


def test_two_tokens_by_hand() -> None:
    """x = (1, 2) has the weights 1/3 and 2/3, and gives 1 + 4.

    The steps are written out beside the twin's own test of these numbers.
    """
    model, two = TwoTokens().double(), math.log(2)
    x = torch.tensor([[[1.0], [2.0]]], dtype=torch.float64)
    for attention, by_hand in (
        ("attnlrp", [0.5 - two / 6, 2 + two / 3]),
        ("cp", [1.0, 4.0]),
    ):
        found = captum_globenc.AttnLRP(model, attention=attention).attribute(
            x, target=0
        )
        expected = torch.tensor(by_hand, dtype=torch.float64)
        torch.testing.assert_close(found[0, :, 0], expected)
