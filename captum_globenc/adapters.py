"""From token scores to the shapes that Captum hands out."""

from __future__ import annotations

from torch import Tensor


def spread_over_embedding(scores: Tensor, like: Tensor) -> Tensor:
    """Token scores as attributions of embeddings, equal over the hidden dimension.

    The sum over the hidden dimension is the token score, so that users go on with
    ``attributions.sum(dim=-1)`` as they do with Captum's methods.

    Args:
        scores (Tensor): (batch, tokens).
        like (Tensor): the embeddings, (batch, tokens, hidden).

    Returns:
        *Tensor* of the shape of ``like``.
    """
    hidden = like.shape[-1]
    return (scores / hidden)[..., None].expand(-1, -1, hidden).contiguous()
