"""What all figures share: their inputs, their Axes and the names along these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from rich.cells import cell_len
from torch import Tensor

from captum_globenc.errors import InputError
from captum_globenc.visualization.fonts import drawable
from captum_globenc.visualization.text import direction

Values = Tensor | Sequence[Any]

_POINTS = 72  # per inch
_FONT = (6.0, 10.0)  # points, smallest and largest
# Of the font size: what a line of text takes, and about what a letter does.
_LINE = 1.15
_LETTER = 0.6
_LONGEST_NAME = 16


def finite(name: str, values: Values, tokens: Sequence[str], *shape: str) -> Tensor:
    """Values as a tensor on the CPU, if they fit the tokens.

    Args:
        name (str): of the values, for the error.
        values (Tensor or nested sequence): of this shape.
        tokens (sequence of str): at least one.
        *shape (str): names of the dimensions. Those that are no "layers" are tokens.

    Raises:
        InputError: they do not fit, or are not finite numbers.
    """
    if isinstance(tokens, str) or not all(isinstance(t, str) for t in tokens):
        raise InputError(
            f"tokens must be a sequence of str, got {tokens!r:.60}: see "
            "tokenizer.convert_ids_to_tokens."
        )
    if not tokens:
        raise InputError("there is no token to draw: pass at least one.")
    try:
        found = torch.as_tensor(values).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} must be numbers: {error}.") from None
    expected = f"({', '.join(shape)})"
    if found.ndim == len(shape) + 1:
        raise InputError(
            f"{name} must be those of one example, {expected}, got shape "
            f"{tuple(found.shape)}: of a batch, draw one by one, as {name}[0]."
        )
    fits = found.ndim == len(shape) and all(
        size >= 1 if dimension == "layers" else size == len(tokens)
        for dimension, size in zip(shape, found.shape)
    )
    if not fits:
        raise InputError(
            f"{name} must be {expected} for {len(tokens)} tokens, got shape "
            f"{tuple(found.shape)}."
        )
    if not found.isfinite().all():
        raise InputError(f"{name} must be finite, and holds NaN or infinity.")
    return found


def unsigned(name: str, values: Tensor) -> Tensor:
    """The same, if none is negative.

    Raises:
        InputError: one is.
    """
    if (values < 0).any():
        raise InputError(
            f"{name} must be at least 0, got {float(values.min()):.4g}: shares of "
            "evidence have no sign. Draw signed values with layer_map or token_strip."
        )
    return values


def new_axes(width: float, height: float) -> Axes:
    """Axes of a figure of their own, in inches.

    It is pyplot's, so that a notebook shows it as it shows any other.
    """
    return pyplot.figure(figsize=(width, height), layout="constrained").add_subplot()


def along(tokens: int, least: float) -> float:
    """Inches for so many tokens beside each other: the more, the narrower."""
    return max(least, min(0.35 * tokens, 8), min(0.15 * tokens, 24))


def beside(tokens: Sequence[str]) -> float:
    """Inches that the longest of the names beside an axis takes."""
    drawn, _ = drawable(tokens, _LONGEST_NAME)
    return max(map(cell_len, drawn)) * _LETTER * _FONT[1] / _POINTS + 0.2


def name_tokens(axis: Axis, tokens: Sequence[str]) -> None:
    """Tokens at 0, 1, ... of an axis, as large as fits; where none does, every n-th.

    Names along the horizontal axis stand upright where they would overlap.
    """
    drawn, properties = drawable(tokens, _LONGEST_NAME)
    pitch = _room(axis) / len(drawn)
    size = min(max(pitch / _LINE, _FONT[0]), _FONT[1])
    every = math.ceil(size * _LINE / pitch - 1e-6)
    longest = max(map(cell_len, drawn)) * _LETTER * size
    shown = range(0, len(drawn), every)
    axis.set_ticks(
        shown,
        [drawn[index] for index in shown],
        size=size,
        rotation=90 if isinstance(axis, XAxis) and longest > pitch else 0,
        **properties,
    )
    axis.set_tick_params(length=0)


def name_layers(axis: Axis, names: Sequence[str]) -> None:
    """Layers at 0, 1, ... of an axis; where they do not fit, every n-th."""
    every = math.ceil(len(names) * _FONT[1] * _LINE / _room(axis))
    axis.set_ticks(range(0, len(names), every), names[::every])
    axis.set_tick_params(length=0)


def runs_from_right(tokens: Sequence[str]) -> bool:
    """Whether the sentence is of a script that does, whatever its special tokens."""
    words = [t for t in tokens if not (t[:1] in "[<" and t[-1:] in "]>")]
    return direction("".join(words)) == "rtl"


def size_in_points(axes: Axes) -> tuple[float, float]:
    """Width and height of axes, as far as they are laid out yet."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    box = axes.get_window_extent()
    return box.width / figure.dpi * _POINTS, box.height / figure.dpi * _POINTS


def _room(axis: Axis) -> float:
    """The length of an axis in points."""
    width, height = size_in_points(axis.axes)
    return width if isinstance(axis, XAxis) else height
