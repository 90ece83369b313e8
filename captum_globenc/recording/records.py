"""What one run of an encoder leaves behind: O(tokens × hidden) per layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from captum_globenc.deferred import check_later
from captum_globenc.encoders.weights import LayerWeights, random_signs
from captum_globenc.errors import InputError
from captum_globenc.recording.attention import AttentionCall, attention_weights
from captum_globenc.recording.grouping import (
    concatenated,
    grouped,
    most_at_once,
    stack,
)
from captum_globenc.recording.verification import check, rounding_unit, tolerance

#: A block of receivers: the same positions for all examples, or (batch, receivers)
#: positions of each.
Receivers = slice | Tensor
# Random directions of the head size in which attention outputs are compared. With their
# size they are four rows, which are multiplied faster than three.
_DIRECTIONS = 3


def take(
    values: Shaped[Tensor, "batch tokens *rest"], receivers: Receivers
) -> Shaped[Tensor, "batch receivers *rest"]:
    """The given receivers along dimension 1.

    Args:
        values (Tensor): (batch, tokens, ...).
        receivers (slice or Tensor): a block of receivers.

    Returns:
        *Tensor* of shape (batch, receivers, ...).
    """
    if isinstance(receivers, slice):
        tokens = values.shape[1]
        is_all = receivers.indices(tokens) == (0, tokens, 1)
        return values if is_all else values[:, receivers]
    examples = torch.arange(values.shape[0], device=values.device)[:, None]
    return values[examples, receivers]


class Version(NamedTuple):
    """A tensor of the model's and how often it had been written to."""

    tensor: Tensor
    number: int

    @classmethod
    def of(cls, tensor: Tensor) -> Version:
        """The version that a tensor has now."""
        return cls(tensor, tensor._version)

    @property
    def is_current(self) -> bool:
        """Whether the tensor has not been written to since."""
        return self.tensor._version == self.number


@dataclass(frozen=True)
class LayerRecord:
    r"""One layer's run, or that of several layers stacked.

    Of several layers, as ``stacked`` makes it, the batch is layers × batch, layer
    by layer, and the weights are a stack.

    Args:
        names (tuple[str, ...]): the layers' names in the model.
        call (AttentionCall): what attention took and gave; ``context`` is empty.
        hidden (Tensor): the layer's input :math:`x`, (batch, tokens, hidden).
        deviations (dict[str, Tensor]): the true denominators :math:`s_i` of the norms
            after the residuals, (batch, tokens) each, by the norm's name.
        hidden_probe (Tensor): ``hidden`` in a few random directions, (batch,
            directions, tokens).
        value_probe (Tensor): the values in a few random directions, and their size,
            (batch, heads, directions + 1, tokens).
        context_probe (Tensor): the attention's output in these directions, (batch,
            heads, directions, tokens): what the attention weights must reproduce from
            the values.
        weights (LayerWeights): the layer's prepared weights.
        token_mask (Tensor): (batch, tokens), False at padding.
        replay (Callable): runs the layer again with another attention, see
            :meth:`captum_globenc.EncoderRun.replay`.
        versions (tuple[Version, ...]): of the model's tensors that are kept here.
    """

    names: tuple[str, ...]
    call: AttentionCall
    hidden: Float[Tensor, "batch tokens hidden"]
    deviations: dict[str, Tensor]
    hidden_probe: Float[Tensor, "batch probes tokens"]
    context_probe: Float[Tensor, "batch heads directions tokens"]
    value_probe: Float[Tensor, "batch heads directions+1 tokens"]
    weights: LayerWeights
    replay: Callable[..., Tensor]
    versions: tuple[Version, ...]
    token_mask: Bool[Tensor, "batch tokens"]

    @property
    def name(self) -> str:
        """The layer's name in the model."""
        return self.names[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the layer is decomposed."""
        return self.weights.probes.dtype

    @property
    def heads(self) -> int:
        """The number of attention heads."""
        return self.call.value.shape[1]

    def attention(
        self, receivers: Receivers
    ) -> Float[Tensor, "batch heads receivers sources"]:
        r""":math:`\alpha^h_{ij}` of a block of receivers, checked against the run.

        Args:
            receivers (slice or Tensor): the block.

        Returns:
            *Tensor* of shape (batch, heads, receivers, sources). Where it is made here
            from queries and keys, the receivers are last in memory, as the quadratic
            form over heads wants it.

        Raises:
            ReconstructionError: these attention weights do not give the attention
                output that the model computed.
        """
        call, unit = self.call, rounding_unit(self.call.value.dtype, self.hidden.dtype)
        limit = tolerance(unit, self.dtype, sum(call.value.shape[2:]))
        slack: float | Tensor = 1.0
        if call.weights is not None:
            rows = take(call.weights.transpose(1, 2), receivers).to(self.dtype)
            rows = rows.nan_to_num(nan=0.0)  # Of padding that attends to nothing.
            alpha = rows.permute(0, 2, 3, 1)
        else:
            assert call.query is not None
            assert call.key is not None
            query = take(call.query.transpose(1, 2), receivers).to(self.dtype)
            key = call.key.to(self.dtype)
            alpha = attention_weights(
                query.transpose(1, 2), key, self._mask_of(receivers), call.softmax_scale
            )
            # Rounding of a logit is that of the product, and exp makes it relative.
            largest = query.norm(dim=-1) * call.softmax_scale
            largest = largest.transpose(1, 2) * self._key_size
            slack = 1 + largest * (torch.finfo(self.dtype).eps / limit)
        rebuilt = self.value_probe @ alpha
        true = take(self.context_probe.permute(0, 3, 1, 2), receivers)
        true = true.permute(0, 2, 3, 1)
        check(
            self.names,
            "the attention output",
            (true - rebuilt[:, :, :-1]).norm(dim=2),
            2 * rebuilt[:, :, -1] * slack,
            take(self.token_mask, receivers)[:, None],
            limit,
        )
        return alpha.transpose(2, 3)

    @functools.cached_property
    def _key_size(self) -> Tensor:
        """The norm of the largest key of each head, (batch, heads, 1)."""
        assert self.call.key is not None
        key = self.call.key.to(self.dtype)
        largest: Tensor = key.norm(dim=-1).amax(-1, keepdim=True)
        return largest

    def examples(self, rows: slice) -> LayerRecord:
        """The record of some of the examples, sharing memory with this one.

        A part of a batch cannot be run again.
        """
        mask = self.call.mask
        return self._part(
            lambda tensor, *_: tensor[rows],
            mask if mask is None or len(mask) == 1 else mask[rows],
        )

    def narrowed(self, tokens: slice) -> LayerRecord:
        """The record of some tokens in turn, sharing memory with this one.

        It holds for receivers that attend to no other tokens. It cannot be run again.
        """
        mask = self.call.mask
        if mask is not None:
            mask = mask[..., tokens if mask.shape[2] > 1 else slice(None), tokens]

        def cut(tensor: Tensor, *dimensions: int) -> Tensor:
            every = range(tensor.ndim)
            return tensor[
                tuple(tokens if n in dimensions else slice(None) for n in every)
            ]

        return self._part(cut, mask)

    def _part(self, cut: Callable[..., Tensor], mask: Tensor | None) -> LayerRecord:
        """The record of a part of the examples or tokens.

        Args:
            cut (Callable): a tensor with the examples first, and the dimensions of its
                tokens → the part.
            mask (Tensor or None): that of the part.
        """
        call = self.call
        parts: dict[str, Any] = {
            name: cut(tensor, 2)
            for name, tensor in call.tensors.items()
            if name not in ("mask", "weights")
        }
        if call.weights is not None:
            parts["weights"] = cut(call.weights, 2, 3)
        return replace(
            self,
            call=call._replace(**parts, mask=mask),
            hidden=cut(self.hidden, 1),
            deviations={name: cut(s, 1) for name, s in self.deviations.items()},
            replay=_no_replay,
            hidden_probe=cut(self.hidden_probe, 2),
            value_probe=cut(self.value_probe, 3),
            context_probe=cut(self.context_probe, 3),
            token_mask=cut(self.token_mask, 1),
        )

    def _mask_of(self, receivers: Receivers) -> Tensor | None:
        """The mask of a block, (batch, heads, receivers, sources)."""
        mask = self.call.mask
        if mask is None or mask.shape[2] == 1:
            return mask
        mask = mask.transpose(1, 2).expand(len(self.hidden), -1, -1, -1)
        return take(mask, receivers).transpose(1, 2)


def _no_replay(*_: Any, **__: Any) -> Tensor:
    raise InputError(
        "a layer runs again with its whole batch, and this record is of some of its "
        "examples, or of several layers: declare the contribution with replays=True, "
        "and not with stacks=True."
    )


def joins_stack(layers: Sequence[LayerRecord], layer: LayerRecord) -> bool:
    """Whether a layer has the layout of others, so that ``stacked`` takes all."""

    def layout(layer: LayerRecord) -> object:
        tensors = {"hidden": layer.hidden, **layer.call.tensors}.items()
        shapes = [(name, t.shape, t.dtype) for name, t in tensors]
        return (shapes, list(layer.deviations), layer.call.softmax_scale)

    weights = [x.weights for x in (*layers, layer)]
    alike = layout(layer) == layout(layers[0])
    return alike and LayerWeights.together(weights) is not None


def stacked(layers: Sequence[LayerRecord]) -> LayerRecord:
    """Several layers of one layout in one record; of one layer its own.

    Args:
        layers (sequence of LayerRecord): in turn.
    """
    if len(layers) == 1:
        return layers[0]
    weights = LayerWeights.together([layer.weights for layer in layers])
    assert weights is not None
    calls = [layer.call for layer in layers]

    def several(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat(list(tensors))

    parts: dict[str, Any] = {
        name: several(call.tensors[name] for call in calls)
        for name in calls[0].tensors
        if name not in ("mask", "context")
    }
    mask, batch = calls[0].mask, len(layers[0].hidden)
    if mask is not None and (len(mask) > 1 or any(c.mask is not mask for c in calls)):
        masks = (call.mask for call in calls if call.mask is not None)
        parts["mask"] = several(mask.expand(batch, -1, -1, -1) for mask in masks)
    return replace(
        layers[0],
        names=tuple(layer.name for layer in layers),
        call=calls[0]._replace(**parts),
        hidden=several(layer.hidden for layer in layers),
        deviations={
            name: several(layer.deviations[name] for layer in layers)
            for name in layers[0].deviations
        },
        weights=weights,
        replay=_no_replay,
        hidden_probe=several(layer.hidden_probe for layer in layers),
        value_probe=several(layer.value_probe for layer in layers),
        context_probe=several(layer.context_probe for layer in layers),
        versions=tuple(version for layer in layers for version in layer.versions),
        token_mask=layers[0].token_mask.repeat(len(layers), 1),
    )


def probed(vectors: Float[Tensor, "*heads tokens size"]) -> Tensor:
    """Vectors in a few random directions, and as a last row their size there.

    Args:
        vectors (Tensor): (..., tokens, size).

    Returns:
        *Tensor* of shape (..., directions + 1, tokens).
    """
    size = vectors.norm(dim=-1) * _DIRECTIONS**0.5
    return torch.cat([head_signs(vectors).T @ vectors.mT, size[..., None, :]], -2)


def head_signs(like: Tensor) -> Tensor:
    """The random directions for vectors of this size, (size, directions)."""
    return random_signs(like.shape[-1], _DIRECTIONS, like.dtype, like.device)


class Grid(NamedTuple):
    """The patches of an image: an encoder's last tokens, row by row.

    Args:
        rows (int): how many, from top to bottom.
        columns (int): how many, from left to right.
        height (float): the share of the image's height that they cover; what makes no
            whole patch is left over at the bottom.
        width (float): likewise of its width, from the left.
    """

    rows: int
    columns: int
    height: float = 1.0
    width: float = 1.0


@dataclass(frozen=True)
class Readout:
    """How much is read of every hidden state.

    Args:
        weights (dict[int, Tensor]): layer → (batch, tokens), how much of each token of
            the layer's output; 0 is the output of the embeddings. Of a head they are
            shares, which sum to 1 in an example, and the last layer is always there.
        receivers (Tensor or None): (batch, 1), the tokens of the highest layer that are
            read, where it is one of each example; None: several.
    """

    weights: dict[int, Float[Tensor, "batch tokens"]]
    receivers: Int[Tensor, "batch 1"] | None

    @classmethod
    def of_tokens(
        cls, layers: int, index: Tensor, tokens: int, dtype: torch.dtype
    ) -> Readout:
        """One token of the last layer of each example, (batch)."""
        positions = torch.arange(tokens, device=index.device)
        weights = (positions == index[:, None]).to(dtype)
        return cls({layers: weights}, index[:, None])


def check_unchanged(layers: Sequence[LayerRecord]) -> None:
    """Raise where tensors of a run have been written to since.

    Args:
        layers (sequence of LayerRecord): the layers of a run.

    Raises:
        InputError: a tensor has been.
    """
    most = most_at_once(layers[0].hidden.numel())
    groups = grouped(layers, lambda group, x: len(group) < most and _alike(group[0], x))
    current = [all(v.is_current for v in layer.versions) for layer in layers]

    def judge(changes: list[float]) -> None:
        for layer, change, is_current in zip(layers, changes, current, strict=True):
            # Sums in another order; what is written is far more than rounding.
            limit = 16 * tolerance(0.0, layer.dtype, layer.hidden.shape[-1])
            if not (change <= limit and is_current):
                raise InputError(
                    f"layer {layer.name!r}: tensors of its run were changed in place "
                    "after it, by forward_func or later, so that they are no longer "
                    "what the layer computed with. Change copies (tensor.clone()) "
                    "instead."
                )

    check_later(concatenated([_changes(group) for group in groups]), judge)


def _alike(layer: LayerRecord, other: LayerRecord) -> bool:
    """Whether the tensors that are compared have the same shapes."""
    first, second = (
        [(t.shape, t.dtype) for t in (record.hidden, record.call.value)]
        for record in (layer, other)
    )
    return first == second


def _changes(group: Sequence[LayerRecord]) -> Tensor:
    """How much the kept tensors of each layer differ from those of the run, (layers).

    Writing through ``tensor.data`` or numpy bumps no version, so values are compared,
    too.
    """
    dtype, probes = group[0].dtype, group[0].weights.probes
    with torch.no_grad(), torch.autocast(probes.device.type, enabled=False):
        hidden = stack([layer.hidden for layer in group]).to(dtype) @ probes[:, 0]
        value = stack([layer.call.value for layer in group]).to(dtype)
        value = value @ head_signs(value)[:, 0]
        pairs = (
            (hidden, stack([layer.hidden_probe for layer in group])[:, :, 0]),
            (value, stack([layer.value_probe for layer in group])[..., 0, :]),
        )
        changes = [_largest(now - then) / _largest(then) for now, then in pairs]
        return torch.maximum(*(c.nan_to_num(0.0, posinf=torch.inf) for c in changes))


def _largest(values: Tensor) -> Tensor:
    """The largest size in each layer, (layers)."""
    over = tuple(range(1, values.ndim))
    largest: Tensor = torch.linalg.vector_norm(values, torch.inf, over)
    return largest
