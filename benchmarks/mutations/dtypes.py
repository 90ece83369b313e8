"""Half precision: what is not changed is explained, and what is changed is seen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.mutations.campaign import REFUSED, RIGHT, Trial, add, case
from benchmarks.mutations.models import HIDDEN, deep, subject
from benchmarks.mutations.structure import (
    Change,
    add_hook,
    another_token_added,
    flipped_over_the_batch,
    hooked,
    one_token_zeroed,
    rolled,
    scaled_by,
)

KIND = "dtypes"
HALVES = (torch.bfloat16, torch.float16)
#: Standard deviations of weights, and None where norms and biases are random, too.
SPREADS = (0.02, None, 0.3, None)
FAMILIES = ("bert", "roberta", "distilbert", "electra", "gpt2", "llama", "modernbert")


def unchanged(
    family: str, seed: int, dtype: torch.dtype, spread: float | None
) -> Trial:
    """A random model of twelve layers as it is."""
    return deep(family, seed, dtype, spread).trial()


def _register_unchanged() -> None:
    for dtype in HALVES:
        kind = str(dtype).removeprefix("torch.")
        for seed in range(56):
            # Half of them are BERTs, the others of each family in turn.
            family = FAMILIES[seed // 2 % len(FAMILIES)] if seed % 2 else "bert"
            spread = SPREADS[seed // 2 % len(SPREADS)]
            how = "all random" if spread is None else f"spread {spread}"
            name = f"12 layers unchanged, {family}, {kind}, {how}, {seed}"
            make = _made(family, seed, dtype, spread)
            add(KIND, name, RIGHT, make)


def _made(
    family: str, seed: int, dtype: torch.dtype, spread: float | None
) -> Callable[[], Trial]:
    return lambda: unchanged(family, seed, dtype, spread)


_register_unchanged()


_PLACES = (
    ("layer", "bert"),
    ("layer", "gpt2"),
    ("output", "bert"),
    ("output", "llama"),
    ("norm1", "roberta"),
    ("norm2", "distilbert"),
    ("final", "modernbert"),
)


def _register_hooks() -> None:
    for dtype in HALVES:
        scales = [scaled_by(units, dtype) for units in (6, 12, 50)]
        for part, family in _PLACES:
            for change in (*scales, rolled, one_token_zeroed):
                add_hook(KIND, part, 1, change, family, dtype)


_register_hooks()


@case(
    KIND,
    REFUSED,
    [
        (part, change, family, dtype)
        for dtype in HALVES
        for part, family in (("layer", "bert"), ("output", "gpt2"), ("layer", "llama"))
        for change in (
            scaled_by(12, dtype),
            one_token_zeroed,
            flipped_over_the_batch,
            another_token_added,
        )
    ],
)
def hook_in_twelve_layers(
    part: str, change: Change, family: str, dtype: torch.dtype
) -> Trial:
    """A part of the seventh layer of twelve."""
    one = deep(family, 1, dtype, 0.3)
    hooked(one.part(part, 6), change)
    return one.trial(truth=None)


@case(
    KIND,
    RIGHT,
    [
        (f, d)
        for f in ("bert", "albert", "llama", "t5", "vit", "dinov2", "torch-post", "esm")
        for d in (torch.float32, torch.bfloat16, torch.float16)
    ],
)
def three_layers_unchanged(family: str, dtype: torch.dtype) -> Trial:
    """Families that are not among the deep ones."""
    return subject(family, dtype).trial()


@case(KIND, RIGHT, [("bert",), ("gpt2",), ("llama",)])
def head_in_another_dtype(family: str) -> Trial:
    """The encoder is in bfloat16, and its head in float32."""
    one = subject(family, torch.bfloat16)
    weight = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        states = one.encoder(ids, attention_mask=mask).last_hidden_state
        return states[:, 0].float() @ weight.T

    return one.trial(forward)


@case(KIND, RIGHT, [("bert",), ("vit",)])
def norms_in_float(family: str) -> Trial:
    """As in mixed precision: the norms' weights are float32, the rest bfloat16."""
    one = subject(family, torch.bfloat16)
    for module in one.model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.float()
            module.forward = _in_float(module.forward)
    return one.trial()


def _in_float(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: forward(x.float()).to(x.dtype)
