r"""Operations as they run, each with the rule of its backward pass.

A :class:`torch.overrides.TorchFunctionMode` sees the operations of unmodified code in
the calling thread. Parameters are handed to them detached, so that only what depends on
the explained inputs requires a gradient: that is what "dependent" means below.

========================================  ============================================
operation                                 rule
========================================  ============================================
linear map, convolution, sum, view        as it is
LayerNorm, RMSNorm, deviations            the deviation is a constant
element-wise activation f(u)              :math:`u \cdot f(u)/u`, the slope a constant
softmax                                   AttnLRP: as it is; CP-LRP: a constant
product of two dependent factors          AttnLRP: half of the gradient each; CP-LRP:
                                          the activated factor is a constant
========================================  ============================================

Sources: AttnLRP, Achtibat et al. 2024 (arXiv:2402.05602); CP-LRP, Ali et al. 2022
(arXiv:2202.07304); DecompX, Modarressi et al. 2023 (arXiv:2306.02873), which without
biases is the rule of CP-LRP.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from captum_globenc.errors import UnsupportedModelError
from captum_globenc.linearization.functions import (
    function_of,
    tagged,
    writes_in_place,
)
from captum_globenc.linearization.graph import is_activated
from captum_globenc.linearization.rules import (
    Ledger,
    constant,
    entry,
    normalized,
    of_token,
    share,
)
from captum_globenc.recording.attention import transparent

#: How attention and products of two dependent factors are treated.
AttentionRule = Literal["attnlrp", "cp"]

_Handler = Callable[..., Any]


class Operations(TorchFunctionMode):
    """Applies the rules to the operations of one run.

    Args:
        rule (str): ``"attnlrp"`` or ``"cp"``.
        ledger (Ledger): where relevance of constants is put down.
    """

    def __init__(self, rule: AttentionRule, ledger: Ledger) -> None:
        super().__init__()
        self.rule = rule
        self.ledger = ledger
        #: Leaves of the graph, by id: the inputs that are explained.
        self.leaves: dict[int, Tensor] = {}
        #: Every vector is of one token alone, which gets the relevance of its biases.
        self.is_of_token = False
        #: Inside of a module that is one activation as a whole.
        self.is_paused = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation, so that it hands gradients back by its rule."""
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:
            return func(True)  # Whatever grad mode the code asks for.
        if self.is_paused:
            with torch.no_grad():
                return func(*args, **kwargs)
        args = tuple(map(self._detached, args))
        if kwargs:
            kwargs = {name: self._detached(value) for name, value in kwargs.items()}
        handler = _HANDLERS.get(getattr(func, "__name__", ""))
        if handler is None:
            return func(*args, **kwargs)
        return handler(self, func, *args, **kwargs)

    def _detached(self, value: Any) -> Any:
        """An argument without the gradient of anything but the explained inputs."""
        if isinstance(value, Tensor):
            if value.requires_grad and value.is_leaf and id(value) not in self.leaves:
                return value.detach()
        elif type(value) in (tuple, list):
            return type(value)(map(self._detached, value))
        return value

    # Rules

    def _of_token(self, result: Tensor, input: Tensor, bias: Tensor | None) -> Tensor:
        """What a linear map with this bias gave."""
        if bias is None or not self.is_of_token or not is_dependent(input):
            return result
        return of_token(result, input, bias.detach(), self.ledger)

    def linear(
        self, func: _Handler, input: Tensor, weight: Tensor, bias: Any = None
    ) -> Tensor:
        """A linear map, or a convolution without further options."""
        result: Tensor = func(input, weight, self._bias_of(input, bias))
        return self._of_token(result, input, bias)

    def convolution(
        self,
        func: _Handler,
        input: Tensor,
        weight: Tensor,
        bias: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """A convolution."""
        return func(input, weight, self._bias_of(input, bias), *args, **kwargs)

    def addmm(
        self, func: _Handler, input: Tensor, mat1: Tensor, mat2: Tensor, **kwargs: Any
    ) -> Any:
        """A bias and a product."""
        if is_dependent(mat1) and is_dependent(mat2):
            return self.product(func, input, mat1, mat2, **kwargs)
        if is_dependent(input):
            return func(input, mat1, mat2, **kwargs)
        result: Tensor = func(self._bias_of(mat1, input), mat1, mat2, **kwargs)
        return self._of_token(result, mat1, input)

    def layer_norm(
        self,
        func: _Handler,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
        *rest: Any,
    ) -> Tensor:
        """A LayerNorm."""

        def compute(x: Tensor, bias: Tensor | None = bias) -> Tensor:
            return func(x, normalized_shape, weight, bias, eps, *rest)  # type: ignore[no-any-return]

        if not is_dependent(input):
            return compute(input)
        dims = tuple(range(-len(normalized_shape), 0))
        wide = _wide(input)
        inverse = torch.rsqrt(wide.var(dims, unbiased=False, keepdim=True) + eps)
        taken = self.ledger.bias(bias)
        result = normalized(input, dims, weight, taken, inverse, True, compute)
        return self._of_token(result, input, bias)

    def rms_norm(
        self,
        func: _Handler,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:
        """An RMSNorm."""

        def compute(x: Tensor) -> Tensor:
            return func(x, normalized_shape, weight, eps)  # type: ignore[no-any-return]

        if not is_dependent(input):
            return compute(input)
        dims = tuple(range(-len(normalized_shape), 0))
        wide = _wide(input)
        least = torch.finfo(input.dtype).eps if eps is None else eps
        inverse = torch.rsqrt(wide.square().mean(dims, keepdim=True) + least)
        return normalized(input, dims, weight, None, inverse, False, compute)

    def deviation(self, func: _Handler, *args: Any, **kwargs: Any) -> Any:
        """A norm or standard deviation is a constant; means beside it stay."""
        result = func(*args, **kwargs)
        if isinstance(result, tuple):
            return (result[0].detach(), *result[1:])
        return result.detach()

    def activation(self, func: _Handler, input: Tensor, *args: Any, **kw: Any) -> Any:
        """An element-wise function f with f(0) = 0."""
        if not is_dependent(input):
            return func(input, *args, **kw)
        in_place = kw.get("inplace") or writes_in_place(func)
        u = input.clone() if in_place else input

        def compute(u: Tensor) -> Any:
            return func(u.clone() if in_place else u, *args, **kw)

        whole = function_of(u).then(compute)
        key = (func, repr(args), repr(kw)) if whole.root is u else None
        result = whole.through_origin(key)
        return _written(input, result) if in_place else result

    def element_wise(
        self, func: _Handler, input: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """A part of an activation that is written out."""
        result = func(input, *args, **kwargs)
        return tagged(result, func, (input, *args), kwargs)

    def power(self, func: _Handler, input: Any, exponent: Any) -> Any:
        """A square or root of a deviation, or a part of an activation."""
        result = func(input, exponent)
        if is_dependent(result) and isinstance(exponent, float | int):
            if abs(exponent) < 1:
                return result.detach()
            return tagged(result, func, (input, exponent), {})
        return result

    def divided(self, func: _Handler, input: Any, other: Any, **kwargs: Any) -> Any:
        """A quotient; the divisor is a constant."""
        result = func(input, other, **kwargs)
        return tagged(result, func, (input, other), kwargs)

    def softmax(self, func: _Handler, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attention probabilities."""
        self.is_of_token = False
        if not is_dependent(input):
            return func(input, *args, **kwargs)
        if self.rule == "cp":
            return func(input.detach(), *args, **kwargs)
        result = func(share(input, 1, self.ledger, masked=True), *args, **kwargs)
        return entry(result, self.ledger)

    def sdpa(
        self,
        func: _Handler,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Scaled dot-product attention, by the model's own kernel."""
        self.is_of_token = False
        if dropout_p > 0:
            raise UnsupportedModelError(
                f"the model attends with dropout {dropout_p:g}, and none is expected: "
                "put it in evaluation mode."
            )
        if not any(map(is_dependent, (query, key, value, attn_mask))):
            return func(query, key, value, attn_mask, 0.0, *args, **kwargs)  # type: ignore[no-any-return]
        if self.rule == "cp":
            query, key = query.detach(), key.detach()
            if attn_mask is not None:
                attn_mask = attn_mask.detach()
            return func(query, key, value, attn_mask, 0.0, *args, **kwargs)  # type: ignore[no-any-return]
        # Half to the values, half to the weights; of that half to the queries and half
        # to the keys. What softmax keeps is the difference.
        parts = [
            share(part, factor, self.ledger) if is_dependent(part) else part
            for part, factor in (
                (query, 0.25 if is_dependent(key) else 0.5),
                (key, 0.25 if is_dependent(query) else 0.5),
                (value, 0.5 if any(map(is_dependent, (query, key, attn_mask))) else 1),
                (attn_mask, 0.5),
            )
        ]
        result = func(*parts, 0.0, *args, **kwargs)
        return entry(result, self.ledger)

    def multiplied(self, func: _Handler, input: Any, other: Any, **kwargs: Any) -> Any:
        """An element-wise product."""
        if not (is_dependent(input) and is_dependent(other)):
            result = func(input, other, **kwargs)
            return tagged(result, func, (input, other), kwargs)
        whole = function_of(input).times(function_of(other))
        if whole is not None:
            result = whole.through_origin(None)
        elif self.rule == "attnlrp":
            result = torch.mul(share(input, 0.5), share(other, 0.5))
        elif is_activated(input) and not is_activated(other):
            result = torch.mul(input.detach(), other)
        elif is_activated(other) and not is_activated(input):
            result = torch.mul(input, other.detach())
        else:
            return func(input, other, **kwargs)  # The graph's check refuses it.
        return _written(input, result) if writes_in_place(func) else result

    def product(self, func: _Handler, *args: Any, **kwargs: Any) -> Any:
        """A product over a dimension; two dependent factors get half each."""
        # Of baddbmm and its like, named.
        args += tuple(kwargs.pop(n) for n in _FACTORS if n in kwargs)
        summed = func.__name__ in _WITH_SUM
        factors = [i for i, arg in enumerate(args) if is_dependent(arg)]
        factors = factors[1:] if summed and 0 in factors else factors
        given = list(args)
        # Three factors are no such product: the graph's check refuses them.
        if self.rule == "attnlrp" and len(factors) == 2:
            for index in factors:
                given[index] = share(args[index], 0.5)
        if summed and factors:
            given[0] = self._part(given[0])
        return func(*given, **kwargs)

    def einsum(self, func: _Handler, equation: Any, *operands: Any) -> Any:
        """A product of several tensors."""
        if len(operands) == 1 and isinstance(operands[0], tuple | list):
            operands = tuple(operands[0])

        def einsum(*operands: Any) -> Any:
            return func(equation, *operands)

        return self.product(functools.wraps(func)(einsum), *operands)

    def added(self, func: _Handler, first: Any, other: Any, **kwargs: Any) -> Any:
        """A sum; a constant in it takes relevance."""
        if not is_dependent(first) and not is_dependent(other):
            return func(first, other, **kwargs)
        given = (first, other)
        if not writes_in_place(func) or is_dependent(first):
            given = (self._summand(first, other), self._summand(other, first))
        result = tagged(func(*given, **kwargs), func, (first, other), kwargs)
        is_bias = is_dependent(first) and not is_dependent(other)
        if is_bias and func.__name__ in ("add", "__add__"):
            return self._of_token(result, first, given[1])
        return result

    def joined(self, func: _Handler, *args: Any, **kwargs: Any) -> Any:
        """Parts put together; a constant among them takes relevance."""
        if any(map(is_dependent, _tensors(args))):
            args = tuple(map(self._part, args))
        return func(*args, **kwargs)

    def batch_norm(self, func: _Handler, input: Tensor, *args: Any, **kw: Any) -> Any:
        """A norm with fixed statistics."""
        result = func(input, *args, **kw)
        if not is_dependent(input):
            return result
        return constant(result, func(torch.zeros_like(input), *args, **kw), self.ledger)

    def multi_head(self, func: _Handler, *args: Any, **kwargs: Any) -> Any:
        """Functions of torch that are written in Python, seen from inside."""
        with self:
            return transparent(func)(*args, **kwargs)

    def clamp(self, func: _Handler, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Values that are kept within the dtype's range, which changes none."""
        result = func(input, *args, **kwargs)
        if is_dependent(input) and torch.equal(result, input):
            return share(input, 1)
        return result

    def _summand(self, value: Any, beside: Any) -> Any:
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value, dtype=beside.dtype, device=beside.device)
        return self._part(value)

    def _part(self, value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(map(self._part, value))
        if isinstance(value, Tensor) and value.is_floating_point():
            return self.ledger.bias(value)
        return value

    def _bias_of(self, input: Tensor, bias: Tensor | None) -> Tensor | None:
        return self.ledger.bias(bias) if is_dependent(input) else bias


def is_dependent(value: Any) -> TypeGuard[Tensor]:
    """Whether it is a tensor that depends on the explained inputs."""
    return isinstance(value, Tensor) and value.requires_grad


def _written(target: Tensor, result: Tensor) -> Tensor:
    """The result of an operation that writes to its first argument."""
    target.detach().copy_(result.detach())
    return result


def _wide(value: Tensor) -> Tensor:
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


_FACTORS = ("batch1", "batch2", "mat1", "mat2")
_WITH_SUM = {"addmm", "baddbmm", "addbmm"}
_RULES: dict[_Handler, str] = {
    Operations.linear: "linear",
    Operations.convolution: (
        "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"
    ),
    Operations.addmm: "addmm",
    Operations.layer_norm: "layer_norm",
    Operations.rms_norm: "rms_norm",
    Operations.batch_norm: "batch_norm",
    Operations.deviation: (
        "rsqrt sqrt std var std_mean var_mean norm vector_norm linalg_vector_norm "
        "linalg_norm"
    ),
    Operations.activation: (
        "gelu silu relu tanh relu6 elu selu celu leaky_relu mish hardswish softsign "
        "tanhshrink hardtanh erf relu_ tanh_ elu_ leaky_relu_ celu_ selu_ hardtanh_"
    ),
    Operations.element_wise: "sigmoid exp softplus __neg__ neg negative square",
    Operations.power: "pow __pow__",
    Operations.softmax: "softmax",
    Operations.sdpa: "scaled_dot_product_attention",
    Operations.multiplied: "mul __mul__ __rmul__ multiply mul_ __imul__",
    Operations.divided: "div __truediv__ __div__ divide true_divide div_ __itruediv__",
    Operations.product: "matmul __matmul__ __rmatmul__ mm bmm mv baddbmm addbmm",
    Operations.einsum: "einsum",
    Operations.added: (
        "add __add__ __radd__ add_ __iadd__ sub __sub__ __rsub__ rsub sub_ __isub__ "
        "subtract"
    ),
    Operations.joined: "cat concat concatenate stack where hstack vstack",
    Operations.multi_head: "multi_head_attention_forward normalize",
    Operations.clamp: "clamp clamp_ clip",
}
_HANDLERS: dict[str, _Handler] = {
    name: rule for rule, names in _RULES.items() for name in names.split()
}
