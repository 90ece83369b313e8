"""Watch the modules of one run, and find the places in it where relevance is read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks, get_gradient_edge
from torch.utils.checkpoint import CheckpointError

from captum_globenc.errors import (
    InputError,
    NonFiniteActivationError,
    UnsupportedModelError,
)
from captum_globenc.linearization.activations import (
    is_known_activation,
    linearized,
    takes_one_tensor,
)
from captum_globenc.linearization.functions import forget
from captum_globenc.linearization.graph import goes_around
from captum_globenc.linearization.operations import (
    AttentionRule,
    Operations,
    is_dependent,
    is_number,
)
from captum_globenc.linearization.rules import Ledger, replaced
from captum_globenc.recording.compiled import ignore_compiler_warning, uncompiled
from captum_globenc.recording.evaluation_mode import evaluating
from captum_globenc.recording.inputs import countable
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
class At:
    """What was at a place when it was come to.

    Args:
        value (Tensor): the values.
        edge (Tensor or GradientEdge): where their gradient arrives.
        is_turned (bool): whether it has (tokens, batch, ...).
    """

    value: Tensor
    edge: Any
    is_turned: bool = False


class Found(BaseException):
    """A run has come to the place that is asked for."""


class Watcher:
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
        #: In which numbers modules compute.
        self.dtypes: set[torch.dtype] = set()
        self.operations = _Lookups(rule, self.ledger, self)
        self._places = list(places)
        self._points = points
        self._keeps_own_biases = keeps_own_biases
        self._ends_there = ends_there
        self._found: dict[Place, At] = {}
        self._thread = threading.get_ident()
        self._undo = ExitStack()
        self._roots: list[nn.Module] = []
        self._searched: set[nn.Module] = set()
        self._stacked: set[nn.Module] = set()
        # A layer that is called with keywords: they are seen when it ends.
        self._first_layer: nn.Module | None = None
        self._begun: dict[nn.Module, int] = {}
        self._has_tokens_first = False
        self._tables: set[int] = set()
        self._nodes: dict[Any, nn.Module] = {}
        self._losing: list[nn.Module] = []
        self._shape: tuple[int, int] = (0, 0)
        self._lookup_turned: bool | None = None
        self._has_leaf = False
        # What lookups of the ids in other tables, or of some of them, gave.
        self._beside: list[Tensor] = []
        self.inputs = self._prepared(inputs)

    def _prepared(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Inputs whose numbers depend on leaves, without being one: code writes to it.

        It does so to the caller's tensors, without gradients.
        """
        self._given = inputs
        self._leaves: list[Tensor] = []
        if inputs[0].is_floating_point() and inputs[0].ndim > 1:
            self._shape = (inputs[0].shape[0], inputs[0].shape[1])
        result = []
        with torch.inference_mode(False), torch.enable_grad():
            for tensor in inputs:
                tensor = tensor.detach()
                tensor = tensor.clone() if tensor.is_inference() else tensor
                if tensor.is_floating_point():
                    tensor = tensor.requires_grad_()
                    self.operations.leaves[id(tensor)] = tensor
                    self._leaves.append(tensor)
                    self.dtypes.add(tensor.dtype)
                    tensor = tensor.clone()
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
            undo.enter_context(as_own_errors())
            with suppress(RuntimeError):  # The caller has some.
                undo.enter_context(disable_saved_tensors_hooks(_CHECKPOINT))
            arguments = tuple(map(countable, arguments))
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
        if module not in self._searched:
            self._roots.append(module)
            self._undo.enter_context(evaluating(module))
            self._undo.enter_context(uncompiled(module))
            self._search(module)
        self.leave_inference_mode()
        self.operations.is_paused = takes_one_tensor(
            module, args
        ) and is_known_activation(module, args[0])
        for place in self._places:
            if self._is_input_of(module, place) and place not in self._found:
                index = next((i for i, a in enumerate(args) if is_number(a)), None)
                if place == "block":
                    self.operations.is_of_token = self._keeps_own_biases
                    self._first_layer = module if index is None else None
                if index is None:
                    self._begun[module] = _sequence_number()
                else:
                    given = self._at(place, args[index], module)
                    return (*args[:index], given, *args[index + 1 :])
        return None

    def _leave(
        self, module: nn.Module, args: Any, kwargs: Any, output: Any = None
    ) -> Any:
        if self._is_elsewhere():
            return None
        self.operations.is_paused = False
        changed = None
        if takes_one_tensor(module, args):
            changed = linearized(module, args[0], output)
            output = output if changed is None else changed
        first = _first_number(output)
        for place in self._places:
            if isinstance(place, ModulePlace) and place.module is module:
                if not place.is_input:
                    if first is None:
                        raise _no_tensor(module, "comes out of it")
                    first = self._at(place, first, module)
                    output = changed = _with_first(output, first)
                elif place not in self._found:
                    self._at_keyword(place, module, kwargs)
            elif place == "block" and self._first_layer is module:
                self._first_layer = None
                self._at_keyword(place, module, kwargs)
        if first is not None:
            self.dtypes.add(first.dtype)
            if first.grad_fn is not None:
                self._nodes.setdefault(first.grad_fn, module)
            elif any(t.requires_grad for t in args if isinstance(t, Tensor)):
                self._losing.append(module)
        return changed

    def _is_elsewhere(self) -> bool:
        return torch.compiler.is_compiling() or threading.get_ident() != self._thread

    def leave_inference_mode(self) -> None:
        """Its tensors have no gradients."""
        if torch.is_inference_mode_enabled():
            self._undo.enter_context(torch.inference_mode(False))
            torch._C._set_grad_enabled(True)

    def _search(self, module: nn.Module) -> None:
        """Find tables of tokens and stacks of layers."""
        parts = list(module.modules())
        self._searched.update(parts)
        for part in parts:
            table = getattr(part, "get_input_embeddings", None)
            if callable(table):
                # Models of images have none.
                with suppress(AttributeError, NotImplementedError, TypeError):
                    self._tables.add(id(table().weight))
            if _is_stack(part):
                self._stacked.update(part.children())
            if getattr(part, "batch_first", None) is False:
                self._has_tokens_first = True

    def _is_input_of(self, module: nn.Module, place: Place) -> bool:
        if isinstance(place, ModulePlace):
            return place.is_input and place.module is module
        has_begun = self._has_leaf or self._given[0].is_floating_point()
        is_sought = place == "block" and has_begun and self._first_layer is None
        return is_sought and module in self._stacked

    def _is_turned(self, place: Place, module: nn.Module, value: Tensor) -> bool:
        """Whether the tokens are in front of the examples, where they are two."""
        if value.ndim < 2:
            return False
        batch, tokens = self._shape
        rows, columns = value.shape[:2]
        if isinstance(place, ModulePlace):
            batch = len(self._given[0])
            if columns != batch:
                return False
            if self._lookup_turned is None:
                return rows % batch != 0 or (self._has_tokens_first and rows != batch)
            return self._lookup_turned
        if (rows, columns) != (batch, tokens) and (rows, columns) != (tokens, batch):
            raise UnsupportedModelError(
                f"the input of the first layer, {type(module).__name__}, has shape "
                f"{tuple(value.shape)}, and a vector for each of {batch} by {tokens} "
                'tokens is expected: use place="word_embeddings".'
            )
        is_first = getattr(getattr(module, "self_attn", None), "batch_first", None)
        if is_first is not None:
            return not is_first
        if batch == tokens:
            return bool(self._lookup_turned)
        return (rows, columns) == (tokens, batch)

    # Places

    def _at(self, place: Place, value: Tensor, module: nn.Module) -> Tensor:
        """What is handed on at a place."""
        if place in self._found and isinstance(place, ModulePlace):
            raise InputError(
                f"layer {type(place.module).__name__} runs several times in one "
                "forward pass, so that its values are not one place."
            )
        is_turned = self._is_turned(place, module, value)
        with torch._C.DisableTorchFunction():
            if self._points is not None:
                value = replaced(value, self._points.to(value), self.ledger)
            elif not value.requires_grad or _is_parameter(value):
                value = self._leaf(value).clone()
            forget(value)
            # Code may write to it later.
            values, edge = value.detach().clone(), get_gradient_edge(value)
        self._found[place] = At(values, edge, is_turned)
        if self._ends_there:
            raise Found
        return value

    def _at_keyword(
        self, place: Place, module: nn.Module, kwargs: dict[str, Any]
    ) -> None:
        """Note a module's input that was given by name, now that it has run."""
        given = kwargs.get("hidden_states")
        if not is_number(given):
            given = next((v for v in kwargs.values() if is_dependent(v)), None)
        if given is None or (place == "block" and not given.requires_grad):
            raise _no_tensor(module, "depends on the inputs")
        node = given.grad_fn
        is_written = node is not None and node._sequence_nr() > self._begun[module]
        if is_written or self._points is not None:
            raise UnsupportedModelError(
                f"the input of {type(module).__name__} is given by name, so that it is "
                f"seen when the module has run, and it is "
                f"{'written to' if is_written else 'to be replaced'}: use the output "
                'of the module before it, or place="word_embeddings".'
            )
        self._at(place, given, module)

    def look_up(self, ids: Tensor, weight: Tensor, result: Tensor) -> Tensor:
        """The embeddings that a lookup gave: a leaf, where it is that of the inputs."""
        given = self._given[0]
        if given.is_floating_point():
            return result
        is_other_table = bool(self._tables) and id(weight) not in self._tables
        if is_other_table or ids.numel() != given.numel():
            if not _are_of(ids, self.inputs[0]):
                return result
            self._beside.append(leaf := self._leaf(result))
            return leaf.clone()
        same = torch.equal(ids.flatten(), given.to(ids.device).flatten())
        turned = given.ndim == 2 and torch.equal(ids, given.mT.to(ids))
        turned = turned and (not same or ids.shape != given.shape)
        if not same and not turned:
            if ids.shape == given.shape and ids.shape[-1] > 1:
                self._check_shift(ids, given.to(ids.device))
            return result
        self._lookup_turned = bool(turned)
        self._shape = (given.shape[:-1].numel(), given.shape[-1])
        if self._has_leaf:
            raise UnsupportedModelError(
                "the ids are looked up twice in forward_func, and once is expected: "
                "pass embeddings as inputs."
            )
        self._has_leaf = True
        if self._points is not None and "word_embeddings" in self._places:
            result = self._points.to(result)
        leaf = self._leaf(result)
        if "word_embeddings" in self._places:
            self._found["word_embeddings"] = At(leaf, leaf, self._lookup_turned)
            if self._ends_there:
                raise Found
        return leaf.clone()  # The model may write to it.

    def _leaf(self, value: Tensor) -> Tensor:
        leaf = value.detach().clone().requires_grad_()
        self.operations.leaves[id(leaf)] = leaf
        return leaf

    def _check_shift(self, ids: Tensor, given: Tensor) -> None:
        if torch.equal(ids[..., 1:], given[..., :-1]):
            raise UnsupportedModelError(
                "the ids are looked up twice in forward_func, once shifted by one for "
                "a decoder, and only the encoder's part of their relevance would be "
                "seen: pass embeddings as inputs, to a forward_func that hands both on."
            )

    def read(self) -> list[At]:
        """What is at the places, in their order."""
        result: list[At] = []
        for place in self._places:
            if place == "inputs":
                result += [At(leaf, leaf) for leaf in self._leaves]
            elif place in self._found:
                result.append(self._found[place])
            else:
                raise self._not_found(place)
        return result

    def check_places(self, selected: Tensor) -> None:
        """Raise where more leads from the ids to the output than the place for them."""
        at = self._found.get("block", self._found.get("word_embeddings"))
        if at is not None and self._beside:
            node = getattr(at.edge, "node", None)
            if goes_around(selected, node, self._beside):
                raise UnsupportedModelError(
                    "the ids are looked up in forward_func a second time, in another "
                    "table or in part, and this part of their relevance would not be "
                    "seen: pass embeddings as inputs, to a forward_func that hands "
                    "both on."
                )
        at = self._found.get("block")
        if at is None or at.edge.node is None:
            return
        has_ids = not self._given[0].is_floating_point()
        beside = self._leaves if has_ids else self._leaves[1:]
        leaves = [
            leaf
            for leaf in self.operations.leaves.values()
            if not any(leaf is given for given in beside)
        ]
        if goes_around(selected, at.edge.node, leaves):
            raise UnsupportedModelError(
                "the input of the first layer that is found is not all that the output "
                "takes from the word embeddings, so it is not the output of the "
                'embedding block: use place="word_embeddings", or a layer method.'
            )

    def close(self) -> None:
        """Let go of the run: cycles would keep its tensors."""
        self.operations.leaves.clear()
        self.ledger.biases.clear()
        self._beside.clear()
        self._found.clear()
        self._nodes.clear()
        self._leaves = []
        self.inputs = self._given = ()

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
            is_list = isinstance(place.module, nn.ModuleList)
            hint = ": pass its modules, as list(layer)" if is_list else ""
            return InputError(
                f"layer {type(place.module).__name__} did not run in "
                f"forward_func{hint}."
            )
        if not self._has_leaf:
            return UnsupportedModelError(
                "the ids are not looked up in a table of word embeddings, so relevance "
                "has no place: pass embeddings as inputs."
            )
        return UnsupportedModelError(
            "no stack of layers (an nn.ModuleList, or an nn.Sequential of one kind of "
            "layer) ran after the word embeddings, so the output of the embedding "
            'block is not known: use place="word_embeddings", or a layer method.'
        )


class _Lookups(Operations):
    """The rules, and an eye on lookups of tokens."""

    def __init__(self, rule: AttentionRule, ledger: Ledger, watcher: Watcher) -> None:
        super().__init__(rule, ledger)
        self._watcher = watcher

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operation by its rule."""
        self._watcher.leave_inference_mode()
        if func is nn.functional.embedding:
            return self._embedding(func, *args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def _embedding(
        self, func: Any, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        result = func(input, weight.detach(), *args, **kwargs)
        return self._watcher.look_up(input, weight, result)


@contextmanager
def as_own_errors() -> Iterator[None]:
    """What torch says of in-place operations and checkpoints, as an error of ours."""
    try:
        yield
    except RuntimeError as error:
        if _CHECKPOINT in str(error) or isinstance(error, CheckpointError):
            raise UnsupportedModelError(_CHECKPOINT) from error
        if not any(words in str(error) for words in _IN_PLACE):
            raise
        raise UnsupportedModelError(
            "the model writes to a tensor that the backward pass needs, and a new "
            f"tensor is expected there. Torch says: {error}"
        ) from error


_CHECKPOINT = (
    "the model computes a part a second time in the backward pass, or keeps values for "
    "it in a way of its own (torch.utils.checkpoint, saved_tensors_hooks), and that is "
    "not seen: turn checkpointing off."
)
_IN_PLACE = (
    "modified by an inplace operation",
    "modified inplace",
    "in-place operation",
)


def _is_stack(module: nn.Module) -> bool:
    """Whether a module holds layers: a list, or a sequence of layers of one kind."""
    if isinstance(module, nn.ModuleList):
        return True
    children = list(module.children())
    kinds = {type(child) for child in children}
    has_parts = all(any(True for _ in child.children()) for child in children)
    return isinstance(module, nn.Sequential) and len(kinds) == 1 and has_parts


def _are_of(ids: Tensor, given: Tensor) -> bool:
    """Whether ids are the given ones: in their memory, or as a copy.

    A row of one number or of counted numbers may be one of types or positions.
    """
    if ids.untyped_storage().data_ptr() == given.untyped_storage().data_ptr():
        return True
    steps = ids.diff()
    is_even = bool((steps == steps[..., :1]).all())
    return not is_even and ids.shape == given.shape and torch.equal(ids, given.to(ids))


def _sequence_number() -> int:
    """Larger than that of all nodes of this thread so far."""
    with torch._C.DisableTorchFunction():
        return int(torch.zeros((), requires_grad=True).neg().grad_fn._sequence_nr())  # type: ignore[union-attr]


def _is_parameter(value: Tensor) -> bool:
    return value.is_leaf and isinstance(value, nn.Parameter)


def _first_number(output: Any) -> Tensor | None:
    """The first tensor of numbers in what a module takes or gives."""
    if isinstance(output, Mapping):
        output = list(output.values())
    values = output if isinstance(output, tuple | list) else [output]
    return next((value for value in values if is_number(value)), None)


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
    values = [first if value is old else value for value in output]
    is_named = hasattr(output, "_make")
    return output._make(values) if is_named else type(output)(values)


def _no_tensor(module: nn.Module, what: str) -> InputError:
    return InputError(
        f"layer {type(module).__name__} has no tensor of numbers that {what}."
    )
