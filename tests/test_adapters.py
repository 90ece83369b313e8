"""The adapters, against loops and hand-computed cases."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from captum_globenc import GlobEnc, InputError
from captum_globenc.adapters import (
    layer_matrix,
    mask_special_tokens,
    spread_over_embedding,
    to_image,
    to_words,
    unit_range,
)
from tests.models import build, padded, sentence

TEXT = "unbelievably good,  not unbelievable at all"


def tokenizer(kind: str) -> Tokenizer:
    """A tiny trained tokenizer of each kind, with few pieces: words are split."""
    corpus = ["unbelievably good", "not unbelievable at all", "believe in all good"]
    if kind == "WordPiece":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=60, special_tokens=["[UNK]"], show_progress=False
        )
    elif kind == "BPE":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=290,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=40,
            unk_token="<unk>",
            special_tokens=["<unk>"],
            show_progress=False,
        )
    made.train_from_iterator([*corpus, TEXT], trainer)
    return made


@pytest.mark.parametrize("kind", ["WordPiece", "BPE", "SentencePiece"])
def test_words_by_spans(kind: str) -> None:
    """Every token's score lands on the word whose characters it covers."""
    encoding = tokenizer(kind).encode(TEXT)
    assert len(encoding.tokens) > len(TEXT.split())
    scores = torch.rand(len(encoding.tokens), dtype=torch.float64)
    found = to_words(scores, encoding.offsets, TEXT)
    expected = torch.zeros(len(TEXT.split()), dtype=torch.float64)
    for score, (start, end) in zip(scores, encoding.offsets):
        blanks = len(TEXT[start:end]) - len(TEXT[start:end].lstrip())
        if TEXT[start:end].strip():
            before = TEXT[: start + blanks]
            word = len((before + "x").split()) - 1
            expected[word] += score
    torch.testing.assert_close(found, expected)
    lost = sum(
        s for s, (a, b) in zip(scores, encoding.offsets) if not TEXT[a:b].strip()
    )
    torch.testing.assert_close(found.sum(), scores.sum() - lost)


def test_words_by_numbers() -> None:
    scores = torch.tensor([9.0, 1.0, 2.0, 4.0, 8.0, 9.0])
    assert to_words(scores, [None, 0, 0, 2, 1, None]).tolist() == [3, 4, 8]
    assert to_words(scores[:2], [None, None]).tolist() == []
    assert to_words(scores[:2], [(0, 0), (0, 1)], "a b").tolist() == [1, 0]


@pytest.mark.parametrize(
    ("scores", "groups"), [(torch.ones(3), [0, 1]), (torch.ones(1, 2), [0, 1])]
)
def test_words_that_do_not_fit(scores, groups) -> None:
    with pytest.raises(InputError, match=r"2 groups"):
        to_words(scores, groups)


def test_special_tokens() -> None:
    scores = torch.rand(2, 4)
    mask = torch.tensor([[1, 0, 0, 1], [1, 0, 1, 1]])
    masked = mask_special_tokens(scores, mask)
    assert masked.tolist() == (scores * (1 - mask)).tolist()
    spread = mask_special_tokens(scores[..., None].expand(-1, -1, 3), mask)
    assert spread.tolist() == masked[..., None].expand(-1, -1, 3).tolist()
    with pytest.raises(InputError, match=r"\(2, 3\)"):
        mask_special_tokens(scores, mask[:, :3])


def test_unit_range() -> None:
    scores = torch.tensor([[2.0, -4.0, 1.0], [0.0, 0.0, 0.0]])
    assert unit_range(scores).tolist() == [[0.5, -1.0, 0.25], [0.0, 0.0, 0.0]]
    assert unit_range(scores[0]).tolist() == [0.5, -1.0, 0.25]


def test_spread() -> None:
    scores = torch.rand(2, 3)
    spread = spread_over_embedding(scores, torch.zeros(2, 3, 5))
    torch.testing.assert_close(spread.sum(-1), scores)
    assert spread.is_contiguous()
    assert (spread == spread[..., :1]).all()


def test_layer_matrix() -> None:
    ids, mask = padded([sentence(8), sentence(5)])
    decomposition = GlobEnc(build("bert")).decompose(ids, (mask,))
    found = layer_matrix(decomposition, token_index=2)
    assert found.shape == (2, 3, 8)
    product = torch.eye(8, dtype=torch.float64).expand(2, -1, -1)
    for layer in range(3):
        product = decomposition.local[:, layer] @ product
        torch.testing.assert_close(found[:, layer], product[:, 2])


def test_image() -> None:
    scores = torch.rand(2, 6, dtype=torch.float64)
    image = to_image(scores, (2, 3), (8, 9))
    assert image.shape == (2, 1, 8, 9)
    for row in range(8):
        for column in range(9):
            patch = (row // 4) * 3 + column // 3
            expected = scores[:, patch] / 12
            torch.testing.assert_close(image[:, 0, row, column], expected)
    torch.testing.assert_close(image.sum((1, 2, 3)), scores.sum(1))
    with pytest.raises(InputError, match=r"\(2, 6\) do not fill a grid of 2 by 2"):
        to_image(scores, (2, 2), (8, 9))


def test_words_of_a_pair() -> None:
    """The second sentence's words follow the first's: none are added together."""
    scores = torch.arange(1.0, 11.0)
    words = [None, 0, 1, 2, None, 0, 1, 1, 2, None]
    assert to_words(scores, words).tolist() == [2, 3, 4, 6, 7 + 8, 9]
    same = [None, 0, None, 0, None]
    assert to_words(scores[:5], same).tolist() == [2, 4]


@pytest.mark.parametrize(
    ("groups", "text", "message"),
    [
        ([(0, 0), (0, 3), (3, 4)], None, r"spans of characters such as \(0, 0\): pass"),
        (torch.tensor([[0, 0], [0, 3], [3, 4]]), None, "pass the text"),
        ([None, 0, 1], "a b", "the groups are word numbers"),
        ([(0, 3), (0, 0), (0, 2)], "who", "start again in the middle"),
    ],
)
def test_groups_that_do_not_fit_the_text(groups, text, message) -> None:
    with pytest.raises(InputError, match=message):
        to_words(torch.ones(3), groups, text)


def test_offsets_as_a_tensor() -> None:
    spans = torch.tensor([[0, 0], [0, 3], [3, 4], [5, 8], [0, 0]])
    found = to_words(torch.arange(5.0), spans, "good one")
    assert found.tolist() == [3, 3]


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(InputError, match=r"got shapes \(2, 3\) and \(2, 4, 5\)"):
        spread_over_embedding(torch.ones(2, 3), torch.ones(2, 4, 5))
    with pytest.raises(InputError, match="one entry per token"):
        mask_special_tokens(torch.ones(3, 3), torch.ones(3))
    decomposition = GlobEnc(build("bert")).decompose(sentence(4)[None])
    for wrong in (4, -5, True, torch.tensor([1])):
        with pytest.raises(InputError, match="must be one of the 4 tokens"):
            layer_matrix(decomposition, wrong)
