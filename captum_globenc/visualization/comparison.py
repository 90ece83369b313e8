"""Several methods' scores of one sentence, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.axes import Axes

from captum_globenc.attribution.adapters import unit_range
from captum_globenc.errors import InputError
from captum_globenc.visualization.canvas import (
    Values,
    along,
    beside,
    finite,
    name_tokens,
    new_axes,
    size_in_points,
)
from captum_globenc.visualization.colours import letters_on, scale
from captum_globenc.visualization.fonts import drawable
from captum_globenc.visualization.text import number


def method_comparison(
    tokens: Sequence[str], scores: Mapping[str, Values], ax: Axes | None = None
) -> Axes:
    """A row per token and a column per method, in colours and numbers.

    Each method's scores are relative to its strongest, so that methods of any unit can
    be compared; the numbers are percents, and below 10 there is none.

    Args:
        tokens (sequence of str): the tokens.
        scores (mapping): by the name of the method, (tokens) each, of any sign.
        ax (Axes, optional): where to draw. Default: a new figure.

    Returns:
        *Axes*: with one image, whose array, (tokens, methods), are the relative scores.

    Raises:
        InputError: no method, or scores that are not one finite number per token.

    Examples::

        >>> from captum_globenc.visualization import method_comparison
        >>> scores = {"globenc": [1.0, 4.0], "saliency": [0.2, 0.1]}
        >>> method_comparison(["a", "film"], scores).images[0].get_array().tolist()
        [[0.25, 1.0], [1.0, 0.5]]
    """
    if not scores:
        raise InputError("there is no method to compare: pass {name: scores}.")
    relative = torch.stack(
        [
            unit_range(finite(f"scores[{name!r}]", values, tokens, "tokens"))
            for name, values in scores.items()
        ],
        1,
    )
    count, methods = relative.shape
    if ax is None:
        ax = new_axes(beside(tokens) + 0.6 + methods, 1.1 + along(count, 0.3))
    cmap, norm = scale(relative)
    ax.imshow(
        relative.numpy(), cmap=cmap, norm=norm, aspect="auto", interpolation="nearest"
    )
    ax.grid(visible=False)
    name_tokens(ax.yaxis, tokens)
    names, properties = drawable(list(scores))
    ax.xaxis.tick_top()
    ax.set_xticks(
        range(methods),
        names,
        rotation=25,
        ha="left",
        rotation_mode="anchor",
        **properties,
    )
    ax.tick_params(length=0)
    size = min(size_in_points(ax)[1] / count / 1.25, 9)
    for row, token in enumerate(relative.tolist()):
        for column, strength in enumerate(token):
            ax.text(
                column,
                row,
                number(strength),
                size=size,
                color=letters_on(cmap(norm(strength))),
                ha="center",
                va="center_baseline",
            )
    return ax
