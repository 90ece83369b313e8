"""From token scores and decompositions to the shapes that Captum and people use.

Pure tensor functions. Each says what becomes of the total of the scores. Results have
the dtype and the device of the scores.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from captum.attr import LayerAttribution
from torch import Tensor

from captum_globenc.contributions.rollout import Decomposition
from captum_globenc.errors import InputError
from captum_globenc.recording.records import Grid


def spread_over_embedding(scores: Tensor, like: Tensor) -> Tensor:
    """Token scores as attributions of embeddings, equal over the hidden dimension.

    The total stays: the sum over the hidden dimension is the token score, so that users
    go on with ``attributions.sum(dim=-1)`` as they do with Captum's methods.

    Args:
        scores (Tensor): (batch, tokens).
        like (Tensor): embeddings or hidden states, with the hidden size last.

    Returns:
        *Tensor* of shape (batch, tokens, hidden).

    Raises:
        InputError: other shapes.
    """
    if scores.ndim != 2 or like.ndim != 3 or scores.shape[1] != like.shape[1]:
        raise InputError(
            f"scores (batch, tokens) for vectors (batch, tokens, hidden) are expected, "
            f"got shapes {tuple(scores.shape)} and {tuple(like.shape)}."
        )
    hidden = like.shape[-1]
    return (scores / hidden)[..., None].expand(-1, -1, hidden).contiguous()


def to_words(
    scores: Tensor,
    groups: Sequence[int | None] | Sequence[tuple[int, int]] | Tensor,
    text: str | None = None,
) -> Tensor:
    """Scores of one example's words: those of their sub-words, added up.

    The total of the tokens that belong to a word stays; that of the others (special
    tokens, padding) is left out.

    Args:
        scores (Tensor): (tokens).
        groups (sequence): per token, either its word's number or None, as
            ``encoding.word_ids()`` of a fast tokenizer gives them; or its span of
            characters (start, end), as ``offset_mapping`` does, together with ``text``.
            For a pair of sentences, word numbers: the second sentence's words follow
            the first's.
        text (str, optional): the text that the spans belong to. Its words are what
            stands between white space, in order: those of ``text.split()``. A token
            belongs to the word in which its first character that is not white space
            lies, so it does not matter whether a tokenizer counts the blank before a
            word to it. Default: None, for word numbers.

    Returns:
        *Tensor* of shape (words): in order of the words' first tokens, or of ``text``.

    Raises:
        InputError: scores and groups do not have one element per token each, spans
            without a text, a text with word numbers, or spans of a pair.

    Examples::

        >>> import torch
        >>> from captum_globenc.attribution.adapters import to_words
        >>> to_words(torch.tensor([1.0, 2.0, 3.0, 4.0]), [None, 0, 0, 1])
        tensor([5., 4.])
        >>> to_words(torch.tensor([1.0, 2.0, 3.0]), [(0, 2), (2, 4), (4, 6)], "good a")
        tensor([3., 3.])
    """
    if scores.ndim != 1 or len(groups) != len(scores):
        raise InputError(
            f"one score and one group per token are expected, got scores of shape "
            f"{tuple(scores.shape)} and {len(groups)} groups."
        )
    words: list[object]
    members: list[object]
    given: list[Any] = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    _check_groups(given, text)
    if text is None:
        # A pair counts its second sentence's words from 0 again, after a special token.
        sentence = [given[:index].count(None) for index in range(len(given))]
        members = [
            None if word is None else (part, word)
            for part, word in zip(sentence, given)
        ]
        words = [w for w in dict.fromkeys(members) if w is not None]
    else:
        starts = {
            position: word
            for word, match in enumerate(re.finditer(r"\S+", text))
            for position in range(*match.span())
        }
        members = [_word_of_span(span, starts) for span in given]
        words = list(range(len(text.split())))
    place = {word: index for index, word in enumerate(words)}
    indices = [index for index, word in enumerate(members) if word in place]
    target = torch.tensor([place[members[i]] for i in indices], device=scores.device)
    result = scores.new_zeros(len(words))
    return result.index_add(0, target.long(), scores[indices])


def _check_groups(groups: list[Any], text: str | None) -> None:
    spans = [tuple(g) for g in groups if isinstance(g, tuple | list)]
    if text is None and spans:
        raise InputError(
            f"the groups are spans of characters such as {spans[0]}: pass the text "
            "that they belong to, or word numbers."
        )
    if text is not None and len(spans) < len(groups):
        raise InputError(
            "a text belongs to spans of characters, and the groups are word numbers: "
            "leave the text out, or pass offset_mapping."
        )
    last = 0
    between = restarts = False
    for start, end in spans:
        # Several tokens may share a character, but not across a special token.
        restarts |= end > start and start < (last if between else 0)
        between = end == start
        last = max(last, end)
    if restarts:
        raise InputError(
            "the spans start again in the middle, as for a pair of sentences: pass "
            "word numbers, encoding.word_ids(), or each sentence by itself."
        )


def _word_of_span(span: tuple[int, int], words: dict[int, int]) -> int | None:
    """The word of the first character in a span that belongs to one."""
    return next((words[at] for at in range(*span) if at in words), None)


def mask_special_tokens(scores: Tensor, special_tokens_mask: Tensor) -> Tensor:
    """Scores with 0 at special tokens; the total shrinks by what they had.

    Args:
        scores (Tensor): (batch, tokens), or (batch, tokens, hidden).
        special_tokens_mask (Tensor): (batch, tokens), 1 at [CLS], [SEP], padding, as a
            tokenizer returns it with ``return_special_tokens_mask=True``.

    Returns:
        *Tensor* of the shape of ``scores``.

    Raises:
        InputError: the mask does not have one entry per token.
    """
    special = special_tokens_mask.to(scores.device).bool()
    if special.ndim != 2 or scores.shape[:2] != special.shape:
        raise InputError(
            f"the mask has shape {tuple(special.shape)}, and scores "
            f"{tuple(scores.shape)}: one entry per token is expected."
        )
    return scores.masked_fill(special[(...,) + (None,) * (scores.ndim - 2)], 0)


def unit_range(scores: Tensor) -> Tensor:
    """Scores divided by the largest absolute value of each example: in [-1, 1].

    Ratios and signs stay, the total does not; scores that are all 0 stay 0. For
    ``captum.attr.visualization.visualize_text``, which takes 1-D scores in [-1, 1].

    Args:
        scores (Tensor): (tokens), or (batch, tokens).

    Returns:
        *Tensor* of the same shape.
    """
    largest = scores.abs().amax(-1, keepdim=True)
    return scores / largest.masked_fill(largest == 0, 1)


def layer_matrix(decomposition: Decomposition, token_index: int = 0) -> Tensor:
    r"""What a token takes from each input, layer by layer: row l is its row of R^l.

    Totals are those of the rollout: rows are not normalised.

    Args:
        decomposition (Decomposition): of :meth:`captum_globenc.GlobEnc.decompose`.
        token_index (int, optional): the receiver. Default: 0, [CLS].

    Returns:
        *Tensor* of shape (batch, layers, tokens), bottom layer first.

    Raises:
        InputError: there is no such token.
    """
    tokens = decomposition.token_mask.shape[1]
    whole = isinstance(token_index, int) and not isinstance(token_index, bool)
    if not whole or not -tokens <= token_index < tokens:
        raise InputError(
            f"token_index must be one of the {tokens} tokens, got {token_index!r}."
        )
    layers = decomposition.local.shape[1]
    rows = [
        decomposition.rollout(stop=layer + 1)[:, token_index] for layer in range(layers)
    ]
    return torch.stack(rows, 1)


def to_image(scores: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Patch scores as an image: each patch's score shared out over its pixels.

    The total stays. Uses ``captum.attr.LayerAttribution.interpolate`` with nearest
    neighbours, so that every pixel belongs to one patch.

    Args:
        scores (Tensor): (batch, patches), row by row, without [CLS].
        grid (tuple[int, int]): rows and columns of patches.
        size (tuple[int, int]): height and width of the image in pixels.

    Returns:
        *Tensor* of shape (batch, 1, height, width).

    Raises:
        InputError: the grid does not hold as many patches as there are scores, or the
            image fewer pixels than the grid patches.
    """
    if scores.ndim != 2 or scores.shape[1] != grid[0] * grid[1]:
        raise InputError(
            f"scores of shape {tuple(scores.shape)} do not fill a grid of {grid[0]} by "
            f"{grid[1]} patches: leave out [CLS] and other tokens that are no patch."
        )
    if size[0] < grid[0] or size[1] < grid[1]:
        raise InputError(
            f"an image of {size[0]} by {size[1]} pixels is smaller than its grid of "
            f"{grid[0]} by {grid[1]} patches."
        )
    # How many pixels each patch gets: not the same for all where sizes do not divide.
    # Exact: the plain mode puts some rows into the wrong patch by rounding.
    mode = "nearest-exact"
    order = torch.arange(scores.shape[1], dtype=torch.float64, device=scores.device)
    owner = LayerAttribution.interpolate(order.view(1, 1, *grid), size, mode).long()
    pixels = owner.flatten().bincount(minlength=scores.shape[1])
    patches = (scores / pixels).view(len(scores), 1, *grid)
    image: Tensor = LayerAttribution.interpolate(patches, size, mode)
    return image


def shaped_like(scores: Tensor, like: Tensor, grid: Grid | None = None) -> Tensor:
    """Token scores in the shape of what they are scores of.

    The total stays, but for tokens that are no patch ([CLS]), which have no place in an
    image.

    Args:
        scores (Tensor): (batch, tokens).
        like (Tensor): ids, (batch, tokens), or one row of them for all; embeddings or
            hidden states, (batch, tokens, hidden), for :func:`spread_over_embedding`;
            either of these with choices after the batch, where scores have batch ×
            choices rows; an image or feature map, (batch, channels, height, width),
            for :func:`to_image` with equal channels.
        grid (Grid, optional): the patches of an image, whose tokens are the last; what
            of the image they do not cover gets 0. Embeddings of the patches alone get
            the scores of these. Default: None, for no image.

    Returns:
        *Tensor* of the shape of ``like``, with as many examples as scores have.
    """
    if not like.is_floating_point():
        return scores.view(like.shape) if scores.numel() == like.numel() else scores
    if grid is None and like.ndim == 4:
        return spread_over_embedding(scores, like.flatten(0, 1)).view(like.shape)
    if grid is None or like.ndim == 3:
        if grid is not None and like.shape[1] == grid.rows * grid.columns:
            scores = scores[:, -like.shape[1] :]
        return spread_over_embedding(scores, like)
    _, channels, height, width = like.shape
    # A feature map of the patches has no margin.
    is_map = (height, width) == (grid.rows, grid.columns)
    covered = (1.0, 1.0) if is_map else (grid.height, grid.width)
    size = (round(height * covered[0]), round(width * covered[1]))
    patches = scores[:, -grid.rows * grid.columns :]
    image = to_image(patches, (grid.rows, grid.columns), size)
    margin = (0, width - size[1], 0, height - size[0])
    image = torch.nn.functional.pad(image / channels, margin)
    return image.expand(like.shape).contiguous()
