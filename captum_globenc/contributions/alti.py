r"""ALTI's contribution: how close a source's vector is to the layer's state.

Ferrando, Gállego and Costa-jussà 2022 (arXiv:2203.04212), for post-LN layers. With
:math:`g^1_{ij}` the vectors of ``N_RES_LN`` and :math:`y_i` the true output of the norm
after the attention, with its bias and the bias of the output map,

.. math::
    d_{ij} = \|g^1_{ij} - y_i\|_1, \qquad
    c_{ij} = \frac{\max(0, \|y_i\|_1 - d_{ij})}{\sum_k \max(0, \|y_i\|_1 - d_{ik})} .

No norm follows the residual of a pre-LN layer: there :math:`y_i` is the state after it
and :math:`g^1_{ij}` is :math:`a_{ij} + \delta_{ij} x_i`, an extension of this project.
The feed-forward part, the norm behind it and a norm after the last layer do not count.

An L1 norm has no quadratic form, so the vectors are made, for a few sources at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from captum_globenc.contributions.contribution import Contribution, Rows
from captum_globenc.contributions.vectors import (
    FIRST_NORM,
    deviation_of,
    norms_of,
    own_vectors,
    row_shares,
    set_diagonal,
    summed_vectors,
)
from captum_globenc.encoders.weights import through_norms
from captum_globenc.recording.records import LayerRecord, Receivers

# Numbers of vectors held at once: 4 MB in float32.
_HELD = 2**20


def closeness(record: LayerRecord) -> Rows:
    r""":math:`c_{ij}`; a row in which every source is clipped is the identity's."""
    heads = record.heads
    norms = norms_of(record, FIRST_NORM).values()
    weights = through_norms(record.weights.output.T, norms)
    weights = weights.unflatten(0, (heads, -1))  # (heads, head size, hidden)

    def rows(receivers: Receivers) -> Tensor:
        alpha = record.attention(receivers)
        state = _state(record, alpha, receivers)
        own = _closeness(own_vectors(record, alpha, receivers, FIRST_NORM), state)
        scaled = alpha / deviation_of(record, receivers, FIRST_NORM)[:, None, :, None]
        close = torch.empty_like(alpha[:, 0])
        size = max(1, _HELD // state.numel())
        for first in range(0, alpha.shape[-1], size):
            sources = slice(first, first + size)
            value = record.call.value[:, :, sources].to(record.dtype)
            transformed = torch.einsum("bhje,hed->bjhd", value, weights)
            vectors = scaled[..., sources].permute(0, 3, 2, 1) @ transformed
            close[..., sources] = _closeness(vectors, state[:, None]).mT
        close = set_diagonal(close, receivers, own).clamp(min=0)
        return row_shares(close, receivers)

    return rows


#: ALTI's contribution.
ALTI_CONTRIBUTION = Contribution("ALTI", closeness, narrows=True)


def _state(record: LayerRecord, alpha: Tensor, receivers: Receivers) -> Tensor:
    """y_i, (batch, receivers, hidden): the sum of all vectors and of the biases."""
    state = summed_vectors(record, alpha, receivers, FIRST_NORM)
    norms = list(norms_of(record, FIRST_NORM).values())
    bias = through_norms(record.weights.output_bias, norms)
    state = state + bias / deviation_of(record, receivers, FIRST_NORM)[..., None]
    return state + sum(norm.beta for norm in norms)


def _closeness(vectors: Tensor, state: Tensor) -> Tensor:
    """‖y‖₁ - ‖v - y‖₁ over the last dimension; ``vectors`` are overwritten.

    Subtracted entry by entry, so that a vector of zeros gives exactly 0.
    """
    return -vectors.sub_(state).abs_().sub_(state.abs()).sum(-1)
