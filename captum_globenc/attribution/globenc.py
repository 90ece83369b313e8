"""GlobEnc as a Captum attribution method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from captum.log import log_usage
from torch import Tensor, nn

from captum_globenc._captum import (
    TargetType,
    TensorOrTupleOfTensorsGeneric,
    format_additional_forward_args,
    format_output,
    is_tuple,
)
from captum_globenc.attribution.adapters import shaped_like
from captum_globenc.attribution.arguments import TokenIndex, share
from captum_globenc.attribution.base import Inputs, RolloutAttribution
from captum_globenc.contributions.norm_scores import local_score
from captum_globenc.errors import InputError, is_whole
from captum_globenc.recording.outputs import output_tensor
from captum_globenc.recording.readout import ReadoutKind
from captum_globenc.recording.run import EncoderRun


class GlobEnc(RolloutAttribution):
    r"""Global token attribution for transformer encoders, in one forward pass.

    A local score measures how much each token of an encoder layer takes from every
    other token: through attention, the value vectors, both residual connections and
    both LayerNorms. Rollout combines the layers. More details in the paper:

    Modarressi, Fayyaz, Yaghoobzadeh and Pilehvar, *GlobEnc: Quantifying Global Token
    Attribution by Incorporating the Whole Encoder Layer in Transformers*, NAACL 2022,
    https://arxiv.org/abs/2205.03286

    With :math:`n^l_{ij}` the local score of layer :math:`l`, the scores are
    :math:`w\, n^L \cdots n^1`. The row vector :math:`w` holds the weights of the tokens
    that the head reads: the share of each token in the norm of the gradient of the
    selected output with respect to the last hidden states. A head that reads one token
    gives it the weight 1, and the scores do not depend on the class. A head that reads
    several tokens may weight them differently for each class. A head that also reads
    lower layers is explained for all hidden states that it reads.

    The model runs once, with its own attention, and is observed in the calling thread.
    Nothing is changed that another thread could notice, with two exceptions: the
    encoder of a model in training mode is in evaluation mode while it is recorded, and
    compiled code runs uncompiled while a compiled model is recorded. Both are restored.

    Args:
        forward_func (Callable): a Hugging Face model, an ``nn.Module`` around one, or
            any function that calls one.
        encoder (nn.Module, optional): the model or the part of it to explain, if
            ``forward_func`` runs several. Default: the one found in ``forward_func``.
        local (str, optional): the score of one layer, a key of
            ``captum_globenc.LOCAL_SCORES``: ``"W"``, ``"W_FIXED_RES"``, ``"W_RES"``,
            ``"N"``, ``"N_FIXED_RES"``, ``"N_RES"``, ``"N_RES_LN"`` or ``"N_ENC"``.
            Default: ``"N_ENC"``, the method of the paper.
        normalize (bool, optional): scale the scores of each example to sum to 1. For
            images, the sum includes the special tokens. Default: False.
        readout (str, optional): how to weight the tokens that the head reads:
            ``"gradient"`` as above, or ``"pooling"`` for the usual pooling of the
            model's family ([CLS] for BERT), whatever the class. Default:
            ``"gradient"``.

    Examples::

        >>> from captum_globenc import GlobEnc, demo
        >>> model, tokenizer = demo.load_classifier()
        >>> batch = tokenizer(["A lovely film."], return_tensors="pt")
        >>> globenc = GlobEnc(model)
        >>> scores = globenc.attribute(
        ...     batch["input_ids"],
        ...     target=1,
        ...     additional_forward_args=(batch["attention_mask"],),
        ... )
        >>> scores.shape == batch["input_ids"].shape
        True
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        encoder: nn.Module | None = None,
        local: str = "N_ENC",
        normalize: bool = False,
        readout: ReadoutKind = "gradient",
    ) -> None:
        RolloutAttribution.__init__(
            self,
            forward_func,
            local_score(local),
            encoder=encoder,
            normalize=normalize,
            readout=readout,
        )

    @property
    def local(self) -> str:
        """The name of the local score."""
        return self.contribution.name

    @log_usage()
    def attribute(
        self,
        inputs: TensorOrTupleOfTensorsGeneric | EncoderRun,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        *,
        token_index: TokenIndex = None,
        internal_batch_size: int | None = None,
    ) -> TensorOrTupleOfTensorsGeneric:
        r"""Score every input token.

        Args:
            inputs (Tensor, tuple[Tensor, ...] or EncoderRun): input ids, (batch,
                tokens); embeddings, (batch, tokens, hidden); images, (batch, channels,
                height, width); or, for multiple choice, ids or embeddings with (batch,
                choices, ...), where every choice is explained by itself. In a tuple,
                the first tensor is that; the others (token types, positions, ...) are
                passed on and get zeros of their shape. The first tensor must arrive
                unchanged at the encoder; images may be resized as a whole and
                normalised by channel. A run of :func:`captum_globenc.record` replaces
                inputs and ``additional_forward_args``, without a further forward pass.
            target (int, tuple, Tensor, or list, optional): the output to explain, as
                for Captum's methods. For an output per token, (batch, tokens, classes)
                or the start and end logits (batch, tokens) of question answering, it
                selects the token: an int, or the first element of a tuple. For a head
                that reads several tokens it may change their weights. For a head that
                reads one token it does not change the scores. Default: None, a fixed
                positive combination of all outputs; for an output per token, the
                model's or its family's pooling.
            additional_forward_args (Any, optional): further arguments of
                ``forward_func``, such as ``(attention_mask,)``. Default: None.
            token_index (int, Tensor, "mean", optional): the token of the last layer to
                explain, whatever the head reads: one position for all examples, a
                LongTensor (batch), for multiple choice (batch × choices), or the mean
                of all tokens. Default: None, what the head reads.
            internal_batch_size (int, optional): run at most this many examples at once;
                not allowed with a recorded run. Default: all.

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**, shaped like inputs:
            - for ids, token scores in the dtype of the forward output, at least 0, and
              exactly 0 at padding;
            - for embeddings, (batch, tokens, hidden), whose sum over the last dimension
              is the token score;
            - for images, the score of each patch spread over its pixels and channels,
              and 0 at a margin that makes no whole patch. The scores of special tokens
              belong to no pixel.

            Scores too large for the dtype are scaled per example, which keeps ratios.

        Raises:
            InputError: inputs, mask or token_index that cannot be attributed; inputs
                that do not arrive unchanged at the encoder; a head that reads padding.
            UnsupportedModelError: no supported encoder, attention that is not softmax
                weights times values, or a head whose readout cannot be determined.
            ReconstructionError: the recorded parts do not rebuild a layer.
            NonFiniteActivationError: NaN or infinity in a layer.
        """
        tensors = self._checked(inputs, target)
        batch = tensors[0].shape[0]
        size = batch if internal_batch_size is None else internal_batch_size
        if not is_whole(size) or size < 1:
            raise InputError(f"internal_batch_size must be at least 1, got {size!r}.")
        if isinstance(inputs, EncoderRun):
            if internal_batch_size is not None:
                raise InputError(
                    "a run has been made already, whole: internal_batch_size belongs "
                    "to inputs."
                )
            given = additional_forward_args
            parts = [self._attribute(inputs, given, target, token_index)]
            is_in_tuple = len(tensors) > 1
        else:
            arguments = format_additional_forward_args(additional_forward_args) or ()
            parts = [
                self._attribute(
                    tuple(share(tensor, chosen, batch) for tensor in tensors),
                    tuple(share(argument, chosen, batch) for argument in arguments),
                    target[chosen]
                    if isinstance(target, list)
                    else share(target, chosen, batch),
                    share(token_index, chosen, batch),
                )
                for start in range(0, batch, size)
                for chosen in [slice(start, start + size)]
            ]
            is_in_tuple = is_tuple(inputs)
        zeros = [torch.zeros_like(other) for other in tensors[1:]]
        result = (torch.cat(parts), *zeros)
        return cast(TensorOrTupleOfTensorsGeneric, format_output(is_in_tuple, result))

    def _attribute(
        self,
        inputs: Inputs,
        arguments: object | None,
        target: TargetType,
        token_index: TokenIndex,
    ) -> Tensor:
        """Scores of one internal batch, in the shape of its first tensor."""
        run = self._run(inputs, arguments, differentiate=token_index is None)
        *_, row = self._sweep(run, target, token_index)
        first, dtype = run.inputs[0], output_tensor(run.output).dtype
        if first.is_floating_point():
            dtype = first.dtype
        elif not dtype.is_floating_point:
            dtype = row.values.dtype
        scores = self._scores(row, dtype).to(first.device)
        return shaped_like(scores, first, run.grid)
