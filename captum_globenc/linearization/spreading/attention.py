"""What attention puts down on the tape: a product of constant weights with values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_globenc.errors import UnsupportedModelError
from captum_globenc.linearization.operations import is_dependent
from captum_globenc.linearization.spreading.rows import Gather, Step, Unknown
from captum_globenc.linearization.spreading.steps import Linear, Mix
from captum_globenc.linearization.spreading.tape import Rule, Tape
from captum_globenc.recording.attention import attention_weights

_Function = Callable[..., Any]


def _sdpa(
    tape: Tape,
    func: _Function,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Scaled dot-product attention; its weights are made again, block by block."""
    if dropout_p > 0:
        raise UnsupportedModelError(
            f"the model attends with dropout {dropout_p:g}, and none is expected: put "
            "it in evaluation mode."
        )
    query, key = query.detach(), key.detach()
    mask = None if attn_mask is None else attn_mask.detach()
    options = {"enable_gqa": True} if enable_gqa else {}
    result = func(query, key, value, mask, 0.0, is_causal, scale=scale, **options)
    if not is_dependent(value):
        return result
    step, _ = tape.known(value)
    if isinstance(step, Unknown):
        return tape.note(result, step)
    if is_causal:
        square = query.new_ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
        mask = square.tril()
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    leading, places = result.shape[:-2], tape.places(value)
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key = key.repeat_interleave(times, -3)
        places = places.repeat_interleave(times, -3)
    wide = torch.promote_types(result.dtype, torch.float32)

    def weights(chosen: Tensor, receivers: Tensor) -> Tensor:
        q = _pick(query, leading, chosen)[:, receivers].to(wide)
        k = _pick(key, leading, chosen).to(wide)
        m = mask
        if m is not None:
            m = m.expand(*leading, query.shape[-2], key.shape[-2])
            m = _pick(m, leading, chosen)[:, receivers][:, None]
            m = m if m.dtype == torch.bool else m.to(wide)
        return attention_weights(q[:, None], k[:, None], m, factor)[:, 0].mT

    shape = (leading, query.shape[-2], key.shape[-2])
    return tape.note(result, _mixed(tape, weights, step, places, shape))


def _matmul(tape: Tape, func: _Function, first: Any, second: Any) -> Any:
    """A product with constants: of rows, or of weights with values."""
    left, right = first, second
    if func.__name__ == "__rmatmul__":
        left, right = second, first
    if is_dependent(left) == is_dependent(right):
        return None
    if is_dependent(left):
        if right.ndim != 2:
            return None
        operand = tape.gather(left)
        result = func(first, second)
        rows, width = result.numel() // result.shape[-1], result.shape[-1]
        linear = Linear(rows, width, tape.where, operand, right.T, None)
        return tape.note(result, linear)
    if min(left.ndim, right.ndim) < 2:
        return None
    step, _ = tape.known(right)
    result = func(first, second)
    if isinstance(step, Unknown):
        return tape.note(result, step)
    return tape.note(result, _product(tape, left, step, tape.places(right)))


def _einsum(tape: Tape, func: _Function, equation: Any, *operands: Any) -> Any:
    """A product of constants with one value that depends on tokens."""
    given = operands
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = tuple(operands[0])
    terms = _terms(equation, len(operands))
    if terms is None or is_dependent(operands[0]) == is_dependent(operands[1]):
        return None
    order = (0, 1) if is_dependent(operands[1]) else (1, 0)
    constant, value = (operands[index] for index in order)
    (weight, x), out = (terms[index] for index in order), terms[2]
    shared = [c for c in x if c in weight and c in out]
    summed = [c for c in x if c in weight and c not in out]
    new = [c for c in weight if c not in x and c in out]
    rest = [c for c in x if c not in weight and c in out]
    if len(shared + summed + new) != len(weight) or len(shared + summed + rest) != len(
        x
    ):
        return None
    result = func(equation, *given)
    step, _ = tape.known(value)
    if isinstance(step, Unknown):
        return tape.note(result, step)
    sizes = dict(zip(out, result.shape)) | dict(zip(x, value.shape))
    constant = constant.permute([weight.index(c) for c in (*shared, *new, *summed)])
    places = tape.places(value)
    if not shared and list(x[len(x) - len(summed) :]) == summed:
        # A linear map of each row.
        width = torch.Size(sizes[c] for c in summed).numel()
        places = places.reshape(-1, width)
        maps = constant.reshape(-1, width)
        step = Linear(
            len(places), len(maps), tape.where, Gather(step, places), maps, None
        )
        laid_out = [*rest, *new]
    else:
        places = places.permute([x.index(c) for c in (*shared, *summed, *rest)])
        places = places.flatten(len(shared), len(shared) + len(summed) - 1)
        places = places.flatten(len(shared) + 1)
        constant = constant.flatten(len(shared), len(shared) + len(new) - 1)
        constant = constant.flatten(len(shared) + 1)
        step = _product(tape, constant, step, places)
        laid_out = [*shared, *new, *rest]
    count = torch.Size(sizes[c] for c in laid_out)
    numbered = torch.arange(count.numel(), device=result.device).view(count)
    return tape.note(result, step, numbered.permute([laid_out.index(c) for c in out]))


def _terms(equation: Any, count: int) -> tuple[str, str, str] | None:
    """The letters of both operands and of the result."""
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return None
    inputs, out = equation.replace(" ", "").split("->")
    terms = inputs.split(",")
    return (terms[0], terms[1], out) if len(terms) == count == 2 else None


def _product(tape: Tape, constant: Tensor, step: Step, places: Tensor) -> Mix:
    """Weights (..., receivers, sources) times values (..., sources, width)."""
    leading = torch.broadcast_shapes(constant.shape[:-2], places.shape[:-2])

    def weights(chosen: Tensor, receivers: Tensor) -> Tensor:
        return _pick(constant, leading, chosen)[:, receivers]

    receivers, sources = constant.shape[-2:]
    return _mixed(tape, weights, step, places, (leading, receivers, sources))


def _mixed(
    tape: Tape,
    weights: Callable[[Tensor, Tensor], Tensor],
    step: Step,
    places: Tensor,
    shape: tuple[torch.Size, int, int],
) -> Mix:
    leading, receivers, sources = shape
    width = places.shape[-1]
    places = places.expand(*leading, sources, width).reshape(-1, width)
    count = leading.numel()
    return Mix(
        count * receivers,
        width,
        tape.where,
        Gather(step, places),
        (count, receivers, sources),
        weights,
    )


def _pick(value: Tensor, leading: torch.Size, chosen: Tensor) -> Tensor:
    """Some of the matrices of a tensor that broadcasts to (*leading, ...)."""
    value = value.expand(*leading, *value.shape[-2:])
    if not leading:
        return value[None]
    return value[torch.unravel_index(chosen, leading)]


#: Name of an operation → its rule.
ATTENTION_RULES: dict[str, Rule] = {
    "scaled_dot_product_attention": _sdpa,
    "einsum": _einsum,
    **dict.fromkeys(("matmul", "__matmul__", "__rmatmul__", "bmm", "mm"), _matmul),
}
