"""Compiled models run uncompiled: hooks and modes do not see compiled code."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

_LOCK = threading.Lock()
_WARNING = r"Using `torch\.compile\(module\)` when there"


class _Stance:
    """Torch's stance, one for all threads: the first user sets it, the last ends it."""

    def __init__(self) -> None:
        self.users = 0
        self.undo = ExitStack()


_STANCE = _Stance()


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Compiled parts of a model run uncompiled inside.

    Where there are some, torch's stance is changed for all threads for a while: what
    they compute stays the same but for rounding. Other models are not touched.
    """
    if not any(map(_is_compiled, model.modules())):
        yield
        return
    with _LOCK:
        if not _STANCE.users:
            _STANCE.undo.enter_context(torch.compiler.set_stance("force_eager"))
        _STANCE.users += 1
    try:
        yield
    finally:
        with _LOCK:
            _STANCE.users -= 1
            if not _STANCE.users:
                _STANCE.undo.close()


def ignore_compiler_warning() -> None:
    """Compiled modules warn of global hooks, which do not matter here."""
    known = any(
        message is not None and message.pattern == _WARNING
        for _, message, *_ in warnings.filters
    )
    if "torch._dynamo" in sys.modules and not known:
        warnings.filterwarnings("ignore", _WARNING)


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None
