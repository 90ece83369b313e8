"""GlobEnc for the hidden states between layers, as a Captum layer method."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from captum.attr import LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn

from captum_globenc._captum import (
    TargetType,
    TensorOrTupleOfTensorsGeneric,
    format_additional_forward_args,
)
from captum_globenc.adapters import shaped_like
from captum_globenc.attribution.arguments import (
    TokenIndex,
    as_tensors,
    check_target,
    shown,
)
from captum_globenc.attribution.base import EncoderAttribution
from captum_globenc.capture import Captured
from captum_globenc.errors import InputError
from captum_globenc.interface import ACTIVE

# What the tokens are called where a layer is called with keywords.
_TOKEN_ARGUMENTS = ("input_ids", "inputs_embeds", "pixel_values", "hidden_states")


class LayerGlobEnc(EncoderAttribution, LayerAttribution):
    r"""How much of each hidden state of a layer reaches the final representation.

    For an encoder layer, the layers above it are rolled up from the top down to it, so
    that the layers in sequence show how the evidence moves. For the embeddings, or a
    part of them, these are the scores of :class:`~captum_globenc.GlobEnc`.

    Takes the place of ``LayerIntegratedGradients`` and other layer methods of Captum.
    See :class:`~captum_globenc.GlobEnc` for the method and its limits.

    Args:
        forward_func (Callable): as for :class:`~captum_globenc.GlobEnc`.
        layer (nn.Module or list[nn.Module]): an encoder layer, the embeddings module or
            one of its parts, or several of these.
        device_ids (list[int], optional): accepted as in Captum and not used: the model
            runs once, where it is. Default: None.
        encoder (nn.Module, optional): as for :class:`~captum_globenc.GlobEnc`.
        local (str, optional): as for :class:`~captum_globenc.GlobEnc`.
        normalize (bool, optional): scores of an example sum to 1 in every layer.
            Default: False.

    Examples::

        >>> from captum_globenc import LayerGlobEnc, demo
        >>> model, tokenizer = demo.load_classifier()
        >>> batch = tokenizer(["A lovely film."], return_tensors="pt")
        >>> method = LayerGlobEnc(model, model.bert.embeddings)
        >>> attributions = method.attribute(
        ...     batch["input_ids"],
        ...     target=1,
        ...     additional_forward_args=(batch["attention_mask"],),
        ... )
        >>> attributions.sum(dim=-1).shape == batch["input_ids"].shape
        True
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module],
        device_ids: list[int] | None = None,
        *,
        encoder: nn.Module | None = None,
        local: str = "N_ENC",
        normalize: bool = False,
    ) -> None:
        layers = layer if isinstance(layer, list) else [layer]
        for part in layers:
            if not isinstance(part, nn.Module):
                raise TypeError(
                    "layer must be an nn.Module or a list of them, got "
                    f"{type(part).__name__}: {shown(part)}"
                )
        if not layers:
            raise InputError("layer must name at least one module, got [].")
        EncoderAttribution.__init__(
            self, forward_func, encoder=encoder, local=local, normalize=normalize
        )
        self.layer = layer
        self.device_ids = device_ids

    @log_usage()
    def attribute(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        attribute_to_layer_input: bool = False,
        *,
        token_index: TokenIndex = None,
    ) -> Tensor | list[Tensor]:
        r"""Score every hidden state of the layer.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): what ``forward_func`` takes first, as
                for :meth:`captum_globenc.GlobEnc.attribute`.
            target (int, tuple, Tensor, or list, optional): likewise.
            additional_forward_args (Any, optional): likewise.
            attribute_to_layer_input (bool, optional): score the layer's input instead
                of its output. Default: False.
            token_index (int, Tensor, "mean", optional): as for
                :meth:`captum_globenc.GlobEnc.attribute`.

        Returns:
            *Tensor* or, for a list of layers, *list[Tensor]* of **attributions**: for
            hidden states (batch, tokens, hidden), equal over hidden, whose sum over it
            is the score of the token at that layer; for a layer input that is ids or an
            image, its shape, as in :meth:`captum_globenc.GlobEnc.attribute`. For
            multiple choice, batch × choices rows. Scores too large for the dtype are
            scaled per example.

        Raises:
            InputError: a layer that is not part of the encoder, or that did not run;
                inputs, mask or token_index that cannot be attributed.
            UnsupportedModelError: no supported encoder.
            ReconstructionError: the recorded parts do not rebuild a layer.
            NonFiniteActivationError: NaN or infinity in a layer.
        """
        tensors = as_tensors(inputs)
        arguments = format_additional_forward_args(additional_forward_args) or ()
        check_target(target, tensors[0].shape[0])
        layers = self.layer if isinstance(self.layer, list) else [self.layer]
        with torch.no_grad(), _observed(layers, attribute_to_layer_input) as seen:
            rows, captured = self._sweep(tensors, target, arguments, token_index)
            attributions = []
            for layer in layers:
                depth = _depth(layer, captured, attribute_to_layer_input, seen.early)
                if layer not in seen.tensors:
                    raise InputError(f"layer {type(layer).__name__} did not run.")
                hidden = seen.tensors[layer]
                dtype = hidden.dtype
                if not dtype.is_floating_point:
                    dtype = captured.run.layers[0].hidden.dtype
                scores = self._scores(rows[depth], dtype).to(hidden.device)
                attributions.append(shaped_like(scores, hidden, captured.run.grid))
        return attributions if isinstance(self.layer, list) else attributions[0]


def _depth(
    layer: nn.Module, captured: Captured[Any], inputs: bool, early: set[nn.Module]
) -> int:
    """How many encoder layers lie above the output, or the input, of a layer."""
    encoder, count = captured.encoder, len(captured.run.layers)
    for index, modules in enumerate(encoder.layers):
        if modules.layer is layer and encoder.architecture.shared:
            raise InputError(
                f"layer {modules.name!r} runs {count} times in the encoder, so its "
                "output is not one place: use GlobEnc.decompose, whose rollout has "
                "every run."
            )
        if modules.layer is layer:
            return count - index - (not inputs)
    embeddings = encoder.embeddings
    if embeddings is None:
        # Nothing is known of what is in front of the layers, but that it is.
        expected, known = "a module that runs before the layers", layer in early
    else:
        expected = f"its {type(embeddings).__name__}, a part of that"
        known = any(part is layer for part in embeddings.modules())
    if known:
        return count
    raise InputError(
        f"layer {type(layer).__name__} is not part of the encoder: {expected}, or one "
        f"of its {count} {type(encoder.layers[0].layer).__name__} layers is expected."
    )


@dataclass(frozen=True)
class _Seen:
    """The tokens that go into each layer, or what comes out of it.

    Args:
        tensors (dict[nn.Module, Tensor]): per module.
        early (set[nn.Module]): those that ran before the encoder's layers.
    """

    tensors: dict[nn.Module, Tensor] = field(default_factory=dict)
    early: set[nn.Module] = field(default_factory=set)


@contextmanager
def _observed(layers: list[nn.Module], inputs: bool) -> Iterator[_Seen]:
    """Keep the tokens that go into each layer, or what comes out of it."""
    seen = _Seen()
    thread = threading.get_ident()

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # Another thread may use the model at the same time.
        if threading.get_ident() != thread:
            return
        named = [kwargs.get(name) for name in _TOKEN_ARGUMENTS]
        values = [*args, *named, *kwargs.values()] if inputs else _flat(output)
        for value in values:
            if isinstance(value, Tensor):
                seen.tensors[module] = value.detach()
                if ACTIVE.listener is not None and not ACTIVE.listener.has_begun:
                    seen.early.add(module)
                return

    with ExitStack() as undo:
        for layer in layers:
            hook = layer.register_forward_hook(keep, with_kwargs=True)
            undo.callback(hook.remove)
        yield seen


def _flat(output: Any) -> list[Any]:
    return list(output) if isinstance(output, tuple | list) else [output]
