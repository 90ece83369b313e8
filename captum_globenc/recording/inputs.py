"""What goes into an encoder: checked where it arrives, and compared with the inputs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from captum_globenc.deferred import check_later
from captum_globenc.encoders.resolver import Encoder
from captum_globenc.errors import InputError
from captum_globenc.recording.records import Grid


def check_mask_argument(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    shape: tuple[int, int],
) -> Tensor | None:
    """The mask (batch, tokens) that a module is called with, None for any other.

    Raises:
        InputError: it has another shape, or hides every token of an example.
    """
    try:
        arguments = signature_of(module).bind_partial(*args, **kwargs)
    except TypeError:
        return None  # The module itself says what is wrong.
    mask = arguments.arguments.get("attention_mask")
    if mask is None:
        mask = arguments.arguments.get("kwargs", {}).get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim == 4:
        return None
    if tuple(mask.shape) != tuple(shape):
        raise InputError(
            f"the attention mask has shape {tuple(mask.shape)}, and "
            f"(batch, tokens) = {tuple(shape)} is expected."
        )
    return mask


def signature_of(module: nn.Module) -> inspect.Signature:
    """The signature of a module's forward, without ``self``."""
    function = getattr(module.forward, "__func__", None)
    if function is None:
        return inspect.signature(module.forward)
    return _signature_of_method(function)


@functools.lru_cache(maxsize=256)
def _signature_of_method(function: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(function)
    first, *rest = signature.parameters.values()
    takes_any = first.kind is inspect.Parameter.VAR_POSITIONAL
    return signature if takes_any else signature.replace(parameters=rest)


def check_lookup(ids: Tensor, weights: Tensor, encoder: Encoder) -> Tensor:
    """Check ids or positions before they are looked up.

    Returns:
        *Tensor*, the ids, all of them in the table: others are replaced until the check
        of them is read.

    Args:
        ids (Tensor): of any shape.
        weights (Tensor): of the table.
        encoder (Encoder): knows its tables.

    Raises:
        InputError: ids that are no integers or not in the vocabulary, or more tokens
            than positions.
    """
    size = len(weights)
    if weights is encoder.token_weights:
        if ids.dtype not in (torch.int32, torch.int64):
            raise InputError(
                f"input ids must be integers (int64 or int32), got {ids.dtype}."
            )
        known = ids.clamp(0, size - 1)

        def judge(is_known: list[float]) -> None:
            if not all(is_known):
                wrong = int(ids.flatten()[is_known.index(0)])
                raise InputError(
                    f"input id {wrong} is outside the vocabulary of {size} (ids 0 to "
                    f"{size - 1}). Does the tokenizer belong to the model?"
                )

        check_later(known == ids, judge)
        return known
    if encoder.positions is not None and weights is encoder.positions.weight:
        check_length(ids, encoder)
    return ids


def check_image(args: tuple[Any, ...]) -> None:
    """Raise where embeddings of an image model are called with something else."""
    image = args[0] if args else None
    if isinstance(image, Tensor) and image.ndim != 4:
        raise InputError(
            "the model takes images, pixel_values of shape (batch, channels, height, "
            f"width), got shape {tuple(image.shape)}."
        )


def check_length(inputs: Tensor, encoder: Encoder) -> None:
    """Check that the model has a position for every token.

    Args:
        inputs (Tensor): ids (..., tokens) or embeddings (batch, tokens, hidden).
        encoder (Encoder): knows its positions.

    Raises:
        InputError: there are more tokens than positions.
    """
    most = encoder.max_tokens
    if most is None or encoder.patches is not None:
        return
    tokens = inputs.shape[-2] if inputs.is_floating_point() else inputs.shape[-1]
    if tokens > most:
        raise InputError(
            f"the input has {tokens} tokens and the model has positions for {most}: "
            "shorten the text, or truncate when tokenizing (truncation=True, "
            f"max_length={most})."
        )


def check_shape(inputs: Tensor, token_mask: Tensor, grid: Grid | None) -> None:
    """Check that the encoder saw as many tokens, or an image.

    Multiple-choice models fold (batch, choices, ...) into one batch.

    Args:
        inputs (Tensor): what ``attribute`` was given.
        token_mask (Tensor): (batch, tokens) of the run.
        grid (Grid or None): the patches of its image.

    Raises:
        InputError: the encoder saw something of another shape.
    """
    batch, tokens = token_mask.shape
    if grid is not None:
        fits = inputs.ndim == 4 and batch == len(inputs)
        if fits and not inputs.is_floating_point():
            raise InputError(
                f"images must be floating point to be attributed, got {inputs.dtype}: "
                "pass images.float()."
            )
    else:
        leading = inputs.shape[:-1] if inputs.is_floating_point() else inputs.shape
        fits = (leading[:-1].numel(), leading[-1]) == (batch, tokens)
    if not fits:
        shown = f"(batch, tokens) = {(batch, tokens)}"
        if grid is not None:
            shown += f", images of {grid.rows} by {grid.columns} patches"
        raise InputError(
            f"inputs have shape {tuple(inputs.shape)} and the encoder saw {shown}; "
            "inputs must be its ids (batch, tokens), embeddings (batch, tokens, "
            "hidden) or images (batch, channels, height, width)."
        )


def check_arrival(
    inputs: Tensor,
    lookups: list[tuple[Tensor, Tensor]],
    arrived: list[Tensor],
    token_table: Tensor | None,
    embeddings: list[Tensor],
    embedded: list[Tensor],
) -> None:
    """Check that the encoder ran on the inputs, and on nothing else.

    Args:
        inputs (Tensor): what ``attribute`` was given.
        lookups (list[tuple[Tensor, Tensor]]): ids and the table in which they were
            looked up, in front of the first layer.
        arrived (list[Tensor]): embeddings, images or hidden states that went into the
            encoder, its embeddings and its first layer.
        token_table (Tensor or None): the weights of the table of tokens, where known.
        embeddings (list[Tensor]): what went into the encoder as ``inputs_embeds``.
        embedded (list[Tensor]): what lookups of tokens gave.

    Raises:
        InputError: the encoder saw something else.
    """
    if inputs.is_floating_point():
        arrives = _any([_equal(values, inputs) for values in arrived], inputs)
    else:
        by_table: dict[int, list[Tensor]] = {}
        for ids, table in lookups:
            by_table.setdefault(id(table), []).append(ids)
        known = by_table.get(id(token_table))
        candidates = list(by_table.values()) if known is None else [known]
        arrives = _any(
            [
                functools.reduce(
                    torch.logical_and, [_equal(ids, inputs) for ids in group]
                )
                for group in candidates
            ],
            inputs,
        )
        for given in embeddings:
            if not any(given is values for values in embedded):
                made = [_equal(given, values) for values in embedded]
                arrives = arrives & _any(made, inputs)
    kind = {2: "ids", 3: "embeddings", 4: "images"}.get(inputs.ndim, "inputs")
    kind = kind if inputs.is_floating_point() else "ids"

    def judge(did_arrive: list[float]) -> None:
        if not all(did_arrive):
            raise InputError(
                f"the encoder did not run on the {kind} that attribute was given: "
                "forward_func changes them on the way (it sorts, flips, shifts, crops, "
                "scales or replaces them), so scores would belong to other tokens. "
                "Make these changes before, and "
                f"pass attribute the {kind} that arrive at the encoder."
            )

    check_later(arrives, judge)


def _any(found: list[Tensor], inputs: Tensor) -> Tensor:
    """Whether one of them is true, on the device of the inputs; of none, False."""
    if not found:
        return torch.zeros((), dtype=torch.bool, device=inputs.device)
    alike = (value.to(inputs.device) for value in found)
    return functools.reduce(torch.logical_or, alike)


def _equal(values: Tensor, inputs: Tensor) -> Tensor:
    """Whether they are the same, but for folded leading dimensions, dtype and device.

    A boolean tensor, on the device of ``values``.

    Ids may be (tokens, batch), images resized as a whole and normalised by channel.
    """
    values, inputs = values.detach(), inputs.detach().to(values)
    found = []
    if inputs.ndim == values.ndim == 4:
        found = [_is_normalised(values, image) for image in _resized(inputs, values)]
    elif values.numel() == inputs.numel():
        if values.shape[-1] == inputs.shape[-1]:
            found = [(values.reshape(inputs.shape) == inputs).all()]
        if values.ndim == 2 and values.shape == inputs.mT.shape:
            found.append((values == inputs.mT).all())
    return _any(found, values)


def _resized(images: Tensor, like: Tensor) -> Iterator[Tensor]:
    """Images in the size of others, by all usual kinds of interpolation."""
    if images.shape == like.shape:
        yield images
    elif images.shape[:2] == like.shape[:2]:
        resize = functools.partial(
            nn.functional.interpolate, images, size=like.shape[2:]
        )
        yield resize(mode="nearest")
        yield resize(mode="area")
        for mode, antialias in product(("bilinear", "bicubic"), (False, True)):
            yield resize(mode=mode, antialias=antialias)


def _is_normalised(values: Tensor, images: Tensor) -> Tensor:
    """Whether each channel is the image's, times a number plus a number."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    true, plain = (t.to(dtype).transpose(0, 1).flatten(1) for t in (values, images))
    varied = plain - plain.mean(1, keepdim=True)
    square = varied.square().sum(1, keepdim=True)
    slope = (varied * true).sum(1, keepdim=True) / square.clamp(min=1e-30)
    rest = true - true.mean(1, keepdim=True) - slope * varied
    limit = 64 * torch.finfo(values.dtype).eps * true.abs().amax(1, keepdim=True)
    return (rest.abs() <= limit).all() & (slope != 0).all()


def countable(value: Any) -> Any:
    """A tensor that counts its changes, in the place of one of inference mode."""
    if isinstance(value, Tensor) and value.is_inference():
        with torch.inference_mode(False):
            return value.clone()
    return value
