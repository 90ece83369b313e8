"""A sentence in colours: one score per token."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle

from captum_globenc.visualization.canvas import (
    Values,
    finite,
    runs_from_right,
    size_in_points,
)
from captum_globenc.visualization.colours import letters_on, scale
from captum_globenc.visualization.fonts import drawable
from captum_globenc.visualization.text import LEAST, number, strengths

_WIDTH = 7.0  # inches
_WHOLE = (0, 0, 1, 1)
_POINTS = 72  # per inch
_SIZES = (10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0)
# All in font sizes: a line with its numbers, the ground of a token, what that has
# besides the letters, what is between two of them, the numbers.
_LINE = 2.9
_GROUND = 1.6
_MARGIN = 0.7
_BETWEEN = 0.25
_NUMBER = 0.75


def token_strip(tokens: Sequence[str], scores: Values, ax: Axes | None = None) -> Axes:
    """The tokens in lines, each on the colour of its score, which stands below it.

    Blue is positive and orange negative. The numbers are percents of the strongest
    score; below 10 there is none. Sentences of right-to-left scripts run from the
    right.

    Args:
        tokens (sequence of str): the tokens.
        scores (Tensor or sequence of float): (tokens), of any sign and size.
        ax (Axes, optional): where to draw; letters shrink to what fits there, down to 4
            points. Default: a new figure, as high as the sentence and a title need.

    Returns:
        *Axes*: with a rectangle per token. The figure is ``axes.figure``.

    Raises:
        InputError: scores that are not one finite number per token.

    Examples::

        >>> from captum_globenc.visualization import token_strip
        >>> axes = token_strip(["a", "lovely", "film"], [0.1, 2.0, -1.0])
        >>> [text.get_text() for text in axes.texts[:6]]
        ['a', 'lovely', 'film', '', '100', '-50']
        >>> axes.figure.savefig("strip.png")  # doctest: +SKIP
    """
    values = finite("scores", scores, tokens, "tokens")
    own = ax is None
    axes = pyplot.figure(figsize=(_WIDTH, 1)).add_axes(_WHOLE) if ax is None else ax
    figure = axes.get_figure(root=True)
    assert figure is not None
    width, height = size_in_points(axes)
    drawn, properties = drawable(tokens)
    words = [
        axes.text(0, 0, text, size=_SIZES[0], ha="center", va="center", **properties)
        for text in drawn
    ]
    pixels = figure.dpi / _POINTS * _SIZES[0]
    widths = [word.get_window_extent().width / pixels + _MARGIN for word in words]
    for size in _SIZES:
        places = _wrapped(widths, width / size)
        lines = places[-1][0] + 1
        needed = (lines * _LINE + 1.5) * size
        if own:
            above = mpl.rcParams["axes.titlepad"] + 1.5 * _points_of_title()
            figure.set_size_inches(_WIDTH, (needed + above) / _POINTS)
            axes.set_position((0, 0, 1, needed / (needed + above)))
            height = needed
        if needed <= height and max(widths) * size <= width:
            break
    from_right = runs_from_right(tokens)
    axes.set(xlim=(0, width / size), ylim=(height / size, 0))
    if from_right:
        axes.invert_xaxis()
    axes.set_axis_off()
    cmap, norm = scale(values)
    for word, wide, (line, start), value in zip(words, widths, places, values.tolist()):
        top = line * _LINE + _BETWEEN
        ground = cmap(norm(value))
        axes.add_patch(Rectangle((start, top), wide, _GROUND, color=ground, lw=0))
        word.set(
            position=(start + wide / 2, top + _GROUND / 2),
            size=size,
            color=letters_on(ground),
        )
    for word, strength in zip(words, strengths(values.tolist())):
        x, y = word.get_position()
        axes.text(
            x, y + 1.35, number(strength), size=_NUMBER * size, ha="center", va="center"
        )
    signs = "Blue: positive, orange: negative. " if (values < 0).any() else ""
    key = f"{signs}100: the strongest token; under {LEAST:.0%} no number."
    axes.text(
        _BETWEEN,
        lines * _LINE + 0.6,
        key if values.any() else "All scores are 0.",
        size=_NUMBER * size,
        color="0.35",
        ha="right" if from_right else "left",
        va="center",
    )
    return axes


def _points_of_title() -> float:
    size = FontProperties(size=mpl.rcParams["axes.titlesize"]).get_size_in_points()
    return float(size)


def _wrapped(widths: Sequence[float], most: float) -> list[tuple[int, float]]:
    """The line and the start of each token."""
    places = []
    line, start = 0, _BETWEEN
    for width in widths:
        if start > _BETWEEN and start + width > most:
            line, start = line + 1, _BETWEEN
        places.append((line, start))
        start += width + _BETWEEN
    return places
