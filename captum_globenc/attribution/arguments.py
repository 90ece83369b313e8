"""The arguments of an attribution: what is legal, and what they mean for a run."""

from __future__ import annotations

from typing import Any, Literal

import torch
from captum.attr import InterpretableEmbeddingBase
from torch import Tensor, nn

from captum_globenc.deferred import check_later
from captum_globenc.errors import InputError, is_whole
from captum_globenc.recording.inputs import check_mask_argument, signature_of
from captum_globenc.recording.readout import by_pooling
from captum_globenc.recording.records import Readout
from captum_globenc.recording.run import EncoderRun

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


def check_function(forward_func: object) -> None:
    """Raise TypeError where it cannot be called."""
    if not callable(forward_func):
        raise TypeError(
            "forward_func must be a model or a function, got "
            f"{type(forward_func).__name__}: {forward_func!r}"
        )


def layers_in(layer: object) -> list[nn.Module]:
    """The layer of a layer method, or the layers of its list.

    Raises:
        TypeError: it is neither.
        InputError: the list is empty.
    """
    layers: list[Any] = layer if isinstance(layer, list) else [layer]
    for part in layers:
        if not isinstance(part, nn.Module):
            raise TypeError(
                "layer must be an nn.Module or a list of them, got "
                f"{type(part).__name__}: {shown(part)}"
            )
    if not layers:
        raise InputError("layer must name at least one module, got [].")
    return layers


def check_call(model: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Raise where a mask takes the place of another argument, or has a wrong shape.

    In most models of transformers the second argument is the mask, in some it is not,
    and they would fail with an error that nobody understands.

    Args:
        model (nn.Module): what is called.
        arguments (tuple): with what, in order.
    """
    names = list(signature_of(model).parameters)
    ids = arguments[0]
    tokens = ids.shape[:-1] if ids.is_floating_point() else ids.shape
    if names[:1] == ["input_ids"] and ids.is_floating_point():
        kinds = (type(part) for part in model.modules())
        if not any(issubclass(kind, InterpretableEmbeddingBase) for kind in kinds):
            raise InputError(
                f"input ids must be integers, got {ids.dtype}: pass embeddings to a "
                "forward_func such as lambda x, mask: model(inputs_embeds=x, "
                "attention_mask=mask)."
            )
    for name, value in zip(names[1:], arguments[1:]):
        if name == "attention_mask":
            break
        looks_like_mask = (
            "attention_mask" in names
            and isinstance(value, Tensor)
            and value.shape == tokens
            and name not in _ALSO_PER_TOKEN
            and _is_zero_or_one(value)
        )
        if looks_like_mask:
            raise InputError(
                f"argument {names.index(name) + 1} of {type(model).__name__} is {name} "
                f"and not the attention mask, and a tensor of shape "
                f"{tuple(value.shape)} is given: pass forward_func as lambda ids, "
                "mask: model(ids, attention_mask=mask)."
            )
    if len(tokens) == 2:
        check_mask_argument(model, arguments, {}, (tokens[0], tokens[1]))


# Arguments that hold a number for each token, as a mask does.
_ALSO_PER_TOKEN = ("token_type_ids", "position_ids")


def _is_zero_or_one(value: Tensor) -> bool:
    return bool(((value == 0) | (value == 1)).all())


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
            legal = all(is_whole(part) for element in target for part in element)
        else:
            legal = all(is_whole(element) for element in target)
        if not legal:
            raise AssertionError(
                "a target list must hold integers only or tuples of integers only, got "
                f"{shown(target)}."
            )
        length = len(target)
    elif (
        target is None
        or is_whole(target)
        or (isinstance(target, tuple) and target and all(map(is_whole, target)))
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


def shown(value: object) -> str:
    """A value for an error message: one line, not too long."""
    line = " ".join(repr(value).split())
    return line if len(line) <= 60 else line[:57] + "..."


def share(value: Any, rows: slice, batch: int) -> Any:
    """The part of an argument that belongs to some of the examples.

    As in Captum, tensors are cut and any other argument is passed as it is; a tensor
    that does not have one element per example is passed as it is, too.
    """
    if isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch:
        return value[rows]
    return value


def readout_at(token_index: TokenIndex, run: EncoderRun) -> Readout:
    """What a caller says is read of the last layer.

    Args:
        token_index (int, Tensor or "mean"): one token for all examples, (batch) of
            them, or the mean of all tokens.
        run (EncoderRun): the run.

    Raises:
        InputError: there is no such token, or it is padding.
    """
    batch, tokens = run.shape
    token_mask, last = run.token_mask, len(run.layers)
    if isinstance(token_index, str) and token_index == "mean":
        weights = by_pooling("mean", token_mask, run.dtype)
        assert weights is not None
        return Readout({last: weights}, None)
    if isinstance(token_index, Tensor):
        whole = not token_index.is_floating_point() and token_index.dtype != torch.bool
        if not whole or token_index.numel() not in (1, batch):
            raise InputError(
                f"token_index must be a LongTensor of shape ({batch},), got "
                f"{token_index.dtype} of shape {tuple(token_index.shape)}."
            )
        index = token_index.to(token_mask.device, torch.long).flatten().expand(batch)
    elif is_whole(token_index):
        index = torch.full((batch,), int(token_index), device=token_mask.device)  # type: ignore[arg-type]
    else:
        raise InputError(
            'token_index must be an int, a LongTensor (batch,), "mean" or None, got '
            f"{token_index!r}."
        )
    inside = (index >= -tokens) & (index < tokens)
    is_token = token_mask.gather(1, (index % tokens)[:, None])[:, 0]

    def judge(flags: list[float]) -> None:
        for example, (is_inside, is_shown) in enumerate(zip(flags[::2], flags[1::2])):
            if not is_inside:
                raise InputError(
                    f"token_index {int(index[example])} is outside the {tokens} tokens "
                    "of the input."
                )
            if not is_shown:
                raise InputError(
                    f"token_index {int(index[example])} is padding in example "
                    f"{example}."
                )

    check_later(torch.stack([inside, is_token], 1), judge)
    return Readout.of_tokens(last, index % tokens, tokens, run.dtype)
