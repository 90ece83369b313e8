r"""The vectors of a layer, projected on a direction of each receiver.

With :math:`g_{ij} = M v_{ij} / s_i` the vectors through all of a layer's norms, those
whose length is ``N_ENC``, and a direction :math:`p_i` of each receiver,

.. math::
    r_j = \sum_i \langle p_i, g_{ij} \rangle , \qquad
    \langle p_i, g_{ij} \rangle = \langle q_i, v_{ij} \rangle , \quad
    q_i = M^\top p_i / s_i ,

so no vector is made per pair of tokens: :math:`W_O^\top q_i` goes back through the
attention weights, and meets the values there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from captum_globenc.contributions.vectors import deviation_of, norms_of, positions
from captum_globenc.encoders.parts import NORMS
from captum_globenc.recording.records import LayerRecord, Receivers, take


def projected(record: LayerRecord, receivers: Receivers, directions: Tensor) -> Tensor:
    """What a block of receivers takes from each source, along their directions.

    Args:
        record (LayerRecord): the layer.
        receivers (slice or Tensor): the block.
        directions (Tensor): (batch, receivers, hidden).

    Returns:
        *Tensor* of shape (batch, sources), signed.
    """
    directions = directions / deviation_of(record, receivers, NORMS)[..., None]
    for norm in reversed(norms_of(record, NORMS).values()):
        directions = norm.transposed(directions)
    by_head = (directions @ record.weights.output).unflatten(-1, (record.heads, -1))
    sent = torch.einsum("bhij,bihe->bhje", record.attention(receivers), by_head)
    result = (sent * record.call.value.to(record.dtype)).sum((1, 3))
    own = (directions * take(record.hidden, receivers).to(record.dtype)).sum(-1)
    return result.scatter_add_(1, positions(result, receivers), own)
