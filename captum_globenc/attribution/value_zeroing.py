"""Value Zeroing as a Captum attribution method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from captum_globenc.attribution.base import RolloutAttribution
from captum_globenc.contributions.value_zeroing import VALUE_ZEROING
from captum_globenc.recording.readout import ReadoutKind


class ValueZeroing(RolloutAttribution):
    r"""Value Zeroing: how much a layer's output turns where a source has no value.

    Mohebbi, Zuidema, Chrupała and Alishahi, *Quantifying Context Mixing in
    Transformers*, EACL 2023, https://arxiv.org/abs/2301.12971

    With :math:`x'_i` the output of a layer and :math:`x'^{\neg j}_i` its output where
    the value vectors of source :math:`j` are 0 in all heads,

    .. math::
        c_{ij} = \frac{s_{ij}}{\sum_k s_{ik}}, \qquad
        s_{ij} = 1 - \cos(x'_i, x'^{\neg j}_i) .

    Every layer gets the input that it had in the run. The whole layer runs again, so
    the feed-forward part counts; a norm after the last layer is no part of it. The
    scores are the rollout of :math:`c` in the rows that the head reads. Each example's
    scores sum to 1, up to rounding; padding gets exactly 0. They have no sign, and the
    class counts as in :class:`~captum_globenc.GlobEnc`. A row in which nothing changes
    is the row of the identity.

    Each layer runs once more for every token of the longest example, which costs as
    many forward passes as that has tokens. In half precision, small changes are lost in
    rounding.

    Args:
        forward_func (Callable): a Hugging Face model, an ``nn.Module`` around one, or
            any function that calls one.
        encoder (nn.Module, optional): as for :class:`~captum_globenc.GlobEnc`.
        normalize (bool, optional): scale the scores of each example to sum to 1.
            Default: False.
        readout (str, optional): as for :class:`~captum_globenc.GlobEnc`.

    Examples::

        >>> from captum_globenc import ValueZeroing, demo
        >>> model, tokenizer = demo.load_classifier()
        >>> batch = tokenizer(["A lovely film."], return_tensors="pt")
        >>> scores = ValueZeroing(model).attribute(
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
            VALUE_ZEROING,
            encoder=encoder,
            normalize=normalize,
            readout=readout,
        )
