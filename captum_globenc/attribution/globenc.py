"""GlobEnc as a Captum attribution method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from captum_globenc.attribution.base import RolloutAttribution
from captum_globenc.contributions.norm_scores import local_score
from captum_globenc.recording.readout import ReadoutKind


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
