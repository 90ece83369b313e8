"""One forward and one backward pass of a model, linearised and checked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_globenc.errors import (
    ConservationError,
    InputError,
    NonFiniteActivationError,
    UnsupportedModelError,
)
from captum_globenc.linearization.activations import (
    is_trusted,
    linearized,
    takes_one_tensor,
)
from captum_globenc.linearization.graph import check_graph
from captum_globenc.linearization.operations import AttentionRule, Operations
from captum_globenc.linearization.rules import Ledger, replaced
from captum_globenc.recording.compiled import ignore_compiler_warning, uncompiled
from captum_globenc.recording.evaluation_mode import evaluating
from captum_globenc.recording.observer import hooked
from captum_globenc.recording.outputs import output_tensor


@dataclass(frozen=True)
class ModulePlace:
    """What goes into a module, or comes out of it.

    Args:
        module (nn.Module): which.
        is_input (bool): what goes in.
    """

    module: nn.Module
    is_input: bool = False


#: Where relevance is read: at the tensors that forward_func is given, at the looked-up
#: word embeddings, at the output of the embedding block, or at a module.
Place = Literal["inputs", "word_embeddings", "block"] | ModulePlace


@dataclass(frozen=True)
class Propagation:
    """What one linearised run leaves behind.

    Args:
        output (Tensor): the selected outputs, (batch).
        values (tuple[Tensor, ...]): what is at the places.
        gradients (tuple[Tensor, ...]): of the output, by the rules, of their shapes.
        is_turned (tuple[bool, ...]): whether a place has (tokens, batch, ...).
    """

    output: Tensor
    values: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    is_turned: tuple[bool, ...]


@torch.inference_mode(False)
@torch.enable_grad()
def propagate(
    forward_func: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    arguments: tuple[Any, ...],
    places: Sequence[Place],
    select: Callable[[Tensor], Tensor],
    rule: AttentionRule,
    points: Tensor | None = None,
    keeps_own_biases: bool = False,
) -> Propagation:
    r"""The gradient of an output by the rules, at some places.

    The run is checked: all relevance of the output is that of the inputs, of constants
    and, for AttnLRP, what softmax keeps.

    Args:
        forward_func (Callable): the model, or a function that calls it.
        inputs (tuple[Tensor, ...]): what it takes first.
        arguments (tuple): its further arguments.
        places (sequence): where relevance is read.
        select (Callable): output tensor → the explained outputs, (batch).
        rule (str): ``"attnlrp"`` or ``"cp"``.
        points (Tensor, optional): the values at the (only) place are replaced by these.
        keeps_own_biases (bool, optional): from the block on, the biases in front of the
            first attention's values belong to their tokens. Default: False.

    Returns:
        *Propagation*.

    Raises:
        UnsupportedModelError: an operation without a rule; a place that is not found.
        ConservationError: relevance is lost on the way.
        NonFiniteActivationError: NaN or infinity in the output.
    """
    watcher = _Watcher(inputs, places, rule, points, keeps_own_biases)
    _, selected = watcher.run(forward_func, arguments, select)
    if not selected.requires_grad:
        raise UnsupportedModelError(
            "the selected output does not depend on the inputs: "
            f"{watcher.lost()}. Return logits where forward_func returns "
            "probabilities: softmax is taken for attention, a constant in some methods."
        )
    leaves = [*watcher.operations.leaves.values(), *watcher.ledger.biases]
    check_graph(selected, leaves, watcher.modules())
    read = [*watcher.read(), *leaves]
    gradients = torch.autograd.grad(selected.sum(), read, allow_unused=True)
    gradients = tuple(
        torch.zeros_like(value) if gradient is None else gradient
        for value, gradient in zip(read, gradients)
    )
    count = len(places) if "inputs" not in places else len(watcher.read())
    bottom = len(watcher.read())
    with torch.no_grad():
        _check_conservation(
            selected, read[bottom:], gradients[bottom:], watcher.ledger.taken, watcher
        )
        return Propagation(
            selected.detach(),
            tuple(value.detach() for value in read[:count]),
            gradients[:count],
            tuple(watcher.turned),
        )


@torch.inference_mode(False)
def values_at(
    forward_func: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    arguments: tuple[Any, ...],
    place: Place,
) -> Tensor:
    """What is at a place; the run ends there.

    Args:
        forward_func (Callable): as for :func:`propagate`.
        inputs (tuple[Tensor, ...]): likewise.
        arguments (tuple): likewise.
        place (str or ModulePlace): which.
    """
    watcher = _Watcher(inputs, [place], "cp", None, ends_there=True)
    with suppress(_Found):
        watcher.run(forward_func, arguments, lambda output: output)
    return watcher.read()[0].detach()


class _Found(BaseException):
    """A run has come to the place that is asked for."""


class _Watcher:
    """Sees the modules of one run, in one thread, and finds the places in it."""

    def __init__(
        self,
        inputs: tuple[Tensor, ...],
        places: Sequence[Place],
        rule: AttentionRule,
        points: Tensor | None,
        keeps_own_biases: bool = False,
        ends_there: bool = False,
    ) -> None:
        self.ledger = Ledger()
        self.operations = _Lookups(rule, self.ledger, self)
        self.turned: list[bool] = []
        self._places = list(places)
        self._points = points
        self._keeps_own_biases = keeps_own_biases
        self._ends_there = ends_there
        self._found: dict[Place, Tensor] = {}
        self._thread = threading.get_ident()
        self._undo = ExitStack()
        self._roots: list[nn.Module] = []
        self._depth = 0
        self._searched: set[nn.Module] = set()
        self._stacked: set[nn.Module] = set()
        self._tables: set[int] = set()
        self._nodes: dict[Any, nn.Module] = {}
        self._losing: list[nn.Module] = []
        self._shape: tuple[int, int] = (0, 0)
        self._block_turned = False
        self._lookup_turned = False
        self._has_leaf = False
        #: In which numbers modules compute.
        self.dtypes: set[torch.dtype] = set()
        self.inputs = self._prepared(inputs)

    def _prepared(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Inputs of which the numbers are leaves."""
        self._given = inputs
        result = []
        with torch.inference_mode(False):
            for tensor in inputs:
                tensor = tensor.detach()
                tensor = tensor.clone() if tensor.is_inference() else tensor
                if tensor.is_floating_point():
                    tensor = tensor.requires_grad_()
                    self.operations.leaves[id(tensor)] = tensor
                result.append(tensor)
        return tuple(result)

    def run(
        self,
        forward_func: Callable[..., Any],
        arguments: tuple[Any, ...],
        select: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The output, and what is selected of it."""
        ignore_compiler_warning()
        inputs = self.inputs
        if "inputs" in self._places and self._points is not None:
            raise ValueError("inputs are replaced by the caller")
        with self._undo as undo:
            undo.enter_context(torch.inference_mode(False))
            undo.enter_context(torch.enable_grad())
            undo.enter_context(hooked(self._enter, self._leave))
            arguments = tuple(map(_countable, arguments))
            with self.operations:
                output = output_tensor(forward_func(*inputs, *arguments))
                if not self._ends_there and not bool(output.detach().isfinite().all()):
                    raise NonFiniteActivationError(
                        "the output of forward_func holds NaN or infinity."
                    )
                self.dtypes.add(output.dtype)
                return output, select(output)

    # Modules

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if self._is_elsewhere():
            return None
        if not self._depth:
            self._roots.append(module)
            self._undo.enter_context(evaluating(module))
            self._undo.enter_context(uncompiled(module))
        self._depth += 1
        self._leave_inference_mode()
        self._search(module)
        if takes_one_tensor(module, args) and is_trusted(module):
            self.operations.is_paused = True
        for place in self._places:
            if self._is_input_of(module, place) and place not in self._found:
                index = next((i for i, a in enumerate(args) if _is_number(a)), None)
                if index is not None:
                    given = self._at(place, args[index])
                    self._note_block(place, module, given)
                    return (*args[:index], given, *args[index + 1 :])
        return None

    def _leave(
        self, module: nn.Module, args: Any, kwargs: Any, output: Any = None
    ) -> Any:
        if self._is_elsewhere():
            return None
        self._depth -= 1
        self.operations.is_paused = False
        changed = None
        if takes_one_tensor(module, args):
            changed = linearized(module, args[0], output)
            output = output if changed is None else changed
        first = _first_number(output)
        for place in self._places:
            if not isinstance(place, ModulePlace) or place.module is not module:
                continue
            if place.is_input and place not in self._found:
                given = _first_number([*args, *kwargs.values()])
                if given is None or self._points is not None:
                    raise _no_tensor(module, "is given by position")
                self._at(place, given)
            elif not place.is_input:
                if first is None:
                    raise _no_tensor(module, "comes out of it")
                first = self._at(place, first)
                output = changed = _with_first(output, first)
        if first is not None:
            self.dtypes.add(first.dtype)
            if first.grad_fn is not None:
                self._nodes.setdefault(first.grad_fn, module)
            elif any(t.requires_grad for t in args if isinstance(t, Tensor)):
                self._losing.append(module)
        return changed

    def _is_elsewhere(self) -> bool:
        return torch.compiler.is_compiling() or threading.get_ident() != self._thread

    def _leave_inference_mode(self) -> None:
        if torch.is_inference_mode_enabled():
            self._undo.enter_context(torch.inference_mode(False))
            torch._C._set_grad_enabled(True)

    def _search(self, module: nn.Module) -> None:
        """Find tables of tokens and stacks of layers."""
        if module in self._searched:
            return
        parts = list(module.modules())
        self._searched.update(parts)
        for part in parts:
            table = getattr(part, "get_input_embeddings", None)
            if callable(table):
                # Models of images have none.
                with suppress(AttributeError, NotImplementedError, TypeError):
                    self._tables.add(id(table().weight))
            if isinstance(part, nn.ModuleList):
                self._stacked.update(part)

    def _is_input_of(self, module: nn.Module, place: Place) -> bool:
        if isinstance(place, ModulePlace):
            return place.is_input and place.module is module
        return place == "block" and self._has_leaf and module in self._stacked

    def _note_block(self, place: Place, layer: nn.Module, hidden: Tensor) -> None:
        if place != "block":
            return
        batch, tokens = self._shape
        turned = self._lookup_turned if batch == tokens else None
        is_first = getattr(getattr(layer, "self_attn", None), "batch_first", None)
        if is_first is not None:
            turned = not is_first
        if turned is None:
            turned = tuple(hidden.shape[:2]) == (tokens, batch)
        self._block_turned = turned
        shape = (tokens, batch) if turned else (batch, tokens)
        if tuple(hidden.shape[:2]) != shape:
            raise UnsupportedModelError(
                f"the input of the first layer, {type(layer).__name__}, has shape "
                f"{tuple(hidden.shape)}, and a vector for each of {batch} by {tokens} "
                'tokens is expected: use place="word_embeddings".'
            )
        self.operations.is_of_token = self._keeps_own_biases

    # Places

    def _at(self, place: Place, value: Tensor) -> Tensor:
        """What is handed on at a place."""
        if place in self._found and isinstance(place, ModulePlace):
            raise InputError(
                f"layer {type(place.module).__name__} runs several times in one "
                "forward pass, so that its values are not one place."
            )
        if self._points is not None:
            value = replaced(value, self._points.to(value), self.ledger)
        self._found[place] = value
        if self._ends_there:
            raise _Found
        return value

    def look_up(self, ids: Tensor, weight: Tensor, result: Tensor) -> Tensor:
        """The embeddings that a lookup gave: a leaf, where it is that of the inputs."""
        if self._tables and id(weight) not in self._tables:
            return result
        given = self._given[0]
        if given.is_floating_point() or ids.numel() != given.numel():
            return result
        same = torch.equal(ids.flatten(), given.to(ids.device).flatten())
        turned = not same and given.ndim == 2 and torch.equal(ids, given.mT.to(ids))
        if not same and not turned:
            return result
        self._lookup_turned = turned
        self._shape = (given.shape[:-1].numel(), given.shape[-1])
        if self._has_leaf:
            raise UnsupportedModelError(
                "the ids are looked up twice in forward_func, and once is expected: "
                "pass embeddings as inputs."
            )
        self._has_leaf = True
        leaf = result.detach()
        if self._points is not None and "word_embeddings" in self._places:
            leaf = self._points.to(leaf)
        leaf = leaf.clone().requires_grad_()
        self.operations.leaves[id(leaf)] = leaf
        if "word_embeddings" in self._places:
            self._found["word_embeddings"] = leaf
            if self._ends_there:
                raise _Found
        return leaf.clone()  # The model may write to it.

    def read(self) -> list[Tensor]:
        """The tensors at the places, in their order."""
        result: list[Tensor] = []
        self.turned = []
        for place in self._places:
            if place == "inputs":
                numbers = [t for t in self.inputs if t.is_floating_point()]
                result += numbers
                self.turned += [False] * len(numbers)
                continue
            if place not in self._found:
                raise self._not_found(place)
            result.append(self._found[place])
            is_turned = {"block": self._block_turned}
            is_turned["word_embeddings"] = self._lookup_turned
            self.turned.append(is_turned[place] if isinstance(place, str) else False)
        return result

    def modules(self) -> dict[Any, str]:
        """Node of a module's output → the module's name."""
        names = self._names()
        return {
            node: f"{names.get(module, '')!r} ({type(module).__name__})"
            for node, module in self._nodes.items()
        }

    def lost(self) -> str:
        """Where dependence on the inputs was lost."""
        if not self._losing:
            return "no module is known that loses it"
        names = self._names()
        lost = [f"{names.get(m, '')!r} ({type(m).__name__})" for m in self._losing[:3]]
        return f"it is lost in {', or in '.join(lost)}"

    def _names(self) -> dict[nn.Module, str]:
        return {
            module: name
            for root in reversed(self._roots)
            for name, module in root.named_modules()
        }

    def _not_found(self, place: Place) -> Exception:
        if isinstance(place, ModulePlace):
            return InputError(
                f"layer {type(place.module).__name__} did not run in forward_func."
            )
        if not self._has_leaf:
            return UnsupportedModelError(
                "the ids are not looked up in a table of word embeddings, so relevance "
                "has no place: pass embeddings as inputs."
            )
        return UnsupportedModelError(
            "no stack of layers (an nn.ModuleList) ran after the word embeddings, so "
            'the output of the embedding block is not known: use place="'
            'word_embeddings", or a layer method.'
        )


class _Lookups(Operations):
    """The rules, and an eye on lookups of tokens."""

    def __init__(self, rule: AttentionRule, ledger: Ledger, watcher: _Watcher) -> None:
        super().__init__(rule, ledger)
        self._watcher = watcher

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operation by its rule."""
        if func is nn.functional.embedding:
            return self._embedding(func, *args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def _embedding(
        self, func: Any, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        result = func(input, weight.detach(), *args, **kwargs)
        return self._watcher.look_up(input, weight, result)


def _check_conservation(
    selected: Tensor,
    leaves: Sequence[Tensor],
    gradients: Sequence[Tensor],
    taken: Sequence[Tensor],
    watcher: _Watcher,
) -> None:
    """Raise where the relevance of the outputs is not that of inputs and constants."""
    wide = torch.float64 if selected.dtype == torch.float64 else torch.float32
    # A mask of minus infinity is a constant without gradient.
    parts = [
        (g.to(wide) * v.to(wide).masked_fill(g == 0, 0)).flatten()
        for g, v in zip(gradients, leaves)
    ]
    total = sum((part.sum() for part in parts), torch.zeros((), dtype=wide))
    size = sum((part.abs().sum() for part in parts), torch.zeros((), dtype=wide))
    kept = torch.stack([t.to(wide) for t in taken]) if taken else total.new_zeros(1)
    output = selected.detach().to(wide)
    error = (output.sum() - total - kept.sum()).abs()
    size = size + kept.abs().sum() + output.abs().sum()
    limit = max(_LIMITS.get(dtype, 0.0) for dtype in watcher.dtypes)
    relative = float(error / size) if float(size) else 0.0
    if not relative <= limit:
        raise ConservationError(watcher.lost(), relative, limit)


# Of the sizes of all parts of relevance: far above what rounding makes of it.
_LIMITS = {
    torch.float64: 1e-6,  # Models compute their softmax in float32.
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


def _countable(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_inference():
        return value.clone()
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _first_number(output: Any) -> Tensor | None:
    """The first tensor of numbers in what a module takes or gives."""
    if isinstance(output, Mapping):
        output = list(output.values())
    values = output if isinstance(output, tuple | list) else [output]
    return next((value for value in values if _is_number(value)), None)


def _with_first(output: Any, first: Tensor) -> Any:
    """A module's output with another first tensor."""
    if isinstance(output, Tensor):
        return first
    old = _first_number(output)
    if isinstance(output, Mapping):
        for name, value in output.items():
            if value is old:
                output[name] = first  # type: ignore[index]
        return output
    return type(output)(first if value is old else value for value in output)


def _no_tensor(module: nn.Module, what: str) -> InputError:
    return InputError(
        f"layer {type(module).__name__} has no tensor of numbers that {what}."
    )
