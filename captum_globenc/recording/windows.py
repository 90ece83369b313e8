"""Which sources a block of receivers can see, from the mask of their attention.

Under local windows or a causal mask most of the tokens × tokens weights of a long text
are exactly 0. A block of receivers then needs a part of the sources only. It is found
from the mask that attention was given, so padding and masks of any other shape count.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Receivers whose sources are looked for together.
_CELL = 64
# Of so few tokens all sources are taken.
_FEW = 256
# What is prepared of a source costs about as much as so many receivers of it.
_PREPARED = 160


class Window(NamedTuple):
    """A block of receivers, and sources in turn that hold all that these can see.

    Args:
        receivers (slice): the block.
        sources (slice): the sources, the receivers themselves among them.
    """

    receivers: slice
    sources: slice

    @property
    def inside(self) -> slice:
        """The receivers, counted from the first source."""
        first = self.sources.start
        return slice(self.receivers.start - first, self.receivers.stop - first)


def windows(mask: Tensor | None, tokens: int) -> list[Window]:
    """All receivers in blocks, each with the sources that the mask shows it.

    The mask is read once, and the host waits for the result. Where there is no mask or
    there are few tokens, there is one block, and nothing is read.

    Args:
        mask (Tensor or None): of an attention, boolean (True: attended) or added to the
            logits; it broadcasts to (batch, heads, receivers, sources).
        tokens (int): the number of tokens.
    """
    everything = slice(0, tokens)
    if mask is None or mask.shape[2] == 1 or tokens <= _FEW:
        return [Window(everything, everything)]
    spans = _spans(mask)
    # Large blocks see sources that few of their receivers need, and small blocks have
    # more sources in common, which are prepared for each of them.
    sizes = [2**power for power in range(math.ceil(math.log2(len(spans))) + 1)]
    return min((_joined(spans, size) for size in sizes), key=_cost)


def _joined(spans: list[Window], size: int) -> list[Window]:
    """So many blocks at a time in one."""
    joined = []
    for first in range(0, len(spans), size):
        group = spans[first : first + size]
        start = min(window.sources.start for window in group)
        stop = max(window.sources.stop for window in group)
        receivers = slice(group[0].receivers.start, group[-1].receivers.stop)
        joined.append(Window(receivers, slice(start, stop)))
    return joined


def _cost(blocks: list[Window]) -> int:
    """What the pairs cost, and what is prepared of the sources."""
    return sum(
        (window.sources.stop - window.sources.start)
        * (window.receivers.stop - window.receivers.start + _PREPARED)
        for window in blocks
    )


def _spans(mask: Tensor) -> list[Window]:
    """The sources from the first to the last that some receiver of a cell can see."""
    tokens = mask.shape[2]
    cells = [slice(at, min(at + _CELL, tokens)) for at in range(0, tokens, _CELL)]
    seen = torch.stack([_visible(mask[:, :, cell]) for cell in cells]).byte()
    # The first of the largest; where nothing is seen, the cell itself is left.
    first = seen.argmax(1) + (1 - seen.amax(1)) * tokens
    last = tokens - seen.flip(1).argmax(1) - (1 - seen.amax(1)) * tokens
    return [
        Window(cell, slice(min(start, cell.start), max(stop, cell.stop)))
        for cell, start, stop in zip(cells, *torch.stack([first, last]).tolist())
    ]


def _visible(mask: Tensor) -> Tensor:
    """(sources): what some receiver of (batch, heads, receivers, sources) can see.

    Of an added mask, what is so far below the receiver's largest number that no logit
    makes up for it, as where the dtype's lowest number is added, is not seen.
    """
    if mask.dtype != torch.bool:
        most = mask.amax(-1, keepdim=True)
        mask = mask > most + torch.finfo(mask.dtype).min / 2
    return mask.any(2).flatten(0, 1).any(0)
