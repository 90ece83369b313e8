"""Scores as the colours of a grid: layers by tokens, receivers by sources."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from torch import Tensor

from captum_globenc.visualization.canvas import (
    Values,
    along,
    beside,
    finite,
    name_layers,
    name_tokens,
    new_axes,
    runs_from_right,
    unsigned,
)
from captum_globenc.visualization.colours import scale


def layer_map(
    tokens: Sequence[str], scores_per_layer: Values, ax: Axes | None = None
) -> Axes:
    """One row of scores per layer, the bottom layer at the bottom.

    Sentences of right-to-left scripts run from the right.

    Args:
        tokens (sequence of str): the tokens.
        scores_per_layer (Tensor or nested sequence): (layers, tokens), of any sign, in
            one scale of colours. See ``captum_globenc.adapters.layer_matrix``, and
            ``unit_range`` for layers of different sizes.
        ax (Axes, optional): where to draw. Default: a new figure.

    Returns:
        *Axes*: with one image, whose array are the scores.

    Raises:
        InputError: scores that are not one finite number per layer and token.

    Examples::

        >>> import torch
        >>> from captum_globenc.visualization import layer_map
        >>> axes = layer_map(["a", "lovely", "film"], torch.rand(12, 3))
        >>> axes.images[0].get_array().shape
        (12, 3)
    """
    values = finite("scores_per_layer", scores_per_layer, tokens, "layers", "tokens")
    layers = len(values)
    if ax is None:
        height = 0.7 + min(0.25 * layers, 10) + beside(tokens)
        ax = new_axes(1.2 + along(len(tokens), 3), height)
    _grid(ax, values)
    ax.set_ylim(-0.5, layers - 0.5)
    ax.set_ylabel("layer")
    name_layers(ax.yaxis, [str(layer + 1) for layer in range(layers)])
    name_tokens(ax.xaxis, tokens)
    if runs_from_right(tokens):
        ax.invert_xaxis()
    return ax


def source_matrix(tokens: Sequence[str], local: Values, ax: Axes | None = None) -> Axes:
    """How much each receiver (row) takes from each source (column) in a layer.

    Sources of right-to-left scripts run from the right.

    Args:
        tokens (sequence of str): the tokens.
        local (Tensor or nested sequence): (receivers, sources), at least 0: a layer of
            ``Decomposition.local``, or a rollout.
        ax (Axes, optional): where to draw. Default: a new figure.

    Returns:
        *Axes*: with one image, whose array are the scores.

    Raises:
        InputError: scores that are not one finite number, at least 0, for each
            receiver and source.

    Examples::

        >>> import torch
        >>> from captum_globenc.visualization import source_matrix
        >>> axes = source_matrix(["a", "lovely", "film"], torch.eye(3))
        >>> axes.get_xlabel(), axes.get_ylabel()
        ('source', 'receiver')
    """
    values = unsigned("local", finite("local", local, tokens, "receivers", "sources"))
    if ax is None:
        side = along(len(tokens), 2.5) + beside(tokens)
        ax = new_axes(1.4 + side, 0.4 + side)
    _grid(ax, values)
    ax.set(xlabel="source", ylabel="receiver")
    name_tokens(ax.xaxis, tokens)
    name_tokens(ax.yaxis, tokens)
    if runs_from_right(tokens):
        ax.invert_xaxis()
    return ax


def _grid(ax: Axes, values: Tensor) -> None:
    """The image and what its colours mean."""
    cmap, norm = scale(values)
    image = ax.imshow(
        values.numpy(),
        cmap=cmap,
        norm=norm,
        aspect="auto",
        origin="upper",
        interpolation="nearest",
    )
    ax.grid(visible=False)
    figure = ax.get_figure()
    assert figure is not None
    figure.colorbar(image, ax=ax, fraction=0.05, pad=0.02, label="score", aspect=30)
