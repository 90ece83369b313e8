"""The benchmark's figures: curves of AOPC, correlation per layer, quality and cost.

Made for a column as narrow as a phone: the axes are stacked, and the names stand beside
the ends of the lines instead of in a legend. Every method keeps one combination of
colour, marker and line style, so nothing rests on colour alone.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib import style, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from captum_globenc.visualization.text import shortened, visible

if TYPE_CHECKING:
    import pandas as pd

# Okabe and Ito's colours without yellow, which is too faint on white. The counts of
# colours and markers share no factor, so 77 methods differ in at least one of the two.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
_LINES = ("-", "--", "-.", ":")

# Whatever the user's matplotlibrc says, e.g. LaTeX for all text.
_STYLE: list[str | Path | dict[str, Any]] = [
    "default",
    {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": "medium",
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "grid.alpha": 0.3,
        "lines.linewidth": 1.3,
        "lines.markersize": 4.5,
        "svg.fonttype": "none",
        "svg.hashsalt": "captum_globenc",
        # A name such as "$x" is no formula.
        "text.parse_math": False,
    },
]
_WIDTH = 4.3
_LEAST_HEIGHT = 2.9
_LABEL_HEIGHT = 0.17
_LABELS_PER_PANEL = 13  # in the least height
_LONGEST_LABEL = 24
# Where a name's marker and the name itself begin, in widths of the axes.
_KEY_AND_TEXT = (1.06, 1.1)
_LEADER = {"arrowstyle": "-", "lw": 0.6, "alpha": 0.6, "shrinkA": 0, "shrinkB": 0}


class _Look(NamedTuple):
    color: str
    marker: str
    linestyle: str


class _End(NamedTuple):
    """Where a name belongs: the end of a line, or a point."""

    name: str
    x: float
    y: float


@style.context(_STYLE)
def aopc_curves(curves: pd.DataFrame, *, names: Sequence[str] | None = None) -> Figure:
    """The drop of the predicted class's probability as tokens are masked.

    Args:
        curves (DataFrame): columns method, fraction, mean, low and high.
        names (sequence of str, optional): all methods, so that each looks the same in
            every figure. Default: those drawn.

    Returns:
        *Figure*: one line with its 95 % interval per method.
    """
    frames = _defined(curves, "method")
    figure, (axes,) = _figure(1, len(frames))
    looks = _looks([*(names or ()), *frames])
    _lines(axes, frames, "fraction", looks)
    axes.set_xlabel("Highest-scored tokens masked")
    axes.set_ylabel("Drop of the class's probability")
    axes.xaxis.set_major_formatter(ticker.PercentFormatter(xmax=1, decimals=0))
    return figure


@style.context(_STYLE)
def correlation_per_layer(layers: pd.DataFrame) -> Figure:
    """Spearman's correlation with gradient x input, layer by layer.

    Args:
        layers (DataFrame): columns local, kind ("rollout" or "single"), layer, mean,
            low and high.

    Returns:
        *Figure*: a panel for the rollout up to each layer and one for the single
        layers, each with one line and its 95 % interval per local score.
    """
    panels = {
        "Rollout up to the layer": _defined(layers, "local", kind="rollout"),
        "Single layer": _defined(layers, "local", kind="single"),
    }
    figure, all_axes = _figure(2, max(map(len, panels.values())))
    looks = _looks(name for frames in panels.values() for name in frames)
    for axes, (title, frames) in zip(all_axes, panels.items()):
        axes.set(title=title, xlabel="Layer", ylabel="Spearman correlation")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
        _lines(axes, frames, "layer", looks)
    return figure


@style.context(_STYLE)
def quality_against_cost(
    table: pd.DataFrame,
    cost: pd.DataFrame,
    measure: str = "aopc",
    *,
    label: str | None = None,
    names: Sequence[str] | None = None,
) -> Figure:
    """A measure against the time that a method takes.

    Args:
        table (DataFrame): index (method, measure), columns mean, low and high.
        cost (DataFrame): index method, column ratio: the time relative to one forward
            pass.
        measure (str, optional): one of the table. Default: ``"aopc"``.
        label (str, optional): of the axis. Default: the measure's name.
        names (sequence of str, optional): as in ``aopc_curves``.

    Returns:
        *Figure*: per method a point with the measure's 95 % interval.
    """
    ratios = cost["ratio"].to_dict() if len(cost) else {}
    rows = {
        method: row
        for (method, of), row in table.to_dict("index").items()
        if of == measure
        and np.isfinite(row["mean"])
        and 0 < ratios.get(method, 0) < np.inf
    }
    figure, (axes,) = _figure(1, len(rows))
    looks = _looks([*(names or ()), *rows])
    axes.set_xlabel("Time, in forward passes (log scale)")
    axes.set_ylabel(label or measure.replace("_", " "))
    _log_axis(axes, [ratios[method] for method in rows])
    for method, row in rows.items():
        look = {**looks[method]._asdict(), "linestyle": "none", "label": method}
        axes.errorbar(ratios[method], row["mean"], _below_and_above(row), **look)
    ends = [_End(name, ratios[name], row["mean"]) for name, row in rows.items()]
    _finish(axes, ends, looks)
    return figure


def to_svg(figure: Figure) -> str:
    """The figure as SVG: the same text for the same figure, its letters kept as text.

    Args:
        figure (Figure): of this module.
    """
    file = io.StringIO()
    with style.context(_STYLE), warnings.catch_warnings():
        # The reader's fonts count, not those that measure the text here.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _figure(panels: int, labels: int) -> tuple[Figure, list[Axes]]:
    # Room for what is below and above the axes, too.
    height = max(_LEAST_HEIGHT, _LABEL_HEIGHT * (labels + 5))
    figure = Figure(figsize=(_WIDTH, height * panels))
    return figure, list(figure.subplots(panels, squeeze=False)[:, 0])


def _defined(frame: pd.DataFrame, by: str, **where: str) -> dict[str, pd.DataFrame]:
    """The rows with a mean per value of a column, in the order of appearance."""
    if frame.empty:
        return {}
    for column, value in where.items():
        frame = frame[frame[column] == value]
    frame = frame[np.isfinite(frame["mean"].astype(float))]
    return dict(iter(frame.groupby(by, sort=False)))


def _looks(names: Iterable[str]) -> dict[str, _Look]:
    return {
        name: _Look(
            _COLOURS[index % len(_COLOURS)],
            _MARKERS[index % len(_MARKERS)],
            _LINES[index // len(_COLOURS) % len(_LINES)],
        )
        for index, name in enumerate(dict.fromkeys(names))
    }


def _lines(
    axes: Axes, frames: dict[str, pd.DataFrame], x: str, looks: dict[str, _Look]
) -> None:
    ends = []
    for name, frame in frames.items():
        columns = frame.sort_values(x)[[x, "mean", "low", "high"]]
        xs, means, lows, highs = columns.to_numpy(float).T
        look = looks[name]
        axes.plot(xs, means, label=name, **look._asdict())
        axes.fill_between(xs, lows, highs, color=look.color, alpha=0.1, lw=0)
        ends.append(_End(name, xs[-1], means[-1]))
    _finish(axes, ends, looks)


def _log_axis(axes: Axes, values: list[float]) -> None:
    """Whole powers of ten, named without formulas."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(numticks=5))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    if values:  # A little room, so that no point lies on the border.
        low, high = np.log10(min(values) / 1.05), np.log10(max(values) * 1.05)
        axes.set_xlim(10 ** np.floor(low), 10 ** np.ceil(high))


def _below_and_above(row: dict[str, float]) -> list[list[float]]:
    """The interval as lengths; none where it is undefined, and never negative ones."""
    lengths = (row["mean"] - row["low"], row["high"] - row["mean"])
    return [[max(length, 0.0) if np.isfinite(length) else 0.0] for length in lengths]


def _finish(axes: Axes, ends: list[_End], looks: dict[str, _Look]) -> None:
    """The zero line, and the names; or the note that there is nothing to name."""
    if not ends:
        axes.text(0.5, 0.5, "Not measured", transform=axes.transAxes, ha="center")
        axes.set(xscale="linear", xticks=[], yticks=[])
        return
    low, high = axes.get_ylim()
    if low <= 0 <= high:
        axes.axhline(0, color="0.4", linewidth=0.8, zorder=1, label="zero")
    axes.set_ylim(low, high)
    ends = sorted(ends, key=lambda end: end.y)
    heights = [(end.y - low) / (high - low) for end in ends]
    for end, height in zip(ends, _spread(heights)):
        _name(axes, end, height, looks[end.name])


def _spread(heights: list[float]) -> list[float]:
    """Ascending places in [0, 1], moved apart as little as keeps labels readable.

    Labels that would overlap become a block around their mean height, and so do blocks.
    """
    gap = 1 / max(len(heights) - 1, _LABELS_PER_PANEL)
    blocks: list[list[float]] = []
    # Less what the labels below take, places need only ascend.
    for index, height in enumerate(heights):
        blocks.append([height - index * gap])
        while len(blocks) > 1 and fmean(blocks[-2]) > fmean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    lowest = [fmean(block) for block in blocks for _ in block]
    most = 1 - (len(heights) - 1) * gap
    return [min(max(low, 0), most) + index * gap for index, low in enumerate(lowest)]


def _name(axes: Axes, end: _End, height: float, look: _Look) -> None:
    """The name right of the axes, after the marker and a line to what it names."""
    key, text = _KEY_AND_TEXT
    axes.annotate(
        "",
        (end.x, end.y),
        (key, height),
        textcoords="axes fraction",
        annotation_clip=False,
        arrowprops={"color": look.color, **_LEADER},
    )
    place: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
    axes.plot(key, height, label="_key", **look._asdict(), **place)
    axes.text(
        text,
        height,
        shortened(visible(end.name), _LONGEST_LABEL),
        va="center",
        size=9,
        **place,
    )
