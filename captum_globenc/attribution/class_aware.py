"""Rollout of a local score, whatever the class or for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from captum_globenc._captum import TargetType
from captum_globenc.attribution.arguments import TokenIndex, readout_at, shown
from captum_globenc.attribution.base import RolloutAttribution
from captum_globenc.contributions.norm_scores import local_score
from captum_globenc.contributions.projection import projected
from captum_globenc.contributions.rollout import ScaledTensor, blocks, sweep
from captum_globenc.deferred import check_later, holds
from captum_globenc.errors import InputError
from captum_globenc.recording.readout import ReadoutKind, check_padding
from captum_globenc.recording.records import Readout, take
from captum_globenc.recording.run import EncoderRun


class LocalScoreRollout(RolloutAttribution):
    r"""Base of the methods that roll up a local score.

    Class-aware, the top layer's vectors are projected on the gradient of the selected
    output, and their sums take the place of the top layer in the sweep:

    .. math::
        r_j = \sum_i \langle \partial y / \partial x^L_i, g_{ij} \rangle .

    Args:
        forward_func (Callable): as for :class:`~captum_globenc.GlobEnc`, like all.
        encoder (nn.Module, optional): default: the one found in ``forward_func``.
        local (str, optional): default: ``"N_ENC"``.
        normalize (bool, optional): default: False.
        readout (str, optional): default: ``"gradient"``.
        class_aware (bool, optional): default: False.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        encoder: nn.Module | None = None,
        local: str = "N_ENC",
        normalize: bool = False,
        readout: ReadoutKind = "gradient",
        class_aware: bool = False,
    ) -> None:
        super().__init__(
            forward_func,
            local_score(local),
            encoder=encoder,
            normalize=normalize,
            readout=readout,
        )
        if class_aware and local != "N_ENC":
            raise InputError(
                "class_aware projects the vectors of the whole layer, whose length is "
                f'N_ENC, so it needs local="N_ENC", got {local!r}.'
            )
        if class_aware and readout != "gradient":
            raise InputError(
                "class_aware reads the head by the gradient of the selected output, so "
                f'it needs readout="gradient", got {readout!r}.'
            )
        self.class_aware = class_aware

    @property
    def local(self) -> str:
        """The name of the local score."""
        return self.contribution.name

    def _needs_gradient(self, token_index: TokenIndex) -> bool:
        return self.class_aware or super()._needs_gradient(token_index)

    def _rows(
        self, run: EncoderRun, target: TargetType, token_index: TokenIndex
    ) -> Iterator[ScaledTensor]:
        if not self.class_aware:
            yield from super()._rows(run, target, token_index)
            return
        gradient = _read_gradient(run, target, token_index)
        last = len(run.layers)
        final = run.final.detach().to(run.dtype)
        own = (gradient * final).sum(-1).masked_fill(~run.token_mask, 0)
        yield ScaledTensor.of(own)
        seed = Readout({last - 1: _top_layer(run, gradient)}, None)
        yield from sweep(run, self.contribution, seed)


def _read_gradient(
    run: EncoderRun, target: TargetType, token_index: TokenIndex
) -> Tensor:
    """The gradient at the tokens that are read, (batch, tokens, hidden)."""
    gradient = run.gradient(target).to(run.dtype)
    if token_index is None:
        check_padding(gradient.norm(dim=-1), run.token_mask)
        return gradient
    weights = readout_at(token_index, run).weights[len(run.layers)]
    gradient = gradient * weights[..., None]

    def judge(are_read: list[float]) -> None:
        if not all(are_read):
            raise InputError(
                f"the selected output of example {are_read.index(0)} does not depend "
                f"on what token_index names, {shown(token_index)}: class-aware scores "
                "are those of tokens that the head reads. Leave token_index out to "
                "explain these."
            )

    check_later(gradient.flatten(1).any(1), judge)
    return gradient


def _top_layer(run: EncoderRun, gradient: Tensor) -> Tensor:
    """r_j, (batch, tokens): what the output takes from the top layer's input."""
    layer = run.layers[-1]
    is_read = gradient.any(-1)
    if holds("one token has a gradient", is_read.sum(-1) == 1):
        # Of one token each, few rows of the attention do.
        receivers = is_read.int().argmax(-1, keepdim=True)
        return projected(layer, receivers, take(gradient, receivers))
    total = gradient.new_zeros(run.shape)
    batch, tokens = run.shape
    for block in blocks(slice(0, tokens), batch * run.heads * tokens):
        total += projected(layer, block, take(gradient, block))
    return total
