"""Run a model once and record, per encoder layer, what decomposes it.

While :func:`record` runs, the encoder's attention goes through
:mod:`captum_globenc.interface`, forward hooks keep what goes through the norms, and the
encoder is in evaluation mode. All of it is undone on the way out, also after an
exception.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from captum_globenc.encoders import Encoder, find_encoder, model_type
from captum_globenc.errors import InputError, UnsupportedModelError
from captum_globenc.interface import ACTIVE
from captum_globenc.recorder import Recorder
from captum_globenc.records import EncoderRecord
from captum_globenc.weights import WeightCache

# Two runs at once would switch and restore the same model's settings out of order, so
# one runs after the other; a run that records nothing is not held up.
_LOCK = threading.RLock()

Output = TypeVar("Output")


class Captured(NamedTuple, Generic[Output]):
    """What :func:`record` returns.

    Args:
        output (Any): what the recorded function returned.
        run (EncoderRecord): the encoder's run.
        encoder (Encoder): the encoder.
        token_logits (list[Tensor]): (batch, tokens), the outputs of linear maps of all
            tokens to one or two logits each, as heads for question answering have them.
    """

    output: Output
    run: EncoderRecord
    encoder: Encoder
    token_logits: list[Tensor]


def record(
    function: Callable[[], Output], encoder: Encoder | None, weights: WeightCache
) -> Captured[Output]:
    """Call ``function`` once and record the encoder that runs in it.

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
        if encoder is None:
            undo.enter_context(_installed_on_sight(recorder))
        else:
            undo.enter_context(recorder.installed(encoder))
        token_logits = undo.enter_context(_token_logits())
        output = function()
        run = recorder.finish()
        assert recorder.encoder is not None
        return Captured(output, run, recorder.encoder, token_logits)


@contextmanager
def _token_logits() -> Iterator[list[Tensor]]:
    """Collect what linear maps make of all tokens, where it is one or two numbers."""
    thread = threading.get_ident()
    found: list[Tensor] = []

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        if (
            isinstance(module, nn.Linear)
            and module.out_features <= 2
            and output.ndim == 3
            and threading.get_ident() == thread
        ):
            found.extend(output.detach().unbind(-1))

    handle = register_module_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()


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
            kind = model_type(module)
            name = type(module).__name__
            recorder.seen.append(f"{name} of model type {kind!r}" if kind else name)
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
