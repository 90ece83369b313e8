"""The weights that decompose layers, prepared once and dropped when they change."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from captum_globenc.deferred import holds
from captum_globenc.encoders.parts import (
    LayerParts,
    Norm,
    image_of_fixed_vector,
    linear_map,
)

#: Random directions in which what a layer computes is compared with its parts.
PROBES = 8


@functools.cache
def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def through_norms(vectors: Tensor, norms: Iterable[Norm]) -> Tensor:
    r"""The linear part of consecutive norms, without their deviations and biases.

    :math:`M v = \gamma_k \odot C(\dots \gamma_1 \odot C(v))`, :math:`C` the centring,
    which an RMSNorm leaves out; with no norm, ``v`` itself. Source: equations 6 to 9 of
    Modarressi et al. 2022.

    Args:
        vectors (Tensor): any shape with the hidden size last.
        norms (iterable of Norm): first applied first.

    Returns:
        *Tensor* of the shape of ``vectors``.
    """
    for norm in norms:
        vectors = norm.linear(vectors)
    return vectors


@functools.lru_cache(maxsize=64)
def random_signs(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Fixed random directions of entries 1 and -1, (rows, columns)."""
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(0)
        signs = (
            torch.randint(0, 2, (rows, columns), generator=generator, device="cpu") * 2
            - 1
        )
        return signs.to(device, dtype)


class _Part(NamedTuple):
    """Which layers of a stack: one (layers 0), some in turn, or one several times."""

    first: int
    layers: int = 0
    is_repeated: bool = False

    def of(self, matrices: Tensor) -> Tensor:
        """A view of (layers, rows, columns); of one layer without the layers."""
        if not self.layers:
            return matrices[self.first]
        if self.is_repeated:
            return matrices[self.first, None].expand(self.layers, -1, -1)
        return matrices[self.first : self.first + self.layers]

    def of_vectors(self, vectors: Tensor) -> Tensor:
        """Likewise of (layers, 1, size); of one layer (size)."""
        part = self.of(vectors)
        return part if self.layers else part[0]


class LayerWeights:
    r"""Output map and norms of one layer, in the working dtype.

    Those of several layers of one layout are stacked: every tensor but ``probes`` then
    has the layers in front, (layers, rows, columns), and vectors are (layers, 1, size).
    Those of one of the layers, or of some, are views of the stack.

    Args:
        output (Tensor): of a stack; see below, as for the others.
        output_bias (Tensor): likewise.
        norms (dict[str, Norm]): likewise.

    Attributes:
        output (Tensor): :math:`W_O`, (hidden, heads × head size), multiplied by the
            layer scale where there is one.
        output_bias (Tensor): :math:`b_O`, (hidden), likewise.
        norms (dict[str, Norm]): the norms after the residuals, by their names in
            :class:`~captum_globenc.Architecture`, in the order of their application.
        probes (Tensor): fixed random directions, (hidden, probes); see
            :mod:`captum_globenc.recording.verification`.
        output_probes (Tensor): :math:`W_O^\top p`, (heads × head size, probes).
        output_offset (Tensor): :math:`\langle p, b_O \rangle`, (probes).
        directions (dict[str, Tensor]): norm → the vectors on which its input has the
            projections that its output, times the deviation, has on the probes,
            (hidden, probes).
        norm_offsets (dict[str, Tensor]): norm → the projections of its bias, (probes).
    """

    def __init__(
        self, output: Tensor, output_bias: Tensor, norms: dict[str, Norm]
    ) -> None:
        self.output, self.output_bias, self.norms = output, output_bias, norms
        hidden = output.shape[1]
        self.probes = random_signs(hidden, PROBES, output.dtype, output.device)
        self.output_probes = output.mT @ self.probes
        self.output_offset = output_bias @ self.probes
        self.directions = {
            name: norm.transposed(self.probes.T).mT for name, norm in norms.items()
        }
        self.norm_offsets = {
            name: norm.beta @ self.probes for name, norm in norms.items()
        }
        self._whole, self._part = self, _Part(0, len(output))
        self._parts: dict[_Part, LayerWeights] = {}
        self._grams: dict[tuple[tuple[str, ...], int], Tensor] = {}

    @property
    def centred(self) -> dict[str, bool]:
        """Norm → whether it takes the mean away."""
        return {name: norm.centred for name, norm in self.norms.items()}

    def layer(self, index: int) -> LayerWeights:
        """The weights of one layer of a stack."""
        return self._view(_Part(index))

    @staticmethod
    def together(layers: Sequence[LayerWeights]) -> LayerWeights | None:
        """The weights of single layers as a stack, without a copy.

        Args:
            layers (sequence of LayerWeights): of a layer each.

        Returns:
            *LayerWeights*, or *None* where the layers are not of one stack, in turn or
            all the same.
        """
        whole, firsts = layers[0]._whole, [layer._part.first for layer in layers]
        if any(layer._whole is not whole for layer in layers):
            return None
        steps = {after - before for before, after in itertools.pairwise(firsts)}
        if steps <= {1} or steps == {0}:
            return whole._view(_Part(firsts[0], len(layers), steps == {0}))
        return None

    def gram(self, norms: tuple[str, ...], heads: int) -> Tensor:
        r""":math:`K = (M W_O)^\top M W_O`, with these norms in M.

        Two head values :math:`v, v'` of one token have
        :math:`\langle M W_O^h v, M W_O^{h'} v' \rangle = v^\top K^{hh'} v'`: the
        vectors of the hidden size are never made. For a quadratic form over heads half
        of K is enough, so its blocks are folded onto the upper triangle.

        Args:
            norms (tuple[str, ...]): names of the norms that follow.
            heads (int): the number of heads.

        Returns:
            *Tensor* of shape (heads × head size, heads × head size): the blocks
            :math:`h = h'` as they are, those of :math:`h < h'` doubled, the rest zero.
        """
        return self._part.of(self._whole._gram(norms, heads))

    def _gram(self, norms: tuple[str, ...], heads: int) -> Tensor:
        """Of all layers of the stack."""
        key = (norms, heads)
        if key not in self._grams:
            mapped = through_norms(self.output.mT, (self.norms[n] for n in norms))
            gram = mapped @ mapped.mT
            size = gram.shape[-1] // heads
            blocks = gram.new_full((heads, heads), 2).triu(1) + torch.eye(heads).to(
                gram
            )
            blocks = blocks.repeat_interleave(size, 0).repeat_interleave(size, 1)
            self._grams[key] = gram.mul_(blocks)
        return self._grams[key]

    def _view(self, part: _Part) -> LayerWeights:
        """Some layers of the stack."""
        if part not in self._parts:
            view = copy.copy(self)
            view._part = part
            for name in ("output", "output_probes"):
                setattr(view, name, part.of(getattr(self, name)))
            for name in ("output_bias", "output_offset"):
                setattr(view, name, part.of_vectors(getattr(self, name)))
            view.norms = {
                name: Norm(part.of_vectors(n.gamma), part.of_vectors(n.beta), n.centred)
                for name, n in self.norms.items()
            }
            view.directions = {n: part.of(t) for n, t in self.directions.items()}
            view.norm_offsets = {
                name: part.of_vectors(offset)
                for name, offset in self.norm_offsets.items()
            }
            self._parts[part] = view
        return self._parts[part]


class WeightCache:
    """The prepared weights of one model's layers, made anew where they changed."""

    def __init__(self) -> None:
        self._entry: _Prepared | None = None

    def get(
        self, layers: Sequence[LayerParts], indices: Sequence[int]
    ) -> list[LayerWeights]:
        """The weights of some layers, one by one.

        Args:
            layers (sequence of LayerParts): all layers of the encoder.
            indices (sequence of int): which are wanted.
        """
        entry = self._entry
        if entry is None or not entry.is_current(layers, indices):
            entry = self._entry = _Prepared(layers)
        return [entry.weights[index] for index in indices]


class _Prepared:
    """The weights of all layers, and what tells whether they have changed."""

    def __init__(self, layers: Sequence[LayerParts]) -> None:
        self._stamps = [_stamp(parts) for parts in layers]
        self._fingerprints = [torch.cat(_fingerprint(parts)) for parts in layers]
        # Held so that no other tensor can take over the addresses in the stamps.
        self._held = [t.detach() for parts in layers for t in parts.tensors()]
        maps = [_Map.of(parts) for parts in layers]
        self.weights = [
            weights.layer(index)
            for _, group in itertools.groupby(maps, key=_Map.layout)
            for same in [list(group)]
            for weights in [_stacked(same)]
            for index in range(len(same))
        ]

    def is_current(self, layers: Sequence[LayerParts], indices: Sequence[int]) -> bool:
        """Whether the modules still hold the weights that this was made from.

        An edit through ``weight.data`` bumps no version, so values are compared, too.
        """
        if len(layers) != len(self._stamps):
            return False
        if any(self._stamps[index] != _stamp(layers[index]) for index in indices):
            return False
        now = torch.cat([v for index in indices for v in _fingerprint(layers[index])])
        then = torch.cat([self._fingerprints[index] for index in indices])
        return then.shape == now.shape and holds("unchanged weights", then == now)


class _Map(NamedTuple):
    """The output map and the norms of one layer, as :class:`LayerWeights` has them."""

    output: Tensor
    bias: Tensor
    norms: dict[str, Norm]

    @classmethod
    def of(cls, parts: LayerParts) -> _Map:
        """Copies: what is kept must not change with the model."""
        weight, bias = linear_map(parts.output)
        output = weight.to(working_dtype(weight.dtype), copy=True)
        zeros = output.new_zeros(len(output))
        offset = zeros if bias is None else bias.to(zeros, copy=True)
        if parts.layer_scale is not None:
            scale = parts.layer_scale.detach().to(zeros)
            output, offset = scale[:, None] * output, scale * offset
        norms = {name: Norm.of(module, zeros) for name, module in parts.norms.items()}
        return cls(output, offset, norms)

    def layout(self) -> Hashable:
        """What layers must have in common to be stacked."""
        norms = ((name, norm.centred) for name, norm in self.norms.items())
        return (self.output.shape, self.output.dtype, self.output.device, *norms)


def _stacked(layers: Sequence[_Map]) -> LayerWeights:
    """The weights of layers of one layout."""

    def vectors(of: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(of))[:, None]

    norms = {
        name: Norm(
            vectors([layer.norms[name].gamma for layer in layers]),
            vectors([layer.norms[name].beta for layer in layers]),
            norm.centred,
        )
        for name, norm in layers[0].norms.items()
    }
    output = torch.stack([layer.output for layer in layers])
    return LayerWeights(output, vectors([layer.bias for layer in layers]), norms)


def _stamp(parts: LayerParts) -> Hashable:
    """What changes when torch knows of an edit; inference tensors have no version."""
    return tuple(
        (t.data_ptr(), None if t.is_inference() else t._version, t.dtype, t.device)
        for t in parts.tensors()
    )


def _fingerprint(parts: LayerParts) -> list[Tensor]:
    """What the output map makes of a fixed vector, and all weights that are vectors."""
    vectors = [tensor for tensor in parts.tensors() if tensor.ndim == 1]
    return [image_of_fixed_vector(parts.output), *vectors]
