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

    Every encoder layer is decomposed into how much each token takes from every other,
    through attention, value vectors, both residuals and both LayerNorms; rollout
    combines the layers. More details in the paper:

    Modarressi, Fayyaz, Yaghoobzadeh and Pilehvar, *GlobEnc: Quantifying Global Token
    Attribution by Incorporating the Whole Encoder Layer in Transformers*, NAACL 2022,
    https://arxiv.org/abs/2205.03286

    With :math:`n^l_{ij}` the local score of layer :math:`l`, the scores are row
    :math:`i^*` of :math:`n^L \cdots n^1`, where :math:`i^*` is the token that the head
    reads: they say how much of each input token reaches the representation there. They
    do not depend on the class: ``target`` is validated as Captum does and used only to
    find the token that a token-level head reads.

    The encoder is explained in evaluation mode (no dropout), whatever mode the model is
    in, and the model is left as it was found: mode, gradients, hooks and attention
    implementation.

    Args:
        forward_func (Callable): a Hugging Face model, an ``nn.Module`` around one, or
            any function that calls one.
        encoder (nn.Module, optional): the model or part of it to explain, where
            ``forward_func`` runs several. Default: the one found in ``forward_func``.
        local (str, optional): the score of one layer, a key of
            ``captum_globenc.LOCAL_SCORES``: ``"W"``, ``"W_FIXED_RES"``, ``"W_RES"``,
            ``"N"``, ``"N_FIXED_RES"``, ``"N_RES"``, ``"N_RES_LN"`` or ``"N_ENC"``.
            Default: ``"N_ENC"``, the method of the paper.
        normalize (bool, optional): scores of an example's tokens sum to 1, of an
            image's with those of the special tokens. Default: False.

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
            inputs (Tensor or tuple[Tensor, ...]): input ids, (batch, tokens);
                embeddings, (batch, tokens, hidden); images, (batch, channels, height,
                width); or for multiple choice either of the first two with (batch,
                choices, ...), every choice explained by itself. In a tuple the first
                tensor is that; the others (token types, positions, ...) are passed on
                and get zeros of their shape.
            target (int, tuple, Tensor, or list, optional): as for Captum's methods. It
                must be valid for the output and does not change the scores, but for an
                output per token, (batch, tokens, classes) or the start and end logits
                (batch, tokens) of question answering, where it names the token to
                explain: an int, or the first element of a tuple. Where the output is
                the largest start or end logit, (batch), its token is explained.
                Default: None.
            additional_forward_args (Any, optional): further arguments of
                ``forward_func``, such as ``(attention_mask,)``. Default: None.
            token_index (int, Tensor, "mean", optional): the token of the last layer to
                explain: one position for all examples, a LongTensor (batch), for
                multiple choice (batch × choices), or the mean over all tokens. Default:
                what the head is seen to read: the token in ``target`` for an output per
                token, the token whose vector or logits it takes, the mean of all or of
                an image's patches, or several of these, which count the same. An output
                per token without a target is explained for the token that heads of the
                family read.
            internal_batch_size (int, optional): run at most so many examples at once.
                Default: all.

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**, shaped like inputs:
            - for ids, token scores in the dtype of the forward output, at least 0, and
              exactly 0 at padding;
            - for embeddings, (batch, tokens, hidden), whose sum over the last dimension
              is the token score;
            - for images, the score of each patch spread over its pixels and channels,
              and 0 at a margin that makes no whole patch. The special tokens' share is
              in none.

            Scores too large for the dtype are scaled per example; ratios are kept.

        Raises:
            InputError: inputs, mask or token_index that cannot be attributed.
            UnsupportedModelError: no supported encoder, or a head that reads something
                else than tokens of the last layer and their means.
            ReconstructionError: the recorded parts do not rebuild a layer.
            NonFiniteActivationError: NaN or infinity in a layer.
        """
        tensors = self._checked(inputs, target)
        batch = tensors[0].shape[0]
        size = batch if internal_batch_size is None else internal_batch_size
        if not is_whole(size) or size < 1:
            raise InputError(f"internal_batch_size must be at least 1, got {size!r}.")
        if isinstance(inputs, EncoderRun):
            parts = [self._attribute(inputs, None, target, token_index)]
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
        arguments: tuple[Any, ...] | None,
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
