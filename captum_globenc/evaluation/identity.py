"""What tells one run of the benchmark from another."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from captum_globenc.comparison.methods import methods_named
from captum_globenc.evaluation.data import Example


def source_of(method: Any) -> str | None:
    """What tells one method of a user from another: a hash of its source code."""
    if isinstance(method, str):
        return None
    function = getattr(method, "forward_func", method)
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):  # a model, or typed in
        source = type(function).__qualname__
    return hashed([source.encode()])


def description(method: Any) -> str:
    """How a method becomes one score per token, for the report."""
    if isinstance(method, str):
        return next(iter(methods_named(method).values())).reduction
    if hasattr(method, "attribute"):
        inner = getattr(method, "attribution_method", method)
        around = "" if inner is method else f"{type(method).__name__} of "
        return f"{around}{type(inner).__name__}; sum over hidden"
    return f"the function {getattr(method, '__qualname__', type(method).__name__)}"


def bytes_of(model: PreTrainedModel) -> Iterator[bytes]:
    """Names and values of all the weights."""
    for name, values in model.state_dict().items():
        yield name.encode()
        yield values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def hashed(parts: Iterable[bytes]) -> str:
    """Twelve characters that stand for these bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:12]


def data_name(texts: object, first: Example) -> str:
    """What tells one set of texts from another, without a whole path."""
    if isinstance(texts, str | Path) and os.path.isfile(texts):
        with open(texts, "rb") as file:
            return f"{Path(texts).name} ({hashed(iter(lambda: file.read(2**20), b''))})"
    if isinstance(texts, str | Path):
        return str(texts)
    if isinstance(texts, list | tuple):
        whole = repr(texts).encode("utf-8", "replace")
        return f"{len(texts)} texts ({hashed([whole])})"
    # A stream does not know what it holds: its first text has to do.
    known = getattr(texts, "_fingerprint", None) or hashed([first.text.encode()])
    return f"{type(texts).__name__} ({known})"
