"""All cases, in one order."""

from __future__ import annotations

from benchmarks.mutations import (
    attention,
    check,
    closures,
    dtypes,
    heads,
    legal,
    memory,
    structure,
    threads,
)
from benchmarks.mutations.campaign import CASES, Case

MODULES = (
    legal,
    attention,
    structure,
    heads,
    closures,
    memory,
    dtypes,
    threads,
    check,
)
KINDS = ("rounding", *(module.KIND for module in MODULES))


def part(number: int, of: int) -> list[Case]:
    """Every so-manieth case, starting with the given one, counted from 1."""
    ordered = sorted(CASES, key=lambda case: KINDS.index(case.kind))
    return ordered[number - 1 :: of]


__all__ = ["CASES", "part"]
