"""Operations on rows, each with what it makes of the parts of its operands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_globenc.linearization.spreading.rows import (
    Gather,
    PartsOf,
    Step,
    size_of,
    take,
    unique,
)


@dataclass(eq=False)
class Unary(Step):
    """A step of one operand."""

    operand: Gather

    @property
    def operands(self) -> tuple[Gather, ...]:
        """Its operand."""
        return (self.operand,)


@dataclass(eq=False)
class Copy(Unary):
    """The same values, of which the biases can be spread by themselves."""

    def parts(self, rows: Tensor, parts_of: PartsOf) -> Tensor:
        """The same parts."""
        return self.operand.take(rows, parts_of).clone()


@dataclass(eq=False)
class Linear(Unary):
    """A linear map of each row, weight (width, width of the operand), and its bias."""

    weight: Tensor
    bias: Tensor | None

    def parts(self, rows: Tensor, parts_of: PartsOf) -> Tensor:
        """The map of every part; the bias joins the biases."""
        below = self.operand.take(rows, parts_of)
        result = below @ self.weight.to(below.dtype).T
        if self.bias is not None:
            result[-1] += self.bias.to(result.dtype)
        return result


@dataclass(eq=False)
class Norm(Unary):
    """A LayerNorm or RMSNorm: mean linear, 1 / deviation (rows, 1) a constant."""

    inverse: Tensor
    is_centred: bool
    weight: Tensor | None
    bias: Tensor | None

    def parts(self, rows: Tensor, parts_of: PartsOf) -> Tensor:
        """Every part centred and scaled; the bias joins the biases."""
        below = self.operand.take(rows, parts_of)
        if self.is_centred:
            result = below - below.mean(-1, keepdim=True)
            result *= self.inverse[rows].to(result.dtype)
        else:
            result = below * self.inverse[rows].to(below.dtype)
        if self.weight is not None:
            result *= self.weight.to(result.dtype)
        if self.bias is not None:
            result[-1] += self.bias.to(result.dtype)
        return result


@dataclass(eq=False)
class Scale(Unary):
    """A product with a constant of each element, (rows, width) or (rows, 1)."""

    factor: Tensor
    is_activation: bool = False

    def wanted(self, rows: Tensor) -> list[tuple[Step, Tensor]]:
        """Rows that are not multiplied by zero."""
        return super().wanted(rows[self._is_live(rows)])

    def parts(self, rows: Tensor, parts_of: PartsOf) -> Tensor:
        """Every part times the constant; zero where that is zero."""
        live = self._is_live(rows)
        if bool(live.all()):
            below = self.operand.take(rows, parts_of)
            return below * self.factor[rows].to(below.dtype)
        result = parts_of.zeros(len(rows), self.width)
        if bool(live.any()):
            below = self.operand.take(rows[live], parts_of)
            result[:, live] = below * self.factor[rows[live]].to(below.dtype)
        return result

    def _is_live(self, rows: Tensor) -> Tensor:
        return (self.factor[rows] != 0).any(-1)


@dataclass(eq=False)
class Shift(Unary):
    """A constant that is added to each element, (rows, width) or (1, width)."""

    bias: Tensor

    def parts(self, rows: Tensor, parts_of: PartsOf) -> Tensor:
        """The constant joins the biases."""
        result = self.operand.take(rows, parts_of).clone()
        bias = self.bias if len(self.bias) == 1 else self.bias[rows]
        result[-1] += bias.to(result.dtype)
        return result


@dataclass(eq=False)
class Sum(Step):
    """The sum, or the difference, of two values that depend on tokens."""

    first: Gather
    second: Gather
    sign: int

    @property
    def operands(self) -> tuple[Gather, ...]:
        """Both."""
        return self.first, self.second

    def parts(self, rows: Tensor, parts_of: PartsOf) -> Tensor:
        """Part by part."""
        first = self.first.take(rows, parts_of)
        return torch.add(first, self.second.take(rows, parts_of), alpha=self.sign)


@dataclass(eq=False)
class Total(Step):
    """A sum over several elements: rows of the operand are (rows × count, width).

    ``count`` of them make a row here; a mean has a factor.
    """

    operand: Gather
    count: int
    factor: float
    #: Over more than the elements of one row.
    is_across: bool

    @property
    def operands(self) -> tuple[Gather, ...]:
        """What is summed."""
        return (self.operand,)

    def wanted(self, rows: Tensor) -> list[tuple[Step, Tensor]]:
        """All that is summed."""
        return [(self.operand.step, self.operand.rows(self._below(rows)))]

    def parts(self, rows: Tensor, parts_of: PartsOf) -> Tensor:
        """The sum of every source's parts."""
        parts = self.operand.take(self._below(rows), parts_of)
        parts = parts.view(len(parts), len(rows), self.count, self.width)
        return parts.sum(2) * self.factor

    def _below(self, rows: Tensor) -> Tensor:
        counted = torch.arange(self.count, device=rows.device)
        return (rows[:, None] * self.count + counted).flatten()


@dataclass(eq=False)
class Joined(Step):
    """Elements of several values side by side.

    Args:
        index (Tensor): (rows, width), positions in all values one behind the other.
        values (tuple): steps and constants, in this order.
    """

    index: Tensor
    values: tuple[Step | Tensor, ...]

    @property
    def operands(self) -> tuple[Gather, ...]:
        """The steps among the values."""
        return tuple(Gather(value) for value in self.values if isinstance(value, Step))

    def wanted(self, rows: Tensor) -> list[tuple[Step, Tensor]]:
        """The rows in which there are elements."""
        return [
            (value, unique(places // value.width))
            for value, _, places in self._split(rows)
            if isinstance(value, Step)
        ]

    def parts(self, rows: Tensor, parts_of: PartsOf) -> Tensor:
        """Parts of elements from where they come; constants join the biases."""
        result = parts_of.zeros(len(rows), self.width)
        for value, chosen, places in self._split(rows):
            if isinstance(value, Step):
                result[:, chosen] = take(value, places[None], parts_of)[:, 0]
            else:
                result[-1, chosen] = value.flatten()[places].to(result.dtype)
        return result

    def _split(self, rows: Tensor) -> list[tuple[Step | Tensor, Tensor, Tensor]]:
        index, start, result = self.index[rows], 0, []
        for value in self.values:
            stop = start + size_of(value)
            chosen = (index >= start) & (index < stop)
            if bool(chosen.any()):
                result.append((value, chosen, index[chosen] - start))
            start = stop
        return result


@dataclass(eq=False)
class Mix(Step):
    """A product of constant weights with values: attention.

    Rows are (leading × receivers); those of the values are (leading × sources).

    Args:
        values (Gather): what is mixed.
        shape (tuple[int, int, int]): leading (batch and heads), receivers, sources.
        weights (Callable): leading and receivers → (leading, receivers, all sources).
    """

    values: Gather
    shape: tuple[int, int, int]
    weights: Callable[[Tensor, Tensor], Tensor]

    @property
    def operands(self) -> tuple[Gather, ...]:
        """The values."""
        return (self.values,)

    def grid(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Leading and receivers of some rows."""
        return unique(rows // self.shape[1]), unique(rows % self.shape[1])

    def below(self, leading: Tensor, sources: Tensor) -> Tensor:
        """The rows of the values."""
        return (leading[:, None] * self.shape[2] + sources).flatten()

    def support(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Leading of some rows, and the sources of which they take something."""
        leading, receivers = self.grid(rows)
        weights = self.weights(leading, receivers)
        return leading, (weights != 0).any(0).any(0).nonzero().flatten()

    def wanted(self, rows: Tensor) -> list[tuple[Step, Tensor]]:
        """Values of which something is taken."""
        return [(self.values.step, self.values.rows(self.below(*self.support(rows))))]
