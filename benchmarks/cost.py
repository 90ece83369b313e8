#!/usr/bin/env python3
"""What GlobEnc costs, as a ratio to the bare forward pass of the same model.

In one process, on a random model of the size of BERT-base, one after the other in each
round: the forward pass (sdpa), GlobEnc, the literal textbook form of GlobEnc, and
Captum's IntegratedGradients with 50 steps. The last two take long and join fewer
rounds. Each ratio is the median over rounds of two times from the same round, so that a
machine whose speed drifts gives the same answer.

    python benchmarks/cost.py --output cost.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import captum
import torch
import transformers
from captum.attr import IntegratedGradients
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

from captum_globenc import GlobEnc, record
from captum_globenc.encoders.weights import through_norms
from captum_globenc.recording.records import LayerRecord

STEPS = 50


def textbook_layer(layer: LayerRecord) -> Tensor:
    """n_ij of one example from (heads, T, T, hidden) numbers, as the formulas say."""
    tokens, heads = layer.hidden.shape[1], layer.heads
    weights = layer.weights
    per_head = weights.output.view(weights.output.shape[0], heads, -1)
    transformed = torch.einsum("dhe,hje->hjd", per_head, layer.call.value[0])
    alpha = layer.attention(slice(0, tokens))[0]
    vectors = (alpha[..., None] * transformed[:, None]).sum(0)
    vectors[torch.arange(tokens), torch.arange(tokens)] += layer.hidden[0]
    deviation = torch.stack(list(layer.deviations.values())).prod(0)
    deviation = deviation[0, :, None, None]
    return (through_norms(vectors, weights.norms.values()) / deviation).norm(dim=-1)


@torch.no_grad()
def textbook(model: BertForSequenceClassification, ids: Tensor) -> Tensor:
    """GlobEnc as the formulas stand, one example at a time, (batch, tokens)."""
    rows = []
    for example in ids:
        run = record(model, example[None])
        rollout = textbook_layer(run.layers[0])
        for layer in run.layers[1:]:
            rollout = textbook_layer(layer) @ rollout
        rows.append(rollout[0])
    return torch.stack(rows)


def contestants(
    model: BertForSequenceClassification, ids: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """What is timed, each a function without arguments."""
    globenc = GlobEnc(model)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    gradients = IntegratedGradients(lambda e: model(inputs_embeds=e).logits)

    def forward() -> Tensor:
        with torch.no_grad():
            return model(ids).logits

    return {
        "forward pass": forward,
        "GlobEnc": lambda: globenc.attribute(ids, target=0),
        "GlobEnc, textbook form": lambda: textbook(model, ids),
        f"IntegratedGradients, {STEPS} steps": lambda: gradients.attribute(
            embeddings, target=0, n_steps=STEPS, internal_batch_size=10
        ),
    }


def measure(
    model: BertForSequenceClassification,
    batch: int,
    tokens: int,
    rounds: int,
    slow_rounds: int,
) -> dict[str, object]:
    """Times and ratios of one shape of input."""
    ids = torch.randint(1_000, 30_000, (batch, tokens))
    tasks = contestants(model, ids)
    fast, slow = list(tasks)[:2], list(tasks)[2:]
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for name in fast:  # Warm up: first-use preparation is not the price of a call.
        tasks[name]()
    difference = None
    if slow_rounds:
        found, expected = tasks["GlobEnc"](), tasks["GlobEnc, textbook form"]()
        difference = float(((found - expected) / expected).abs().max())
    ratios: dict[str, list[float]] = {name: [] for name in tasks}
    for index in tqdm(range(rounds), desc=f"batch {batch}, {tokens} tokens"):
        for name in fast + (slow if index < slow_rounds else []):
            start = time.perf_counter()
            tasks[name]()
            seconds[name].append(time.perf_counter() - start)
            ratios[name].append(seconds[name][-1] / seconds["forward pass"][-1])
    return {
        "batch": batch,
        "tokens": tokens,
        "largest_relative_difference_to_textbook": difference,
        "methods": {
            name: {
                "median_seconds": statistics.median(seconds[name]),
                "median_ratio_to_forward": statistics.median(ratios[name]),
                "smallest_ratio": min(ratios[name]),
                "largest_ratio": max(ratios[name]),
                "rounds": len(seconds[name]),
            }
            for name in fast + (slow if slow_rounds else [])
        },
    }


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[128])
    parser.add_argument(
        "--single-tokens",
        type=int,
        nargs="*",
        default=[32, 512],
        help="lengths of single texts, without the slow methods",
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--slow-rounds", type=int, default=3, help="0 leaves the slow methods out"
    )
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig()).eval()
    shapes = [
        (batch, tokens, options.slow_rounds)
        for tokens in options.tokens
        for batch in options.batch
    ] + [(1, tokens, 0) for tokens in options.single_tokens]
    results = [
        measure(model, batch, tokens, options.rounds, slow_rounds)
        for batch, tokens, slow_rounds in shapes
    ]
    report = {
        "model": "BERT-base size, random weights, float32",
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "captum": captum.__version__,
        },
        "results": results,
    }
    table = Table("batch", "tokens", "method", "seconds", "ratio to forward")
    for result in results:
        for name, figures in result["methods"].items():
            table.add_row(
                str(result["batch"]),
                str(result["tokens"]),
                name,
                f"{figures['median_seconds']:.3f}",
                f"{figures['median_ratio_to_forward']:.2f}",
            )
    Console().print(table)
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
