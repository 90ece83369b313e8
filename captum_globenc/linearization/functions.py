"""Activations that are written out as several operations: GELU with erf, x·sigmoid(x).

What an element-wise operation makes of a tensor is tagged with the tensor and with the
function of it. Where two functions of the same tensor are multiplied, the product is an
activation as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from captum_globenc.linearization.rules import slope_at_zero, through_origin

_TAG = "_captum_globenc_function"
_IN_PLACE = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"}
# They write to a tensor, but no arithmetic's result.
_NO_ARITHMETIC = """
    copy_ zero_ fill_ masked_fill_ masked_scatter_ index_copy_ index_put_ index_fill_
    scatter_ squeeze_ unsqueeze_ transpose_ t_ swapaxes_ swapdims_ resize_ set_ detach_
    requires_grad_ share_memory_ rename_ retain_grad_
""".split()  # noqa: SIM905
Result = TypeVar("Result")


@dataclass(frozen=True)
class Function:
    """An element-wise function of a tensor.

    Args:
        root (Tensor): of what.
        version (int): of the root: it may be written to later.
        compute (Callable): it.
    """

    root: Tensor
    version: int
    compute: Callable[[Tensor], Tensor]

    def then(self, compute: Callable[[Tensor], Tensor]) -> Function:
        """Another function of the result."""
        inner = self.compute
        return Function(self.root, self.version, lambda u: compute(inner(u)))

    def combined(
        self, other: Function, combine: Callable[[Tensor, Tensor], Tensor]
    ) -> Function | None:
        """A function of two functions of the same tensor; None: of two tensors."""
        if self.root is not other.root:
            return None
        one, two = self.compute, other.compute
        return Function(self.root, self.version, lambda u: combine(one(u), two(u)))

    def times(self, other: Function) -> Function | None:
        """The product with a function of the same tensor; None: of another one."""
        return self.combined(other, torch.mul)

    def through_origin(self, key: tuple[object, ...] | None) -> Tensor | None:
        """Its values, with the slope from the origin as gradient.

        Returns:
            *Tensor*; None where f(0) is not 0, so that there is no such slope.
        """
        limit = slope_at_zero(self.compute, key, self.root.device)
        if limit is None:
            return None
        return self.tag(through_origin(self.root, self.compute, limit))

    def tag(self, result: Tensor) -> Tensor:
        """Take note of what a tensor is."""
        setattr(result, _TAG, (self, result._version))
        return result


def name_of(func: Callable[..., Any]) -> str:
    """The name of an operation."""
    return getattr(func, "__name__", "")


def writes_in_place(func: Callable[..., Any]) -> bool:
    """Whether an operation writes the result of arithmetic to its first argument."""
    name = name_of(func)
    return name in _IN_PLACE or (
        name.endswith("_") and not name.endswith("__") and name not in _NO_ARITHMETIC
    )


def function_of(value: Tensor) -> Function:
    """What is known of how a tensor was made: at least that it is itself."""
    function, version = getattr(value, _TAG, (None, 0))
    if (
        function is None
        or version != value._version
        or function.version != function.root._version
    ):
        return Function(value, value._version, lambda u: u)
    return function  # type: ignore[no-any-return]


def forget(value: Tensor) -> Tensor:
    """From here on it is itself: what is made of it leads through it."""
    value.__dict__.pop(_TAG, None)
    return value


def tagged(
    result: Result,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Result:
    """The result, tagged where the operation is element-wise in one tensor.

    Args:
        result (Tensor): what the operation gave.
        func (Callable): the operation.
        args (tuple): its arguments: one dependent tensor beside numbers, or several
            functions of the same tensor.
        kwargs (dict): likewise, by name.
    """
    if not isinstance(result, Tensor) or not result.requires_grad:
        return result
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    functions = [function_of(tensor) for tensor in tensors if tensor.requires_grad]
    others = [tensor for tensor in tensors if not tensor.requires_grad]
    if not functions or any(tensor.ndim for tensor in others):
        return result
    root, version = functions[0].root, functions[0].version
    if any(function.root is not root for function in functions):
        return result
    if root.shape != result.shape or writes_in_place(func):
        return result

    parts = [
        function_of(arg).compute
        if isinstance(arg, Tensor) and arg.requires_grad
        else lambda _, arg=arg: arg
        for arg in args
    ]

    def compute(u: Tensor) -> Tensor:
        return func(*(part(u) for part in parts), **kwargs)  # type: ignore[no-any-return]

    Function(root, version, compute).tag(result)
    return result
