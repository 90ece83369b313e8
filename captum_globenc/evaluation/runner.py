"""The benchmark: any methods, the same texts, the same measures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from captum_globenc.catalogue import DEFAULT_MEASURES, PRESETS, check_measures
from captum_globenc.comparison.batches import by_length
from captum_globenc.comparison.explanation import class_names
from captum_globenc.comparison.methods import methods_named
from captum_globenc.encoders.discovery import find_encoder, unsupported
from captum_globenc.errors import InputError
from captum_globenc.evaluation import cost
from captum_globenc.evaluation.arguments import check_counts
from captum_globenc.evaluation.data import Example, read_examples
from captum_globenc.evaluation.identity import (
    bytes_of,
    data_name,
    description,
    hashed,
    source_of,
)
from captum_globenc.evaluation.result import BenchmarkResult
from captum_globenc.evaluation.scoring import Record
from captum_globenc.evaluation.store import Store
from captum_globenc.evaluation.workers import Plan, pairs_of, run
from captum_globenc.recording.evaluation_mode import evaluating

_COST_TEXTS = 20


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
            a data set, as for :func:`captum_globenc.evaluation.read_examples`. Texts
            that are longer than the model's positions are cut.
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
        batch_size (int, optional): so many texts at once, of about one length: they
            are sorted within 32 batches. Results do not depend on it but for rounding.
            Default: 16.
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
    check_counts(limit, batch_size, processes, cost_texts)
    measures = check_measures(measures)
    chosen = _chosen(methods)
    encoder = find_encoder(model)
    if encoder is None:
        raise unsupported(model)
    # None: the configuration names no classes.
    classes = model.config.num_labels
    if classes is not None and classes < 2:
        raise InputError(
            f"{type(model).__name__} has {classes} output, a number: "
            "a classifier with at least two classes is needed, for the measures are "
            "changes of a class's probability."
        )
    plan = Plan(
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
        labels=class_names(model) or None,
        limit=limit,
    )
    first = list(islice(examples, max(1, cost_texts)))
    described = {name: description(method) for name, method in chosen.items()}
    settings = {
        "model": model.name_or_path and Path(model.name_or_path).name,
        "weights": hashed(bytes_of(model)),
        "config": hashed([model.config.to_json_string().encode()]),
        "tokenizer": hashed([repr(sorted(tokenizer.get_vocab().items())).encode()]),
        "data": data_name(texts, first[0]),
        "methods": described,
        "sources": {name: source_of(method) for name, method in chosen.items()},
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
            head = judge.tokenize([e.text for e in first], pairs_of(first))
            store.add_cost(cost.measure(model, judge.scorers, head), len(first))
        waiting = _batches(chain(first, examples), batch_size, store.records, tokenizer)
        done = tqdm(
            desc="benchmark",
            unit=" texts",
            initial=len(store.records),
            total=limit if limit is not None else _length(texts),
            disable=not progress,
        )
        with done:
            for records in run(plan, waiting, processes):
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


def _batches(
    examples: Iterable[Example],
    size: int,
    done: Mapping[int, Record],
    tokenizer: PreTrainedTokenizerBase,
) -> Iterator[list[Example]]:
    """Those that are not done, with little padding."""

    def lengths(window: list[Example]) -> list[int]:
        # verbose=False: texts that are too long for the model are cut later.
        texts = [example.text for example in window], pairs_of(window)
        return list(map(len, tokenizer(*texts, verbose=False)["input_ids"]))

    waiting = (example for example in examples if example.index not in done)
    return by_length(waiting, size, lengths)


def _length(texts: object) -> int | None:
    if isinstance(texts, str | Path) or not hasattr(texts, "__len__"):
        return None
    return len(texts)


def _are_labelled(texts: object) -> bool:
    return (
        isinstance(texts, list | tuple)
        and bool(texts)
        and all(isinstance(text, tuple) for text in texts)
    )
