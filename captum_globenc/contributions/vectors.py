r"""The vectors of a layer that its scores are made of, and blocks of pairs.

With :math:`v_{ij} = a_{ij} + \delta_{ij} x_i`, what receiver :math:`i` gets from source
:math:`j` through attention and the residual, a score's vectors are
:math:`M v_{ij} / s_i`: M the linear part of the norms that follow, :math:`s_i` the
product of their deviations. Which norms is said by their names; a layer has some of
them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from captum_globenc.encoders.parts import Norm
from captum_globenc.encoders.weights import through_norms
from captum_globenc.recording.records import LayerRecord, Receivers, take

#: No norm: the vectors at the first residual.
NO_NORM: tuple[str, ...] = ()
#: To the norm after the first residual, which pre-LN layers do not have.
FIRST_NORM = ("attention_norm",)


def own_vectors(
    record: LayerRecord, alpha: Tensor, receivers: Receivers, through: tuple[str, ...]
) -> Tensor:
    """The vectors on the diagonal.

    Args:
        record (LayerRecord): the layer.
        alpha (Tensor): its attention weights, (batch, heads, receivers, sources).
        receivers (slice or Tensor): the block.
        through (tuple[str, ...]): names of norms.

    Returns:
        *Tensor* of shape (batch, receivers, hidden).
    """
    own = _diagonal(alpha, receivers)[..., None]  # (batch, receivers, heads, 1)
    value = take(record.call.value.transpose(1, 2), receivers).to(record.dtype)
    return _mapped(record, own * value, receivers, through)


def summed_vectors(
    record: LayerRecord, alpha: Tensor, receivers: Receivers, through: tuple[str, ...]
) -> Tensor:
    """The sum over all sources, as :func:`own_vectors`, (batch, receivers, hidden)."""
    context = torch.einsum("bhij,bhjd->bihd", alpha, record.call.value.to(record.dtype))
    return _mapped(record, context, receivers, through)


def _mapped(
    record: LayerRecord, context: Tensor, receivers: Receivers, through: tuple[str, ...]
) -> Tensor:
    """What becomes of (batch, receivers, heads, head size) and the residual."""
    output = record.weights.output
    # The tokens of all examples are the rows of a matrix, or of one for each layer.
    rows = (*output.shape[:-2], -1)
    vectors = context.reshape(*rows, output.shape[-1]) @ output.mT
    residual = take(record.hidden, receivers).to(record.dtype)
    vectors = vectors + residual.reshape(*rows, output.shape[-2])
    vectors = through_norms(vectors, norms_of(record, through).values())
    vectors = vectors.reshape(residual.shape)
    return vectors / deviation_of(record, receivers, through)[..., None]


def deviation_of(
    record: LayerRecord, receivers: Receivers, through: tuple[str, ...]
) -> Tensor:
    """The product of these norms' standard deviations, (batch, receivers)."""
    deviations = [
        take(record.deviations[name], receivers) for name in norms_of(record, through)
    ]
    if not deviations:
        deviations = [take(torch.ones_like(record.hidden_probe[:, 0]), receivers)]
    return functools.reduce(torch.mul, deviations)


def norms_of(record: LayerRecord, through: tuple[str, ...]) -> dict[str, Norm]:
    """Those of these norms that the layer has, in order."""
    norms = record.weights.norms
    return {name: norms[name] for name in through if name in norms}


def positions(values: Tensor, receivers: Receivers) -> Tensor:
    """The sources on the diagonal of a block, (batch, receivers)."""
    tokens = torch.arange(values.shape[-1], device=values.device)
    if isinstance(receivers, slice):
        return tokens[receivers].expand(values.shape[0], -1)
    return receivers


def set_diagonal(values: Tensor, receivers: Receivers, diagonal: Tensor) -> Tensor:
    """``values`` with this diagonal, (batch, receivers), in place."""
    if isinstance(receivers, slice):
        first, _, _ = receivers.indices(values.shape[-1])
        values.diagonal(first, -2, -1).copy_(diagonal)
        return values
    return values.scatter_(-1, receivers[..., None], diagonal[..., None])


def row_shares(values: Tensor, receivers: Receivers) -> Tensor:
    """Rows divided by their sums; a row of zeros becomes that of the identity.

    Args:
        values (Tensor): (batch, receivers, sources), at least 0.
        receivers (slice or Tensor): the block.

    Returns:
        *Tensor* of the shape of ``values``, whose rows sum to 1.
    """
    total = values.sum(-1)
    shares = values / total.masked_fill(total == 0, 1)[..., None]
    index = positions(values, receivers)[..., None]
    return shares.scatter_add_(-1, index, (total == 0).to(values)[..., None])


def _diagonal(alpha: Tensor, receivers: Receivers) -> Tensor:
    """α_ii of a block, (batch, receivers, heads)."""
    if isinstance(receivers, slice):
        first, _, _ = receivers.indices(alpha.shape[-1])
        return alpha.diagonal(first, -2, -1).transpose(1, 2)
    index = receivers[:, None, :, None].expand(-1, alpha.shape[1], -1, -1)
    return alpha.gather(-1, index)[..., 0].transpose(1, 2)
