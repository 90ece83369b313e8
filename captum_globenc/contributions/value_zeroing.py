r"""Value Zeroing's contribution: what changes where a source has no value.

Mohebbi, Zuidema, Chrupała and Alishahi 2023 (arXiv:2301.12971). The layer runs again
with :math:`v_j = 0` in all heads and everything else as it was, its input included:

.. math::
    s_{ij} = 1 - \cos(x'_i, x'^{\neg j}_i), \qquad c_{ij} = s_{ij} / \sum_k s_{ik} ,

with :math:`x'_i` the layer's output, so the feed-forward part counts. A norm after the
last layer is not part of the layer. Of unit vectors, :math:`1 - \cos(u, v) = \frac12
\|u - v\|^2`, which loses no digits where they are close.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from captum_globenc.contributions.contribution import Contribution, Rows
from captum_globenc.contributions.vectors import row_shares
from captum_globenc.recording.attention import AttentionCall
from captum_globenc.recording.records import LayerRecord, take


def changes(record: LayerRecord) -> Rows:
    r""":math:`c_{ij}`; a row in which nothing changes is the identity's.

    The layer runs once for every token of the longest example, with the whole batch.
    """
    alpha = record.attention(slice(None))
    value = record.call.value.to(record.dtype)

    def without(source: int, call: AttentionCall) -> Tensor:
        taken = alpha[..., source, None] * value[:, :, source, None]
        return (call.context - taken).to(call.context.dtype)

    clean = _unit(record.replay(lambda call: call.context), record.dtype)
    distances = torch.zeros_like(alpha[:, 0])
    for source in record.token_mask.any(0).nonzero()[:, 0].tolist():
        changed = record.replay(functools.partial(without, source))
        changed = _unit(changed, record.dtype)
        distances[..., source] = (clean - changed).square().sum(-1) / 2
    distances = distances.masked_fill(~record.token_mask[:, None], 0)
    shares = row_shares(distances, slice(None))
    return lambda receivers: take(shares, receivers)


#: Value Zeroing's contribution.
VALUE_ZEROING = Contribution("value zeroing", changes, replays=True)


def _unit(states: Tensor, dtype: torch.dtype) -> Tensor:
    """Of length 1 over the last dimension."""
    return nn.functional.normalize(states.to(dtype), dim=-1)
