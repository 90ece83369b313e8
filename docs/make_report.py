#!/usr/bin/env python3
"""Make the reports in docs/benchmark: methods compared on 500 held-out sentences.

Needs what tutorials/train_demo_classifier.py leaves in build/demo: the six-layer
classifier and the 1,000 sentences that neither it nor the embedded one has seen. An
interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from captum_globenc import demo
from captum_globenc.evaluation import PRESETS, BenchmarkResult, benchmark

SENTENCES = 500
MODELS = ("six-layer", "embedded")
PAPER = PRESETS["paper"]
# One of each kind; the preset "full" has all others, too.
COMPARED = (
    "globenc",
    "globenc_class_aware",
    "alti",
    "attnlrp",
    "decompx",
    "integrated_attnlrp",
    "integrated_decompx",
    "integrated_gradients",
    "kernel_shap",
    "saliency",
    "input_x_gradient",
    "random",
)
SIGNED = ("attnlrp", "decompx", "integrated_attnlrp", "integrated_decompx")
# What is held against what.
PAIRS = (
    *((method, "integrated_gradients") for method in SIGNED),
    *((method, "kernel_shap") for method in SIGNED),
    ("integrated_decompx", "decompx"),
    ("globenc_class_aware", "globenc"),
    ("alti", "globenc"),
)
SUMMARY = ("globenc", "integrated_gradients", "kernel_shap", *SIGNED, "random")
COMPARED_MEASURES = {
    "aopc": "AOPC",
    "comprehensiveness": "compr.",
    "sufficiency": "suff.",
    "leave_one_out_tau": "τ",
}
LOWER_IS_BETTER = ("sufficiency",)
# Modarressi et al. 2022 (arXiv:2205.03286), SST-2, BERT-base, layer 12.
PUBLISHED = {
    "W": -0.11,
    "W_FIXED_RES": -0.24,
    "W_RES": 0.19,
    "N": 0.44,
    "N_FIXED_RES": 0.48,
    "N_RES": 0.73,
    "N_RES_LN": -0.21,
    "N_ENC": 0.77,
}
PAGE = Path(__file__).parent / "benchmark-template.md"


def main() -> None:
    """Benchmark both classifiers and save what is shown in the documentation."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--work", type=Path, default=Path("build/demo"))
    arguments.add_argument("--runs", type=Path, default=Path("build/report"))
    arguments.add_argument("--output", type=Path, default=Path("docs/benchmark"))
    arguments.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    arguments.add_argument("--limit", type=int, default=SENTENCES)
    arguments.add_argument("--processes", type=int, default=1)
    options = arguments.parse_args()
    results, papers = {}, {}
    for name in options.models:
        model, tokenizer = load(name, options.work)
        texts = options.work / "held_out.jsonl"
        results[name] = benchmark(
            model,
            tokenizer,
            texts,
            COMPARED,
            label_column="label",
            limit=options.limit,
            processes=options.processes,
            output=options.runs / name,
        )
        results[name].save(options.output / name)
        papers[name] = benchmark(
            model,
            tokenizer,
            texts,
            PAPER.methods,
            measures=PAPER.measures,
            per_layer=PAPER.per_layer,
            label_column="label",
            limit=options.limit,
            output=options.runs / f"{name}-paper",
            cost_texts=0,
        )
        papers[name].save(options.output / f"{name}-paper")
    if len(results) < len(MODELS):
        return  # The page needs both.
    six, embedded = results["six-layer"], results["embedded"]
    page = PAGE.read_text(encoding="utf-8").format(
        sentences=len(six.records),
        accuracy=[six.accuracy, embedded.accuracy],
        summary=summary_table(six, embedded),
        paper=paper_table(papers["six-layer"], papers["embedded"]),
        six=method_table(six),
        embedded=method_table(embedded),
        differences_six=difference_table(six),
        differences_embedded=difference_table(embedded),
        cost=cost_table(six),
    )
    (options.output / "README.md").write_text(page, encoding="utf-8")


def load(name: str, work: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A classifier and its tokenizer."""
    if name == "embedded":
        return demo.load_classifier()
    folder = work / "six-layer-film-reviews"
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="float32")
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def summary_table(six: BenchmarkResult, embedded: BenchmarkResult) -> str:
    """The signed methods beside others, on both classifiers, and their passes."""
    rows = []
    for method in SUMMARY:
        cells = [f"`{method}`"]
        for result in (six, embedded):
            means = result.table["mean"][method]
            cells += [f"{means[measure]:.3f}" for measure in COMPARED_MEASURES]
        passes = six.costs.loc[method]
        cells.append(f"{passes['forwards']:.0f} + {passes['backwards']:.0f}")
        rows.append(cells)
    names = [
        f"{title}, {model}" for model in MODELS for title in COMPARED_MEASURES.values()
    ]
    return markdown(["", *names, "passes"], rows)


def paper_table(six: BenchmarkResult, embedded: BenchmarkResult) -> str:
    """The eight local scores beside the published figures."""
    rows = []
    for local, published in PUBLISHED.items():
        cells = [f"`{local}`", f"{published:.2f}"]
        for result in (six, embedded):
            row = result.table.loc[(local, "rank_correlation")]
            cells.append(f"{row['mean']:.2f} ± {row['std']:.2f}")
        rows.append(cells)
    return markdown(["", "paper", "six-layer", "embedded"], rows)


def method_table(result: BenchmarkResult) -> str:
    """The mean of every measure."""
    means = result.table["mean"].unstack()[list(result.measures)]
    rows = [
        [f"`{method}`", *[f"{value:.3f}" for value in means.loc[method]]]
        for method in result.methods
    ]
    return markdown(["", *[m.replace("_", " ") for m in result.measures]], rows)


def difference_table(result: BenchmarkResult) -> str:
    """One method minus another, on the same sentences, with intervals.

    Bold is where the interval has the first method ahead.
    """
    found = {reference: result.differences(reference) for _, reference in PAIRS}
    rows = []
    for method, reference in PAIRS:
        cells = [f"`{method}` - `{reference}`"]
        for measure in COMPARED_MEASURES:
            row = found[reference].loc[(method, measure)]
            text = f"{row['mean']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f})"
            is_lower = measure in LOWER_IS_BETTER
            is_ahead = row["high"] < 0 if is_lower else row["low"] > 0
            cells.append(f"**{text}**" if is_ahead else text)
        rows.append(cells)
    return markdown(["", *COMPARED_MEASURES.values()], rows)


def cost_table(result: BenchmarkResult) -> str:
    """Ratio, passes and memory of every method."""
    costs: pd.DataFrame = result.costs
    rows = [
        [f"`{method}`", *[f"{row[c]:.1f}" for c in costs.columns if c != "seconds"]]
        for method, row in costs.iterrows()
    ]
    return markdown(["", "time", "forwards", "backwards", "memory (MB)"], rows)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
