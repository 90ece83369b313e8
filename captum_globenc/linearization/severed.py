"""Values that depend on the inputs, and whose gradient has been cut off.

``x + f(x).detach()`` depends on x in two ways, and only one has a gradient. No sum of
relevance finds that: the other way looks like a constant. So what has been detached is
followed, until it meets a value that depends on the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from captum_globenc.errors import UnsupportedModelError
from captum_globenc.linearization.functions import name_of

_TAG = "_captum_globenc_severed"
_CUTS = {torch.detach, torch.Tensor.detach, torch.Tensor.data.__get__}  # type: ignore[attr-defined]
#: What leaves torch, to come back or not.
LEAVES_TORCH = {"numpy", "__array__", "__deepcopy__"}
#: Names of operations that begin it.
SEVERS = {"detach", "__get__", *LEAVES_TORCH}
# Tensors made of what is not one, such as an array.
_FACTORIES = {torch.tensor, torch.as_tensor, torch.asarray}


class Severed:
    """Follows what is detached in one run."""

    def __init__(self) -> None:
        #: Something has been detached.
        self.is_active = False
        # Something has been made an array.
        self._has_left = False

    def follow(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        """Look at an operation that has run: all, once something has been detached.

        Raises:
            UnsupportedModelError: what has been detached is used beside a value that
                depends on the inputs.
        """
        if func in _CUTS and _is_computed(args[0]):
            self.is_active = True
            _tag(result)
        elif name_of(func) in LEAVES_TORCH and (
            _is_computed(args[0]) or _is_cut(args[0])
        ):
            self.is_active = self._has_left = True
            _tag(result)
        elif self._has_left and func in _FACTORIES:
            if not isinstance(args[0], int | float):
                _tag(result)
        elif self.is_active:
            self._look(func, args, kwargs, result)

    def _look(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        given = list(_numbers((*args, *kwargs.values())))
        if not any(_is_cut(v) or (self._has_left and _is_foreign(v)) for v in given):
            return
        if any(map(_is_computed, given)):
            raise UnsupportedModelError(
                "a value that depends on the inputs was detached (by detach, data or "
                f"numpy) and is used again, in {name_of(func)!r}: the relevance of "
                "what is made of it would be lost. Take the detaching away."
            )
        for value in _numbers((result,)):
            _tag(value)


def _is_computed(value: Any) -> bool:
    """Whether it is a result with a gradient, and no parameter."""
    return isinstance(value, Tensor) and value.requires_grad and not value.is_leaf


def _is_cut(value: Any) -> bool:
    return hasattr(value, _TAG)


def _is_foreign(value: Tensor) -> bool:
    """Whether its memory is an array's."""
    is_made = value.requires_grad or isinstance(value, nn.Parameter)
    return not is_made and not value.untyped_storage().resizable()


def _tag(value: Any) -> None:
    if isinstance(value, Tensor):
        setattr(value, _TAG, True)


def _numbers(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            if value.is_floating_point():
                yield value
        elif isinstance(value, tuple | list):
            yield from _numbers(value)
