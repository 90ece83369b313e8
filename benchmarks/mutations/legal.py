"""Nothing is changed: what the package says of models as they are is right."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.mutations.campaign import RIGHT, Scores, Trial, case
from benchmarks.mutations.models import ALL, TEXT, TORCH, subject
from captum_globenc import GlobEnc, LayerGlobEnc

KIND = "legal"


# In float64 its eager attention makes NaN of padding, outside of all windows.
_NAN_AT_PADDING = ("modernbert", "eager")


@case(
    KIND,
    RIGHT,
    [
        (f, a)
        for f in ALL
        for a in ("sdpa", "eager")
        if (f not in TORCH or a == "sdpa") and (f, a) != _NAN_AT_PADDING
    ],
)
def as_it_is(family: str, attention: str) -> Trial:
    """Its own head, padded batches."""
    truth = subject(family).truth()
    return subject(family, attention=attention).trial(truth=truth)


@case(KIND, RIGHT, [(f,) for f in ALL])
def decomposed(family: str) -> Trial:
    """The scores of every layer."""
    one = subject(family)
    local = one.twin().local()
    if one.mask is not None:
        kept = one.mask.bool()
        local = local * (kept[:, None, :, None] & kept[:, None, None, :])

    def found() -> Tensor:
        return GlobEnc(one.forward).decompose(one.inputs, one.arguments).local

    return Scores(found, local)


@case(KIND, RIGHT, [(f, k) for f in ("bert", "gpt2", "llama", "vit") for k in range(3)])
def from_a_layer(family: str, index: int) -> Trial:
    """``LayerGlobEnc``: the rollout from the top down to a layer."""
    one = subject(family)
    rollout = one.twin().rollout(start=index + 1)
    truth = (one.weights()[:, None] @ rollout)[:, 0]
    method = LayerGlobEnc(one.forward, one.part("layer", index))

    def found() -> Tensor:
        return method.attribute(one.inputs, 1, one.arguments).sum(-1)

    return Scores(found, truth)


@case(
    KIND, RIGHT, [(f, t) for f in ("bert", "llama", "vit", "t5") for t in (2, "mean")]
)
def of_a_token_index(family: str, index: int | str) -> Trial:
    """The caller says which token."""
    one = subject(family)
    rollout = one.twin().rollout()
    if index == "mean":
        kept = torch.ones(rollout.shape[:2]) if one.mask is None else one.mask
        weights = (kept / kept.sum(-1, keepdim=True)).double()
        truth = (weights[:, None] @ rollout)[:, 0]
    else:
        truth = rollout[:, index]
    return one.trial(truth=one.spread(truth), token_index=index)


@case(KIND, RIGHT, [(f,) for f in ("bert", "gpt2", "vit", "torch-post")])
def one_example_at_a_time(family: str) -> Trial:
    """Internal batches of one."""
    return subject(family).trial(internal_batch_size=1)


@case(KIND, RIGHT, [(f,) for f in TEXT[:8]])
def shares_of_one(family: str) -> Trial:
    """The scores of an example sum to 1."""
    one = subject(family)
    truth = one.truth()
    globenc = GlobEnc(one.forward, normalize=True)
    return Scores(
        lambda: globenc.attribute(one.inputs, 1, one.arguments),
        truth / truth.sum(-1, keepdim=True),
    )


@case(KIND, RIGHT, [(f,) for f in TEXT[:8]])
def called_as_a_model(family: str) -> Trial:
    """No closure around it."""
    one = subject(family)
    if family == "gpt2":
        return one.trial()
    return Scores(
        lambda: GlobEnc(one.model).attribute(one.inputs, 1, one.arguments), one.truth()
    )


class Wrapper(nn.Module):
    """A model inside of another module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The logits."""
        return self.inner(ids, attention_mask=mask)[0]


@case(KIND, RIGHT, [(f,) for f in ("bert", "distilbert", "llama", "modernbert")])
def wrapped(family: str) -> Trial:
    """A module around the model."""
    one = subject(family)
    wrapper = Wrapper(one.model)
    return Scores(
        lambda: GlobEnc(wrapper).attribute(one.inputs, 1, one.arguments), one.truth()
    )


@case(KIND, RIGHT, [(1,), (2,), (3,), (12,)])
def of_any_length(tokens: int) -> Trial:
    """One token, a few, many."""
    return subject("bert", lengths=(tokens,)).trial()
