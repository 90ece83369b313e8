"""Evaluation mode for a while, also where several threads ask for it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_LOCK = threading.Lock()
# Modules that were in training mode → how many contexts hold them in evaluation mode.
_HELD: dict[nn.Module, int] = {}


def _restore_all() -> None:
    _LOCK.release()
    for module in _HELD:
        module.training = True
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    # The thread that holds them does not exist in a forked child.
    os.register_at_fork(
        before=_LOCK.acquire,
        after_in_parent=_LOCK.release,
        after_in_child=_restore_all,
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout inside; every module's mode is put back.

    A module that is in evaluation mode already is not touched.
    """
    with _LOCK:
        held = [
            module for module in model.modules() if module.training or module in _HELD
        ]
        for module in held:
            _HELD[module] = _HELD.get(module, 0) + 1
            # Not module.train(): it would also switch this module's parts.
            module.training = False
    try:
        yield
    finally:
        with _LOCK:
            for module in held:
                if module not in _HELD:
                    continue  # A forked child has let go of it.
                _HELD[module] -= 1
                if not _HELD[module]:
                    del _HELD[module]
                    module.training = True
