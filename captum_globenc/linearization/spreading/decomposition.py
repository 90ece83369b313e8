"""The parts of one example's output, from the steps of a run, in blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from captum_globenc.linearization.spreading.rows import (
    Gather,
    Own,
    Step,
    Unknown,
    unique,
)
from captum_globenc.linearization.spreading.shares import spread
from captum_globenc.linearization.spreading.steps import (
    Copy,
    Linear,
    Mix,
    Scale,
    Shift,
    Sum,
)

#: Numbers in one tensor of parts of a block of rows.
BLOCK = 2**22


def plan(output: Gather, count: int) -> list[Step]:
    """The steps below an output, in the order of the run; biases know where they go.

    A bias is spread where it is added, with the exception of attention's: those of its
    values and of its output are spread once the residual is there, or in front of an
    activation.

    Args:
        output (Gather): the explained outputs, (count, 1).
        count (int): how many there are.

    Returns:
        *list* of steps; the last is the output.
    """
    steps = _below(output.step)
    steps = _narrowed(steps)
    for step in steps:
        if isinstance(step, Mix):
            _note_values(step.values.step)
    for step in steps.copy():
        pending = [operand.step.is_pending for operand in step.operands]
        if isinstance(step, Mix):
            values = step.values.step
            step.is_pending = values.is_pending or isinstance(values, Own)
        elif step.is_pending:
            continue  # Attention's values.
        elif isinstance(step, Scale) and step.is_activation:
            if any(pending):
                steps.append(_settled(step.operand, step.rows, step.number - 0.5))
                step.operand = Gather(steps[-1])
        elif isinstance(step, Sum) and any(pending) and not all(pending):
            step.spreads = True
        elif any(pending):
            step.is_pending = True
        else:
            step.spreads = getattr(step, "bias", None) is not None
    last = _settled(output, count, math.inf)
    last.spreads = True  # Also what has met no vector of any weight.
    steps.append(last)
    return sorted(steps, key=lambda step: step.number)


def _settled(operand: Gather, rows: int, number: float) -> Step:
    """The same values, in which no bias is pending."""
    width = operand.step.width if operand.index is None else operand.index.shape[1]
    copy = Copy(rows, width, "forward_func", operand)
    copy.number, copy.level = number, operand.step.level
    copy.spreads = operand.step.is_pending
    return copy


def _below(output: Step) -> list[Step]:
    found, left = {output}, [output]
    while left:
        for operand in left.pop().operands:
            if operand.step not in found:
                found.add(operand.step)
                left.append(operand.step)
    return sorted(found, key=lambda step: step.number)


def _note_values(step: Step) -> None:
    """Mark what makes attention's values: the last linear map, and what follows."""
    if isinstance(step, Linear):
        step.is_pending = True
    elif isinstance(step, Shift) or (
        isinstance(step, Scale) and not step.is_activation
    ):
        _note_values(step.operand.step)
        step.is_pending = step.operand.step.is_pending
    elif isinstance(step, Sum):
        below = [operand.step for operand in step.operands]
        if all(isinstance(part, Linear | Scale) for part in below):
            for part in below:
                _note_values(part)
            step.is_pending = True


def _narrowed(steps: list[Step]) -> list[Step]:
    """Of a map to several things, such as queries, keys and values, each by itself."""
    parts: dict[tuple[Step, tuple[int, ...]], Step] = {}
    for step in steps:
        for operand in step.operands:
            whole, index = operand.step, operand.index
            if not isinstance(whole, Linear) or index is None:
                continue
            columns = unique(index % whole.width)
            if len(columns) == whole.width:
                continue
            key = whole, tuple(columns.tolist())
            if key not in parts:
                parts[key] = _columns(whole, columns, whole.number + 0.25)
            operand.step = parts[key]
            places = index // whole.width * len(columns)
            operand.index = places + torch.searchsorted(columns, index % whole.width)
    return sorted([*steps, *parts.values()], key=lambda step: step.number)


def _columns(whole: Linear, columns: Tensor, number: float) -> Linear:
    """Some of what a map makes."""
    bias = None if whole.bias is None else whole.bias[columns]
    part = Linear(
        whole.rows,
        len(columns),
        whole.where,
        whole.operand,
        whole.weight[columns],
        bias,
    )
    part.number, part.level = number, whole.level
    return part


class Decomposition:
    """Relevance of the tokens of one example for one of its outputs.

    Args:
        steps (list[Step]): of :func:`plan`.
        row (int): which of the outputs.
        rule (str): how biases are shared.
    """

    def __init__(self, steps: list[Step], row: int, rule: str) -> None:
        self._steps, self._rule = steps, rule
        self._stored: dict[Step, tuple[Tensor, Tensor]] = {}
        self._mixed: dict[Step, tuple[Tensor, Tensor, Tensor]] = {}
        self._cache: dict[tuple[Step, tuple[int, ...]], Tensor] = {}
        own = next((step for step in steps if isinstance(step, Own)), None)
        if own is None:
            raise next(step for step in steps if isinstance(step, Unknown)).error()
        self._like = own.value
        self._row = torch.tensor([row], device=own.value.device)
        self._demand()

    # What is needed

    def _demand(self) -> None:
        """Which rows of each step the output is made of, and which tokens."""
        masks: dict[Step, Tensor] = {}
        self._users: dict[Step, list[Step]] = {}
        self._want(masks, self._steps[-1], self._row)
        for step in reversed(self._steps):
            if step in masks:
                for below, rows in step.wanted(masks[step].nonzero().flatten()):
                    self._want(masks, below, rows)
                    self._users.setdefault(below, []).append(step)
        self._wanted = {step: mask.nonzero().flatten() for step, mask in masks.items()}
        own = [s.token[rows] for s, rows in self._wanted.items() if isinstance(s, Own)]
        #: Rows at the start of the tokens that the output depends on, in order.
        self.tokens = unique(torch.cat(own)) if own else self._row[:0]
        self._kept = [step for step in self._steps if self._is_kept(step)]

    @staticmethod
    def _want(masks: dict[Step, Tensor], step: Step, rows: Tensor) -> None:
        if isinstance(step, Unknown):
            raise step.error()
        if step not in masks:
            masks[step] = torch.zeros(step.rows, dtype=torch.bool, device=rows.device)
        masks[step][rows] = True

    def _is_kept(self, step: Step) -> bool:
        """Attention's values are, and what is used on both sides of attention."""
        if step not in self._wanted or isinstance(step, Own):
            return False
        users = self._users.get(step, [])
        return isinstance(step, Mix) or any(
            user.level > step.level and not isinstance(user, Mix) for user in users
        )

    def _last_uses(self) -> dict[int, list[Step]]:
        """Kept step, by its place, after which others are needed no more."""
        kept, last = set(self._kept), {}
        for place, root in enumerate([*self._kept, self._steps[-1]]):
            left = [operand.step for operand in root.operands]
            seen = set(left)
            while left:
                step = left.pop()
                if step in kept:
                    last[step] = place
                    continue
                below = {operand.step for operand in step.operands} - seen
                seen |= below
                left += below
        ends: dict[int, list[Step]] = {}
        for step, place in last.items():
            ends.setdefault(place, []).append(step)
        return ends

    # From below

    def run(self) -> Tensor:
        """The parts of the output, (sources + 1); the last are biases, if any."""
        ends = self._last_uses()
        for place, step in enumerate(self._kept):
            if isinstance(step, Mix):
                self._mixed[step] = self._values(step)
            else:
                self._stored[step] = self._all_rows(step)
            for used in ends.get(place, []):
                self._stored.pop(used, None)
                self._mixed.pop(used, None)
        return self(self._steps[-1], self._row).flatten()

    def _all_rows(self, step: Step) -> tuple[Tensor, Tensor]:
        rows = self._wanted[step]
        parts = self.zeros(len(rows), step.width)
        for start, block in self._blocks(rows):
            parts[:, start : start + len(block)] = self(step, block)
        return rows, parts

    def _values(self, step: Mix) -> tuple[Tensor, Tensor, Tensor]:
        """Values laid out for a product: (leading, sources, (parts × head size))."""
        leading, sources = step.support(self._wanted[step])
        count = len(self.tokens) + 1
        shape = (len(leading), len(sources), count, step.width)
        result = self.zeros(1, 1).new_empty(shape)
        for start, block in self._blocks(sources):
            rows = step.below(leading, block)
            parts = step.values.take(rows, self)
            parts = parts.view(count, len(leading), len(block), step.width)
            result[:, start : start + len(block)] = parts.permute(1, 2, 0, 3)
        return leading, sources, result.flatten(2)

    def _blocks(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        widest = max(step.width for step in self._wanted) * (len(self.tokens) + 1)
        size = max(1, BLOCK // widest)
        for start in range(0, len(rows), size):
            self._cache.clear()
            yield start, rows[start : start + size]
        self._cache.clear()

    # Parts of rows

    def zeros(self, rows: int, width: int) -> Tensor:
        """Parts that are zero, (sources + 1, rows, width)."""
        wide = torch.promote_types(self._like.dtype, torch.float32)
        return self._like.new_zeros(len(self.tokens) + 1, rows, width, dtype=wide)

    def __call__(self, step: Step, rows: Tensor) -> Tensor:
        """The parts of some rows of a step, (sources + 1, rows, width)."""
        if isinstance(step, Own):
            return self._own(step, rows)
        if step in self._stored:
            known, parts = self._stored[step]
            if len(rows) == len(known):
                return parts
            return parts.index_select(1, torch.searchsorted(known, rows))
        is_shared = len(self._users.get(step, [])) > 1
        key = (step, tuple(rows.tolist()) if is_shared else ())
        if key in self._cache:
            return self._cache[key]
        if isinstance(step, Mix):
            parts = self._mix(step, rows)
        else:
            parts = step.parts(rows, self)
        if step.spreads:
            parts = spread(parts, self._rule)
        if is_shared:
            self._cache[key] = parts
        return parts

    def _own(self, step: Own, rows: Tensor) -> Tensor:
        parts = self.zeros(len(rows), step.width)
        source = torch.searchsorted(self.tokens, step.token[rows])
        places = torch.arange(len(rows), device=rows.device)
        parts[source, places] = step.value[rows].to(parts.dtype)
        return parts

    def _mix(self, step: Mix, rows: Tensor) -> Tensor:
        known, sources, values = self._mixed[step]
        leading, receivers = step.grid(rows)
        if len(leading) < len(known):
            values = values[torch.searchsorted(known, leading)]
        weights = step.weights(leading, receivers)[..., sources]
        mixed = weights.to(values.dtype) @ values
        shape = (len(leading), len(receivers), -1, step.width)
        mixed = mixed.view(shape).permute(2, 0, 1, 3).flatten(1, 2)
        if mixed.shape[1] == len(rows):
            return mixed
        grid = (leading[:, None] * step.shape[1] + receivers).flatten()
        return mixed.index_select(1, torch.searchsorted(grid, rows))
