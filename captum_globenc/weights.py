"""The weights that decompose a layer, prepared once and dropped when they change."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from captum_globenc.parts import (
    LayerParts,
    Norm,
    image_of_fixed_vector,
    linear_map,
)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def through_norms(vectors: Tensor, norms: Sequence[Norm | None]) -> Tensor:
    r"""The linear part of consecutive norms, without their scales and biases.

    :math:`M v = \gamma_k \odot C(\dots \gamma_1 \odot C(v))`, :math:`C` the centring,
    which an RMSNorm leaves out; with no norm, ``v`` itself. Source: equations 6 to 9 of
    Modarressi et al. 2022.

    Args:
        vectors (Tensor): any shape with the hidden size last.
        norms (sequence of Norm or None): first applied first; None where no norm is.

    Returns:
        *Tensor* of the shape of ``vectors``.
    """
    for norm in norms:
        if norm is not None:
            vectors = norm.linear(vectors)
    return vectors


class LayerWeights:
    r"""Output map and norms of one layer, in the working dtype.

    Args:
        parts (LayerParts): the modules.

    Attributes:
        output (Tensor): :math:`W_O`, (hidden, heads × head size), scaled where the
            attention branch is.
        norms (tuple[Norm or None, ...]): the norm after the first residual, then those
            after the second.
        probe (Tensor): a fixed random direction :math:`p`, (hidden); see
            :mod:`captum_globenc.reconstruction`.
        output_probe (Tensor): :math:`W_O^\top p`, (heads × head size).
        output_offset (Tensor): :math:`\langle p, b_O \rangle`, a scalar.
    """

    def __init__(self, parts: LayerParts) -> None:
        self._stamp = _stamp(parts)
        self._values = _fingerprint(parts)
        # Held so that no other tensor can take over the addresses in the stamp.
        self._held = parts.tensors()
        weight, bias = linear_map(parts.output)
        dtype = working_dtype(weight.dtype)
        hidden = weight.new_ones(len(weight), dtype=dtype)
        self.output = weight.to(dtype)
        offset = 0 * hidden if bias is None else bias.to(dtype)
        if parts.scale is not None:
            scale = parts.scale.detach().to(dtype)
            self.output, offset = scale[:, None] * self.output, scale * offset
        # Copies: the linear maps folded below must not change under their key.
        self.norms = tuple(
            None if norm is None else Norm.of(norm, hidden) for norm in parts.norms
        )
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
        self.probe = probe.to(hidden)
        self.output_probe = self.output.T @ self.probe
        self.output_offset = offset @ self.probe
        self._directions = [
            None if norm is None else norm.transposed(self.probe) for norm in self.norms
        ]
        self._offsets = [
            None if norm is None else norm.beta @ self.probe for norm in self.norms
        ]
        self._grams: dict[int | None, Tensor] = {}

    def gram(self, norms: int | None, heads: int) -> Tensor:
        r""":math:`K = (M W_O)^\top M W_O`, with the first ``norms`` norms in M.

        Two head values :math:`v, v'` of one token have
        :math:`\langle M W_O^h v, M W_O^{h'} v' \rangle = v^\top K^{hh'} v'`: the
        vectors of the hidden size are never made. For a quadratic form over heads half
        of K is enough, so its blocks are folded onto the upper triangle.

        Args:
            norms (int or None): how many of the norms follow; None: all.
            heads (int): the number of heads.

        Returns:
            *Tensor* of shape (heads × head size, heads × head size): the blocks
            :math:`h = h'` as they are, those of :math:`h < h'` doubled, the rest zero.
        """
        if norms not in self._grams:
            mapped = through_norms(self.output.T, self.norms[:norms])
            gram = mapped @ mapped.T
            size = len(gram) // heads
            blocks = gram.new_full((heads, heads), 2).triu(1) + torch.eye(heads).to(
                gram
            )
            self._grams[norms] = gram * blocks.repeat_interleave(
                size, 0
            ).repeat_interleave(size, 1)
        return self._grams[norms]

    def normed(self, norm: int, vectors: Tensor, scale: Tensor) -> Tensor:
        r"""The projection on :math:`p` of what a norm makes of its inputs.

        Args:
            norm (int): which of the norms.
            vectors (Tensor): its inputs, (..., hidden).
            scale (Tensor): their true standard deviations, (...).

        Returns:
            *Tensor* of shape (...).
        """
        direction, offset = self._directions[norm], self._offsets[norm]
        assert direction is not None
        assert offset is not None
        return vectors.to(direction.dtype) @ direction / scale + offset

    def is_current(self, parts: LayerParts) -> bool:
        """Whether the modules still hold the weights that this was made from.

        An edit through ``weight.data`` bumps no version, so values are compared, too.
        """
        if self._stamp != _stamp(parts):
            return False
        now = _fingerprint(parts)
        return all(torch.equal(old, new) for old, new in zip(self._values, now))


class WeightCache:
    """The prepared weights of one model's layers, made anew where they changed."""

    def __init__(self) -> None:
        self._entries: dict[str, LayerWeights] = {}

    def get(self, name: str, parts: LayerParts) -> LayerWeights:
        """The weights of the layer called ``name``."""
        entry = self._entries.get(name)
        if entry is None or not entry.is_current(parts):
            entry = self._entries[name] = LayerWeights(parts)
        return entry


def _stamp(parts: LayerParts) -> Hashable:
    """What changes when torch knows of an edit; inference tensors have no version."""
    return tuple(
        (t.data_ptr(), None if t.is_inference() else t._version, t.dtype, t.device)
        for t in parts.tensors()
    )


def _fingerprint(parts: LayerParts) -> list[Tensor]:
    """What the output map makes of a fixed vector, and all weights that are vectors."""
    vectors = [tensor.clone() for tensor in parts.tensors() if tensor.ndim == 1]
    return [image_of_fixed_vector(parts.output), *vectors]
