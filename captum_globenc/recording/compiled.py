"""Compiled models run uncompiled: hooks and modes do not see compiled code."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Compiled parts of a model run uncompiled inside.

    Where there are some, torch's stance is changed for all threads for a while: what
    they compute stays the same but for rounding. Other models are not touched.
    """
    with ExitStack() as undo:
        if any(map(_is_compiled, model.modules())):
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def no_compiler_warning() -> Iterator[None]:
    """Compiled modules warn of global hooks, which do not matter here."""
    with ExitStack() as undo:
        if "torch._dynamo" in sys.modules:
            undo.enter_context(warnings.catch_warnings())
            warnings.filterwarnings(
                "ignore", r"Using `torch\.compile\(module\)` when there"
            )
        yield


def _is_compiled(module: nn.Module) -> bool:
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None
