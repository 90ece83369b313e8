"""What a head makes of hidden states, followed by their gradients.

Hidden states are handed to the head as leaves. Here its operations run with gradients,
whatever grad mode it asks for, and what would lose them is noted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Where values leave torch, so that no gradient follows them.
_EXITS = {"numpy", "__array__", "item", "tolist", "__float__", "__int__", "detach_"}
# Steps have a gradient of zero, and integers none.
_STEPS = {"round", "floor", "ceil", "trunc", "fix", "sign", "floor_divide"}
_CASTS = {"long", "int", "short", "to", "type", "view", "quantize_per_tensor"}
# Functions that take the shape of a tensor and not its values.
_SHAPES = {"new_zeros", "new_ones", "new_full", "new_empty", "empty", "zeros", "ones"}
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class HeadFollower:
    """Runs a head's operations so that gradients lead to all that it reads.

    Args:
        inputs (Tensor): what ``forward_func`` was given.
        token_weights (Tensor or None): the encoder's table of tokens.
        has_others (bool): the caller has named this encoder among several, and knows
            that others read the inputs, too.
        originals (dict[int, tuple[Tensor, Tensor]]): id of a layer's output → it, and
            what was handed on in its place.
    """

    def __init__(
        self,
        inputs: Tensor,
        token_weights: Tensor | None,
        has_others: bool,
        originals: dict[int, tuple[Tensor, Tensor]],
    ) -> None:
        #: What the head reads that no gradient follows.
        self.unfollowed: list[str] = []
        #: Whether values were used without their gradient.
        self.has_left_torch = False
        #: The input of the first layer, once it is known.
        self.hidden: Tensor | None = None
        #: The same as a leaf, where the head reads it.
        self.lowest: Tensor | None = None
        self._inputs = inputs
        self._has_others = has_others
        self._originals = originals
        self._token_weights = token_weights
        self._made: dict[int, weakref.ref[Tensor]] = {}
        self._detached: dict[int, tuple[Tensor, Tensor]] = {}

    def note(self, result: Any) -> Any:
        """Remember what an operation inside the encoder made."""
        # One tensor, as a rule: this runs for every operation of the model.
        tensors = (result,) if type(result) is Tensor else _tensors(result)
        for tensor in tensors:
            self._made[id(tensor)] = weakref.ref(tensor)
        return result

    def run(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run an operation of the head."""
        if not torch.is_grad_enabled():
            # What a closure's own modes restored when they ended.
            torch._C._set_grad_enabled(True)
        name, known = getattr(func, "__name__", ""), len(self.unfollowed)
        args = tuple(map(self._followed, args))
        kwargs = {key: self._followed(value) for key, value in kwargs.items()}
        first = args[0] if args else None
        follows = isinstance(first, Tensor) and first.requires_grad
        if follows and (name == "detach" or func == _DATA):
            alias: Tensor = func(*args, **kwargs)
            self._detached[id(alias)] = (alias, args[0])
            return alias
        if follows and name in _EXITS:
            self.has_left_torch = True
            return func(first.detach(), *args[1:], **kwargs)  # type: ignore[union-attr]
        if func in (nn.functional.embedding, nn.functional.one_hot):
            self._look_up(*args, **kwargs)
        result = func(*args, **kwargs)
        is_value = name in _EXITS or any(True for _ in _tensors(result))
        if result is not None and not is_value:
            del self.unfollowed[known:]  # A shape or dtype is no value.
        if follows and self._is_severed(name, result):
            self.has_left_torch = True
        return result

    def _is_severed(self, name: str, result: Any) -> bool:
        """Whether values are handed on without their gradient."""
        if name in _STEPS:
            return True
        if name in _SHAPES or name.endswith("_like") or not isinstance(result, Tensor):
            return False
        return not result.requires_grad and (
            result.is_floating_point() or name in _CASTS
        )

    def _look_up(
        self, input: Tensor, weight: Tensor | None = None, *_: Any, **__: Any
    ) -> None:
        if weight is not None and weight is self._token_weights:
            self.unfollowed.append("tokens by themselves, as a decoder does")
        elif (
            not self._has_others
            and input.shape == self._inputs.shape
            and torch.equal(input, self._inputs.to(input.device))
        ):
            self.unfollowed.append("the inputs by themselves, past the encoder")

    def _followed(self, value: Any) -> Any:
        """The same argument, with its gradient."""
        if type(value) in (tuple, list):
            return type(value)(map(self._followed, value))
        if not isinstance(value, Tensor):
            return value
        for known in (self._detached, self._originals):
            if id(value) in known:
                return known[id(value)][1]
        if value is self.hidden:
            if self.lowest is None:
                self.lowest = value.detach().requires_grad_()
            return self.lowest
        made = self._made.get(id(value))
        if made is not None and made() is value and value.is_floating_point():
            self.unfollowed.append("values that are made inside the encoder")
        elif value.is_inference():
            return value.clone()  # Those have no gradients.
        elif self._is_input(value):
            self.unfollowed.append("the inputs by themselves, past the encoder")
        return value

    def _is_input(self, value: Tensor) -> bool:
        return (
            value.is_floating_point()
            and not value.requires_grad
            and _address(value) == _address(self._inputs)
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
