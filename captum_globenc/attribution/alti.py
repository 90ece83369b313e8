"""ALTI as a Captum attribution method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from captum_globenc.attribution.base import RolloutAttribution
from captum_globenc.contributions.alti import ALTI_CONTRIBUTION
from captum_globenc.recording.readout import ReadoutKind


class ALTI(RolloutAttribution):
    r"""ALTI: how close each source's vector is to the state it is a part of.

    Ferrando, Gállego and Costa-jussà, *Measuring the Mixing of Contextual Information
    in the Transformer*, EMNLP 2022, https://arxiv.org/abs/2203.04212

    With :math:`g_{ij}` what receiver :math:`i` gets from source :math:`j` up to the
    LayerNorm after attention, and :math:`y_i` this norm's true output,

    .. math::
        c_{ij} = \frac{\max(0, \|y_i\|_1 - \|g_{ij} - y_i\|_1)}
                      {\sum_k \max(0, \|y_i\|_1 - \|g_{ik} - y_i\|_1)} .

    The scores are the rollout of :math:`c` in the rows that the head reads, in one
    forward pass. Each example's scores sum to 1, up to rounding. They have no sign, and
    the class counts as in :class:`~captum_globenc.GlobEnc`: in the weights of the
    tokens that the head reads.

    Where the paper leaves something open:

    * A row in which every source is clipped, 0/0 in the formula, is the row of the
      identity.
    * The distance is the L1 norm itself. Released code adds 1e-6 to each entry of the
      difference.
    * In pre-LN layers no norm follows the residual: :math:`y_i` is the state after the
      attention's residual, and :math:`g_{ij}` what the source adds to it. LayerScale
      multiplies the attention's part, an RMSNorm takes no mean away. A norm after the
      last layer does not count, nor does the feed-forward part. These are extensions of
      this project.

    An L1 norm has no shortcut: every pair of tokens takes :math:`H d` operations per
    layer, in blocks, so that no more than a few MB are held at once.

    Args:
        forward_func (Callable): a Hugging Face model, an ``nn.Module`` around one, or
            any function that calls one.
        encoder (nn.Module, optional): as for :class:`~captum_globenc.GlobEnc`.
        normalize (bool, optional): scale the scores of each example to sum to 1.
            Default: False.
        readout (str, optional): as for :class:`~captum_globenc.GlobEnc`.

    Examples::

        >>> from captum_globenc import ALTI, demo
        >>> model, tokenizer = demo.load_classifier()
        >>> batch = tokenizer(["A lovely film."], return_tensors="pt")
        >>> scores = ALTI(model).attribute(
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
            ALTI_CONTRIBUTION,
            encoder=encoder,
            normalize=normalize,
            readout=readout,
        )
