"""What must hold in a layer that is what its description says.

A layer's vectors are projected on a few random directions when it has run, together
with those of the next layers where they are small; what must hold between the
projections is then looked at for all layers at once.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_globenc.encoders.parts import epsilon, standard_deviation
from captum_globenc.encoders.resolver import LayerModules
from captum_globenc.encoders.weights import LayerWeights
from captum_globenc.recording.attention import AttentionCall
from captum_globenc.recording.grouping import grouped, most_at_once, stack
from captum_globenc.recording.records import Version, head_signs, probed
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
        products (int): how many products of it might have been its attention.
        call (AttentionCall or None): its attention.
        inputs (dict[str, Tensor]): part → what went in, (batch, tokens, n); "layer" is
            the layer itself and "attention" what its values are made of.
        outputs (dict[str, Tensor]): likewise what came out.
        args (tuple): what the layer was called with.
        kwargs (dict): likewise, by name.
        autocast (torch.dtype or None): the dtype of the autocast in which it ran.
    """

    name: str
    modules: LayerModules
    versions: list[Version]
    shape: tuple[int, int] | None
    is_input_from_below: bool = False
    is_attending: bool = False
    products: int = 0
    call: AttentionCall | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    autocast: torch.dtype | None = None

    @property
    def layout(self) -> Hashable:
        """What layers must have in common to be projected together."""
        assert self.call is not None
        named = [*self.steps, *((name, "", t) for name, t in self.call.tensors.items())]
        norms = self.modules.parts.norms.items()
        return (
            self.modules.feed_forward_layer_scale is None,
            *((name, side, t.shape, t.dtype, t.device) for name, side, t in named),
            *(
                (name, type(norm), epsilon(norm, self.inputs[name].dtype))
                for name, norm in norms
            ),
        )

    @property
    def steps(self) -> list[tuple[str, str, Tensor]]:
        """Part, "input" or "output", and the tensor."""
        return [
            (part, side, vectors)
            for side, steps in (("input", self.inputs), ("output", self.outputs))
            for part, vectors in steps.items()
        ]


class Projected(NamedTuple):
    """What is left of a layer's tensors: O(tokens) numbers each.

    Args:
        steps (dict[str, Tensor]): what must hold between, (batch, directions, tokens):
            "PART.input" and "PART.output"; "NORM.rebuilt", its output but for the bias,
            and "NORM.bias"; "branch" and "offset", what attention adds; "below", the
            output of the layer below; with (batch, tokens) "NORM.size" and
            "branch.size", of parts that cancel; with (batch, heads, directions, tokens)
            "values" and "values.made", where it is known how values are made.
        deviations (dict[str, Tensor]): of the norms, (batch, tokens).
        value_probe (Tensor): the values, (batch, heads, directions + 1, tokens).
        context_probe (Tensor): what attention gave, (batch, heads, directions, tokens).
        context (Tensor): its shape without its memory, (batch, heads, tokens, 0).
    """

    steps: dict[str, Tensor]
    deviations: dict[str, Tensor]
    value_probe: Tensor
    context_probe: Tensor
    context: Tensor


def project(
    group: Sequence[LayerDraft], weights: LayerWeights, below: Tensor | None
) -> list[Projected]:
    """What layers took and gave, in random directions.

    Args:
        group (sequence of LayerDraft): layers of one layout, in turn.
        weights (LayerWeights): their weights, stacked.
        below (Tensor or None): the projected output of the layer below the first.
    """
    steps = _projected_steps(group, weights, below)
    calls = [draft.call for draft in group if draft.call is not None]
    context = stack([call.context for call in calls]).to(weights.probes.dtype)
    value = stack([call.value for call in calls]).to(weights.probes.dtype)
    value_probe, signs = probed(value), head_signs(context)
    deviations, several = _through_norms(group, weights)
    several |= _attended(context, weights)
    several |= _values(group, value_probe, head_signs(value))
    for name, tensors in several.items():
        for step, tensor in zip(steps, tensors.unbind(), strict=True):
            step[name] = tensor
    by_layer = {name: values.unbind() for name, values in deviations.items()}
    empty = context.new_empty((*context.shape[1:-1], 0), dtype=calls[0].context.dtype)
    probes = zip(value_probe.unbind(), (signs.T @ context.mT).unbind(), strict=True)
    return [
        Projected(
            step, {n: values[index] for n, values in by_layer.items()}, *each, empty
        )
        for index, (step, each) in enumerate(zip(steps, probes, strict=True))
    ]


def _projected_steps(
    group: Sequence[LayerDraft], weights: LayerWeights, below: Tensor | None
) -> list[dict[str, Tensor]]:
    """The vectors of the hidden size on the probes."""
    hidden = group[0].inputs["layer"].shape[-1]
    # Often one tensor is the output of a part and the input of the next.
    whose: dict[int, Tensor] = {}
    known: dict[int, Tensor] = {}
    last = None
    for draft in group:
        if draft.is_input_from_below and last is not None:
            whose[id(draft.inputs["layer"])] = last
        elif draft.is_input_from_below and below is not None:
            known[id(draft.inputs["layer"])] = below
        last = draft.outputs["layer"]
    wanted = [
        {
            f"{part}.{side}": whose.get(id(tensor), tensor)
            for part, side, tensor in draft.steps
            if tensor.shape[-1] == hidden and (part, side) != ("value", "output")
        }
        for draft in group
    ]
    tensors = {id(t): t for names in wanted for t in names.values()}
    distinct = [tensor for key, tensor in tensors.items() if key not in known]
    most = most_at_once(distinct[0].numel()) if distinct else 1
    for chunk in grouped(distinct, lambda chunk, _: len(chunk) < most):
        vectors = stack(chunk).to(weights.probes.dtype)
        for tensor, on_probes in zip(chunk, (weights.probes.T @ vectors.mT).unbind()):
            known[id(tensor)] = on_probes
    steps = [{name: known[id(t)] for name, t in names.items()} for names in wanted]
    scales = [draft.modules.feed_forward_layer_scale for draft in group]
    if all(scale is not None for scale in scales):
        scale = stack([scale for scale in scales if scale is not None])
        branch = stack([draft.outputs["feed_forward"] for draft in group])
        directions = weights.probes * scale.to(weights.probes)[..., None]
        scaled = directions.mT[:, None] @ branch.to(directions).mT
        for step, tensor in zip(steps, scaled.unbind()):
            step["feed_forward.output"] = tensor
    for step in steps:
        step["below"] = step["layer.input"] if below is None else below
        below = step["layer.output"]
    return steps


def _through_norms(
    group: Sequence[LayerDraft], weights: LayerWeights
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The norms' deviations, (layers, batch, tokens), and their steps."""
    deviations, steps = {}, {}
    for name, module in group[0].modules.parts.norms.items():
        before = stack([draft.inputs[name] for draft in group])
        before = before.to(weights.probes.dtype)
        deviation = deviations[name] = standard_deviation(module, before)
        rebuilt = weights.directions[name].mT[:, None] @ before.mT
        steps[f"{name}.rebuilt"] = rebuilt / deviation[:, :, None]
        offset = weights.norm_offsets[name].mT[:, None]
        steps[f"{name}.bias"] = offset.expand_as(rebuilt)
        # A mean that is taken away is a part that cancels.
        size = (before * weights.norms[name].gamma[:, None]).norm(dim=-1)
        steps[f"{name}.size"] = size * weights.probes.shape[1] ** 0.5 / deviation
    return deviations, steps


def _attended(context: Tensor, weights: LayerWeights) -> dict[str, Tensor]:
    """What attention adds, of (layers, batch, heads, tokens, head size)."""
    maps = weights.output_probes.unflatten(1, (context.shape[2], -1)).mT
    by_head = maps[:, None] @ context.mT
    branch = by_head.sum(2)
    return {
        "branch": branch,
        "branch.size": by_head.norm(dim=(2, 3)),
        "offset": weights.output_offset.mT[:, None].expand_as(branch),
    }


def _values(
    group: Sequence[LayerDraft], value_probe: Tensor, signs: Tensor
) -> dict[str, Tensor]:
    """The values and what the map of values made, in directions of the head size.

    Args:
        group (sequence of LayerDraft): the layers.
        value_probe (Tensor): (layers, batch, heads, directions + 1, tokens).
        signs (Tensor): the directions, (head size, directions).

    Returns:
        *dict* of tensors (layers, batch, heads, directions, tokens), empty where the
        family does not say how values are made.
    """
    if "value" not in group[0].outputs:
        return {}
    heads, size = value_probe.shape[2], len(signs)
    made = stack([draft.outputs["value"] for draft in group]).to(signs.dtype)
    made = made.unflatten(-1, (-1, size)).transpose(2, 3)
    # Queries, keys and values of one map, and heads that share values.
    groups = made.shape[2]
    groups = groups if groups <= heads else (groups - heads) // 2
    return {
        "values": value_probe[:, :, :: heads // groups, :-1],
        "values.made": signs.T @ made[:, :, -groups:].mT,
    }


def unit_of(draft: LayerDraft) -> float:
    """The rounding unit of what a layer computed."""
    assert draft.call is not None
    return rounding_unit(
        draft.call.context.dtype, *(vectors.dtype for _, _, vectors in draft.steps)
    )


def identities_of(
    steps: Iterable[str], unit: float, centred: Mapping[str, bool]
) -> list[Identity]:
    """What must hold in a layer.

    Args:
        steps (iterable of str): the names of what there is, as in :class:`Projected`.
        unit (float): the rounding unit.
        centred (Mapping[str, bool]): norm → whether it takes the mean away.
    """
    steps = set(steps)

    def identity(part: str, true: str, *parts: str, size: str = "") -> Identity:
        return Identity(part, true, parts, unit, size)

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
