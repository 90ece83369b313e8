"""Activations that are written out as several operations: GELU with erf, x·sigmoid(x).

What an element-wise operation makes of a tensor is tagged with the tensor and with the
function of it. Where two functions of the same tensor are multiplied, the product is an
activation as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from captum_globenc.linearization.rules import slope_at_zero, through_origin

_TAG = "_captum_globenc_function"
_IN_PLACE = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"}
Result = TypeVar("Result")


@dataclass(frozen=True)
class Function:
    """An element-wise function of a tensor.

    Args:
        root (Tensor): of what.
        compute (Callable): it.
    """

    root: Tensor
    compute: Callable[[Tensor], Tensor]

    def then(self, compute: Callable[[Tensor], Tensor]) -> Function:
        """Another function of the result."""
        inner = self.compute
        return Function(self.root, lambda u: compute(inner(u)))

    def times(self, other: Function) -> Function | None:
        """The product with a function of the same tensor; None: of another one."""
        if self.root is not other.root:
            return None
        one, two = self.compute, other.compute
        return Function(self.root, lambda u: one(u) * two(u))

    def through_origin(self, key: tuple[object, ...] | None) -> Tensor:
        """Its values, with the slope from the origin as gradient.

        Where f(0) is not 0 there is no such slope, and the operations stay as they are.
        """
        limit = slope_at_zero(self.compute, key)
        if limit is None:
            return self.compute(self.root)
        result = through_origin(self.root, self.compute, limit)
        setattr(result, _TAG, (self, result._version))
        return result


def writes_in_place(func: Callable[..., Any]) -> bool:
    """Whether an operation writes to its first argument."""
    name = func.__name__
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def function_of(value: Tensor) -> Function:
    """What is known of how a tensor was made: at least that it is itself."""
    function, version = getattr(value, _TAG, (None, 0))
    if function is None or version != value._version:
        return Function(value, lambda u: u)
    return function  # type: ignore[no-any-return]


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
    root = functions[0].root
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

    setattr(result, _TAG, (Function(root, compute), result._version))
    return result
