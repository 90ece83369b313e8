"""Which tokens of the last layer a head reads, found by what ran."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from captum_globenc._captum import TargetType
from captum_globenc.attribution.arguments import output_tensor, start_of
from captum_globenc.capture import Captured
from captum_globenc.errors import InputError, UnsupportedModelError
from captum_globenc.reconstruction import tolerance
from captum_globenc.records import EncoderRecord


def start_of_head(
    captured: Captured[Any], target: TargetType
) -> tuple[Tensor, Tensor | None]:
    """Weights of the top layer's receivers as the head reads them.

    In this order: the token that the target of a token-level head names; the token
    whose logits the output is; the tokens, or means of tokens, that go into the head as
    vectors; what the family's heads read.

    Returns:
        *tuple* as of :func:`~captum_globenc.attribution.arguments.start_of`.
    """
    run, layout = captured.run, captured.encoder.architecture
    output = output_tensor(captured.output)
    token = _token_of_target(output, captured, target)
    if token is not None:
        return start_of(token, run)
    token = _token_of_logits(output, captured)
    read: Tensor | None
    if token is not None:
        read = nn.functional.one_hot(token, run.shape[1]).to(run.layers[0].dtype)
    else:
        read = _read_as_vectors(captured)
    if read is not None:
        padding = (read > 0) & ~run.attended
        if not padding.any():
            return _start_with(read, run)
        if layout.reads != "first":
            example, position = padding.nonzero()[0].tolist()
            raise InputError(
                f"the head reads token {position} of example {example}, which is "
                "padding: pad on the other side, or pass token_index."
            )
    elif layout.reads is None:
        raise _not_found(captured)
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


def _start_with(read: Tensor, run: EncoderRecord) -> tuple[Tensor, Tensor | None]:
    """As :func:`start_of`, for weights: of one token each, rows of one token do."""
    if (read == 1).any(-1).all():
        return start_of(read.argmax(-1), run)
    return read, None


def _read_as_vectors(captured: Captured[Any]) -> Tensor | None:
    """The tokens, and means of tokens, that the head takes as vectors.

    Several, be it in one concatenated vector or by heads that are averaged, count the
    same. What the encoder's own pooler reads counts where nothing else reads.

    Returns:
        *Tensor* of shape (batch, tokens), weights, or *None* where nothing is found.

    Raises:
        UnsupportedModelError: the head begins with another vector.
    """
    run, head = captured.run, captured.head
    hidden = run.output.shape[-1]
    kinds = _means(run)
    output = output_tensor(captured.output).detach()
    outputs = [output] if output.ndim == 2 else []
    for vectors in ([*head.vectors, *outputs], head.pooled):
        found: list[Tensor] = []
        for vector in vectors:
            if len(vector) != run.shape[0] or vector.shape[1] % hidden:
                continue
            parts = [
                _share_of(part, run, kinds)
                for part in torch.split(vector, hidden, dim=1)
            ]
            if not any(part is None for part in parts):
                found += [
                    part
                    for part in parts
                    if part is not None and not any(torch.equal(part, f) for f in found)
                ]
        if found:
            return torch.stack(found).mean(0)
        if vectors is not head.pooled and _begins_otherwise(captured):
            raise _not_found(captured)
    return None


def _begins_otherwise(captured: Captured[Any]) -> bool:
    """Whether the head begins with a vector like a token, such as their maximum.

    The output of the encoder's own pooler is none.
    """
    head, hidden = captured.head, captured.run.output.shape[-1]
    begin = next((v for v in head.vectors if v.shape[1] == hidden), None)
    return begin is not None and not any(torch.equal(begin, p) for p in head.pooled)


def _not_found(captured: Captured[Any]) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"which token the head of {type(captured.encoder.root).__name__} reads could "
        "not be found (it takes no vector that is a token of the last layer, or the "
        "mean of the attended ones): pass token_index, an int, a LongTensor (batch,) "
        'or "mean".'
    )


def _means(run: EncoderRecord) -> list[tuple[Tensor, Tensor]]:
    """Of all tokens, and of an image's patches: weights (batch, tokens), and means."""
    kinds = [run.attended]
    if run.grid is not None:
        patches = run.grid.rows * run.grid.columns
        position = torch.arange(run.shape[1], device=run.attended.device)
        kinds.append(run.attended & (position >= run.shape[1] - patches))
    dtype = run.layers[0].dtype
    last = run.output.detach().to(dtype)
    shares = [kind.to(dtype) / kind.sum(-1, keepdim=True) for kind in kinds]
    return [(share, (share[:, None] @ last)[:, 0]) for share in shares]


def _share_of(
    vector: Tensor, run: EncoderRecord, means: list[tuple[Tensor, Tensor]]
) -> Tensor | None:
    """The weights, (batch, tokens), by which a vector, (batch, hidden), is made."""
    last, dtype = run.output.detach(), run.layers[0].dtype
    token = _row_of(vector, last, run.attended)
    if token is not None:
        return nn.functional.one_hot(token, run.shape[1]).to(dtype)
    for share, mean in means:
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
