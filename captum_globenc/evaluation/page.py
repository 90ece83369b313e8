"""The benchmark as a page that needs no other file, script or network."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.dom import minidom

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from captum_globenc.evaluation import figures

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_Values = Mapping[tuple[str, str], Mapping[str, float]]
_DASH = "\N{EN DASH}"
# A method that ranks the tokens exactly as the reference does, up to rounding.
_SAME_RANKING = 1 - 1e-9


@dataclass(frozen=True)
class _Measure:
    name: str
    title: str
    better: str
    digits: str = ".3f"

    def best(self, means: list[float]) -> float:
        """The best of the means that are defined; NaN where none is."""
        choose = {"higher": max, "lower": min}.get(self.better)
        return choose(means, default=math.nan) if choose else math.nan


_MEASURES = {
    measure.name: measure
    for measure in (
        _Measure("rank_correlation", "Rank correlation", "higher"),
        _Measure("aopc", "AOPC", "higher"),
        _Measure("comprehensiveness", "Comprehensiveness", "higher"),
        _Measure("sufficiency", "Sufficiency", "lower"),
        _Measure("log_odds", "Log-odds", "lower"),
        _Measure("leave_one_out_tau", "Leave-one-out τ", "higher"),
        _Measure("infidelity", "Infidelity", "lower", ".3g"),
        _Measure("sensitivity", "Sensitivity", "lower", ".3g"),
    )
}

_COSTS = {
    "seconds": "Seconds",
    "ratio": "Time in forward passes",
    "forwards": "Forward passes",
    "backwards": "Backward passes",
    "memory": "Memory (MB)",
}


@dataclass(frozen=True)
class _Cell:
    """A value as it is shown, and as the column is sorted by it."""

    text: str = _DASH
    value: float | None = None
    interval: str = ""
    examples: int | None = None
    best: bool = False
    reference: bool = False


def to_html(
    *,
    table: pd.DataFrame,
    curves: pd.DataFrame,
    layers: pd.DataFrame,
    cost: pd.DataFrame,
    methods: Mapping[str, str],
    settings: Mapping[str, Any],
    accuracy: float | None,
    examples: int,
) -> str:
    """The benchmark's results as a page.

    Args:
        table (DataFrame): index (method, measure), columns mean, std, low, high and n:
            the 95 % interval and the number of examples whose value is defined.
        curves (DataFrame): of ``figures.aopc_curves``; empty if not measured.
        layers (DataFrame): of ``figures.correlation_per_layer``; likewise.
        cost (DataFrame): index method, columns seconds, ratio, forwards, backwards and
            memory; likewise, and NaN where not measured.
        methods (mapping): how each method comes to one score per token, by its name.
        settings (mapping): all that the results depend on, as JSON values.
        accuracy (float or None): of the model on the examples, in [0, 1].
        examples (int): how many were explained.

    Returns:
        *str*: the HTML.
    """
    values: _Values = table.to_dict("index")
    names = list(dict.fromkeys(method for method, _ in values))
    measures = _measures({measure for _, measure in values})
    columns = [_column(measure, names, values, examples) for measure in measures]
    environment = Environment(
        loader=PackageLoader("captum_globenc"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("benchmark.html").render(
        names=names,
        measures=measures,
        rows=list(zip(names, zip(*columns))),
        has_reference=any(cell.reference for column in columns for cell in column),
        costs=_COSTS,
        cost_rows=_cost_rows(cost),
        figures=_figures(table, curves, layers, cost, names, measures),
        methods=methods,
        settings={name: _setting(value) for name, value in settings.items()},
        model=settings.get("model"),
        data=settings.get("data"),
        accuracy=accuracy,
        examples=examples,
    )


def _measures(found: set[str]) -> list[_Measure]:
    """The known ones in their order, then others, of which the name is all we know."""
    others = [_Measure(name, name, "", ".3g") for name in sorted(found - {*_MEASURES})]
    return [m for name, m in _MEASURES.items() if name in found] + others


def _column(
    measure: _Measure, names: list[str], values: _Values, examples: int
) -> list[_Cell]:
    rows = [values.get((name, measure.name), {"mean": math.nan}) for name in names]
    means = [row["mean"] for row in rows if math.isfinite(row["mean"])]
    digits = measure.digits
    best = measure.best([mean for mean in means if not _is_reference(measure, mean)])
    return [
        _Cell(
            text=_with_deviation(row["mean"], row["std"], digits),
            value=row["mean"],
            interval=_interval(row["low"], row["high"], digits),
            examples=int(row["n"]) if row["n"] < examples else None,
            best=row["mean"] == best,
            reference=_is_reference(measure, row["mean"]),
        )
        if math.isfinite(row["mean"])
        else _Cell()
        for row in rows
    ]


def _is_reference(measure: _Measure, mean: float) -> bool:
    return measure.name == "rank_correlation" and mean >= _SAME_RANKING


def _number(value: float, digits: str = ".3g") -> str:
    if not math.isfinite(value):
        return _DASH
    return format(value, digits).replace("-", "\N{MINUS SIGN}")


def _with_deviation(mean: float, std: float, digits: str) -> str:
    shown = _number(mean, digits)
    return f"{shown} ± {_number(std, digits)}" if math.isfinite(std) else shown


def _interval(low: float, high: float, digits: str) -> str:
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"[{_number(low, digits)}, {_number(high, digits)}]"


def _cost_rows(cost: pd.DataFrame) -> dict[str, list[_Cell]]:
    return {
        method: [
            _Cell(_number(row[column]), row[column])
            if math.isfinite(row[column])
            else _Cell()
            for column in _COSTS
        ]
        for method, row in cost.to_dict("index").items()
    }


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _figures(
    table: pd.DataFrame,
    curves: pd.DataFrame,
    layers: pd.DataFrame,
    cost: pd.DataFrame,
    names: list[str],
    measures: list[_Measure],
) -> dict[str, Markup]:
    """Those for which something was measured, with what they show in words."""
    drawn: dict[str, Figure] = {}
    if len(curves):
        drawn["curves"] = figures.aopc_curves(curves, names=names)
    if len(cost) and measures:
        # AOPC if it is there.
        shown = min(measures, key=lambda measure: measure.name != "aopc")
        better = f" ({shown.better} is better)" if shown.better else ""
        drawn["cost"] = figures.quality_against_cost(
            table, cost, shown.name, label=shown.title + better, names=names
        )
    if len(layers):
        drawn["layers"] = figures.correlation_per_layer(layers)
    return {
        name: _inline(figures.to_svg(figure), name) for name, figure in drawn.items()
    }


def _inline(svg: str, name: str) -> Markup:
    """An SVG document as an element of a page in which there are others.

    Its alternative text is the element of the page with the id ``<name>-caption``.
    """
    root = minidom.parseString(svg).documentElement
    assert root is not None
    # Its rules would hold for the whole page, which has those that matter.
    for tag in ("style", "metadata"):
        for element in root.getElementsByTagName(tag):
            assert element.parentNode is not None
            element.parentNode.removeChild(element)
    for element in root.getElementsByTagName("*"):
        for key, value in list(element.attributes.items()):
            if key == "id":
                element.setAttribute(key, f"{name}-{value}")
            elif key == "xlink:href" or value.startswith("url(#"):
                element.setAttribute(key, value.replace("#", f"#{name}-", 1))
    for key in ("width", "height"):
        root.removeAttribute(key)
    root.setAttribute("role", "img")
    root.setAttribute("aria-labelledby", f"{name}-caption")
    return Markup(root.toxml())  # escaped by minidom
