r"""Attention, observed as it runs.

A :class:`torch.overrides.TorchFunctionMode` sees the operations of unmodified code in
one thread and changes nothing. Attention shows there in one of two ways: as a call of
``scaled_dot_product_attention`` with its queries, keys, mask and scale, or as a product
of attention weights, rows that are not negative and sum to one, with the values.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from captum_globenc.errors import InputError, UnsupportedModelError

_SDPA = "scaled_dot_product_attention"
_MULTIHEAD = "multi_head_attention_forward"
_ATTENTION = {_SDPA, _MULTIHEAD, "matmul", "__matmul__", "bmm", "einsum"}


class AttentionCall(NamedTuple):
    """One attention of a layer.

    Either ``weights`` is there, made by the model itself, or ``query`` and ``key``, of
    which :meth:`attention` makes them again.

    Args:
        value (Tensor): (batch, heads, sources, head size), repeated where several heads
            share one.
        context (Tensor): the attention's output, (batch, heads, receivers, head size).
        weights (Tensor or None): (batch, heads, receivers, sources).
        query (Tensor or None): (batch, heads, receivers, head size).
        key (Tensor or None): (batch, heads, sources, head size).
        mask (Tensor or None): boolean (True: attended) or added to the logits.
        softmax_scale (float): factor of the logits.
    """

    value: Tensor
    context: Tensor
    weights: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    mask: Tensor | None = None
    softmax_scale: float = 1.0

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by their names."""
        named = self._asdict().items()
        return {name: value for name, value in named if isinstance(value, Tensor)}

    def attention(self) -> Tensor:
        """The attention weights, (batch, heads, receivers, sources)."""
        if self.weights is not None:
            return self.weights
        return attention_weights(self.query, self.key, self.mask, self.softmax_scale).mT  # type: ignore[arg-type]


def attention_weights(
    query: Tensor, key: Tensor, mask: Tensor | None, softmax_scale: float
) -> Tensor:
    """The softmax over sources, receivers last in memory.

    Args:
        query (Tensor): (batch, heads, receivers, head size).
        key (Tensor): (batch, heads, sources, head size).
        mask (Tensor or None): boolean (True: attended) or added to the logits; it
            broadcasts to (batch, heads, receivers, sources).
        softmax_scale (float): factor of the logits.

    Returns:
        *Tensor* of shape (batch, heads, sources, receivers). A receiver from which
        every source is hidden takes nothing.
    """
    logits = key @ (query * softmax_scale).mT
    if mask is None:
        return logits.softmax(2)
    mask = mask.mT
    hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
    if mask.dtype != torch.bool:
        logits += mask
    weights = logits.masked_fill_(hidden, -torch.inf).softmax(2)
    return weights.masked_fill_(hidden.all(2, keepdim=True), 0)


class AttentionMode(TorchFunctionMode):
    """Hand every attention of the calling thread to :meth:`attend`.

    Subclasses say with :meth:`attending` when a layer attends, and with what shape.
    """

    def attending(self) -> tuple[int, int] | None:
        """(batch, tokens) of the layer that attends now; None: not in a layer."""
        raise NotImplementedError

    def project(self, value: Tensor) -> None:
        """Take note of what the values are made of, (tokens, batch, hidden)."""

    def is_attention(self, sums_to_one: Tensor) -> bool:
        """Whether a product is attention, by its first operand (a boolean)."""
        return bool(sums_to_one)

    def attend(self, call: AttentionCall) -> Tensor | None:
        """Take note of an attention; what is returned takes its output's place."""
        raise NotImplementedError

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation, and look whether it is attention."""
        name = getattr(func, "__name__", "")
        if name in _ATTENTION:
            shape = self.attending()
            if shape is not None and not torch.compiler.is_compiling():
                return self._run_attention(func, name, shape, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _run_attention(
        self,
        func: Callable[..., Any],
        name: str,
        shape: tuple[int, int],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if name == _MULTIHEAD:
            self.project(args[2] if len(args) > 2 else kwargs["value"])
            with self:
                return transparent(func)(*args, **kwargs)
        if name == _SDPA:
            return self._sdpa(func, shape, *args, **kwargs)
        result = func(*args, **kwargs)
        args = (*args, *kwargs.values())
        call = _from_product(name, args, result, shape, self.is_attention)
        replaced = None if call is None else self.attend(call)
        return result if replaced is None else _laid_out(replaced, name, args, result)

    def _sdpa(
        self,
        func: Callable[..., Tensor],
        shape: tuple[int, int],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p > 0:
            raise UnsupportedModelError(
                f"the model attends with dropout {dropout_p:g}, though it is in "
                "evaluation mode: its attention must not depend on chance."
            )
        if attn_mask is not None:
            _check_mask(attn_mask, query, key)
        context = func(
            query,
            key,
            value,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            **({"enable_gqa": True} if enable_gqa else {}),
        )
        if is_causal:
            attn_mask = _causal_mask(query.shape[-2], key.shape[-2], query.device)
        if attn_mask is not None and attn_mask.ndim < 4:
            attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
        # Autocast brings what goes in to one dtype, inside of the call.
        parts = [t.to(context.dtype) for t in (query, key, value, context)]
        if query.ndim == 3 and len(query) % shape[0] == 0:
            parts = [t.unflatten(0, (shape[0], -1)) for t in parts]
        heads = parts[0].shape[1]
        parts = [
            t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], 1)
            for t in parts
        ]
        replaced = self.attend(
            AttentionCall(
                parts[2],
                parts[3],
                query=parts[0],
                key=parts[1],
                mask=attn_mask,
                softmax_scale=query.shape[-1] ** -0.5 if scale is None else scale,
            )
        )
        return context if replaced is None else replaced.reshape(context.shape)


# How such a function asks whether to hand itself to a mode.
_ASKS = (
    "has_torch_function",
    "has_torch_function_unary",
    "has_torch_function_variadic",
)


def transparent(func: Callable[..., Any]) -> Callable[..., Any]:
    """The same Python function, which does not hand itself to a mode.

    Functions of torch that are written in Python are seen as one call. Run like this,
    with torch's own code and its own names but these, what is inside is seen, too.
    """
    if not isinstance(func, types.FunctionType):
        return func
    names = {**func.__globals__, **dict.fromkeys(_ASKS, lambda *_: False)}
    copy = types.FunctionType(
        func.__code__, names, func.__name__, func.__defaults__, func.__closure__
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def _from_product(
    name: str,
    args: tuple[Any, ...],
    result: Tensor,
    shape: tuple[int, int],
    is_attention: Callable[[Tensor], bool],
) -> AttentionCall | None:
    """The attention that a product is, None for any other product."""
    operands = _operands(name, args)
    if operands is None:
        return None
    batch, tokens = shape
    weights, value = operands
    if not (
        weights.ndim >= 3
        and weights.shape[-2:] == (tokens, tokens)
        and weights.is_floating_point()
        and is_attention(_rows_sum_to_one(weights))
    ):
        return None
    if name == "einsum":
        result = result.permute(_einsum_order(args))
    parts = [weights, value, result]
    # Heads that share values, as (batch, heads, ...) or (batch × heads, ...).
    leading = torch.broadcast_shapes(*(part.shape[:-2] for part in parts))
    try:
        weights, value, context = (
            part.expand(*leading, *part.shape[-2:]).reshape(
                batch, -1, tokens, part.shape[-1]
            )
            for part in parts
        )
    except RuntimeError:
        raise UnsupportedModelError(
            f"attention weights of shape {tuple(parts[0].shape)} multiply values of "
            f"shape {tuple(parts[1].shape)}, and (batch, heads, tokens, tokens) and "
            f"(batch, heads, tokens, head size) of {batch} by {tokens} tokens are "
            "expected."
        ) from None
    return AttentionCall(value, context, weights=weights)


def _operands(name: str, args: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
    """Weights (..., receivers, sources) and values (..., sources, head size)."""
    if name != "einsum":
        first, second = args[:2]
        if not isinstance(second, Tensor) or min(first.ndim, second.ndim) < 3:
            return None
        return first, second
    letters = _letters(args)
    if letters is None:
        return None
    (first, second), (weights, value, out) = args[1:3], letters
    roles = _roles(weights, value, out)
    if roles is None:
        return None
    shared, (i, j, d) = roles
    return (
        first.permute([weights.index(c) for c in (*shared, i, j)]),
        second.permute([value.index(c) for c in (*shared, j, d)]),
    )


def _letters(args: tuple[Any, ...]) -> tuple[str, str, str] | None:
    """The subscripts of an einsum of two tensors."""
    if len(args) != 3 or not isinstance(args[0], str) or "->" not in args[0]:
        return None
    inputs, out = args[0].replace(" ", "").split("->")
    terms = inputs.split(",")
    if len(terms) != 2 or "." in args[0]:
        return None
    return terms[0], terms[1], out


def _roles(
    weights: str, value: str, out: str
) -> tuple[str, tuple[str, str, str]] | None:
    """Batch and head letters, and those of receivers, sources and head size."""
    shared = "".join(c for c in weights if c in value and c in out)
    receivers = [c for c in weights if c in out and c not in value]
    sources = [c for c in weights if c in value and c not in out]
    size = [c for c in value if c in out and c not in weights]
    if (len(receivers), len(sources), len(size)) != (1, 1, 1):
        return None
    return shared, (receivers[0], sources[0], size[0])


def _einsum_order(args: tuple[Any, ...]) -> list[int]:
    """The dimensions of an attention's result as (batch, heads, receivers, size)."""
    letters = _letters(args)
    assert letters is not None
    roles = _roles(*letters)
    assert roles is not None
    (shared, (i, _, d)), out = roles, letters[2]
    return [out.index(c) for c in (*shared, i, d)]


def _laid_out(
    context: Tensor, name: str, args: tuple[Any, ...], result: Tensor
) -> Tensor:
    """A context (batch, heads, receivers, head size) as the product would give it."""
    if name != "einsum":
        return context.reshape(result.shape)
    order = _einsum_order(args)
    shape = [result.shape[dimension] for dimension in order]
    back = [order.index(dimension) for dimension in range(result.ndim)]
    return context.reshape(shape).permute(back)


def _rows_sum_to_one(weights: Tensor) -> Tensor:
    """Whether rows are attention weights, a boolean.

    A row from which everything is hidden is all zero, or not a number.
    """
    total = weights.sum(-1, dtype=torch.promote_types(weights.dtype, torch.float32))
    limit = 4 * max(torch.finfo(weights.dtype).eps, 1e-6)
    fits = ((total - 1).abs() <= limit) | (total == 0) | total.isnan()
    return fits.all() & ~(weights < 0).any() & ~total.isnan().all()


# Causal masks that are in use: the layers of a run share one.
_CAUSAL: WeakValueDictionary[tuple[int, int, torch.device], Tensor] = (
    WeakValueDictionary()
)


def _causal_mask(receivers: int, sources: int, device: torch.device) -> Tensor:
    """True where a receiver comes after a source, (1, 1, receivers, sources)."""
    key = (receivers, sources, device)
    mask = _CAUSAL.get(key)
    if mask is None:
        with torch.inference_mode(False):
            square = torch.ones(receivers, sources, dtype=torch.bool, device=device)
            mask = _CAUSAL[key] = square.tril()[None, None]
    return mask


def _check_mask(mask: Tensor, query: Tensor, key: Tensor) -> None:
    """Raise where a mask does not fit scaled dot-product attention."""
    full = (*query.shape[:-1], key.shape[-2])
    sizes = (1,) * (len(full) - mask.ndim) + tuple(mask.shape)
    fits = len(sizes) == len(full) and all(
        size in (1, most) for size, most in zip(sizes, full)
    )
    # A mask of one source for all would hide or show everything: a mistake.
    if not fits or mask.shape[-1] != key.shape[-2]:
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
