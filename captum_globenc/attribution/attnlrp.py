"""AttnLRP as a Captum method, for inputs and for layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from captum_globenc.attribution.linearized import (
    LayerLinearizedAttribution,
    LinearizedAttribution,
    TokenPlace,
)
from captum_globenc.linearization.operations import AttentionRule


class AttnLRP(LinearizedAttribution):
    r"""Relevance for or against a class, in one forward and one backward pass.

    Layer-wise relevance propagation with rules for attention. Relevance is gradient ×
    input in a network whose values stay as they are and whose operations hand gradients
    back by rules: deviations of norms and slopes of activations are constants, and a
    product of two factors hands half to each. More details in the paper:

    Achtibat, Hatefi, Dreyer, Jain, Wiegand, Lapuschkin and Samek, *AttnLRP:
    Attention-Aware Layer-Wise Relevance Propagation for Transformers*, ICML 2024,
    https://arxiv.org/abs/2402.05602

    The authors of the method's reference implementation state that layer-wise relevance
    propagation is patented and free for personal and scientific use only
    (https://github.com/rachtibat/LRP-eXplains-Transformers).

    Any torch model of known operations is explained: encoders and decoders, texts and
    images. An operation without a rule is an error. Every run verifies that the output
    is the sum of all relevance: of the inputs, of constants, and of what softmax keeps.

    Args:
        forward_func (Callable): a model, or any function that calls one.
        attention (str, optional): ``"attnlrp"``, or ``"cp"``: attention probabilities
            and gates are constants (CP-LRP, Ali et al. 2022, arXiv:2202.07304).
            Default: ``"attnlrp"``.
        place (str, optional): where the relevance of ids is read:
            ``"word_embeddings"``, or ``"block"``: the output of the embedding block,
            with positions and norm. Default: ``"block"``.

    Examples::

        >>> from captum_globenc import AttnLRP, demo
        >>> model, tokenizer = demo.load_classifier()
        >>> batch = tokenizer(["A lovely film."], return_tensors="pt")
        >>> scores = AttnLRP(model).attribute(
        ...     batch["input_ids"],
        ...     target=1,
        ...     additional_forward_args=(batch["attention_mask"],),
        ... )
        >>> batch.tokens()[int(scores[0].argmax())]
        'lovely'
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        attention: AttentionRule = "attnlrp",
        place: TokenPlace = "block",
    ) -> None:
        LinearizedAttribution.__init__(self, forward_func, attention, place=place)


class LayerAttnLRP(LayerLinearizedAttribution):
    """AttnLRP for what goes into a module or comes out of it.

    Args:
        forward_func (Callable): as for :class:`~captum_globenc.AttnLRP`.
        layer (nn.Module or list[nn.Module]): where relevance is read: any module.
        device_ids (list[int], optional): accepted as in Captum and not used. Default:
            None.
        attention (str, optional): as for :class:`~captum_globenc.AttnLRP`.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module],
        device_ids: list[int] | None = None,
        *,
        attention: AttentionRule = "attnlrp",
    ) -> None:
        LayerLinearizedAttribution.__init__(
            self, forward_func, layer, device_ids, attention
        )
