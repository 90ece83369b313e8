"""Run a model once and record, per encoder layer, what decomposes it.

While :func:`record` runs, the encoder's attention goes through
:mod:`captum_globenc.interface`, forward hooks keep what goes through the norms, and the
encoder is in evaluation mode. All of it is undone on the way out, also after an
exception.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from transformers import PreTrainedModel

from captum_globenc.architectures import model_type
from captum_globenc.encoders import Encoder, find_encoder
from captum_globenc.errors import InputError, UnsupportedModelError
from captum_globenc.interface import ACTIVE, listening
from captum_globenc.recorder import Recorder
from captum_globenc.records import EncoderRecord
from captum_globenc.weights import WeightCache

# Modules whose outputs per token are of several tokens.
_MIXERS = (nn.RNNBase, nn.modules.conv._ConvNd, nn.MultiheadAttention)
# Two runs at once would switch and restore the same model's settings out of order, so
# one runs after the other; a run that records nothing is not held up.
_LOCK = threading.RLock()

Output = TypeVar("Output")


class Vector(NamedTuple):
    """A vector of each example that a module took or returned.

    Args:
        values (Tensor): (batch, n).
        is_taken (bool): whether it went in.
    """

    values: Tensor
    is_taken: bool


@dataclass(frozen=True)
class Head:
    """What was seen of the head, by which the token that it reads is found.

    Args:
        token_logits (list[Tensor]): (batch, tokens, n), what maps and norms make of all
            tokens.
        vectors (list[Vector]): what goes into or comes out of modules, and what the
            encoder returns instead of tokens.
        pooled (list[Vector]): likewise, of modules that belong to the encoder.
        mixers (list[str]): what ran that mixes tokens, so that its output per token is
            of all of them.
    """

    token_logits: list[Tensor] = field(default_factory=list)
    vectors: list[Vector] = field(default_factory=list)
    pooled: list[Vector] = field(default_factory=list)
    mixers: list[str] = field(default_factory=list)


class Captured(NamedTuple, Generic[Output]):
    """What :func:`record` returns.

    Args:
        output (Any): what the recorded function returned.
        run (EncoderRecord): the encoder's run.
        encoder (Encoder): the encoder.
        head (Head): what ran after it.
    """

    output: Output
    run: EncoderRecord
    encoder: Encoder
    head: Head


def record(
    function: Callable[[], Output], encoder: Encoder | None, weights: WeightCache
) -> Captured[Output]:
    """Call ``function`` once and record the encoder that runs in it.

    Compiled models run as they were before: hooks do not run in compiled code.

    Args:
        function (callable): calls the model, once.
        encoder (Encoder or None): the encoder to record; None: the first supported one
            that runs.
        weights (WeightCache): prepared weights of earlier runs.

    Returns:
        *Captured*: what the function returned, the record, and whose it is.

    Raises:
        UnsupportedModelError: no supported encoder ran, or its attention does something
            that is not known.
        ReconstructionError: the recorded parts do not rebuild a layer.
        NonFiniteActivationError: NaN or infinity in a layer.
        InputError: ids, mask or length that the encoder cannot take.
    """
    with _LOCK, ExitStack() as undo:
        if ACTIVE.listener is not None:
            raise InputError("an attribution was started inside another one's run.")
        recorder = ACTIVE.listener = Recorder(weights)
        undo.callback(setattr, ACTIVE, "listener", None)
        undo.enter_context(torch.compiler.set_stance("force_eager"))
        # Compiled modules warn of the global hooks below; eager, they run as ever.
        undo.enter_context(warnings.catch_warnings())
        warnings.filterwarnings(
            "ignore", r"Using `torch\.compile\(module\)` when there"
        )
        undo.enter_context(listening())
        if encoder is None:
            undo.enter_context(_installed_on_sight(recorder))
        else:
            undo.enter_context(recorder.installed(encoder))
        head = undo.enter_context(_watched_head(recorder))
        output = function()
        run = recorder.finish()
        assert recorder.encoder is not None
        return Captured(output, run, recorder.encoder, head)


@contextmanager
def _watched_head(recorder: Recorder) -> Iterator[Head]:
    """Collect what goes through modules once the layers have run."""
    thread = threading.get_ident()
    head = Head(mixers=recorder.attended_later)
    inside: set[int] = set()
    others: list[nn.Module] = []  # models of their own that are running

    def is_later() -> bool:
        return threading.get_ident() == thread and recorder.is_past_layers

    def enter(module: nn.Module, _: Any) -> None:
        if not is_later():
            return
        assert recorder.encoder is not None
        if not inside:
            inside.update(id(part) for part in recorder.encoder.module.modules())
        # Such as the other tower of CLIP: what it computes is no part of the head.
        if isinstance(module, PreTrainedModel) and id(module) not in inside:
            others.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if not is_later():
            return
        if others:
            if others[-1] is module:
                others.pop()
            return
        if isinstance(module, nn.Linear | nn.LayerNorm) and output.ndim == 3:
            head.token_logits.append(output.detach())
        own = id(module) in inside
        if isinstance(module, _MIXERS) and not own:
            head.mixers.append(type(module).__name__)
        returned = list(_tensors(output))
        seen = [
            Vector(value.detach(), is_taken)
            for values, is_taken in ((_tensors(args), True), (returned, False))
            for value in values
            if value.ndim == 2 and value.is_floating_point()
        ]
        (head.pooled if own else head.vectors).extend(seen)
        assert recorder.encoder is not None
        # A model whose head is inside of what was registered returns no tokens.
        if module is recorder.encoder.module and all(v.ndim == 2 for v in returned):
            head.vectors.extend(vector for vector in seen if not vector.is_taken)

    with ExitStack() as undo:
        undo.callback(register_module_forward_pre_hook(enter).remove)
        undo.callback(register_module_forward_hook(leave).remove)
        yield head


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors in what modules take and return."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors(tuple(values.values()))
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


@contextmanager
def _installed_on_sight(recorder: Recorder) -> Iterator[None]:
    """Install the recorder on the first supported encoder that is about to run."""
    thread = threading.get_ident()
    searched: set[int] = set()

    def look(module: nn.Module, _: Any) -> None:
        if threading.get_ident() != thread or id(module) in searched:
            return
        # The parts of what is searched here need no search of their own.
        searched.update(id(part) for part in module.modules())
        encoder = find_encoder(module)
        if encoder is None:
            recorder.seen.append((type(module).__name__, model_type(module)))
        elif recorder.encoder is None:
            undo.enter_context(recorder.installed(encoder))
        elif encoder.module is not recorder.encoder.module:
            raise UnsupportedModelError(
                f"two encoders ran inside forward_func, in {type(module).__name__} and "
                "before it, and one is expected: pass the one to explain as encoder=."
            )

    with ExitStack() as undo:
        undo.callback(register_module_forward_pre_hook(look).remove)
        yield
