"""Run a model once and record, per encoder layer, what decomposes it.

While :func:`record` runs, the encoder's attention goes through
:mod:`captum_globenc.interface`, forward hooks keep what goes through the norms, and the
encoder is in evaluation mode. All of it is undone on the way out, also after an
exception.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from captum_globenc.architectures import (
    Encoder,
    LayerModules,
    find_encoder,
    model_type,
    supported_model_types,
)
from captum_globenc.errors import (
    InputError,
    NonFiniteActivationError,
    UnsupportedModelError,
)
from captum_globenc.interface import (
    ACTIVE,
    attended_tokens,
    check_attended,
    switched,
)
from captum_globenc.reconstruction import LayerProjections, check_layers, project
from captum_globenc.records import EncoderRecord, LayerRecord
from captum_globenc.weights import WeightCache, centre, working_dtype

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
    """

    output: Output
    run: EncoderRecord
    encoder: Encoder


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
        recorder = ACTIVE.listener = _Recorder(weights)
        undo.callback(setattr, ACTIVE, "listener", None)
        if encoder is None:
            undo.enter_context(_installed_on_sight(recorder))
        else:
            undo.enter_context(recorder.installed(encoder))
        output = function()
        run = recorder.finish()
        assert recorder.encoder is not None
        return Captured(output, run, recorder.encoder)


@contextmanager
def _installed_on_sight(recorder: _Recorder) -> Iterator[None]:
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


@dataclass
class _Draft:
    """A layer whose forward is under way: what has been seen of it so far."""

    hidden: Tensor
    attention: dict[str, Any] = field(default_factory=dict)
    context: Tensor | None = None
    # part name → (its input, its output)
    passed: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class _Recorder:
    """Collects the layers of one run of one encoder."""

    def __init__(self, weights: WeightCache) -> None:
        self.encoder: Encoder | None = None
        self.seen: list[str] = []
        self._weights = weights
        self._thread = threading.get_ident()
        self._draft: _Draft | None = None
        self._layers: list[LayerRecord] = []
        self._attended: Tensor | None = None
        self._projections: list[LayerProjections] = []

    @contextmanager
    def installed(self, encoder: Encoder) -> Iterator[None]:
        """Hooks, attention function and evaluation mode in; all restored at the end."""
        self.encoder = encoder
        with ExitStack() as undo:
            everything = list(encoder.module.modules())
            undo.enter_context(switched(everything))
            for module in everything:
                if module.training:
                    # Not module.train(): it would also switch this module's parts.
                    undo.callback(setattr, module, "training", True)
                    module.training = False
            self._hook(undo, encoder.embeddings, before=self._check_inputs)
            for index, modules in enumerate(encoder.layers):
                self._hook_layer(undo, index, modules)
            yield

    def finish(self) -> EncoderRecord:
        """The record, once the run is over."""
        if self.encoder is None:
            seen = ", ".join(dict.fromkeys(self.seen)) or "no torch.nn.Module"
            raise UnsupportedModelError(
                "No supported encoder ran inside forward_func (seen: "
                f"{seen}; supported model types: {', '.join(supported_model_types())})"
                ". Pass the whole model as encoder=, or describe its layers with "
                "captum_globenc.register_architecture."
            )
        if len(self._layers) != len(self.encoder.layers):
            raise UnsupportedModelError(
                f"{type(self.encoder.module).__name__}: {len(self._layers)} of "
                f"{len(self.encoder.layers)} layers ran inside forward_func; each "
                "layer must run once, in the calling thread."
            )
        for layer in self._layers:
            if not torch.stack(layer.scales).isfinite().all():
                raise NonFiniteActivationError(
                    f"layer {layer.name!r}: its activations hold NaN or infinity, so "
                    "it cannot be decomposed. Look for NaN in the weights or inputs, "
                    "or for overflow (float16?)."
                )
        assert self._attended is not None
        check_layers(self._projections, self._attended)
        return EncoderRecord(tuple(self._layers), self._attended)

    def _hook(
        self,
        undo: ExitStack,
        module: nn.Module,
        before: Callable[..., None] | None = None,
        after: Callable[..., None] | None = None,
    ) -> None:
        # Another thread may use the model at the same time: not ours to record.
        if before is not None:

            def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
                if threading.get_ident() == self._thread:
                    before(module, args, kwargs)

            handle = module.register_forward_pre_hook(enter, with_kwargs=True)
            undo.callback(handle.remove)
        if after is not None:

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                if threading.get_ident() == self._thread:
                    after(module, args, output)

            undo.callback(module.register_forward_hook(leave).remove)

    def _hook_layer(self, undo: ExitStack, index: int, modules: LayerModules) -> None:
        def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._begin(index, modules, args[0] if args else kwargs["hidden_states"])

        def end(_: nn.Module, args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
                self._end(modules, output)

        self._hook(undo, modules.layer, before=begin, after=end)
        for part in ("attention_norm", "feed_forward", "output_norm"):

            def keep(_: nn.Module, args: Any, output: Tensor, part: str = part) -> None:
                if self._draft is None or part in self._draft.passed:
                    raise UnsupportedModelError(
                        f"layer {modules.name!r}: its {part} ran outside the layer or "
                        "more than once. Is chunk_size_feed_forward set? Set it to 0. "
                        "Does one module serve as two parts? Give each its own."
                    )
                self._draft.passed[part] = args[0], output

            self._hook(undo, getattr(modules, part), after=keep)

    def _check_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        assert self.encoder is not None
        given = (
            inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        )
        ids = given.get("input_ids")
        tokens = ids if ids is not None else given.get("inputs_embeds")
        if tokens is None:
            return
        if ids is not None:
            _check_ids(ids, self.encoder.module)
        if given.get("position_ids") is None:
            _check_length(tokens.shape[1], self.encoder.max_tokens)

    def _begin(self, index: int, modules: LayerModules, hidden: Tensor) -> None:
        if index != len(self._layers) or self._draft is not None:
            raise UnsupportedModelError(
                f"layer {modules.name!r} ran out of order or a second time inside "
                "forward_func; the encoder must run once, all layers in turn, each a "
                "module of its own."
            )
        self._draft = _Draft(hidden)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        context: Tensor,
    ) -> None:
        """Keep what the attention function saw; ``context`` is what it returns."""
        if self._draft is None or self.encoder is None:
            return
        modules = self.encoder.layers[len(self._layers)]
        if module is not modules.attention:
            return
        if self._attended is None:
            self._attended = attended_tokens(mask, query)
            check_attended(self._attended)
        self._draft.attention = {
            "query": query.detach(),
            "key": key.detach(),
            "value": value.detach(),
            "mask": None if mask is None else mask.detach(),
            "scaling": scaling,
        }
        self._draft.context = context.detach()

    def _end(self, modules: LayerModules, output: Tensor) -> None:
        draft, self._draft = self._draft, None
        assert draft is not None
        if draft.context is None:
            raise UnsupportedModelError(
                f"layer {modules.name!r}: its attention did not go through "
                "transformers.AttentionInterface, so it cannot be recorded. Supported "
                f"model types: {', '.join(supported_model_types())}."
            )
        missing = {"attention_norm", "feed_forward", "output_norm"} - set(draft.passed)
        if missing:
            raise UnsupportedModelError(
                f"layer {modules.name!r}: its {' and '.join(sorted(missing))} did not "
                "run; see captum_globenc.register_architecture."
            )
        first, normed = draft.passed["attention_norm"]
        _, fed = draft.passed["feed_forward"]
        second, last = draft.passed["output_norm"]
        scales = (
            _scale(first, modules.attention_norm),
            _scale(second, modules.output_norm),
        )
        weights = self._weights.get(
            modules.name, modules.output, (modules.attention_norm, modules.output_norm)
        )
        dtype = weights.probe.dtype
        probe = weights.probe[: draft.context.shape[-1]]
        value = draft.attention["value"].transpose(1, 2)
        assert self._attended is not None
        self._layers.append(
            LayerRecord(
                name=modules.name,
                hidden=draft.hidden.detach(),
                scales=scales,
                value_probe=value.to(dtype) @ probe,
                context_probe=draft.context.to(dtype) @ probe,
                weights=weights,
                attended=self._attended,
                **draft.attention,
            )
        )
        self._projections.append(
            project(
                modules.name,
                (draft.hidden, first, normed, fed, second, last, output),
                draft.context.flatten(2),
                scales,
                weights,
            )
        )


def _scale(vectors: Tensor, norm: nn.LayerNorm) -> Tensor:
    """sqrt(var + eps) over the hidden dimension, biased, (batch, tokens)."""
    values = centre(vectors.to(working_dtype(vectors.dtype)))
    # Not var(), which takes five times as long.
    squares = values.norm(dim=-1).square()
    scale: Tensor = (squares / values.shape[-1] + norm.eps).sqrt()
    return scale


def _check_ids(ids: Tensor, encoder: nn.Module) -> None:
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"input ids must be integers, got {ids.dtype}.")
    size = encoder.get_input_embeddings().num_embeddings  # type: ignore[operator]
    wrong = ids[(ids < 0) | (ids >= size)]
    if wrong.numel():
        raise InputError(
            f"input id {int(wrong[0])} is outside the vocabulary of {size} "
            f"(ids 0 to {size - 1}). Does the tokenizer belong to the model?"
        )


def _check_length(tokens: int, most: int) -> None:
    if tokens > most:
        raise InputError(
            f"the input has {tokens} tokens and the model has positions for {most}: "
            "shorten the text, or truncate when tokenizing (truncation=True, "
            f"max_length={most})."
        )
