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

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from captum_globenc.errors import ReconstructionError

# What deviations of correct layers stay below, of sums over n numbers: so many rounding
# units of what the model computed in, and so many times the root of n of what is
# computed here. Measured: at most 0.8 and 0.6.
_MODEL_UNITS = 1.25
_OWN_UNITS = 1.5


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
    """What must be the sum of its parts in some layers, in random directions.

    Args:
        part (str): what it is, for the error.
        true (Tensor): (layers, batch, ..., directions, tokens).
        parts (tuple[Tensor, ...]): likewise; they sum to ``true``.
        unit (float): the rounding unit of what the model computed.
        size (Tensor or None): (layers, batch, ..., tokens), of parts that cancel inside
            one.
    """

    part: str
    true: Tensor
    parts: tuple[Tensor, ...]
    unit: float
    size: Tensor | None = None


def fits(
    layers: Sequence[str],
    identities: Sequence[Identity],
    token_mask: Tensor,
    hidden: int,
) -> list[Fit]:
    """How well identities hold.

    Args:
        layers (sequence of str): the layers' names in the model.
        identities (sequence of Identity): of these layers.
        token_mask (Tensor): (batch, tokens), False at padding, which does not count.
        hidden (int): the hidden size.

    Returns:
        *list[Fit]*, one for each layer and identity.
    """
    relative = []
    for identity in identities:
        first, *rest = identity.parts
        rebuilt = sum(rest, first)
        deviation = _norm(identity.true - rebuilt)
        sizes = [_norm(part) for part in (identity.true, *identity.parts)]
        size = sum(sizes[1:], sizes[0])
        if identity.size is not None:
            size = size + identity.size
        mask = token_mask if deviation.ndim == 3 else token_mask[:, None]
        relative.append(_relative(deviation, size, mask).flatten(1).amax(1))
    return [
        Fit(
            layer,
            identity.part,
            deviation,
            tolerance(identity.unit, identity.true.dtype, hidden),
        )
        for identity, deviations in zip(identities, torch.stack(relative).tolist())
        for layer, deviation in zip(layers, deviations)
    ]


def _norm(values: Tensor) -> Tensor:
    """Over the directions; the last dimension is the fast one."""
    return values.square().sum(-2).sqrt()


def check(
    layer: str,
    part: str,
    deviation: Tensor,
    size: Tensor,
    token_mask: Tensor,
    limit: float,
) -> None:
    """Raise where deviations are larger than rounding explains.

    Args:
        layer (str): the layer's name in the model.
        part (str): what is compared, for the error.
        deviation (Tensor): (batch, ..., tokens).
        size (Tensor): likewise, the sum of the sizes of the parts.
        token_mask (Tensor): broadcasts to them, False at padding.
        limit (float): the largest relative deviation that rounding explains.

    Raises:
        ReconstructionError: a deviation is larger, or not a number.
    """
    largest = float(_relative(deviation, size, token_mask).amax())
    Fit(layer, part, largest, limit).raise_if_not()


def _relative(deviation: Tensor, size: Tensor, token_mask: Tensor) -> Tensor:
    """Relative deviations, 0 at padding."""
    # Nothing is off by nothing, also of nothing; NaN is off by any measure.
    relative = (deviation / size).masked_fill(deviation == 0, 0)
    # Filled, not multiplied: what padding holds may not even be a number.
    relative = relative.masked_fill(~token_mask, 0)
    return relative.nan_to_num(nan=torch.inf, posinf=torch.inf)
