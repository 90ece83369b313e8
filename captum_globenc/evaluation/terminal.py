"""The tables of a benchmark in a terminal of 80 columns."""

from __future__ import annotations

import pandas as pd
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from captum_globenc.evaluation.result import BenchmarkResult
from captum_globenc.visualization import visible

_HEADS = {
    "rank_correlation": "rank corr",
    "comprehensiveness": "compreh.",
    "sufficiency": "suffic.",
    "log_odds": "log odds",
    "leave_one_out_tau": "LOO tau",
    "infidelity": "infid.",
    "sensitivity": "sensit.",
}


def to_terminal(result: BenchmarkResult) -> RenderableType:
    """The tables of a benchmark, as something that ``rich`` prints.

    Args:
        result (BenchmarkResult): of ``captum_globenc.evaluation.benchmark``.

    Returns:
        *RenderableType*: mean ± standard deviation per method and measure; where they
        were measured, what each method costs and the rank correlation by layer.
    """
    accuracy = "" if result.accuracy is None else f", accuracy {result.accuracy:.3f}"
    quality = _table(f"{len(result.records)} texts{accuracy}; mean ± std", "method")
    for measure in result.measures:
        quality.add_column(_HEADS.get(measure, measure), justify="right")
    for method in result.methods:
        cells = [_mean(result.table.loc[(method, name)]) for name in result.measures]
        quality.add_row(_name(method), *cells)
    parts: list[RenderableType] = [quality]
    if len(result.costs):
        parts += ["", _costs(result.costs)]
    if len(result.layers):
        parts += ["", _layers(result.layers)]
    return Group(*parts)


def _table(title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column(first, no_wrap=True)
    return table


def _name(method: str) -> Text:
    return Text(visible(method), overflow="ellipsis")


def _mean(row: pd.Series) -> str:
    if not row["n"]:
        return "undefined"
    return f"{row['mean']:.2f}" + (f"±{row['std']:.2f}" if row["n"] > 1 else "")


def _costs(costs: pd.DataFrame) -> Table:
    table = _table("Cost of one text, and of the bare forward pass", "method")
    for head in ("seconds", "x forward", "forwards", "backwards", "MB"):
        table.add_column(f"  {head}", justify="right")
    for method, row in costs.iterrows():
        table.add_row(
            _name(str(method)),
            f"{row['seconds']:.3f}",
            *[f"{row[c]:.1f}" for c in ("ratio", "forwards", "backwards", "memory")],
        )
    return table


def _layers(layers: pd.DataFrame) -> Table:
    table = _table("Rank correlation by layer, of the rollout up to it", "local score")
    rollout = layers[layers["kind"] == "rollout"]
    means = rollout.pivot(index="local", columns="layer", values="mean")
    for layer in means.columns:
        table.add_column(f"  {layer}", justify="right")
    for local in dict.fromkeys(rollout["local"]):
        table.add_row(local, *[f"{value:.2f}" for value in means.loc[local]])
    return table
