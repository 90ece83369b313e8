"""The attention that an encoder runs with while it is recorded.

An attention function, registered with ``transformers.AttentionInterface``, computes
what torch's own fast one does and tells the recorder of the calling thread what went
in. A mask function is registered beside it: without one, padding would silently be
attended.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from captum_globenc.errors import InputError, UnsupportedModelError

_NAME = "captum_globenc"
# Arguments with which an attention function computes more than softmax(QK)V.
_FOREIGN = ("softcap", "s_aux", "position_bias", "head_mask")


class Listener(Protocol):
    """Who is told of every call of the attention function."""

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        context: Tensor,
    ) -> None:
        """Hear what the attention of ``module`` saw, and what it returns."""


class Active(threading.local):
    """The listener of each thread."""

    listener: Listener | None = None


ACTIVE = Active()


@contextmanager
def switched(modules: list[nn.Module]) -> Iterator[None]:
    """All attention inside an encoder of these modules through the function here."""
    configs: dict[int, Any] = {}
    waiting = [vars(module).get("config") for module in modules]
    while waiting:
        config = waiting.pop(0)
        if hasattr(config, "_attn_implementation") and id(config) not in configs:
            configs[id(config)] = config
            parts = getattr(config, "sub_configs", ())
            waiting += [getattr(config, name, None) for name in parts]
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = _NAME
        yield
    finally:
        # A config hands its setting down to its parts: in this order theirs come last.
        for config, implementation in before:
            config._attn_implementation = implementation


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: torch's own fast one, and a note of what went in."""
    foreign = [name for name in _FOREIGN if kwargs.get(name) is not None]
    if foreign:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends with {', '.join(foreign)}, which is no "
            "plain softmax over values and cannot be decomposed."
        )
    if attention_mask is not None:
        _check_mask(attention_mask, query, key)
    output = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    listener = ACTIVE.listener
    if listener is not None:
        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        causal = kwargs.get("is_causal")
        if causal is None:
            causal = getattr(module, "is_causal", True)
        if attention_mask is None and causal:
            # Without a mask a causal module leaves the masking to sdpa.
            square = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool)
            attention_mask = square.tril()[None, None]
        listener.attend(module, query, key, value, attention_mask, factor, output[0])
    return output  # type: ignore[no-any-return]


def _mask(
    *, batch_size: int, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """The mask function beside it: checks a mask that still is (batch, tokens)."""
    if attention_mask is not None:
        # Older releases name the queries by their positions in a cache.
        positions = kwargs.get("cache_position")
        tokens = kwargs["q_length"] if positions is None else len(positions)
        if tuple(attention_mask.shape) != (batch_size, tokens):
            raise InputError(
                f"the attention mask has shape {tuple(attention_mask.shape)}, and "
                f"(batch, tokens) = {(batch_size, tokens)} is expected."
            )
        check_attended(attention_mask.bool())
    return sdpa_mask(  # type: ignore[no-any-return]
        batch_size=batch_size, attention_mask=attention_mask, **kwargs
    )


# New names beside the built-in ones: no model uses them until it is switched to them.
AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)


def attended_tokens(mask: Tensor | None, query: Tensor) -> Tensor:
    """(batch, tokens): the sources that some receiver attends to."""
    batch, tokens = query.shape[0], query.shape[2]
    if mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=query.device)
    # What is added to hide a source differs (-inf, the dtype's lowest value, -10000);
    # exp(-1000) is 0 in every dtype.
    allowed = mask if mask.dtype == torch.bool else mask > -1000
    return allowed.any(1).any(1).expand(batch, tokens)


def check_attended(attended: Tensor) -> None:
    """Raise where no token of an example is attended, (batch, tokens)."""
    empty = (~attended.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise InputError(
            f"the attention mask of example {empty[0]} is all zero, so "
            "there is no token to explain."
        )


def _check_mask(mask: Tensor, query: Tensor, key: Tensor) -> None:
    batch, heads, receivers, _ = query.shape
    sources = key.shape[2]
    full = (batch, heads, receivers, sources)
    fits = mask.ndim == 4 and all(
        size in (1, most) for size, most in zip(mask.shape, full, strict=True)
    )
    # A mask of one source for all would hide or show everything: a mistake.
    if not fits or mask.shape[-1] != sources:
        raise InputError(
            f"the attention mask has shape {tuple(mask.shape)} in the encoder, which "
            f"does not fit (batch, heads, receivers, sources) = {full}."
        )
    if mask.dtype == torch.bool:
        return
    if not mask.is_floating_point():
        raise InputError(
            f"an attention mask of dtype {mask.dtype} is not understood: bool (True: "
            "attended) or floating point (added to the logits) is expected."
        )
    # Autocast brings the two together by itself.
    autocast = torch.is_autocast_enabled(query.device.type)
    if mask.dtype != query.dtype and not autocast:
        raise InputError(
            f"the attention mask is {mask.dtype} and the model computes in "
            f"{query.dtype}: an added mask must have the model's dtype."
        )
