"""What is said of a model's name and classes before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from captum_globenc import InputError, demo
from captum_globenc.comparison.checks import (
    check_model_name,
    class_index,
    labels_in,
)

KIND = {"architectures": ["BertForSequenceClassification"]}


@pytest.mark.parametrize("name", ["bert-base-uncased", "owner/model.v1_0", "a/b"])
def test_names_of_the_hub_are_left_to_the_hub(name: str) -> None:
    check_model_name(name)


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./none", "../none", "a/b/c", "~/model", "", "a b"]
)
def test_what_can_only_be_a_folder(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    if name:
        with pytest.raises(InputError, match="there is no such folder"):
            check_model_name(name)
    else:  # The folder that one is in.
        with pytest.raises(InputError, match=r"holds no config\.json"):
            check_model_name(name)


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no config\.json"):
        check_model_name(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text("{}")
    check_model_name(str(tmp_path))
    with pytest.raises(InputError, match="that is no folder"):
        check_model_name(str(file))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({**KIND, "id2label": {"1": "b", "0": "a"}}, ["a", "b"]),
        ({**KIND, "id2label": {"0": "a", "2": "c"}}, None),
        ({"id2label": {"0": "a"}}, None),
        ({"architectures": ["BertForTokenClassification"], "id2label": {}}, None),
        ({"architectures": None, "id2label": {"0": "a"}}, None),
        (KIND, None),
        ({**KIND, "id2label": None}, None),
        ([], None),
    ],
    ids=str,
)
def test_labels_of_a_folder(tmp_path: Path, config, expected) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert labels_in(tmp_path) == expected


def test_labels_that_cannot_be_read(tmp_path: Path) -> None:
    assert labels_in(tmp_path) is None
    (tmp_path / "config.json").write_text("{")
    assert labels_in(tmp_path) is None


def test_the_embedded_classifier() -> None:
    labels = labels_in(demo.FOLDER)
    assert labels == ["negative", "positive"]
    assert class_index("POSITIVE", labels) == class_index("1", labels) == 1
    assert class_index(-1, labels) == 1
