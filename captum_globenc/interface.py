"""The attention that an encoder runs with while it is recorded.

Whatever a model is made of, its layers attend by
``torch.nn.functional.scaled_dot_product_attention``, and the recorder of the calling
thread is told what goes in there: queries and keys after any rotation, the mask with
any bias. For models of transformers an attention function that calls it is registered
with ``transformers.AttentionInterface``, and a mask function beside it: without one,
padding would silently be attended. ``torch.nn.MultiheadAttention`` calls it where
torch's fused kernels are switched off and no attention weights are wanted.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from captum_globenc.errors import InputError, UnsupportedModelError

_NAME = "captum_globenc"
# Arguments with which an attention function computes more than softmax(QK + mask)V.
_FOREIGN: tuple[str, ...] = ("softcap", "s_aux", "head_mask")
# What torch.nn.MultiheadAttention takes after query, key, value and padding mask.
_MULTIHEAD_OPTIONS = ("need_weights", "attn_mask", "average_attn_weights", "is_causal")
# Older releases of transformers would leave the bias out without a word.
if "position_bias" not in inspect.signature(sdpa_attention_forward).parameters:
    _FOREIGN += ("position_bias",)


class Attended(NamedTuple):
    """One call of scaled dot-product attention.

    Args:
        query (Tensor): (batch, heads, receivers, head size).
        key (Tensor): (batch, heads, sources, head size), repeated where several heads
            share one.
        value (Tensor): likewise.
        mask (Tensor or None): boolean (True: attended) or added to the logits.
        scaling (float): factor of the logits.
        context (Tensor): what came out, (batch, heads, receivers, head size).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    context: Tensor

    def weights(self) -> Tensor:
        """The attention weights, (batch, heads, receivers, sources)."""
        logits = self.query @ self.key.mT * self.scaling
        if self.mask is not None:
            if self.mask.dtype == torch.bool:
                logits = logits.masked_fill(~self.mask, -torch.inf)
            else:
                logits = logits + self.mask
        return logits.softmax(-1)


class Listener(Protocol):
    """Who is told of every call of scaled dot-product attention."""

    has_begun: bool
    """Whether the first layer has begun."""

    @property
    def is_waiting(self) -> bool:
        """Whether a layer is about to attend."""

    def attend(self, call: Attended) -> None:
        """Hear what went in, and what came out."""

    def overhear(self) -> None:
        """Hear that something else attended."""


class Active(threading.local):
    """The listener of each thread."""

    listener: Listener | None = None


ACTIVE = Active()


@contextmanager
def listening() -> Iterator[None]:
    """Tell the thread's listener of calls of torch's scaled dot-product attention.

    Calls of other threads, which find the same function, go through.
    """
    original = functional.scaled_dot_product_attention

    def heard(*args: Any, **kwargs: Any) -> Tensor:
        context: Tensor = original(*args, **kwargs)
        listener = ACTIVE.listener
        if listener is not None and listener.is_waiting:
            listener.attend(_call(context, *args, **kwargs))
        elif listener is not None:
            listener.overhear()
        return context

    with attending_by(heard):
        yield


@contextmanager
def attending_by(function: Callable[..., Tensor]) -> Iterator[None]:
    """Let this function take the place of torch's scaled dot-product attention."""
    original = functional.scaled_dot_product_attention
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        functional.scaled_dot_product_attention = function
        yield
    finally:
        functional.scaled_dot_product_attention = original
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def weightless(attention: nn.Module, heard: Callable[[], Attended]) -> Iterator[None]:
    """Let ``torch.nn.MultiheadAttention`` attend as if nobody wanted its weights.

    With weights it would not call scaled dot-product attention. Who asks for them gets
    them all the same, from what was heard.

    Args:
        attention (nn.Module): any other kind of module is left alone.
        heard (callable): gives the module's last call.
    """
    if not isinstance(attention, nn.MultiheadAttention):
        yield
        return
    wanted: list[bool] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if ACTIVE.listener is None:
            return None  # another thread's call
        given = {**dict(zip(_MULTIHEAD_OPTIONS, args[4:])), **kwargs}
        wanted[:] = [
            given.pop("need_weights", True),
            given.pop("average_attn_weights", True),
        ]
        return args[:4], {**given, "need_weights": False}

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        if ACTIVE.listener is None or not wanted[0]:
            return output
        weights = heard().weights()
        return output[0], weights.mean(1) if wanted[1] else weights

    with ExitStack() as undo:
        before = attention.register_forward_pre_hook(enter, with_kwargs=True)
        undo.callback(before.remove)
        # In front of the hooks of others: they see what they would have seen.
        after = attention.register_forward_hook(leave, prepend=True)
        undo.callback(after.remove)
        yield


def _call(
    context: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Attended:
    """A call from the arguments that torch's function has."""
    if enable_gqa:
        key, value = (
            t.repeat_interleave(query.shape[-3] // t.shape[-3], -3)
            for t in (key, value)
        )
    if is_causal:
        square = query.new_ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
        attn_mask = square.tril()
    if dropout_p > 0:
        raise UnsupportedModelError(
            f"the model attends with dropout {dropout_p:g}, though it is in evaluation "
            "mode: its attention must not depend on chance."
        )
    if attn_mask is not None and attn_mask.ndim < 4:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    # Autocast brings what goes in to one dtype, inside of the call.
    query, key, value = (t.to(context.dtype) for t in (query, key, value))
    return Attended(
        query,
        key,
        value,
        attn_mask,
        query.shape[-1] ** -0.5 if scale is None else scale,
        context,
    )


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
    """The attention function: torch's own fast one, where it is all that there is."""
    foreign = [name for name in _FOREIGN if kwargs.get(name) is not None]
    if foreign:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends with {', '.join(foreign)}, which is no "
            "plain softmax over values and cannot be decomposed."
        )
    if attention_mask is not None:
        _check_mask(attention_mask, query, key)
    output: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )
    return output


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
