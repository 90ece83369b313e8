"""Is what goes into an encoder something that it can take?"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from captum.attr import InterpretableEmbeddingBase
from torch import Tensor, nn

from captum_globenc.encoders import Encoder
from captum_globenc.errors import InputError


def check_inputs(
    encoder: Encoder,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    """Check ids, length and images where they enter an encoder.

    Args:
        encoder (Encoder): the encoder.
        module (nn.Module): its embeddings.
        args (tuple): what they were called with.
        kwargs (Mapping): likewise, by name.

    Raises:
        InputError: ids outside the vocabulary, more tokens than positions, no images.
    """
    given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    # A bare table of embeddings calls its ids "input".
    ids = given.get("input_ids", given.get("input"))
    if "pixel_values" in inspect.signature(module.forward).parameters:
        _check_image(given.get("pixel_values"))
    if encoder.patches is not None:
        return
    tokens = ids if ids is not None else given.get("inputs_embeds")
    if tokens is None:
        return
    if ids is not None:
        _check_ids(ids, encoder.token_table)
    most = encoder.max_tokens
    if most is not None and given.get("position_ids") is None:
        _check_length(tokens.shape[1], most)


def _check_ids(ids: Tensor, table: nn.Module | None) -> None:
    if table is None or isinstance(table, InterpretableEmbeddingBase):
        return  # Captum's stand-in takes embeddings where ids belong.
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"input ids must be integers, got {ids.dtype}.")
    size = getattr(table, "num_embeddings", None)
    if size is None:
        return  # An adapter around a table: the table says itself what it lacks.
    wrong = ids[(ids < 0) | (ids >= size)]
    if wrong.numel():
        raise InputError(
            f"input id {int(wrong[0])} is outside the vocabulary of {size} "
            f"(ids 0 to {size - 1}). Does the tokenizer belong to the model?"
        )


def _check_image(image: Tensor | None) -> None:
    if image is None or image.ndim != 4:
        found = "none" if image is None else f"shape {tuple(image.shape)}"
        raise InputError(
            "the model takes images, pixel_values of shape (batch, channels, height, "
            f"width), got {found}."
        )


def _check_length(tokens: int, most: int) -> None:
    if tokens > most:
        raise InputError(
            f"the input has {tokens} tokens and the model has positions for {most}: "
            "shorten the text, or truncate when tokenizing (truncation=True, "
            f"max_length={most})."
        )
