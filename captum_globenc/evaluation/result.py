"""What a benchmark found: tables with intervals, files, figures, a page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from captum_globenc.errors import InputError, named
from captum_globenc.evaluation.perturbation import MASKED_FRACTIONS
from captum_globenc.evaluation.scoring import Record

_RESAMPLES = 2000


@dataclass
class BenchmarkResult:
    """Methods side by side.

    Args:
        records (list[dict]): what was measured on each text, in order.
        cost (dict): method → what it costs; see
            :class:`captum_globenc.evaluation.cost.Cost`.
        methods (dict[str, str]): method → how it becomes one score per token.
        measures (tuple[str, ...]): what was measured.
        settings (dict): model, data, versions and what else the run depends on.
    """

    records: list[Record]
    cost: dict[str, dict[str, float]]
    methods: dict[str, str]
    measures: tuple[str, ...]
    settings: dict[str, Any]

    @cached_property
    def table(self) -> pd.DataFrame:
        """Mean, standard deviation, 95 % interval and count, by method and measure.

        Returns:
            *DataFrame* with the index (method, measure) and the columns mean, std, low,
            high and n. A number that is not defined for a text (a rank correlation of
            constant scores) does not count; n says how many did. The interval is a
            percentile bootstrap of the mean over texts.
        """
        rows = {
            (method, measure): _summary(
                [record["methods"][method][measure] for record in self.records]
            )
            for method in self.methods
            for measure in self.measures
        }
        return _frame(rows, ["method", "measure"])

    def differences(self, reference: str) -> pd.DataFrame:
        """How much every other method is above or below one, on the same texts.

        Args:
            reference (str): one of the methods.

        Returns:
            *DataFrame* like :attr:`table`, of the paired differences, method minus
            reference. A text for which one of the two is not defined does not count.

        Raises:
            InputError: the reference was not measured.
        """
        named(self.methods, reference, "method")
        rows = {
            (method, measure): _summary(
                [
                    record["methods"][method][measure]
                    - record["methods"][reference][measure]
                    for record in self.records
                ]
            )
            for method in self.methods
            if method != reference
            for measure in self.measures
        }
        return _frame(rows, ["method", "measure"])

    @cached_property
    def curves(self) -> pd.DataFrame:
        """The AOPC curve: mean drop of the probability by fraction masked.

        Returns:
            *DataFrame* with the columns method, fraction and those of :attr:`table`;
            empty where AOPC was not measured.
        """
        if "aopc" not in self.measures:
            return pd.DataFrame(columns=["method", "fraction", *_COLUMNS])
        rows = {
            (method, fraction): _summary(
                [record["methods"][method]["curve"][at] for record in self.records]
            )
            for method in self.methods
            for at, fraction in enumerate(MASKED_FRACTIONS)
        }
        return _frame(rows, ["method", "fraction"]).reset_index()

    @cached_property
    def layers(self) -> pd.DataFrame:
        """Rank correlation of each local score in each layer.

        Returns:
            *DataFrame* with the columns local, kind ("rollout" or "single"), layer
            (from 1) and those of :attr:`table`; empty where it was not asked for.
        """
        if not self.records or "layers" not in self.records[0]:
            return pd.DataFrame(columns=["local", "kind", "layer", *_COLUMNS])
        rows = {
            (local, kind, layer + 1): _summary(
                [record["layers"][local][kind][layer] for record in self.records]
            )
            for local, kinds in self.records[0]["layers"].items()
            for kind, values in kinds.items()
            for layer in range(len(values))
        }
        return _frame(rows, ["local", "kind", "layer"]).reset_index()

    @cached_property
    def costs(self) -> pd.DataFrame:
        """What each method costs.

        Returns:
            *DataFrame* with a row per method, the bare forward pass first, and the
            fields of :class:`captum_globenc.evaluation.cost.Cost` as columns; empty
            where the cost was not measured.
        """
        frame = pd.DataFrame.from_dict(self.cost, orient="index")
        frame.index.name = "method"
        return frame

    @property
    def accuracy(self) -> float | None:
        """The share of texts predicted as they are labelled.

        Returns:
            *float* from 0 to 1, or *None* without labels.
        """
        known = [r for r in self.records if r["label"] is not None]
        if not known:
            return None
        return float(np.mean([r["label"] == r["predicted"] for r in known]))

    def to_html(self) -> str:
        """The whole result as a page that needs no other file and no network.

        Returns:
            *str*: the HTML.
        """
        from captum_globenc.evaluation.page import to_html

        return to_html(
            table=self.table,
            curves=self.curves,
            layers=self.layers,
            cost=self.costs,
            methods=self.methods,
            settings=self.settings,
            accuracy=self.accuracy,
            examples=len(self.records),
        )

    def save(self, folder: str | Path) -> None:
        """Write tables (CSV), figures (SVG), ``result.json`` and ``index.html``.

        Tables and figures of what was not measured are left out.

        Args:
            folder (str or Path): made where it does not exist.

        Raises:
            InputError: it cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._save(folder)
        except OSError as error:
            raise InputError(
                f"cannot write {str(folder)!r}: {error.strerror}."
            ) from error

    def _save(self, folder: Path) -> None:
        from captum_globenc.evaluation import figures

        self.table.to_csv(folder / "table.csv")
        for name, frame in [("curves", self.curves), ("layers", self.layers)]:
            if len(frame):
                frame.to_csv(folder / f"{name}.csv", index=False)
        if len(self.costs):
            self.costs.to_csv(folder / "cost.csv")
        drawn = {}
        if len(self.curves):
            drawn["aopc"] = figures.aopc_curves(self.curves)
        if len(self.layers):
            drawn["layers"] = figures.correlation_per_layer(self.layers)
        if len(self.costs) and len(self.measures):
            measure = "aopc" if "aopc" in self.measures else self.measures[0]
            drawn["quality_against_cost"] = figures.quality_against_cost(
                self.table, self.costs, measure
            )
        for name, figure in drawn.items():
            (folder / f"{name}.svg").write_text(
                figures.to_svg(figure), encoding="utf-8"
            )
        summary = {
            "settings": self.settings,
            "examples": len(self.records),
            "accuracy": self.accuracy,
            "methods": self.methods,
            "table": [
                {"method": method, "measure": measure, **row}
                for (method, measure), row in self.table.to_dict("index").items()
            ],
            "layers": self.layers.to_dict("records"),
            "cost": self.cost,
        }
        text = json.dumps(_without_nan(summary), indent=2, allow_nan=False)
        (folder / "result.json").write_text(text + "\n", encoding="utf-8")
        (folder / "index.html").write_text(self.to_html(), encoding="utf-8")


_COLUMNS = ["mean", "std", "low", "high", "n"]


def _summary(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation, bootstrap interval and count of defined values."""
    defined = np.array([value for value in values if not math.isnan(value)])
    nothing = dict.fromkeys(_COLUMNS, math.nan)
    if len(defined) == 0:
        return {**nothing, "n": 0}
    mean = float(defined.mean())
    if len(defined) == 1:
        return {**nothing, "mean": mean, "n": 1}
    interval = stats.bootstrap(
        (defined,),
        np.mean,
        n_resamples=_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return {
        "mean": mean,
        "std": float(defined.std(ddof=1)),
        "low": float(interval.low),
        "high": float(interval.high),
        "n": len(defined),
    }


def _frame(rows: dict[Any, dict[str, float]], names: list[str]) -> pd.DataFrame:
    index = pd.MultiIndex.from_tuples(rows, names=names)
    frame = pd.DataFrame(list(rows.values()), index=index, columns=_COLUMNS)
    return frame.astype({"n": int})


def _without_nan(value: Any) -> Any:
    """NaN as null: JSON has none."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
