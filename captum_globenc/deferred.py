"""Checks whose numbers are on a device: all are read at once, at the end.

Reading a number of an accelerator waits for all that it was told to do before. Inside
:func:`deferring`, a check therefore leaves its numbers where they are, and the end of
the block reads those of all checks together. Outside, each check is made at once.

What a run must know before it can go on is assumed to be as it was the last time, and
is one more check. Where it is not, the block is run again and looks at it first.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor

#: Given the numbers of a check, raises where they are wrong.
Judge = Callable[[list[float]], None]


_Result = TypeVar("_Result")


class AssumptionError(Exception):
    """What held in the last run does not hold in this one: run it again."""


class _Deferred:
    """The checks of one block, in turn.

    Args:
        known (set): what has held so far.
    """

    def __init__(self, known: set[Hashable]) -> None:
        self.known = known
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

    def forget(self, key: Hashable) -> Judge:
        def judge(values: list[float]) -> None:
            if not all(values):
                self.known.discard(key)
                raise AssumptionError(key)

        return judge


_CURRENT: ContextVar[_Deferred | None] = ContextVar("deferred checks", default=None)


@contextmanager
def deferring(known: set[Hashable]) -> Iterator[None]:
    """Put off the checks of this thread to the end of the block.

    Where something else fails inside, a check that has failed before is its cause.

    Args:
        known (set): what has held in earlier runs; it is kept up to date.

    Raises:
        AssumptionError: something of it does not hold now; run the block again.
        GlobEncError: a check failed.
    """
    deferred = _Deferred(known)
    token = _CURRENT.set(deferred)
    try:
        yield
        deferred.settle()
    except Exception:
        _CURRENT.set(None)
        deferred.settle()
        raise
    finally:
        _CURRENT.reset(token)


def settled(known: set[Hashable], call: Callable[[], _Result]) -> _Result:
    """What a call returns, its checks put off to its end.

    Args:
        known (set): as for :func:`deferring`.
        call (Callable): it is made again where an assumption does not hold.

    Raises:
        GlobEncError: a check failed.
    """
    while True:
        try:
            with deferring(known):
                return call()
        except AssumptionError:
            continue  # What did not hold is not known any more.


def check_later(numbers: Tensor | None, judge: Judge) -> None:
    """Have numbers judged: at the end of the block of :func:`deferring`, or now.

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
        *bool*. Inside of :func:`deferring`, what has held in an earlier run is taken to
        hold, and is checked at the end.
    """
    deferred = _CURRENT.get()
    if deferred is not None and key in deferred.known:
        deferred.add(is_so, deferred.forget(key))
        return True
    found = bool(is_so.all())
    if deferred is not None and found:
        deferred.known.add(key)
    return found
