"""Watch a run in the calling thread: modules by global hooks, operations by a mode.

Nothing of the model, of torch or of transformers is changed that another thread could
notice: hooks of modules themselves would switch off the fused path of
``torch.nn.TransformerEncoderLayer`` for all.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from captum_globenc.encoders.discovery import find_encoder
from captum_globenc.encoders.registry import model_type
from captum_globenc.encoders.resolver import Encoder
from captum_globenc.errors import UnsupportedModelError
from captum_globenc.recording.attention import AttentionCall, AttentionMode
from captum_globenc.recording.compiled import uncompiled
from captum_globenc.recording.evaluation_mode import evaluating
from captum_globenc.recording.inputs import check_lookup
from captum_globenc.recording.recorder import Recorder

# What the tokens are called where a module is called with keywords.
_TOKEN_ARGUMENTS = ("input_ids", "inputs_embeds", "pixel_values", "hidden_states")
# Where values leave torch, so that no gradient follows them.
_EXITS = ("numpy", "__array__", "item", "tolist", "__float__", "__int__")
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class Observer(AttentionMode):
    """Sees the modules and operations of one run.

    Args:
        make_recorder (Callable): encoder → its recorder.
        encoder (Encoder or None): the encoder to record; None: the first supported one
            that runs.
        differentiate (bool): follow what the head does by gradients.
    """

    def __init__(
        self,
        make_recorder: Callable[[Encoder], Recorder],
        encoder: Encoder | None,
        differentiate: bool,
    ) -> None:
        super().__init__()
        self.recorder: Recorder | None = None
        #: Names and model types of the modules that ran before an encoder did.
        self.candidates: list[tuple[str, str | None]] = []
        #: Ids and tables of lookups before the first layer.
        self.lookups: list[tuple[Tensor, Tensor]] = []
        #: Tensors that entered the encoder, its embeddings or its patches.
        self.arrived: list[Tensor] = []
        #: What went into the encoder as inputs_embeds, and what lookups gave.
        self.embeddings: list[Tensor] = []
        self.embedded: list[Tensor] = []
        #: Modules in front of the layers → the shapes that went in and came out.
        self.early: dict[nn.Module, tuple[list[Tensor], list[Tensor]]] = {}
        #: Lower hidden states that the head reads, as leaves, by layer.
        self.leaves: dict[int, Tensor] = {}
        #: What the head reads that no gradient follows.
        self.unfollowed: list[str] = []
        self.has_left_torch = False
        self._make_recorder = make_recorder
        self._encoder = encoder
        self._differentiate = differentiate
        self._thread = threading.get_ident()
        self._searched: set[nn.Module] = set()
        self._states: dict[int, int] = {}
        self._inner: set[int] = set()
        self._undo = ExitStack()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch inside, and restore everything after."""
        _WATCHING.add(self)
        with self._undo as undo:
            # Outside of the caller's modes; what closures set inside is undone by them.
            undo.enter_context(torch.inference_mode(False))
            undo.enter_context(torch.no_grad())
            undo.enter_context(hooked(self._enter, self._leave))
            if self._encoder is not None:
                self._begin(self._encoder)
            with self:
                yield

    def forget(self) -> None:
        """Watch no longer: in a forked child this thread is another one."""
        self._thread, self.recorder = -1, None

    def _begin(self, encoder: Encoder) -> None:
        self.recorder = self._make_recorder(encoder)
        self._undo.enter_context(evaluating(encoder.module))
        self._undo.enter_context(uncompiled(encoder.root))

    # Modules

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or threading.get_ident() != self._thread:
            return
        if self._encoder is None:
            self._look(module)
        if self.recorder is not None:
            self._leave_inference_mode()
            self.recorder.module_begins(module, args)

    def _leave(self, module: nn.Module, args: Any, *rest: Any) -> Any:
        if torch.compiler.is_compiling() or threading.get_ident() != self._thread:
            return None
        # Other threads may be told of no keywords while the hook comes and goes.
        kwargs, output = rest
        recorder = self.recorder
        if recorder is None:
            return None
        if not recorder.has_begun:
            named = [kwargs.get(name) for name in _TOKEN_ARGUMENTS]
            taken = _shapes([*args, *named, *kwargs.values()])
            given = output if isinstance(output, tuple | list) else [output]
            self.early[module] = (taken, _shapes(given))
        encoder = recorder.encoder
        if module is encoder.token_table:
            self.embedded.append(output)
        if module in (encoder.module, encoder.embeddings, encoder.patches):
            if isinstance(kwargs.get("inputs_embeds"), Tensor):
                self.embeddings.append(kwargs["inputs_embeds"])
            values = (*args, *kwargs.values())
            self.arrived += [value for value in values if isinstance(value, Tensor)]
        return recorder.module_ends(module, args, kwargs, output)

    def _look(self, module: nn.Module) -> None:
        """Record the first supported encoder that is about to run."""
        if module in self._searched:
            return
        # The parts of what is searched here need no search of their own.
        self._searched.update(module.modules())
        encoder = find_encoder(module)
        if encoder is None:
            self.candidates.append((type(module).__name__, model_type(module)))
        elif self.recorder is None:
            self._begin(encoder)
        elif encoder.module is not self.recorder.encoder.module:
            raise UnsupportedModelError(
                f"two encoders ran inside forward_func, in {type(module).__name__} and "
                "before it, and one is expected: pass the one to explain as encoder=."
            )

    def _leave_inference_mode(self) -> None:
        """Its tensors count no changes and have no gradients."""
        if torch.is_inference_mode_enabled():
            self._undo.enter_context(torch.inference_mode(False))
            torch._C._set_grad_enabled(False)

    # Operations

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation as it is, but where the head would lose its gradient."""
        recorder = self.recorder
        if recorder is None or not recorder.has_begun:
            if func is nn.functional.embedding:
                self._look_up(*args, **(kwargs or {}))
                self.embedded.append(func(*args, **(kwargs or {})))
                return self.embedded[-1]
        elif self._differentiate and not torch.compiler.is_compiling():
            if func is torch._C._set_grad_enabled:
                return func(recorder.is_in_head)
            if recorder.is_in_head:
                return self._in_head(func, args, kwargs or {})
        return AttentionMode.__torch_function__(self, func, types, args, kwargs)

    def attending(self) -> tuple[int, int] | None:
        """(batch, tokens) where a layer's attention runs now."""
        return None if self.recorder is None else self.recorder.attending()

    def project(self, value: Tensor) -> None:
        """Keep what the values are made of."""
        assert self.recorder is not None
        self.recorder.project(value)

    def attend(self, call: AttentionCall) -> None:
        """Keep a layer's attention."""
        assert self.recorder is not None
        self.recorder.attend(call)

    def _look_up(self, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> None:
        if self.recorder is not None:
            check_lookup(input, weight, self.recorder.encoder)
        self.lookups.append((input, weight))

    def _in_head(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        recorder = self.recorder
        assert recorder is not None
        # What a closure's own modes restored when they ended.
        self._leave_inference_mode()
        if not torch.is_grad_enabled():
            torch._C._set_grad_enabled(True)
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        follows = isinstance(first, Tensor) and first.requires_grad
        if follows and (name == "detach" or func == _DATA):
            return first
        if follows and name in _EXITS:
            self.has_left_torch = True
            return func(first.detach(), *args[1:], **kwargs)  # type: ignore[union-attr]
        if func is nn.functional.embedding:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            if weight is not None and weight is recorder.encoder.token_weights:
                self.unfollowed.append("tokens by themselves, as a decoder does")
        if not self._states:
            self._states = {id(state): layer for layer, state in recorder.states}
            self._inner = {_address(part) for part in recorder.inner_tensors}
        if self._is_written_to(name, first):
            raise UnsupportedModelError(
                "the head writes into the output of a lower layer in place: change a "
                "copy (tensor.clone()), or pass token_index."
            )
        args = tuple(self._followed(value) for value in args)
        kwargs = {key: self._followed(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)

    def _is_written_to(self, name: str, first: object) -> bool:
        in_place = name == "__setitem__" or (
            name.endswith("_") and not name.endswith("__")
        )
        return in_place and id(first) in self._states

    def _followed(self, value: Any) -> Any:
        """The same argument, with lower hidden states as leaves of the gradient."""
        if type(value) in (tuple, list):
            return type(value)(map(self._followed, value))
        if not isinstance(value, Tensor) or value.requires_grad:
            return value
        if value.is_inference():
            return value.clone()  # Those have no gradients.
        layer = self._states.get(id(value))
        if layer is not None:
            if layer not in self.leaves:
                self.leaves[layer] = value.detach().requires_grad_()
            return self.leaves[layer]
        if value.is_floating_point() and _address(value) in self._inner:
            self.unfollowed.append("what is inside of the attention layers")
        return value


# What is being watched, for a child that is forked meanwhile.
_WATCHING: weakref.WeakSet[Observer] = weakref.WeakSet()


def _forget_all() -> None:
    for observer in _WATCHING:
        observer.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)

# Torch numbers hooks without a lock: two threads could get one number.
_LOCK = threading.Lock()


@contextmanager
def hooked(enter: Callable[..., None], leave: Callable[..., Any]) -> Iterator[None]:
    """Global hooks before and after every module."""
    with _LOCK:
        before = register_module_forward_pre_hook(enter)
        after = register_module_forward_hook(leave, with_kwargs=True)
    try:
        yield
    finally:
        with _LOCK:
            before.remove()
            after.remove()
            # What removing the hook leaves behind.
            hooks._global_forward_hooks_with_kwargs.pop(after.id, None)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _shapes(values: Iterable[Any]) -> list[Tensor]:
    """Tensors without memory in place of those among the values."""
    tensors = (value for value in values if isinstance(value, Tensor))
    return [torch.empty_like(tensor, device="meta") for tensor in tensors]
