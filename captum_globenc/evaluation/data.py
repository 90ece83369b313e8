"""Evaluation texts from a file, a data set or a list, read one after another."""

from __future__ import annotations

import csv
import difflib
import glob
import importlib
import json
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any, NamedTuple

from captum_globenc.errors import InputError

_SOURCES = (
    "a .csv, .tsv, .jsonl, .json, .txt or .parquet file, hub:NAME[:CONFIG][:SPLIT], "
    "one split of a datasets data set, or a sequence"
)
_HUB = re.compile(r"hub:([^:]+)(?::([^:]+))??(?::([^:]+))?")
# Half a character, which JSON can spell and no tokenizer takes.
_SURROGATE = re.compile("[\ud800-\udfff]")
_Row = Mapping[Any, Any]
_Rows = Iterator[tuple[str, _Row]]  # each with where it stands, for messages


@dataclass(frozen=True)
class Example:
    """One text to evaluate on.

    Args:
        index (int): position among the source's rows, counted from 0.
        text (str): the text as it stands there.
        pair (str or None): the second sentence of a pair.
        label (int or None): index of the class.
    """

    index: int
    text: str
    pair: str | None
    label: int | None


class _Wanted(NamedTuple):
    text: str
    pair: str | None
    label: str | None
    labels: Mapping[int, str] | None


def read_examples(
    source: object,
    *,
    text_column: str = "text",
    pair_column: str | None = None,
    label_column: str | None = None,
    labels: Mapping[int, str] | None = None,
    limit: int | None = None,
) -> Iterator[Example]:
    """Read texts, and their labels if asked for, lazily.

    The call itself reports a limit, source or file name that cannot be; nothing is
    opened, and no column or row looked at, before the first ``next``.

    Args:
        source (str, Path, Dataset, IterableDataset or sequence): a UTF-8 file (``.csv``
            or ``.tsv`` with a header, ``.jsonl`` or ``.json`` with an object per line,
            ``.txt`` with a text per line, ``.parquet``); a data set on the hub or in a
            folder, ``"hub:NAME[:CONFIG][:SPLIT]"`` (one word after ``NAME`` is the
            split; default: test); one split of a ``datasets`` data set; or a sequence
            of texts (column ``text``) or (text, label) tuples (column ``label``). A
            text may be a list of words, which are joined with blanks.
        text_column (str, optional): where the texts are. Default: ``"text"``.
        pair_column (str, optional): where second sentences are. Default: nowhere.
        label_column (str, optional): where the labels are. Default: none are read.
        labels (mapping from int to str, optional): the model's ``config.id2label``. A
            label is one of these names, in any case, or an index. A data set's own
            class names count where the model has one of them. Default: only indices.
        limit (int, optional): how many rows to read. Default: all.

    Returns:
        *iterator* of Example.

    Raises:
        InputError: a source, column, row, text or label that cannot be used.
        ImportError: the source needs the ``datasets`` library, which is missing.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}: give at least 1, or None for all rows.")
    wanted = _Wanted(text_column, pair_column, label_column, labels)
    return _examples(source, islice(_rows(source, wanted), limit), wanted)


def _examples(source: object, rows: _Rows, wanted: _Wanted) -> Iterator[Example]:
    index = -1
    for index, (place, row) in enumerate(rows):
        text = _text(row, wanted.text, place)
        pair = None if wanted.pair is None else _text(row, wanted.pair, place)
        label = None if wanted.label is None else _class_index(row, wanted, place)
        yield Example(index, text, pair, label)
    if index < 0:
        name = source if isinstance(source, str | Path) else type(source).__name__
        raise InputError(f"{name} holds no rows: give a source with at least one text.")


def _value(row: _Row, column: str | None, place: str) -> Any:
    if column in row:
        return row[column]
    near = difflib.get_close_matches(str(column), row, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InputError(f"{place}: no column {column!r}; there are: {list(row)}.{hint}")


def _text(row: _Row, column: str, place: str) -> str:
    value = _value(row, column, place)
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        value = " ".join(value)  # words, as HateXplain has them
    if isinstance(value, str) and value.strip() and not _SURROGATE.search(value):
        return value
    found = "missing" if value is None else reprlib.repr(value)
    raise InputError(f"{place}: text {column!r} is {found}; expected words as a str.")


def _class_index(row: _Row, wanted: _Wanted, place: str) -> int:
    value = _value(row, wanted.label, place)
    name = str(value).strip()
    found = {int(name)} if name.isdecimal() else set()
    known = "indices only; for names, give labels (the model's config.id2label)"
    if wanted.labels is not None:
        classes = wanted.labels.items()
        # A name such as "1" can be the index of another class.
        found &= wanted.labels.keys()
        found |= {i for i, n in classes if n.casefold() == name.casefold()}
        known = shorten(", ".join(f"{i} {n}" for i, n in classes), 400)
    if len(found) == 1:
        return found.pop()
    problem = "could be several classes" if found else "is no class"
    raise InputError(f"{place}: label {value!r} {problem}; known: {known}.")


def _rows(source: object, wanted: _Wanted) -> _Rows:
    """The source's rows; only what it is called is looked at here."""
    if isinstance(source, str) and (hub := _HUB.fullmatch(source)):
        name, config, split = hub.groups()
        load = partial(_load, source, name, config, split=split or "test")
        return _data_rows(load, source, wanted)
    if isinstance(source, str | Path):
        path = str(source)
        read = _READERS.get(Path(path).suffix.lower())
        # os.path: for Path, a long text that is no path at all is an OSError.
        if read and os.path.isfile(path):
            return read(path, wanted)
        missing = "is a directory" if os.path.isdir(path) else "does not exist"
        problem = "has an unknown extension" if os.path.isfile(path) else missing
        raise InputError(f"{path} {problem}; expected: {_SOURCES}.")
    if isinstance(source, Sequence):
        return _item_rows(source)
    # Whoever holds a data set has imported the library.
    datasets: Any = sys.modules.get("datasets")
    if datasets and isinstance(source, datasets.Dataset | datasets.IterableDataset):
        return _data_rows(lambda: source, "data set", wanted)
    raise InputError(f"source is a {type(source).__name__}; expected: {_SOURCES}.")


def _item_rows(items: Sequence[object]) -> _Rows:
    for position, item in enumerate(items):
        place = f"item {position} (counted from 0)"
        if isinstance(item, str):
            yield place, {"text": item}
        elif isinstance(item, tuple) and len(item) == 2:
            yield place, {"text": item[0], "label": item[1]}
        else:
            found = reprlib.repr(item)
            raise InputError(f"{place} is {found}; expected a str or (text, label).")


def _lines(path: str) -> Iterator[str]:
    # The library's csv and json builders guess types from the rows ("NA" is missing,
    # 007 is 7) and know no line numbers, so files of lines are taken apart here. Any
    # byte is a character of Latin-1: one that is not UTF-8 is found in its line. Small
    # blocks: little is read beyond the rows that are asked for.
    data = _load(path, "text", encoding="latin-1", keep_linebreaks=True, chunksize=8192)
    for number, row in enumerate(_read(data, path), start=1):
        line = row["text"].encode("latin-1")
        try:
            decoded = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            found = f"byte 0x{line[error.start]:02x} at position {error.start + 1}"
            message = f"{path}, line {number}: {found} is not UTF-8"
            raise InputError(f"{message}: save the file as UTF-8.") from None
        yield decoded


def _text_rows(path: str, wanted: _Wanted) -> _Rows:
    for number, line in enumerate(_lines(path), start=1):
        yield f"{path}, line {number}", {"text": line.removesuffix("\n")}


def _json_rows(path: str, wanted: _Wanted) -> _Rows:
    for place, line in _text_rows(path, wanted):
        if not line["text"].strip():
            continue
        try:
            row = json.loads(line["text"])
        except ValueError as error:
            raise InputError(f"{place}: malformed JSON ({error}).") from None
        if not isinstance(row, dict):
            raise InputError(f"{place} is {reprlib.repr(row)}; expected a JSON object.")
        yield place, row


def _csv_rows(path: str, wanted: _Wanted, delimiter: str) -> _Rows:
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    header: list[str] = []
    place = f"{path}, line 1"
    try:
        for fields in reader:
            if fields and not header:
                header = fields
            elif fields and len(fields) != len(header):
                found = f"{len(fields)} fields, the header has {len(header)}"
                raise InputError(f"{place} has {found}: quote {delimiter!r} in fields.")
            elif fields:
                yield place, dict(zip(header, fields))
            # A field can hold line breaks.
            place = f"{path}, line {reader.line_num + 1}"
    except csv.Error as error:
        hint = 'close each quote, and write "" for one inside a quoted field'
        if "field limit" in str(error):
            hint = "close each quote; for fields as large as that use .jsonl"
        raise InputError(f"{place}: malformed row ({error}): {hint}.") from None


_READERS: dict[str, Callable[[str, _Wanted], _Rows]] = {
    ".csv": partial(_csv_rows, delimiter=","),
    ".tsv": partial(_csv_rows, delimiter="\t"),
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".txt": _text_rows,
    ".parquet": lambda path, wanted: _data_rows(
        partial(_load, path, "parquet", batch_size=256), path, wanted
    ),
}


def _data_rows(load: Callable[[], Any], name: str, wanted: _Wanted) -> _Rows:
    data = load().with_format(None)
    columns = {*wanted[:3]} - {None}
    # An iterable data set may not know its columns. A wrong one is reported by row.
    if columns <= set(data.column_names or ()):
        data = data.select_columns(list(columns))
    names = getattr((data.features or {}).get(wanted.label), "names", ())
    known = {label.casefold() for label in (wanted.labels or {}).values()}
    by_name = not known.isdisjoint(n.casefold() for n in names)
    for number, row in enumerate(_read(data, name)):
        label = row.get(wanted.label)
        if by_name and label is not None and 0 <= label < len(names):
            row[wanted.label] = names[label]
        yield f"{name}, row {number} (counted from 0)", row


def _read(data: Iterable[dict[Any, Any]], name: str) -> Iterator[dict[Any, Any]]:
    with _reported(name):
        yield from data


def _load(name: str, *arguments: str | None, **options: Any) -> Any:
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        need = "files and data sets need the datasets library"
        raise ImportError(f"{need}: pip install captum_globenc[benchmark]") from error
    if "split" not in options:  # a file, whose path the library takes for a pattern
        options |= {"split": "train", "data_files": glob.escape(os.path.abspath(name))}
    with ExitStack() as undo, _reported(name):
        # Streaming caches no rows, but a lock file would stay in the user's cache.
        options["cache_dir"] = undo.enter_context(TemporaryDirectory())
        undo.callback(datasets.logging.set_verbosity, datasets.logging.get_verbosity())
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        if not datasets.utils.are_progress_bars_disabled():
            undo.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        return datasets.load_dataset(*arguments, streaming=True, **options)


@contextmanager
def _reported(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        network = isinstance(error, ConnectionError)
        problem = "the hub cannot be reached" if network else "cannot be read"
        reason = (str(error) or type(error).__name__).partition("\n")[0].rstrip(".")
        raise InputError(f"{name}: {problem} ({reason}).") from error
