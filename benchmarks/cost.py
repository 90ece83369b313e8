#!/usr/bin/env python3
"""What an attribution costs, as a ratio to the forward pass of the same model.

In one process, on random models of the sizes below, float32, all methods take turns in
each round: the forward pass (sdpa), one forward and one backward pass to the word
embeddings, Captum's gradient methods, GlobEnc, AttnLRP and DecompX. The literal form of
GlobEnc and integrated gradients take long: they take turns with the forward pass in a
few rounds of their own. Each ratio is the median over rounds of two times from the same
round, so that a machine whose speed drifts gives the same answer.

    python benchmarks/cost.py --output benchmarks/cost.json

It prints the tables of the README.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import captum
import torch
import transformers
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from torch import Tensor
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

from captum_globenc import AttnLRP, DecompX, GlobEnc, record
from captum_globenc.encoders.weights import through_norms
from captum_globenc.recording.records import LayerRecord

STEPS = 50
POINTS = 3
FORWARD = "forward pass"
GRADIENT = "forward and backward pass"
TEXTBOOK = "GlobEnc, textbook form"
#: What is compared with a forward and a backward pass.
SIGNED = ("AttnLRP", "DecompX", f"DecompX, {POINTS} points from [PAD]")

#: The sizes of BERT-base and of six small layers, as in MiniLM-L6.
MODELS: dict[str, dict[str, int]] = {
    "BERT-base": {},
    "six-layer": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
}


class Shape(NamedTuple):
    """A model and a batch."""

    model: str
    batch: int
    tokens: int

    @classmethod
    def of(cls, text: str) -> Shape:
        """From MODEL:BATCHxTOKENS."""
        model, _, sizes = text.partition(":")
        batch, _, tokens = sizes.partition("x")
        if model not in MODELS:
            raise ValueError(f"unknown model {model!r}; known: {', '.join(MODELS)}")
        return cls(model, int(batch), int(tokens))


SHAPES = (
    "BERT-base:1x32",
    "BERT-base:1x128",
    "BERT-base:8x128",
    "BERT-base:1x512",
    "six-layer:1x25",
)
#: Those that the slow methods join.
SLOW_SHAPES = ("BERT-base:1x128", "BERT-base:8x128", "six-layer:1x25")

Task = Callable[[], Tensor]


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


def tasks(
    model: BertForSequenceClassification, ids: Tensor
) -> tuple[dict[str, Task], dict[str, Task]]:
    """What is timed, each a function without arguments: the fast ones and the slow."""
    table, pads = model.get_input_embeddings(), torch.zeros_like(ids)

    def embeddings() -> Tensor:
        return table(ids).detach().requires_grad_()

    def logits(inputs: Tensor) -> Tensor:
        return model(inputs_embeds=inputs).logits

    def forward() -> Tensor:
        with torch.no_grad():
            return model(ids).logits

    def gradient() -> Tensor:
        inputs = embeddings()
        return torch.autograd.grad(logits(inputs)[:, 1].sum(), inputs)[0]

    saliency, product = Saliency(logits), InputXGradient(logits)
    integrated = IntegratedGradients(logits)
    globenc, attnlrp, decompx = GlobEnc(model), AttnLRP(model), DecompX(model)
    fast: dict[str, Task] = {
        FORWARD: forward,
        GRADIENT: gradient,
        "Captum's Saliency": lambda: saliency.attribute(embeddings(), target=1),
        "Captum's InputXGradient": lambda: product.attribute(embeddings(), target=1),
        "GlobEnc": lambda: globenc.attribute(ids, target=1),
        SIGNED[0]: lambda: attnlrp.attribute(ids, target=1),
        SIGNED[1]: lambda: decompx.attribute(ids, target=1),
        SIGNED[2]: lambda: decompx.attribute(
            ids, target=1, baselines=pads, n_steps=POINTS
        ),
    }
    slow: dict[str, Task] = {
        TEXTBOOK: lambda: textbook(model, ids),
        f"Captum's IntegratedGradients, {STEPS} steps": lambda: integrated.attribute(
            embeddings(), target=1, n_steps=STEPS, internal_batch_size=10
        ),
    }
    return fast, slow


def timed(chosen: dict[str, Task], rounds: int, title: str) -> dict[str, list[float]]:
    """The seconds of each task, in rounds in which all take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in tqdm(range(rounds), desc=title):
        for name, task in chosen.items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: dict[str, list[float]], name: str) -> dict[str, float]:
    """The figures of one task."""
    figures: dict[str, float] = {"median_seconds": statistics.median(seconds[name])}
    for base, word in ((FORWARD, "forward"), (GRADIENT, "forward_and_backward")):
        if base in seconds:
            ratios = [own / other for own, other in zip(seconds[name], seconds[base])]
            figures[f"median_ratio_to_{word}"] = statistics.median(ratios)
            figures[f"smallest_ratio_to_{word}"] = min(ratios)
            figures[f"largest_ratio_to_{word}"] = max(ratios)
    return {**figures, "rounds": len(seconds[name])}


def measure(shape: Shape, rounds: int, slow_rounds: int) -> dict[str, Any]:
    """Times and ratios of one model and batch."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**MODELS[shape.model])).eval()
    ids = torch.randint(1_000, 30_000, (shape.batch, shape.tokens))
    fast, slow = tasks(model, ids)
    for task in fast.values():  # What is prepared at first use does not count.
        task()
    title = f"{shape.model}, {shape.batch} x {shape.tokens}"
    seconds = timed(fast, rounds, title)
    methods = {name: summary(seconds, name) for name in fast}
    difference = None
    if slow_rounds:
        scores, expected = fast["GlobEnc"](), slow[TEXTBOOK]()
        difference = float(((scores - expected) / expected).abs().max())
        seconds = timed({FORWARD: fast[FORWARD], **slow}, slow_rounds, f"{title}, slow")
        methods |= {name: summary(seconds, name) for name in slow}
    return {
        **shape._asdict(),
        "largest_relative_difference_to_textbook": difference,
        "methods": methods,
    }


def markdown(results: list[dict[str, Any]]) -> str:
    """The README's tables: ratios to a forward pass, and to a gradient.

    Args:
        results (list): of :func:`measure`.
    """
    heads = [
        f"{result['model']}, {result['batch']} \N{MULTIPLICATION SIGN} "
        f"{result['tokens']}"
        for result in results
    ]
    every = dict.fromkeys(name for result in results for name in result["methods"])

    def row(name: str, base: str, title: str) -> str:
        cells = [title]
        for result in results:
            figures = result["methods"].get(name)
            cells.append("\N{EN DASH}" if figures is None else _short(figures[base]))
        return f"| {' | '.join(cells)} |"

    def table(names: list[str], base: str) -> str:
        own = ("GlobEnc", *SIGNED)
        lines = [f"| | {' | '.join(heads)} |", f"|{'---|' * (len(heads) + 1)}"]
        for name in names:
            bold = f"**{name}**" if name in own else name
            lines.append(row(name, f"median_ratio_to_{base}", bold))
        return "\n".join(lines)

    of_gradient = [name for name in every if name in SIGNED]
    return (
        f"{table(list(every), 'forward')}\n\n"
        f"{table(of_gradient, 'forward_and_backward')}\n"
    )


def _short(ratio: float) -> str:
    """Two decimals, fewer where they say nothing."""
    return f"{ratio:.{2 if ratio < 10 else 1}f}"


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes = {"type": Shape.of, "nargs": "*", "metavar": "MODEL:BATCHxTOKENS"}
    parser.add_argument(
        "--shapes", default=[*map(Shape.of, SHAPES)], help="what to measure", **shapes
    )
    parser.add_argument(
        "--slow-shapes",
        default=[*map(Shape.of, SLOW_SHAPES)],
        help="those of them where the slow methods join",
        **shapes,
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--slow-rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    options = parser.parse_args()
    results = [
        measure(
            shape,
            options.rounds,
            options.slow_rounds if shape in options.slow_shapes else 0,
        )
        for shape in options.shapes
    ]
    report = {
        "weights": "random, float32",
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
    print(markdown(results), end="")
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
