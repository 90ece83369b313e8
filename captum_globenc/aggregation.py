r"""Rollout of the local scores over the layers.

:math:`R^1 = n^1`, :math:`R^l = n^l R^{l-1}` (Abnar & Zuidema 2020, as in Modarressi et
al. 2022): no row is normalised and no residual added, because the residual is inside
:math:`n`. Products of many unnormalised layers leave the range of the floating-point
numbers, so each example carries a power of two beside its values; scaling by it is
exact, and scores keep their ratios.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_globenc.local import LocalScore
from captum_globenc.records import EncoderRecord, Receivers, take

# Attention weights held at once: 8 MB in float32, whatever the batch and the length.
_HELD = 2**21


@dataclass(frozen=True)
class Scaled:
    """``values * 2**exponent``, an exponent per example.

    Args:
        values (Tensor): (batch, ...), the largest of each example in [0.5, 1).
        exponent (Tensor): (batch), integers.
    """

    values: Tensor
    exponent: Tensor

    @classmethod
    def of(cls, values: Tensor, exponent: Tensor | None = None) -> Scaled:
        """Scale each example's largest value into [0.5, 1); zeros stay."""
        _, power = torch.frexp(values.flatten(1).amax(1))
        if exponent is None:
            exponent = torch.zeros_like(power)
        return cls(_times_power(values, -power), exponent + power)

    def to(self, dtype: torch.dtype) -> Tensor:
        """The numbers themselves.

        An example whose largest number the dtype cannot hold is scaled, as a whole, to
        one that it can: the ratios of its numbers are kept, their unit is lost.
        """
        limits = torch.finfo(dtype)
        top = torch.tensor(limits.max, dtype=torch.float64).frexp().exponent
        bottom = torch.tensor(limits.smallest_normal, dtype=torch.float64)
        power = self.exponent.clamp(int(bottom.frexp().exponent), int(top) - 1)
        return _times_power(self.values, power).to(dtype)


def sweep(
    run: EncoderRecord, score: LocalScore, start: Tensor, top: Tensor | None
) -> Iterator[Scaled]:
    """Rows of the rollout without its matrices: ``r ← r n^l`` from the top layer down.

    Args:
        run (EncoderRecord): the layers.
        score (LocalScore): the local score.
        start (Tensor): (batch, tokens), the weight of each receiver of the top layer.
        top (Tensor or None): (batch, receivers), the receivers that have a weight,
            where they are few; None: all.

    Yields:
        *Scaled* values of shape (batch, tokens): what the start takes from each token
        of the input of the top layer, then of the next lower one, and so on. The last
        are the scores of the encoder's input.
    """
    batch, tokens = start.shape
    size = max(1, _HELD // (run.heads * tokens**2))
    groups = [slice(first, first + size) for first in range(0, batch, size)]
    row = Scaled.of(start)
    # Layers outside and groups inside: a layer's weights are then fetched once.
    for layer in reversed(run.layers):
        total = torch.zeros_like(row.values)
        for group in groups:
            rows = score(layer if size >= batch else layer.examples(group))
            own = row.values[group]
            for block in blocks(own.shape, run.heads) if top is None else [top[group]]:
                total[group] += torch.bmm(take(own, block)[:, None], rows(block))[:, 0]
        row = Scaled.of(total, row.exponent)
        top = None
        yield row


def blocks(shape: Sequence[int], heads: int) -> Iterator[Receivers]:
    """All receivers of a (batch, tokens) run, in blocks of bounded size."""
    batch, tokens = shape
    size = max(1, _HELD // (batch * heads * tokens))
    for first in range(0, tokens, size):
        yield slice(first, min(first + size, tokens))


@dataclass(frozen=True)
class Decomposition:
    """The local scores of every layer, and what follows from them.

    Args:
        local (Tensor): (batch, layers, receivers, sources), bottom layer first, in
            float32 or float64. Rows and columns of padding are 0.
        attended (Tensor): (batch, tokens), False at padding.
        name (str): which local score.
    """

    local: Tensor
    attended: Tensor
    name: str

    def rollout(self, stop: int | None = None) -> Tensor:
        """:math:`R^{stop}`: what each token of a layer's output takes from each input.

        Args:
            stop (int, optional): up to this layer, 1 to the number of layers. Default:
                all layers.

        Returns:
            *Tensor* of shape (batch, receivers, sources), of the dtype of ``local``.
            Numbers of an example too
            large or small for the dtype are scaled together, which keeps their ratios.

        Raises:
            ValueError: there is no such layer.
        """
        layers = self.local.shape[1]
        if stop is None:
            stop = layers
        if (
            isinstance(stop, bool)
            or not isinstance(stop, int)
            or not 1 <= stop <= layers
        ):
            raise ValueError(f"stop must be 1 to {layers} (layers), got {stop!r}.")
        product = Scaled.of(self.local[:, 0])
        for layer in range(1, stop):
            values = Scaled.of(self.local[:, layer])
            product = Scaled.of(
                values.values @ product.values, values.exponent + product.exponent
            )
        return product.to(self.local.dtype)


def _times_power(values: Tensor, power: Tensor) -> Tensor:
    """``values * 2**power``, a power per example; exact within the dtype's range."""
    power = power.reshape(-1, *[1] * (values.ndim - 1))
    # In two steps: 2**power alone may be out of range where the product is not.
    half = power.div(2, rounding_mode="floor")
    return torch.ldexp(torch.ldexp(values, half), power - half)
