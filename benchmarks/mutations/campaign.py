"""What a case is, how it is run, and what its outcome is."""

from __future__ import annotations

import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from captum_globenc import GlobEncError

RIGHT = frozenset({"right"})
REFUSED = frozenset({"refused"})
EITHER = RIGHT | REFUSED

#: Largest deviation, relative to an example's largest score.
LIMIT = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.float16: 4e-3,
    torch.bfloat16: 2e-2,
}


class Trial(Protocol):
    """What a case builds: something that asks the package."""

    def outcome(self) -> tuple[str, str]:
        """Ask the package.

        Returns:
            *tuple* of "right", "wrong", "refused" or "crash", and a detail.
        """


@dataclass(frozen=True)
class Scores:
    """Scores and their truth.

    Args:
        found (callable): asks the package for them.
        truth (Tensor or None): what is right, or None where no numbers are.
        dtype (torch.dtype): the model's, which says how exact they can be.
        limit (float, optional): the largest relative deviation. Default: the dtype's.
    """

    found: Callable[[], Tensor]
    truth: Tensor | None
    dtype: torch.dtype = torch.float64
    limit: float | None = None

    def outcome(self) -> tuple[str, str]:
        """Compare the scores with the truth, example by example."""
        found = self.found()
        if self.truth is None:
            return "wrong", "there are no right numbers"
        off = deviation(found, self.truth, self.dtype.itemsize == 2)
        limit = LIMIT[self.dtype] if self.limit is None else self.limit
        return ("right" if off <= limit else "wrong"), f"off by {off:.1g}"


@dataclass(frozen=True)
class Seen:
    """``check_model``: does it see anything?

    Args:
        check (callable): gives its report.
        is_legal (bool): whether there is nothing to see.
    """

    check: Callable[[], Any]
    is_legal: bool

    def outcome(self) -> tuple[str, str]:
        """Refused, where a layer is not within tolerance."""
        for layer, fit in self.check().layers.items():
            if not fit.deviation <= fit.limit:
                return "refused", f"{layer}: {fit.part} is off by {fit.deviation:.1g}"
        return ("right" if self.is_legal else "wrong"), "nothing is seen"


@dataclass(frozen=True)
class Holds:
    """A statement that must be true: gives what is against it, "" for nothing."""

    ask: Callable[[], str]

    def outcome(self) -> tuple[str, str]:
        """Right where nothing is against it."""
        against = self.ask()
        return ("wrong" if against else "right"), against


@dataclass(frozen=True)
class Case:
    """One case of the campaign.

    Args:
        kind (str): what is changed.
        name (str): one of its kind.
        accept (frozenset[str]): the outcomes that are good.
        make (callable): builds the trial.
        decided (bool): False: no run can tell what is right, so the outcome is
            counted, and nothing else.
    """

    kind: str
    name: str
    accept: frozenset[str]
    make: Callable[[], Trial]
    decided: bool = True

    @property
    def title(self) -> str:
        """The kind and the name."""
        return f"{self.kind}: {self.name}"


@dataclass(frozen=True)
class Result:
    """What came of a case."""

    case: Case
    outcome: str
    detail: str
    seconds: float

    @property
    def is_good(self) -> bool:
        """Whether the outcome is one that the case accepts."""
        return not self.case.decided or self.outcome in self.case.accept


CASES: list[Case] = []
_UNDO: list[ExitStack] = []


def case(
    kind: str,
    accept: frozenset[str] = EITHER,
    over: Sequence[tuple[Any, ...]] = ((),),
    decided: bool = True,
) -> Callable[[Callable[..., Trial]], Callable[..., Trial]]:
    """Register a function as cases, one for each tuple of arguments."""

    def register(function: Callable[..., Trial]) -> Callable[..., Trial]:
        name = function.__name__.strip("_").replace("_", " ")
        for arguments in over:
            title = ", ".join([name, *(_text(argument) for argument in arguments)])
            add(kind, title, accept, _bound(function, arguments), decided)
        return function

    return register


def add(
    kind: str,
    name: str,
    accept: frozenset[str],
    make: Callable[[], Trial],
    decided: bool = True,
) -> None:
    """Register one case."""
    CASES.append(Case(kind, name, accept, make, decided))


def patch(owner: object, name: str, value: object) -> None:
    """Set an attribute until the present case is over."""
    before = vars(owner).get(name, _UNDO)
    if before is _UNDO:
        _UNDO[-1].callback(delattr, owner, name)
    else:
        _UNDO[-1].callback(setattr, owner, name, before)
    setattr(owner, name, value)


def run(one: Case) -> Result:
    """Run one case; an exception while it is built is a mistake of the campaign."""
    torch.manual_seed(zlib.crc32(one.title.encode()))
    start = time.perf_counter()
    with ExitStack() as undo, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _UNDO.append(undo)
        undo.callback(_UNDO.pop)
        trial = one.make()
        try:
            outcome, detail = trial.outcome()
        except GlobEncError as error:
            outcome, detail = "refused", f"{type(error).__name__}: {error}"
        except Exception as error:
            outcome, detail = "crash", f"{type(error).__name__}: {error}"
    return Result(one, outcome, detail, time.perf_counter() - start)


def deviation(found: Tensor, truth: Tensor, by_share: bool = False) -> float:
    """The largest difference, relative to the largest true score of its example.

    Args:
        found (Tensor): (batch, ...).
        truth (Tensor): likewise.
        by_share (bool, optional): compare shares of each example's sum: in half
            precision scores may be scaled.
    """
    if found.shape != truth.shape:
        return float("inf")
    found, truth = found.detach().double().flatten(1), truth.double().flatten(1)
    if by_share:
        found, truth = (each / each.sum(-1, keepdim=True) for each in (found, truth))
    off = (found - truth).abs().amax(-1) / truth.abs().amax(-1)
    return float(off.nan_to_num(nan=float("inf")).max())


def _bound(
    function: Callable[..., Trial], arguments: tuple[Any, ...]
) -> Callable[[], Trial]:
    return lambda: function(*arguments)


def _text(argument: object) -> str:
    if callable(argument):
        return getattr(argument, "__name__", str(argument)).strip("_").replace("_", " ")
    return str(argument).removeprefix("torch.")
