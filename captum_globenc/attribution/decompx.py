"""DecompX as a Captum method, for inputs and for layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from captum_globenc.attribution.linearized import (
    LayerLinearizedAttribution,
    LinearizedAttribution,
    TokenPlace,
)


class DecompX(LinearizedAttribution):
    r"""The part of a class's output that comes from each token, with its sign.

    Every vector is the sum of what it takes from the tokens, and the sums are followed
    through attention, residuals, norms, feed-forward parts and the head. Attention
    probabilities, deviations of norms and slopes :math:`f(u)/u` of activations are
    constants. Without biases that is gradient × input in this linear network, so it
    costs one forward and one backward pass. More details in the paper:

    Modarressi, Fayyaz, Aghazadeh, Yaghoobzadeh and Pilehvar, *DecompX: Explaining
    Transformers Decisions by Propagating Token Decomposition*, ACL 2023,
    https://arxiv.org/abs/2306.02873

    Any torch model of known operations is explained: encoders and decoders, texts and
    images. An operation without a rule is an error. Every run verifies that the output
    is the sum of all relevance, of the inputs and of constants.

    Args:
        forward_func (Callable): a model, or any function that calls one.
        place (str, optional): where the relevance of ids is read: ``"block"``, the
            output of the embedding block as in the paper, where the biases of the first
            layer's values belong to their tokens; or ``"word_embeddings"``. Default:
            ``"block"``.

    Examples::

        >>> from captum_globenc import DecompX, demo
        >>> model, tokenizer = demo.load_classifier()
        >>> batch = tokenizer(["A lovely film."], return_tensors="pt")
        >>> scores, delta = DecompX(model).attribute(
        ...     batch["input_ids"],
        ...     target=1,
        ...     additional_forward_args=(batch["attention_mask"],),
        ...     return_convergence_delta=True,
        ... )
        >>> batch.tokens()[int(scores[0].argmax())]
        'lovely'
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        biases: str = "none",
        place: TokenPlace = "block",
    ) -> None:
        LinearizedAttribution.__init__(
            self, forward_func, "cp", place=place, keeps_own_biases=True
        )


class LayerDecompX(LayerLinearizedAttribution):
    """DecompX without biases for what goes into a module or comes out of it.

    Args:
        forward_func (Callable): as for :class:`~captum_globenc.DecompX`.
        layer (nn.Module or list[nn.Module]): where relevance is read: any module.
        device_ids (list[int], optional): accepted as in Captum and not used. Default:
            None.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module],
        device_ids: list[int] | None = None,
    ) -> None:
        LayerLinearizedAttribution.__init__(self, forward_func, layer, device_ids, "cp")
