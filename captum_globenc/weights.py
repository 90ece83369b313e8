"""The weights that decompose a layer, prepared once and dropped when they change."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def centre(vectors: Tensor) -> Tensor:
    """``v - mean_d(v)`` over the last dimension."""
    return vectors - vectors.mean(-1, keepdim=True)


def through_norms(vectors: Tensor, gammas: Sequence[Tensor | None]) -> Tensor:
    r"""The linear part of consecutive LayerNorms, without their scales and biases.

    :math:`M v = \gamma_k \odot C(\dots \gamma_1 \odot C(v))`, :math:`C` the centring;
    with no norm, ``v`` itself. Source: equations 6 to 9 of Modarressi et al. 2022.

    Args:
        vectors (Tensor): any shape with the hidden size last.
        gammas (sequence of Tensor or None): weights of the norms, each (hidden), first
            applied first; None where no norm is.

    Returns:
        *Tensor* of the shape of ``vectors``.
    """
    for gamma in gammas:
        if gamma is not None:
            vectors = centre(vectors) * gamma
    return vectors


class LayerWeights:
    r"""Output map and LayerNorm weights of one layer, in the working dtype.

    Args:
        output (nn.Linear): :math:`W_O, b_O`, the linear map after the heads.
        norms (sequence of nn.LayerNorm or None): the norm after each residual, in
            order; None where there is none.

    Attributes:
        output (Tensor): :math:`W_O`, (hidden, heads × head size).
        gammas (tuple[Tensor or None, ...]): weight of each norm, (hidden).
        probe (Tensor): a fixed random direction :math:`p`, (hidden); see
            :mod:`captum_globenc.reconstruction`.
        output_probe (Tensor): :math:`W_O^\top p`, (heads × head size).
        output_offset (Tensor): :math:`\langle p, b_O \rangle`, a scalar.
    """

    def __init__(self, output: nn.Linear, norms: Sequence[nn.LayerNorm | None]) -> None:
        self._stamp = _stamp(output, norms)
        self._values = _fingerprint(output, norms)
        # Held so that no other tensor can take over the addresses in the stamp.
        self._held = output.weight.detach()
        dtype = working_dtype(output.weight.dtype)
        hidden = output.weight.new_ones(output.out_features, dtype=dtype)
        self.output = self._held.to(dtype)
        # Copies: the linear maps folded below must not change under their key.
        self.gammas = tuple(
            None if norm is None else _value(norm.weight, hidden).clone()
            for norm in norms
        )
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
        self.probe = probe.to(hidden)
        self.output_probe = self.output.T @ self.probe
        self.output_offset = _value(output.bias, 0 * hidden) @ self.probe
        # On C(γ ⊙ p) a vector has the projection that γ ⊙ C(v) has on p.
        self._directions = [
            None if gamma is None else centre(self.probe * gamma)
            for gamma in self.gammas
        ]
        self._offsets = [
            None if norm is None else _value(norm.bias, 0 * hidden) @ self.probe
            for norm in norms
        ]
        self._grams: dict[int, Tensor] = {}

    def gram(self, norms: int, heads: int) -> Tensor:
        r""":math:`K = (M W_O)^\top M W_O`, with the norms of ``norms`` residuals in M.

        Two head values :math:`v, v'` of one token have
        :math:`\langle M W_O^h v, M W_O^{h'} v' \rangle = v^\top K^{hh'} v'`: the
        vectors of the hidden size are never made. For a quadratic form over heads half
        of K is enough, so its blocks are folded onto the upper triangle.

        Args:
            norms (int): how many of the residuals, with their norms, follow.
            heads (int): the number of heads.

        Returns:
            *Tensor* of shape (heads × head size, heads × head size): the blocks
            :math:`h = h'` as they are, those of :math:`h < h'` doubled, the rest zero.
        """
        if norms not in self._grams:
            mapped = through_norms(self.output.T, self.gammas[:norms])
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

    def is_current(
        self, output: nn.Linear, norms: Sequence[nn.LayerNorm | None]
    ) -> bool:
        """Whether the modules still hold the weights that this was made from.

        An edit through ``weight.data`` bumps no version, so values are compared, too.
        """
        return self._stamp == _stamp(output, norms) and all(
            torch.equal(old, new)
            for old, new in zip(self._values, _fingerprint(output, norms))
        )


class WeightCache:
    """The prepared weights of one model's layers, made anew where they changed."""

    def __init__(self) -> None:
        self._entries: dict[str, LayerWeights] = {}

    def get(
        self, name: str, output: nn.Linear, norms: Sequence[nn.LayerNorm | None]
    ) -> LayerWeights:
        """The weights of the layer called ``name``."""
        entry = self._entries.get(name)
        if entry is None or not entry.is_current(output, norms):
            entry = self._entries[name] = LayerWeights(output, norms)
        return entry


def _value(parameter: Tensor | None, default: Tensor) -> Tensor:
    return default if parameter is None else parameter.detach().to(default.dtype)


def _parameters(
    output: nn.Linear, norms: Sequence[nn.LayerNorm | None]
) -> list[Tensor]:
    tensors = [output.weight, output.bias]
    for norm in norms:
        if norm is not None:
            tensors += [norm.weight, norm.bias]
    return [tensor for tensor in tensors if tensor is not None]


def _stamp(output: nn.Linear, norms: Sequence[nn.LayerNorm | None]) -> Hashable:
    """What changes when torch knows of an edit; inference tensors have no version."""
    return tuple(
        (t.data_ptr(), None if t.is_inference() else t._version, t.dtype, t.device)
        for t in _parameters(output, norms)
    )


def _fingerprint(
    output: nn.Linear, norms: Sequence[nn.LayerNorm | None]
) -> list[Tensor]:
    """The vectors among the parameters, and the matrix times a fixed vector."""
    weight, *vectors = (t.detach() for t in _parameters(output, norms))
    direction = torch.linspace(-1, 1, weight.shape[1], dtype=torch.float64).sin()
    return [weight @ direction.to(weight), *(vector.clone() for vector in vectors)]
