"""The benchmark: any methods, the same texts, the same measures."""

from __future__ import annotations

import hashlib
import inspect
import multiprocessing
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from captum_globenc.architectures import find_encoder, unsupported
from captum_globenc.errors import InputError
from captum_globenc.evaluation import cost
from captum_globenc.evaluation.data import Example, read_examples
from captum_globenc.evaluation.presets import PRESETS
from captum_globenc.evaluation.result import BenchmarkResult
from captum_globenc.evaluation.scoring import (
    DEFAULT_MEASURES,
    MEASURES,
    Judge,
    Record,
)
from captum_globenc.evaluation.store import Store
from captum_globenc.explanation import evaluating
from captum_globenc.methods import methods_named, scorer_of

_COST_TEXTS = 20
_PERTURBED_AT_ONCE = 64


def benchmark(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: object,
    methods: Mapping[str, Any] | Iterable[str] = PRESETS["default"].methods,
    *,
    measures: Sequence[str] = DEFAULT_MEASURES,
    per_layer: bool = False,
    text_column: str = "text",
    pair_column: str | None = None,
    label_column: str | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    processes: int = 1,
    output: str | Path | None = None,
    cost_texts: int = _COST_TEXTS,
    progress: bool = True,
) -> BenchmarkResult:
    r"""Measure attribution methods side by side on a classifier.

    Every method explains the predicted class of every text and gets the attention mask.
    Its scores at padding count for nothing; special tokens count for the rank
    correlation only, as in the GlobEnc paper, and are never masked or removed.

    Args:
        model (PreTrainedModel): a sequence classifier with a supported encoder.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.
        texts (sequence, str, Path or data set): texts, (text, label) tuples, a file or
            a data set, as for
            :func:`captum_globenc.evaluation.data.read_examples`. Texts that are longer
            than the model's positions are cut.
        methods (mapping or iterable of str, optional): names of
            ``captum_globenc.methods.METHODS``; or name → such a name, an object with
            Captum's ``attribute``, or a function (ids, mask, target) → scores, which
            for pairs gets the token types as a fourth argument, and whose scores of a
            text must not depend on the others in the batch. See
            :func:`captum_globenc.methods.scorer_of` for how an object is called and
            reduced to one score per token. Default: the methods of the preset
            ``"default"``.
        measures (sequence of str, optional): of ``MEASURES``. Default: all but
            infidelity and sensitivity, which attribute every text several times over.
        per_layer (bool, optional): also the rank correlation of every local score in
            every layer. Default: False.
        text_column (str, optional): where a file's texts are. Default: ``"text"``.
        pair_column (str, optional): where second sentences are. Default: none.
        label_column (str, optional): where labels are, for the accuracy. Default: none;
            for tuples their second element.
        limit (int, optional): so many texts. Default: all.
        batch_size (int, optional): so many texts at once; results do not depend on it
            but for rounding. Default: 16.
        processes (int, optional): so many at once, each with its own copy of the model;
            the threads are shared out among them. Methods that are no names must be
            such that they can be pickled, and a script must call this under ``if
            __name__ == "__main__":``. Results do not depend on it. Default: 1.
        output (str or Path, optional): a folder. What has been measured is kept there,
            batch by batch; called again with the same settings, or with another limit,
            the run goes on where it was interrupted. Own methods are told apart by
            name, class and source code. The result is saved there in the end. Default:
            none.
        cost_texts (int, optional): measure the cost on so many of the first texts; 0:
            not at all. Default: 20.
        progress (bool, optional): show a progress bar. Default: True.

    Returns:
        *BenchmarkResult*.

    Raises:
        InputError: texts, methods, measures or numbers that make no benchmark.
        UnsupportedModelError: no supported encoder.
        NonFiniteActivationError: NaN or infinity from the model or a method.
    """
    for name, number, least in [
        ("limit", 1 if limit is None else limit, 1),
        ("batch_size", batch_size, 1),
        ("processes", processes, 1),
        ("cost_texts", cost_texts, 0),
    ]:
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise InputError(f"{name} must be at least {least}, got {number!r}.")
    measures = [measures] if isinstance(measures, str) else list(measures)
    if unknown := [measure for measure in measures if measure not in MEASURES]:
        raise InputError(
            f"unknown measure {unknown[0]!r}; known: {', '.join(MEASURES)}."
        )
    chosen = _chosen(methods)
    encoder = find_encoder(model)
    if encoder is None:
        raise unsupported(model)
    if model.config.num_labels < 2:
        raise InputError(
            f"{type(model).__name__} has {model.config.num_labels} output, a number: "
            "a classifier with at least two classes is needed, for the measures are "
            "changes of a class's probability."
        )
    plan = _Plan(
        model=model,
        tokenizer=tokenizer,
        methods=chosen,
        measures=tuple(measures),
        per_layer=per_layer,
        max_tokens=encoder.max_tokens,
    )
    if label_column is None and _are_labelled(texts):
        label_column = "label"
    examples = read_examples(
        texts,
        text_column=text_column,
        pair_column=pair_column,
        label_column=label_column,
        labels=model.config.id2label,
        limit=limit,
    )
    first = list(islice(examples, max(1, cost_texts)))
    described = {name: _described(method) for name, method in chosen.items()}
    settings = {
        "model": model.name_or_path and Path(model.name_or_path).name,
        "weights": _hash(_bytes_of(model)),
        "config": _hash([model.config.to_json_string().encode()]),
        "tokenizer": _hash([repr(sorted(tokenizer.get_vocab().items())).encode()]),
        "data": _data_name(texts, first[0]),
        "methods": described,
        "sources": {name: _source(method) for name, method in chosen.items()},
        "measures": measures,
        "per_layer": per_layer,
        "columns": [text_column, pair_column, label_column],
        "versions": {
            name: version(name)
            for name in ("captum_globenc", "captum", "torch", "transformers")
        },
    }
    store = Store(None if output is None else Path(output), settings)
    with evaluating(model):
        if min(cost_texts, len(first)) > store.cost_texts:
            judge = plan.judge()
            head = judge.tokenize([e.text for e in first], _pairs(first))
            store.add_cost(cost.measure(model, judge.scorers, head), len(first))
        waiting = _batches(_chain(first, examples), batch_size, store.records)
        done = tqdm(
            desc="benchmark",
            unit=" texts",
            initial=len(store.records),
            total=limit if limit is not None else _length(texts),
            disable=not progress,
        )
        with done:
            for records in _run(plan, waiting, processes):
                store.add(records)
                done.update(len(records))
    result = BenchmarkResult(
        records=[
            store.records[index]
            for index in sorted(store.records)
            if limit is None or index < limit
        ],
        cost=store.cost,
        methods=described,
        measures=tuple(measures),
        settings={
            **{k: v for k, v in settings.items() if k not in ("methods", "sources")},
            "limit": limit,
            "encoder": encoder.module.config.model_type,  # type: ignore[union-attr]
            "layers": len(encoder.layers),
            "device": str(model.device),
            "dtype": str(model.dtype),
            "cost_texts": store.cost_texts,
        },
    )
    if output is not None:
        result.save(output)
    return result


@dataclass(frozen=True)
class _Plan:
    """What a process needs to judge batches."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    methods: dict[str, Any]
    measures: tuple[str, ...]
    per_layer: bool
    max_tokens: int | None

    def judge(self) -> Judge:
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


def _chosen(methods: Mapping[str, Any] | Iterable[str]) -> dict[str, Any]:
    """Name → method, each checked as far as it can be."""
    if not isinstance(methods, Mapping):
        return {name: name for name in methods_named(methods)}
    if not methods:
        raise InputError("no method asked for.")
    for name, method in methods.items():
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise InputError(f"a method's name must be words, got {name!r}.")
        if isinstance(method, str):
            methods_named(method)
        elif isinstance(method, type):
            raise InputError(
                f"method {name!r} is the class {method.__name__}: give an object, "
                f"{method.__name__}(forward_func)."
            )
        elif not hasattr(method, "attribute") and not callable(method):
            raise InputError(
                "a method must be a name, have Captum's attribute, or be a function "
                f"(ids, mask, target) → scores, got {type(method).__name__}."
            )
    return dict(methods)


def _source(method: Any) -> str | None:
    """What tells one method of a user from another: a hash of its source code."""
    if isinstance(method, str):
        return None
    function = getattr(method, "forward_func", method)
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):  # a model, or typed in
        source = type(function).__qualname__
    return _hash([source.encode()])


def _described(method: Any) -> str:
    if isinstance(method, str):
        return next(iter(methods_named(method).values())).reduction
    if hasattr(method, "attribute"):
        inner = getattr(method, "attribution_method", method)
        around = "" if inner is method else f"{type(method).__name__} of "
        return f"{around}{type(inner).__name__}; sum over hidden"
    return f"the function {getattr(method, '__qualname__', type(method).__name__)}"


def _batches(
    examples: Iterable[Example], size: int, done: Mapping[int, Record]
) -> Iterator[list[Example]]:
    waiting = (example for example in examples if example.index not in done)
    while batch := list(islice(waiting, size)):
        yield batch


def _chain(first: list[Example], rest: Iterator[Example]) -> Iterator[Example]:
    yield from first
    yield from rest


def _pairs(examples: list[Example]) -> list[str] | None:
    pairs = [example.pair for example in examples if example.pair is not None]
    return pairs or None


def _judged(judge: Judge, batch: list[Example]) -> list[Record]:
    texts = judge.tokenize([example.text for example in batch], _pairs(batch))
    return [
        {"index": example.index, "label": example.label, **record}
        for example, record in zip(batch, judge.records(texts), strict=True)
    ]


def _run(
    plan: _Plan, batches: Iterator[list[Example]], processes: int
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


def _bytes_of(model: PreTrainedModel) -> Iterator[bytes]:
    for name, values in model.state_dict().items():
        yield name.encode()
        yield values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:12]


def _are_labelled(texts: object) -> bool:
    return (
        isinstance(texts, list | tuple)
        and bool(texts)
        and all(isinstance(text, tuple) for text in texts)
    )


def _data_name(texts: object, first: Example) -> str:
    """What tells one set of texts from another, without a whole path."""
    if isinstance(texts, str | Path) and os.path.isfile(texts):
        with open(texts, "rb") as file:
            return f"{Path(texts).name} ({_hash(iter(lambda: file.read(2**20), b''))})"
    if isinstance(texts, str | Path):
        return str(texts)
    if isinstance(texts, list | tuple):
        whole = repr(texts).encode("utf-8", "replace")
        return f"{len(texts)} texts ({_hash([whole])})"
    # A stream does not know what it holds: its first text has to do.
    known = getattr(texts, "_fingerprint", None) or _hash([first.text.encode()])
    return f"{type(texts).__name__} ({known})"


def _length(texts: object) -> int | None:
    if isinstance(texts, str | Path) or not hasattr(texts, "__len__"):
        return None
    return len(texts)
