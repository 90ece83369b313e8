"""Which tokens of the last layer a head reads, found by what ran."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_globenc._captum import TargetType
from captum_globenc.attribution.arguments import output_tensor, start_of
from captum_globenc.capture import Captured
from captum_globenc.errors import InputError, UnsupportedModelError
from captum_globenc.reconstruction import tolerance


def start_of_head(
    captured: Captured[Any], target: TargetType
) -> tuple[Tensor, Tensor | None]:
    """Weights of the top layer's receivers as the head reads them.

    In this order: the token that the target of a token-level head names; the token
    whose logits the output is; the token, or the mean of tokens, that goes into the
    head as one vector; what the family's heads read.

    Returns:
        *tuple* as of :func:`~captum_globenc.attribution.arguments.start_of`.
    """
    run, layout = captured.run, captured.encoder.architecture
    output = output_tensor(captured.output)
    token = _token_of_target(output, captured, target)
    if token is not None:
        return start_of(token, run)
    token = _token_of_logits(output, captured)
    if token is None:
        token = _read_as_vector(captured)
    if token is not None and token.is_floating_point():
        return token, None
    if token is not None:
        padding = ~run.attended.gather(1, token[:, None])[:, 0]
        if not padding.any():
            return start_of(token, run)
        if layout.reads != "first":
            example = int(padding.int().argmax())
            raise InputError(
                f"the head reads token {int(token[example])} of example "
                f"{example}, which is padding: pad on the other side, or pass "
                "token_index."
            )
    if layout.reads is None:
        raise UnsupportedModelError(
            f"which token the head of {type(captured.encoder.root).__name__} reads "
            "could not be found: pass token_index, an int, a LongTensor (batch,) or "
            '"mean".'
        )
    if layout.reads == "mean":
        return start_of("mean", run)
    positions = torch.arange(run.shape[1], device=run.attended.device)
    order = positions if layout.reads == "last" else -positions
    hidden = torch.iinfo(order.dtype).min
    return start_of(order.masked_fill(~run.attended, hidden).argmax(-1), run)


def _token_of_target(
    output: Tensor, captured: Captured[Any], target: TargetType
) -> int | Tensor | None:
    """The token that the target of a token-level head names."""
    if output.ndim == 1:
        return _token_of_largest(output, captured)
    if target is None or not _is_per_token(output, captured):
        return None
    if isinstance(target, Tensor):
        return target
    targets = target if isinstance(target, list) else [target]
    chosen = [t[0] if isinstance(t, tuple) else t for t in targets]
    if isinstance(target, list):
        return torch.tensor(chosen, device=captured.run.attended.device)
    return int(chosen[0])


def _is_per_token(output: Tensor, captured: Captured[Any]) -> bool:
    """Whether the output has a row, or a single logit, for every token."""
    if tuple(output.shape[:2]) != captured.run.shape:
        return False
    if output.ndim > 2:
        return True
    # (batch, tokens) could as well be (batch, classes): it is per token where it ranks
    # the tokens as a head of one logit per token does (softmax keeps the order).
    attended = captured.run.attended
    return any(
        torch.equal(_order(output, attended), _order(logits, attended))
        for logits in _start_and_end_logits(captured)
    )


def _start_and_end_logits(captured: Captured[Any]) -> list[Tensor]:
    """(batch, tokens) each: heads of one or two logits, as question answering has."""
    few = [logits for logits in captured.head.token_logits if logits.shape[-1] <= 2]
    return [column for logits in few for column in logits.unbind(-1)]


def _order(values: Tensor, attended: Tensor) -> Tensor:
    hidden = values.detach().masked_fill(~attended, -torch.inf)
    return hidden.argsort(dim=-1, stable=True)


def _token_of_largest(output: Tensor, captured: Captured[Any]) -> Tensor | None:
    """The token whose logit the output is, as in Captum's question answering."""
    for logits in _start_and_end_logits(captured):
        largest = logits.max(-1)
        if largest.values.shape == output.shape and torch.equal(
            largest.values, output.detach()
        ):
            attended = captured.run.attended.gather(1, largest.indices[:, None])[:, 0]
            if not attended.all():
                raise InputError(
                    f"the largest logit of example {int(attended.int().argmin())} is "
                    "that of a padding token: mask the logits in forward_func, or pass "
                    "token_index."
                )
            return largest.indices
    return None


def _token_of_logits(output: Tensor, captured: Captured[Any]) -> Tensor | None:
    """The token whose row of logits the output is: decoders classify all tokens."""
    for logits in reversed(captured.head.token_logits):
        if logits.shape[:2] == captured.run.shape and output.ndim == 2:
            token = _row_of(output.detach(), logits, captured.run.attended)
            if token is not None:
                return token
    return None


def _read_as_vector(captured: Captured[Any]) -> Tensor | None:
    """What the last vector of the head is that comes straight from the last layer.

    Returns:
        *Tensor*, (batch), the token that it is; or, where it is the mean of all
        tokens or of an image's patches, their weights, (batch, tokens).
    """
    run = captured.run
    last = run.output.detach()
    kinds = [run.attended]
    if run.grid is not None:
        patches = run.grid.rows * run.grid.columns
        position = torch.arange(run.shape[1], device=last.device)
        kinds.append(run.attended & (position >= run.shape[1] - patches))
    dtype = run.layers[0].dtype
    shares = [kind.to(dtype) / kind.sum(-1, keepdim=True) for kind in kinds]
    means = [(share[:, None] @ last.to(dtype))[:, 0] for share in shares]
    output = output_tensor(captured.output).detach()
    for vector in reversed([*captured.head.vectors, output]):
        if vector.shape != means[0].shape:
            continue
        token = _row_of(vector, last, run.attended)
        if token is not None:
            return token
        for share, mean in zip(shares, means):
            deviation = (vector.to(dtype) - mean).abs().max()
            if deviation <= tolerance(vector.dtype, last.dtype) * mean.abs().max():
                return share
    return None


def _row_of(vectors: Tensor, rows: Tensor, attended: Tensor) -> Tensor | None:
    """The token, (batch), whose row each vector is; None unless all are one.

    Of several equal rows, that of a token which is no padding.
    """
    if vectors.shape[-1] != rows.shape[-1] or len(vectors) != len(rows):
        return None
    equal = (rows == vectors[:, None]).all(-1)
    if not equal.any(-1).all():
        return None
    return (equal.int() + (equal & attended).int()).argmax(-1)
