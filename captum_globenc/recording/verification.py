r"""Do the recorded parts rebuild the layer?

Every identity that the scores rest on is tested on every run, for every token, in a few
random directions :math:`p` of the hidden space: :math:`\langle p, \text{true} \rangle`
against the sum of :math:`\langle p, \text{part} \rangle`. A part that is missing or
wrong changes these with probability one, and the test costs next to nothing.

A deviation is measured against what rounding explains at that token: the rounding unit
of the coarsest dtype, times the sum of the sizes of the parts there. Large values
elsewhere do not count.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from captum_globenc.deferred import check_later
from captum_globenc.errors import ReconstructionError
from captum_globenc.recording.grouping import concatenated, grouped, most_at_once

# What deviations of correct layers stay below, of sums over n numbers: so many rounding
# units of what the model computed in, and so many times the root of n of what is
# computed here. Measured: at most 0.8 and 0.6.
_MODEL_UNITS = 1.25
_OWN_UNITS = 1.5
# What an identity has at most: what it is about, and three parts.
_TERMS = 4


@functools.lru_cache(maxsize=256)
def tolerance(unit: float, dtype: torch.dtype, terms: int) -> float:
    """The largest relative deviation that rounding explains.

    Args:
        unit (float): the rounding unit of what the model computed.
        dtype (torch.dtype): in which its parts are put together again.
        terms (int): how many numbers a sum has.
    """
    root: float = terms**0.5
    return _MODEL_UNITS * unit + _OWN_UNITS * root * torch.finfo(dtype).eps


def rounding_unit(*dtypes: torch.dtype) -> float:
    """The distance of 1 to the next number in the coarsest of the dtypes."""
    units = [torch.finfo(dtype).eps for dtype in dtypes]
    if torch.get_float32_matmul_precision() != "highest" and torch.float32 in dtypes:
        # The model's own products may then be rounded to 10 bits.
        units.append(2.0**-10)
    return max(units)


class Fit(NamedTuple):
    """How well a part of a layer is rebuilt.

    Args:
        layer (str): the layer's name in the model.
        part (str): which identity of the layer.
        deviation (float): the largest one, relative to the sizes of the parts.
        limit (float): the largest one that rounding explains.
    """

    layer: str
    part: str
    deviation: float
    limit: float

    @property
    def is_within_tolerance(self) -> bool:
        """Whether rounding explains the deviation."""
        return self.deviation <= self.limit

    def raise_if_not(self) -> None:
        """Raise where rounding does not explain the deviation."""
        if not self.is_within_tolerance:
            raise ReconstructionError(*self)


class Identity(NamedTuple):
    """What must be the sum of its parts in a layer, in random directions.

    Args:
        part (str): what it is, for the error.
        true (str): the name of its projections.
        parts (tuple[str, ...]): those of its parts, which sum to it; three at most.
        unit (float): the rounding unit of what the model computed.
        size (str): the name of the size of parts that cancel inside one; "": none do.
    """

    part: str
    true: str
    parts: tuple[str, ...]
    unit: float
    size: str = ""


def fits(
    layers: Sequence[str],
    steps: Sequence[Mapping[str, Tensor]],
    identities: Sequence[Identity],
    token_mask: Tensor,
    hidden: int,
    keep: Callable[[list[Fit]], None],
) -> None:
    """How well identities hold.

    Args:
        layers (sequence of str): the layers' names in the model.
        steps (sequence of Mapping[str, Tensor]): of each layer, the projections by
            their names, (batch, ..., directions, tokens), and sizes (batch, tokens).
        identities (sequence of Identity): of these layers.
        token_mask (Tensor): (batch, tokens), False at padding, which does not count.
        hidden (int): the hidden size.
        keep (Callable): is given the fits, one for each layer and identity, once their
            numbers are read.
    """
    dtype = steps[0][identities[0].true].dtype

    def joins(group: list[Identity], identity: Identity) -> bool:
        first, true = (steps[0][one.true] for one in (group[0], identity))
        most = most_at_once(len(steps) * _TERMS * first.numel())
        return len(group) < most and true.shape == first.shape

    relative = [
        _deviations(steps, group, token_mask) for group in grouped(identities, joins)
    ]

    def judge(largest: list[float]) -> None:
        pairs = itertools.product(identities, layers)
        keep(
            [
                Fit(layer, identity.part, deviation, limit(identity.unit))
                for (identity, layer), deviation in zip(pairs, largest, strict=True)
            ]
        )

    limit = functools.partial(tolerance, dtype=dtype, terms=hidden)
    check_later(concatenated(relative), judge)


def _deviations(
    steps: Sequence[Mapping[str, Tensor]],
    identities: Sequence[Identity],
    token_mask: Tensor,
) -> Tensor:
    """The largest relative deviations, (identities, layers)."""
    zero = torch.zeros_like(steps[0][identities[0].true])
    shape = (len(identities), _TERMS, len(steps))
    terms = torch.stack(
        [
            step[name] if name else zero
            for identity in identities
            for name, _ in itertools.zip_longest(
                (identity.true, *identity.parts), range(_TERMS), fillvalue=""
            )
            for step in steps
        ]
    ).unflatten(0, shape)
    deviation = _norm(terms[:, 0] - terms[:, 1:].sum(1))
    size = _norm(terms).sum(1)
    if any(identity.size for identity in identities):
        no_size = zero.flatten(1, -2)[:, 0]
        sizes = [
            step[identity.size] if identity.size else no_size
            for identity in identities
            for step in steps
        ]
        size = size + torch.stack(sizes).unflatten(0, (shape[0], shape[2]))
    mask = token_mask if deviation.ndim == 4 else token_mask[:, None]
    return _relative(deviation, size, mask).flatten(2).amax(2)


def _norm(values: Tensor) -> Tensor:
    """Over the directions; the last dimension is the fast one."""
    return values.square().sum(-2).sqrt()


def check(
    layers: Sequence[str],
    part: str,
    deviation: Tensor,
    size: Tensor,
    token_mask: Tensor,
    limit: float,
) -> None:
    """Raise where deviations are larger than rounding explains.

    Args:
        layers (sequence of str): the layers' names in the model.
        part (str): what is compared, for the error.
        deviation (Tensor): (layers × batch, ..., tokens).
        size (Tensor): likewise, the sum of the sizes of the parts.
        token_mask (Tensor): broadcasts to them, False at padding.
        limit (float): the largest relative deviation that rounding explains.

    Raises:
        ReconstructionError: a deviation is larger, or not a number.
    """
    relative = _relative(deviation, size, token_mask).view(len(layers), -1)

    def judge(largest: list[float]) -> None:
        for layer, deviation in zip(layers, largest, strict=True):
            Fit(layer, part, deviation, limit).raise_if_not()

    check_later(relative.amax(1), judge)


def _relative(deviation: Tensor, size: Tensor, token_mask: Tensor) -> Tensor:
    """Relative deviations, 0 at padding."""
    # Nothing is off by nothing, also of nothing; NaN is off by any measure.
    relative = (deviation / size).masked_fill(deviation == 0, 0)
    # Filled, not multiplied: what padding holds may not even be a number.
    relative = relative.masked_fill(~token_mask, 0)
    return relative.nan_to_num(nan=torch.inf, posinf=torch.inf)
