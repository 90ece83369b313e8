"""DecompX as a Captum method, for inputs and for layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from captum_globenc._captum import TargetType
from captum_globenc.attribution.adapters import shaped_like
from captum_globenc.attribution.linearized import (
    LayerLinearizedAttribution,
    LinearizedAttribution,
    TokenPlace,
)
from captum_globenc.attribution.relevance import Baselines, selector
from captum_globenc.errors import InputError, named
from captum_globenc.linearization.run import check_block
from captum_globenc.linearization.spreading.shares import WEIGHTS
from captum_globenc.linearization.spreading.spread import spread


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

    The paper also spreads biases over the tokens: each bias, wherever it is added, goes
    to the tokens by the weights that ``biases`` names, and the sum over tokens is the
    output. That needs the parts of all tokens in every vector: one example at a time,
    about 0.8 forward passes per token, and memory for three tensors of tokens × tokens
    × hidden. Rows of receivers are made in blocks, and only those that the output is
    made of.

    Any torch model of known operations is explained: encoders and decoders, texts and
    images. An operation without a rule is an error. Every run verifies that the output
    is the sum of all relevance, of the inputs and of constants.

    Args:
        forward_func (Callable): a model, or any function that calls one.
        biases (str, optional): how biases go to the tokens. ``"none"``: not at all, the
            delta holds them. For a bias :math:`b` and the parts :math:`a_k` of a
            vector: ``"absdot"``, by :math:`|a_k \cdot b|`, the paper's choice;
            ``"abssim"``, by their absolute cosine; ``"norm"``, by :math:`\|a_k\|`;
            ``"equal"``, in equal shares; ``"cls"``, all to the first token. Default:
            ``"none"``.
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
        named({"none": None, **WEIGHTS}, biases, "way to share biases")
        if biases != "none" and place != "block":
            raise InputError(
                f'biases="{biases}" shares from the output of the embedding block on, '
                f'and place is "{place}": leave place out, or use biases="none".'
            )
        self.biases = biases

    def _attribute(
        self,
        tensors: tuple[Tensor, ...],
        arguments: tuple[Any, ...],
        target: TargetType,
        baselines: Baselines,
        n_steps: int,
        with_output: bool,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        if self.biases == "none":
            return LinearizedAttribution._attribute(
                self, tensors, arguments, target, baselines, n_steps, with_output
            )
        first, *others = tensors
        if baselines is not None:
            raise InputError(
                f'biases="{self.biases}" has no path from a baseline, whose biases are '
                'the same: use biases="none".'
            )
        if first.is_floating_point() and first.ndim == 4:
            raise InputError(
                f'biases="{self.biases}" shares among tokens, which have no pixels: '
                'use biases="none" for images.'
            )
        select = selector(target, len(first))
        check_block(self.forward_func, tensors, arguments, select)
        found = spread(self.forward_func, tensors, arguments, select, self.biases)
        scores = found.relevance.to(first.device)
        result = [shaped_like(scores, first).reshape(first.shape)]
        result += [torch.zeros_like(other) for other in others]
        return tuple(result), found.output


class LayerDecompX(LayerLinearizedAttribution):
    """DecompX without biases for what goes into a module or comes out of it.

    At the embeddings, the biases of the first layer's values, which
    :class:`~captum_globenc.DecompX` gives to their tokens, are in the delta.

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
