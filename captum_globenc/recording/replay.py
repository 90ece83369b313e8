"""Run one encoder layer again, on its own input or another, with another attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from captum_globenc.encoders.resolver import LayerModules
from captum_globenc.errors import UnsupportedModelError
from captum_globenc.recording.attention import AttentionCall, AttentionMode
from captum_globenc.recording.evaluation_mode import evaluating

#: An attention → what takes the place of its output, (batch, heads, receivers, size).
Attention = Callable[[AttentionCall], Tensor]


class _Replaced(AttentionMode):
    """Another attention, in the calling thread."""

    def __init__(self, attention: Attention, shape: tuple[int, int]) -> None:
        super().__init__()
        self.calls = 0
        self._attention = attention
        self._shape = shape

    def attending(self) -> tuple[int, int]:
        """(batch, tokens)."""
        return self._shape

    def attend(self, call: AttentionCall) -> Tensor:
        """What takes the place of the attention's output."""
        self.calls += 1
        return self._attention(call)


def replay(
    modules: LayerModules,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    batch_first: bool,
    autocast: torch.dtype | None,
    attention: Attention,
    hidden: Tensor | None = None,
) -> Tensor:
    """A layer's output, run again as it was called.

    Args:
        modules (LayerModules): the layer.
        args (tuple): what it was called with.
        kwargs (Mapping): likewise, by name.
        batch_first (bool): hidden states are (batch, tokens, hidden) in the model.
        autocast (torch.dtype or None): the dtype of the autocast in which the layer
            ran; None: it ran in none.
        attention (Callable): :class:`AttentionCall` → (batch, heads, receivers, head
            size), what takes the place of the attention's output.
        hidden (Tensor, optional): another input, (batch, tokens, hidden), of the same
            batch and number of tokens.

    Returns:
        *Tensor* of shape (batch, tokens, hidden).
    """
    original = hidden_states(args, kwargs)
    states = original if hidden is None else hidden
    if hidden is not None and not batch_first:
        states = hidden.transpose(0, 1)

    def replaced(value: Any) -> Any:
        # A cache of keys and values already holds those of the run.
        is_cache = hasattr(value, "get_seq_length")
        return states if value is original else (None if is_cache else value)

    args = tuple(map(replaced, args))
    kwargs = {name: replaced(value) for name, value in kwargs.items()}
    batch, tokens = states.shape[:2] if batch_first else states.shape[:2][::-1]
    mode = _Replaced(attention, (batch, tokens))
    precision = torch.autocast(
        states.device.type, dtype=autocast, enabled=autocast is not None
    )
    with torch.no_grad(), precision, evaluating(modules.layer), mode:
        output = modules.layer(*args, **kwargs)
    if mode.calls != 1:
        raise UnsupportedModelError(
            f"layer {modules.name!r} attended {mode.calls} times where it ran again, "
            "and once is expected."
        )
    output = first_tensor(output)
    return output if batch_first else output.transpose(0, 1)


def hidden_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states among the arguments of a layer."""
    if "hidden_states" in kwargs:
        return cast(Tensor, kwargs["hidden_states"])
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise UnsupportedModelError(
        "an encoder layer, or a part of one, is called without a tensor of its own "
        f"(got {[type(value).__name__ for value in args]}): its first tensor must be "
        "the hidden states."
    )


def first_tensor(output: Any) -> Tensor:
    """The hidden states in what a layer returns."""
    if isinstance(output, Mapping):
        output = next(iter(output.values()))
    return cast(Tensor, output[0] if isinstance(output, tuple | list) else output)
