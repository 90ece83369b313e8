"""What can go wrong, each with what was found, what was expected and what to do."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Mapping
from typing import Any, TypeVar

Value = TypeVar("Value")


class GlobEncError(Exception):
    """The base of every error that this package raises by itself."""


class InputError(GlobEncError, ValueError):
    """An argument or input that cannot be attributed: its value is in the message."""


class UnsupportedModelError(GlobEncError, ValueError):
    """The model holds no encoder, or an operation, that a method can explain."""


class ReconstructionError(GlobEncError, RuntimeError):
    """The recorded parts of a layer do not rebuild what the layer computed.

    Args:
        layer (str): the layer's name in the model.
        part (str): which identity of the layer failed.
        error (float): largest deviation of a token, relative to the sizes of the
            parts there.
        tolerance (float): the largest deviation that rounding explains.
    """

    def __init__(self, layer: str, part: str, error: float, tolerance: float) -> None:
        super().__init__(
            f"layer {layer!r}: the recorded parts do not rebuild {part} "
            f"(relative error {error:.2g}, at most {tolerance:.2g} expected), so its "
            "scores would be wrong. Either the layer does something that its "
            "registered architecture does not describe (see "
            "captum_globenc.register_architecture), or a hook or patch on the model "
            "changes what it computes."
        )
        self.layer = layer
        self.part = part
        self.error = error
        self.tolerance = tolerance


class ConservationError(GlobEncError, RuntimeError):
    """The relevance of the output is not that of the inputs and constants.

    Args:
        where (str): the part of the model that is the likely reason.
        error (float): the difference, relative to the sizes of all parts of relevance.
        tolerance (float): the largest difference that rounding explains.
    """

    def __init__(self, where: str, error: float, tolerance: float) -> None:
        super().__init__(
            "the relevance of the inputs and constants does not add up to the output "
            f"(relative error {error:.2g}, at most {tolerance:.2g} expected), so it "
            f"would be wrong: {where}. Something that the output depends on is "
            "detached from the inputs, changed behind torch's back, or computed by an "
            "operation that hands back another gradient than its own."
        )
        self.error = error
        self.tolerance = tolerance


class NonFiniteActivationError(GlobEncError, ArithmeticError):
    """NaN or infinity in a layer's activations."""


def did_you_mean(name: object, known: list[str]) -> str:
    """A sentence with the nearest known name, in any case; "" for none."""
    folded = {other.casefold(): other for other in known}
    near = difflib.get_close_matches(str(name).casefold(), folded, n=1)
    return f" Did you mean {folded[near[0]]!r}?" if near else ""


def named(known: Mapping[str, Value], name: str, kind: str) -> Value:
    """The value of this name.

    Args:
        known (Mapping): name → value.
        name (str): which.
        kind (str): what it is, for the error.

    Raises:
        InputError: there is none.
    """
    if name in known:
        return known[name]
    raise InputError(
        f"unknown {kind} {name!r}; known: {', '.join(known)}."
        f"{did_you_mean(name, list(known))}"
    )


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, and not a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
