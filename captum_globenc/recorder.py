"""What hooks on an encoder see while it runs, made into a record of each layer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from captum_globenc.architectures import supported_model_types
from captum_globenc.encoders import Encoder, LayerModules, refusals
from captum_globenc.errors import (
    InputError,
    NonFiniteActivationError,
    UnsupportedModelError,
)
from captum_globenc.inputs import check_inputs
from captum_globenc.interface import (
    Attended,
    attended_tokens,
    check_attended,
    switched,
    weightless,
)
from captum_globenc.parts import scale_of
from captum_globenc.reconstruction import (
    POST_NORM_STEPS,
    PRE_NORM_STEPS,
    LayerProjections,
    check_final_norm,
    check_layers,
    project,
)
from captum_globenc.records import EncoderRecord, Grid, LayerRecord
from captum_globenc.weights import WeightCache, working_dtype


@dataclass
class _Draft:
    """A layer whose forward is under way: what has been seen of it so far."""

    name: str
    modules: LayerModules
    hidden: Tensor
    attends: bool = False
    call: Attended | None = None
    # "part.input" and "part.output" of the watched parts
    steps: dict[str, Tensor] = field(default_factory=dict)


class Recorder:
    """Collects the layers of one run of one encoder."""

    def __init__(self, weights: WeightCache) -> None:
        self.encoder: Encoder | None = None
        self.seen: list[tuple[str, str | None]] = []
        self._weights = weights
        self._thread = threading.get_ident()
        self._draft: _Draft | None = None
        self._layers: list[LayerRecord] = []
        self._attended: Tensor | None = None
        self._mask: Tensor | None = None
        self._projections: list[LayerProjections] = []
        self._output: Tensor | None = None
        self._final: tuple[Tensor, Tensor] | None = None
        self._grid: Grid | None = None
        self.has_begun = False
        #: Attention that ran after the layers.
        self.attended_later: list[str] = []

    @property
    def is_past_layers(self) -> bool:
        """Whether all layers have run, so that what runs now is the head."""
        return (
            self.encoder is not None
            and self._draft is None
            and len(self._layers) >= len(self.encoder.layers)
        )

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
            if encoder.embeddings is not None:
                self._hook(undo, encoder.embeddings, before=self._check_inputs)
            if encoder.patches is not None:
                self._hook(undo, encoder.patches, after=self._keep_grid)
            for modules in encoder.layers:
                self._hook_layer(undo, modules)
            if encoder.final_norm is not None:
                self._hook(undo, encoder.final_norm, after=self._keep_final)
            yield

    def finish(self) -> EncoderRecord:
        """The record, once the run is over."""
        if self.encoder is None:
            raise self._nothing_ran()
        found, expected = len(self._layers), len(self.encoder.layers)
        if found < expected or (found > expected and not self._is_shared):
            raise UnsupportedModelError(
                f"{type(self.encoder.module).__name__}: {found} of {expected} layers "
                "ran inside forward_func; each layer must run once, in the calling "
                "thread."
            )
        for layer in self._projections:
            if not layer.steps["output"].isfinite().all():
                raise NonFiniteActivationError(
                    f"layer {layer.name!r}: its activations hold NaN or infinity, so "
                    "it cannot be decomposed. Look for NaN in the weights or inputs, "
                    "or for overflow (float16?)."
                )
        assert self._attended is not None
        assert self._output is not None
        check_layers(self._projections, self._attended)
        if self.encoder.final_norm is not None:
            self._finish_final(self.encoder.final_norm)
        return EncoderRecord(
            tuple(self._layers), self._attended, self._output, self._grid
        )

    @property
    def _is_shared(self) -> bool:
        return self.encoder is not None and self.encoder.architecture.shared

    def _nothing_ran(self) -> UnsupportedModelError:
        reasons = refusals([kind for _, kind in self.seen if kind is not None])
        if reasons:
            return UnsupportedModelError(
                f"No supported encoder ran inside forward_func: {reasons}"
            )
        names = [
            f"{name} of model type {kind!r}" if kind else name
            for name, kind in self.seen
        ]
        seen = ", ".join(dict.fromkeys(names)) or "no torch.nn.Module"
        return UnsupportedModelError(
            "No supported encoder ran inside forward_func (seen: "
            f"{seen}; supported model types: {', '.join(supported_model_types())})"
            ". Pass the whole model as encoder=, or describe its layers with "
            "captum_globenc.register_architecture."
        )

    def _finish_final(self, norm: nn.Module) -> None:
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
            scale = _scale(norm, before)
            check_final_norm(
                self._projections[-1], before, after, scale, last.weights, attended
            )
        self._layers[-1] = replace(last, scales=(*last.scales[:-1], scale))
        self._output = after

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

    def _hook_layer(self, undo: ExitStack, modules: LayerModules) -> None:
        def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
            hidden = kwargs.get("hidden_states", next(tensors, None))
            assert isinstance(hidden, Tensor)
            if hidden.ndim != 3:
                raise InputError(
                    f"layer {modules.name!r} is given hidden states of shape "
                    f"{tuple(hidden.shape)}, and three dimensions are expected, batch, "
                    "tokens and hidden: of one example, pass a batch of one."
                )
            self._begin(modules, self._batch_first(hidden))

        def end(_: nn.Module, args: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
                self._end(self._batch_first(output))

        self._hook(undo, modules.layer, before=begin, after=end)
        self._hook_attention(undo, modules.attention)
        for part, watched in modules.watched.items():

            def keep(_: nn.Module, args: Any, output: Tensor, part: str = part) -> None:
                if self._draft is None or f"{part}.output" in self._draft.steps:
                    raise UnsupportedModelError(
                        f"layer {modules.name!r}: its {part} ran outside the layer or "
                        "more than once. Is chunk_size_feed_forward set? Set it to 0. "
                        "Does one module serve as two parts? Give each its own."
                    )
                self._draft.steps[f"{part}.input"] = self._batch_first(args[0])
                self._draft.steps[f"{part}.output"] = self._batch_first(output)

            self._hook(undo, watched, after=keep)

    def _hook_attention(self, undo: ExitStack, attention: nn.Module) -> None:
        def begin(*_: Any) -> None:
            if self._draft is not None:
                self._draft.attends = True

        def end(*_: Any) -> None:
            if self._draft is not None:
                self._draft.attends = False

        def heard() -> Attended:
            assert self._draft is not None
            assert self._draft.call is not None
            return self._draft.call

        self._hook(undo, attention, before=begin, after=end)
        undo.enter_context(weightless(attention, heard))

    def _batch_first(self, vectors: Tensor) -> Tensor:
        assert self.encoder is not None
        if self.encoder.architecture.batch_first:
            return vectors
        return vectors.transpose(0, 1)

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
        self._final = tuple(self._batch_first(t.detach()) for t in (args[0], output))  # type: ignore[assignment]

    def _check_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        assert self.encoder is not None
        check_inputs(self.encoder, module, args, kwargs)

    def _begin(self, modules: LayerModules, hidden: Tensor) -> None:
        assert self.encoder is not None
        index, name = len(self._layers), modules.name
        if self._is_shared:
            expected, name = True, f"{name} (run {index + 1})"
        else:
            layers = self.encoder.layers
            expected = index < len(layers) and layers[index] is modules
        if not expected or self._draft is not None:
            raise UnsupportedModelError(
                f"layer {name!r} ran out of order or a second time inside "
                "forward_func; the encoder must run once, all layers in turn, each a "
                "module of its own."
            )
        self.has_begun = True
        self._draft = _Draft(name, modules, hidden)

    @property
    def is_waiting(self) -> bool:
        """Whether a layer's attention is running."""
        return self._draft is not None and self._draft.attends

    def overhear(self) -> None:
        """Note attention that runs after the layers."""
        if self.is_past_layers:
            self.attended_later.append("attention")

    def attend(self, call: Attended) -> None:
        """Keep a layer's call of scaled dot-product attention."""
        draft = self._draft
        assert draft is not None
        batch, tokens = draft.hidden.shape[:2]
        shapes = [tuple(t.shape) for t in (call.query, call.key, call.value)]
        fits = all(
            len(shape) == 4 and (shape[0], shape[2]) == (batch, tokens)
            for shape in shapes
        )
        if draft.call is not None or not fits:
            raise UnsupportedModelError(
                f"layer {draft.name!r}: its attention must call scaled dot-product "
                "attention once, with queries, keys and values (batch, heads, tokens, "
                f"head size) of the layer's {batch} by {tokens} tokens; got shapes "
                f"{shapes}{'' if draft.call is None else ', for the second time'}."
            )
        draft.call = call
        self._check_mask(draft.name, call)

    def _check_mask(self, layer: str, call: Attended) -> None:
        """Every layer must see the same tokens: what is padding is padding to all."""
        if self._attended is not None and call.mask is self._mask:
            return
        attended = attended_tokens(call.mask, call.query)
        if self._attended is None:
            check_attended(attended)
            self._attended = attended
        elif not torch.equal(attended, self._attended):
            raise UnsupportedModelError(
                f"layer {layer!r} attends to other tokens than the layers below: its "
                "mask hides some that theirs show, or shows some that theirs hide."
            )
        self._mask = call.mask

    def _end(self, output: Tensor) -> None:
        draft, self._draft = self._draft, None
        assert draft is not None
        modules, call = draft.modules, draft.call
        if call is None:
            raise UnsupportedModelError(
                f"layer {draft.name!r}: its attention did not go through "
                "transformers.AttentionInterface or torch's "
                "scaled_dot_product_attention, so it cannot be recorded. Code that "
                "imports that function by its name must call it as "
                "torch.nn.functional.scaled_dot_product_attention. Supported model "
                f"types: {', '.join(supported_model_types())}."
            )
        missing = {f"{part}.output" for part in modules.watched} - set(draft.steps)
        if missing:
            parts = " and ".join(sorted(step.split(".")[0] for step in missing))
            raise UnsupportedModelError(
                f"layer {draft.name!r}: its {parts} did not run; see "
                "captum_globenc.register_architecture."
            )
        assert self.encoder is not None
        first, second, _ = modules.parts.norms
        scales = tuple(
            None if norm is None else _scale(norm, draft.steps[f"{part}.input"])
            for part, norm in (("attention_norm", first), ("output_norm", second))
        )
        pre_norm = self.encoder.architecture.is_pre_norm
        wanted = PRE_NORM_STEPS if pre_norm else POST_NORM_STEPS
        steps = {step: draft.steps[step] for step in wanted}
        for step, vectors in {**steps, "output": output}.items():
            if vectors.shape != draft.hidden.shape:
                raise UnsupportedModelError(
                    f"layer {draft.name!r}: its {step.replace('.', ' ')} has shape "
                    f"{tuple(vectors.shape)}, and the layer's input "
                    f"{tuple(draft.hidden.shape)}: look at the paths and at "
                    "batch_first in its description, see "
                    "captum_globenc.register_architecture."
                )
        weights = self._weights.get(modules.name, modules.parts)
        dtype = weights.probe.dtype
        context = call.context.detach().transpose(1, 2)
        probe = weights.probe[: context.shape[-1]]
        assert self._attended is not None
        self._output = output.detach()
        self._layers.append(
            LayerRecord(
                name=draft.name,
                query=call.query.detach(),
                key=call.key.detach(),
                value=call.value.detach(),
                mask=None if call.mask is None else call.mask.detach(),
                scaling=call.scaling,
                hidden=draft.hidden.detach(),
                scales=(*scales, None),
                value_probe=call.value.detach().transpose(1, 2).to(dtype) @ probe,
                context_probe=context.to(dtype) @ probe,
                weights=weights,
                attended=self._attended,
            )
        )
        self._projections.append(
            project(
                draft.name,
                {"hidden": draft.hidden, "output": output, **steps},
                context.flatten(2),
                scales,
                weights,
                modules.feed_forward_scale,
            )
        )


def _scale(norm: nn.Module, vectors: Tensor) -> Tensor:
    """The norm's denominators in the working dtype, (batch, tokens)."""
    return scale_of(norm, vectors.to(working_dtype(vectors.dtype)))
