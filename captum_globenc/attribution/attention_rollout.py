"""Attention rollout as a Captum attribution method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from captum_globenc.attribution.base import RolloutAttribution
from captum_globenc.contributions.norm_scores import local_score
from captum_globenc.recording.readout import ReadoutKind


class AttentionRollout(RolloutAttribution):
    r"""Attention rollout: the product of the attention weights of all layers.

    Abnar and Zuidema, *Quantifying Attention Flow in Transformers*, ACL 2020,
    https://arxiv.org/abs/2005.00928

    With :math:`W` the attention weights' mean over the heads, a layer's contribution is
    :math:`\frac12 W + \frac12 I`; the second half stands for the residual connection.
    Values, norms and the feed-forward part do not count. The scores are the rollout in
    the rows that the head reads, the same as those of
    :class:`GlobEnc(local="W_FIXED_RES") <captum_globenc.GlobEnc>`. Each example's
    scores sum to 1, up to rounding.

    Args:
        forward_func (Callable): a Hugging Face model, an ``nn.Module`` around one, or
            any function that calls one.
        encoder (nn.Module, optional): as for :class:`~captum_globenc.GlobEnc`.
        normalize (bool, optional): scale the scores of each example to sum to 1.
            Default: False.
        readout (str, optional): as for :class:`~captum_globenc.GlobEnc`.

    Examples::

        >>> from captum_globenc import AttentionRollout, demo
        >>> model, tokenizer = demo.load_classifier()
        >>> batch = tokenizer(["A lovely film."], return_tensors="pt")
        >>> scores = AttentionRollout(model).attribute(
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
        normalize: bool = False,
        readout: ReadoutKind = "gradient",
    ) -> None:
        RolloutAttribution.__init__(
            self,
            forward_func,
            local_score("W_FIXED_RES"),
            encoder=encoder,
            normalize=normalize,
            readout=readout,
        )
