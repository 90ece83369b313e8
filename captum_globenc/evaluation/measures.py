r"""Measures of an attribution: pure functions, tensors in, one number per example out.

What goes in are scores, or what the model says of perturbed inputs (made by
``captum_globenc.evaluation.perturbation``). All results are float64; a number that
is not defined is NaN, and is left out of means.

Symbols: :math:`p` is the probability of the class that is explained, :math:`x` the
text, and :math:`\tilde x_K` the text with the fraction K of its strongest tokens
perturbed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from scipy import stats
from torch import Tensor

from captum_globenc.errors import InputError


def rank_correlation(
    scores: Tensor, reference: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    r"""Spearman's :math:`\rho` between scores and a reference attribution.

    :math:`\rho = \mathrm{corr}(\mathrm{rank}(s), \mathrm{rank}(r))` over all tokens of
    an example, special tokens included, ties at their mean rank. Source: Modarressi et
    al. 2022 (arXiv:2205.03286), section 4, where the reference is the L2 norm of
    gradient × input.

    Args:
        scores (Tensor): (batch, tokens).
        reference (Tensor): likewise.
        attention_mask (Tensor, optional): likewise; tokens with 0 are left out.
            Default: all tokens count.

    Returns:
        *Tensor* of shape (batch): NaN where scores or reference are constant or there
        is one token.
    """
    return _over_tokens(stats.spearmanr, scores, reference, attention_mask)


def leave_one_out_tau(
    scores: Tensor, drops: Tensor, candidates: Tensor | None = None
) -> Tensor:
    r"""Kendall's :math:`\tau_b` between scores and what leaving out each token costs.

    The drop of token t is :math:`p(x) - p(x_{\setminus t})`, the token replaced by the
    mask token. Source: Jain & Wallace 2019 (arXiv:1902.10186), section 4.1.

    Args:
        scores (Tensor): (batch, tokens).
        drops (Tensor): likewise.
        candidates (Tensor, optional): likewise; True at the tokens that are left out in
            turn. Default: all.

    Returns:
        *Tensor* of shape (batch): NaN where scores or drops are constant or there is
        one token.
    """
    return _over_tokens(stats.kendalltau, scores, drops, candidates)


def probability_drop(full: Tensor, perturbed: Tensor) -> Tensor:
    r""":math:`p(x) - p(\tilde x_K)`, the curve of :func:`aopc` for each example.

    Args:
        full (Tensor): (batch), :math:`p(x)`.
        perturbed (Tensor): (batch, fractions), :math:`p(\tilde x_K)`.

    Returns:
        *Tensor* of shape (batch, fractions).
    """
    _check_curve(full, perturbed)
    return full.double()[:, None] - perturbed.double()


def aopc(full: Tensor, masked: Tensor) -> Tensor:
    r"""Area over the perturbation curve: higher is better.

    :math:`\mathrm{mean}_K [p(x) - p(\tilde x_K)]`, where the strongest
    :math:`\lfloor n K \rfloor` of the n tokens that are not special are replaced by the
    mask token, K = 0.1, ..., 0.9. Source: Samek et al. 2017 (arXiv:1509.06321), in the
    protocol of Modarressi et al. 2023 (DecompX, arXiv:2306.02873), section 4.

    Args:
        full (Tensor): (batch), :math:`p(x)`.
        masked (Tensor): (batch, fractions), :math:`p(\tilde x_K)`.

    Returns:
        *Tensor* of shape (batch). A text of one token is never masked: 0.
    """
    return probability_drop(full, masked).mean(-1)


def comprehensiveness(full: Tensor, removed: Tensor) -> Tensor:
    r"""What removing the strongest tokens costs: higher is better.

    :math:`\mathrm{mean}_K [p(x) - p(x \setminus r_K)]`, where :math:`r_K` are the
    strongest :math:`\lceil n K \rceil` tokens, taken out of the text, K = 0.01, 0.05,
    0.1, 0.2, 0.5. Source: DeYoung et al. 2020 (ERASER, arXiv:1911.03429), section 4,
    which divides the sum over these five by six.

    Args:
        full (Tensor): (batch), :math:`p(x)`.
        removed (Tensor): (batch, fractions), :math:`p(x \setminus r_K)`.

    Returns:
        *Tensor* of shape (batch).
    """
    return probability_drop(full, removed).mean(-1)


def sufficiency(full: Tensor, kept: Tensor) -> Tensor:
    r"""What is missing from the strongest tokens alone: lower is better.

    :math:`\mathrm{mean}_K [p(x) - p(r_K)]`, where :math:`r_K` are the strongest
    :math:`\lceil n K \rceil` tokens and nothing else but special tokens; K as in
    :func:`comprehensiveness`. Source: DeYoung et al. 2020 (ERASER, arXiv:1911.03429),
    section 4.

    Args:
        full (Tensor): (batch), :math:`p(x)`.
        kept (Tensor): (batch, fractions), :math:`p(r_K)`.

    Returns:
        *Tensor* of shape (batch). It is negative where the tokens alone convince the
        model more than the text does.
    """
    return probability_drop(full, kept).mean(-1)


def log_odds(full: Tensor, masked: Tensor) -> Tensor:
    r"""What masking the strongest tokens does to log p: lower is better.

    :math:`\mathrm{mean}_K [\log p(\tilde x_K) - \log p(x)]`, masked as in :func:`aopc`.
    Source: Shrikumar et al. 2017 (arXiv:1704.02685), as in Sanyal & Ren 2021
    (arXiv:2108.13654), section 4.

    Args:
        full (Tensor): (batch), :math:`\log p(x)`: 0 where the model is certain.
        masked (Tensor): (batch, fractions), :math:`\log p(\tilde x_K)`.
            Log-probabilities rather than probabilities, so that one that rounds to 0
            stays finite.

    Returns:
        *Tensor* of shape (batch).
    """
    return -probability_drop(full, masked).mean(-1)


def _over_tokens(
    statistic: Callable[..., object], left: Tensor, right: Tensor, mask: Tensor | None
) -> Tensor:
    """A rank statistic of each example, over the tokens of the mask."""
    if left.ndim != 2 or left.shape != right.shape:
        raise InputError(
            "two tensors of one shape (batch, tokens) are expected, got "
            f"{tuple(left.shape)} and {tuple(right.shape)}."
        )
    if mask is None:
        mask = torch.ones_like(left, dtype=torch.bool)
    if mask.shape != left.shape:
        raise InputError(
            f"the mask has shape {tuple(mask.shape)}, and scores {tuple(left.shape)}."
        )
    values = []
    for a, b, chosen in zip(left, right, mask.bool()):
        a, b = a[chosen].double(), b[chosen].double()
        if len(a) < 2 or a.min() == a.max() or b.min() == b.max():
            values.append(math.nan)
        else:
            found = statistic(a.cpu().numpy(), b.cpu().numpy())
            values.append(float(found.statistic))  # type: ignore[attr-defined]
    return torch.tensor(values, dtype=torch.float64)


def _check_curve(full: Tensor, perturbed: Tensor) -> None:
    if full.ndim != 1 or perturbed.ndim != 2 or len(full) != len(perturbed):
        raise InputError(
            "shapes (batch) and (batch, fractions) are expected, got "
            f"{tuple(full.shape)} and {tuple(perturbed.shape)}."
        )
