"""A run's operations on values that depend on the tokens, put down as steps."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from captum_globenc.linearization.functions import tagged
from captum_globenc.linearization.operations import is_dependent
from captum_globenc.linearization.spreading.rows import Gather, Own, Step, Unknown
from captum_globenc.linearization.spreading.steps import Joined, Mix, Total

#: Tape, function, its arguments → its result, put down; None: there is no rule for it.
Rule = Callable[..., Any]


class Known(NamedTuple):
    """What is known of a tensor.

    Args:
        step (Step): of whose result it has the elements.
        places (Tensor or None): where in it, of the tensor's shape; None: it is the
            result itself.
        version (int): of the tensor, which counts changes in place.
    """

    step: Step
    places: Tensor | None
    version: int


class Tape(TorchFunctionMode):
    """Runs operations as they are, in the calling thread, and puts down their steps.

    Parameters are handed to operations detached, so that autograd says what depends on
    the tokens, also where an operation is not seen. There, and where there is no rule,
    an :class:`~captum_globenc.linearization.spreading.steps.Unknown` step is put down.

    A tensor is known by its step and, once its elements have been moved, by their
    places in the step's result: operations that move elements run on places as well.

    Args:
        rules (Mapping): name of an operation → its rule.
    """

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        super().__init__()
        self._rules = rules
        self._known: Any = WeakTensorKeyDictionary()
        self._count = 0
        #: The module that runs.
        self.where = "forward_func"
        #: Inside of a module that is one activation as a whole.
        self.is_paused = False
        #: The coarsest dtype of a result.
        self.dtype = torch.float64

    def start(self, hidden: Tensor) -> Tensor:
        """The same vectors, each of which is its own token's, (..., hidden)."""
        start = hidden.detach().clone().requires_grad_()
        rows = hidden.shape[:-1].numel()
        token = torch.arange(rows, device=hidden.device)
        value = start.detach().flatten(0, -2)
        step = Own(rows, hidden.shape[-1], self.where, value, token)
        return self.note(start.clone(), step)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation as it is, and put it down."""
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:
            return func(True)  # Whatever grad mode the code asks for.
        args = _detached(args)
        kwargs = {name: _detached(value) for name, value in kwargs.items()}
        if self.is_paused or not any(map(is_dependent, flat((args, *kwargs.values())))):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        rule = self._rules.get(name)
        result = None
        if rule is not None and _takes(rule, (self, func, *args), kwargs):
            result = rule(self, func, *args, **kwargs)
        if result is None:
            result = func(*args, **kwargs)
        if name in _ELEMENT_WISE:
            tagged(result, func, args, kwargs)
        for value in flat(result):
            if is_dependent(value) and value not in self._known:
                self.refuse(value, f"there is no rule for {name!r}")
        return result

    # What is known of tensors

    def note(self, result: Tensor, step: Step, places: Tensor | None = None) -> Tensor:
        """Put down that a tensor has elements of a step's result."""
        if not step.number:
            step = self.own(result, step, places) or step
            self._count += 1
            step.number = self._count
            below = [operand.step.level for operand in step.operands]
            step.level = max(below, default=0) + _mixes(step)
            if torch.finfo(result.dtype).eps > torch.finfo(self.dtype).eps:
                self.dtype = result.dtype
        self._known[result] = Known(step, places, result._version)
        return result

    def known(self, tensor: Tensor) -> tuple[Step, Tensor | None]:
        """The step of a tensor, and the places of its elements in it."""
        known = self._known.get(tensor)
        reason = ""
        if known is None:
            reason = "a value is made by operations that are not seen"
        elif known.version != tensor._version:
            reason = "a value is changed in place"
        if reason:
            self.refuse(tensor, reason)
            known = self._known[tensor]
        return known.step, known.places

    def places(self, tensor: Tensor) -> Tensor:
        """Where a tensor's elements are in its step's result, of its shape."""
        _, places = self.known(tensor)
        if places is None:
            places = torch.arange(tensor.numel(), device=tensor.device)
            places = places.view(tensor.shape)
        return places

    def gather(self, tensor: Tensor, shape: Sequence[int] | None = None) -> Gather:
        """A tensor's elements, expanded to a shape, in rows of the last dimension."""
        step, places = self.known(tensor)
        shape = tensor.shape if shape is None else torch.Size(shape)
        if isinstance(step, Unknown):
            return Gather(step)
        if places is None and shape == tensor.shape and tensor.ndim:
            return Gather(step)
        width = shape[-1] if shape else 1
        return Gather(step, self.places(tensor).expand(shape).reshape(-1, width))

    def refuse(self, result: Tensor, reason: str) -> None:
        """Put down that the parts of a tensor are not known."""
        self.note(result, Unknown(1, 1, self.where, reason))

    def is_known(self, tensor: Tensor) -> bool:
        """Whether anything has been put down for it."""
        return tensor in self._known

    def own(
        self, result: Tensor, step: Step, places: Tensor | None = None
    ) -> Own | None:
        """The result as rows that belong to a token each, if they do."""
        if isinstance(step, Own | Unknown | Mix | Joined) or not step.operands:
            return None
        tokens = None
        for operand in step.operands:
            if not isinstance(operand.step, Own):
                return None
            own = operand.step.token
            if operand.index is not None:
                own = own[operand.index // operand.step.width]
            own = own.reshape(step.rows, -1)
            tokens = own[:, :1] if tokens is None else tokens
            if not bool((own == tokens).all()):
                return None
        assert tokens is not None
        value = result.detach().flatten().clone()
        if places is not None:
            value = value[places.flatten().argsort()]
        value = value.view(step.rows, step.width)
        return Own(step.rows, step.width, step.where, value, tokens[:, 0])


# Of which activations are made that are written out.
_ELEMENT_WISE = {
    *("add", "__add__", "__radd__", "sub", "__sub__", "__rsub__", "rsub"),
    *("mul", "__mul__", "__rmul__", "div", "__truediv__", "neg", "__neg__"),
    *("pow", "__pow__", "square", "exp", "erf", "sigmoid", "softplus", "tanh"),
}


def flat(values: Any) -> Iterator[Any]:
    """All values in tuples and lists."""
    if isinstance(values, tuple | list):
        for value in values:
            yield from flat(value)
    else:
        yield values


def rows_of(result: Tensor) -> tuple[int, int]:
    """How many rows a tensor is, and their width."""
    width = result.shape[-1] if result.ndim else 1
    return result.numel() // width, width


def _takes(rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a rule knows these arguments."""
    try:
        _signature(rule).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


_signature = functools.cache(inspect.signature)


def _detached(value: Any) -> Any:
    """Without the gradient of parameters; all else depends on the tokens."""
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad and value.is_leaf else value
    if type(value) in (tuple, list):
        return type(value)(map(_detached, value))
    return value


def _mixes(step: Step) -> bool:
    return isinstance(step, Mix) or (isinstance(step, Total) and step.is_across)
