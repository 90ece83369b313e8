"""What can go wrong, each with what was found, what was expected and what to do."""

from __future__ import annotations


class GlobEncError(Exception):
    """The base of every error that this package raises by itself."""


class InputError(GlobEncError, ValueError):
    """An argument or input that cannot be attributed: its value is in the message."""


class UnsupportedModelError(GlobEncError, ValueError):
    """The model holds no encoder that this package can decompose."""


class ReconstructionError(GlobEncError, RuntimeError):
    """The recorded parts of a layer do not rebuild what the layer computed.

    Args:
        layer (str): the layer's name in the model.
        part (str): which identity of the layer failed.
        error (float): largest deviation, relative to the largest true value.
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


class NonFiniteActivationError(GlobEncError, ArithmeticError):
    """NaN or infinity in a layer's activations."""
