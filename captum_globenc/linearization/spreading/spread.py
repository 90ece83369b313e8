"""One run, its outputs shared among tokens, and the check of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_globenc.errors import ConservationError, UnsupportedModelError, named
from captum_globenc.linearization.spreading.decomposition import Decomposition, plan
from captum_globenc.linearization.spreading.first_layer import TapedRun
from captum_globenc.linearization.spreading.rows import Gather, Step, Unknown, unique
from captum_globenc.linearization.spreading.shares import WEIGHTS


class Spread(NamedTuple):
    """An output, shared among tokens.

    Args:
        output (Tensor): (batch).
        relevance (Tensor): (batch, tokens) at the input of the first layer; the sum
            over tokens is the output. Padding has none.
    """

    output: Tensor
    relevance: Tensor


def spread(
    forward_func: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    arguments: tuple[Any, ...],
    select: Callable[[Tensor], Tensor],
    biases: str,
) -> Spread:
    """Share outputs and all biases among tokens.

    Args:
        forward_func (Callable): the model, or a function that calls it.
        inputs (tuple[Tensor, ...]): what it takes first: ids (batch, tokens),
            embeddings or images.
        arguments (tuple): its further arguments.
        select (Callable): output tensor → the explained outputs, (batch).
        biases (str): how a bias is shared: ``"absdot"``, ``"abssim"``, ``"norm"``,
            ``"equal"`` or ``"cls"``.

    Returns:
        *Spread*.

    Raises:
        UnsupportedModelError: the output is made of an operation that is not known, of
            several examples, or of layers that are not found.
        ConservationError: the parts do not sum to the output.
        NonFiniteActivationError: NaN or infinity in the output.
        InputError: an unknown way to share biases.
    """
    named(WEIGHTS, biases, "way to share biases")
    return decompose(forward_func, inputs, arguments, select, biases)[0]


def decompose(
    forward_func: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    arguments: tuple[Any, ...],
    select: Callable[[Tensor], Tensor],
    biases: str,
) -> tuple[Spread, Tensor]:
    """As :func:`spread`, and what the biases keep, (batch), for ``"none"``."""
    run = TapedRun(inputs)
    selected = run.run(forward_func, arguments, select)
    off = torch.autocast(selected.device.type, enabled=False)
    with torch.no_grad(), torch.inference_mode(False), off:
        step, _ = run.tape.known(selected)
        output = Gather(step)
        if not isinstance(step, Unknown):
            output = Gather(step, run.tape.places(selected).reshape(-1, 1))
        selected = selected.detach()  # The graph of the run is not needed any more.
        steps = plan(output, selected.numel())
        relevance, kept = _relevance(run, steps, selected, biases)
        if biases != "none":
            kept.zero_()
        _check(selected, relevance, kept, run.tape.dtype)
        return Spread(selected, relevance.to(selected.dtype)), kept


def _relevance(
    run: TapedRun, steps: list[Step], selected: Tensor, biases: str
) -> tuple[Tensor, Tensor]:
    batch, tokens = run.shape
    wide = torch.promote_types(selected.dtype, torch.float32)
    relevance = selected.new_zeros(selected.numel(), tokens, dtype=wide)
    kept = relevance.new_zeros(selected.numel())
    for row in range(selected.numel()):
        decomposition = Decomposition(steps, row, biases)
        places = decomposition.tokens
        if run.is_turned:
            example, token = places % batch, places // batch
        else:
            example, token = places // tokens, places % tokens
        if len(unique(example)) > 1:
            raise UnsupportedModelError(
                f"output {row} depends on several examples of the batch "
                f"({unique(example).tolist()}), and on one is expected."
            )
        parts = decomposition.run()
        relevance[row, token] = parts[:-1]
        kept[row] = parts[-1]
    return relevance, kept


def _check(output: Tensor, relevance: Tensor, kept: Tensor, dtype: torch.dtype) -> None:
    """Raise where parts do not sum to the output."""
    error = (relevance.sum(1) + kept - output).abs()
    size = relevance.abs().sum(1) + kept.abs() + output.abs()
    relative = float((error / size.clamp(min=torch.finfo(size.dtype).tiny)).max())
    if not relative <= _LIMITS[dtype]:
        where = "the parts of the tokens do not sum to the output"
        raise ConservationError(where, relative, _LIMITS[dtype])


# Of the sizes of all parts: far above what rounding makes of it.
_LIMITS = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 3e-2,
    torch.bfloat16: 1e-1,
}
