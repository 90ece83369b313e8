"""What one run of an encoder leaves behind: O(tokens × hidden) per layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from captum_globenc.reconstruction import check, tolerance
from captum_globenc.weights import LayerWeights

#: A block of receivers: the same positions for all examples, or (batch, receivers)
#: positions of each.
Receivers = slice | Tensor


def take(values: Tensor, receivers: Receivers) -> Tensor:
    """The chosen receivers along dimension 1.

    Args:
        values (Tensor): (batch, tokens, ...).
        receivers (slice or Tensor): a block of receivers.

    Returns:
        *Tensor* of shape (batch, receivers, ...).
    """
    if isinstance(receivers, slice):
        return values[:, receivers]
    examples = torch.arange(values.shape[0], device=values.device)[:, None]
    return values[examples, receivers]


@dataclass(frozen=True)
class LayerRecord:
    r"""One layer's run.

    Args:
        name (str): the layer's name in the model.
        query (Tensor): (batch, heads, tokens, head size), as attention used it.
        key (Tensor): likewise.
        value (Tensor): :math:`W_V^h x_j + b_V^h`, likewise.
        mask (Tensor or None): boolean (True: attended) or added to the logits; its
            shape broadcasts to (batch, heads, receivers, sources).
        scaling (float): factor of the logits.
        hidden (Tensor): the layer's input :math:`x`, (batch, tokens, hidden).
        scales (tuple[Tensor or None, ...]): the true denominators :math:`s_i` in the
            norm after the first residual and in those after the second one, (batch,
            tokens) each; None where there is no norm.
        value_probe (Tensor): a random projection of ``value``, (batch, tokens, heads).
        context_probe (Tensor): the same projection of the attention's output, likewise:
            what ``attention`` must reproduce from ``value_probe``.
        weights (LayerWeights): the layer's prepared weights.
        attended (Tensor): (batch, tokens), False at padding.
    """

    name: str
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    hidden: Tensor
    scales: tuple[Tensor | None, ...]
    value_probe: Tensor
    context_probe: Tensor
    weights: LayerWeights
    attended: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the layer is decomposed."""
        return self.weights.probe.dtype

    def attention(self, receivers: Receivers) -> Tensor:
        r""":math:`\alpha^h_{ij}` of a block of receivers, checked against the run.

        Args:
            receivers (slice or Tensor): the block.

        Returns:
            *Tensor* of shape (batch, heads, receivers, sources). In memory the
            receivers are last, as the quadratic form over heads wants it.

        Raises:
            ReconstructionError: these attention weights do not give the attention
                output that the model computed.
        """
        query = take(self.query.transpose(1, 2), receivers).to(self.dtype)
        # (batch, heads, sources, receivers)
        logits = self.key.to(self.dtype) @ (query * self.scaling).permute(0, 2, 3, 1)
        hidden = None
        if self.mask is not None:
            mask = self._mask_of(receivers)
            hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
            if mask.dtype != torch.bool:
                logits += mask
            logits = logits.masked_fill_(hidden, -torch.inf)
        alpha = logits.softmax(2)
        if hidden is not None:
            # A receiver from which everything is hidden takes nothing.
            alpha = alpha.masked_fill_(hidden.all(2, keepdim=True), 0)
        rebuilt = (self.value_probe.transpose(1, 2)[:, :, None] @ alpha)[:, :, 0]
        check(
            self.name,
            ["the attention output"],
            take(self.context_probe, receivers).transpose(1, 2)[None],
            rebuilt[None],
            take(self.attended, receivers)[:, None],
            tolerance(self.query.dtype, self.hidden.dtype),
        )
        return alpha.transpose(2, 3)

    def examples(self, chosen: slice) -> LayerRecord:
        """The record of some of the examples, sharing memory with this one."""
        mask = self.mask
        return replace(
            self,
            query=self.query[chosen],
            key=self.key[chosen],
            value=self.value[chosen],
            mask=mask if mask is None or len(mask) == 1 else mask[chosen],
            hidden=self.hidden[chosen],
            scales=tuple(None if s is None else s[chosen] for s in self.scales),
            value_probe=self.value_probe[chosen],
            context_probe=self.context_probe[chosen],
            attended=self.attended[chosen],
        )

    def _mask_of(self, receivers: Receivers) -> Tensor:
        """The mask of a block, laid out (batch, heads, sources, receivers)."""
        assert self.mask is not None
        mask = self.mask.transpose(1, 2)
        if mask.shape[1] > 1:
            batch = self.query.shape[0]
            mask = take(mask.expand(batch, -1, -1, -1), receivers)
        return mask.permute(0, 2, 3, 1)


class Grid(NamedTuple):
    """The patches of an image: an encoder's last tokens, row by row.

    Args:
        rows (int): how many, from top to bottom.
        columns (int): how many, from left to right.
        height (float): the share of the image's height that they cover; what makes no
            whole patch is left over at the bottom.
        width (float): likewise of its width, from the left.
    """

    rows: int
    columns: int
    height: float = 1.0
    width: float = 1.0


@dataclass(frozen=True)
class EncoderRecord:
    """One run of an encoder.

    Args:
        layers (tuple[LayerRecord, ...]): bottom first.
        attended (Tensor): (batch, tokens), False at padding.
        output (Tensor): (batch, tokens, hidden), the final representation.
        grid (Grid or None): the patches of the image; None where there was none.
    """

    layers: tuple[LayerRecord, ...]
    attended: Tensor
    output: Tensor
    grid: Grid | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, tokens)."""
        return tuple(self.attended.shape)  # type: ignore[return-value]

    @property
    def heads(self) -> int:
        """Attention heads of a layer."""
        return self.layers[0].query.shape[1]
