r"""Do the recorded parts rebuild the layer?

Every identity that the scores rest on is tested on every run, along one random
direction of the hidden space: :math:`\langle p, \text{true} \rangle` against
:math:`\langle p, \text{rebuilt} \rangle`. A part that is missing or wrong changes the
projection with probability one, and the test costs next to nothing.

Attention is tested where its weights are used, everything else in a layer at the end of
the run, for all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_globenc.errors import ReconstructionError
from captum_globenc.weights import LayerWeights

_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 8e-2,
}


def tolerance(*dtypes: torch.dtype) -> float:
    """The largest relative deviation that rounding explains.

    Args:
        dtypes (torch.dtype): what the model computed in; the coarsest counts.
    """
    largest = max(_TOLERANCE[dtype] for dtype in dtypes)
    if torch.get_float32_matmul_precision() != "highest" and torch.float32 in dtypes:
        # The model's own products may then be rounded to 10 bits.
        largest = max(largest, _TOLERANCE[torch.float16])
    return largest


@dataclass(frozen=True)
class LayerProjections:
    """What a layer computed, in one direction of the hidden space.

    Args:
        name (str): the layer's name in the model.
        steps (Tensor): (batch, tokens, 7): the layer's input, input and output of its
            attention norm, output of the feed-forward part, input and output of its
            output norm, the layer's output.
        mixed (Tensor): what attention adds to the layer's input, (batch, tokens).
        through_norms (tuple[Tensor, Tensor]): the outputs of the two norms as their
            inputs, scales and weights give them, (batch, tokens).
        tolerance (float): the largest relative deviation that rounding explains.
    """

    name: str
    steps: Tensor
    mixed: Tensor
    through_norms: tuple[Tensor, Tensor]
    tolerance: float


def project(
    name: str,
    steps: Sequence[Tensor],
    context: Tensor,
    scales: tuple[Tensor, Tensor],
    weights: LayerWeights,
) -> LayerProjections:
    """The projections of one layer.

    Args:
        name (str): the layer's name in the model.
        steps (sequence of Tensor): the seven of :class:`LayerProjections`, each (batch,
            tokens, hidden).
        context (Tensor): the heads' outputs, (batch, tokens, heads × head size).
        scales (tuple[Tensor, Tensor]): standard deviations in the two norms, (batch,
            tokens).
        weights (LayerWeights): what the layer is decomposed with.
    """
    dtype = weights.probe.dtype
    probe, first, second = weights.directions.unbind(-1)
    bias, first_bias, second_bias = weights.offsets
    return LayerProjections(
        name=name,
        steps=torch.stack([step.to(dtype) @ probe for step in steps], -1),
        mixed=context.to(dtype) @ weights.output_probe + bias,
        through_norms=(
            steps[1].to(dtype) @ first / scales[0] + first_bias,
            steps[4].to(dtype) @ second / scales[1] + second_bias,
        ),
        tolerance=tolerance(context.dtype, *(step.dtype for step in steps)),
    )


def check_layers(layers: Sequence[LayerProjections], attended: Tensor) -> None:
    """Check what holds token by token in each layer, in one go for all layers.

    Args:
        layers (sequence of LayerProjections): bottom layer first.
        attended (Tensor): (batch, tokens), False at padding.

    Raises:
        ReconstructionError: an identity does not hold.
    """
    steps = torch.stack([layer.steps for layer in layers])
    hidden, first, normed, fed, second, last, output = steps.unbind(-1)
    mixed = torch.stack([layer.mixed for layer in layers])
    identities = {
        "the input of its attention norm": (first, hidden + mixed),
        "the output of its attention norm": (
            normed,
            torch.stack([layer.through_norms[0] for layer in layers]),
        ),
        "the input of its output norm": (second, normed + fed),
        "the output of its output norm": (
            last,
            torch.stack([layer.through_norms[1] for layer in layers]),
        ),
        "its output": (output, last),
        "its input from the layer below": (
            hidden,
            torch.cat([hidden[:1], output[:-1]]),
        ),
    }
    true, rebuilt = (torch.stack(side, 1) for side in zip(*identities.values()))
    for index, layer in enumerate(layers):
        check(
            layer.name,
            list(identities),
            true[index],
            rebuilt[index],
            attended,
            layer.tolerance,
        )


def check(
    layer: str,
    parts: Sequence[str],
    true: Tensor,
    rebuilt: Tensor,
    attended: Tensor,
    largest: float,
) -> None:
    """Compare projections of what the model computed with what the parts give.

    Args:
        layer (str): name of the layer, for the error.
        parts (sequence of str): what is compared, for the error.
        true (Tensor): (parts, batch, ..., receivers).
        rebuilt (Tensor): likewise.
        attended (Tensor): broadcasts to one part; rows of padding do not count.
        largest (float): the largest relative deviation allowed.

    Raises:
        ReconstructionError: the deviation of a part, relative to its largest true
            value, is larger, or not a number.
    """
    # Filled, not multiplied: what padding holds may not even be a number.
    deviations = _largest((true - rebuilt).masked_fill(~attended, 0))
    sizes = _largest(true.masked_fill(~attended, 0))
    for part, deviation, size in zip(
        parts, deviations.tolist(), sizes.tolist(), strict=True
    ):
        # Not ">": a deviation that is not a number is no match either.
        if not deviation <= largest * size:
            error = deviation / size if size else float("inf")
            raise ReconstructionError(layer, part, error, largest)


def _largest(values: Tensor) -> Tensor:
    largest: Tensor = values.flatten(1).norm(p=torch.inf, dim=1)
    return largest
