"""What the encoder attribution methods share: one recorded run of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from captum.attr import Attribution
from torch import Tensor, nn

from captum_globenc._captum import TargetType, select_targets
from captum_globenc.aggregation import Scaled, sweep
from captum_globenc.attribution.arguments import (
    TokenIndex,
    check_positions,
    check_seen,
    output_tensor,
    start_of,
)
from captum_globenc.attribution.heads import start_of_head
from captum_globenc.capture import Captured, record
from captum_globenc.encoders import Encoder, find_encoder, unsupported
from captum_globenc.errors import NonFiniteActivationError
from captum_globenc.local import local_score
from captum_globenc.weights import WeightCache


class EncoderAttribution(Attribution):
    """Base of the methods that decompose an encoder's layers.

    Args:
        forward_func (Callable): a Hugging Face model, an ``nn.Module`` around one, or
            any function that calls one.
        encoder (nn.Module, optional): the model or part of it to explain.
        local (str, optional): the score of one layer.
        normalize (bool, optional): scores of an example sum to 1.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        encoder: nn.Module | None = None,
        local: str = "N_ENC",
        normalize: bool = False,
    ) -> None:
        if not callable(forward_func):
            raise TypeError(
                "forward_func must be a model or a function, got "
                f"{type(forward_func).__name__}: {forward_func!r}"
            )
        if encoder is not None and not isinstance(encoder, nn.Module):
            raise TypeError(
                f"encoder must be an nn.Module, got {type(encoder).__name__}."
            )
        local_score(local)  # Raises where there is none.
        Attribution.__init__(self, forward_func)
        self.encoder = encoder
        self.local = local
        self.normalize = normalize
        self._weights = WeightCache()

    def attribute_future(self) -> NoReturn:
        """Not implemented."""
        raise NotImplementedError(
            f"attribute_future is not implemented for {type(self).__name__}"
        )

    def _capture(
        self, tensors: tuple[Tensor, ...], arguments: tuple[Any, ...]
    ) -> Captured[Any]:
        """Call the model once, recording its encoder."""
        if isinstance(self.forward_func, nn.Module):
            check_positions(self.forward_func, (*tensors, *arguments))
        captured = record(
            lambda: self.forward_func(*tensors, *arguments),
            self._find_encoder(),
            self._weights,
        )
        check_seen(tensors[0], captured.run)
        return captured

    def _sweep(
        self,
        tensors: tuple[Tensor, ...],
        target: TargetType,
        arguments: tuple[Any, ...],
        token_index: TokenIndex,
    ) -> tuple[list[Scaled], Captured[Any]]:
        """Run the model and roll its layers up.

        Returns:
            *tuple* of rows, (batch, tokens) each, and what was captured. The first row
            is the start, the weights of the last layer's outputs; the row of index k is
            what the start takes from the input of the k-th layer from the top.
        """
        captured = self._capture(tensors, arguments)
        output = output_tensor(captured.output)
        select_targets(output, target)
        if output.isnan().any():
            raise NonFiniteActivationError(
                "the output of forward_func holds NaN, though no encoder layer does: "
                "look for NaN in the head."
            )
        if token_index is None:
            start, top = start_of_head(captured, target)
        else:
            start, top = start_of(token_index, captured.run)
        score = local_score(self.local)
        with torch.autocast(start.device.type, enabled=False):
            rows = [Scaled.of(start), *sweep(captured.run, score, start, top)]
        return rows, captured

    def _scores(self, row: Scaled, dtype: torch.dtype) -> Tensor:
        """The numbers of a row, (batch, tokens), normalised where asked for."""
        if self.normalize:
            return (row.values / row.values.sum(-1, keepdim=True)).to(dtype)
        return row.to(dtype)

    def _find_encoder(self) -> Encoder | None:
        """The encoder, as far as it can be found without running a function."""
        root = self.encoder
        if root is None and isinstance(self.forward_func, nn.Module):
            root = self.forward_func
        if root is None:
            return None
        encoder = find_encoder(root)
        if encoder is None:
            raise unsupported(root)
        return encoder
