"""What is seen of an encoder while it runs, made into a record of each layer."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from captum_globenc.deferred import Judge, check_later
from captum_globenc.encoders.resolver import Encoder, LayerModules
from captum_globenc.encoders.weights import LayerWeights, WeightCache
from captum_globenc.errors import (
    InputError,
    NonFiniteActivationError,
    UnsupportedModelError,
)
from captum_globenc.recording.attention import AttentionCall
from captum_globenc.recording.grouping import grouped, most_at_once
from captum_globenc.recording.identities import (
    LayerDraft,
    Projected,
    identities_of,
    project,
    unit_of,
)
from captum_globenc.recording.inputs import check_image, check_mask_argument
from captum_globenc.recording.records import (
    Grid,
    LayerRecord,
    Version,
    check_unchanged,
)
from captum_globenc.recording.replay import first_tensor, hidden_states, replay
from captum_globenc.recording.token_mask import (
    attention_targets,
    check_token_mask,
    masked_in,
)
from captum_globenc.recording.verification import Fit, fits


class Recorder:
    """Collects the layers of one run of one encoder.

    Args:
        encoder (Encoder): whose layers.
        weights (WeightCache): prepared weights of earlier runs.
        shape (tuple[int, int] or None): (batch, tokens) of the inputs, where known.
        differentiate (bool): hand the last hidden states on as a leaf, with gradients
            switched on from there.
    """

    def __init__(
        self,
        encoder: Encoder,
        weights: WeightCache,
        shape: tuple[int, int] | None,
        differentiate: bool,
    ) -> None:
        self.encoder = encoder
        self.grid: Grid | None = None
        self.fits: list[Fit] = []
        self._records: list[Callable[..., LayerRecord]] = []
        self.has_begun = False
        self.is_in_head = False
        #: The last hidden states, a leaf where gradients are wanted.
        self.final: Tensor | None = None
        #: Layer → its output as a leaf, as the model has it.
        self.leaves: dict[int, Tensor] = {}
        #: Outputs of layers as they were, for who kept them, and what was handed on.
        self.originals: dict[int, tuple[Tensor, Tensor]] = {}
        self._weights = weights
        self._shape = shape
        self._differentiate = differentiate
        self._draft: LayerDraft | None = None
        self._drafts: list[LayerDraft] = []
        #: Layers that have run and are not projected yet.
        self._waiting: list[LayerDraft] = []
        self._layout: Hashable = None
        self._steps: list[dict[str, Tensor]] = []
        self._units: list[float] = []
        self._handed: Version | None = None
        #: The last layer's output as it made it, and as it was handed on.
        self._states: Tensor | None = None
        self._output: Tensor | None = None
        self._has_final_norm = False
        self._given_mask: Tensor | None = None
        self._token_mask: Tensor | None = None
        self._mask: Tensor | None = None
        self._begins: dict[nn.Module, list[Callable[..., None]]] = defaultdict(list)
        self._ends: dict[nn.Module, list[Callable[..., Any]]] = defaultdict(list)
        self._listen()

    # What runs

    def module_begins(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A module of the model is about to run."""
        if module not in self._begins:
            return
        with torch._C.DisableTorchFunction():  # What runs here is not the model's.
            for begin in self._begins[module]:
                begin(args)

    def module_ends(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> Any:
        """A module has run; what is returned takes its output's place."""
        replaced = None
        if module not in self._ends:
            return replaced
        with torch._C.DisableTorchFunction():
            for end in self._ends[module]:
                result = end(args, kwargs, output if replaced is None else replaced)
                replaced = replaced if result is None else result
        return replaced

    def attending(self) -> tuple[int, int] | None:
        """(batch, tokens) where a layer's attention runs now."""
        draft = self._draft
        return draft.shape if draft is not None and draft.is_attending else None

    def next_product(self) -> Hashable:
        """Which product of a layer's attention it is that may be attention."""
        draft = self._draft
        assert draft is not None
        draft.products += 1
        return ("attention", draft.name, draft.products)

    def project(self, value: Tensor) -> None:
        """Keep what ``torch.nn.MultiheadAttention`` makes values of."""
        if self._draft is not None:
            self._draft.inputs["attention"] = value.transpose(0, 1)

    def attend(self, call: AttentionCall) -> None:
        """Keep a layer's attention."""
        draft = self._draft
        assert draft is not None
        assert draft.shape is not None
        named = (call.weights, call.query, call.key, call.value)
        parts = [part for part in named if part is not None]
        fits = all(
            part.ndim == 4 and (part.shape[0], part.shape[2]) == draft.shape
            for part in parts
        )
        if draft.call is not None or not fits:
            raise UnsupportedModelError(
                f"layer {draft.name!r}: it must attend once, with queries, keys and "
                "values (batch, heads, tokens, head size) of the layer's "
                f"{draft.shape[0]} by {draft.shape[1]} tokens; got shapes "
                f"{[tuple(part.shape) for part in parts]}"
                f"{'' if draft.call is None else ', for the second time'}."
            )
        draft.call = call
        kept = [*parts, *([] if call.mask is None else [call.mask])]
        draft.versions += [Version.of(tensor) for tensor in kept]

    @property
    def lowest(self) -> Tensor:
        """The input of the first layer, as the model has it."""
        return hidden_states(self._drafts[0].args, self._drafts[0].kwargs)

    def _listen(self) -> None:
        encoder = self.encoder
        for modules in encoder.layers:
            # In this order: the layer begins first and ends last.
            self._begins[modules.layer].append(
                functools.partial(self._layer_begins, modules)
            )
            self._begins[modules.attention].append(self._attention_begins)
            self._ends[modules.attention].append(self._attention_ends)
            for part, module in modules.watched.items():
                self._ends[module].append(functools.partial(self._keep, part))
            self._ends[modules.layer].append(self._layer_ends)
        if encoder.patches is not None:
            self._ends[encoder.patches].append(self._keep_grid)
            embeddings = encoder.embeddings
            if embeddings is not None and encoder.patches in embeddings.modules():
                self._begins[embeddings].append(check_image)
        if encoder.final_norm is not None:
            self._ends[encoder.final_norm].append(self._keep_final)
        self._ends[encoder.module].append(self._keep_mask)

    def _layer_begins(self, modules: LayerModules, args: tuple[Any, ...]) -> None:
        index, layers = len(self._drafts), self.encoder.layers
        name = modules.name
        if self.encoder.architecture.shared:
            expected, name = True, f"{name} (run {index + 1})"
        else:
            expected = index < len(layers) and layers[index] is modules
        if not expected or self._draft is not None:
            raise UnsupportedModelError(
                f"layer {name!r} ran out of order or a second time inside "
                "forward_func; the encoder must run once, all layers in turn, each a "
                "module of its own."
            )
        self.has_begun, self.is_in_head = True, False
        torch._C._set_grad_enabled(False)
        shape, versions = self._shape, []
        hidden = next((value for value in args if isinstance(value, Tensor)), None)
        if hidden is not None:
            if hidden.ndim != 3:
                raise InputError(
                    f"layer {name!r} is given hidden states of shape "
                    f"{tuple(hidden.shape)}, and three dimensions are expected, batch, "
                    "tokens and hidden: of one example, pass a batch of one."
                )
            batch, tokens = self._batch_first(hidden).shape[:2]
            shape = (batch, tokens)
            if hidden.is_inference():
                raise UnsupportedModelError(
                    f"layer {name!r} runs in an inference mode of its own, which hides "
                    "changes in place; use torch.no_grad() there."
                )
            versions = [Version.of(hidden)]
        self._draft = LayerDraft(name, modules, versions, shape)

    def _attention_begins(self, _: Any) -> None:
        if self._draft is not None:
            self._draft.is_attending = True

    def _attention_ends(self, args: Any, kwargs: Any, _: Any) -> None:
        if self._draft is not None:
            self._draft.is_attending = False
            modules, inputs = self._draft.modules, self._draft.inputs
            named = "value" in modules.watched or "attention" in inputs
            if not named and modules.attention is not modules.layer:
                states = self._batch_first(hidden_states(args, kwargs))
                self._draft.inputs["attention"] = states

    def _keep(self, part: str, args: Any, kwargs: Any, output: Tensor) -> None:
        draft = self._draft
        if draft is None or part in draft.outputs:
            where = "an encoder layer" if draft is None else f"layer {draft.name!r}"
            raise UnsupportedModelError(
                f"{where}: its {part} ran outside the layer or more than once. Is "
                "chunk_size_feed_forward set? Set it to 0. Does one module serve as "
                "two parts? Give each its own."
            )
        if part != "feed_forward":
            draft.inputs[part] = self._batch_first(hidden_states(args, kwargs))
        draft.outputs[part] = self._batch_first(output)

    def _keep_grid(self, args: Any, kwargs: Any, output: Tensor) -> None:
        rows, columns = output.shape[-2:]
        height, width = hidden_states(args, kwargs).shape[-2:]
        assert self.encoder.patches is not None
        down, right = self.encoder.patches.stride
        self.grid = Grid(
            rows, columns, min(1, rows * down / height), min(1, columns * right / width)
        )

    def _keep_mask(self, args: Any, kwargs: Any, _: Any) -> None:
        if self._shape_of_run is not None:
            self._given_mask = check_mask_argument(
                self.encoder.module, args, kwargs, self._shape_of_run
            )

    @property
    def _shape_of_run(self) -> tuple[int, int] | None:
        return self._drafts[-1].shape if self._drafts else None

    def _layer_ends(self, args: Any, kwargs: Any, output: Any) -> Any:
        draft, self._draft = self._draft, None
        assert draft is not None
        if draft.call is None:
            raise UnsupportedModelError(
                f"layer {draft.name!r}: its attention was not seen. It must call "
                "torch.nn.functional.scaled_dot_product_attention, or multiply "
                "attention weights whose rows sum to one with the values (matmul, bmm "
                "or einsum of two tensors), in torch code that runs in this thread. "
                'Is another one chosen? attn_implementation="sdpa" is seen.'
            )
        states = first_tensor(output)
        hidden = hidden_states(args, kwargs)
        draft.args, draft.kwargs = args, dict(kwargs)
        draft.is_input_from_below = hidden is self._output
        if draft.is_input_from_below and self._states is not None:
            # As the layer below made it, without what follows gradients.
            inputs = draft.inputs.items()
            made = {part: self._states for part, t in inputs if t is hidden}
            draft.inputs.update(made)
            hidden = self._states
        draft.inputs["layer"] = self._batch_first(self._as_recorded(hidden))
        self._output = self._states = states
        draft.outputs["layer"] = self._batch_first(states)
        self._check_parts(draft)
        self._drafts.append(draft)
        is_last = len(self._drafts) >= len(self.encoder.layers)
        if is_last and self.encoder.final_norm is not None:
            return None  # The norm is one more part of the layer.
        self._take(draft)
        if not is_last:
            return _with_states(output, self._as_leaf(states))
        if not self.encoder.architecture.shared:
            self._project()  # Before the head can change anything.
        return _with_states(output, self._enter_head(states))

    def _as_leaf(self, states: Tensor) -> Tensor | None:
        """Lower hidden states, for a head that reads them; layers run without grad."""
        if not self._differentiate:
            return None
        self._output = states.detach().requires_grad_()
        self.leaves[len(self._drafts)] = self._output
        self.originals[id(states)] = (states, self._output)
        return self._output

    def _as_recorded(self, hidden: Tensor) -> Tensor:
        """Hidden states that were handed on as a copy, as they were recorded."""
        handed = self._handed
        if handed is not None and handed.tensor is hidden and handed.is_current:
            assert self.final is not None
            return self.final.detach()
        return hidden

    def _check_parts(self, draft: LayerDraft) -> None:
        """Raise where a part did not run or has another shape than the layer."""
        hidden, modules = draft.inputs["layer"], draft.modules
        missing = sorted(set(modules.watched) - set(draft.outputs) - {"value"})
        if missing:
            raise UnsupportedModelError(
                f"layer {draft.name!r}: its {' and '.join(missing)} did not run; see "
                "captum_globenc.register_architecture."
            )
        for part, side, vectors in draft.steps:
            if part not in ("value", "attention") and vectors.shape != hidden.shape:
                raise UnsupportedModelError(
                    f"layer {draft.name!r}: its {part} {side} has shape "
                    f"{tuple(vectors.shape)}, and the layer's input "
                    f"{tuple(hidden.shape)}: look at the paths and at batch_first in "
                    "its description, see captum_globenc.register_architecture."
                )

    def _keep_final(self, args: Any, kwargs: Any, output: Tensor) -> Any:
        if self._has_final_norm:
            raise UnsupportedModelError(
                "the norm after the last layer ran more than once inside forward_func."
            )
        if self._drafts and len(self._drafts) == len(self.encoder.layers):
            before, draft = hidden_states(args, kwargs), self._drafts[-1]
            draft.inputs["final_norm"] = self._batch_first(before)
            draft.outputs["final_norm"] = self._batch_first(output)
            self._has_final_norm = True
            self._take(draft)
            self._project()
        return self._enter_head(output)

    def _enter_head(self, states: Tensor) -> Tensor | None:
        """The last hidden states are there: what runs from here on is the head."""
        self.is_in_head = True
        self.final = states.detach()
        if not self._differentiate:
            return None
        self.final.requires_grad_()
        self.leaves[len(self._drafts)] = self.final
        torch._C._set_grad_enabled(True)
        # A copy, so that a head may write into it.
        self._handed = Version.of(self.final.clone())
        self.originals[id(states)] = (states, self._handed.tensor)
        return self._handed.tensor

    # After the run

    def finish(self) -> tuple[LayerRecord, ...]:
        """The records, verified but for their fits, once the run is over."""
        count, expected = len(self._drafts), len(self.encoder.layers)
        if self.encoder.architecture.shared:
            config = getattr(self.encoder.module, "config", None)
            expected = getattr(config, "num_hidden_layers", count)
        if count != expected:
            raise UnsupportedModelError(
                f"{type(self.encoder.module).__name__}: {count} of {expected} layers "
                "ran inside forward_func; each layer must run once, in the calling "
                "thread."
            )
        if self.encoder.final_norm is not None and not self._has_final_norm:
            raise UnsupportedModelError(
                f"{type(self.encoder.module).__name__}: the norm after its last layer "
                "did not run; see captum_globenc.register_architecture."
            )
        with torch.inference_mode(False):
            self._project()
        for draft in self._drafts:
            assert draft.call is not None
            self._check_mask(draft.name, draft.call)
        records = [make(token_mask=self.token_mask) for make in self._records]
        self._verify(records)
        check_unchanged(records)
        return tuple(records)

    def close(self) -> None:
        """Let go of what listens: it refers to the recorder."""
        self._begins.clear()
        self._ends.clear()
        self._records.clear()
        self._waiting.clear()
        self._drafts.clear()
        self.originals.clear()

    @property
    def token_mask(self) -> Tensor:
        """(batch, tokens), False at padding."""
        assert self._token_mask is not None
        return self._token_mask

    def _batch_first(self, vectors: Tensor) -> Tensor:
        if self.encoder.architecture.batch_first:
            return vectors
        return vectors.transpose(0, 1)

    def _take(self, draft: LayerDraft) -> None:
        """Project a layer that has run, as soon as there is a group of its like."""
        device = draft.inputs["layer"].device.type
        if torch.is_autocast_enabled(device):
            draft.autocast = torch.get_autocast_dtype(device)
        if self._waiting and self._layout != draft.layout:
            self._project()
        if not self._waiting:
            self._layout = draft.layout
        self._waiting.append(draft)
        if len(self._waiting) >= most_at_once(draft.inputs["layer"].numel()):
            self._project()

    def _project(self) -> None:
        """Keep of the layers that wait what their records and verification need."""
        drafts, self._waiting = self._waiting, []
        if not drafts:
            return
        device = drafts[0].inputs["layer"].device.type
        names = [modules.name for modules in self.encoder.layers]
        layers = [modules.parts for modules in self.encoder.layers]
        with torch.no_grad(), torch.autocast(device, enabled=False):
            indices = [names.index(draft.modules.name) for draft in drafts]
            each = zip(drafts, self._weights.get(layers, indices), strict=True)
            for group in grouped(each, _joins_stack):
                weights = LayerWeights.together([weights for _, weights in group])
                assert weights is not None
                below = self._steps[-1]["layer.output"] if self._steps else None
                projected = project([draft for draft, _ in group], weights, below)
                for (draft, own), one in zip(group, projected, strict=True):
                    self._keep_layer(draft, own, one)

    def _keep_layer(
        self, draft: LayerDraft, weights: LayerWeights, projected: Projected
    ) -> None:
        """What is left of a layer."""
        assert draft.call is not None
        self._steps.append(projected.steps)
        self._units.append(unit_of(draft))
        hidden = _detached(draft.inputs["layer"])
        call = draft.call
        tensors: dict[str, Any] = {n: _detached(t) for n, t in call.tensors.items()}
        tensors["context"] = projected.context
        draft.call = call._replace(**tensors)
        # The parts' tensors were needed for the projections only.
        draft.inputs.clear()
        draft.outputs.clear()
        self._records.append(
            functools.partial(
                LayerRecord,
                names=(draft.name,),
                call=draft.call,
                hidden=hidden,
                deviations=projected.deviations,
                hidden_probe=projected.steps["layer.input"],
                value_probe=projected.value_probe,
                context_probe=projected.context_probe,
                weights=weights,
                replay=functools.partial(
                    replay,
                    draft.modules,
                    draft.args,
                    draft.kwargs,
                    self.encoder.architecture.batch_first,
                    draft.autocast,
                ),
                versions=tuple(draft.versions),
            )
        )

    def _verify(self, records: list[LayerRecord]) -> None:
        """How well the identities of all layers hold."""
        centred = records[-1].weights.centred
        hidden = records[0].hidden.shape[-1]
        kinds = [
            (unit, tuple((name, v.shape) for name, v in steps.items()))
            for unit, steps in zip(self._units, self._steps)
        ]
        for _, group in itertools.groupby(range(len(kinds)), key=kinds.__getitem__):
            indices = list(group)
            names = [records[index].name for index in indices]
            steps = [self._steps[index] for index in indices]
            identities = identities_of(steps[0], self._units[indices[0]], centred)
            self._check_finite(names, [step["layer.output"] for step in steps])
            fits(names, steps, identities, self.token_mask, hidden, self.fits.extend)

    def _check_finite(self, names: list[str], outputs: list[Tensor]) -> None:
        values = torch.stack(outputs).flatten(1)

        def judge(largest: list[float]) -> None:
            wrong = [n for n, size in zip(names, largest) if not math.isfinite(size)]
            if wrong:
                raise NonFiniteActivationError(
                    f"layer {wrong[0]!r}: its activations hold NaN or infinity, so it "
                    "cannot be decomposed. Look for NaN in the weights or inputs, or "
                    "for overflow (float16?)."
                )

        check_later(torch.linalg.vector_norm(values, torch.inf, 1), judge)

    def _check_mask(self, layer: str, call: AttentionCall) -> None:
        """Every layer must see the same tokens: what is padding is padding to all."""
        if self._token_mask is not None and call.mask is self._mask:
            return
        if call.weights is None:
            token_mask = masked_in(call)
        else:
            # Small weights of a layer may be rounded to 0: all layers count.
            calls = [draft.call for draft in self._drafts if draft.call is not None]
            token_mask = attention_targets(calls, self._given_mask)
        if self._token_mask is None:
            check_token_mask(token_mask)
            self._token_mask = token_mask
        else:
            check_later(token_mask == self._token_mask, _sees_the_same(layer))
        self._mask = call.mask


def _sees_the_same(layer: str) -> Judge:
    """Raise where not all of a layer's tokens are those of the layers below."""

    def judge(is_same: list[float]) -> None:
        if not all(is_same):
            raise UnsupportedModelError(
                f"layer {layer!r} attends to other tokens than the layers below: its "
                "mask hides some that theirs show, or shows some that theirs hide."
            )

    return judge


def _joins_stack(
    group: list[tuple[LayerDraft, LayerWeights]], layer: tuple[LayerDraft, LayerWeights]
) -> bool:
    """Whether the weights of layers lie in one stack."""
    return (
        LayerWeights.together([weights for _, weights in (*group, layer)]) is not None
    )


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def _with_states(output: Any, states: Tensor | None) -> Any:
    """What a layer returns, with other hidden states; None: as it is."""
    if states is None or isinstance(output, Tensor):
        return states
    if isinstance(output, Mapping):
        first = next(iter(output))
        changed = copy.copy(output)
        changed[first] = states  # type: ignore[index]
        return changed
    rest = [states, *output[1:]]
    return output._make(rest) if hasattr(output, "_make") else type(output)(rest)
