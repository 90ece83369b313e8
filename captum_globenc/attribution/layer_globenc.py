"""GlobEnc for the hidden states between layers, as a Captum layer method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from captum.attr import LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn

from captum_globenc._captum import TargetType, TensorOrTupleOfTensorsGeneric
from captum_globenc.attribution.adapters import shaped_like
from captum_globenc.attribution.arguments import TokenIndex, layers_in
from captum_globenc.attribution.class_aware import LocalScoreRollout
from captum_globenc.errors import InputError
from captum_globenc.recording.readout import ReadoutKind
from captum_globenc.recording.run import EncoderRun


class LayerGlobEnc(LocalScoreRollout, LayerAttribution):
    r"""How much of each hidden state of a layer reaches what the head reads.

    For an encoder layer, the rollout starts at the last layer and stops at this one, so
    several layers show where the evidence moves from layer to layer. For the embeddings
    or a part of them, the scores are those of :class:`~captum_globenc.GlobEnc`. Hidden
    states that the head reads directly count, too.

    Replaces ``LayerIntegratedGradients`` and other layer methods of Captum. See
    :class:`~captum_globenc.GlobEnc` for the method and its limits.

    Args:
        forward_func (Callable): as for :class:`~captum_globenc.GlobEnc`.
        layer (nn.Module or list[nn.Module]): an encoder layer, the embeddings module or
            one of its parts, or several of these.
        device_ids (list[int], optional): accepted as in Captum and not used: the model
            runs once, where it is. Default: None.
        encoder (nn.Module, optional): as for :class:`~captum_globenc.GlobEnc`.
        local (str, optional): as for :class:`~captum_globenc.GlobEnc`.
        normalize (bool, optional): scale the scores of each example so that their
            sizes sum to 1 in every layer. Default: False.
        readout (str, optional): as for :class:`~captum_globenc.GlobEnc`.
        class_aware (bool, optional): as for :class:`~captum_globenc.GlobEnc`. The
            output of the last layer is then scored by gradient times state,
            :math:`\langle \partial y / \partial x^L_i, x^L_i \rangle`, before any
            vector is projected. Default: False.

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
        readout: ReadoutKind = "gradient",
        class_aware: bool = False,
    ) -> None:
        layers_in(layer)
        LocalScoreRollout.__init__(
            self,
            forward_func,
            encoder=encoder,
            local=local,
            normalize=normalize,
            readout=readout,
            class_aware=class_aware,
        )
        self.layer = layer
        self.device_ids = device_ids

    @log_usage()
    def attribute(
        self,
        inputs: TensorOrTupleOfTensorsGeneric | EncoderRun,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        attribute_to_layer_input: bool = False,
        *,
        token_index: TokenIndex = None,
    ) -> Tensor | list[Tensor]:
        r"""Score every hidden state of the layer.

        Args:
            inputs (Tensor, tuple[Tensor, ...] or EncoderRun): what ``forward_func``
                takes first, or a recorded run, as for
                :meth:`captum_globenc.GlobEnc.attribute`.
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
            UnsupportedModelError: as for :meth:`captum_globenc.GlobEnc.attribute`.
            ReconstructionError: the recorded parts do not rebuild a layer.
            NonFiniteActivationError: NaN or infinity in a layer.
        """
        self._checked(inputs, target)
        layers = layers_in(self.layer)
        run, rows = self._swept(inputs, additional_forward_args, target, token_index)
        shapes = [_hidden_of(layer, run, attribute_to_layer_input) for layer in layers]
        depths = [_depth(layer, run, attribute_to_layer_input) for layer in layers]
        attributions = []
        for hidden, depth in zip(shapes, depths):
            dtype = hidden.dtype
            if not dtype.is_floating_point:
                dtype = run.layers[0].hidden.dtype
            scores = self._scores(rows[depth], dtype).to(run.inputs[0].device)
            # Some models have the tokens first.
            if _is_turned(hidden, run):
                hidden = hidden.transpose(0, 1)
            attributions.append(shaped_like(scores, hidden, run.grid))
        return attributions if isinstance(self.layer, list) else attributions[0]


def _depth(layer: nn.Module, run: EncoderRun, inputs: bool) -> int:
    """How many encoder layers lie above the output, or the input, of a layer."""
    encoder, count = run.encoder, len(run.layers)
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
        expected, known = "a module that runs before the layers", layer in run.early
    else:
        expected = f"its {type(embeddings).__name__}, a part of that"
        known = any(part is layer for part in embeddings.modules())
    if known:
        return count
    raise InputError(
        f"layer {type(layer).__name__} is not part of the encoder: {expected}, or one "
        f"of its {count} {type(encoder.layers[0].layer).__name__} layers is expected."
    )


def _is_turned(hidden: Tensor, run: EncoderRun) -> bool:
    """Whether a tensor is (tokens, batch, ...)."""
    if run.encoder.architecture.batch_first:
        return False
    return tuple(hidden.shape[:2]) == run.shape[::-1]


def _hidden_of(layer: nn.Module, run: EncoderRun, inputs: bool) -> Tensor:
    """A tensor of the shape of what goes into a layer, or comes out of it."""
    if any(modules.layer is layer for modules in run.encoder.layers):
        return run.layers[0].hidden
    taken_and_given = run.early.get(layer)
    tensors = taken_and_given[0 if inputs else 1] if taken_and_given else []
    if not tensors:
        _depth(layer, run, inputs)  # Raises where it is no part of the encoder.
        raise InputError(f"layer {type(layer).__name__} did not run.")
    return tensors[0]
