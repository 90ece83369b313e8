"""The weights that decompose a layer, prepared once and dropped when they change."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable

import torch
from torch import Tensor

from captum_globenc.encoders.parts import (
    LayerParts,
    Norm,
    image_of_fixed_vector,
    linear_map,
)

#: Random directions in which what a layer computes is compared with its parts.
PROBES = 8


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


class LayerWeights:
    r"""Output map and norms of one layer, in the working dtype.

    Args:
        parts (LayerParts): the modules.

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
            projections that its output, times the deviation, has on the probes.
        norm_offsets (dict[str, Tensor]): norm → the projections of its bias, (probes).
    """

    def __init__(self, parts: LayerParts) -> None:
        self._stamp = _stamp(parts)
        self._values = [value.clone() for value in _fingerprint(parts)]
        # Held so that no other tensor can take over the addresses in the stamp.
        self._held = parts.tensors()
        weight, bias = linear_map(parts.output)
        dtype = working_dtype(weight.dtype)
        hidden = weight.new_ones(len(weight), dtype=dtype)
        # Copies: what is kept must not change with the model.
        self.output = weight.to(dtype, copy=True)
        offset = 0 * hidden if bias is None else bias.to(dtype, copy=True)
        if parts.layer_scale is not None:
            scale = parts.layer_scale.detach().to(dtype)
            self.output, offset = scale[:, None] * self.output, scale * offset
        self.output_bias = offset
        self.norms = {name: Norm.of(m, hidden) for name, m in parts.norms.items()}
        self.probes = random_signs(len(hidden), PROBES, dtype, hidden.device)
        self.output_probes = self.output.T @ self.probes
        self.output_offset = offset @ self.probes
        self.directions = {
            name: norm.transposed(self.probes.T).T for name, norm in self.norms.items()
        }
        self.norm_offsets = {
            name: norm.beta @ self.probes for name, norm in self.norms.items()
        }
        self._grams: dict[tuple[tuple[str, ...], int], Tensor] = {}

    @property
    def centred(self) -> dict[str, bool]:
        """Norm → whether it takes the mean away."""
        return {name: norm.centred for name, norm in self.norms.items()}

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
        key = (norms, heads)
        if key not in self._grams:
            mapped = through_norms(self.output.T, (self.norms[n] for n in norms))
            gram = mapped @ mapped.T
            size = len(gram) // heads
            blocks = gram.new_full((heads, heads), 2).triu(1) + torch.eye(heads).to(
                gram
            )
            self._grams[key] = gram * blocks.repeat_interleave(
                size, 0
            ).repeat_interleave(size, 1)
        return self._grams[key]

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
    vectors = [tensor for tensor in parts.tensors() if tensor.ndim == 1]
    return [image_of_fixed_vector(parts.output), *vectors]
