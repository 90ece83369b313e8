"""What must hold in a layer that is what its description says.

A layer's vectors are projected on a few random directions as soon as it has run; what
must hold between the projections is then looked at for all layers together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from captum_globenc.encoders.resolver import LayerModules
from captum_globenc.encoders.weights import LayerWeights
from captum_globenc.recording.attention import AttentionCall
from captum_globenc.recording.records import Version
from captum_globenc.recording.verification import Identity, rounding_unit


@dataclass
class LayerDraft:
    """What is projected of a layer while it runs.

    Args:
        name (str): the layer's name in the model.
        modules (LayerModules): its parts.
        versions (list[Version]): of the model's tensors that are kept.
        shape (tuple[int, int] or None): (batch, tokens), where known.
        is_input_from_below (bool): its input is the very output of the layer below.
        is_attending (bool): its attention runs now.
        call (AttentionCall or None): its attention.
        inputs (dict[str, Tensor]): part → what went in, (batch, tokens, n); "layer" is
            the layer itself and "attention" what its values are made of.
        outputs (dict[str, Tensor]): likewise what came out.
        args (tuple): what the layer was called with.
        kwargs (dict): likewise, by name.
    """

    name: str
    modules: LayerModules
    versions: list[Version]
    shape: tuple[int, int] | None
    is_input_from_below: bool = False
    is_attending: bool = False
    call: AttentionCall | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> list[tuple[str, str, Tensor]]:
        """Part, "input" or "output", and the tensor."""
        return [
            (part, side, vectors)
            for side, steps in (("input", self.inputs), ("output", self.outputs))
            for part, vectors in steps.items()
        ]


def project(
    draft: LayerDraft,
    weights: LayerWeights,
    deviations: Mapping[str, Tensor],
    below: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """What a layer took and gave, in random directions.

    Args:
        draft (LayerDraft): the layer.
        weights (LayerWeights): its weights.
        deviations (Mapping[str, Tensor]): of its norms, (batch, tokens).
        below (Mapping[str, Tensor] or None): what this function gave for the layer
            below.

    Returns:
        *dict* of tensors (batch, directions, tokens): "PART.input" and "PART.output";
        "NORM.rebuilt", its output but for the bias, and "NORM.bias"; "branch" and
        "offset", what attention adds; and (batch, tokens): "NORM.size" and
        "branch.size", of parts that cancel. "below" is the output of the layer below.
    """
    probes = weights.probes
    dtype, hidden = probes.dtype, draft.inputs["layer"].shape[-1]
    # Often one tensor is the output of a part and the input of the next.
    projected: dict[int, Tensor] = {}
    if below is not None and draft.is_input_from_below:
        projected[id(draft.inputs["layer"])] = below["layer.output"]
    result = {}
    for part, side, tensor in draft.steps:
        if tensor.shape[-1] == hidden:
            if id(tensor) not in projected:
                projected[id(tensor)] = probes.T @ tensor.detach().to(dtype).mT
            result[f"{part}.{side}"] = projected[id(tensor)]
    result["below"] = result["layer.input"] if below is None else below["layer.output"]
    scale = draft.modules.feed_forward_layer_scale
    if scale is not None:
        directions = probes * scale.detach().to(dtype)[:, None]
        branch = draft.outputs["feed_forward"].detach().to(dtype)
        result["feed_forward.output"] = directions.T @ branch.mT
    call = draft.call
    assert call is not None
    heads = call.context.shape[1]
    maps = weights.output_probes.unflatten(0, (heads, -1)).mT
    by_head = maps @ call.context.detach().to(dtype).mT
    result["branch"] = by_head.sum(1)
    result["branch.size"] = by_head.square().sum((1, 2)).sqrt()
    result["offset"] = weights.output_offset[None, :, None]
    for name, deviation in deviations.items():
        before = draft.inputs[name].detach().to(dtype)
        rebuilt = weights.directions[name].T @ before.mT
        result[f"{name}.rebuilt"] = rebuilt / deviation[:, None]
        result[f"{name}.bias"] = weights.norm_offsets[name][None, :, None]
        # A mean that is taken away is a part that cancels.
        size = before.square() @ weights.norms[name].gamma.square()
        size = size.sqrt() / deviation
        result[f"{name}.size"] = size * probes.shape[1] ** 0.5
    return result


def value_projections(
    draft: LayerDraft, value_probe: Tensor, signs: Tensor
) -> dict[str, Tensor]:
    """The values and what the map of values made, in directions of the head size.

    Args:
        draft (LayerDraft): the layer.
        value_probe (Tensor): its values, (batch, heads, directions + 1, tokens).
        signs (Tensor): the directions, (head size, directions).

    Returns:
        *dict* of tensors (batch, heads, directions, tokens), empty where the family
        does not say how values are made.
    """
    if "value" not in draft.outputs:
        return {}
    heads, size = value_probe.shape[1], len(signs)
    made = draft.outputs["value"].detach().to(signs.dtype)
    made = made.unflatten(-1, (-1, size)).transpose(1, 2)
    # Queries, keys and values of one map, and heads that share values.
    groups = made.shape[1]
    groups = groups if groups <= heads else (groups - heads) // 2
    return {
        "values": value_probe[:, :: heads // groups, :-1],
        "values.made": signs.T @ made[:, -groups:].mT,
    }


def unit_of(draft: LayerDraft) -> float:
    """The rounding unit of what a layer computed."""
    assert draft.call is not None
    return rounding_unit(
        draft.call.context.dtype, *(vectors.dtype for _, _, vectors in draft.steps)
    )


def identities_of(
    steps: Mapping[str, Tensor], unit: float, centred: Mapping[str, bool]
) -> list[Identity]:
    """What must hold, the layers' outputs first.

    Args:
        steps (Mapping[str, Tensor]): as of :func:`project`, with the layers stacked in
            front.
        unit (float): the rounding unit.
        centred (Mapping[str, bool]): norm → whether it takes the mean away.
    """

    def identity(part: str, true: str, *parts: str, size: str = "") -> Identity:
        return Identity(
            part, steps[true], tuple(steps[p] for p in parts), unit, steps.get(size)
        )

    def normed(norm: str, whose: str = "its") -> Identity:
        result = identity(
            f"the output of {whose} {norm.replace('_', ' ')}",
            f"{norm}.output",
            f"{norm}.rebuilt",
            f"{norm}.bias",
            size=f"{norm}.size",
        )
        # RMSNorms of transformers compute in float32 whatever the model's dtype.
        least = 0.0 if centred[norm] else torch.finfo(torch.float32).eps
        return result._replace(unit=max(unit, least))

    added = ("layer.input", "branch", "offset")
    is_pre_norm = "feed_forward_norm.input" in steps
    if is_pre_norm:
        sum_of, total = "its feed-forward norm", "feed_forward_norm.input"
        parts = ("feed_forward_norm.input", "feed_forward.output")
        identities = [identity("its output", "layer.output", *parts)]
    else:
        sum_of, total = "its attention norm", "attention_norm.input"
        parts = ("attention_norm.output", "feed_forward.output")
        identities = [
            identity("its output", "layer.output", "output_norm.output"),
            normed("attention_norm"),
            identity("the input of its output norm", "output_norm.input", *parts),
            normed("output_norm"),
        ]
    what = f"the input of {sum_of}"
    identities.append(identity(what, total, *added, size="branch.size"))
    if "below" in steps:
        what = "its input from the layer below"
        identities.append(identity(what, "layer.input", "below"))
    if "final_norm.input" in steps:
        what = "the input of the final norm"
        identities.append(identity(what, "final_norm.input", "layer.output"))
        identities.append(normed("final_norm", "the"))
    expected = "layer.input"
    if "input_norm.input" in steps:
        what = "the input of its input norm"
        identities.append(identity(what, "input_norm.input", "layer.input"))
        expected = "input_norm.output"
    source = "value.input" if "value.input" in steps else "attention.input"
    if source in steps and is_pre_norm == (expected != "layer.input"):
        what = "what its values are made of"
        identities.append(identity(what, source, expected))
    if "values" in steps:
        identities.append(identity("its values", "values", "values.made"))
    return identities


def stacked(layers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The same tensors of several layers, stacked."""
    return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
