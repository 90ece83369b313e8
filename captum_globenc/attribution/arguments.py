"""The arguments of an attribution: what is legal, and what they mean for a run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_globenc.errors import InputError
from captum_globenc.records import EncoderRecord

TokenIndex = int | Tensor | Literal["mean"] | None


def as_tensors(inputs: object) -> tuple[Tensor, ...]:
    """The inputs as a tuple, checked as far as they can be without a model."""
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise InputError(
                "inputs must be a torch.Tensor or a tuple of them, got "
                f"{type(tensor).__name__}: {shown(tensor)}"
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


def check_positions(model: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Raise where a mask takes the place of another argument of the model.

    In most models of transformers the second argument is the mask, in some it is not,
    and they would fail with an error that nobody understands.
    """
    names = list(inspect.signature(model.forward).parameters)
    for name, value in zip(names, arguments):
        wrong = (name == "past_key_values" and isinstance(value, Tensor)) or (
            name == "bbox" and isinstance(value, Tensor) and value.ndim == 2
        )
        if wrong:
            raise InputError(
                f"argument {names.index(name) + 1} of {type(model).__name__} is {name} "
                f"and not the attention mask, and a tensor of shape "
                f"{tuple(value.shape)} is given: pass forward_func as lambda ids, "
                "mask: model(ids, attention_mask=mask)."
            )


def check_target(target: Any, batch: int) -> None:
    """Raise AssertionError, as Captum does, where target is not legal."""
    if isinstance(target, Tensor):
        whole = not (target.is_floating_point() or target.dtype == torch.bool)
        if not whole or target.ndim > 1:
            raise AssertionError(
                "a target tensor must hold integers, one for all examples or one for "
                f"each, got {target.dtype} of shape {tuple(target.shape)}."
            )
        length = target.numel() if target.numel() != 1 else batch
    elif isinstance(target, list):
        kinds = {type(element) for element in target}
        if kinds == {tuple}:
            legal = all(_is_index(part) for element in target for part in element)
        else:
            legal = all(_is_index(element) for element in target)
        if not legal:
            raise AssertionError(
                "a target list must hold integers only or tuples of integers only, got "
                f"{shown(target)}."
            )
        length = len(target)
    elif (
        target is None
        or _is_index(target)
        or (isinstance(target, tuple) and target and all(map(_is_index, target)))
    ):
        return
    else:
        raise AssertionError(
            "target must be None, an int, a tuple of ints, or a list or tensor of one "
            f"per example, got {type(target).__name__}: {shown(target)}."
        )
    if length != batch:
        raise AssertionError(
            f"target has {length} elements, and inputs have {batch} examples."
        )


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def shown(value: object) -> str:
    """A value for an error message: one line, not too long."""
    line = " ".join(repr(value).split())
    return line if len(line) <= 60 else line[:57] + "..."


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

    Multiple-choice models fold (batch, choices, ...) into one batch.
    """
    if run.grid is not None:
        fits = inputs.ndim == 4 and run.shape[0] == len(inputs)
        if fits and not inputs.is_floating_point():
            raise InputError(
                f"images must be floating point to be attributed, got {inputs.dtype}: "
                "pass images.float()."
            )
    else:
        tokens = inputs.shape[:-1] if inputs.is_floating_point() else inputs.shape
        fits = run.shape == (tokens[:-1].numel(), tokens[-1])
    if not fits:
        seen = f"(batch, tokens) = {run.shape}"
        if run.grid is not None:
            seen += f", images of {run.grid.rows} by {run.grid.columns} patches"
        raise InputError(
            f"inputs have shape {tuple(inputs.shape)} and the encoder saw {seen}; "
            "inputs must be its ids (batch, tokens), embeddings (batch, tokens, "
            "hidden) or images (batch, channels, height, width)."
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
    if isinstance(token_index, Tensor):
        whole = not token_index.is_floating_point() and token_index.dtype != torch.bool
        if not whole or token_index.numel() not in (1, batch):
            raise InputError(
                f"token_index must be a LongTensor of shape ({batch},), got "
                f"{token_index.dtype} of shape {tuple(token_index.shape)}."
            )
        index = token_index.to(attended.device, torch.long).flatten().expand(batch)
    elif _is_index(token_index):
        index = torch.full((batch,), token_index, device=attended.device)  # type: ignore[arg-type]
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
