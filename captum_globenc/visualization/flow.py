"""Where the evidence of one token comes from, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from torch import Tensor

from captum_globenc.errors import InputError
from captum_globenc.visualization.canvas import (
    Values,
    along,
    beside,
    finite,
    name_layers,
    name_tokens,
    new_axes,
    size_in_points,
    unsigned,
)
from captum_globenc.visualization.colours import POSITIVE
from captum_globenc.visualization.fonts import drawable

_WIDEST = 4.0  # points, of lines
_THINNEST = 0.02  # of the strongest
_LARGEST = 60.0  # points squared, of dots
_PITCH = 9.0  # points from token to token that such lines and dots need


def evidence_flow(local: Tensor, token_index: int = 0) -> Tensor:
    r"""The share of a token's evidence that goes through each edge of each layer.

    The edge of layer :math:`l` from source j to receiver i carries :math:`r^l_i
    n^l_{ij}`, where :math:`r^l` is what reaches the explained token from the output of
    layer :math:`l`; each layer's edges are divided by their sum.

    Args:
        local (Tensor): (layers, receivers, sources), at least 0.
        token_index (int, optional): the explained token. Default: 0, [CLS].

    Returns:
        *Tensor* of shape (layers, receivers, sources). The sum over the receivers of
        the bottom layer is the rollout's row, scaled to a sum of 1.
    """
    edges = torch.zeros_like(local)
    reached = torch.zeros_like(local[0, 0])
    reached[token_index] = 1
    for layer in reversed(range(len(local))):
        # Largest first to 1: products of many layers leave the range otherwise.
        edges[layer] = reached[:, None] * (local[layer] / (local[layer].max() or 1))
        edges[layer] /= edges[layer].sum() or 1
        reached = edges[layer].sum(0)
    return edges


def rollout_flow(
    tokens: Sequence[str],
    local: Values,
    token_index: int = 0,
    *,
    lines_per_token: int = 2,
    ax: Axes | None = None,
) -> Axes:
    """The ways on which evidence reaches the explained token, from left to right.

    A column of dots per layer; a dot is as large as what of the evidence is there. The
    lines lead from the sources of a layer to its receivers; the strongest has the same
    width in every layer, and the others theirs in proportion.

    Args:
        tokens (sequence of str): the tokens.
        local (Tensor or nested sequence): (layers, receivers, sources), at least 0:
            ``Decomposition.local`` of an example.
        token_index (int, optional): the explained token. Default: 0, [CLS].
        lines_per_token (int, optional): at most so many lines are drawn in a layer,
            times the number of tokens, the strongest ones; and none that has less than
            a fiftieth of the strongest line's evidence. How much the drawn lines carry
            is written below. Default: 2.
        ax (Axes, optional): where to draw. Default: a new figure.

    Returns:
        *Axes*: with a collection of lines per layer, the bottom layer's first, then
        the dots.

    Raises:
        InputError: scores that are not one finite number, at least 0, per layer,
            receiver and source; no such token, or less than a line.

    Examples::

        >>> import torch
        >>> from captum_globenc.visualization import rollout_flow
        >>> local = torch.eye(3).expand(2, 3, 3)
        >>> axes = rollout_flow(["[CLS]", "lovely", "film"], local)
        >>> [len(lines.get_segments()) for lines in axes.collections[:2]]
        [1, 1]
    """
    shape = ("layers", "receivers", "sources")
    values = unsigned("local", finite("local", local, tokens, *shape))
    count = len(tokens)
    whole = isinstance(token_index, int) and not isinstance(token_index, bool)
    if not whole or not -count <= token_index < count:
        raise InputError(
            f"token_index must be one of the {count} tokens, got {token_index!r}."
        )
    if lines_per_token < 1:
        raise InputError(
            f"lines_per_token must be at least 1, got {lines_per_token!r}."
        )
    layers = len(values)
    edges = evidence_flow(values, token_index)
    if ax is None:
        names = 2 * beside(tokens)
        ax = new_axes(names + min(1.5 + 0.7 * layers, 12), 0.7 + along(count, 0.5))
    drawn = [_strongest(shares, lines_per_token * count) for shares in edges]
    # Many tokens in little room are drawn with less ink.
    ink = min(1.0, size_in_points(ax)[1] / count / _PITCH)
    for layer, kept in enumerate(drawn):
        ax.add_collection(_lines(layer, kept, ink * _WIDEST))
    # What is at the input, at each layer's output, and all of it at the end.
    inside = torch.cat([edges.sum(1), torch.zeros_like(edges[:1, 0])])
    inside[-1, token_index] = 1
    column, row = np.nonzero(inside.numpy() > 0)
    sizes = (
        ink**2 * _LARGEST * inside.numpy()[column, row] / inside.amax(1).numpy()[column]
    )
    ax.scatter(column, row, s=sizes, color=POSITIVE, lw=0, zorder=3)
    ax.set(xlim=(-0.3, layers + 0.3), ylim=(count - 0.5, -0.5))
    ax.set_xlabel(f"layer (the lines carry {_span(drawn)} of its evidence)")
    name_layers(ax.xaxis, ["input", *(str(layer + 1) for layer in range(layers))])
    name_tokens(ax.yaxis, tokens)
    ax.grid(visible=False)
    for side in ("top", "right", "left", "bottom"):
        ax.spines[side].set_visible(False)
    (explained,), properties = drawable([tokens[token_index]])
    ax.annotate(
        explained,
        (layers, token_index % count),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        annotation_clip=False,
        **properties,
    )
    return ax


def _strongest(shares: Tensor, most: int) -> Tensor:
    """The shares of the strongest edges of a layer, 0 at all others."""
    least = max(float(shares.max()) * _THINNEST, torch.finfo(shares.dtype).tiny)
    ordered = shares.flatten().sort(descending=True).values
    if most < len(ordered):
        least = max(least, float(ordered[most - 1]))
    return shares.where(shares >= least, 0)


def _span(drawn: Sequence[Tensor]) -> str:
    """``70% to 95%``: how much the lines of the layers carry."""
    carried = [float(shares.sum()) for shares in drawn]
    least, most = f"{min(carried):.0%}", f"{max(carried):.0%}"
    return least if least == most else f"{least} to {most}"


def _lines(layer: int, shares: Tensor, widest: float) -> LineCollection:
    """The edges of a layer, the strongest above the others."""
    receivers, sources = shares.nonzero(as_tuple=True)
    strength = shares[receivers, sources]
    order = strength.argsort()
    relative = (strength[order] / shares.amax()).numpy()
    segments = [
        [(layer, source), (layer + 1, receiver)]
        for receiver, source in zip(receivers[order].tolist(), sources[order].tolist())
    ]
    return LineCollection(
        segments,
        linewidths=widest * relative,
        colors=[(POSITIVE, alpha) for alpha in (0.3 + 0.6 * relative).tolist()],
        capstyle="round",
    )
