"""The steps of a run, each with what it makes of the parts of its operands.

A value of shape (..., width) is rows of this width. Beside each row are its parts,
(sources + 1, width): what each source token gave to it and, last, the biases that no
token has taken yet; the row is their sum. A step makes the parts of some of its rows
from those of its operands, and says which of their rows it takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from captum_globenc.errors import UnsupportedModelError


class PartsOf(Protocol):
    """Gives parts of rows of steps."""

    def __call__(self, step: Step, rows: Tensor) -> Tensor:
        """Parts, (sources + 1, rows, width)."""

    def zeros(self, rows: int, width: int) -> Tensor:
        """Parts that are zero."""


@dataclass(eq=False)
class Step:
    """One operation on values that depend on the tokens.

    Args:
        rows (int): how many rows its result has.
        width (int): the length of each.
        where (str): the operation and the module that it ran in.
    """

    rows: int
    width: int
    where: str
    #: Biases stay pending until attention's branch is added to the residual.
    is_pending: bool = field(default=False, init=False)
    #: The biases of the result are spread.
    spreads: bool = field(default=False, init=False)
    #: Its place in the run; how many steps below it take from rows of other tokens.
    number: float = field(default=0, init=False)
    level: int = field(default=0, init=False)

    @property
    def operands(self) -> tuple[Gather, ...]:
        """What it takes."""
        return ()

    def wanted(self, rows: Tensor) -> list[tuple[Step, Tensor]]:
        """The rows of other steps that some rows are made of."""
        return [(operand.step, operand.rows(rows)) for operand in self.operands]

    def parts(self, rows: Tensor, parts_of: PartsOf) -> Tensor:
        """The parts of some rows, in new memory."""
        raise NotImplementedError


@dataclass(eq=False)
class Gather:
    """Elements of a step's result, in rows.

    Args:
        step (Step): which.
        index (Tensor or None): positions of elements in the flat result, (rows, width);
            None: the result as it is.
    """

    step: Step
    index: Tensor | None = None

    def rows(self, rows: Tensor) -> Tensor:
        """The step's rows in which some rows here have elements."""
        if self.index is None:
            return rows
        return unique(self.index[rows] // self.step.width)

    def take(self, rows: Tensor, parts_of: PartsOf) -> Tensor:
        """The parts of some rows; the memory may be shared."""
        if self.index is None:
            return parts_of(self.step, rows)
        return take(self.step, self.index[rows], parts_of)


def take(step: Step, index: Tensor, parts_of: PartsOf) -> Tensor:
    """The parts of elements of a step's result.

    Args:
        step (Step): which.
        index (Tensor): positions in the flat result, (rows, width).
        parts_of (Callable): gives parts of whole rows.
    """
    width = step.width
    if _is_of_rows(index, width):
        places = (index[:, ::width] // width).flatten()
        rows = unique(places)
        parts = parts_of(step, rows)
        if not torch.equal(rows, places):
            parts = parts.index_select(1, torch.searchsorted(rows, places))
    else:
        places = index // width
        rows = unique(places)
        parts = parts_of(step, rows).flatten(1)
        found = torch.searchsorted(rows, places) * width + index % width
        parts = parts.index_select(1, found.flatten())
    return parts.reshape(len(parts), *index.shape)


def _is_of_rows(index: Tensor, width: int) -> bool:
    """Whether positions are those of whole rows, side by side."""
    if index.shape[1] % width:
        return False
    first = index[:, ::width]
    runs = first[..., None] + torch.arange(width, device=index.device)
    return bool((first % width == 0).all()) and torch.equal(runs.flatten(1), index)


@dataclass(eq=False)
class Own(Step):
    """Rows that belong to one token each, with all biases in them.

    Args:
        value (Tensor): (rows, width).
        token (Tensor): the row at the start that each belongs to, (rows).
    """

    value: Tensor
    token: Tensor


@dataclass(eq=False)
class Unknown(Step):
    """Values of which the parts are not known: an error, if they are asked for."""

    reason: str

    def error(self) -> UnsupportedModelError:
        """What to raise."""
        return UnsupportedModelError(
            f"{self.reason} in {self.where}, so biases cannot be spread over tokens: "
            'use biases="none", or put an activation of several operations into a '
            "module without parameters."
        )


def unique(places: Tensor) -> Tensor:
    """Each once, in order."""
    return torch.unique(places)  # type: ignore[no-any-return]


def size_of(value: Step | Tensor) -> int:
    """How many elements there are."""
    return value.numel() if isinstance(value, Tensor) else value.rows * value.width
