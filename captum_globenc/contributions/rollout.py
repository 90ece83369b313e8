r"""Rollout of the local scores over the layers.

:math:`R^1 = n^1`, :math:`R^l = n^l R^{l-1}` (Abnar & Zuidema 2020, as in Modarressi et
al. 2022): no row is normalised and no residual added, because the residual is inside
:math:`n`. Products of many unnormalised layers leave the range of the floating-point
numbers, so each example carries a power of two beside its values; scaling by it is
exact, and scores keep their ratios.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from captum_globenc.contributions.contribution import Contribution
from captum_globenc.errors import is_whole
from captum_globenc.recording.grouping import grouped, most_at_once
from captum_globenc.recording.records import (
    LayerRecord,
    Readout,
    joins_stack,
    stacked,
    take,
)
from captum_globenc.recording.run import EncoderRun
from captum_globenc.recording.windows import Window, windows

# Attention weights held at once: 16 MB in float32, whatever the batch and the length.
_HELD = 2**22
# Receivers at once: as many as keep the processor busy, and few enough for its cache.
_BLOCK = 128


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
        over = tuple(range(1, values.ndim))
        _, power = torch.frexp(torch.linalg.vector_norm(values, torch.inf, over))
        scaled = _times_power(values, -power)
        return cls(scaled, power if exponent is None else exponent + power)

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
        (_, least), (_, most) = map(math.frexp, (limits.smallest_normal, limits.max))
        power = self.exponent.clamp(least, most - 1)
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
    row = ScaledTensor.of(readout.weights[top])
    yield row
    index = top
    for step in _steps(run, contribution, readout):
        for below in step(row):
            index -= 1
            is_read = index in readout.weights
            row = below.plus(readout.weights[index]) if is_read else below
            yield row


def _steps(
    run: EncoderRun, contribution: Contribution, readout: Readout
) -> Iterator[Callable[[ScaledTensor], Sequence[ScaledTensor]]]:
    """``r → r n^l, r n^l n^{l-1}, …`` of one layer or several, from the top down.

    Layers that are small are taken together, the highest one with all its rows.
    """
    top = max(readout.weights)
    layers, last, narrow = run.layers[:top], top, _narrow(contribution)
    for group in reversed(list(_groups(run, contribution, layers))):
        first = last - len(group)
        if len(group) == 1:
            of = (contribution, group[0])
            # Of the highest layer only the rows that are read count.
            if last == top and readout.receivers is not None:
                times = functools.partial(_times_rows, *of, readout.receivers)
            else:
                times = functools.partial(_times_layer, *of, narrow(group[0]))
            yield functools.partial(_one_step, times)
        else:
            most, dtype = _in_a_row(run)
            matrices = _matrices(run, contribution, group).to(dtype).unbind()[::-1]
            # What is read of a layer's output is added before the sweep goes on.
            stops = {last - index for index in readout.weights if first < index < last}
            for start, stop in _pieces(len(group), stops, most):
                yield functools.partial(_steps_in_a_row, matrices[start:stop])
        last = first


def _pieces(length: int, stops: set[int], most: int) -> Iterator[tuple[int, int]]:
    """From 0 to ``length``, in pieces of at most ``most`` that end at every stop."""
    start = 0
    for stop in sorted({*stops, length}):
        while start < stop:
            end = min(start + most, stop)
            yield start, end
            start = end


def _in_a_row(run: EncoderRun) -> tuple[int, torch.dtype]:
    """How many matrices may be multiplied before the result is scaled, and in what.

    Seven numbers of float32, whatever they are, have a product within the range of
    float64.
    """
    has_float64 = run.final.device.type != "mps"
    if run.dtype == torch.float32 and has_float64:
        return 7, torch.float64
    return 1, run.dtype


def _one_step(
    times: Callable[[Tensor], Tensor], row: ScaledTensor
) -> list[ScaledTensor]:
    return [ScaledTensor.of(times(row.values), row.exponent)]


def _steps_in_a_row(
    matrices: Sequence[Tensor], row: ScaledTensor
) -> list[ScaledTensor]:
    """The row times the first matrix, times the first two, and so on.

    Args:
        matrices (sequence of Tensor): (batch, receivers, sources), the highest layer's
            first.
        row (ScaledTensor): (batch, receivers).
    """
    products, product = [], row.values[:, None].to(matrices[0].dtype)
    for matrix in matrices:
        product = torch.bmm(product, matrix)
        products.append(product)
    scaled = ScaledTensor.of(torch.cat(products)[:, 0])
    values = scaled.values.to(row.values.dtype).unflatten(0, (len(matrices), -1))
    exponents = scaled.exponent.unflatten(0, (len(matrices), -1)) + row.exponent
    return list(map(ScaledTensor, values.unbind(), exponents.unbind()))


def _times_layer(
    contribution: Contribution,
    layer: LayerRecord,
    narrow: Sequence[Window],
    row: Tensor,
) -> Tensor:
    """``r n^l``, (batch, tokens), in blocks of examples and of receivers."""
    batch, tokens = row.shape
    most = _HELD // (layer.heads * tokens**2)
    size = batch if contribution.replays else max(1, most)
    result = torch.zeros_like(row)
    for first in range(0, batch, size):
        examples = slice(first, first + size)
        part = layer if size >= batch else layer.examples(examples)
        for receivers, sources, values in _values(contribution, part, narrow):
            taken = torch.bmm(row[examples, None, receivers], values)
            result[examples, sources] += taken[:, 0]
    return result


def _times_rows(
    contribution: Contribution, layer: LayerRecord, receivers: Tensor, row: Tensor
) -> Tensor:
    """Likewise, where only these receivers, (batch, n), count."""
    values = contribution.rows(layer)(receivers)
    return torch.bmm(take(row, receivers)[:, None], values)[:, 0]


def _values(
    contribution: Contribution, layer: LayerRecord, narrow: Sequence[Window]
) -> Iterator[tuple[slice, slice, Tensor]]:
    """A layer's n^l in blocks: receivers, sources, and the values of their pairs.

    Args:
        contribution (Contribution): of one layer.
        layer (LayerRecord): the layer.
        narrow (sequence of Window): all receivers, and the sources that these can see;
            what they take from others is 0, and left out.
    """
    batch = len(layer.token_mask)
    for window in narrow:
        first, stop = window.sources.start, window.sources.stop
        part = layer if len(narrow) == 1 else layer.narrowed(window.sources)
        rows = contribution.rows(part)
        for block in blocks(window.inside, batch * layer.heads * (stop - first)):
            receivers = slice(block.start + first, block.stop + first)
            yield receivers, window.sources, rows(block)


def _narrow(contribution: Contribution) -> Callable[[LayerRecord], list[Window]]:
    """A layer → blocks of its receivers; layers with one mask share the search."""
    search = functools.cache(windows)

    def narrow(layer: LayerRecord) -> list[Window]:
        mask = layer.call.mask if contribution.narrows else None
        return search(mask, layer.token_mask.shape[1])

    return narrow


def _groups(
    run: EncoderRun, contribution: Contribution, layers: Sequence[LayerRecord]
) -> Iterator[list[LayerRecord]]:
    """Layers in turn whose contributions are made together, where they are small."""
    batch, tokens = run.shape
    weights = batch * run.heads * tokens**2
    most = min(most_at_once(max(weights, run.final.numel())), _HELD // weights)
    most = most if contribution.stacks else 1
    return grouped(layers, lambda group, x: len(group) < most and joins_stack(group, x))


def _matrices(
    run: EncoderRun, contribution: Contribution, group: Sequence[LayerRecord]
) -> Tensor:
    """The whole n^l of layers that are small, (layers, batch, receivers, sources)."""
    values = contribution.rows(stacked(group))(slice(0, run.shape[1]))
    return values.reshape(len(group), *run.shape, -1)


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
    narrow, index = _narrow(contribution), 0
    for group in _groups(run, contribution, run.layers):
        layer, layers = stacked(group), slice(index, index + len(group))
        for receivers, sources, values in _values(contribution, layer, narrow(layer)):
            by_layer = values.unflatten(0, (len(group), batch)).transpose(0, 1)
            local[:, layers, receivers, sources] = by_layer
        index = layers.stop
    pairs = run.token_mask[:, :, None] & run.token_mask[:, None, :]
    local.masked_fill_(~pairs[:, None], 0)
    return Decomposition(local, run.token_mask, contribution.name)


def blocks(receivers: slice, pairs: int) -> Iterator[slice]:
    """Receivers in blocks of bounded size.

    Args:
        receivers (slice): from the first to the last.
        pairs (int): how many attention weights each has.
    """
    most = max(1, min(_BLOCK, _HELD // pairs))
    size = 2 ** (most.bit_length() - 1)  # Even blocks, of whole vector registers.
    for first in range(receivers.start, receivers.stop, size):
        yield slice(first, min(first + size, receivers.stop))


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
