"""Which hidden states a head reads, and how much: by the gradient of its output."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from captum_globenc._captum import TargetType, select_targets
from captum_globenc.deferred import check_later, holds
from captum_globenc.encoders.architecture import Pooling
from captum_globenc.errors import InputError, UnsupportedModelError
from captum_globenc.recording.outputs import output_tensor

#: How the tokens that a head reads are found.
ReadoutKind = Literal["gradient", "pooling"]


def by_gradient(
    selected: Tensor,
    states: dict[int, Tensor],
    token_mask: Tensor,
    batch_dimension: int = 0,
) -> dict[int, Tensor] | None:
    r"""The share of every hidden state in what is read.

    The share of token :math:`i` is :math:`\|\partial y / \partial x_i\|`, divided by
    the sum over all tokens of the example.

    Args:
        selected (Tensor): what is explained, (batch, n): outputs of each example.
        states (dict[int, Tensor]): layer → its hidden states, (batch, tokens, hidden).
        token_mask (Tensor): (batch, tokens), False at padding.
        batch_dimension (int, optional): 1 where the states are (tokens, batch, hidden).
            Default: 0.

    Returns:
        *dict* of layer → (batch, tokens), or *None* where an example has no gradient.

    Raises:
        UnsupportedModelError: an output depends on several examples.
        InputError: padding is read.
    """
    gradients = gradients_of(selected, states, batch_dimension)
    if gradients is None:
        return None
    norms = {layer: rows.norm(dim=-1) for layer, rows in gradients.items()}
    total = functools.reduce(torch.add, [values.sum(1) for values in norms.values()])
    shares = {layer: values / total[:, None] for layer, values in norms.items()}
    for values in shares.values():
        check_padding(values, token_mask)
    return shares


def gradients_of(
    selected: Tensor, states: dict[int, Tensor], batch_dimension: int = 0
) -> dict[int, Tensor] | None:
    """The gradient of what is read with respect to every hidden state.

    Args:
        selected (Tensor): what is explained, (batch, n): outputs of each example.
        states (dict[int, Tensor]): layer → its hidden states, (batch, tokens, hidden).
        batch_dimension (int, optional): 1 where the states are (tokens, batch, hidden).
            Default: 0.

    Returns:
        *dict* of layer → (batch, tokens, hidden), of the last layer and of those on
        which the outputs depend; or *None* where an example has no gradient.

    Raises:
        UnsupportedModelError: an output depends on several examples.
    """
    if not selected.requires_grad:
        return None
    batch = len(selected)
    gradients = _gradients(selected.sum(), states, batch_dimension)
    norms = {layer: rows.norm(dim=-1) for layer, rows in gradients.items()}
    followed = []
    if batch > 1:
        # Outputs of each example by their own factor: gradients must follow it.
        factors = 1 + _fixed_numbers(batch, selected.dtype, selected.device)
        scaled = _gradients((selected.sum(1) * factors).sum(), states, batch_dimension)
        for layer, values in norms.items():
            expected = values * factors[:, None]
            # Of rounding; other examples change much more.
            dtypes = [selected.dtype, *(state.dtype for state in states.values())]
            unit = min(256 * max(torch.finfo(dtype).eps for dtype in dtypes), 0.1)
            limit = unit * expected.amax(1, keepdim=True)
            follows = (scaled[layer].norm(dim=-1) - expected).abs() <= limit
            followed.append(follows.all())
    for is_followed in followed:
        check_later(is_followed, _judge_examples)
    total = functools.reduce(torch.add, [values.sum(1) for values in norms.values()])
    has_gradient = (total > 0) & (total < torch.inf)
    return gradients if holds("a gradient of the head", has_gradient) else None


def _judge_examples(are_independent: list[float]) -> None:
    if not all(are_independent):
        raise UnsupportedModelError(
            "the outputs of an example depend on other examples of the batch: pass one "
            "example at a time (internal_batch_size=1), or token_index."
        )


def _gradients(
    selected: Tensor, states: dict[int, Tensor], batch_dimension: int
) -> dict[int, Tensor]:
    """Layer → the gradient of each token, (batch, tokens, hidden)."""
    try:
        found = torch.autograd.grad(
            selected, list(states.values()), retain_graph=True, allow_unused=True
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UnsupportedModelError(
            "the gradient of the head, by which it is found what it reads, cannot be "
            f"taken ({str(error).splitlines()[0][:200]}): pass token_index. "
            "Class-aware scores need the gradient."
        ) from error
    gradients, last = {}, max(states)
    for (layer, state), gradient in zip(states.items(), found):
        if gradient is None and layer != last:
            continue
        rows = torch.zeros_like(state) if gradient is None else gradient
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        gradients[layer] = rows.transpose(0, batch_dimension)
    return gradients


@functools.lru_cache(maxsize=64)
def _fixed_numbers(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same positive random numbers on every run, (count)."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, generator=generator, device="cpu").to(device, dtype)


def check_padding(weights: Tensor, token_mask: Tensor) -> None:
    """Raise where padding is read, (batch, tokens)."""
    padding = (weights > 0) & ~token_mask

    def judge(is_read: list[float]) -> None:
        if any(is_read):
            example, position = padding.nonzero()[0].tolist()
            raise InputError(
                f"the head reads token {position} of example {example}, which is "
                "padding: pad on the other side, or pass token_index."
            )

    check_later(padding.any(), judge)


def selected_outputs(output: Tensor, target: TargetType, batch: int) -> Tensor:
    """What is explained of each example of the encoder, (batch, n).

    Targets are chosen as Captum chooses them. Without a target it is a fixed positive
    combination of all outputs: a plain sum of probabilities would be constant. Of
    multiple choice every choice is explained by its own output.

    Raises:
        UnsupportedModelError: outputs do not belong to examples.
    """
    folded = batch // max(len(output), 1) if output.ndim else 1
    if output.ndim == 2 and folded > 1 and output.shape[1] == folded:
        select_targets(output, target)  # Raises where it is not legal.
        return output.reshape(batch, 1)
    selected: Tensor = select_targets(output, target)
    if selected.numel() % batch:
        raise UnsupportedModelError(
            f"forward_func returns {tuple(output.shape)} outputs for {batch} examples, "
            "so it is not clear which belong to which: return (batch, ...), or pass "
            "token_index."
        )
    selected = selected.reshape(batch, -1)
    if target is None and selected.shape[1] > 1 and selected.is_floating_point():
        count, dtype, device = selected.shape[1], selected.dtype, selected.device
        selected = selected * (1 + _fixed_numbers(count, dtype, device))
    return selected


def by_pooling(
    pooling: Pooling | None, token_mask: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """What heads of a family read of the last layer, (batch, tokens); None: unknown."""
    if pooling is None:
        return None
    if pooling == "mean":
        return token_mask.to(dtype) / token_mask.sum(-1, keepdim=True)
    positions = torch.arange(token_mask.shape[1], device=token_mask.device)
    order = positions if pooling == "last" else -positions
    lowest = torch.iinfo(order.dtype).min
    index = order.masked_fill(~token_mask, lowest).argmax(-1)
    return (positions == index[:, None]).to(dtype)


def pools_as_said(
    weights: Tensor, run_head: Callable[[Tensor], Any], final: Tensor, output: Tensor
) -> bool:
    """Whether a head without gradient depends on the pooled vector alone.

    The last hidden states are replaced by others with the same pooled vector: of one
    token, all others change; of a mean, every token becomes the mean.

    Args:
        weights (Tensor): (batch, tokens).
        run_head (Callable): last hidden states → the output of forward_func.
        final (Tensor): the last hidden states, (batch, tokens, hidden).
        output (Tensor): what forward_func returned for them.
    """
    states, shares = final.detach(), weights.to(final.dtype)[..., None]
    is_one = bool((weights == 1).any(-1).all())
    pooled = (shares * states).sum(1, keepdim=True)
    expected = output.detach().to(torch.float64)
    dtypes = [t.dtype for t in (final, output) if t.is_floating_point()]
    unit = max(torch.finfo(dtype).eps for dtype in dtypes)
    limit = 256 * unit * expected.abs().max()
    generator = torch.Generator().manual_seed(0)
    # Whole numbers may be equal by chance.
    draws = 3 if output.is_floating_point() else 20
    for _ in range(draws if is_one else 1):
        noise = torch.randn(states.shape, generator=generator, device="cpu").to(states)
        others = 3 * states.std() * noise if is_one else pooled
        replaced = torch.where(shares > 0, states if is_one else pooled, others)
        again = output_tensor(run_head(replaced)).to(torch.float64)
        if not ((again - expected).abs() <= limit).all():
            return False
    return True


def no_gradient(root: str, why: str) -> UnsupportedModelError:
    """The error for a head whose gradient is not all that there is to know of it."""
    return UnsupportedModelError(
        f"class-aware scores of {root} need the gradient of the selected output with "
        f"respect to the last hidden states, as all that the output depends on: {why}. "
        "Scores without class_aware may be had."
    )


def not_found(root: str, what: str) -> UnsupportedModelError:
    """The error for a head of which it is not known what it reads."""
    return UnsupportedModelError(
        f"which tokens the head of {root} reads could not be found: {what}. Pass "
        'token_index, an int, a LongTensor (batch,) or "mean".'
    )
