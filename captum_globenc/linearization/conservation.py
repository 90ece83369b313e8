"""The relevance of an output is that of the inputs and of constants: a check."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from captum_globenc.errors import ConservationError


def check_conservation(
    selected: Tensor,
    leaves: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    taken: Sequence[Tensor],
    dtypes: Collection[torch.dtype],
    where: str,
) -> None:
    """Raise where the relevance of the outputs is not that of inputs and constants.

    Args:
        selected (Tensor): the explained outputs, (batch).
        leaves (sequence of Tensor): inputs and biases.
        gradients (sequence of Tensor or None): theirs, by the rules; None is 0.
        taken (sequence of Tensor): relevance that ends inside, a number each.
        dtypes (collection of torch.dtype): in which numbers the model computes.
        where (str): where relevance may be lost, for the error.

    Raises:
        ConservationError: it is not.
    """
    wide = torch.float64 if selected.dtype == torch.float64 else torch.float32
    pairs: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for gradient, leaf in zip(gradients, leaves):
        if gradient is not None:
            pairs.setdefault(leaf.device, []).append((gradient, leaf))
    device = selected.device
    parts = [_products(of_device, wide) for of_device in pairs.values()]
    zero = torch.zeros((), dtype=wide, device=device)
    total = sum((part.sum().to(device) for part in parts), zero)
    size = sum((part.abs().sum().to(device) for part in parts), zero)
    kept = torch.stack([zero, *(t.to(device, wide) for t in taken)])
    output = selected.detach().to(wide)
    error = (output.sum() - total - kept.sum()).abs()
    size = size + kept.abs().sum() + output.abs().sum()
    limit = max(_LIMITS.get(dtype, 0.0) for dtype in dtypes)
    relative = float(error / size) if float(size) else 0.0
    if not relative <= limit:
        raise ConservationError(where, relative, limit)


def _products(pairs: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """Gradients times values, all side by side: a model has hundreds of biases."""
    gradients, values = (
        torch.cat([tensor.flatten() for tensor in side]).to(dtype)
        for side in zip(*pairs)
    )
    # A mask of minus infinity is a constant without gradient.
    return gradients * values.masked_fill(gradients == 0, 0)


# Of the sizes of all parts of relevance: far above what rounding makes of it.
_LIMITS = {
    torch.float64: 1e-6,  # Models compute their softmax in float32.
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
