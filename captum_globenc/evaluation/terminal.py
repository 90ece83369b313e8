"""The tables of a benchmark in a terminal."""

from __future__ import annotations

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from captum_globenc.evaluation.result import BenchmarkResult
from captum_globenc.visualization import visible


def to_terminal(result: BenchmarkResult) -> RenderableType:
    """The tables of a benchmark for a terminal, as something that ``rich`` prints.

    Args:
        result (BenchmarkResult): of ``captum_globenc.evaluation.benchmark``.

    Returns:
        *RenderableType*: mean ± standard deviation per method and measure, what each
        method costs, and per layer where that was measured.
    """
    accuracy = "" if result.accuracy is None else f", accuracy {result.accuracy:.3f}"
    table = Table(title=f"{len(result.records)} texts{accuracy}", title_justify="left")
    table.add_column("method", no_wrap=True)
    for measure in result.measures:
        table.add_column(measure.replace("_", " "), justify="right")
    for column in ("x forward", "MB") if len(result.costs) else ():
        table.add_column(column, justify="right")
    for method in result.methods:
        cells = [_mean(result.table.loc[(method, name)]) for name in result.measures]
        if len(result.costs):
            cost = result.costs.loc[method]
            cells += [f"{cost['ratio']:.1f}", f"{cost['memory']:.1f}"]
        table.add_row(Text(visible(method)), *cells)
    parts: list[RenderableType] = [table]
    if len(result.layers):
        parts.append(_layer_table(result.layers))
    return Group(*parts)


def _mean(row: pd.Series) -> str:
    return f"{row['mean']:.3f} ± {row['std']:.3f}" if row["n"] else "undefined"


def _layer_table(layers: pd.DataFrame) -> Table:
    table = Table(title="Rank correlation by layer: rollout", title_justify="left")
    table.add_column("local score", no_wrap=True)
    rollout = layers[layers["kind"] == "rollout"]
    means = rollout.pivot(index="local", columns="layer", values="mean")
    for layer in means.columns:
        table.add_column(str(layer), justify="right")
    for local in dict.fromkeys(rollout["local"]):
        table.add_row(local, *[f"{value:.2f}" for value in means.loc[local]])
    return table
