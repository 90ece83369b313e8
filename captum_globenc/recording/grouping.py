"""What is computed at once: as many tensors or layers as stay in the cache.

Where tensors are small, the number of operations is what a computation costs, so what
is done to each of several is done to all of them stacked. Where they are large, a stack
would leave the processor's cache, and they are taken one by one: a group of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

_Item = TypeVar("_Item")
# Numbers held at once: 1 MB in float32.
_HELD = 2**18


def most_at_once(numbers: int) -> int:
    """How many items of so many numbers each are taken at once, at least one."""
    return max(1, _HELD // max(numbers, 1))


def grouped(
    items: Iterable[_Item], is_group: Callable[[list[_Item]], bool]
) -> Iterator[list[_Item]]:
    """Items in turn, in groups as long as they may be.

    Args:
        items (iterable): of any kind.
        is_group (Callable): whether several items in turn are a group.
    """
    group: list[_Item] = []
    for item in items:
        if group and not is_group([*group, item]):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape in a new dimension in front; of one tensor a view."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))
