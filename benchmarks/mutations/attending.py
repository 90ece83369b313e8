"""An attention function of one's own, as transformers calls it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.mutations.twin import tap


@dataclass
class Call:
    """What an attention function is given; heads that share values repeat them."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor
    scaling: float
    first: dict[str, Tensor]

    def logits(self, heat: float = 1.0) -> Tensor:
        """Products of queries and keys, the mask added."""
        return self.query @ self.key.mT * (self.scaling * heat) + self.mask

    def softmax(self) -> Tensor:
        """The plain attention weights."""
        return self.logits().softmax(-1)

    def product(self, alpha: Tensor, value: Tensor | None = None) -> Tensor:
        """Weights times values, which the twin is told of."""
        value = self.value if value is None else value
        tap(alpha, value)
        return alpha @ value


Attend = Callable[[Call], Tensor]


def attention_function(attend: Attend, only: int | None = None) -> Callable[..., Any]:
    """An attention function as transformers calls them.

    Args:
        attend (callable): makes the heads' outputs.
        only (int, optional): the layer in which it does; others attend as ever.
    """
    first: dict[str, Tensor] = {}

    def function(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        share = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(share, 1) for each in (key, value))
        mask = query.new_zeros(query.shape[-2], key.shape[-2])
        if attention_mask is not None:
            mask = mask + attention_mask
        elif getattr(module, "is_causal", False):
            mask = mask.masked_fill(torch.ones_like(mask).triu(1).bool(), -torch.inf)
        if position_bias is not None:
            mask = mask + position_bias
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if getattr(module, "layer_idx", 0) == 0:
            first.clear()
        call = Call(module, query, key, value, mask, scaling, first)
        if only in (None, getattr(module, "layer_idx", None)):
            output = attend(call)
        else:
            output = call.product(call.softmax())
        first.setdefault("value", value)
        return output.transpose(1, 2).contiguous(), None

    return function
