r"""Rollout of the local scores over the layers.

:math:`R^1 = n^1`, :math:`R^l = n^l R^{l-1}` (Abnar & Zuidema 2020, as in Modarressi et
al. 2022): no row is normalised and no residual added, because the residual is inside
:math:`n`. Products of many unnormalised layers leave the range of the floating-point
numbers, so each example carries a power of two beside its values; scaling by it is
exact, and scores keep their ratios.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from captum_globenc.contributions.contribution import Contribution
from captum_globenc.errors import is_whole
from captum_globenc.recording.records import Readout, Receivers, take
from captum_globenc.recording.run import EncoderRun

# Attention weights held at once: 8 MB in float32, whatever the batch and the length.
_HELD = 2**21


class ScaledTensor(NamedTuple):
    """``values * 2**exponent``, an exponent per example.

    Args:
        values (Tensor): (batch, ...), the largest size of each example in [0.5, 1).
        exponent (Tensor): (batch), integers.
    """

    values: Tensor
    exponent: Tensor

    @classmethod
    def of(cls, values: Tensor, exponent: Tensor | None = None) -> ScaledTensor:
        """Scale each example's largest value into [0.5, 1); zeros stay."""
        _, power = torch.frexp(values.flatten(1).abs().amax(1))
        if exponent is None:
            exponent = torch.zeros_like(power)
        return cls(_times_power(values, -power), exponent + power)

    def plus(self, other: Tensor) -> ScaledTensor:
        """The sum with a tensor that is not scaled."""
        exponent = torch.maximum(self.exponent, torch.zeros_like(self.exponent))
        total = _times_power(self.values, self.exponent - exponent)
        return ScaledTensor.of(total + _times_power(other, -exponent), exponent)

    def to(self, dtype: torch.dtype) -> Tensor:
        """The numbers themselves.

        An example whose largest number the dtype cannot hold is scaled, as a whole, to
        one that it can: the ratios of its numbers are kept, their unit is lost.
        """
        limits = torch.finfo(dtype)
        most = torch.tensor(limits.max, dtype=torch.float64).frexp().exponent
        least = torch.tensor(limits.smallest_normal, dtype=torch.float64)
        power = self.exponent.clamp(int(least.frexp().exponent), int(most) - 1)
        return _times_power(self.values, power).to(dtype)


def sweep(
    run: EncoderRun, contribution: Contribution, readout: Readout
) -> Iterator[ScaledTensor]:
    """Rows of the rollout without its matrices: ``r ← r n^l`` from the top layer down.

    What the readout takes from the outputs of lower layers is added where the sweep
    gets there.

    Args:
        run (EncoderRun): the layers.
        contribution (Contribution): of one layer.
        readout (Readout): the seed, what is read of the hidden states.

    Yields:
        *ScaledTensor* values of shape (batch, tokens): the seed of the highest layer's
        output that is read, as a rule the last one's; then what is taken from each
        token of this layer's input, of the next lower one's, and so on. The last are
        the scores of the encoder's input.
    """
    top = max(readout.weights)
    seed, receivers = readout.weights[top], readout.receivers
    batch, tokens = seed.shape
    size = max(1, batch if contribution.replays else _HELD // (run.heads * tokens**2))
    groups = [slice(first, first + size) for first in range(0, batch, size)]
    row = ScaledTensor.of(seed)
    yield row
    # Layers outside and groups inside: a layer's weights are then fetched once.
    for index, layer in reversed(list(enumerate(run.layers[:top]))):
        total = torch.zeros_like(row.values)
        for group in groups:
            rows = contribution.rows(layer if size >= batch else layer.examples(group))
            own = row.values[group]
            parts = (
                blocks(own.shape, run.heads)
                if receivers is None
                else [receivers[group]]
            )
            for block in parts:
                total[group] += torch.bmm(take(own, block)[:, None], rows(block))[:, 0]
        row = ScaledTensor.of(total, row.exponent)
        if index in readout.weights:
            row = row.plus(readout.weights[index])
        receivers = None
        yield row


def decompose(run: EncoderRun, contribution: Contribution) -> Decomposition:
    """The contributions of all layers as whole matrices.

    Args:
        run (EncoderRun): the layers.
        contribution (Contribution): of one layer.
    """
    batch, tokens = run.shape
    local = torch.zeros(
        (batch, len(run.layers), tokens, tokens),
        dtype=run.dtype,
        device=run.token_mask.device,
    )
    for index, layer in enumerate(run.layers):
        rows = contribution.rows(layer)
        for block in blocks(run.shape, run.heads):
            local[:, index, block] = rows(block)
    pairs = run.token_mask[:, :, None] & run.token_mask[:, None, :]
    local.masked_fill_(~pairs[:, None], 0)
    return Decomposition(local, run.token_mask, contribution.name)


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
        token_mask (Tensor): (batch, tokens), False at padding.
        name (str): which local score.
    """

    local: Tensor
    token_mask: Tensor
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
        if not is_whole(stop) or not 1 <= stop <= layers:
            raise ValueError(f"stop must be 1 to {layers} (layers), got {stop!r}.")
        *_, product = itertools.islice(self._products(), stop)
        return product.to(self.local.dtype)

    def rollouts(self) -> Tensor:
        """The rollouts up to every layer, in one pass.

        Returns:
            *Tensor* of shape (batch, layers, receivers, sources): ``rollout(stop)`` at
            position ``stop - 1``.
        """
        products = (product.to(self.local.dtype) for product in self._products())
        return torch.stack(list(products), 1)

    def _products(self) -> Iterator[ScaledTensor]:
        product = ScaledTensor.of(self.local[:, 0])
        yield product
        for layer in range(1, self.local.shape[1]):
            values = ScaledTensor.of(self.local[:, layer])
            product = ScaledTensor.of(
                values.values @ product.values, values.exponent + product.exponent
            )
            yield product


def _times_power(values: Tensor, power: Tensor) -> Tensor:
    """``values * 2**power``, a power per example; exact within the dtype's range."""
    power = power.reshape(-1, *[1] * (values.ndim - 1))
    # In two steps: 2**power alone may be out of range where the product is not.
    half = power.div(2, rounding_mode="floor")
    return torch.ldexp(torch.ldexp(values, half), power - half)
