"""Checks whose numbers are on a device: all are read at once, at the end.

Reading a number of an accelerator waits for all that it was told to do before. Inside
of :func:`settled`, a check therefore leaves its numbers where they are, and the end of
the call reads those of all checks together. Outside, each check is made at once.

What a call must know before it can go on is assumed to be as it was the last time, and
is one more check. Where it is not, the call is made again and looks at everything.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

#: Given the numbers of a check, raises where they are wrong.
Judge = Callable[[list[float]], None]


_Result = TypeVar("_Result")


class AssumptionError(Exception):
    """What held in the last call does not hold in this one: make it again."""


class _Deferred:
    """The checks of one block, in turn.

    Args:
        assumed (frozenset): what is taken to hold.
    """

    def __init__(self, assumed: frozenset[Hashable]) -> None:
        self.assumed = assumed
        #: What was looked at in this block: key → whether it held each time.
        self.found: dict[Hashable, bool] = {}
        self._numbers: list[Tensor] = []
        self._judges: list[tuple[int, Judge]] = []

    def add(self, numbers: Tensor | None, judge: Judge) -> None:
        count = 0 if numbers is None else numbers.numel()
        if numbers is not None:
            numbers = numbers.detach() if numbers.requires_grad else numbers
            flat = numbers if numbers.ndim == 1 else numbers.reshape(-1)
            self._numbers.append(flat)
        self._judges.append((count, judge))

    def settle(self) -> None:
        """Read all numbers, and judge them in turn."""
        numbers, judges = self._numbers, self._judges
        self._numbers, self._judges = [], []
        values: list[float] = []
        if numbers:
            device = numbers[0].device
            values = torch.cat([part.to(device) for part in numbers]).tolist()
        start = 0
        for count, judge in judges:
            judge([float(value) for value in values[start : start + count]])
            start += count


_CURRENT: ContextVar[_Deferred | None] = ContextVar("deferred checks", default=None)


def settled(known: set[Hashable], call: Callable[[], _Result]) -> _Result:
    """What a call returns, its checks put off to its end.

    What is known is taken to hold. Where it does not, the call is made once more, and
    looks at everything. Where the call fails, a check that has failed before is its
    cause, and is raised instead.

    Args:
        known (set): what has held in earlier calls; it is kept up to date.
        call (Callable): without arguments.

    Raises:
        GlobEncError: a check failed.
    """
    try:
        return _settled(known, frozenset(known), call)
    except AssumptionError:
        return _settled(known, frozenset(), call)


def _settled(
    known: set[Hashable], assumed: frozenset[Hashable], call: Callable[[], _Result]
) -> _Result:
    deferred = _Deferred(assumed)
    token = _CURRENT.set(deferred)
    try:
        result = call()
        deferred.settle()
    except Exception:
        _CURRENT.set(None)
        deferred.settle()
        raise
    finally:
        _CURRENT.reset(token)
        for key, held in deferred.found.items():
            (known.add if held else known.discard)(key)
    return result


def check_later(numbers: Tensor | None, judge: Judge) -> None:
    """Have numbers judged: at the end of the call of :func:`settled`, or now.

    Args:
        numbers (Tensor or None): of any shape; bool counts as 0 and 1. None: there are
            none, and ``judge`` is called in its turn.
        judge (Callable): is given them, flat, and raises where they are wrong.
    """
    deferred = _CURRENT.get()
    if deferred is not None:
        deferred.add(numbers, judge)
    else:
        values = [] if numbers is None else numbers.detach().reshape(-1).tolist()
        judge([float(value) for value in values])


def holds(key: Hashable, is_so: Tensor) -> bool:
    """Whether something is so, which a run must know to go on.

    Args:
        key (Hashable): what it is, the same in every run.
        is_so (Tensor): a boolean, or several that must all be true.

    Returns:
        *bool*. Inside of :func:`settled`, what has held in an earlier call is taken to
        hold, and is checked at the end.
    """
    deferred = _CURRENT.get()
    if deferred is not None and key in deferred.assumed:
        deferred.add(is_so, _still_holds)
        return True
    found = bool(is_so.all())
    if deferred is not None:
        deferred.found[key] = found and deferred.found.get(key, True)
    return found


def _still_holds(values: list[float]) -> None:
    if not all(values):
        raise AssumptionError
