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
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules import module as hooks
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from captum_globenc.deferred import holds
from captum_globenc.encoders.discovery import find_encoder
from captum_globenc.encoders.registry import model_type
from captum_globenc.encoders.resolver import Encoder
from captum_globenc.errors import UnsupportedModelError
from captum_globenc.recording.attention import AttentionCall, AttentionMode
from captum_globenc.recording.compiled import uncompiled
from captum_globenc.recording.evaluation_mode import evaluating
from captum_globenc.recording.head import HeadFollower
from captum_globenc.recording.inputs import check_lookup
from captum_globenc.recording.recorder import Recorder

# What the tokens are called where a module is called with keywords.
_TOKEN_ARGUMENTS = ("input_ids", "inputs_embeds", "pixel_values", "hidden_states")


class Observer(AttentionMode):
    """Sees the modules and operations of one run.

    Args:
        make_recorder (Callable): encoder → its recorder.
        encoder (Encoder or None): the encoder to record; None: the first supported one
            that runs.
        inputs (Tensor): what ``forward_func`` is given first.
        differentiate (bool): follow what the head does by gradients.
        is_named (bool): the caller has named the encoder.
    """

    def __init__(
        self,
        make_recorder: Callable[[Encoder], Recorder],
        encoder: Encoder | None,
        inputs: Tensor,
        differentiate: bool,
        is_named: bool,
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
        #: Follows the head; None: gradients are not wanted.
        self.head: HeadFollower | None = None
        self._make_recorder = make_recorder
        self._encoder = encoder
        self._inputs = inputs
        self._is_named = is_named
        self._differentiate = differentiate
        self._thread = get_ident()
        self._searched: set[nn.Module] = set()
        self._is_inside = False
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

    def close(self) -> None:
        """Let go of the run: cycles would keep its tensors."""
        if self.recorder is not None:
            self.recorder.close()
        self.recorder = self.head = None

    def forget(self) -> None:
        """Watch no longer: in a forked child this thread is another one."""
        self._thread, self.recorder = -1, None

    def _begin(self, encoder: Encoder) -> None:
        self.recorder = self._make_recorder(encoder)
        if self._differentiate:
            self.head = HeadFollower(
                self._inputs,
                encoder.token_weights,
                self._is_named,
                self.recorder.originals,
            )
        self._undo.enter_context(evaluating(encoder.root))
        self._undo.enter_context(uncompiled(encoder.root))

    # Modules

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if get_ident() != self._thread or is_compiling():
            return
        if self._encoder is None:
            self._look(module)
        recorder = self.recorder
        if recorder is None:
            return
        self._leave_inference_mode()
        recorder.module_begins(module, args)
        if not self._is_inside:
            encoder = recorder.encoder
            self._is_inside = module in (encoder.module, encoder.embeddings)
        if recorder.has_begun and self.head is not None and self.head.hidden is None:
            self._begin_layers(module, args, {})

    def _leave(self, module: nn.Module, args: Any, *rest: Any) -> Any:
        if get_ident() != self._thread or is_compiling():
            return None
        # Other threads may be told of no keywords while the hook comes and goes.
        kwargs, output = rest
        recorder = self.recorder
        if recorder is None:
            return None
        if not recorder.has_begun:
            self._keep_early(module, args, kwargs, output, recorder.encoder)
        elif self.head is not None and self.head.hidden is None:
            self._begin_layers(module, args, kwargs)
        if module is recorder.encoder.module:
            self._keep_arrived(args, kwargs)
        return recorder.module_ends(module, args, kwargs, output)

    def _keep_early(
        self, module: nn.Module, args: Any, kwargs: Any, output: Any, encoder: Encoder
    ) -> None:
        """Keep of what runs in front of the layers what says where inputs go."""
        named = [kwargs.get(name) for name in _TOKEN_ARGUMENTS]
        taken = _shapes([*args, *named, *kwargs.values()])
        given = output if isinstance(output, tuple | list) else [output]
        self.early[module] = (taken, _shapes(given))
        if module is encoder.token_table:
            self.embedded.append(output)
        if module in (encoder.embeddings, encoder.patches):
            self._keep_arrived(args, kwargs)

    def _keep_arrived(self, args: Any, kwargs: Any) -> None:
        if isinstance(kwargs.get("inputs_embeds"), Tensor):
            self.embeddings.append(kwargs["inputs_embeds"])
        values = (*args, *kwargs.values())
        self.arrived += [value for value in values if isinstance(value, Tensor)]

    def _begin_layers(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Tell the head's follower of the input of the first layer."""
        recorder, head = self.recorder, self.head
        assert recorder is not None
        assert head is not None
        if module is recorder.encoder.layers[0].layer:
            values = (*args, kwargs.get("hidden_states"), *kwargs.values())
            tensors = (value for value in values if isinstance(value, Tensor))
            head.hidden = next(tensors, None)

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
        recorder, head = self.recorder, self.head
        if is_compiling():
            return func(*args, **(kwargs or {}))
        if recorder is None or not recorder.has_begun:
            if func is nn.functional.embedding:
                return self._look_up(*args, **(kwargs or {}))
        elif head is not None and func is torch._C._set_grad_enabled:
            return func(recorder.is_in_head)
        elif head is not None and recorder.is_in_head:
            self._leave_inference_mode()
            return head.run(func, args, kwargs or {})
        result = AttentionMode.__torch_function__(self, func, types, args, kwargs)
        if head is not None and (self._is_inside or recorder.has_begun):  # type: ignore[union-attr]
            head.note(result)
        return result

    def attending(self) -> tuple[int, int] | None:
        """(batch, tokens) where a layer's attention runs now."""
        return None if self.recorder is None else self.recorder.attending()

    def is_attention(self, sums_to_one: Tensor) -> bool:
        """As in the last run, where a layer's products come in the same order."""
        assert self.recorder is not None
        return holds(self.recorder.next_product(), sums_to_one)

    def project(self, value: Tensor) -> None:
        """Keep what the values are made of."""
        assert self.recorder is not None
        self.recorder.project(value)

    def attend(self, call: AttentionCall) -> None:
        """Keep a layer's attention."""
        assert self.recorder is not None
        self.recorder.attend(call)

    def _look_up(
        self, input: Tensor, weight: Tensor, *rest: Any, **named: Any
    ) -> Tensor:
        self.lookups.append((input, weight))
        if self.recorder is not None:
            input = check_lookup(input, weight, self.recorder.encoder)
        self.embedded.append(nn.functional.embedding(input, weight, *rest, **named))
        return self.embedded[-1]


# What is being watched, for a child that is forked meanwhile.
_WATCHING: weakref.WeakSet[Observer] = weakref.WeakSet()
# Torch numbers hooks without a lock: two threads could get one number.
_LOCK = threading.Lock()


def _forget_all() -> None:
    _LOCK.release()
    for observer in _WATCHING:
        observer.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_LOCK.acquire,
        after_in_parent=_LOCK.release,
        after_in_child=_forget_all,
    )


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


def _shapes(values: Iterable[Any]) -> list[Tensor]:
    """Tensors without memory in place of those among the values."""
    tensors = (value for value in values if isinstance(value, Tensor))
    return [torch.empty_like(tensor, device="meta") for tensor in tensors]
