r"""How much each receiver takes from each source in one layer: the eight local scores.

A score is a function ``record → rows``: it prepares what belongs to the sources, once
per layer, and ``rows(receivers)`` then gives :math:`n_{ij}` for a block of receivers,
as (batch, receivers, sources). Sources: Kobayashi et al. 2020 (arXiv:2004.10102) for N
and W, 2021 (arXiv:2109.07152) for N_RES and N_RES_LN, Modarressi et al. 2022
(arXiv:2205.03286) for N_ENC, and Abnar & Zuidema 2020 (arXiv:2005.00928) for the fixed
residuals.

No vector of the hidden size is made per pair of tokens. In every norm-based score the
vector is :math:`c_i M (a_{ij} + \delta_{ij} x_i)` with one linear map M for all tokens
(in N without :math:`\delta_{ij} x_i`), so off the diagonal

.. math::
    n_{ij}^2 = c_i^2 \sum_{h,h'} \alpha^h_{ij} \alpha^{h'}_{ij} G_j[h,h'], \qquad
    G_j[h,h'] = \langle M f^h(x_j), M f^{h'}(x_j) \rangle ,

and on the diagonal there is one vector per token.

The paper covers post-LN layers. In a pre-LN layer no norm follows the residuals, so M
is the identity and N_RES_LN and N_ENC are N_RES; a norm after the last layer belongs to
the M of that layer's N_ENC. An RMSNorm has no centring. A LayerScale is a part of the
f^h. These are extensions of this project.
"""

from __future__ import annotations

import torch
from torch import Tensor

from captum_globenc.contributions.contribution import Contribution, Rows
from captum_globenc.contributions.vectors import (
    FIRST_NORM,
    NO_NORM,
    deviation_of,
    norms_of,
    own_vectors,
    positions,
    set_diagonal,
    summed_vectors,
)
from captum_globenc.encoders.parts import NORMS
from captum_globenc.errors import named
from captum_globenc.recording.records import LayerRecord, Receivers

# How many tokens and heads are multiplied at once: few enough to stay in the cache and
# to leave out most of the symmetric half, enough to keep the processor busy.
_TOKEN_CHUNK = 512
_HEAD_GROUP = 4
# Attention weights in quadratic forms at once: 512 KB in float32, and as much again.
_PAIRS = 2**17
# Of so few products all are made at once, the symmetric half included.
_SMALL = 2**18


def attention_weights(record: LayerRecord) -> Rows:
    r"""``W``: :math:`\frac{1}{H} \sum_h \alpha^h_{ij}`."""
    return lambda receivers: record.attention(receivers).mean(1)


def attention_weights_fixed_residual(record: LayerRecord) -> Rows:
    r"""``W_FIXED_RES``: :math:`\frac12 W + \frac12 I` (Abnar & Zuidema 2020)."""
    weights = attention_weights(record)
    return lambda receivers: _halve_onto_identity(weights(receivers), receivers)


def attention_weights_residual(record: LayerRecord) -> Rows:
    r"""``W_RES``: W off the diagonal, mixed with the residual as N_ENC mixes them.

    The off-diagonal part of each row of W is scaled to sum to :math:`r_i` and the
    diagonal is :math:`1 - r_i`, where

    .. math::
        r_i = \frac{\|\sum_{j \ne i} g^2_{ij}\|}
                   {\|\sum_{j \ne i} g^2_{ij}\| + \|g^2_{ii}\|}

    (Kobayashi et al. 2021, section 4, with the vectors of N_ENC). A token that attends
    to itself alone takes everything from itself.
    """

    def rows(receivers: Receivers) -> Tensor:
        alpha = record.attention(receivers)
        own = own_vectors(record, alpha, receivers, through=NORMS)
        others = summed_vectors(record, alpha, receivers, through=NORMS) - own
        ratio = others.norm(dim=-1)
        ratio = ratio / (ratio + own.norm(dim=-1))
        off = set_diagonal(alpha.mean(1), receivers, torch.zeros_like(ratio))
        total = off.sum(-1, keepdim=True)
        ratio = ratio[..., None].masked_fill(total == 0, 0)
        off = off / total.masked_fill(total == 0, 1) * ratio
        return set_diagonal(off, receivers, 1 - ratio[..., 0])

    return rows


def norms(record: LayerRecord) -> Rows:
    r"""``N``: :math:`\|a_{ij}\|`, :math:`a_{ij} = \sum_h \alpha^h_{ij} f^h(x_j)`."""
    gram = _source_gram(record, through=NO_NORM)
    return lambda receivers: _quadratic(gram, record.attention(receivers))


def norms_fixed_residual(record: LayerRecord) -> Rows:
    r"""``N_FIXED_RES``: :math:`\frac12 N / \mathrm{rowsum}(N) + \frac12 I`."""
    unmixed = norms(record)

    def rows(receivers: Receivers) -> Tensor:
        values = unmixed(receivers)
        total = values.sum(-1, keepdim=True)
        return _halve_onto_identity(
            values / total.masked_fill(total == 0, 1), receivers
        )

    return rows


def norms_residual(record: LayerRecord) -> Rows:
    r"""``N_RES``: :math:`\|a_{ij} + \delta_{ij} x_i\|`."""
    return _norms_through(record, through=NO_NORM)


def norms_residual_layernorm(record: LayerRecord) -> Rows:
    r"""``N_RES_LN``: :math:`\|g^1_{ij}\|`, to the LayerNorm after the attention.

    :math:`g^1_{ij} = \gamma_1 \odot C(a_{ij} + \delta_{ij} x_i) / s^1_i`.
    """
    return _norms_through(record, through=FIRST_NORM)


def norms_encoder(record: LayerRecord) -> Rows:
    r"""``N_ENC``: :math:`\|g^2_{ij}\|`, the whole encoder layer.

    :math:`g^2_{ij} = \gamma_2 \odot C(g^1_{ij}) / s^2_i` (Modarressi et al. 2022).
    """
    return _norms_through(record, through=NORMS)


#: Every local score by its name.
LOCAL_SCORES: dict[str, Contribution] = {
    name: Contribution(name, rows, stacks=True, narrows=True)
    for name, rows in {
        "W": attention_weights,
        "W_FIXED_RES": attention_weights_fixed_residual,
        "W_RES": attention_weights_residual,
        "N": norms,
        "N_FIXED_RES": norms_fixed_residual,
        "N_RES": norms_residual,
        "N_RES_LN": norms_residual_layernorm,
        "N_ENC": norms_encoder,
    }.items()
}


def local_score(name: str) -> Contribution:
    """The local score of this name.

    Raises:
        InputError: there is none.
    """
    return named(LOCAL_SCORES, name, "local score")


def _norms_through(record: LayerRecord, through: tuple[str, ...]) -> Rows:
    r""":math:`c_i \|M (a_{ij} + \delta_{ij} x_i)\|`, M of these norms."""
    gram = _source_gram(record, through)

    def rows(receivers: Receivers) -> Tensor:
        alpha = record.attention(receivers)
        own = own_vectors(record, alpha, receivers, through).norm(dim=-1)
        values = _quadratic(gram, alpha)
        values = values / deviation_of(record, receivers, through)[..., None]
        return set_diagonal(values, receivers, own)

    return rows


def _source_gram(record: LayerRecord, through: tuple[str, ...]) -> Tensor:
    """G_j of every source, folded onto its upper triangle (off the diagonal doubled).

    Returns:
        *Tensor* of shape (batch, sources, heads, heads), upper triangular, with the
        same quadratic form as G.
    """
    value = record.call.value.to(record.dtype).transpose(1, 2)
    batch, tokens, heads, size = value.shape
    names = tuple(norms_of(record, through))
    folded = record.weights.gram(names, heads).view(-1, heads, size, heads * size)
    layers = len(folded)
    value = value.reshape(layers, -1, heads, size)
    gram = value.new_zeros(layers, value.shape[1], heads, heads)
    step = max(1, _TOKEN_CHUNK // layers)
    several = heads if value.numel() * heads <= _SMALL else _HEAD_GROUP
    for first in range(0, value.shape[1], step):
        chunk = value[:, first : first + step]
        for head in range(0, heads, several):
            # v^h K^{hh'} for a group of heads h with all heads h' from its first on,
            # then the product of each with v^h'.
            group = slice(head, head + several)
            mapped = (
                chunk[:, :, group].transpose(1, 2) @ folded[:, group, :, head * size :]
            )
            mapped = mapped.unflatten(-1, (heads - head, size))
            products = mapped.mul_(chunk[:, None, :, head:]).sum(-1)
            part = gram[:, first : first + step, group, head:]
            part.copy_(products.transpose(1, 2))
    return gram.view(batch, tokens, heads, heads)


def _quadratic(gram: Tensor, alpha: Tensor) -> Tensor:
    """Sqrt of the quadratic form of each pair, clamped at 0 against rounding.

    Args:
        gram (Tensor): (batch, sources, heads, heads).
        alpha (Tensor): (batch, heads, receivers, sources).

    Returns:
        *Tensor* of shape (batch, receivers, sources).
    """
    batch, heads, receivers, sources = alpha.shape
    examples = max(1, _PAIRS // (heads * receivers * sources))
    step = max(1, _PAIRS // (heads * receivers))
    if examples >= batch and step >= sources:
        squares = _products(gram, alpha)
    else:
        squares = alpha.new_empty(batch, sources, receivers)
        for example in range(0, batch, examples):
            some = slice(example, example + examples)
            for first in range(0, sources, step):
                part = slice(first, first + step)
                squares[some, part] = _products(
                    gram[some, part], alpha[some, ..., part]
                )
    return squares.clamp_(min=0).sqrt_().transpose(1, 2)


def _products(gram: Tensor, alpha: Tensor) -> Tensor:
    """The quadratic forms themselves, (batch, sources, receivers)."""
    by_source = alpha.permute(0, 3, 1, 2)
    return (gram @ by_source).mul_(by_source).sum(2)


def _halve_onto_identity(values: Tensor, receivers: Receivers) -> Tensor:
    """½ values + ½ I."""
    index = positions(values, receivers)[..., None]
    half = torch.full_like(values[..., :1], 0.5)
    return (values / 2).scatter_add_(-1, index, half)
