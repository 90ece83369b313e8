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
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_globenc.encoders.weights import working_dtype
from captum_globenc.errors import UnsupportedModelError
from captum_globenc.linearization.functions import (
    Function,
    function_of,
    name_of,
    tagged,
    writes_in_place,
)
from captum_globenc.linearization.graph import is_activated, mark_activated
from captum_globenc.linearization.rules import (
    Ledger,
    constant,
    entry,
    normalized,
    of_token,
    share,
    take,
    valued,
)
from captum_globenc.linearization.severed import LEAVES_TORCH, SEVERS, Severed
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
        #: Values that depend on the inputs without a gradient that says so.
        self.severed = Severed()

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
        given = args, kwargs
        args = tuple(map(self._detached, args))
        if kwargs:
            kwargs = {name: self._detached(value) for name, value in kwargs.items()}
        name = name_of(func)
        if name in LEAVES_TORCH and is_dependent(args[0]):
            args = (args[0].detach(), *args[1:])  # As it can be without gradients.
        handler: _Handler = _HANDLERS.get(name, _as_it_is)
        if name[-1:] == "_" and writes_in_place(func) and any(map(is_dependent, args)):
            # The rule is for a copy, whose result is then written to the tensor.
            copy = function_of(args[0]).tag(args[0].clone())
            changed = handler(self, func, copy, *args[1:], **kwargs)
            result = self._written(args[0], changed)
        else:
            result = handler(self, func, *args, **kwargs)
        if self.severed.is_active or name in SEVERS:
            self.severed.follow(func, *given, result)
        return result

    def _detached(self, value: Any) -> Any:
        """An argument without the gradient of anything but the explained inputs."""
        if isinstance(value, Tensor):
            if value.is_inference():
                return value.detach().clone()  # Autograd takes no others.
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

        if is_dependent(weight):
            raise UnsupportedModelError(
                "the weight of a LayerNorm depends on the inputs, and there is no rule "
                "for that here: multiply by it after the norm."
            )
        if not is_dependent(input):
            return compute(input)
        dims = tuple(range(-len(normalized_shape), 0))
        wide = widened(input)
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
        wide = widened(input)
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
        in_place = kw.get("inplace") or any(arg is True for arg in args)
        copies = in_place or writes_in_place(func)

        def compute(u: Tensor) -> Any:
            return func(u.clone() if copies else u, *args, **kw)

        result = self._through_origin(input, compute, (func, repr(args), repr(kw)))
        return self._written(input, result) if in_place else result

    def _written(self, target: Tensor, result: Tensor) -> Tensor:
        """A tensor that takes the values of another and its gradient."""
        is_gate = is_activated(result)
        target.copy_(result)
        return mark_activated(target) if is_gate else target

    def _through_origin(
        self, u: Tensor, compute: _Handler, key: tuple[object, ...] | None
    ) -> Tensor:
        """An activation, as a whole with what it is written out with, or by itself.

        Where there is no line through the origin, it is what it is, and so is what the
        graph's check then says.
        """
        alone = Function(u, u._version, compute)
        whole = function_of(u).then(compute)
        result = whole.through_origin(key if whole.root is u else None)
        if result is None and whole.root is not u:
            result = alone.through_origin(key)
        return whole.tag(compute(u) if result is None else result)

    def element_wise(
        self, func: _Handler, input: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """A part of an activation that is written out."""
        result = func(input, *args, **kwargs)
        return tagged(result, func, (input, *args), kwargs)

    def power(self, func: _Handler, input: Any, exponent: Any) -> Any:
        """A root of a deviation, or an activation."""
        if not is_dependent(input) or not isinstance(exponent, float | int):
            return func(input, exponent)
        if abs(exponent) < 1:
            return func(input, exponent).detach()
        return self.activation(func, input, exponent)

    def divided(self, func: _Handler, input: Any, other: Any, **kwargs: Any) -> Any:
        """A quotient by a constant, or an activation that is written out."""
        if is_dependent(input) and is_dependent(other):
            whole = function_of(input).combined(
                function_of(other), lambda one, two: torch.div(one, two, **kwargs)
            )
            result = None if whole is None else whole.through_origin(None)
            if result is not None:
                return result
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
        if all(map(is_dependent, (query, key, value))) and not is_dependent(attn_mask):
            # Queries and keys get the same: two sums less.
            result = func(
                share(query, 0.25, self.ledger, times=2),
                share(key, 0.25),
                share(value, 0.5),
                attn_mask,
                0.0,
                *args,
                **kwargs,
            )
            return entry(result, self.ledger, times=0.5)
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
        result = None if whole is None else whole.through_origin(None)
        if result is not None:
            return result
        if whole is None and self.rule == "attnlrp":
            return torch.mul(share(input, 0.5), share(other, 0.5))
        if self.rule == "cp" and is_activated(input) != is_activated(other):
            if is_activated(input):
                return torch.mul(input.detach(), other)
            return torch.mul(input, other.detach())
        # Unless it is a part of an activation, the graph's check refuses it.
        return tagged(func(input, other, **kwargs), func, (input, other), kwargs)

    def product(self, func: _Handler, *args: Any, **kwargs: Any) -> Any:
        """A product over a dimension; two dependent factors get half each."""
        given: dict[int | str, Any] = dict(enumerate(args))
        given.update(kwargs)
        factors = [key for key, value in given.items() if is_dependent(value)]
        if name_of(func) in _WITH_SUM:
            summand = 0 if args else "input"
            if factors:
                given[summand] = self._part(given[summand])
            factors = [key for key in factors if key != summand]
        # Three factors are no such product: the graph's check refuses them.
        if self.rule == "attnlrp" and len(factors) == 2:
            for key in factors:
                given[key] = share(given[key], 0.5)
        count = len(args)
        return func(
            *(given[index] for index in range(count)),
            **{key: given[key] for key in kwargs},
        )

    def einsum(self, func: _Handler, equation: Any, *operands: Any) -> Any:
        """A product of several tensors."""
        if len(operands) == 1 and isinstance(operands[0], tuple | list):
            operands = tuple(operands[0])

        def einsum(*operands: Any) -> Any:
            return func(equation, *operands)

        return self.product(functools.wraps(func)(einsum), *operands)

    def cosine(
        self, func: _Handler, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8
    ) -> Tensor:
        """A product of two normed vectors, whose norms are constants."""
        result: Tensor = func(x1, x2, dim, eps)
        if not is_dependent(result):
            return result
        value = result.detach()
        with self:
            ones = [nn.functional.normalize(x, dim=dim, eps=eps) for x in (x1, x2)]
            return valued(value, (ones[0] * ones[1]).sum(dim))

    def added(self, func: _Handler, input: Any, other: Any, **kwargs: Any) -> Any:
        """A sum; a constant in it takes relevance."""
        if not is_dependent(input) and not is_dependent(other):
            return func(input, other, **kwargs)
        given = [self._part(input), self._part(other)]
        if writes_in_place(func) and not is_dependent(input):
            given[0] = given[0].clone()  # Such a part is a leaf.
        result = func(*given, **kwargs)
        numbers = [isinstance(value, Tensor) for value in (input, other)]
        if not all(numbers):
            # As they are: as tensors of half precision they would be rounded.
            zero = torch.zeros((), dtype=torch.float64)
            part = func(
                zero if numbers[0] else input, zero if numbers[1] else other, **kwargs
            )
            take(result, part, self.ledger)
        result = tagged(result, func, (input, other), kwargs)
        is_bias = is_dependent(input) and isinstance(other, Tensor)
        if is_bias and not is_dependent(other) and name_of(func) in ("add", "__add__"):
            return self._of_token(result, input, other)
        return result

    def joined(self, func: _Handler, *args: Any, **kwargs: Any) -> Any:
        """Parts put together; a constant among them takes relevance."""
        if any(map(is_dependent, _tensors((*args, *kwargs.values())))):
            args = tuple(map(self._part, args))
            kwargs = {name: self._part(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def written(self, func: _Handler, input: Tensor, index: Any, value: Any) -> None:
        """A part of a tensor that is written over; a constant takes relevance."""
        if is_dependent(value) and not is_dependent(input):
            rest = input.clone()
            rest[index] = 0
            func(input, index, value)
            take(input, rest, self.ledger)
            return
        if is_dependent(input) and not is_dependent(value):
            value = torch.as_tensor(value, dtype=input.dtype, device=input.device)
            value = self._part(value)
        func(input, index, value)

    def batch_norm(self, func: _Handler, input: Tensor, *args: Any, **kw: Any) -> Any:
        """A norm with fixed statistics."""
        result = func(input, *args, **kw)
        if not is_dependent(input):
            return result
        is_training = kw.get("training", args[4] if len(args) > 4 else False)
        if is_training or name_of(func) == "instance_norm":
            raise UnsupportedModelError(
                f"there is no rule for {name_of(func)} with the statistics of its "
                "input: LayerNorm, RMSNorm and batch norms with running statistics are "
                "known."
            )
        at_zero = func(torch.zeros_like(input), *args, **kw)
        return constant(result, at_zero, self.ledger)

    def multi_head(self, func: _Handler, *args: Any, **kwargs: Any) -> Any:
        """Functions of torch that are written in Python, seen from inside."""
        with self:
            return transparent(func)(*args, **kwargs)

    def clamp(self, func: _Handler, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Values that are kept within a range: often it changes none."""
        with torch.no_grad():
            is_same = torch.equal(func(input.clone(), *args, **kwargs), input)
        if is_same:
            return input.clone()
        return self.activation(func, input, *args, **kwargs)

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


def is_number(value: Any) -> TypeGuard[Tensor]:
    """Whether it is a tensor of floating-point numbers."""
    return isinstance(value, Tensor) and value.is_floating_point()


def _as_it_is(_: Operations, func: _Handler, *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)


def widened(value: Tensor) -> Tensor:
    """Its values in float32 at least, without gradient."""
    return value.detach().to(working_dtype(value.dtype))


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


_WITH_SUM = {"addmm", "baddbmm", "addbmm"}
_RULES: dict[_Handler, str] = {
    Operations.linear: "linear",
    Operations.convolution: (
        "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"
    ),
    Operations.addmm: "addmm",
    Operations.layer_norm: "layer_norm",
    Operations.rms_norm: "rms_norm",
    Operations.batch_norm: "batch_norm instance_norm",
    Operations.deviation: (
        "rsqrt sqrt std var std_mean var_mean norm vector_norm linalg_vector_norm "
        "linalg_norm"
    ),
    Operations.activation: (
        "gelu silu relu tanh relu6 elu selu celu leaky_relu mish hardswish softsign "
        "tanhshrink hardtanh erf special_erf square abs absolute __abs__ square_ abs_ "
        "relu_ tanh_ elu_ leaky_relu_ celu_ selu_ hardtanh_"
    ),
    Operations.element_wise: (
        "clone sigmoid special_expit exp expm1 log1p softplus __neg__ neg negative "
        "reciprocal __rdiv__ __rtruediv__"
    ),
    Operations.power: "pow __pow__ pow_ __ipow__",
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
    Operations.joined: (
        "cat concat concatenate stack where hstack vstack maximum minimum fmax fmin"
    ),
    Operations.written: "__setitem__",
    Operations.cosine: "cosine_similarity",
    Operations.multi_head: "multi_head_attention_forward normalize",
    Operations.clamp: (
        "clamp clamp_ clip clip_ clamp_min clamp_min_ clamp_max clamp_max_"
    ),
}
_HANDLERS: dict[str, _Handler] = {
    name: rule for rule, names in _RULES.items() for name in names.split()
}
