r"""How a bias is shared among the vectors that meet it.

A vector that is a sum over source tokens, :math:`\sum_k a_{ik}`, meets a bias
:math:`b`. Source :math:`k` gets the part :math:`w_{ik} / \sum_k w_{ik}` of it:

==========  ==========================================================================
rule        :math:`w_{ik}`
==========  ==========================================================================
absdot      :math:`|a_{ik} \cdot b|`
abssim      :math:`|\cos(a_{ik}, b)|`, 0 for a vector that is zero
norm        :math:`\lVert a_{ik} \rVert`
equal       1 for every vector that is not zero
cls         1 for the first token, 0 for all others
==========  ==========================================================================

Source: DecompX, Modarressi et al. 2023 (arXiv:2306.02873).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LEAST = 1e-12


def spread(parts: Tensor, rule: str) -> Tensor:
    """Every source's part with its share of the biases.

    A bias that meets no vector of any weight, such as one behind dead activations,
    stays and is spread with the next one.

    Args:
        parts (Tensor): (sources + 1, receivers, hidden): the parts of the sources, in
            the order of tokens, and behind them the biases.
        rule (str): a key of :data:`WEIGHTS`; ``"none"`` leaves everything as it is.

    Returns:
        *Tensor* of the same shape, written over the old one.
    """
    if rule == "none":
        return parts
    sources, biases = parts[:-1], parts[-1]
    weights = WEIGHTS[rule](sources, biases)
    total = weights.sum(0)
    sources.addcmul_((weights / (total + _LEAST))[..., None], biases)
    biases.mul_((total == 0)[:, None])
    return parts


def _dot(sources: Tensor, biases: Tensor) -> Tensor:
    if bool((biases == biases[0]).all()):
        return sources @ biases[0]
    dots: Tensor = biases.unsqueeze(1) @ sources.permute(1, 2, 0)
    return dots.squeeze(1).mT


def _absdot(sources: Tensor, biases: Tensor) -> Tensor:
    return _dot(sources, biases).abs()


def _abssim(sources: Tensor, biases: Tensor) -> Tensor:
    sizes = _norm(sources, biases) * torch.linalg.vector_norm(biases, dim=-1)
    cosines: Tensor = _dot(sources, biases).abs() / sizes
    return cosines.masked_fill(sizes == 0, 0)


def _norm(sources: Tensor, biases: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(sources, dim=-1)
    return norms


def _equal(sources: Tensor, biases: Tensor) -> Tensor:
    return (sources != 0).any(-1).to(sources)


def _cls(sources: Tensor, biases: Tensor) -> Tensor:
    weights = sources.new_zeros(sources.shape[:-1])
    weights[0] = 1
    return weights


#: Name → weights (sources, receivers) of parts (sources, receivers, hidden) and biases
#: (receivers, hidden).
WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "absdot": _absdot,
    "abssim": _abssim,
    "norm": _norm,
    "equal": _equal,
    "cls": _cls,
}
