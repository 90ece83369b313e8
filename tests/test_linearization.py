"""The linearised run: each rule by a formula, what is refused, and what is left alone.

Formulas are written out here for one operation at a time; the literal twins in
``oracle_attnlrp`` and ``oracle_decompx`` say how whole models are explained.
"""

from __future__ import annotations

import copy
import gc
import math
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers as t
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from captum_globenc import AttnLRP, DecompX, LayerAttnLRP, LayerDecompX
from captum_globenc.errors import (
    ConservationError,
    InputError,
    NonFiniteActivationError,
    UnsupportedModelError,
)
from tests.conftest import left_behind
from tests.models import FAMILIES, build, padded, randomize, sentence

SIZE, TOKENS, BATCH = 6, 4, 2
RULES = ("attnlrp", "cp")
METHODS = (AttnLRP, DecompX)
EXACT = {"rtol": 1e-10, "atol": 1e-12}
IDS, MASK = padded([sentence(5), sentence(4, seed=1)])
Function = Callable[[Tensor], Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


X = draw(BATCH, TOKENS, SIZE)
# What reads the values: a number of each, so that gradients are known by hand.
G = draw(TOKENS, SIZE, seed=1)
A, B = draw(SIZE, SIZE, seed=2), draw(SIZE, SIZE, seed=3)


def read(values: Tensor, weights: Tensor = G) -> Tensor:
    """An output whose gradient is the weights."""
    return (values * weights).flatten(1).sum(1)


def explain(function: Function, x: Tensor = X, rule: str = "cp") -> tuple:
    """(relevance, delta) of one output per example."""
    return AttnLRP(function, attention=rule).attribute(x, return_convergence_delta=True)


def check(function: Function, gradient: Tensor, x: Tensor = X, rule: str = "cp"):
    """Relevance is x times this gradient, and the delta is the rest of the output."""
    found, delta = explain(function, x, rule)
    torch.testing.assert_close(found, x * gradient, **EXACT)
    rest = function(x.clone()) - (x * gradient).flatten(1).sum(1)
    torch.testing.assert_close(delta, rest, **EXACT)


# Each rule by itself


@pytest.mark.parametrize("rule", RULES)
def test_linear_maps_and_sums(rule: str) -> None:
    """Relevance of W x + b is (Wᵀ g) x, and that of every constant is the delta."""
    bias, other = draw(SIZE, seed=4), draw(TOKENS, SIZE, seed=5)
    wide = draw(TOKENS, 2 * SIZE, seed=6)
    later = torch.ones(TOKENS, 1).double().index_fill(0, torch.tensor([0]), 0)
    angles = torch.arange(SIZE).outer(torch.arange(SIZE)).double()
    cosines = torch.cos(angles * 2 * torch.pi / SIZE)
    maps: dict[str, tuple[Function, Tensor]] = {
        "linear": (lambda x: read(functional.linear(x, A, bias)), G @ A),
        "matmul": (lambda x: read(x @ A.T + bias), G @ A),
        "kwargs": (lambda x: read(torch.add(input=x, other=other, alpha=2)), G),
        "difference": (lambda x: read(torch.sub(other, x)), -G),
        "number": (lambda x: read(1 - x), -G),
        "numbers": (lambda x: read(3 * x + 0.5), 3 * G),
        "einsum": (lambda x: read(torch.einsum("bti,oi->bto", x, A)), G @ A),
        "conv1d": (
            lambda x: read(functional.conv1d(x.mT, A[..., None], bias).mT),
            G @ A,
        ),
        "addmm": (
            lambda x: read(torch.addmm(bias, x.flatten(0, 1), A.T).view_as(x)),
            G @ A,
        ),
        "baddbmm": (
            lambda x: read(
                other.expand(2, -1, -1).baddbmm(
                    batch1=x, batch2=A.expand(2, -1, -1), beta=0.5, alpha=2
                )
            ),
            2 * G @ A.T,
        ),
        "joined": (
            lambda x: read(torch.cat(tensors=[other.expand_as(x), x], dim=2), wide),
            wide[:, SIZE:],
        ),
        "where": (lambda x: read(torch.where(G > 0, x, other)), G * (G > 0)),
        "written": (lambda x: read(set_first(x.clone(), 2.0)), G * later),
        "mean": (lambda x: x.mean((1, 2)), torch.full_like(G, 1 / G.numel())),
        "absolute": (lambda x: read(x.abs()), G * X.sign()),
        "fft": (lambda x: read(torch.fft.fft(x, dim=-1).real), G @ cosines),
    }
    for name, (function, gradient) in maps.items():
        try:
            check(function, gradient, rule=rule)
        except AssertionError as error:
            raise AssertionError(name) from error


def set_first(values: Tensor, number: float) -> Tensor:
    values[:, 0] = number
    return values


GAMMA, BETA = draw(SIZE, seed=7), draw(SIZE, seed=8)


def of_layer_norm(x: Tensor, gradient: Tensor, epsilon: float) -> Tensor:
    """γ (g - mean) / s: the mean stays linear and the deviation is a constant."""
    centred = x - x.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()
    scaled = GAMMA * gradient / deviation
    return scaled - scaled.mean(-1, keepdim=True)


def with_parts(x: Tensor, epsilon: float = 1e-5) -> tuple[Tensor, Tensor]:
    mean = x.mean(-1, keepdim=True)
    return x - mean, ((x - mean) ** 2).mean(-1, keepdim=True) + epsilon


def by_var_mean(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
    return (x - mean) * (variance + 1e-5) ** -0.5 * GAMMA + BETA


LAYER_NORMS: dict[str, Function] = {
    "function": lambda x: functional.layer_norm(x, (SIZE,), GAMMA, BETA),
    "keywords": lambda x: functional.layer_norm(
        input=x, normalized_shape=(SIZE,), weight=GAMMA, bias=BETA, eps=1e-5
    ),
    "sqrt": lambda x: with_parts(x)[0] / with_parts(x)[1].sqrt() * GAMMA + BETA,
    "rsqrt": lambda x: GAMMA * (with_parts(x)[0] * with_parts(x)[1].rsqrt()) + BETA,
    "power": lambda x: with_parts(x)[0] * with_parts(x)[1].pow(-0.5) * GAMMA + BETA,
    "var_mean": by_var_mean,
    "var": lambda x: (
        (x - x.mean(-1, keepdim=True))
        / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        * GAMMA
        + BETA
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("norm", LAYER_NORMS.values(), ids=LAYER_NORMS)
def test_layer_norm(norm: Function, rule: str) -> None:
    """The module, and as it is written out."""
    check(lambda x: read(norm(x)), of_layer_norm(X, G, 1e-5), rule=rule)


RMS_NORMS: dict[str, Function] = {
    "module": lambda x: functional.rms_norm(x, (SIZE,), GAMMA, 1e-6),
    "rsqrt": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * GAMMA,
    "one over": lambda x: (
        x * (1 / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)) * GAMMA
    ),
    "product": lambda x: (
        GAMMA * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6))
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("norm", RMS_NORMS.values(), ids=RMS_NORMS)
def test_rms_norm(norm: Function, rule: str) -> None:
    deviation = (X.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    check(lambda x: read(norm(x)), G * GAMMA / deviation, rule=rule)


@pytest.mark.parametrize("rule", RULES)
def test_vectors_of_length_one(rule: str) -> None:
    lengths = X.square().sum(-1, keepdim=True).sqrt()
    for norm in (
        lambda x: functional.normalize(x, dim=-1),
        lambda x: x / x.norm(dim=-1, keepdim=True),
        lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    ):
        check(lambda x, norm=norm: read(norm(x)), G / lengths, rule=rule)
    # The cosine with a constant, and of two values that depend on the inputs.
    fixed = A[:TOKENS]
    of_fixed = fixed / fixed.norm(dim=-1, keepdim=True)
    weights = torch.arange(1.0, TOKENS + 1).double()
    check(
        lambda x: (functional.cosine_similarity(x, fixed, dim=-1) * weights).sum(-1),
        weights[:, None] * of_fixed / lengths,
        rule=rule,
    )


def test_the_cosine_of_two_values_is_a_product() -> None:
    """Half of it to each of them: u·v / (|u| |v|)."""
    u, v = X[:, 0], X[:, 1]
    cosine = (u * v).sum(-1) / (u.norm(dim=-1) * v.norm(dim=-1))
    found, delta = explain(
        lambda x: functional.cosine_similarity(x[:, 0], x[:, 1]), rule="attnlrp"
    )
    torch.testing.assert_close(found[:, 0].sum(-1), cosine / 2, **EXACT)
    torch.testing.assert_close(found[:, 1].sum(-1), cosine / 2, **EXACT)
    torch.testing.assert_close(delta, torch.zeros_like(delta), **EXACT)


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_norm_with_running_statistics(rule: str) -> None:
    norm = nn.BatchNorm1d(SIZE).double().eval()
    norm.running_mean.copy_(A[0])
    norm.running_var.copy_(A[1].abs())
    with torch.no_grad():
        norm.weight.copy_(GAMMA)
        norm.bias.copy_(BETA)
    gradient = G * GAMMA / (A[1].abs() + 1e-5).sqrt()
    check(lambda x: read(norm(x.mT).mT), gradient, rule=rule)


def tanh_by_exponentials(u: Tensor) -> Tensor:
    return (torch.exp(u) - torch.exp(-u)) / (torch.exp(u) + torch.exp(-u))


# Of each activation: its values, its slope at 0, and ways to write it.
ACTIVATIONS: dict[str, tuple[Function, float, list[Function]]] = {
    "relu": (
        lambda u: u * (u > 0),
        0.0,
        [
            functional.relu,
            nn.ReLU(),
            nn.ReLU(inplace=True),
            lambda u: functional.relu(u, True),
            lambda u: u.clamp(min=0),
            lambda u: torch.clamp_min(u, 0),
            lambda u: torch.maximum(u, torch.zeros(())),
            lambda u: u.relu_(),
            lambda u: u * (u > 0),
        ],
    ),
    "squared relu": (
        lambda u: (u * (u > 0)) ** 2,
        0.0,
        [
            lambda u: functional.relu(u).square(),
            lambda u: functional.relu(u) ** 2,
            lambda u: torch.pow(functional.relu(u), 2),
            lambda u: functional.relu(u) * functional.relu(u),
            t.activations.ACT2FN["relu2"],
        ],
    ),
    "gelu": (
        lambda u: u * (1 + torch.erf(u / 2**0.5)) / 2,
        0.5,
        [
            functional.gelu,
            nn.GELU(),
            lambda u: u * 0.5 * (1.0 + torch.erf(u / 2**0.5)),
            lambda u: 0.5 * u * (1.0 + torch.special.erf(u * 0.5**0.5)),
            t.activations.GELUActivation(use_gelu_python=True),
        ],
    ),
    "gelu_new": (
        lambda u: u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3))),
        1.0,
        [
            lambda u: 2 * functional.gelu(u, approximate="tanh"),
            lambda u: 2 * t.activations.NewGELUActivation()(u),
            lambda u: (
                u
                * (
                    1.0
                    + torch.tanh(
                        (2 / torch.pi) ** 0.5 * (u + 0.044715 * torch.pow(u, 3.0))
                    )
                )
            ),
        ],
    ),
    "silu": (
        lambda u: u / (1 + torch.exp(-u)),
        0.5,
        [
            functional.silu,
            nn.SiLU(),
            nn.SiLU(inplace=True),
            lambda u: u * torch.sigmoid(u),
            lambda u: u * nn.Sigmoid()(u),
            lambda u: u / (1 + torch.exp(-u)),
            lambda u: u * (1 / (1 + torch.exp(-u))),
            lambda u: u.clone().mul_(torch.sigmoid(u)),
        ],
    ),
    "mish": (
        lambda u: u * torch.tanh(torch.log1p(torch.exp(u))),
        0.6,
        [functional.mish, nn.Mish(), lambda u: u * torch.tanh(functional.softplus(u))],
    ),
    "tanh": (
        torch.tanh,
        1.0,
        [torch.tanh, nn.Tanh(), lambda u: u.tanh_(), tanh_by_exponentials],
    ),
    "softsign": (
        lambda u: u / (1 + u.abs()),
        1.0,
        [functional.softsign, nn.Softsign(), lambda u: u / (1 + torch.abs(u))],
    ),
    "hardtanh": (
        lambda u: u.clamp(-0.5, 0.5),
        1.0,
        [
            lambda u: functional.hardtanh(u, -0.5, 0.5),
            lambda u: u.clamp(-0.5, 0.5),
            lambda u: u.clamp_(min=-0.5, max=0.5),
            nn.Hardtanh(-0.5, 0.5),
        ],
    ),
    "prelu": (
        lambda u: torch.where(u > 0, u, 0.3 * u),
        0.3,
        [
            lambda u: functional.leaky_relu(u, 0.3),
            lambda u: functional.prelu(u, torch.tensor([0.3], dtype=torch.float64)),
            nn.PReLU(init=0.3, dtype=torch.float64),
        ],
    ),
}
WRITTEN = [
    pytest.param(values, slope, way, id=f"{name}-{number}")
    for name, (values, slope, ways) in ACTIVATIONS.items()
    for number, way in enumerate(ways)
]


@pytest.mark.parametrize(("values", "slope", "way"), WRITTEN)
def test_activations(values: Function, slope: float, way: Function) -> None:
    """f(u) is u times f(u) / u, a constant; at u = 0 its limit."""
    x = X.clone()
    x[0, 0] = 0  # Then u is 0, too.
    u = x @ A.T
    zero = u == 0
    assert zero.any()
    assert not zero.all()
    slopes = torch.where(zero, slope, values(u) / torch.where(zero, 1.0, u))
    limit = (G * slopes) @ A
    for rule in RULES:
        found, delta = explain(lambda x: read(way(x @ A.T)), x, rule)
        torch.testing.assert_close(found, x * limit, **EXACT)
        torch.testing.assert_close(delta, torch.zeros_like(delta), **EXACT)
    # What u's own relevance would be divided by u where u is 0.
    layer = nn.Identity()
    at_u, _ = LayerAttnLRP(lambda x: read(way(layer(x @ A.T) + 0)), layer).attribute(
        x, return_convergence_delta=True
    )
    torch.testing.assert_close(at_u, G * values(u), **EXACT)


def test_the_limit_at_zero_goes_on() -> None:
    """u = a - b at a = b: each takes ± a times the slope at 0."""
    x = torch.full((1, 2), 3.0).double()
    for _, slope, ways in ACTIVATIONS.values():
        for way in ways[:4]:  # Others have two slopes there, and torch takes either.
            found, _ = explain(lambda x, way=way: 2 * way(x[:, 0] - x[:, 1]), x)
            expected = torch.tensor([[6 * slope, -6 * slope]]).double()
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_an_activation_behind_a_shift(rule: str) -> None:
    """tanh(u + ½) has its line through the origin at u + ½, and ½ takes its part."""
    slopes = torch.tanh(X + 0.5) / (X + 0.5)
    check(lambda x: read(torch.tanh(x + 0.5)), G * slopes, rule=rule)
    check(lambda x: read(functional.gelu(x - 0.5)), gelu_slopes(X - 0.5) * G, rule=rule)


def gelu_slopes(u: Tensor) -> Tensor:
    return (1 + torch.erf(u / 2**0.5)) / 2


@pytest.mark.parametrize("rule", RULES)
def test_largest_values_are_selected(rule: str) -> None:
    weights, last = G[0], torch.nn.functional.one_hot
    for select in (
        lambda x: x.max(1).values,
        lambda x: x.amax(1),
        lambda x: x.topk(2, dim=1).values[:, 0],
        lambda x: x.sort(1).values[:, -1],
        lambda x: functional.adaptive_max_pool1d(x.mT, 1)[..., 0],
        lambda x: functional.max_pool1d(x.mT, TOKENS)[..., 0],
    ):
        chosen = last(X.argmax(1), TOKENS).mT.double()
        check(
            lambda x, select=select: read(select(x), weights),
            chosen * weights,
            rule=rule,
        )


def test_softmax_keeps_what_is_not_its_logits() -> None:
    """R_i = x_i s_i (g_i - Σ s g), and the rest of Σ g s is the delta."""
    s = X.exp() / X.exp().sum(-1, keepdim=True)
    gradient = s * (G - (G * s).sum(-1, keepdim=True))
    for softmax in (
        lambda x: functional.softmax(x, -1),
        lambda x: torch.softmax(x, dim=-1),
        lambda x: x.softmax(-1),
        nn.Softmax(-1),
    ):
        check(lambda x, softmax=softmax: read(softmax(x)), gradient, rule="attnlrp")
        with pytest.raises(UnsupportedModelError, match="does not depend"):
            explain(lambda x, softmax=softmax: read(softmax(x)), rule="cp")


HEADS, WIDTH = 3, 2


def attention_by_hand(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, seen: Tensor, scale: float, rule: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One head: what is mixed, and the relevance of q, k and v, (tokens, width)."""
    count = len(q)
    mixed, weights = torch.zeros_like(v), torch.zeros(count, count).double()
    for i in range(count):
        logits = [float((q[i] * k[j]).sum() * scale) for j in range(count)]
        exponentials = [
            math.exp(x) if seen[i, j] else 0.0 for j, x in enumerate(logits)
        ]
        for j in range(count):
            weights[i, j] = exponentials[j] / sum(exponentials)
            mixed[i] += weights[i, j] * v[j]
    of_q, of_k, of_v = (torch.zeros_like(part) for part in (q, k, v))
    half = 1.0 if rule == "cp" else 0.5
    for i in range(count):
        # Half of the product α v to α, then through the softmax.
        of_weights = [0.5 * float((g[i] * v[j]).sum()) for j in range(count)]
        mean = sum(float(weights[i, j]) * of_weights[j] for j in range(count))
        for j in range(count):
            of_v[j] += half * weights[i, j] * g[i] * v[j]
            if rule == "attnlrp":
                logit = float(weights[i, j]) * (of_weights[j] - mean) * scale
                of_q[i] += 0.5 * logit * q[i] * k[j]
                of_k[j] += 0.5 * logit * q[i] * k[j]
    return mixed, of_q, of_k, of_v


CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
SOME = CAUSAL | torch.eye(TOKENS, dtype=torch.bool).roll(1, 1)
PENALTY = torch.zeros(TOKENS, TOKENS).double().masked_fill(~SOME, -torch.inf)


def written_out(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    logits = (q @ k.mT * scale).masked_fill(~seen, -torch.inf)
    return logits.softmax(-1) @ v


ATTENTION: dict[str, tuple[Callable[..., Tensor], Tensor, float]] = {
    "all": (
        lambda q, k, v: functional.scaled_dot_product_attention(q, k, v),
        torch.ones_like(CAUSAL),
        WIDTH**-0.5,
    ),
    "causal": (
        lambda q, k, v: functional.scaled_dot_product_attention(
            q, k, v, is_causal=True
        ),
        CAUSAL,
        WIDTH**-0.5,
    ),
    "bool mask": (
        lambda q, k, v: functional.scaled_dot_product_attention(
            q, k, v, SOME, scale=0.7
        ),
        SOME,
        0.7,
    ),
    "added mask": (
        lambda q, k, v: functional.scaled_dot_product_attention(
            q, k, v, attn_mask=PENALTY
        ),
        SOME,
        WIDTH**-0.5,
    ),
    "written out": (
        lambda q, k, v: written_out(q, k, v, SOME, 0.7),
        SOME,
        0.7,
    ),
    "scaled in place": (
        lambda q, k, v: (
            (q @ k.mT).mul_(0.7).masked_fill_(~SOME, -torch.inf).softmax(-1) @ v
        ),
        SOME,
        0.7,
    ),
    "einsum": (
        lambda q, k, v: torch.einsum(
            "bhij,bhjd->bhid",
            (torch.einsum("bhid,bhjd->bhij", q, k) * 0.7 + PENALTY).softmax(-1),
            v,
        ),
        SOME,
        0.7,
    ),
    "bmm": (
        lambda q, k, v: torch.bmm(
            (
                torch.baddbmm(
                    PENALTY,
                    q.flatten(0, 1),
                    k.flatten(0, 1).mT,
                    beta=1,
                    alpha=0.7,
                )
            ).softmax(-1),
            v.flatten(0, 1),
        ).unflatten(0, q.shape[:2]),
        SOME,
        0.7,
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("attend", "seen", "scale"), ATTENTION.values(), ids=ATTENTION)
def test_attention(attend, seen: Tensor, scale: float, rule: str) -> None:
    """Queries, keys and values are inputs by themselves, head by head."""
    shape = (BATCH, HEADS, TOKENS, WIDTH)
    q, k, v = (draw(*shape, seed=seed) for seed in (1, 2, 3))
    g = draw(*shape[1:], seed=4)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return read(attend(q, k, v), g)

    if rule == "cp":
        alone = AttnLRP(lambda v: forward(q, k, v), attention=rule).attribute(v)
    found = AttnLRP(forward, attention=rule).attribute((q, k, v))
    for b in range(BATCH):
        for h in range(HEADS):
            mixed, *expected = attention_by_hand(
                q[b, h], k[b, h], v[b, h], g[h], seen, scale, rule
            )
            torch.testing.assert_close(attend(q, k, v)[b, h], mixed, **EXACT)
            for part, by_hand in zip(found, expected, strict=True):
                torch.testing.assert_close(part[b, h], by_hand, **EXACT)
            if rule == "cp":
                torch.testing.assert_close(alone[b, h], expected[2], **EXACT)


@pytest.mark.parametrize("rule", RULES)
def test_queries_in_groups(rule: str) -> None:
    """Shared keys and values get the sum of what their copies would."""
    q = draw(BATCH, 4, TOKENS, WIDTH, seed=1)
    k, v = (draw(BATCH, 2, TOKENS, WIDTH, seed=seed) for seed in (2, 3))
    g = draw(4, TOKENS, WIDTH, seed=4)

    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        return read(mixed, g)

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return read(functional.scaled_dot_product_attention(q, k, v, is_causal=True), g)

    found = AttnLRP(grouped, attention=rule).attribute((q, k, v))
    copies = AttnLRP(repeated, attention=rule).attribute(
        (q, *(part.repeat_interleave(2, 1) for part in (k, v)))
    )
    torch.testing.assert_close(found[0], copies[0], **EXACT)
    for part, copied in zip(found[1:], copies[1:]):
        summed = copied.unflatten(1, (2, 2)).sum(2)
        torch.testing.assert_close(part, summed, **EXACT)


def test_a_product_of_two_values() -> None:
    """AttnLRP gives half to each, CP-LRP all to what is not activated."""
    up, gate = X @ A.T, functional.silu(X @ B.T)
    slopes = 1 / (1 + torch.exp(-(X @ B.T)))
    to_up, to_gate = (G * gate) @ A, (G * up * slopes) @ B
    for product in (
        lambda x: (x @ A.T) * functional.silu(x @ B.T),
        lambda x: torch.mul(input=functional.silu(x @ B.T), other=x @ A.T),
        lambda x: (x @ A.T).mul_(nn.SiLU()(x @ B.T)),
        lambda x: nn.SiLU(inplace=True)(x @ B.T) * (x @ A.T),
    ):

        def forward(x: Tensor, product: Function = product) -> Tensor:
            return read(product(x))

        check(forward, 0.5 * to_up + 0.5 * to_gate, rule="attnlrp")
        check(forward, to_up, rule="cp")


def test_gates_without_an_origin() -> None:
    """CP-LRP takes them as constants. AttnLRP would need their slope at 0."""
    for gate in (torch.sigmoid, nn.Sigmoid(), functional.softplus, nn.Softplus()):

        def forward(x: Tensor, gate: Function = gate) -> Tensor:
            return read((x @ A.T) * gate(x @ B.T))

        check(forward, (G * gate(X @ B.T)) @ A, rule="cp")
        with pytest.raises(UnsupportedModelError, match=r"'(Sigmoid|Softplus)'"):
            explain(forward, rule="attnlrp")


def test_what_is_written_to_a_tensor() -> None:
    """In place or not, the values and the relevance are the same."""
    pairs: dict[str, tuple[Function, Function]] = {
        "sum": (
            lambda x: x.clone().add_(x @ A.T, alpha=2),
            lambda x: x + 2 * (x @ A.T),
        ),
        "buffer": (
            lambda x: torch.ones_like(x).add_(x @ A.T),
            lambda x: 1 + x @ A.T,
        ),
        "slices": (by_slices, lambda x: torch.stack([x[:, 1], x[:, 0] @ A.T], 1)),
        "constant": (
            lambda x: put(x @ A.T, 5.0),
            lambda x: torch.cat([torch.full_like(x[:, :1], 5), (x @ A.T)[:, 1:]], 1),
        ),
        "kept": (
            lambda x: put(torch.ones_like(x), (x @ A.T)[:, 0]),
            lambda x: torch.cat([(x @ A.T)[:, :1], torch.ones_like(x[:, 1:])], 1),
        ),
        "view": (of_a_view, lambda x: torch.cat([x[:, :1] * 2, x[:, 1:]], 1) + 1),
        "statement": (by_statement, lambda x: functional.relu(x @ A.T)),
        "input": (lambda x: x.add_(1.0), lambda x: x + 1.0),
        "divided": (lambda x: (x @ A.T).div_(4), lambda x: x @ A.T / 4),
        "gate": (
            lambda x: (x @ A.T).mul_(torch.tanh(x @ B.T)),
            lambda x: (x @ A.T) * torch.tanh(x @ B.T),
        ),
    }
    for name, (in_place, out) in pairs.items():
        weights = G[: out(X.clone()).shape[1]]
        for rule in RULES:
            x = X.clone()
            found, delta = explain(partial(reading, in_place, weights), x, rule)
            expected, rest = explain(partial(reading, out, weights), X, rule)
            torch.testing.assert_close(found, expected, **EXACT, msg=name)
            torch.testing.assert_close(delta, rest, **EXACT, msg=name)
            assert torch.equal(x, X), name


def reading(function: Function, weights: Tensor, x: Tensor) -> Tensor:
    return read(function(x), weights)


def by_slices(x: Tensor) -> Tensor:
    result = torch.zeros_like(x[:, :2])
    result[:, 0], result[:, 1] = x[:, 1], x[:, 0] @ A.T
    return result


def put(target: Tensor, value: Tensor | float) -> Tensor:
    target[:, 0] = value
    return target


def of_a_view(x: Tensor) -> Tensor:
    result = x.clone()
    result[:, 0].mul_(2)
    result += 1
    return result


def by_statement(x: Tensor) -> Tensor:
    result = x @ A.T
    result.relu_()
    return result


def test_a_part_of_an_activation_that_changes_later() -> None:
    """σ(u) times u + 1 is not the activation u σ(u)."""

    def forward(x: Tensor) -> Tensor:
        u = x @ A.T
        gate = torch.sigmoid(u)
        u.add_(1)
        return read(u * gate)

    check(forward, (G * torch.sigmoid(X @ A.T)) @ A, rule="cp")


# What is refused: nothing is silently something else


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return -gradient


class View(Reversed):
    """Called like an operation that moves numbers."""


def by_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(np.sin((x @ A.T).detach().numpy()))


def by_list(x: Tensor) -> Tensor:
    return torch.tensor((x @ A.T).detach().numpy().tolist(), dtype=torch.float64)


REFUSED: dict[str, tuple[Function, str]] = {
    "sin": (torch.sin, "'Sin'"),
    "exp": (torch.exp, "'Exp'"),
    "log_softmax": (lambda x: functional.log_softmax(x, -1), "'LogSoftmax'"),
    "logsumexp": (lambda x: x.logsumexp(-1), "'Logsumexp'"),
    "cumprod": (lambda x: x.cumprod(1), "'Cumprod'"),
    "softmin": (lambda x: functional.softmin(x, -1), "'Softmax'"),
    "group norm": (lambda x: functional.group_norm(x.mT, 2).mT, "'NativeGroupNorm'"),
    "instance norm": (
        lambda x: functional.instance_norm(x.mT).mT,
        "no rule for instance_norm",
    ),
    "batch statistics": (
        lambda x: functional.batch_norm(x.mT, None, None, training=True).mT,
        "no rule for batch_norm",
    ),
    "own statistics": (
        nn.BatchNorm1d(TOKENS, track_running_stats=False).double(),
        "no rule for batch_norm",
    ),
    "weighted norm": (
        lambda x: functional.layer_norm(x, (SIZE,), (x @ A).mean((0, 1))),
        "weight of a LayerNorm depends",
    ),
    "quotient": (lambda x: x / (x @ A).sum(-1, keepdim=True), r"multiplied.*Div"),
    "three factors": (
        lambda x: torch.einsum("bti,bti,bti->bti", x, x @ A, x @ B),
        "multiplied",
    ),
    "Function": (Reversed.apply, r"'Reversed' .*torch\.autograd\.Function"),
    "a name that is known": (View.apply, r"'View' .*torch\.autograd\.Function"),
    "detach": (lambda x: x + (x @ A.T).detach(), "was detached.*'add'"),
    "detached, then changed": (
        lambda x: x - torch.sin((x @ A.T).detach()).abs(),
        "was detached.*'sub'",
    ),
    "data": (lambda x: torch.cat([x, (x @ A.T).data], 1), "was detached.*'cat'"),
    "straight through": (
        lambda x: x + (x.round() - x).detach(),
        "was detached",
    ),
    "numpy": (lambda x: x * by_numpy(x), "was detached.*'mul'"),
    "list": (lambda x: x + by_list(x), "was detached"),
    "checkpoint": (
        lambda x: checkpoint(lambda x: torch.tanh(x @ A), x, use_reentrant=False),
        "turn checkpointing off",
    ),
    "old checkpoint": (
        lambda x: checkpoint(lambda x: torch.tanh(x @ A), x, use_reentrant=True),
        "'CheckpointFunction'",
    ),
    "dropout in attention": (
        lambda x: functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1),
        "dropout 0.1",
    ),
    "all detached": (lambda x: x.detach(), "does not depend on the inputs"),
    "a variance": (lambda x: x.var(-1), "does not depend on the inputs"),
    "written over": (
        lambda x: overwritten(x),
        "writes to a tensor that the backward pass needs",
    ),
}


def overwritten(x: Tensor) -> Tensor:
    mixed = functional.softmax(x, -1)
    result = mixed @ x.mT
    mixed.zero_()
    return result


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("function", "message"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_rule(function: Function, message: str) -> None:
    module = nn.Identity()

    def forward(x: Tensor) -> Tensor:
        return read(module(function(module(x * 1))), torch.ones(()).double())

    with pytest.raises(UnsupportedModelError, match=message):
        explain(forward, rule="attnlrp")


def test_an_error_names_the_module() -> None:
    model = build("bert")
    layer = model.bert.encoder.layer[1].intermediate
    layer.intermediate_act_fn = Applied(lambda x: torch.sin(x + 0.5))
    name = r"'bert\.encoder\.layer\.1\.intermediate.*' \(Applied\)"
    for method in METHODS:
        with pytest.raises(UnsupportedModelError, match=f"'Sin' in {name}"):
            method(model).attribute(IDS, 1, (MASK,))
    other = build("bert")
    pooler = other.bert.pooler.activation
    other.bert.pooler.activation = Applied(lambda x: x / x.sum(-1, keepdim=True))
    with pytest.raises(UnsupportedModelError, match=r"'bert\.pooler.*' \(Applied\)"):
        DecompX(other).attribute(IDS, 1, (MASK,))
    other.bert.pooler.activation = Applied(lambda x: pooler(x).detach())
    with pytest.raises(UnsupportedModelError, match=r"lost in 'bert\.pooler"):
        DecompX(other).attribute(IDS, 1, (MASK,))


def test_relevance_that_is_lost_is_found() -> None:
    """A hook that changes values behind torch's back breaks the sum."""
    model = build("bert")

    def add(module: nn.Module, args: object, output: Tensor) -> None:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            output.copy_(output * 1.5)

    hook = model.bert.encoder.layer[1].output.dense.register_forward_hook(add)
    with pytest.raises(ConservationError, match="does not add up"):
        DecompX(model).attribute(IDS, 1, (MASK,))
    hook.remove()
    assert DecompX(model).attribute(IDS, 1, (MASK,)).any()


def test_tensors_of_outside_that_require_a_gradient() -> None:
    outside = draw(TOKENS, SIZE, seed=4).requires_grad_()
    check(lambda x: read(x + outside), G)  # A leaf is a constant.
    assert outside.grad is None
    made = outside * 2
    with pytest.raises(UnsupportedModelError, match="made outside of forward_func"):
        explain(lambda x: read(x + made))


def test_not_a_number() -> None:
    with pytest.raises(NonFiniteActivationError, match="NaN or infinity"):
        explain(lambda x: read(x) / 0)


def test_what_is_only_looked_at_may_leave() -> None:
    """Logging is allowed: what is detached there is not used again."""
    seen: list[object] = []

    def forward(x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ A.T)
        seen.append(hidden.detach().cpu().numpy())
        seen.append(hidden.detach().square().mean().item())
        seen.append(copy.deepcopy(hidden.data))
        seen.append(hidden.argmax(-1).tolist())
        mask = (hidden.detach() > 0).double()
        return read(hidden * mask + torch.tensor(1.0))

    u = X @ A.T
    slopes = torch.tanh(u) / u
    check(forward, (G * slopes * (u > 0)) @ A)
    assert all(np.isfinite(np.asarray(value)).all() for value in seen)


def test_closures_that_read_numbers_without_a_gradient() -> None:
    """As they do under no_grad, where numpy needs no detach."""
    seen: list[np.ndarray] = []

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = x @ A.T
            seen.append(hidden.numpy())
            seen.append(np.asarray(hidden))
            return read(hidden)

    check(forward, G @ A)
    assert all(np.allclose(value, X @ A.T) for value in seen)


# Values are the model's own


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "deberta-v2", "xlnet"])
def test_values_stay_to_the_last_bit(family: str, dtype, method) -> None:
    outputs: list[Tensor] = []
    model = build(family, dtype)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.LayerNorm)]

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        hooks = [
            layer.register_forward_hook(lambda _, __, o: outputs.append(o.detach()))
            for layer in layers
        ]
        try:
            return model(ids, attention_mask=mask).logits
        finally:
            for hook in hooks:
                hook.remove()

    with torch.no_grad():
        forward(IDS, MASK)
    expected = [output.clone() for output in outputs]
    outputs.clear()
    scores, delta = method(forward).attribute(
        IDS, 1, (MASK,), return_convergence_delta=True
    )
    assert scores.dtype == delta.dtype == dtype
    assert len(outputs) == len(expected)
    for found, plain in zip(outputs, expected):
        assert torch.equal(found, plain)
    # As precise as the numbers are.
    wide = method(build(family)).attribute(IDS, 1, MASK)
    unit = torch.finfo(dtype).eps
    assert (scores - wide).abs().max() <= 100 * unit * wide.abs().max()


def test_numbers_are_added_as_they_are() -> None:
    """In half precision 0.1 as a tensor would be another number."""
    x = draw(BATCH, TOKENS, SIZE).bfloat16()
    seen: list[Tensor] = []

    def forward(x: Tensor) -> Tensor:
        seen.append((1.001 - (x + 0.1)) * 3)
        return seen[-1].sum((1, 2))

    forward(x)
    found, delta = explain(forward, x)
    assert torch.equal(seen[0], seen[1].detach())
    assert torch.equal(found, -3 * x)
    expected = torch.full((BATCH,), 3 * 0.901 * TOKENS * SIZE)
    torch.testing.assert_close(delta.float(), expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("outside", [True, False])
def test_autocast(outside: bool) -> None:
    model = build("bert", torch.float32)
    autocast = torch.autocast("cpu", torch.bfloat16)

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        with nullcontext() if outside else autocast:
            return model(ids, mask).logits

    with torch.no_grad(), autocast:
        plain = model(IDS, MASK).logits
    for method in METHODS:
        with autocast if outside else nullcontext():
            scores, delta = method(forward).attribute(
                IDS, 1, (MASK,), return_convergence_delta=True
            )
        assert torch.is_autocast_enabled("cpu") is False
        total = scores.sum(1) + delta
        torch.testing.assert_close(total.float(), plain[:, 1].float(), **HALF)
        wide = method(model).attribute(IDS, 1, MASK)
        assert (scores - wide).abs().max() <= 0.1 * wide.abs().max()


HALF = {"rtol": 1e-2, "atol": 1e-2}


# Modules


def attention_model(**options: object) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(SIZE, 2, **options).double().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}]
)
def test_multihead_attention(options: dict, rule: str) -> None:
    """With weights, without, tokens first, and written out with its parameters."""
    layer = attention_model(batch_first=True, **options)
    turned = nn.MultiheadAttention(SIZE, 2, **options).double().eval()
    turned.load_state_dict(layer.state_dict())
    hidden = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
    hidden[1, -1] = True

    def by_hand(x: Tensor) -> Tensor:
        bias = layer.in_proj_bias
        q, k, v = (
            functional.linear(x, part, None if bias is None else bias.chunk(3)[number])
            for number, part in enumerate(layer.in_proj_weight.chunk(3))
        )
        seen = ~hidden
        if layer.bias_k is not None:
            k = torch.cat([k, layer.bias_k.expand(BATCH, 1, -1)], 1)
            v = torch.cat([v, layer.bias_v.expand(BATCH, 1, -1)], 1)
        if layer.add_zero_attn:
            k, v = (functional.pad(part, (0, 0, 0, 1)) for part in (k, v))
        seen = functional.pad(seen, (0, k.shape[1] - TOKENS), value=True)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (q, k, v))
        mixed = written_out(q, k, v, seen[:, None, None], (SIZE / 2) ** -0.5)
        return read(layer.out_proj(mixed.transpose(1, 2).flatten(2)))

    expected, rest = explain(by_hand, rule=rule)
    for forward in (
        lambda x: layer(x, x, x, key_padding_mask=hidden)[0],
        lambda x: layer(x, x, x, key_padding_mask=hidden, need_weights=False)[0],
        lambda x: turned(*[x.transpose(0, 1)] * 3, hidden)[0].transpose(0, 1),
    ):
        torch.testing.assert_close(read(forward(X)), by_hand(X), **EXACT)
        found, delta = explain(lambda x, f=forward: read(f(x)), rule=rule)
        torch.testing.assert_close(found, expected, **EXACT)
        torch.testing.assert_close(delta, rest, **EXACT)


class TorchModel(nn.Module):
    """Torch's own layers, in one of many ways."""

    def __init__(self, batch_first: bool, norm_first: bool, way: str = "list") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(97, 24)
        layer = nn.TransformerEncoderLayer(
            24, 4, 36, batch_first=batch_first, norm_first=norm_first
        )
        layers = [copy.deepcopy(layer) for _ in range(2)]
        self.stack = (
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            if way == "encoder"
            else nn.Sequential(*layers)
            if way == "sequence"
            else nn.ModuleList(layers)
        )
        self.head = nn.Linear(24, 3)
        self.batch_first, self.way = batch_first, way
        randomize(self)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        ids = ids if self.batch_first else ids.T
        states = self.words(ids)
        hidden = None if mask is None else mask == 0
        if self.way == "encoder":
            states = self.stack(states, src_key_padding_mask=hidden)
        elif self.way == "sequence":
            states = self.stack(states)
        else:
            for layer in self.stack:
                if self.way == "keywords":
                    states = layer(src_key_padding_mask=hidden, src=states)
                else:
                    states = layer(states, src_key_padding_mask=hidden)
        return self.head(states[:, 0] if self.batch_first else states[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_layers(norm_first: bool, method) -> None:
    """Batches or tokens first, in a list or a sequence, called by name or not."""
    expected = None
    for batch_first in (True, False):
        for way in ("list", "keywords", "encoder", "sequence"):
            model = TorchModel(batch_first, norm_first, way).double().eval()
            mask = None if way == "sequence" else MASK
            scores, delta = method(model).attribute(
                IDS, 1, (mask,), return_convergence_delta=True
            )
            assert scores.shape == IDS.shape
            if way == "sequence":
                continue
            if expected is None:
                expected = scores, delta
            torch.testing.assert_close(scores, expected[0], **EXACT)
            torch.testing.assert_close(delta, expected[1], **EXACT)
            assert not scores[MASK == 0].any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", ["block", "word_embeddings"])
def test_as_many_examples_as_tokens(place: str, method) -> None:
    """What is first is then not seen from the shape."""
    ids = torch.stack([sentence(4, seed=seed) for seed in range(4)])
    models = [TorchModel(first, False).double().eval() for first in (True, False)]
    for options in ({}, {"baselines": 1, "n_steps": 3}):
        first, second = (
            method(model, place=place).attribute(ids, 1, **options) for model in models
        )
        torch.testing.assert_close(first, second, **EXACT)


class Looking(TorchFunctionMode):
    """Changes nothing; torch leaves its other way for it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_predictions_are_those_of_the_same_kernels() -> None:
    """Torch's layers take another way when nobody looks, equal up to rounding.

    So do their linear maps where the weights require a gradient.
    """
    model = TorchModel(True, False, "encoder").eval().requires_grad_(False)
    outputs: list[Tensor] = []

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        outputs.append(model(ids, mask))
        return outputs[-1]

    with torch.no_grad(), Looking():
        plain = forward(IDS, MASK)
    AttnLRP(forward).attribute(IDS, 1, (MASK,))
    assert torch.equal(outputs[-1].detach(), plain)


class OwnHead(nn.Module):
    """One head of attention, as in many lessons."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleDict({n: nn.Linear(24, 6, bias=False) for n in "qkv"})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.maps[name](x) for name in "qkv")
        return functional.softmax(q @ k.transpose(-2, -1) * 6**-0.5, dim=-1) @ v


class OwnLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([OwnHead() for _ in range(4)])
        self.out, self.norm = nn.Linear(24, 24), nn.LayerNorm(24)
        self.inner = nn.Sequential(nn.Linear(24, 36), nn.ReLU(), nn.Linear(36, 24))
        self.second = nn.LayerNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        x = x + self.out(torch.cat([head(normed) for head in self.heads], -1))
        return x + self.inner(self.second(x))


class OwnModel(nn.Module):
    """Heads are a list inside of each layer; layers are a sequence, or nothing."""

    def __init__(self, is_sequence: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(97, 24)
        self.first, self.second = OwnLayer(), OwnLayer()
        if is_sequence:
            self.layers = nn.Sequential(self.first, self.second)
        self.head = nn.Linear(24, 3)
        randomize(self)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.words(ids)
        if hasattr(self, "layers"):
            states = self.layers(states)
        else:
            states = self.second(self.first(states))
        return self.head(states[:, -1])


def test_a_list_of_heads_is_no_stack_of_layers() -> None:
    """Its input is not all that the output takes from the words."""
    model = OwnModel(True).double().eval()
    found = DecompX(model, place="block").attribute(IDS, 1)
    at_layer = LayerDecompX(model, model.first).attribute(
        IDS, 1, attribute_to_layer_input=True
    )
    own = found.sum(1) - at_layer.sum((1, 2))
    # Of the biases in front of the first values the tokens have theirs.
    assert own.abs().max() > 1e-3
    plain = AttnLRP(model, attention="cp").attribute(IDS, 1)
    torch.testing.assert_close(plain, at_layer.sum(-1), **EXACT)

    hidden = OwnModel(False).double().eval()
    with pytest.raises(UnsupportedModelError, match="not the output of the embedding"):
        DecompX(hidden).attribute(IDS, 1)
    words = DecompX(hidden, place="word_embeddings").attribute(IDS, 1)
    expected = DecompX(model, place="word_embeddings").attribute(IDS, 1)
    torch.testing.assert_close(words, expected, **EXACT)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama", "t5", "vit"])
def test_eager_and_fused_attention_are_the_same(family: str, method) -> None:
    if family == "vit":
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = t.ViTConfig(
            **sizes, intermediate_size=36, image_size=8, patch_size=4, num_labels=3
        )
        models = []
        for kind in ("eager", "sdpa"):
            config._attn_implementation = kind
            torch.manual_seed(0)
            model = randomize(t.ViTForImageClassification(config)).double().eval()
            models.append(model)
        arguments = (draw(2, 3, 8, 8), 1)
    elif family not in FAMILIES:
        pytest.skip("this release of transformers has it in another form")
    else:
        models = [build(family, attention=kind) for kind in ("eager", "sdpa")]
        arguments = (IDS, 1, (MASK,))
    found = [method(model).attribute(*arguments) for model in models]
    # Transformers' softmax is in float32 there.
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


class Stateful(nn.Module):
    """An activation that insists on a shape, and remembers what it was given."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 3
        return 0.5 * x * (1 + torch.tanh(x))


class Weighted(nn.Module):
    """Not element-wise, though its shape stays."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)


def test_modules_of_a_user() -> None:
    slopes = 0.5 * (1 + torch.tanh(X))
    check(lambda x: read(Stateful()(x)), G * slopes)
    check(lambda x: read(Weighted()(x)), G - G.mean(-1, keepdim=True))
    # Two functions in modules of the same kind.
    for scale in (1.0, 2.0, 3.0):
        module = Applied(lambda u, scale=scale: u * torch.sigmoid(scale * u) * scale)
        check(
            lambda x, module=module: read(module(x)),
            G * torch.sigmoid(scale * X) * scale,
        )


class Applied(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_weights_that_are_computed() -> None:
    linear = nn.Linear(SIZE, SIZE).double()
    nn.utils.parametrizations.weight_norm(linear)
    check(lambda x: read(linear(x)), G @ linear.weight.detach())
    spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(SIZE, SIZE).double())
    spectral.eval()
    check(lambda x: read(spectral(x)), G @ spectral.weight.detach())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_low_rank_adapters() -> None:
    """As if they were merged into the weights."""
    peft = pytest.importorskip("peft")
    targets = ["query", "value", "word_embeddings", "dense"]
    options = {"r": 4, "lora_dropout": 0.3, "init_lora_weights": False}
    config = peft.LoraConfig(target_modules=targets, **options)
    adapted = peft.get_peft_model(build("bert"), config).double().train()
    found = [method(adapted).attribute(IDS, 1, (MASK,)) for method in METHODS]
    assert adapted.training
    # The word embeddings are the sum of two lookups.
    with pytest.raises(UnsupportedModelError, match="a second time, in another table"):
        AttnLRP(adapted, place="word_embeddings").attribute(IDS, 1, (MASK,))
    merged = adapted.eval().merge_and_unload()
    for method, scores in zip(METHODS, found):
        expected = method(merged).attribute(IDS, 1, (MASK,))
        torch.testing.assert_close(scores, expected, rtol=1e-8, atol=1e-10)


def test_hooks_of_a_user_are_heard() -> None:
    """Those that change values, and backward hooks."""
    model, doubled = build("bert"), build("bert")
    with torch.no_grad():
        doubled.bert.encoder.layer[1].output.LayerNorm.weight *= 2
        doubled.bert.encoder.layer[1].output.LayerNorm.bias *= 2
    norm = model.bert.encoder.layer[1].output.LayerNorm
    hooks = [
        norm.register_forward_hook(lambda _, __, output: 2 * output),
        model.bert.pooler.register_full_backward_hook(lambda *_: None),
    ]
    for method in METHODS:
        found = method(model).attribute(IDS, 1, (MASK,))
        expected = method(doubled).attribute(IDS, 1, (MASK,))
        torch.testing.assert_close(found, expected, **EXACT)
    for hook in hooks:
        hook.remove()
    assert not left_behind(model)


@pytest.mark.filterwarnings("ignore")
def test_compiled_models() -> None:
    model = build("bert", torch.float32)
    expected = [method(model).attribute(IDS, 1, (MASK,)) for method in METHODS]
    compiled = torch.compile(model, backend="eager")
    for method, scores in zip(METHODS, expected):
        for forward in (compiled, lambda ids, mask: compiled(ids, mask).logits):
            found = method(forward).attribute(IDS, 1, (MASK,))
            torch.testing.assert_close(found, scores, rtol=1e-5, atol=1e-6)


# Places


def test_values_that_are_written_to_after_a_layer() -> None:
    """Relevance is of what came out of it, not of what it becomes."""

    class Writes(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.layer, self.in_place = nn.Linear(SIZE, SIZE).double(), in_place
            with torch.no_grad():
                self.layer.weight.copy_(A)
                self.layer.bias.copy_(BETA)

        def forward(self, x: Tensor) -> Tensor:
            states = self.layer(x)
            if self.in_place:
                states += x
                states.mul_(2)
            else:
                states = (states + x) * 2
            return read(states)

    for is_input in (True, False):
        found, expected = (
            LayerDecompX(model, model.layer).attribute(
                X, attribute_to_layer_input=is_input
            )
            for model in (Writes(True), Writes(False))
        )
        torch.testing.assert_close(found, expected, **EXACT)
    values = functional.linear(X, A, BETA)
    torch.testing.assert_close(found, 2 * G * values, **EXACT)


def test_a_layer_that_is_called_with_keywords() -> None:
    inner = nn.Linear(SIZE, SIZE).double()

    def forward(x: Tensor) -> Tensor:
        return read(inner(input=torch.tanh(x)))

    found = LayerAttnLRP(forward, inner).attribute(X, attribute_to_layer_input=True)
    expected = (G @ inner.weight.detach()) * torch.tanh(X)
    torch.testing.assert_close(found, expected, **EXACT)
    with pytest.raises(UnsupportedModelError, match=r"given by name.*to be replaced"):
        LayerAttnLRP(forward, inner).attribute(
            X, attribute_to_layer_input=True, baselines=0, n_steps=2
        )

    class Changes(nn.Module):
        def forward(self, states: Tensor) -> Tensor:
            states += 1
            return states

    changes = Changes()
    with pytest.raises(UnsupportedModelError, match=r"given by name.*written to"):
        LayerAttnLRP(lambda x: read(changes(states=x * 1)), changes).attribute(
            X, attribute_to_layer_input=True
        )


def test_a_named_tuple_at_a_layer() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> object:
            return torch.return_types.max((x * 2, x.argmax(1)))

    class Named(nn.Module):
        def forward(self, x: Tensor) -> object:
            return Output(x * 2, None)

    assert type(Named()(X)) is Output
    for module in (Named(), Pair()):
        found = LayerDecompX(lambda x, m=module: read(m(x)[0]), module).attribute(X)
        torch.testing.assert_close(found, G * 2 * X, **EXACT)


class Output(NamedTuple):
    values: Tensor
    other: object


# Nothing is left behind


@pytest.mark.parametrize("method", METHODS)
def test_a_run_leaves_no_memory(method) -> None:
    """Without the garbage collector, which cycles would need."""
    model = build("bert")
    seen: list[weakref.ref] = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: seen.append(weakref.ref(out)))
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.LayerNorm)
    ]
    gc.collect()
    gc.disable()
    try:
        method(model).attribute(IDS, 1, (MASK,))
        method(model).attribute(IDS, 1, (MASK,), baselines=1, n_steps=2)
        LayerDecompX(model, model.bert.encoder.layer[1]).attribute(IDS, 1, (MASK,))
        with pytest.raises(InputError):
            LayerDecompX(model, nn.Linear(2, 2)).attribute(IDS, 1, (MASK,))
        assert len(seen) > 50
        assert sum(reference() is not None for reference in seen) == 0
    finally:
        gc.enable()
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("method", METHODS)
def test_parameters_and_inputs_are_left_as_they_were(method) -> None:
    model = build("bert").train()
    model.bert.embeddings.requires_grad_(False)
    model.bert.pooler.dense.weight.grad = torch.ones(24, 24).double()
    state = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    before = embeddings.detach().clone()

    def forward(vectors: Tensor, mask: Tensor) -> Tensor:
        vectors += 0.5  # A closure may do that to its own.
        return model(inputs_embeds=vectors, attention_mask=mask).logits

    method(forward).attribute(embeddings, 1, (MASK,))
    method(model).attribute(IDS, 1, (MASK,))
    with pytest.raises(IndexError):
        method(model).attribute(IDS, 3, (MASK,))
    assert embeddings.grad is None
    assert embeddings.requires_grad
    assert torch.equal(embeddings, before)
    assert flags == [p.requires_grad for p in model.parameters()]
    assert modes == [module.training for module in model.modules()]
    grads = [name for name, p in model.named_parameters() if p.grad is not None]
    assert grads == ["bert.pooler.dense.weight"]
    assert (model.bert.pooler.dense.weight.grad == 1).all()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert torch._C._len_torch_function_stack() == 0
    assert not left_behind(model)


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "nothing": nullcontext,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("outer", MODES)
@pytest.mark.parametrize("inner", MODES)
def test_grad_modes(outer: str, inner: str, method) -> None:
    """Of the caller and of the closure, around modules and around bare operations."""
    model = build("bert", torch.float32)
    expected = method(model).attribute(IDS, 1, (MASK,))
    weight = draw(3, 24).float()

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        with MODES[inner]():
            return model(ids, mask).logits

    def bare(vectors: Tensor) -> Tensor:
        with MODES[inner]():
            return torch.tanh(vectors * 2).mean(1) @ weight.T

    vectors = draw(2, 5, 24).float()
    of_bare = method(bare).attribute(vectors, 1)
    slopes = torch.tanh(2 * vectors) / 5 * weight[1]
    torch.testing.assert_close(of_bare, slopes, rtol=1e-4, atol=1e-6)
    with MODES[outer]():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        found = method(forward).attribute(IDS, 1, (MASK,))
        again = method(bare).attribute(vectors.clone(), 1)
        path = method(forward).attribute(IDS, 1, (MASK,), baselines=1, n_steps=2)
        assert before == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    assert torch.equal(found, expected)
    assert torch.equal(again, of_bare)
    assert not any(tensor.requires_grad for tensor in (found, again, path))


def test_a_model_made_in_inference_mode() -> None:
    expected = [method(build("bert")).attribute(IDS, 1, (MASK,)) for method in METHODS]
    with torch.inference_mode():
        model = build("bert")
        found = [method(model).attribute(IDS, 1, (MASK,)) for method in METHODS]
    for method, scores, plain in zip(METHODS, found, expected):
        torch.testing.assert_close(scores, plain, **EXACT)
        again = method(model).attribute(IDS, 1, (MASK,))
        torch.testing.assert_close(again, plain, **EXACT)


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("method", METHODS)
def test_exceptions_leave_nothing_behind(method) -> None:
    model = build("bert").train()
    expected = method(model).attribute(IDS, 1, (MASK,))

    def fail(*_: object) -> None:
        raise BrokenError

    for module in (
        model.bert.embeddings.dropout,
        model.bert.encoder.layer[1].intermediate.intermediate_act_fn,
        model.classifier,
    ):
        hook = module.register_forward_hook(fail)
        with pytest.raises(BrokenError):
            method(model).attribute(IDS, 1, (MASK,), baselines=1)
        hook.remove()
        assert all(module.training for module in model.modules())
        assert torch._C._len_torch_function_stack() == 0
        assert torch.is_grad_enabled()
        assert not left_behind(model)
    assert torch.equal(method(model).attribute(IDS, 1, (MASK,)), expected)


def test_a_closure_that_tries_again() -> None:
    """What failed inside of the closure leaves the rest in evaluation mode, too."""

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise BrokenError

    first = nn.Sequential(nn.Tanh(), Broken())
    second = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Dropout(0.9)).double()

    def forward(x: Tensor) -> Tensor:
        with pytest.raises(BrokenError):
            first(x)
        return read(second(x))

    found = AttnLRP(forward).attribute(X)
    torch.testing.assert_close(found, X * (G @ second[0].weight.detach()), **EXACT)
    assert all(part.training for part in second.modules())


def test_other_threads_notice_nothing() -> None:
    """Predictions, gradients and attributions beside one another, on one model."""
    model = build("bert", torch.float32)
    plain = TorchModel(True, False, "encoder").eval()
    vectors = model.get_input_embeddings()(IDS).detach().requires_grad_()

    def gradient() -> Tensor:
        logits = model(inputs_embeds=vectors, attention_mask=MASK).logits
        return torch.autograd.grad(logits[:, 1].sum(), vectors)[0]

    with torch.no_grad():
        logits, of_torch = model(IDS, MASK).logits, plain(IDS, MASK)
    of_vectors = gradient()
    scores = [method(model).attribute(IDS, 1, (MASK,)) for method in METHODS]
    problems: list[object] = []
    stop, uses = threading.Event(), []

    def use() -> None:
        while not stop.is_set():
            with torch.no_grad():
                if not torch.equal(model(IDS, MASK).logits, logits):
                    problems.append("logits")
                if not torch.equal(plain(IDS, MASK), of_torch):
                    problems.append("torch's own layers")
            if not torch.equal(gradient(), of_vectors):
                problems.append("gradients")
            uses.append(1)

    def attribute(which: int) -> None:
        for _ in range(6):
            found = METHODS[which](model).attribute(IDS, 1, (MASK,))
            if not torch.equal(found, scores[which]):
                problems.append(METHODS[which])
            METHODS[which](plain).attribute(IDS, 1, (MASK,))

    def guarded(task: Callable[..., None], *args: object) -> None:
        try:
            task(*args)
        except Exception as error:
            problems.append(error)

    threads = [
        threading.Thread(target=guarded, args=args)
        for args in ((use,), (attribute, 0), (attribute, 1))
    ]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    stop.set()
    threads[0].join()
    assert len(uses) > 3
    assert not problems
    assert not left_behind(model)
