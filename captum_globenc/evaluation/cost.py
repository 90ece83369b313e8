"""What an attribution costs, beside what it is worth: time, passes, memory.

Every method attributes the same texts, one at a time, in rounds in which all take turns
with the bare forward pass, so that a slow moment of the machine touches all alike.
Ratios are of medians.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from captum_globenc.comparison.methods import Scorer
from captum_globenc.evaluation.perturbation import Texts

#: The name under which the bare forward pass is listed.
FORWARD = "forward pass"


@dataclass(frozen=True)
class Cost:
    """What one attribution of one text costs.

    Args:
        seconds (float): the median.
        ratio (float): that over the median of the bare forward pass.
        forwards (float): how many texts went through the model, mean over texts.
        backwards (float): how many of these had a gradient taken back.
        memory (float): the most that torch had allocated at once beyond what it held
            before, in MB (2**20 bytes), for the longest text; NaN where it cannot be
            told.
    """

    seconds: float
    ratio: float
    forwards: float
    backwards: float
    memory: float


def measure(
    model: PreTrainedModel, scorers: Mapping[str, Scorer], texts: Texts
) -> dict[str, dict[str, float]]:
    """The cost of each method, the bare forward pass first.

    Args:
        model (PreTrainedModel): a sequence classifier in evaluation mode.
        scorers (dict[str, Scorer]): the methods.
        texts (Texts): the texts to measure on, after one that warms up.

    Returns:
        *dict*: method → fields of :class:`Cost`.
    """
    singles = [texts.rows(slice(row, row + 1)).trimmed() for row in range(len(texts))]
    targets = [_predicted(model, text) for text in singles]

    def forward(text: Texts, _: Tensor) -> None:
        with torch.no_grad():
            model(**text.inputs)

    runs: dict[str, Callable[[Texts, Tensor], object]] = {FORWARD: forward}
    for name, scorer in scorers.items():
        runs[name] = partial(_attribute, scorer)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    counts: dict[str, _Passes] = {name: _Passes() for name in runs}
    for run in runs.values():  # What is prepared at first use does not count.
        run(singles[0], targets[0])
    for text, target in zip(singles, targets, strict=True):
        for name, run in runs.items():
            with _counted(model, counts[name]):
                seconds[name].append(_seconds(run, text, target))
    longest = max(range(len(singles)), key=lambda row: singles[row].input_ids.shape[1])
    memory = {
        name: _peak_memory(run, singles[longest], targets[longest])
        for name, run in runs.items()
    }
    bare = statistics.median(seconds[FORWARD])
    found = {}
    for name in runs:
        median = statistics.median(seconds[name])
        found[name] = asdict(
            Cost(
                seconds=median,
                ratio=median / bare,
                forwards=counts[name].forwards / len(singles),
                backwards=counts[name].backwards / len(singles),
                memory=memory[name],
            )
        )
    return found


def _attribute(scorer: Scorer, text: Texts, target: Tensor) -> Tensor:
    return scorer(text.input_ids, text.attention_mask, target, *text.types)


@torch.no_grad()
def _predicted(model: PreTrainedModel, text: Texts) -> Tensor:
    predicted: Tensor = model(**text.inputs).logits.argmax(-1)
    return predicted


def _seconds(
    run: Callable[[Texts, Tensor], object], text: Texts, target: Tensor
) -> float:
    _wait(text.input_ids.device)
    start = time.perf_counter()
    run(text, target)
    _wait(text.input_ids.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class _Passes:
    """Texts that went through the model, forth and back."""

    forwards: int = 0
    backwards: int = 0


@contextmanager
def _counted(model: nn.Module, passes: _Passes) -> Iterator[None]:
    """Count the rows that go through ``model`` and the gradients that come back."""

    def after(_: nn.Module, __: Any, output: Any) -> None:
        rows = len(output.logits)
        passes.forwards += rows

        def back(_: Tensor) -> None:
            passes.backwards += rows

        if output.logits.requires_grad:
            output.logits.register_hook(back)

    handle = model.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def _peak_memory(
    run: Callable[[Texts, Tensor], object], text: Texts, target: Tensor
) -> float:
    """The largest allocation at once beyond what was held before, in MB."""
    device = text.input_ids.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(text, target)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if device.type != "cpu":
        return math.nan
    with (
        _quiet_profiler(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile,
    ):
        run(text, target)
    held = peak = 0
    # Allocations and releases in the order of time; the profiler's own tables show
    # what an operation holds at its end only.
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak / 2**20


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Without the lines that torch's profiler prints at every start and stop."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ[name] = "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
