#!/usr/bin/env python3
"""Measure time and memory of GlobEnc against the number of tokens.

On a random model of the shape of ModernBERT-base, of whose 22 layers two of three see a
sliding window of 128 tokens. Every length runs in a process of its own, in which the
forward pass and the attribution take turns. The ratio is the median over rounds, and
memory is the largest resident set after the first of each.

    python benchmarks/long_inputs.py --figure docs/images/long-inputs.svg
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from matplotlib import style, ticker
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import ModernBertConfig, ModernBertForSequenceClassification

from captum_globenc import GlobEnc

LENGTHS = (512, 1_024, 2_048, 4_096, 8_192)
FORWARD, GLOBENC = "forward pass", "GlobEnc"
_LOOKS = {FORWARD: ("#000000", "s", "--"), GLOBENC: ("#0072B2", "o", "-")}


def peak() -> int:
    """The largest resident set of this process so far, in bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def measure(tokens: int, layers: int, rounds: int) -> dict[str, object]:
    """Times and peaks of one length, of a process that does nothing else."""
    torch.manual_seed(0)
    config = ModernBertConfig(num_labels=2, num_hidden_layers=layers)
    model = ModernBertForSequenceClassification(config).eval()
    globenc = GlobEnc(model)
    ids = torch.randint(10, 40_000, (1, tokens))

    def forward(ids: Tensor) -> None:
        with torch.no_grad():
            model(ids)

    def attribute(ids: Tensor) -> None:
        globenc.attribute(ids, target=0)

    tasks: dict[str, Callable[[Tensor], None]] = {FORWARD: forward, GLOBENC: attribute}
    peaks: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():  # What is prepared at first use is not the price.
        task(ids[:, :16])
    for _ in range(rounds):
        for name, task in tasks.items():
            start = time.perf_counter()
            task(ids)
            seconds[name].append(time.perf_counter() - start)
            peaks.setdefault(name, peak())
    return {
        "tokens": tokens,
        "rounds": rounds,
        "methods": {
            name: {
                "median_seconds": statistics.median(seconds[name]),
                "ratio_to_forward": statistics.median(
                    own / forward
                    for own, forward in zip(
                        seconds[name], seconds[FORWARD], strict=True
                    )
                ),
                "peak_bytes": peaks[name],
            }
            for name in tasks
        },
    }


def measured_alone(tokens: int, layers: int, rounds: int) -> dict[str, object]:
    """:func:`measure` in a process of its own."""
    given = ["--single", tokens, "--layers", layers, "--rounds", rounds]
    found = subprocess.run(
        [sys.executable, __file__, *map(str, given)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(found.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def drawn(results: Sequence[dict[str, object]]) -> Figure:
    """Time and memory against tokens, one above the other."""
    settings = {
        "axes.grid": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "grid.alpha": 0.3,
        "svg.fonttype": "none",
        "svg.hashsalt": "captum_globenc",
    }
    tokens = [result["tokens"] for result in results]
    with style.context(["default", settings]):
        figure = Figure(figsize=(4.6, 5.6), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        for name, (color, marker, line) in _LOOKS.items():
            own = [result["methods"][name] for result in results]  # type: ignore[index]
            look = {"color": color, "marker": marker, "linestyle": line, "label": name}
            above.plot(tokens, [figures["median_seconds"] for figures in own], **look)
            below.plot(tokens, [figures["peak_bytes"] / 1e9 for figures in own], **look)
        for result, count in zip(results, tokens):
            figures = result["methods"][GLOBENC]  # type: ignore[index]
            above.annotate(
                f"{figures['ratio_to_forward']:.2f} x",
                (count, figures["median_seconds"]),
                textcoords="offset points",
                xytext=(0, 7),
                ha="right",
                color=_LOOKS[GLOBENC][0],
            )
        above.set(xscale="log", yscale="log", ylabel="Seconds")
        below.set(
            xlabel="Tokens", ylabel="Peak memory of the process, GB", ylim=(0, None)
        )
        below.set_xticks(tokens, [f"{count:,}" for count in tokens])
        below.xaxis.set_minor_locator(ticker.NullLocator())
        above.legend(frameon=False, loc="upper left")
    return figure


def main() -> None:
    """Measure all lengths, print a table, write the JSON and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument(
        "--rounds", type=int, help="default: 1 to 7, more where texts are short"
    )
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    parser.add_argument("--figure", type=Path, help="an SVG or PNG file to draw")
    parser.add_argument("--single", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.single:
        found = measure(options.single, options.layers, options.rounds)
        print(json.dumps(found))
        return
    results = []
    table = Table("tokens", "", "seconds", "ratio to forward", "peak memory, GB")
    for tokens in options.tokens:
        rounds = options.rounds or max(1, min(7, 4_096 // tokens))
        results.append(measured_alone(tokens, options.layers, rounds))
        for name, figures in results[-1]["methods"].items():  # type: ignore[attr-defined]
            table.add_row(
                f"{tokens:,}",
                name,
                f"{figures['median_seconds']:.2f}",
                f"{figures['ratio_to_forward']:.2f}",
                f"{figures['peak_bytes'] / 1e9:.2f}",
            )
    Console().print(table)
    report = {
        "model": f"ModernBERT-base shape, {options.layers} layers, random weights, "
        "float32",
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "results": results,
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    if options.figure:
        drawn(results).savefig(options.figure, metadata={"Date": None}, dpi=150)


if __name__ == "__main__":
    main()
