"""Batches judged in this process, or in several."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from captum_globenc.comparison.methods import methods_named, scorer_of
from captum_globenc.errors import InputError
from captum_globenc.evaluation.data import Example
from captum_globenc.evaluation.scoring import Judge, Record

_PERTURBED_AT_ONCE = 64


@dataclass(frozen=True)
class Plan:
    """What a process needs to judge batches."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    methods: dict[str, Any]
    measures: tuple[str, ...]
    per_layer: bool
    max_tokens: int | None

    def judge(self) -> Judge:
        """The methods, built for this process's model."""
        scorers = {}
        for name, method in self.methods.items():
            if isinstance(method, str):
                (named,) = methods_named(method).values()
                scorers[name] = named.build(self.model, self.tokenizer)
            else:
                scorers[name] = scorer_of(method, self.model, self.tokenizer)
        return Judge(
            model=self.model,
            tokenizer=self.tokenizer,
            scorers=scorers,
            measures=self.measures,
            per_layer=self.per_layer,
            max_tokens=self.max_tokens,
            batch_size=_PERTURBED_AT_ONCE,
        )


def _judged(judge: Judge, batch: list[Example]) -> list[Record]:
    texts = judge.tokenize([example.text for example in batch], pairs_of(batch))
    return [
        {"index": example.index, "label": example.label, **record}
        for example, record in zip(batch, judge.records(texts), strict=True)
    ]


def run(
    plan: Plan, batches: Iterator[list[Example]], processes: int
) -> Iterator[list[Record]]:
    """The records of each batch, as soon as they are there."""
    if processes == 1:
        judge = plan.judge()
        for batch in batches:
            yield _judged(judge, batch)
        return
    with TemporaryDirectory() as folder:
        # Through a file: a process that dies before it has read a large plan from a
        # pipe would leave this one waiting.
        path = Path(folder) / "plan"
        try:
            path.write_bytes(pickle.dumps(plan))
        except Exception as error:  # whatever a method's parts raise
            raise InputError(
                f"a method or the model cannot be sent to another process ({error}): "
                "use methods by name, or processes=1."
            ) from error
        try:
            yield from _run_pool(path, batches, processes)
        except BrokenProcessPool as error:
            raise InputError(
                "a process ended before its work was done: it was killed (out of "
                "memory?), or a script calls benchmark outside of if __name__ == "
                '"__main__".'
            ) from error


def _run_pool(
    plan: Path, batches: Iterator[list[Example]], processes: int
) -> Iterator[list[Record]]:
    threads = max(1, torch.get_num_threads() // processes)
    with ProcessPoolExecutor(
        processes,
        # Not fork: torch's threads do not survive it.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_prepare,
        initargs=(plan, threads),
    ) as pool:
        # A few at a time: the texts may be more than fit into memory.
        running: set[Future[list[Record]]] = set()
        for batch in batches:
            running.add(pool.submit(_judge_in_worker, batch))
            if len(running) >= 2 * processes:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        while running:
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)


_judge: Judge | None = None  # of a worker process


def _prepare(path: Path, threads: int) -> None:
    global _judge
    torch.set_num_threads(threads)
    plan = pickle.loads(path.read_bytes())
    _judge = plan.judge()


def _judge_in_worker(batch: list[Example]) -> list[Record]:
    assert _judge is not None
    return _judged(_judge, batch)


def pairs_of(examples: list[Example]) -> list[str] | None:
    """The second sentences, None where there are none."""
    pairs = [example.pair for example in examples if example.pair is not None]
    return pairs or None
