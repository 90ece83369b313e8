"""What forward_func returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from captum_globenc.errors import InputError


def output_tensor(output: Any) -> Tensor:
    """The logits: the output itself, or the first tensor of scores in it."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        named = {k: v for k, v in output.items() if k != "loss"}
        output = (named["logits"],) if "logits" in named else tuple(named.values())
    if isinstance(output, tuple | list):
        for value in output:
            if isinstance(value, Tensor) and value.ndim > 0:
                return value
    raise InputError(
        "forward_func must return a tensor or a Hugging Face output with one, got "
        f"{type(output).__name__}."
    )


def pooled_tensor(output: Any) -> Tensor | None:
    """What a bare encoder pools of its tokens, (batch, hidden), where it does."""
    pooled = output.get("pooler_output") if isinstance(output, Mapping) else None
    return pooled if isinstance(pooled, Tensor) else None
