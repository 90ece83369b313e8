"""Batches of texts of about one length, so that little of them is padding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")

# So many batches are read ahead and sorted: any more would save little padding.
_WINDOW = 32


def by_length(
    items: Iterable[Item], size: int, lengths: Callable[[list[Item]], Sequence[int]]
) -> Iterator[list[Item]]:
    """Batches of items, the longest of each window of 32 batches first.

    Args:
        items (iterable): read no further ahead than a window.
        size (int): how many items make a batch.
        lengths (Callable): items → how long each is.
    """
    left = iter(items)
    while window := list(islice(left, size * _WINDOW)):
        found = lengths(window)
        order = sorted(range(len(window)), key=lambda at: found[at], reverse=True)
        # Where a batch is not full, then the one of the longest: less is padding.
        for stop in range(len(order) % size or size, len(order) + 1, size):
            yield [window[at] for at in order[max(0, stop - size) : stop]]
