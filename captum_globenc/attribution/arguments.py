"""The arguments of an attribution: what is legal, and what they mean for a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_globenc._captum import TargetType
from captum_globenc.capture import Captured
from captum_globenc.errors import InputError
from captum_globenc.records import EncoderRecord

# Question answering (start and end logits) and ELECTRA's discriminator.
_HEADS_OF_ONE_LOGIT_PER_TOKEN = {"qa_outputs", "discriminator_predictions"}

TokenIndex = int | Tensor | Literal["mean"] | None


def as_tensors(inputs: object) -> tuple[Tensor, ...]:
    """The inputs as a tuple, checked as far as they can be without a model."""
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            shown = repr(tensor)
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            raise InputError(
                "inputs must be a torch.Tensor or a tuple of them, got "
                f"{type(tensor).__name__}: {shown}"
            )
    if not tensors:
        raise InputError("inputs must hold at least one tensor, got ().")
    first = tensors[0]
    if first.ndim not in (2, 3, 4):
        raise InputError(
            "inputs must be ids (batch, tokens), embeddings (batch, tokens, hidden) or "
            "images (batch, channels, height, width), got shape "
            f"{tuple(first.shape)}."
        )
    if first.numel() == 0:
        raise InputError(
            f"inputs of shape {tuple(first.shape)} hold no token to explain."
        )
    sizes = [t.shape[0] if t.ndim else 0 for t in tensors]
    if len(set(sizes)) > 1:
        raise InputError(f"inputs have different batch sizes: {sizes}.")
    return tensors


def check_length_of_target(target: Any, batch: int) -> None:
    """Raise AssertionError, as Captum does, where target and inputs do not agree."""
    several = isinstance(target, list) or (
        isinstance(target, Tensor) and target.numel() > 1
    )
    if several and len(target) != batch:
        raise AssertionError(
            f"target has {len(target)} elements, and inputs have {batch} examples."
        )


def share(value: Any, chosen: slice, batch: int) -> Any:
    """The part of an argument that belongs to the chosen examples.

    As in Captum, tensors are cut and any other argument is passed as it is; a tensor
    that does not have one element per example is passed as it is, too.
    """
    if isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch:
        return value[chosen]
    return value


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


def check_seen(inputs: Tensor, run: EncoderRecord) -> None:
    """Raise where the encoder did not see the inputs as its tokens or its images.

    Multiple-choice models fold ids of (batch, choices, tokens) into one batch.
    """
    if inputs.is_floating_point() and inputs.ndim == 4:
        fits = run.grid is not None and run.shape[0] == len(inputs)
    elif inputs.is_floating_point():
        fits = run.grid is None and run.shape == inputs.shape[:2]
    else:
        fits = run.shape == (inputs.shape[:-1].numel(), inputs.shape[-1])
    if not fits:
        seen = f"(batch, tokens) = {run.shape}"
        if run.grid is not None:
            seen += f", an image of {run.grid[0]} by {run.grid[1]} patches each"
        raise InputError(
            f"inputs have shape {tuple(inputs.shape)} and the encoder saw {seen}; "
            "inputs must be its ids (batch, tokens), embeddings (batch, tokens, "
            "hidden) or images (batch, channels, height, width)."
        )


def token_of_target(captured: Captured[Any], target: TargetType) -> TokenIndex:
    """The token that a token-level head reads; None for other heads."""
    if target is None or not _is_per_token(captured):
        return None
    if isinstance(target, Tensor):
        return target
    targets = target if isinstance(target, list) else [target]
    chosen = [t[0] if isinstance(t, tuple) else t for t in targets]
    if not all(isinstance(token, int) for token in chosen):
        raise InputError(
            f"target {target!r} names no token of the output of shape "
            f"{tuple(output_tensor(captured.output).shape)}: pass token_index."
        )
    if isinstance(target, list):
        return torch.tensor(chosen, device=captured.run.attended.device)
    return int(chosen[0])


def _is_per_token(captured: Captured[Any]) -> bool:
    """Whether the output has a row, or a single logit, for every token."""
    output = output_tensor(captured.output)
    if tuple(output.shape[:2]) != captured.run.shape:
        return False
    # (batch, tokens) could as well be (batch, classes): the model's head decides.
    return output.ndim > 2 or any(
        name.rpartition(".")[2] in _HEADS_OF_ONE_LOGIT_PER_TOKEN
        for name, _ in captured.encoder.root.named_modules()
    )


def start_of(
    token_index: TokenIndex, run: EncoderRecord
) -> tuple[Tensor, Tensor | None]:
    """Weights of the top layer's receivers, and which they are where they are few.

    Returns:
        *tuple* of weights, (batch, tokens), and receivers, (batch, 1), or None for all.
    """
    batch, tokens = run.shape
    attended = run.attended
    dtype = run.layers[0].dtype
    if isinstance(token_index, str) and token_index == "mean":
        return attended.to(dtype) / attended.sum(-1, keepdim=True), None
    if token_index is None:
        index = attended.int().argmax(-1)
    elif isinstance(token_index, Tensor):
        whole = not token_index.is_floating_point() and token_index.dtype != torch.bool
        if not whole or token_index.numel() not in (1, batch):
            raise InputError(
                f"token_index must be a LongTensor of shape ({batch},), got "
                f"{token_index.dtype} of shape {tuple(token_index.shape)}."
            )
        index = token_index.to(attended.device, torch.long).flatten().expand(batch)
    elif isinstance(token_index, int) and not isinstance(token_index, bool):
        index = torch.full((batch,), token_index, device=attended.device)
    else:
        raise InputError(
            'token_index must be an int, a LongTensor (batch,), "mean" or None, got '
            f"{token_index!r}."
        )
    for example, position in enumerate(index.tolist()):
        if not -tokens <= position < tokens:
            raise InputError(
                f"token_index {position} is outside the {tokens} tokens of the input."
            )
        if not attended[example, position]:
            raise InputError(f"token_index {position} is padding in example {example}.")
    index = index % tokens
    start = nn.functional.one_hot(index, tokens).to(dtype)
    return start, index[:, None]
