"""Which tokens of the last layer a head reads, found by what ran."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from captum_globenc._captum import TargetType
from captum_globenc.attribution.arguments import output_tensor, start_of
from captum_globenc.capture import Captured, Vector
from captum_globenc.errors import InputError, UnsupportedModelError
from captum_globenc.records import EncoderRecord

# What a closure may make of a row of logits before it returns it.
_OF_LOGITS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda logits: logits,
    lambda logits: logits.softmax(-1),
    lambda logits: logits.log_softmax(-1),
    lambda logits: logits.sigmoid(),
)


def start_of_head(
    captured: Captured[Any], target: TargetType
) -> tuple[Tensor, Tensor | None]:
    """Weights of the top layer's receivers as the head reads them.

    In this order: the token that the target of a token-level head names; the token
    whose logits the output is; the tokens, or means of tokens, that go into the head as
    vectors. An output per token without a target is explained for the token that heads
    of the family read.

    Returns:
        *tuple* as of :func:`~captum_globenc.attribution.arguments.start_of`.

    Raises:
        InputError: the head reads padding.
        UnsupportedModelError: what it reads is not found.
    """
    run = captured.run
    output = output_tensor(captured.output)
    token = _token_of_target(output, captured, target)
    if token is not None:
        return start_of(token, run)
    read = _read_as_logits(output, captured)
    if read is None:
        read = _read_as_vectors(captured)
    if read is None:
        if target is not None or not _is_per_token(output, captured):
            raise _not_found(captured)
        read = _read_by_family(captured)
    padding = (read > 0) & ~run.attended
    if padding.any():
        example, position = padding.nonzero()[0].tolist()
        raise InputError(
            f"the head reads token {position} of example {example}, which is "
            "padding: pad on the other side, or pass token_index."
        )
    if (read == 1).any(-1).all():
        # Of one token each, few rows of the top layer do.
        return start_of(read.argmax(-1), run)
    return read, None


def _read_by_family(captured: Captured[Any]) -> Tensor:
    """What a pooler reads, where one ran, or heads of the family; none ran here."""
    run, reads = captured.run, captured.encoder.architecture.reads
    pooled = _read_by_pooler(captured)
    if pooled is not None:
        return pooled
    if reads is None:
        raise _not_found(captured)
    if reads == "mean":
        return start_of("mean", run)[0]
    positions = torch.arange(run.shape[1], device=run.attended.device)
    order = positions if reads == "last" else -positions
    hidden = torch.iinfo(order.dtype).min
    return start_of(order.masked_fill(~run.attended, hidden).argmax(-1), run)[0]


def _not_found(captured: Captured[Any]) -> UnsupportedModelError:
    mixers = captured.head.mixers
    mixed = f", and {mixers[0]} mixes tokens after it" if mixers else ""
    return UnsupportedModelError(
        f"which token the head of {type(captured.encoder.root).__name__} reads could "
        "not be found (no vector that it takes is a token of the last layer, or the "
        f"mean of the attended ones{mixed}): pass token_index, an int, a LongTensor "
        '(batch,) or "mean".'
    )


# Heads with an output per token


def _token_of_target(
    output: Tensor, captured: Captured[Any], target: TargetType
) -> int | Tensor | None:
    """The token that the target of a token-level head names."""
    if output.ndim == 1:
        return _token_of_largest(output, captured)
    if target is None or not _is_per_token(output, captured):
        return None
    if captured.head.mixers:
        raise _not_found(captured)
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


def _read_as_logits(output: Tensor, captured: Captured[Any]) -> Tensor | None:
    """The tokens whose logits the output is: decoders classify all tokens.

    Returns:
        *Tensor* of shape (batch, tokens), weights, or *None* where nothing is found.
    """
    output = output.detach()
    if captured.head.mixers:
        return None
    single = output.ndim == 1 and len(output) == captured.run.shape[0]
    for made, function in product(_of_tokens(captured), _OF_LOGITS):
        if output.ndim == 2:
            read = _read_of(output, function(made), captured.run)
            if read is not None:
                return read
        elif single:
            equal = (function(made) == output[:, None, None]).any(-1)
            if (equal.sum(-1) == 1).all():
                return equal.to(captured.run.layers[0].dtype)
    return None


def _of_tokens(captured: Captured[Any]) -> Iterator[Tensor]:
    """What linear maps made of all tokens, the last one's first."""
    for logits in reversed(captured.head.token_logits):
        if tuple(logits.shape[:2]) == captured.run.shape:
            yield logits


# Heads that take vectors


def _read_as_vectors(captured: Captured[Any]) -> Tensor | None:
    """The tokens, and means of tokens, that the head takes as vectors.

    Several, be it in one concatenated vector or by heads that are averaged, count the
    same. What comes out of the encoder's own pooler is what that reads.

    Returns:
        *Tensor* of shape (batch, tokens), weights, or *None* where nothing is found.
    """
    pooled = _read_by_pooler(captured)
    output = output_tensor(captured.output).detach()
    outputs = [Vector(output, is_taken=False)] if output.ndim == 2 else []
    known = [(v.values, pooled) for v in captured.head.pooled if pooled is not None]
    return _read_by([*captured.head.vectors, *outputs], captured, known)


def _read_by_pooler(captured: Captured[Any]) -> Tensor | None:
    """What the encoder's own pooler reads, None where it has none."""
    pooled = captured.head.pooled
    read = _read_by(pooled, captured, [])
    if read is None and pooled and captured.encoder.architecture.reads == "mean":
        # Pooling by attention over all tokens, which has no weights of its own here.
        return start_of("mean", captured.run)[0]
    return read


def _read_by(
    vectors: list[Vector], captured: Captured[Any], known: list[tuple[Tensor, Tensor]]
) -> Tensor | None:
    """The mean of what the vectors are made of.

    Some are known: pairs of a vector and its weights, (batch, tokens).
    """
    hidden = captured.run.output.shape[-1]
    found: list[Tensor] = []
    # What is handed on, and not seen to be taken, counts where nothing else does.
    handed_on: list[Tensor] = []
    for vector, is_taken in vectors:
        if len(vector) != captured.run.shape[0]:
            continue
        weights = [w for other, w in known if torch.equal(vector, other)]
        if weights and not is_taken:
            handed_on = weights[:1]
            continue
        shares = [_share_of(vector, captured, known)]
        if vector.shape[1] % hidden == 0:
            parts = torch.split(vector, hidden, dim=1)
            shares = [_share_of(part, captured, known) for part in parts]
            if is_taken and not found and any(s is None for s in shares):
                # The head begins with another vector, such as the tokens' maximum.
                return None
        read = [share for share in shares if share is not None]
        if len(read) == len(shares):
            found += [r for r in read if not any(torch.equal(r, f) for f in found)]
    read_by = found or handed_on
    return torch.stack(read_by).mean(0) if read_by else None


def _share_of(
    vector: Tensor, captured: Captured[Any], known: list[tuple[Tensor, Tensor]]
) -> Tensor | None:
    """The weights, (batch, tokens), by which a vector, (batch, n), is made."""
    for other, weights in known:
        if torch.equal(vector, other):
            return weights
    # What is made of all tokens says nothing of one where these are mixed.
    made = [] if captured.head.mixers else _of_tokens(captured)
    for states in (captured.run.output.detach(), *made):
        share = _read_of(vector, states, captured.run)
        if share is not None:
            return share
    return None


# What a vector is of the tokens' vectors


def _read_of(vector: Tensor, states: Tensor, run: EncoderRecord) -> Tensor | None:
    """The weights with which a vector is a token's, or a mean of them.

    Args:
        vector (Tensor): (batch, n).
        states (Tensor): (batch, tokens, n).
        run (EncoderRecord): which tokens are attended, and which are patches.

    Returns:
        *Tensor* of shape (batch, tokens), or *None* unless all are of one kind.
    """
    if vector.shape != (len(states), states.shape[-1]):
        return None
    dtype = run.layers[0].dtype
    token = _row_of(vector, states, run.attended)
    if token is not None:
        return nn.functional.one_hot(token, run.shape[1]).to(dtype)
    for kind in _pooled_together(run):
        share = kind.to(dtype) / kind.sum(-1, keepdim=True)
        if _is_mean(vector, states, share):
            return share
    return None


def _pooled_together(run: EncoderRecord) -> list[Tensor]:
    """Of what heads take means: all tokens, and an image's patches, (batch, tokens)."""
    kinds = [run.attended]
    if run.grid is not None:
        patches = run.grid.rows * run.grid.columns
        position = torch.arange(run.shape[1], device=run.attended.device)
        kinds.append(run.attended & (position >= run.shape[1] - patches))
    return kinds


def _is_mean(vector: Tensor, states: Tensor, share: Tensor) -> bool:
    """Whether a vector is the mean with these weights, but for rounding.

    In each dimension two roundings of the mean itself, and those of a sum in float32:
    in half precision a limit for all dimensions would take any vector for the mean.
    """
    working = states.to(share.dtype)
    mean = (share[:, None] @ working)[:, 0]
    sizes = (share[:, None] @ working.abs())[:, 0]
    coarsest = max(torch.finfo(t.dtype).eps for t in (vector, states))
    finest = min(coarsest, torch.finfo(torch.float32).eps)
    limit = 4 * coarsest * mean.abs() + 32 * finest * sizes
    return bool(((vector.to(share.dtype) - mean).abs() <= limit).all())


def _row_of(vectors: Tensor, rows: Tensor, attended: Tensor) -> Tensor | None:
    """The token, (batch), whose row each vector is; None unless all are one.

    Of several equal rows, that of a token which is no padding.
    """
    equal = (rows == vectors[:, None]).all(-1)
    if not equal.any(-1).all():
        return None
    return (equal.int() + (equal & attended).int()).argmax(-1)
