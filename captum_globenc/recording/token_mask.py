"""Which tokens are padding, from what the layers attend to."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_globenc.deferred import check_later
from captum_globenc.errors import InputError
from captum_globenc.recording.attention import AttentionCall


def masked_in(call: AttentionCall) -> Tensor:
    """(batch, tokens): the sources that the mask of an attention does not hide."""
    batch, _, tokens, _ = call.value.shape
    if call.mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=call.value.device)
    # What is added to hide a source differs (-inf, the dtype's lowest value, -10000);
    # exp(-1000) is 0 in every dtype.
    allowed = call.mask if call.mask.dtype == torch.bool else call.mask > -1000
    return allowed.any(1).any(1).expand(batch, tokens)


def attention_targets(calls: list[AttentionCall], given: Tensor | None) -> Tensor:
    """(batch, tokens): the sources to which a token attends in some layer.

    Args:
        calls (list[AttentionCall]): the layers' attention weights.
        given (Tensor or None): the encoder's own mask, (batch, tokens), 0 at padding.
            It counts where the weights agree with it: padding may attend to itself, or
            to everything, without being seen by a token.
    """
    taken = torch.stack([(call.attention() > 0).any(1) for call in calls]).any(0)
    if given is not None:
        kept = given.to(taken.device).bool()
        agrees = ~(taken & kept[:, :, None] & ~kept[:, None, :]).any()
        return torch.where(agrees, kept, taken.any(1))
    return taken.any(1)


def check_token_mask(token_mask: Tensor) -> None:
    """Raise where no token of an example is attended, (batch, tokens)."""

    def judge(has_tokens: list[float]) -> None:
        if not all(has_tokens):
            raise InputError(
                f"the attention mask of example {has_tokens.index(0)} is all zero, so "
                "there is no token to explain."
            )

    check_later(token_mask.any(-1), judge)
