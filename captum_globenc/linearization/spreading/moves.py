"""Operations that move elements, and what they put down on the tape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_globenc.linearization.operations import is_dependent
from captum_globenc.linearization.spreading.rows import Step, Unknown, size_of
from captum_globenc.linearization.spreading.steps import Joined
from captum_globenc.linearization.spreading.tape import (
    Rule,
    Tape,
    flat,
    rows_of,
)

_Function = Callable[..., Any]


def _move(tape: Tape, func: _Function, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Elements are moved: so are their places."""
    if not is_dependent(x) or any(isinstance(arg, torch.dtype) for arg in args):
        return None
    result = func(x, *args, **kwargs)
    if not any(map(is_dependent, flat(result))):
        return result
    step, _ = tape.known(x)
    if isinstance(step, Unknown):
        for value in flat(result):
            tape.note(value, step)
        return result
    moved = func(tape.places(x).contiguous(), *args, **kwargs)
    for value, places in zip(flat(result), flat(moved)):
        if places.shape == value.shape:
            tape.note(value, step, places)
    return result


def _attribute(tape: Tape, func: _Function, x: Any, *args: Any) -> Any:
    """An attribute such as x.mT, which moves elements, or x.shape."""
    return _move(tape, func, x, *args)


def _same(tape: Tape, func: _Function, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The same numbers, in another dtype or memory."""
    if not is_dependent(x):
        return None
    result = func(x, *args, **kwargs)
    if result is x or not is_dependent(result):
        return result
    return tape.note(result, *tape.known(x))


def _unchanged(tape: Tape, func: _Function, x: Any, *args: Any, **kwargs: Any) -> Any:
    """The same numbers, as a matter of fact: dropout in evaluation mode, clamps."""
    if not is_dependent(x):
        return None
    known = tape.known(x)
    before = x.detach().clone()
    result = func(x, *args, **kwargs)
    return tape.note(result, *known) if torch.equal(result, before) else result


def _join(tape: Tape, func: _Function, *args: Any, **kwargs: Any) -> Any:
    """Elements of several values in one: cat, stack, where, masked_fill."""
    if any(name not in ("dim", "axis") for name in kwargs):
        return None
    values: list[Step | Tensor] = []
    has_dimension = func.__name__ not in ("where", "masked_fill")

    def numbered(value: Any) -> Any:
        """Places among all values, one behind the other."""
        if type(value) in (tuple, list):
            return type(value)(map(numbered, value))
        if isinstance(value, int) and has_dimension:
            return value
        if isinstance(value, int | float):
            value = torch.tensor(float(value))
        if not isinstance(value, Tensor) or value.dtype == torch.bool:
            return value
        start = sum(map(size_of, values))
        if is_dependent(value):
            values.append(tape.known(value)[0])
            return tape.places(value) + start
        values.append(value.detach().clone())
        return (
            torch.arange(value.numel(), device=value.device).view(value.shape) + start
        )

    steps = [tape.known(arg)[0] for arg in flat(args) if is_dependent(arg)]
    unknown = next((step for step in steps if isinstance(step, Unknown)), None)
    result = func(*args, **kwargs)
    if unknown is not None:
        return tape.note(result, unknown)
    index = func(*map(numbered, args), **kwargs)
    if index.shape != result.shape:
        return result
    start = 0
    for value in values:
        stop = start + size_of(value)
        if isinstance(value, Step) and bool(((index >= start) & (index < stop)).all()):
            return tape.note(result, value, index - start)
        start = stop
    rows, width = rows_of(result)
    joined = Joined(rows, width, tape.where, index.reshape(rows, width), tuple(values))
    return tape.note(result, joined)


_NAMES: dict[Rule, str] = {
    _move: (
        "view reshape view_as reshape_as transpose permute t swapaxes swapdims movedim "
        "moveaxis flatten unflatten squeeze unsqueeze expand expand_as repeat tile "
        "repeat_interleave __getitem__ select narrow index_select gather flip roll "
        "take_along_dim chunk split split_with_sizes tensor_split unbind unfold "
        "ravel diagonal masked_select"
    ),
    _attribute: "__get__",
    _same: (
        "to float double half bfloat16 type type_as contiguous clone cpu cuda positive "
        "requires_grad_ alias"
    ),
    _unchanged: (
        "dropout dropout_ dropout1d dropout2d alpha_dropout feature_dropout clamp "
        "clamp_ clip nan_to_num"
    ),
    _join: "cat concat concatenate stack where masked_fill",
}
#: Name of an operation → its rule.
MOVES: dict[str, Rule] = {
    name: rule for rule, names in _NAMES.items() for name in names.split()
}
