from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest

from captum_globenc import InputError, demo
from captum_globenc.evaluation.data import Example, read_examples

datasets = pytest.importorskip("datasets")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = {0: "negative", 1: "positive"}
ROWS = [("A lovely film.", "positive"), ("Dull, dull, dull.", "negative")]
EXPECTED = [
    Example(0, "A lovely film.", None, 1),
    Example(1, "Dull, dull, dull.", None, 0),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch) -> None:
    """The library locks a file there for a data set that a test makes."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def read(source, **options) -> list[Example]:
    return list(read_examples(source, **options))


def labelled(source, **options) -> list[Example]:
    return read(source, label_column="label", labels=NAMES, **options)


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def fails(message: str, source, **options) -> None:
    """The error's whole text, in one line."""
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        read(source, **options)


def parquet(path, **columns):
    features = columns.pop("features", None)
    table = datasets.Dataset.from_dict(columns, features=features).data.table
    pq.write_table(table, path)
    return path


def data_set(labels: list[int], names: list[str]) -> Any:
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=names)
    )
    rows = {"text": ["word"] * len(labels), "label": labels}
    return datasets.Dataset.from_dict(rows, features=features)


# Formats

JSON = "".join(json.dumps({"text": t, "label": name}) + "\n" for t, name in ROWS)
FILES = {
    "a.csv": 'text,label\nA lovely film.,positive\n"Dull, dull, dull.",negative\n',
    "b.tsv": "label\ttext\n1\tA lovely film.\n0\tDull, dull, dull.\n",
    "c.jsonl": JSON,
    "d.json": JSON.replace("\n", "\n\n"),
    "E.CSV": 'text,label\r\nA lovely film.,Positive\r\n"Dull, dull, dull.", 0\r\n',
}


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("name", FILES)
def test_files_of_lines(tmp_path, name, bom, capfd) -> None:
    path = written(tmp_path / name, bom + FILES[name])
    assert labelled(path) == labelled(str(path)) == EXPECTED
    assert capfd.readouterr() == ("", "")


def test_text_file(tmp_path) -> None:
    path = written(tmp_path / "a.txt", "\ufeffOne é.\r\n  Two\u2028 \x85.\nThree")
    texts = [example.text for example in read(path)]
    assert texts == ["One é.", "  Two\u2028 \x85.", "Three"]


def test_parquet(tmp_path, capfd) -> None:
    texts, labels = zip(*ROWS)
    path = parquet(tmp_path / "a.parquet", label=labels, other=[1, 2], text=texts)
    assert labelled(path) == EXPECTED
    assert capfd.readouterr() == ("", "")


def test_sequences() -> None:
    assert labelled(ROWS) == EXPECTED
    assert read([text for text, _ in ROWS]) == read(ROWS) == unlabelled()
    held_out = labelled(demo.held_out_sentences())
    assert [(e.text, e.label) for e in held_out] == demo.held_out_sentences()


def unlabelled() -> list[Example]:
    return [Example(e.index, e.text, None, None) for e in EXPECTED]


def test_data_sets_are_read_as_stored(tmp_path) -> None:
    texts, labels = zip(*ROWS)
    data = datasets.Dataset.from_dict({"text": texts, "label": labels})
    for source in (data, data.to_iterable_dataset(), data.with_format("torch")):
        assert labelled(source) == EXPECTED
    numbers = datasets.Dataset.from_dict({"text": texts, "label": [1, 0]})
    assert labelled(numbers.with_format("torch")) == EXPECTED


def test_values_that_look_like_something_else_stay_texts(tmp_path) -> None:
    path = written(tmp_path / "a.csv", "text,label\nNA,0\n007,1\nnull,1\n1e3,0\n")
    assert [e.text for e in labelled(path)] == ["NA", "007", "null", "1e3"]


def test_quoted_fields(tmp_path) -> None:
    content = 'id,text\n1,"She said ""no"",\ntwice"\n\n2,"a, b"\n'
    path = written(tmp_path / "a.csv", content)
    assert [e.text for e in read(path)] == ['She said "no",\ntwice', "a, b"]
    assert [e.index for e in read(path)] == [0, 1]


def test_pairs_in_columns_of_any_name(tmp_path) -> None:
    path = written(tmp_path / "a.tsv", "a\tb\tgold\nIt rains.\tIt is wet.\t2\n")
    columns = {"text_column": "a", "pair_column": "b", "label_column": "gold"}
    expected = [Example(0, "It rains.", "It is wet.", 2)]
    assert read(path, **columns) == expected
    data = datasets.Dataset.from_dict({"a": ["x"], "b": ["y"], "gold": [0]})
    assert read(data, **columns) == [Example(0, "x", "y", 0)]
    assert read(data, text_column="a", pair_column="a") == [Example(0, "x", "x", None)]


def test_a_path_is_no_pattern(tmp_path) -> None:
    folder = tmp_path / ".hidden" / "a[1]*"
    folder.mkdir(parents=True)
    written(tmp_path / ".hidden" / "a1.txt", "wrong")
    assert read(written(folder / "x?y.txt", "right"))[0].text == "right"


# Laziness


def numbered(stop: int) -> Iterator[dict[str, Any]]:
    for number in range(stop):
        yield {"text": f"text {number}", "label": number % 2}
    raise RuntimeError("read too far")


def test_no_row_beyond_the_limit_is_read() -> None:
    data = datasets.IterableDataset.from_generator(numbered, gen_kwargs={"stop": 3})
    examples = labelled(data, limit=3)
    assert [(e.text, e.label) for e in examples] == [
        ("text 0", 0),
        ("text 1", 1),
        ("text 2", 0),
    ]
    assert len(list(islice(read_examples(data), 2))) == 2
    with pytest.raises(RuntimeError, match="read too far"):
        read(data)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.txt"])
def test_a_long_file_is_not_read_whole(tmp_path, name) -> None:
    line = '{"text": "x"}\n' if name == "a.jsonl" else "text\n"
    with open(tmp_path / name, "wb") as file:
        file.write(line.encode() * 5000)
        # A hole of a terabyte, which takes no room and no time unless it is read.
        file.seek(1 << 40)
        file.write(b"\n")
    assert len(read(tmp_path / name, limit=3)) == 3


def test_only_the_first_rows_of_a_parquet_file_are_decoded(tmp_path) -> None:
    texts = [f"text {number} " + "x" * 1000 for number in range(3000)]
    path = tmp_path / "a.parquet"
    table = datasets.Dataset.from_dict({"text": texts}).data.table
    pq.write_table(table, path, compression="none", use_dictionary=False)
    damaged = path.read_bytes().replace(b"text 2999", b"\xff" * 9)
    assert len(read(written(path, damaged), limit=5)) == 5
    fails(
        f"{path}: cannot be read ('utf-8' codec can't decode byte 0xff in position 0: "
        "invalid start byte).",
        path,
    )


def test_the_call_opens_nothing(tmp_path) -> None:
    path = written(tmp_path / "a.csv", "text\nx\n")
    examples = read_examples(path)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        next(examples)


@pytest.mark.parametrize("source", ["data/a.csv", "data/a.parquet", "hub:data:train"])
def test_nothing_is_left_in_the_cache(tmp_path, source) -> None:
    """In a process of its own: the library reads the variables when it is imported."""
    (tmp_path / "data").mkdir()
    if source == "data/a.parquet":
        parquet(tmp_path / source, text=["x", "y"])
    else:
        written(tmp_path / "data" / "a.csv", FILES["a.csv"])
    code = (
        "from captum_globenc.evaluation.data import read_examples\n"
        f"print(len(list(read_examples({source!r}))))"
    )
    home = tmp_path / "home"
    environment = {
        **os.environ,
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_DATASETS_CACHE": str(home / "hf" / "datasets"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "2\n"
    assert done.stderr == ""
    assert [path for path in (home / "hf").rglob("*") if path.is_file()] == []


# Labels


def test_the_names_of_a_data_set_count_where_the_model_has_them() -> None:
    swapped = data_set([0, 1], ["Positive", "Negative"])
    for source in (swapped, swapped.to_iterable_dataset()):
        assert [e.label for e in labelled(source)] == [1, 0]
    assert [e.label for e in read(swapped, label_column="label")] == [0, 1]


def test_the_names_are_kept_in_parquet(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(data_set([0, 1], ["positive", "negative"]).data.table, path)
    assert [e.label for e in labelled(path)] == [1, 0]


def test_other_names_count_as_indices() -> None:
    assert [e.label for e in labelled(data_set([0, 1], ["bad", "good"]))] == [0, 1]


def test_a_name_that_the_model_has_not() -> None:
    """By index, neutral would be positive."""
    data = data_set([0, 1], ["negative", "neutral", "positive"])
    fails(
        "data set, row 1 (counted from 0): label 'neutral' is no class; known: "
        "0 negative, 1 positive.",
        data,
        label_column="label",
        labels=NAMES,
    )


def test_the_label_of_an_unlabelled_split() -> None:
    with pytest.raises(InputError, match="label -1 is no class"):
        labelled(data_set([-1], ["negative", "positive"]))


@pytest.mark.parametrize(
    ("label", "found"), [("2", "'2'"), ("neutral", "'neutral'"), ("", "''")]
)
def test_unknown_labels_in_files(tmp_path, label, found) -> None:
    path = written(tmp_path / "a.csv", f"text,label\nx,1\nx,{label}\n")
    fails(
        f"{path}, line 3: label {found} is no class; known: 0 negative, 1 positive.",
        path,
        label_column="label",
        labels=NAMES,
    )


def test_a_missing_label(tmp_path) -> None:
    path = written(tmp_path / "a.jsonl", '{"text": "x", "label": null}\n')
    with pytest.raises(InputError, match=r"line 1: label None is no class; known: 0"):
        labelled(path)


def test_a_label_with_two_meanings() -> None:
    stars = {index: str(index + 1) for index in range(5)}
    fails(
        "item 0 (counted from 0): label 1 could be several classes; known: 0 1, 1 2, "
        "2 3, 3 4, 4 5.",
        [("x", 1)],
        label_column="label",
        labels=stars,
    )
    same = {0: "0", 1: "1"}
    assert read([("x", "1")], label_column="label", labels=same)[0].label == 1


def test_names_without_the_models_labels() -> None:
    fails(
        "item 0 (counted from 0): label 'positive' is no class; known: indices only; "
        "for names, give labels (the model's config.id2label).",
        ROWS,
        label_column="label",
    )


def test_many_labels_are_cut() -> None:
    many = {index: f"LABEL_{index}" for index in range(1000)}
    with pytest.raises(InputError, match=r"known: 0 LABEL_0, .* \[\.\.\.\]\.$"):
        read([("x", "y")], label_column="label", labels=many)


# Errors of the source

SOURCES = (
    "a .csv, .tsv, .jsonl, .json, .txt or .parquet file, hub:NAME[:CONFIG][:SPLIT], "
    "one split of a datasets data set, or a sequence"
)


def test_errors_of_the_call(tmp_path) -> None:
    """Raised before any ``next``."""
    path = written(tmp_path / "a.xlsx", "x")
    wrong = {
        tmp_path: f"{tmp_path} is a directory",
        path: f"{path} has an unknown extension",
        "a.csv": "a.csv does not exist",
        "A lovely film. " * 99: f"{'A lovely film. ' * 99} does not exist",
        "hub:": "hub: does not exist",
        "hub:a:b:c:d": "hub:a:b:c:d does not exist",
        7: "source is a int",
    }
    whole = datasets.DatasetDict(test=datasets.Dataset.from_dict({}))
    for source, problem in [*wrong.items(), (whole, "source is a DatasetDict")]:
        message = f"{problem}; expected: {SOURCES}."
        with pytest.raises(InputError) as caught:
            read_examples(source)
        assert str(caught.value) == message
    with pytest.raises(InputError, match=r"^limit is 0: give at least 1, or None"):
        read_examples(ROWS, limit=0)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.txt", "a.parquet"])
def test_no_rows(tmp_path, name) -> None:
    path = written(tmp_path / name, "")
    if name == "a.parquet":
        parquet(path, text=[])
    fails(f"{path} holds no rows: give a source with at least one text.", path)


def test_only_a_header_and_an_empty_list(tmp_path) -> None:
    path = written(tmp_path / "a.csv", "text,label\n\n")
    fails(f"{path} holds no rows: give a source with at least one text.", path)
    fails("list holds no rows: give a source with at least one text.", [])


def test_unknown_columns(tmp_path) -> None:
    problem = "no column 'text'; there are: ['texts', 'label']. Did you mean 'texts'?"
    path = written(tmp_path / "a.csv", "texts,label\nx,1\n")
    fails(f"{path}, line 2: {problem}", path)
    path = parquet(tmp_path / "a.parquet", texts=["x"], label=[1])
    fails(f"{path}, row 0 (counted from 0): {problem}", path)
    data = datasets.Dataset.from_dict({"texts": ["x"], "label": [1]})
    fails(f"data set, row 0 (counted from 0): {problem}", data)
    path = written(tmp_path / "a.jsonl", '{"text": "x"}\n{"body": "y"}\n')
    fails(f"{path}, line 2: no column 'text'; there are: ['body'].", path)
    problem = "item 0 (counted from 0): no column 'label'; there are: ['text']."
    fails(problem, ["x"], label_column="label")
    with pytest.raises(InputError, match="no column 'second'"):
        read(["x"], pair_column="second")


def test_wrong_items() -> None:
    message = "item 1 (counted from 0) is 7; expected a str or (text, label)."
    fails(message, ["x", 7])
    fails(message.replace("7;", "('x',);"), ["x", ("x",)])


# Errors in files


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.txt"])
def test_not_utf8(tmp_path, name) -> None:
    first = b'{"text": "\xc3\xa9"}\n' if name == "a.jsonl" else b"text\n"
    path = written(tmp_path / name, first * 2 + b"caf\xe9\n")
    fails(
        f"{path}, line 3: byte 0xe9 at position 4 is not UTF-8: save the file as "
        "UTF-8.",
        path,
    )
    # What is not read is not looked at.
    assert len(read(path, limit=1)) == 1


def test_utf16(tmp_path) -> None:
    path = written(tmp_path / "a.txt", "A film.".encode("utf-16"))
    with pytest.raises(
        InputError, match="line 1: byte 0xff at position 1 is not UTF-8"
    ):
        read(path)


def test_malformed_json(tmp_path) -> None:
    path = written(tmp_path / "a.jsonl", '\n{"text": "x"}\n{"text": \n')
    with pytest.raises(
        InputError, match=r"a.jsonl, line 3: malformed JSON \(Expecting"
    ):
        read(path)
    path = written(tmp_path / "a.json", '[{"text": "x"}]\n')
    message = f"{path}, line 1 is [{{'text': 'x'}}]; expected a JSON object."
    fails(message, path)


@pytest.mark.parametrize("row", ["x,1,2", "x"])
def test_wrong_number_of_fields(tmp_path, row) -> None:
    content = f'text,label\n"a\nb",1\n\n{row}\n'
    path = written(tmp_path / "a.csv", content)
    fields = row.count(",") + 1
    fails(
        f"{path}, line 5 has {fields} fields, the header has 2: quote ',' in fields.",
        path,
    )


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('"open,1\nx,1', "unexpected end of data"),
        ('"a" b,1', "',' expected after '\"'"),
    ],
)
def test_wrong_quotes(tmp_path, row, problem) -> None:
    path = written(tmp_path / "a.csv", f'text,label\n"a\nb",1\n{row}\n')
    fails(
        f"{path}, line 4: malformed row ({problem}): close each quote, and write "
        '"" for one inside a quoted field.',
        path,
    )


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("null", "missing"),
        ("5", "5"),
        ('" \\t"', r"' \t'"),
        ('""', "''"),
        ('["x", 5]', "['x', 5]"),
        ("[]", "[]"),
        ('"\\ud800"', r"'\ud800'"),
    ],
)
def test_values_that_are_no_texts(tmp_path, value, found) -> None:
    path = written(tmp_path / "a.jsonl", f'{{"text": "x"}}\n{{"text": {value}}}\n')
    fails(f"{path}, line 2: text 'text' is {found}; expected words as a str.", path)


def test_blank_texts(tmp_path) -> None:
    path = written(tmp_path / "a.csv", 'text,label\n"a\nb",1\n ,1\n')
    fails(f"{path}, line 4: text 'text' is ' '; expected words as a str.", path)
    path = written(tmp_path / "a.txt", "a\n\nb\n")
    fails(f"{path}, line 2: text 'text' is ''; expected words as a str.", path)
    path = parquet(tmp_path / "a.parquet", text=["a", None])
    place = f"{path}, row 1 (counted from 0)"
    fails(f"{place}: text 'text' is missing; expected words as a str.", path)
    with pytest.raises(InputError, match="text 'label' is ''"):
        read([("x", "")], pair_column="label")


@pytest.mark.parametrize("keep", [0, 8, -100])
def test_damaged_parquet(tmp_path, keep, capfd) -> None:
    path = parquet(tmp_path / "a.parquet", text=["x"] * 100)
    written(path, path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"^.*a\.parquet: cannot be read \(Parquet"):
        read(path)
    assert capfd.readouterr() == ("", "")


# The hub and the library


def test_hub_names(monkeypatch) -> None:
    asked = []

    def load(*arguments, split, **options):
        asked.append((*arguments, split))
        assert options["streaming"]
        return datasets.Dataset.from_dict({"text": ["x"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("hub:imdb", "hub:imdb:train", "hub:nyu-mll/glue:sst2:validation"):
        assert len(read(source)) == 1
    assert asked == [
        ("imdb", None, "test"),
        ("imdb", None, "train"),
        ("nyu-mll/glue", "sst2", "validation"),
    ]


def test_the_hub_cannot_be_reached(monkeypatch) -> None:
    def load(*arguments, **options):
        raise ConnectionError("Couldn't reach 'imdb' on the Hub.\nTry again.")

    monkeypatch.setattr(datasets, "load_dataset", load)
    fails(
        "hub:imdb: the hub cannot be reached (Couldn't reach 'imdb' on the Hub).",
        "hub:imdb",
    )


# Of the library's own reader of csv files, in some of its releases.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_local_folder(tmp_path) -> None:
    written(tmp_path / "test.csv", FILES["a.csv"])
    assert labelled(f"hub:{tmp_path}") == EXPECTED
    fails(
        f"hub:{tmp_path}:dev: cannot be read (Bad split: dev. Available splits: "
        "['test']).",
        f"hub:{tmp_path}:dev",
    )
    with pytest.raises(InputError, match=r"cannot be read \(BuilderConfig 'b' not"):
        read(f"hub:{tmp_path}:b:test")


def test_without_the_library(monkeypatch, tmp_path) -> None:
    path = written(tmp_path / "a.txt", "x")
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = (
        "files and data sets need the datasets library: "
        "pip install captum_globenc[benchmark]"
    )
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        read(path)
    assert labelled(ROWS) == EXPECTED


def test_the_librarys_settings_are_put_back(tmp_path) -> None:
    path = written(tmp_path / "a.txt", "x")
    level = datasets.logging.get_verbosity()
    for change in (datasets.disable_progress_bars, datasets.enable_progress_bars):
        change()
        before = datasets.utils.are_progress_bars_disabled()
        read(path)
        assert datasets.utils.are_progress_bars_disabled() == before
    assert datasets.logging.get_verbosity() == level


def test_lists_of_words_are_joined(tmp_path) -> None:
    path = written(tmp_path / "a.jsonl", '{"text": ["a", "good", "film"]}\n')
    (example,) = read(path)
    assert example.text == "a good film"
