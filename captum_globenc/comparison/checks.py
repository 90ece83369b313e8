"""What can be said of a text, a class and a model's name before anything is loaded.

Nothing here needs torch, so that the command line answers a mistake at once.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from captum_globenc.errors import InputError, did_you_mean

_MOST_LABELS_SHOWN = 20
# NAME or OWNER/NAME, as models on the Hugging Face hub are called.
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_CLASSIFIER = "ForSequenceClassification"


def check_text(text: object) -> None:
    """Raise InputError where there is no text to explain."""
    if not isinstance(text, str):
        raise InputError(f"text must be a str, got {type(text).__name__}: {text!r}")
    if not text.strip():
        raise InputError(f"the text is empty ({text!r}): give at least one word.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        wrong = text[error.start]
        raise InputError(
            f"the text is not valid Unicode: it holds {wrong!r}."
        ) from None


def class_index(target: object, labels: Sequence[str]) -> int:
    """The class that is meant.

    Args:
        target (str or int): an index, or the name of a label (in any case, where that
            is unambiguous) or of an index.
        labels (sequence of str): the names of the classes.

    Raises:
        InputError: there is none of that name or index.
    """
    if not isinstance(target, str):
        return _index_of(target, len(labels))
    folded = [label.casefold() for label in labels]
    if target in labels:
        return labels.index(target)
    if folded.count(target.casefold()) == 1:
        return folded.index(target.casefold())
    known = ", ".join(
        f"{index} {label}" for index, label in enumerate(labels[:_MOST_LABELS_SHOWN])
    )
    known += ", ..." if len(labels) > _MOST_LABELS_SHOWN else ""
    try:
        index = int(target)
    except ValueError:
        hint = did_you_mean(target, list(labels))
        raise InputError(f"unknown label {target!r}; known: {known}.{hint}") from None
    if not 0 <= index < len(labels):
        raise InputError(
            f"target {target!r} is outside the model's {len(labels)} labels: {known}."
        )
    return index


def _index_of(target: Any, classes: int) -> int:
    """As Captum counts: from the end where negative; tensors of one integer, too."""
    try:
        index = operator.index(target)
    except TypeError:
        raise InputError(
            f"target must be a label or an index, got {type(target).__name__}: "
            f"{target!r}."
        ) from None
    if not -classes <= index < classes:
        raise InputError(f"target {index} is outside the model's {classes} labels.")
    return index % classes


def check_model_name(name: str) -> None:
    """Raise InputError where a model's name is neither a folder nor one of the hub.

    Args:
        name (str): a folder, or a name on the Hugging Face hub, which is not asked.
    """
    folder = Path(name)
    if folder.is_dir():
        configs = ("config.json", "adapter_config.json")
        if not any((folder / config).is_file() for config in configs):
            raise InputError(
                f"model {name!r} cannot be loaded: the folder holds no config.json."
            )
    elif folder.exists() or not _HUB_NAME.fullmatch(name):
        found = "that is no folder" if folder.exists() else "there is no such folder"
        raise InputError(
            f"model {name!r}: {found}; give one that holds config.json, or a name on "
            "the Hugging Face hub."
        )


def labels_in(folder: Traversable) -> list[str] | None:
    """The labels of the sequence classifier that is saved in a folder.

    Returns:
        *list* of the names by index; None where the folder's ``config.json`` does not
        say that it is such a classifier, and which classes it has.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = {int(index): str(name) for index, name in config["id2label"].items()}
        (kind,) = config["architectures"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # What is wrong with it is said when it is loaded.
    if not kind.endswith(_CLASSIFIER) or sorted(names) != list(range(len(names))):
        return None
    return [names[index] for index in range(len(names))]
