r"""What operations hand back in the backward pass; what they compute stays the same.

Gradient × input in a network of these rules is relevance propagation: the relevance of
a value :math:`x` is :math:`\langle \partial y / \partial x, x \rangle`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_globenc.encoders.weights import working_dtype

_SLOPES_AT_ZERO: dict[tuple[object, ...], float | None] = {}


class Ledger:
    """Relevance that ends inside the network, of one run.

    A linear network hands all relevance on to its inputs and its constants. Softmax is
    not linear and keeps some.
    """

    def __init__(self) -> None:
        #: Copies of biases that take a gradient.
        self.biases: list[Tensor] = []
        #: Relevance that other constants or softmax took, a number each.
        self.taken: list[Tensor] = []

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """The same bias, taking a gradient of its own."""
        if bias is None or bias.requires_grad:
            return bias
        copy = bias.clone() if bias.is_inference() else bias.detach()
        self.biases.append(copy.requires_grad_())
        return self.biases[-1]


def share(
    value: Tensor,
    factor: float,
    ledger: Ledger | None = None,
    *,
    times: float = 1,
    masked: bool = False,
) -> Tensor:
    """The same value, with this part of its gradient.

    With a ledger, what is handed back is taken off it: together with :func:`entry` of
    the result, what an operation keeps for itself. It counts so many times, where other
    operands are known to get the same. Among masked values are some of minus infinity,
    which have no gradient.
    """
    return _Share.apply(value, factor, ledger, times, masked)  # type: ignore[no-any-return, no-untyped-call]


def entry(result: Tensor, ledger: Ledger, *, times: float = 1) -> Tensor:
    """The same value; this part of the relevance that arrives goes to the ledger."""
    return _Entry.apply(result, ledger, times)  # type: ignore[no-any-return, no-untyped-call]


def through_origin(
    u: Tensor, compute: Callable[[Tensor], Tensor], limit: float
) -> Tensor:
    """An element-wise f(u) whose gradient is the slope of the line from the origin.

    Args:
        u (Tensor): of any shape.
        compute (Callable): u → f(u).
        limit (float): the slope where u is 0.
    """
    return _Slope.apply(u, compute, limit)  # type: ignore[no-any-return, no-untyped-call]


def normalized(
    x: Tensor,
    dims: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    inverse: Tensor,
    is_centred: bool,
    compute: Callable[[Tensor], Tensor],
) -> Tensor:
    """A LayerNorm or RMSNorm whose deviation is a constant; the mean stays linear.

    Args:
        x (Tensor): (..., hidden).
        dims (tuple[int, ...]): the dimensions that are normalised, from the last.
        weight (Tensor or None): of these dimensions.
        bias (Tensor or None): likewise.
        inverse (Tensor): 1 / deviation, (..., 1).
        is_centred (bool): the mean is subtracted.
        compute (Callable): x → the norm's output.
    """
    return _Norm.apply(x, bias, weight, inverse, dims, is_centred, compute)  # type: ignore[no-any-return, no-untyped-call]


def of_token(result: Tensor, input: Tensor, bias: Tensor, ledger: Ledger) -> Tensor:
    """The same value; the relevance of the bias in it goes to the vectors of the input.

    Each vector gets what its own copy of the bias has.

    Args:
        result (Tensor): (..., size), what a linear map with this bias gave.
        input (Tensor): (..., hidden), of what.
        bias (Tensor): (size).
        ledger (Ledger): of the run.
    """
    return _OfToken.apply(result, input, bias, ledger)  # type: ignore[no-any-return, no-untyped-call]


def constant(result: Tensor, part: Tensor, ledger: Ledger) -> Tensor:
    """The same value; the relevance of this constant part of it is put down."""
    return _Constant.apply(result, part, ledger)  # type: ignore[no-any-return, no-untyped-call]


def replaced(value: Tensor, by: Tensor, ledger: Ledger) -> Tensor:
    """Another value in its place; gradients pass."""
    with torch._C.DisableTorchFunction():
        return _Replaced.apply(value, by, ledger)  # type: ignore[no-any-return, no-untyped-call]


def valued(value: Tensor, same: Tensor) -> Tensor:
    """A value that something else has computed; gradients go where ``same`` is from.

    Args:
        value (Tensor): a constant.
        same (Tensor): the same up to rounding.
    """
    return _Valued.apply(same, value)  # type: ignore[no-any-return, no-untyped-call]


def take(result: Tensor, part: Tensor, ledger: Ledger) -> None:
    """Put down the relevance of this constant part of a sum.

    Args:
        result (Tensor): the sum, as it is now.
        part (Tensor): what broadcasts to its shape.
        ledger (Ledger): of the run.
    """
    result.register_hook(lambda g: ledger.taken.append(_relevance(g, part)))


def slope_at_zero(
    compute: Callable[[Tensor], Tensor],
    key: tuple[object, ...] | None,
    device: torch.device | None = None,
) -> float | None:
    """f'(0), the limit of f(u) / u; None where f(0) is not 0, so that there is none.

    Args:
        compute (Callable): u → f(u).
        key (tuple or None): names the function, whose slope is then kept.
        device (torch.device, optional): where it can be computed. Default: the CPU.
    """
    if key is not None and key in _SLOPES_AT_ZERO:
        return _SLOPES_AT_ZERO[key]
    with torch.enable_grad():
        u = torch.zeros(1, dtype=torch.float64, device=device, requires_grad=True)
        y = compute(u)
        limit = None
        if y.numel() == 1 and y.item() == 0 and y.requires_grad:
            (slope,) = torch.autograd.grad(y.sum(), u)
            limit = slope.item() if math.isfinite(slope.item()) else None
    if key is not None:
        _SLOPES_AT_ZERO[key] = limit
    return limit


def _relevance(gradient: Tensor, value: Tensor) -> Tensor:
    """What a value has of it: their product's sum."""
    wide = working_dtype(gradient.dtype)
    return (gradient.to(wide) * value.to(wide)).sum()


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        factor: float,
        ledger: Ledger | None,
        times: float,
        masked: bool,
    ) -> Tensor:
        ctx.factor, ctx.ledger, ctx.times, ctx.masked = factor, ledger, times, masked
        if ledger is not None:
            ctx.save_for_backward(value)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if ctx.factor != 1:
            gradient = gradient * ctx.factor
        if ctx.ledger is not None:
            (value,) = ctx.saved_tensors
            if ctx.masked:
                value = value.masked_fill(gradient == 0, 0)
            ctx.ledger.taken.append(-ctx.times * _relevance(gradient, value))
        return gradient, None, None, None, None


class _Entry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, ledger: Ledger, times: float) -> Tensor:
        ctx.ledger, ctx.times = ledger, times
        ctx.save_for_backward(result)
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        relevance = _relevance(gradient, *ctx.saved_tensors)
        ctx.ledger.taken.append(ctx.times * relevance)
        return gradient, None, None


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, compute: Callable[[Tensor], Tensor], limit: float
    ) -> Tensor:
        y = compute(u)
        is_zero = u == 0
        slope = y / u.masked_fill(is_zero, 1)
        ctx.save_for_backward(slope.masked_fill_(is_zero, limit))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        return gradient * slope, None, None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        weight: Tensor | None,
        inverse: Tensor,
        dims: tuple[int, ...],
        is_centred: bool,
        compute: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ctx.dims, ctx.is_centred, ctx.dtype = dims, is_centred, x.dtype
        ctx.save_for_backward(weight, inverse)
        return compute(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        weight, inverse = ctx.saved_tensors
        of_bias = None
        if ctx.needs_input_grad[1]:
            leading = tuple(range(gradient.ndim - len(ctx.dims)))
            of_bias = gradient.sum(leading) if leading else gradient
        of_x = gradient.to(inverse.dtype)
        if weight is not None:
            of_x = of_x * weight
        if ctx.is_centred:
            of_x = of_x - of_x.mean(ctx.dims, keepdim=True)
        of_x = (of_x * inverse).to(ctx.dtype)
        return of_x, of_bias, None, None, None, None, None


class _OfToken(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, result: Tensor, input: Tensor, bias: Tensor, ledger: Ledger
    ) -> Tensor:
        ctx.ledger = ledger
        ctx.save_for_backward(input, bias)
        return result.clone()  # The model may write to it.

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        input, bias = ctx.saved_tensors
        size = input.square().sum(-1, keepdim=True)
        share = (gradient * bias).sum(-1, keepdim=True).masked_fill(size == 0, 0)
        ctx.ledger.taken.append(-share.sum())
        of_input = share * input / size.masked_fill(size == 0, 1)
        return gradient, of_input, None, None


class _Constant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, part: Tensor, ledger: Ledger) -> Tensor:
        ctx.ledger = ledger
        ctx.save_for_backward(part)
        return result.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.ledger.taken.append(_relevance(gradient, *ctx.saved_tensors))
        return gradient, None, None


class _Replaced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, by: Tensor, ledger: Ledger) -> Tensor:
        ctx.ledger = ledger
        ctx.save_for_backward(by - value)
        return by.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.ledger.taken.append(_relevance(gradient, *ctx.saved_tensors))
        return gradient, None, None


class _Valued(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, same: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None


def _node_of(function: type[torch.autograd.Function]) -> type:
    return function._backward_cls


#: Kinds of nodes in the graph of a run, by the function above that makes them.
SHARE, ENTRY, SLOPE = map(_node_of, (_Share, _Entry, _Slope))
OWN = frozenset(
    map(
        _node_of,
        (_Share, _Entry, _Slope, _Norm, _OfToken, _Constant, _Replaced, _Valued),
    )
)
