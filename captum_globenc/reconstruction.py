r"""Do the recorded parts rebuild the layer?

Every identity that the scores rest on is tested on every run, along one random
direction of the hidden space: :math:`\langle p, \text{true} \rangle` against
:math:`\langle p, \text{rebuilt} \rangle`. A part that is missing or wrong changes the
projection with probability one, and the test costs next to nothing.

Attention is tested for every receiver, where its weights are used. Everything else in a
layer works token by token, so there a sample of each example's tokens is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_globenc.errors import ReconstructionError
from captum_globenc.weights import LayerWeights, working_dtype

# At most so many tokens of an example are a sample.
_SAMPLE = 16

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
class LayerSample:
    """What a layer computed at the sampled tokens.

    Args:
        name (str): the layer's name in the model.
        vectors (Tensor): (7, batch, sample, hidden): the layer's input, input and
            output of its attention norm, output of the feed-forward part, input and
            output of its output norm, the layer's output.
        context (Tensor): (batch, sample, heads × head size), the heads' outputs.
        scales (tuple[Tensor, Tensor]): standard deviations in the two norms, (batch,
            sample).
        weights (LayerWeights): what the layer is decomposed with.
        tolerance (float): the largest relative deviation that rounding explains.
    """

    name: str
    vectors: Tensor
    context: Tensor
    scales: tuple[Tensor, Tensor]
    weights: LayerWeights
    tolerance: float


def sampled(tokens: int) -> slice:
    """Positions of the sampled tokens: evenly spread, the first among them."""
    return slice(None, None, -(-tokens // _SAMPLE))


def check_layers(samples: Sequence[LayerSample], attended: Tensor) -> None:
    """Check what holds token by token in each layer, in one go for all layers.

    Args:
        samples (sequence of LayerSample): bottom layer first.
        attended (Tensor): (batch, sample), False at padding.

    Raises:
        ReconstructionError: an identity does not hold.
    """
    dtype = working_dtype(samples[0].vectors.dtype)
    weights = [sample.weights for sample in samples]
    vectors = torch.stack([sample.vectors for sample in samples]).to(dtype)
    directions = torch.stack([w.directions for w in weights])
    projections = vectors.flatten(1, 3) @ directions
    projections = projections.view(*vectors.shape[:4], -1)
    along, through_first, through_second = projections.unbind(-1)
    hidden, first, normed, fed, second, last, output = along.unbind(1)
    offsets = torch.stack([w.offsets for w in weights])[:, :, None, None]
    bias, first_bias, second_bias = offsets.unbind(1)
    heads = torch.stack([s.context.to(dtype) @ s.weights.output_probe for s in samples])
    first_scale = torch.stack([sample.scales[0] for sample in samples])
    second_scale = torch.stack([sample.scales[1] for sample in samples])
    identities = {
        "the input of its attention norm": (first, hidden + heads + bias),
        "the output of its attention norm": (
            normed,
            through_first[:, 1] / first_scale + first_bias,
        ),
        "the input of its output norm": (second, normed + fed),
        "the output of its output norm": (
            last,
            through_second[:, 4] / second_scale + second_bias,
        ),
        "its output": (output, last),
        "its input from the layer below": (
            hidden,
            torch.cat([hidden[:1], output[:-1]]),
        ),
    }
    true, rebuilt = (torch.stack(side, 1) for side in zip(*identities.values()))
    for index, sample in enumerate(samples):
        check(
            sample.name,
            list(identities),
            true[index],
            rebuilt[index],
            attended,
            sample.tolerance,
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
    deviations = _largest((true - rebuilt) * attended)
    sizes = _largest(true * attended)
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
