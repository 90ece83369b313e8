"""One forward and one backward pass of a model, linearised and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_globenc.errors import UnsupportedModelError
from captum_globenc.linearization.conservation import check_conservation
from captum_globenc.linearization.graph import check_graph
from captum_globenc.linearization.operations import AttentionRule
from captum_globenc.linearization.watching import Found, Place, Watcher, as_own_errors


@dataclass(frozen=True)
class Propagation:
    """What one linearised run leaves behind.

    Args:
        output (Tensor): the selected outputs, (batch).
        values (tuple[Tensor, ...]): what is at the places.
        gradients (tuple[Tensor, ...]): of the output, by the rules, of their shapes.
        is_turned (tuple[bool, ...]): whether a place has (tokens, batch, ...).
    """

    output: Tensor
    values: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    is_turned: tuple[bool, ...]


@torch.inference_mode(False)
@torch.enable_grad()
def propagate(
    forward_func: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    arguments: tuple[Any, ...],
    places: Sequence[Place],
    select: Callable[[Tensor], Tensor],
    rule: AttentionRule,
    points: Tensor | None = None,
    keeps_own_biases: bool = False,
) -> Propagation:
    r"""The gradient of an output by the rules, at some places.

    The run is checked: all relevance of the output is that of the inputs, of constants
    and, for AttnLRP, what softmax keeps.

    Args:
        forward_func (Callable): the model, or a function that calls it.
        inputs (tuple[Tensor, ...]): what it takes first.
        arguments (tuple): its further arguments.
        places (sequence): where relevance is read.
        select (Callable): output tensor → the explained outputs, (batch).
        rule (str): ``"attnlrp"`` or ``"cp"``.
        points (Tensor, optional): the values at the (only) place are replaced by these.
        keeps_own_biases (bool, optional): from the block on, the biases in front of the
            first attention's values belong to their tokens. Default: False.

    Returns:
        *Propagation*.

    Raises:
        UnsupportedModelError: an operation without a rule; a place that is not found.
        ConservationError: relevance is lost on the way.
        NonFiniteActivationError: NaN or infinity in the output.
    """
    watcher = Watcher(inputs, places, rule, points, keeps_own_biases)
    try:
        _, selected = watcher.run(forward_func, arguments, select)
        found = watcher.read()
        if not selected.requires_grad:
            raise UnsupportedModelError(
                "the selected output does not depend on the inputs: "
                f"{watcher.lost()}. Return logits where forward_func returns "
                "probabilities: softmax is taken for attention, a constant in some "
                "methods."
            )
        leaves = [*watcher.operations.leaves.values(), *watcher.ledger.biases]
        check_graph(selected, leaves, watcher.modules())
        watcher.check_places(selected)
        read = [*(at.edge for at in found), *leaves]
        with as_own_errors():
            gradients = torch.autograd.grad(selected.sum(), read, allow_unused=True)
        bottom = len(found)
        with torch.no_grad():
            check_conservation(
                selected,
                leaves,
                gradients[bottom:],
                watcher.ledger.taken,
                watcher.dtypes,
                watcher.lost(),
            )
            return Propagation(
                selected.detach(),
                tuple(at.value.detach() for at in found),
                tuple(
                    torch.zeros_like(at.value) if gradient is None else gradient
                    for at, gradient in zip(found, gradients)
                ),
                tuple(at.is_turned for at in found),
            )
    finally:
        watcher.close()


@torch.inference_mode(False)
def check_block(
    forward_func: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    arguments: tuple[Any, ...],
    select: Callable[[Tensor], Tensor],
) -> None:
    """Raise where inputs reach the output past the output of the embedding block.

    Args:
        forward_func (Callable): as for :func:`propagate`.
        inputs (tuple[Tensor, ...]): likewise; the first are ids or embeddings.
        arguments (tuple): likewise.
        select (Callable): likewise.
    """
    watcher = Watcher(inputs, ["block"], "cp", None)
    try:
        _, selected = watcher.run(forward_func, arguments, select)
        watcher.read()
        if selected.requires_grad:
            watcher.check_places(selected)
    finally:
        watcher.close()


@torch.inference_mode(False)
def values_at(
    forward_func: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    arguments: tuple[Any, ...],
    place: Place,
) -> tuple[Tensor, bool]:
    """What is at a place, and whether it has (tokens, batch, ...); the run ends there.

    Args:
        forward_func (Callable): as for :func:`propagate`.
        inputs (tuple[Tensor, ...]): likewise.
        arguments (tuple): likewise.
        place (str or ModulePlace): which.
    """
    watcher = Watcher(inputs, [place], "cp", None, ends_there=True)
    try:
        with suppress(Found):
            watcher.run(forward_func, arguments, lambda output: output)
        (found,) = watcher.read()
        return found.value.detach(), found.is_turned
    finally:
        watcher.close()
