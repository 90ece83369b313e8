"""GlobEnc as a Captum attribution method."""

from __future__ import annotations

from typing import Any, cast

import torch
from captum.log import log_usage
from torch import Tensor

from captum_globenc._captum import (
    TargetType,
    TensorOrTupleOfTensorsGeneric,
    format_additional_forward_args,
    format_output,
    is_tuple,
)
from captum_globenc.adapters import shaped_like
from captum_globenc.aggregation import Decomposition, blocks
from captum_globenc.attribution.arguments import (
    TokenIndex,
    as_tensors,
    check_target,
    output_tensor,
    share,
)
from captum_globenc.attribution.base import EncoderAttribution
from captum_globenc.errors import InputError
from captum_globenc.local import local_score


class GlobEnc(EncoderAttribution):
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

    @log_usage()
    def attribute(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
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
        tensors = as_tensors(inputs)
        arguments = format_additional_forward_args(additional_forward_args) or ()
        batch = tensors[0].shape[0]
        size = batch if internal_batch_size is None else internal_batch_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"internal_batch_size must be at least 1, got {size!r}.")
        check_target(target, batch)
        parts = []
        for start in range(0, batch, size):
            chosen = slice(start, start + size)
            part = target[chosen] if isinstance(target, list) else target
            parts.append(
                self._attribute(
                    tuple(share(tensor, chosen, batch) for tensor in tensors),
                    share(part, chosen, batch),
                    tuple(share(argument, chosen, batch) for argument in arguments),
                    share(token_index, chosen, batch),
                )
            )
        zeros = [torch.zeros_like(other) for other in tensors[1:]]
        result = (torch.cat(parts), *zeros)
        return cast(
            TensorOrTupleOfTensorsGeneric, format_output(is_tuple(inputs), result)
        )

    def decompose(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        additional_forward_args: object | None = None,
    ) -> Decomposition:
        r"""The local scores of all layers and their rollout.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): as for :meth:`attribute`.
            additional_forward_args (Any, optional): as for :meth:`attribute`.

        Returns:
            *Decomposition* with ``local`` of shape (batch, layers, receivers, sources)
            and ``rollout(stop=None)``, (batch, receivers, sources), in float64 where
            the model computes in it, else in float32.

        Raises:
            InputError: inputs or mask that cannot be decomposed.
            UnsupportedModelError: no supported encoder.
            ReconstructionError: the recorded parts do not rebuild a layer.
            NonFiniteActivationError: NaN or infinity in a layer.
        """
        tensors = as_tensors(inputs)
        arguments = format_additional_forward_args(additional_forward_args) or ()
        with torch.no_grad():
            run = self._capture(tensors, arguments).run
        with torch.no_grad(), torch.autocast(run.attended.device.type, enabled=False):
            batch, tokens = run.shape
            score = local_score(self.local)
            local = torch.zeros(
                (batch, len(run.layers), tokens, tokens),
                dtype=run.layers[0].dtype,
                device=run.attended.device,
            )
            for index, layer in enumerate(run.layers):
                rows = score(layer)
                for block in blocks(run.shape, run.heads):
                    local[:, index, block] = rows(block)
            pairs = run.attended[:, :, None] & run.attended[:, None, :]
            local.masked_fill_(~pairs[:, None], 0)
        return Decomposition(local, run.attended, self.local)

    def _attribute(
        self,
        tensors: tuple[Tensor, ...],
        target: TargetType,
        arguments: tuple[Any, ...],
        token_index: TokenIndex,
    ) -> Tensor:
        """Scores of one internal batch, in the shape of its first tensor."""
        with torch.no_grad():
            rows, captured = self._sweep(tensors, target, arguments, token_index)
            first = tensors[0]
            dtype = output_tensor(captured.output).dtype
            if first.is_floating_point():
                dtype = first.dtype
            elif not dtype.is_floating_point:
                dtype = rows[-1].values.dtype
            scores = self._scores(rows[-1], dtype).to(first.device)
            return shaped_like(scores, first, captured.run.grid)
