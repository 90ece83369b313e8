"""What each operation puts down on the tape.

A rule takes the tape, the function and its arguments, of which one at least depends on
the tokens. It runs the function, and gives its result; None says that it does not know.
Attention probabilities, deviations of norms, slopes of activations and the activated
factor of a gated feed-forward part are constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_globenc.linearization.functions import function_of
from captum_globenc.linearization.operations import is_dependent, widened
from captum_globenc.linearization.rules import slope_at_zero
from captum_globenc.linearization.spreading.attention import ATTENTION_RULES
from captum_globenc.linearization.spreading.moves import MOVES
from captum_globenc.linearization.spreading.rows import (
    Gather,
    Own,
    Step,
    Unknown,
)
from captum_globenc.linearization.spreading.steps import (
    Linear,
    Norm,
    Scale,
    Shift,
    Sum,
    Total,
)
from captum_globenc.linearization.spreading.tape import (
    Rule,
    Tape,
    flat,
    rows_of,
)
from captum_globenc.recording.attention import transparent

_Function = Callable[..., Any]


def _constant(tape: Tape, func: _Function, *args: Any, **kwargs: Any) -> Any:
    """Attention probabilities and deviations."""
    return func(*args, **kwargs).detach()


def _linear(
    tape: Tape, func: _Function, input: Tensor, weight: Tensor, bias: Any = None
) -> Any:
    if is_dependent(weight) or is_dependent(bias):
        return None
    operand = tape.gather(input)
    result = func(input, weight, bias)
    return tape.note(
        result, Linear(*rows_of(result), tape.where, operand, weight.detach(), bias)
    )


def _addmm(
    tape: Tape, func: _Function, bias: Tensor, x: Tensor, weight: Tensor, **kwargs: Any
) -> Any:
    if not is_dependent(x) or is_dependent(weight) or is_dependent(bias) or kwargs:
        return None
    operand = tape.gather(x)
    result = func(bias, x, weight)
    if bias.shape != result.shape[-1:]:
        return None
    return tape.note(
        result, Linear(*rows_of(result), tape.where, operand, weight.T, bias)
    )


def _layer_norm(
    tape: Tape,
    func: _Function,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *rest: Any,
) -> Any:
    if len(normalized_shape) > 1 or not is_dependent(input):
        return None
    operand, wide = tape.gather(input), widened(input)
    inverse = (wide.var(-1, unbiased=False) + eps).rsqrt().reshape(-1, 1)
    result = func(input, normalized_shape, weight, bias, eps, *rest)
    norm = Norm(*rows_of(result), tape.where, operand, inverse, True, weight, bias)
    return tape.note(result, norm)


def _rms_norm(
    tape: Tape,
    func: _Function,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    if len(normalized_shape) > 1 or not is_dependent(input):
        return None
    operand, wide = tape.gather(input), widened(input)
    least = torch.finfo(input.dtype).eps if eps is None else eps
    inverse = (wide.square().mean(-1) + least).rsqrt().reshape(-1, 1)
    result = func(input, normalized_shape, weight, eps)
    norm = Norm(*rows_of(result), tape.where, operand, inverse, False, weight, None)
    return tape.note(result, norm)


def _activation(
    tape: Tape, func: _Function, input: Tensor, *args: Any, **kwargs: Any
) -> Any:
    key = (func, repr(args), repr(kwargs))
    limit = slope_at_zero(lambda u: func(u.clone(), *args, **kwargs), key)
    if limit is None or not is_dependent(input):
        return None
    u = input.detach().clone()
    known = tape.gather(input)
    result = func(input, *args, **kwargs)
    return tape.note(result, sloped(tape, known, u, result, limit))


def sloped(tape: Tape, operand: Gather, u: Tensor, y: Tensor, limit: float) -> Step:
    """An element-wise function as the slope of the line from the origin.

    Args:
        tape (Tape): on which it is put down.
        operand (Gather): u's elements.
        u (Tensor): what goes in.
        y (Tensor): what comes out.
        limit (float): the slope where u is 0.
    """
    u, is_zero = widened(u), u == 0
    slope = (widened(y) / u.masked_fill(is_zero, 1)).masked_fill_(is_zero, limit)
    rows, width = rows_of(y)
    slope = slope.reshape(rows, width)
    return Scale(rows, width, tape.where, operand, slope, is_activation=True)


def _product(tape: Tape, func: _Function, x: Any, other: Any) -> Any:
    """A product of two factors."""
    if not is_dependent(x):
        x, other = other, x
    if is_dependent(other):
        return _gated(tape, func, x, other)
    return _scaled(tape, func, x, other, False)


def _quotient(tape: Tape, func: _Function, x: Any, other: Any, **kwargs: Any) -> Any:
    if is_dependent(other) or kwargs:
        return None
    return _scaled(tape, func, x, other, True)


def _negative(tape: Tape, func: _Function, x: Tensor) -> Any:
    operand = tape.gather(x)
    result = func(x)
    return tape.note(result, _times(tape, operand, result, -1))


def _gated(tape: Tape, func: _Function, x: Tensor, other: Tensor) -> Any:
    """Two factors that depend on tokens: the activated one is a constant.

    Two functions of the same values are one activation, written out.
    """
    whole = function_of(x).times(function_of(other))
    limit = None if whole is None else slope_at_zero(whole.compute, None)
    if whole is not None and limit is not None:
        operand, u = tape.gather(whole.root), whole.root.detach().clone()
        result = func(x, other)
        return tape.note(result, sloped(tape, operand, u, result, limit))
    steps = [tape.known(x)[0], tape.known(other)[0]]
    active = [isinstance(step, Scale) and step.is_activation for step in steps]
    is_own = all(isinstance(step, Own) for step in steps)
    if sum(active) == 1:
        linear, gate = (other, x) if active[0] else (x, other)
        return _scaled(tape, func, linear, gate.detach(), False, (x, other))
    if not is_own:
        return None
    shape = torch.broadcast_shapes(x.shape, other.shape)
    operands = tape.gather(x, shape), tape.gather(other, shape)
    result = func(x, other)
    step = tape.own(result, Sum(*rows_of(result), tape.where, *operands, 1))
    return result if step is None else tape.note(result, step)


def _scaled(
    tape: Tape,
    func: _Function,
    x: Tensor,
    factor: Any,
    is_divided: bool,
    args: tuple[Any, ...] | None = None,
) -> Any:
    numbers = _numbers(factor, x)
    operand = tape.gather(x, torch.broadcast_shapes(x.shape, numbers.shape))
    if is_divided:
        numbers = numbers.to(torch.promote_types(x.dtype, torch.float32)).reciprocal()
    elif _is_in_place(func):
        numbers = numbers.clone()
    result = func(*(args or (x, factor)))
    return tape.note(result, _times(tape, operand, result, numbers))


def _times(tape: Tape, operand: Gather, result: Tensor, factor: Any) -> Step:
    rows, width = rows_of(result)
    numbers = _spread_out(_numbers(factor, result), result).expand(rows, -1)
    return Scale(rows, width, tape.where, operand, numbers)


def _numbers(constant: Any, beside: Tensor) -> Tensor:
    """A constant as a tensor of numbers, of full precision."""
    if isinstance(constant, Tensor) and constant.is_floating_point():
        return constant.detach()
    return torch.as_tensor(constant, dtype=torch.float64, device=beside.device)


def _spread_out(numbers: Tensor, result: Tensor) -> Tensor:
    """Constants as (rows or 1, width or 1) of a result."""
    width = numbers.shape[-1] if numbers.ndim else 1
    if numbers.numel() == width:
        return numbers.reshape(1, width)
    return numbers.expand(*result.shape[:-1], width).reshape(-1, width)


def _add(tape: Tape, func: _Function, x: Any, other: Any, *, alpha: float = 1) -> Any:
    return None if alpha != 1 else _sum(tape, func, x, other, 1, 1)


def _subtract(
    tape: Tape, func: _Function, x: Any, other: Any, *, alpha: float = 1
) -> Any:
    if alpha != 1:
        return None
    if func.__name__ in ("rsub", "__rsub__"):
        return _sum(tape, func, x, other, -1, 1)
    return _sum(tape, func, x, other, 1, -1)


def _sum(
    tape: Tape, func: _Function, x: Any, other: Any, sign: int, other_sign: int
) -> Any:
    """The sum of sign · x and other_sign · other."""
    shape = torch.broadcast_shapes(*(getattr(v, "shape", ()) for v in (x, other)))
    if is_dependent(x) and is_dependent(other):
        first, second = tape.gather(x, shape), tape.gather(other, shape)
        if sign < 0:
            first, second = second, first
        result = func(x, other)
        joined = Sum(*rows_of(result), tape.where, first, second, sign * other_sign)
        return tape.note(result, joined)
    value, constant = (x, other) if is_dependent(x) else (other, x)
    of_value, of_constant = (sign, other_sign)[:: 1 if value is x else -1]
    operand = tape.gather(value, shape)
    numbers = _numbers(constant, value).clone()
    if of_value < 0:
        negated = -value.detach().expand(shape)
        operand = tape.gather(tape.note(negated, _times(tape, operand, negated, -1)))
    result = func(x, other)
    bias = _spread_out(numbers * of_constant, result)
    rows, width = rows_of(result)
    bias = bias.expand(-1, width)
    return tape.note(result, Shift(rows, width, tape.where, operand, bias))


def _total(
    tape: Tape,
    func: _Function,
    x: Tensor,
    dim: Any = None,
    keepdim: bool = False,
    **kwargs: Any,
) -> Any:
    """A sum or a mean over some dimensions."""
    if dim is None or not is_dependent(x):
        return None
    dims = sorted(d % x.ndim for d in flat([dim]))
    result = func(x, dim, keepdim, **kwargs)
    step, _ = tape.known(x)
    if isinstance(step, Unknown):
        return tape.note(result, step)
    rest = [d for d in range(x.ndim) if d not in dims]
    if (x.ndim - 1 in dims and keepdim) or not rest:
        order, width = [*rest, *dims], 1
    else:
        order, width = [*rest[:-1], *dims, rest[-1]], x.shape[rest[-1]]
    count = torch.Size(x.shape[d] for d in dims).numel()
    places = tape.places(x).permute(order).reshape(-1, width)
    operand = Gather(step, places)
    factor = 1 / count if func.__name__ == "mean" else 1
    is_across = dims != [x.ndim - 1]
    rows = result.numel() // width
    total = Total(rows, width, tape.where, operand, count, factor, is_across)
    return tape.note(result, total)


def _transparent(tape: Tape, func: _Function, *args: Any, **kwargs: Any) -> Any:
    """Functions of torch that are written in Python, seen from inside."""
    with tape:
        return transparent(func)(*args, **kwargs)


def _is_in_place(func: _Function) -> bool:
    name = func.__name__
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


_NAMES: dict[Rule, str] = {
    _constant: (
        "softmax rsqrt sqrt std var norm vector_norm linalg_vector_norm linalg_norm"
    ),
    _linear: "linear",
    _addmm: "addmm",
    _layer_norm: "layer_norm",
    _rms_norm: "rms_norm",
    _activation: (
        "gelu silu relu tanh relu6 elu selu celu leaky_relu mish hardswish softsign "
        "tanhshrink hardtanh relu_ tanh_"
    ),
    _product: "mul __mul__ __rmul__ multiply mul_ __imul__",
    _quotient: "div __truediv__ true_divide divide div_ __itruediv__",
    _negative: "neg __neg__ negative",
    _add: "add __add__ __radd__ add_ __iadd__",
    _subtract: "sub __sub__ __rsub__ sub_ __isub__ rsub subtract",
    _total: "mean sum",
    _transparent: "multi_head_attention_forward normalize",
}
#: Name of an operation → its rule.
RULES: dict[str, Rule] = (
    {name: rule for rule, names in _NAMES.items() for name in names.split()}
    | ATTENTION_RULES
    | MOVES
)
