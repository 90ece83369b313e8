"""What hooks on an encoder see while it runs, made into a record of each layer."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from captum.attr import InterpretableEmbeddingBase
from torch import Tensor, nn

from captum_globenc.architectures import supported_model_types
from captum_globenc.encoders import Encoder, LayerModules
from captum_globenc.errors import (
    InputError,
    NonFiniteActivationError,
    UnsupportedModelError,
)
from captum_globenc.interface import attended_tokens, check_attended, switched
from captum_globenc.reconstruction import (
    POST_NORM_STEPS,
    PRE_NORM_STEPS,
    LayerProjections,
    check_final_norm,
    check_layers,
    project,
)
from captum_globenc.records import EncoderRecord, Grid, LayerRecord
from captum_globenc.weights import WeightCache, centre, working_dtype


@dataclass
class _Draft:
    """A layer whose forward is under way: what has been seen of it so far."""

    hidden: Tensor
    attention: dict[str, Any] = field(default_factory=dict)
    context: Tensor | None = None
    # "part.input" and "part.output" of the watched parts
    steps: dict[str, Tensor] = field(default_factory=dict)


class Recorder:
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
        self._final: tuple[Tensor, Tensor] | None = None
        self._grid: Grid | None = None

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
            if encoder.patches is not None:
                self._hook(undo, encoder.patches, after=self._keep_grid)
            for index, modules in enumerate(encoder.layers):
                self._hook_layer(undo, index, modules)
            if encoder.final_norm is not None:
                self._hook(undo, encoder.final_norm, after=self._keep_final)
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
        for layer in self._projections:
            if not layer.steps["output"].isfinite().all():
                raise NonFiniteActivationError(
                    f"layer {layer.name!r}: its activations hold NaN or infinity, so "
                    "it cannot be decomposed. Look for NaN in the weights or inputs, "
                    "or for overflow (float16?)."
                )
        assert self._attended is not None
        check_layers(self._projections, self._attended)
        if self.encoder.final_norm is not None:
            self._finish_final(self.encoder.final_norm)
        return EncoderRecord(tuple(self._layers), self._attended, self._grid)

    def _finish_final(self, norm: nn.LayerNorm) -> None:
        """The norm after the last layer becomes a part of it."""
        if self._final is None:
            assert self.encoder is not None
            raise UnsupportedModelError(
                f"{type(self.encoder.module).__name__}: the norm after its last layer "
                "did not run; see captum_globenc.register_architecture."
            )
        before, after = self._final
        last, attended = self._layers[-1], self._attended
        assert attended is not None
        with torch.no_grad(), torch.autocast(before.device.type, enabled=False):
            scale = _scale(before, norm)
            check_final_norm(
                self._projections[-1], before, after, scale, last.weights, attended
            )
        self._layers[-1] = replace(last, scales=(None, scale))

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
        for part, watched in modules.watched.items():

            def keep(_: nn.Module, args: Any, output: Tensor, part: str = part) -> None:
                if self._draft is None or f"{part}.output" in self._draft.steps:
                    raise UnsupportedModelError(
                        f"layer {modules.name!r}: its {part} ran outside the layer or "
                        "more than once. Is chunk_size_feed_forward set? Set it to 0. "
                        "Does one module serve as two parts? Give each its own."
                    )
                self._draft.steps[f"{part}.input"] = args[0]
                self._draft.steps[f"{part}.output"] = output

            self._hook(undo, watched, after=keep)

    def _keep_grid(self, patches: nn.Conv2d, args: Any, output: Tensor) -> None:
        rows, columns = output.shape[-2:]
        height, width = args[0].shape[-2:]
        down, right = patches.stride
        self._grid = Grid(
            rows, columns, min(1, rows * down / height), min(1, columns * right / width)
        )

    def _keep_final(self, _: nn.Module, args: Any, output: Tensor) -> None:
        if self._final is not None:
            raise UnsupportedModelError(
                "the norm after the last layer ran more than once inside forward_func."
            )
        self._final = args[0].detach(), output.detach()

    def _check_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        assert self.encoder is not None
        given = (
            inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        )
        ids = given.get("input_ids")
        tokens = ids if ids is not None else given.get("inputs_embeds")
        if self.encoder.patches is not None:
            _check_image(given.get("pixel_values"))
        if tokens is None:
            return
        if ids is not None:
            _check_ids(ids, self.encoder.module)
        most = self.encoder.max_tokens
        if most is not None and given.get("position_ids") is None:
            _check_length(tokens.shape[1], most)

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
        missing = {f"{part}.output" for part in modules.watched} - set(draft.steps)
        if missing:
            parts = " and ".join(sorted(step.split(".")[0] for step in missing))
            raise UnsupportedModelError(
                f"layer {modules.name!r}: its {parts} did not run; see "
                "captum_globenc.register_architecture."
            )
        assert self.encoder is not None
        scales: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.encoder.is_pre_norm:
            wanted = PRE_NORM_STEPS
        else:
            wanted = POST_NORM_STEPS
            first, second = modules.norms
            assert first is not None
            assert second is not None
            scales = (
                _scale(draft.steps["attention_norm.input"], first),
                _scale(draft.steps["output_norm.input"], second),
            )
        steps = {step: draft.steps[step] for step in wanted}
        weights = self._weights.get(modules.name, modules.output, modules.norms)
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
                {"hidden": draft.hidden, "output": output, **steps},
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
    table = encoder.get_input_embeddings()  # type: ignore[operator]
    if isinstance(table, InterpretableEmbeddingBase):
        return  # Captum's stand-in takes embeddings where ids belong.
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"input ids must be integers, got {ids.dtype}.")
    size = table.num_embeddings
    wrong = ids[(ids < 0) | (ids >= size)]
    if wrong.numel():
        raise InputError(
            f"input id {int(wrong[0])} is outside the vocabulary of {size} "
            f"(ids 0 to {size - 1}). Does the tokenizer belong to the model?"
        )


def _check_image(image: Tensor | None) -> None:
    if image is None or image.ndim != 4:
        found = "none" if image is None else f"shape {tuple(image.shape)}"
        raise InputError(
            "the model takes images, pixel_values of shape (batch, channels, height, "
            f"width), got {found}."
        )


def _check_length(tokens: int, most: int) -> None:
    if tokens > most:
        raise InputError(
            f"the input has {tokens} tokens and the model has positions for {most}: "
            "shorten the text, or truncate when tokenizing (truncation=True, "
            f"max_length={most})."
        )
