"""The colours of scores: blue is positive, orange negative, white is nothing.

The two hues are Okabe and Ito's, which people with colour-blindness tell apart; towards
the ends they darken, so that strength can be read in grey as well.
"""

from __future__ import annotations

from matplotlib.colors import (
    Colormap,
    LinearSegmentedColormap,
    Normalize,
    to_rgb,
)
from torch import Tensor

POSITIVE = "#0072B2"
_STRONGEST = "#00395A"

SEQUENTIAL = LinearSegmentedColormap.from_list(
    "globenc", ["#FFFFFF", "#9CCBE3", POSITIVE, _STRONGEST]
)
SIGNED = LinearSegmentedColormap.from_list(
    "globenc_signed",
    ["#7A3500", "#D55E00", "#F2BF99", "#FFFFFF", "#9CCBE3", POSITIVE, _STRONGEST],
)


def scale(values: Tensor) -> tuple[Colormap, Normalize]:
    """The map, and from where to where its colours go, for values of any size.

    Args:
        values (Tensor): (...).

    Returns:
        *tuple[Colormap, Normalize]*: from 0 to the largest, or, where a value is
        negative, as far below 0 as above.
    """
    most = float(values.abs().max()) or 1.0
    if (values < 0).any():
        return SIGNED, Normalize(-most, most)
    return SEQUENTIAL, Normalize(0, most)


def letters_on(ground: tuple[float, float, float, float]) -> str:
    """Black or white: which of them stands out from a colour."""
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in to_rgb(ground)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    # Where contrast with black and with white is the same (WCAG).
    return "black" if luminance > 0.179 else "white"
