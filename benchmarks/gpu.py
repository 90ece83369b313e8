#!/usr/bin/env python3
"""What GlobEnc costs on an accelerator: time, kernels and synchronisations.

On a random model of the size of BERT-base, the forward pass and GlobEnc run one after
the other in each round, and the device is waited for after each. A ratio is the median
over rounds of two times from the same round. Kernels are those that the profiler sees
in one call, synchronisations those that torch itself reports. Without a GPU the script
measures time on the CPU, and counts dispatched operations in the place of kernels.

    python benchmarks/gpu.py --output gpu.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification

from captum_globenc import GlobEnc

Call = Callable[[], object]


class _Operations(TorchDispatchMode):
    """Counts the operations that torch dispatches."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def device_name(device: torch.device) -> str:
    """What the measurement ran on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def launches(call: Call, device: torch.device) -> int:
    """The kernels of a call; on the CPU the dispatched operations."""
    if device.type != "cuda":
        with _Operations() as operations:
            call()
        return operations.count
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        wait_for(device)
    kinds = (event.device_type for event in profile.events())
    return sum(kind == torch.autograd.DeviceType.CUDA for kind in kinds)


def synchronisations(call: Call, device: torch.device) -> int | None:
    """How often a call waits for the device; None where torch cannot tell."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def measure(
    model: BertForSequenceClassification, batch: int, tokens: int, rounds: int
) -> dict[str, object]:
    """Times and counts of one shape of input."""
    device = next(model.parameters()).device
    ids = torch.randint(1_000, 30_000, (batch, tokens), device=device)
    globenc = GlobEnc(model)

    def forward() -> object:
        with torch.no_grad():
            return model(ids).logits

    def attribute() -> object:
        return globenc.attribute(ids, target=0)

    seconds: dict[str, list[float]] = {"forward": [], "GlobEnc": []}
    for index in range(rounds + 3):  # The first ones prepare weights and kernels.
        for name, call in (("forward", forward), ("GlobEnc", attribute)):
            wait_for(device)
            start = time.perf_counter()
            call()
            wait_for(device)
            if index >= 3:
                seconds[name].append(time.perf_counter() - start)
    pairs = zip(seconds["GlobEnc"], seconds["forward"], strict=True)
    return {
        "batch": batch,
        "tokens": tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "median_ratio_to_forward": statistics.median(own / bare for own, bare in pairs),
        "median_seconds": {n: statistics.median(t) for n, t in seconds.items()},
        "launches": {
            "forward": launches(forward, device),
            "GlobEnc": launches(attribute, device),
        },
        "synchronisations": {
            "forward": synchronisations(forward, device),
            "GlobEnc": synchronisations(attribute, device),
        },
    }


def shape(text: str) -> tuple[int, int]:
    """``32x128``: a batch of 32 texts of 128 tokens."""
    batch, tokens = text.split("x")
    return int(batch), int(tokens)


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    shapes = [(1, 128), (32, 128), (1, 4096)]
    parser.add_argument(
        "--shapes", nargs="+", type=shape, default=shapes, metavar="BATCHxTOKENS"
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device(options.device)
    longest = max(tokens for _, tokens in options.shapes)
    config = BertConfig(
        num_hidden_layers=options.layers, max_position_embeddings=max(512, longest)
    )
    model = BertForSequenceClassification(config).eval().to(device)
    results = [
        measure(model.to(getattr(torch, dtype)), batch, tokens, options.rounds)
        for dtype in options.dtypes
        for batch, tokens in options.shapes
    ]
    name = device_name(device)
    table = Table("Shape", "dtype", "GlobEnc / forward", "Launches", "Synchronisations")
    for result in results:
        counts = [
            " / ".join(str(result[what][who]) for who in ("GlobEnc", "forward"))
            for what in ("launches", "synchronisations")
        ]
        table.add_row(
            f"{result['batch']} x {result['tokens']}",
            str(result["dtype"]),
            f"{result['median_ratio_to_forward']:.2f}",
            *counts,
        )
    Console().print(f"{name}, torch {torch.__version__}", table)
    if options.output is not None:
        content = {
            "device": name,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "rounds": options.rounds,
            "results": results,
        }
        options.output.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
