#!/usr/bin/env python3
"""What AttnLRP and DecompX cost, as a ratio to one forward and one backward pass.

In one process, on a random model of the size of BERT-base, one after the other in each
round: the forward pass, a forward and a backward pass to the word embeddings (what a
saliency map takes), and the methods. Each ratio is the median over rounds of two times
from the same round.

    python benchmarks/relevance_cost.py --output relevance-cost.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from captum_globenc import AttnLRP, DecompX

SHAPES = {"1x128": (1, 128), "8x128": (8, 128), "1x512": (1, 512), "1x25": (1, 25)}


def contestants(
    model: BertForSequenceClassification, ids: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """What is timed, each a function without arguments."""
    attnlrp, decompx, pads = AttnLRP(model), DecompX(model), torch.zeros_like(ids)

    def forward() -> Tensor:
        with torch.no_grad():
            return model(ids).logits

    def backward() -> Tensor:
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings).logits
        return torch.autograd.grad(logits[:, 1].sum(), embeddings)[0]

    return {
        "forward": forward,
        "forward and backward": backward,
        "AttnLRP": lambda: attnlrp.attribute(ids, target=1),
        "DecompX": lambda: decompx.attribute(ids, target=1),
        "DecompX, 3 points": lambda: decompx.attribute(
            ids, target=1, baselines=pads, n_steps=3
        ),
    }


def seconds(function: Callable[[], Tensor]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    """Time all of them and print one table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    arguments.add_argument("--output", type=Path)
    options = arguments.parse_args()
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig()).eval()
    table = Table("batch x tokens", "", "forward passes", "forward and backward passes")
    results: dict[str, object] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
    }
    for shape in options.shapes:
        functions = contestants(model, torch.randint(1_000, 20_000, SHAPES[shape]))
        rounds = [
            {name: seconds(function) for name, function in functions.items()}
            for _ in range(options.rounds + 1)
        ][1:]
        ratios = {
            name: [
                statistics.median(times[name] / times[base] for times in rounds)
                for base in ("forward", "forward and backward")
            ]
            for name in functions
        }
        results[shape] = ratios
        for name, (forward, both) in ratios.items():
            table.add_row(shape, name, f"{forward:.2f}", f"{both:.2f}")
    Console().print(table)
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
