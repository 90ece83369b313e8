r"""Do the recorded parts rebuild the layer?

Every identity that the scores rest on is tested on every run, along one random
direction of the hidden space: :math:`\langle p, \text{true} \rangle` against
:math:`\langle p, \text{rebuilt} \rangle`. A part that is missing or wrong changes the
projection with probability one, and the test costs next to nothing.

Attention is tested where its weights are used, everything else in a layer at the end of
the run, for all tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

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

    Returns:
        *float*: relative to the largest true value.
    """
    largest = max(_TOLERANCE[dtype] for dtype in dtypes)
    if torch.get_float32_matmul_precision() != "highest" and torch.float32 in dtypes:
        # The model's own products may then be rounded to 10 bits.
        largest = max(largest, _TOLERANCE[torch.float16])
    return largest


class Fit(NamedTuple):
    """How well a part of a layer is rebuilt.

    Args:
        part (str): which identity of the layer.
        deviation (float): the largest one, relative to the largest true value.
        limit (float): the largest one that rounding explains.
    """

    part: str
    deviation: float
    limit: float

    @property
    def is_good(self) -> bool:
        """Whether rounding explains the deviation."""
        return self.deviation <= self.limit


class _Active(threading.local):
    worst: dict[str, Fit] | None = None


_ACTIVE = _Active()


@contextmanager
def observing() -> Iterator[dict[str, Fit]]:
    """Let the checks of this thread tell what they find, and raise nothing.

    Yields:
        *dict*: layer → its part that is rebuilt least well.
    """
    _ACTIVE.worst = {}
    try:
        yield _ACTIVE.worst
    finally:
        _ACTIVE.worst = None


#: What must be recorded of a layer's parts, by the placement of its norms.
POST_NORM_STEPS: tuple[str, ...] = (
    "attention_norm.input",
    "attention_norm.output",
    "feed_forward.output",
    "output_norm.input",
    "output_norm.output",
)
PRE_NORM_STEPS: tuple[str, ...] = ("feed_forward_norm.input", "feed_forward.output")


@dataclass(frozen=True)
class LayerProjections:
    """What a layer computed, in one direction of the hidden space.

    Args:
        name (str): the layer's name in the model.
        steps (dict[str, Tensor]): (batch, tokens) each: "hidden", the layer's input;
            "mixed", what attention adds to it; "output"; the recorded steps above; and
            for a norm after a residual "attention_norm.rebuilt", "output_norm.rebuilt",
            its output as its input, scale and weights give it.
        tolerance (float): the largest relative deviation that rounding explains.
    """

    name: str
    steps: dict[str, Tensor]
    tolerance: float


def project(
    name: str,
    steps: dict[str, Tensor],
    context: Tensor,
    scales: Sequence[Tensor | None],
    weights: LayerWeights,
    feed_forward_scale: Tensor | None = None,
) -> LayerProjections:
    """The projections of one layer.

    Args:
        name (str): the layer's name in the model.
        steps (dict[str, Tensor]): "hidden", "output" and the recorded steps, each
            (batch, tokens, hidden).
        context (Tensor): the heads' outputs, (batch, tokens, heads × head size).
        scales (sequence of Tensor or None): standard deviations in the norm after each
            residual, (batch, tokens).
        weights (LayerWeights): what the layer is decomposed with.
        feed_forward_scale (Tensor or None): (hidden), multiplies that branch.
    """
    dtype = weights.probe.dtype
    projected = {
        step: vectors.to(dtype) @ weights.probe for step, vectors in steps.items()
    }
    if feed_forward_scale is not None:
        scaled = feed_forward_scale.detach().to(dtype) * weights.probe
        branch = steps["feed_forward.output"].to(dtype)
        projected["feed_forward.output"] = branch @ scaled
    projected["mixed"] = (
        context.to(dtype) @ weights.output_probe + weights.output_offset
    )
    for index, norm in enumerate(("attention_norm", "output_norm")):
        before, scale = steps.get(f"{norm}.input"), scales[index]
        if before is not None and scale is not None:
            projected[f"{norm}.rebuilt"] = weights.normed(index, before, scale)
    return LayerProjections(
        name,
        projected,
        tolerance(context.dtype, *(step.dtype for step in steps.values())),
    )


def check_layers(layers: Sequence[LayerProjections], attended: Tensor) -> None:
    """Check what holds token by token in each layer, in one go for all layers.

    Args:
        layers (sequence of LayerProjections): bottom layer first.
        attended (Tensor): (batch, tokens), False at padding.

    Raises:
        ReconstructionError: an identity does not hold.
    """
    steps = {
        step: torch.stack([layer.steps[step] for layer in layers])
        for step in layers[0].steps
    }
    hidden, output = steps["hidden"], steps["output"]
    identities = {
        **(_pre_norm if "feed_forward_norm.input" in steps else _post_norm)(steps),
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


def _post_norm(steps: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The identities of a post-LN layer: part → (true, rebuilt)."""
    return {
        "the input of its attention norm": (
            steps["attention_norm.input"],
            steps["hidden"] + steps["mixed"],
        ),
        "the output of its attention norm": (
            steps["attention_norm.output"],
            steps["attention_norm.rebuilt"],
        ),
        "the input of its output norm": (
            steps["output_norm.input"],
            steps["attention_norm.output"] + steps["feed_forward.output"],
        ),
        "the output of its output norm": (
            steps["output_norm.output"],
            steps["output_norm.rebuilt"],
        ),
        "its output": (steps["output"], steps["output_norm.output"]),
    }


def _pre_norm(steps: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The identities of a pre-LN layer: part → (true, rebuilt)."""
    return {
        "the input of its feed-forward norm": (
            steps["feed_forward_norm.input"],
            steps["hidden"] + steps["mixed"],
        ),
        "its output": (
            steps["output"],
            steps["feed_forward_norm.input"] + steps["feed_forward.output"],
        ),
    }


def check_final_norm(
    last: LayerProjections,
    before: Tensor,
    after: Tensor,
    scale: Tensor,
    weights: LayerWeights,
    attended: Tensor,
) -> None:
    """Check the norm that follows the last layer.

    Args:
        last (LayerProjections): the last layer's.
        before (Tensor): the norm's input, (batch, tokens, hidden).
        after (Tensor): its output, likewise.
        scale (Tensor): standard deviations in it, (batch, tokens).
        weights (LayerWeights): of the last layer.
        attended (Tensor): (batch, tokens), False at padding.

    Raises:
        ReconstructionError: the norm gets or gives something else.
    """
    dtype = weights.probe.dtype
    true = torch.stack(
        [before.to(dtype) @ weights.probe, after.to(dtype) @ weights.probe]
    )
    rebuilt = torch.stack([last.steps["output"], weights.normed(-1, before, scale)])
    parts = ["the input of the final norm", "the output of the final norm"]
    largest = last.tolerance
    norm = weights.norms[-1]
    if norm is not None and not norm.centred:
        # The RMSNorms of transformers compute in float32 whatever the model's dtype.
        largest = max(largest, tolerance(torch.float32))
    check(last.name, parts, true, rebuilt, attended, largest)


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
    # Nothing is off by nothing, also of nothing; NaN is off by any measure.
    relative = (deviations / sizes).masked_fill(deviations == 0, 0)
    relative = relative.nan_to_num(nan=torch.inf, posinf=torch.inf)
    for part, deviation in zip(parts, relative.tolist(), strict=True):
        fit = Fit(part, deviation, largest)
        if _ACTIVE.worst is not None:
            worst = _ACTIVE.worst.setdefault(layer, fit)
            if fit.deviation / fit.limit > worst.deviation / worst.limit:
                _ACTIVE.worst[layer] = fit
        elif not fit.is_good:
            raise ReconstructionError(layer, *fit)


def _largest(values: Tensor) -> Tensor:
    largest: Tensor = values.flatten(1).norm(p=torch.inf, dim=1)
    return largest
