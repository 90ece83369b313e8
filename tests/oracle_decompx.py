"""The slow, literal twin of DecompX: every token as a sum of vectors, one per source.

Modarressi et al. 2023 (arXiv:2306.02873), one example, in float64. Nothing here calls
the package. ``parts[i, k]`` is what source token k contributes to the vector of token
i; at the first layer's input every vector is its own token's. Attention weights, the
norms' deviations and the slopes f(u) / u are what they are in the run, so each map is
linear in the parts; what is left are the biases, which a rule spreads over the sources.

A post-LN layer, as the authors' code has it: attention, the residual, then its bias
W_O b_V + b_O; the norm, then β; W1, then b1; f(u) / u; W2, then b2; the residual; the
norm, then β. In the first layer the value bias is a part of its own source's value, and
b_O alone is spread. Behind the layers the head: each map, then its bias.

Pre-LN layers (this project's extension): x' = x + attention(LN1(x)), then
x'' = x' + FFN(LN2(x')). Until the first attention every vector is its own token's, and
so are the biases of the values there, β of LN1 and b_V. The bias of attention is spread
behind the residual, as above; every other one right behind its map or norm, before any
residual. Of a gated feed-forward the activated factor is a constant, the other factor
is decomposed. An RMSNorm takes no mean away.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.networks import ACTIVATIONS, FeedForward, Layer, Map, Network, Norm

RULES = ("none", "absdot", "abssim", "norm", "equal", "cls")


def share(a: Tensor, bias: Tensor, k: int, rule: str) -> float:
    """How much of a bias source k gets, before the shares are made to sum to 1."""
    length = float(a.norm())
    if rule == "absdot":
        return abs(float(a @ bias))
    if rule == "abssim":
        both = length * float(bias.norm())
        return abs(float(a @ bias)) / both if both else 0.0
    if rule == "norm":
        return length
    if rule == "equal":
        return float(length != 0)
    return float(k == 0)  # cls


def spread(parts: Tensor, bias: Tensor, rule: str) -> Tensor:
    """Each receiver's bias over its sources."""
    if rule == "none":
        return parts
    result = parts.clone()
    for i, row in enumerate(parts):
        shares = [share(a, bias, k, rule) for k, a in enumerate(row)]
        for k in range(len(row)):
            result[i, k] += shares[k] / (sum(shares) + 1e-12) * bias
    return result


def to_itself(parts: Tensor, vectors: Tensor) -> Tensor:
    """Each token's vector, (tokens, hidden), to the token."""
    result = parts.clone()
    for i, vector in enumerate(vectors):
        result[i, i] += vector
    return result


@dataclass(frozen=True)
class Decomposed:
    """What the model computes, and its parts."""

    value: Tensor  # (receivers, hidden)
    parts: Tensor  # (receivers, sources, hidden)

    def __add__(self, other: Decomposed) -> Decomposed:
        return Decomposed(self.value + other.value, self.parts + other.parts)

    def scaled(self, factors: Tensor) -> Decomposed:
        """By constants, (receivers, hidden)."""
        return Decomposed(self.value * factors, self.parts * factors[:, None])


def mapped(x: Decomposed, part: Map, rule: str) -> Decomposed:
    parts = x.parts @ part.weight.T
    value = x.value @ part.weight.T + part.bias
    return Decomposed(value, spread(parts, part.bias, rule))


def normed(x: Decomposed, norm: Norm | None, rule: str) -> Decomposed:
    """By the true deviation; the mean is taken away from every part."""
    if norm is None:
        return x

    def centred(v: Tensor) -> Tensor:
        return v - v.mean(-1, keepdim=True) if norm.centred else v

    deviation = (centred(x.value).square().mean(-1) + norm.epsilon).sqrt()
    value = norm.gamma * centred(x.value) / deviation[:, None] + norm.beta
    parts = norm.gamma * centred(x.parts) / deviation[:, None, None]
    if rule == "own":
        return Decomposed(value, to_itself(parts, norm.beta.expand_as(value)))
    return Decomposed(value, spread(parts, norm.beta, rule))


def activated(u: Decomposed, name: str) -> Decomposed:
    """Zero-origin: the line through the origin and (u, f(u))."""
    function, limit = ACTIVATIONS[name]
    zero = u.value == 0
    divisor = torch.where(zero, 1.0, u.value)
    return u.scaled(torch.where(zero, limit, function(u.value) / divisor))


def feed_forward(x: Decomposed, described: FeedForward, rule: str) -> Decomposed:
    inner = mapped(x, described.up, rule)
    if described.gate is None:
        inner = activated(inner, described.activation)
    else:
        function, _ = ACTIVATIONS[described.activation]
        gate = described.gate
        inner = inner.scaled(function(x.value @ gate.weight.T + gate.bias))
    return mapped(inner, described.down, rule)


def probabilities(x: Tensor, layer: Layer) -> Tensor:
    """α, (heads, receivers, sources)."""
    tokens = len(x)
    alpha = torch.zeros(layer.heads, tokens, tokens, dtype=torch.float64)
    queries = (x @ layer.query.weight.T + layer.query.bias).chunk(layer.heads, -1)
    keys = (x @ layer.key.weight.T + layer.key.bias).chunk(layer.heads, -1)
    for h in range(layer.heads):
        for i in range(tokens):
            logits = {}
            for j in range(tokens):
                q, k = queries[h][i], keys[h][j]
                if layer.rotation is not None:
                    q, k = layer.rotation[i] @ q, layer.rotation[j] @ k
                if layer.seen[i, j]:
                    logits[j] = layer.scale * (q @ k) + layer.constant[h, i, j]
            total = sum(torch.exp(logit) for logit in logits.values())
            for j, logit in logits.items():
                alpha[h, i, j] = torch.exp(logit) / total
    return alpha


def attended(
    x: Decomposed, residual: Decomposed, layer: Layer, rule: str, first: bool
) -> Decomposed:
    """Σ_j α_ij W_O W_V (parts of j), the residual, then W_O b_V + b_O."""
    alpha = probabilities(x.value, layer)
    values = x.parts @ layer.value.weight.T
    if first:
        values = to_itself(values, layer.value.bias.expand(len(values), -1))
    true_values = x.value @ layer.value.weight.T + layer.value.bias
    value, parts = torch.zeros_like(residual.value), torch.zeros_like(residual.parts)
    bias = layer.output.bias
    outputs = layer.output.weight.chunk(layer.heads, 1)
    for h, (output, own) in enumerate(zip(outputs, values.chunk(layer.heads, -1))):
        true = true_values.chunk(layer.heads, -1)[h]
        for i in range(len(value)):
            for j in range(len(value)):
                value[i] += alpha[h, i, j] * (output @ true[j])
                parts[i] += alpha[h, i, j] * (own[j] @ output.T)
    if not first:
        bias = bias + layer.output.weight @ layer.value.bias
    value = value + residual.value + layer.output.bias
    return Decomposed(value, spread(parts + residual.parts, bias, rule))


def run_layer(
    x: Decomposed, layer: Layer, pre: bool, rule: str, first: bool
) -> Decomposed:
    if pre:
        y = normed(x, layer.norm1, "own" if first else rule)
        y = attended(y, x, layer, rule, first)
        z = normed(y, layer.norm2, rule)
        return y + feed_forward(z, layer.feed_forward, rule)
    z = normed(attended(x, x, layer, rule, first), layer.norm1, rule)
    return normed(z + feed_forward(z, layer.feed_forward, rule), layer.norm2, rule)


def embedded(network: Network) -> Decomposed:
    """The first layer's input: every vector is its own token's."""
    words = network.words
    if network.projection is not None:
        words = words @ network.projection.T
    value = words + network.offset
    nothing = torch.zeros(len(value), *value.shape, dtype=torch.float64)
    value = normed(Decomposed(value, nothing), network.norm, "none").value
    return Decomposed(value, to_itself(nothing, value))


@torch.no_grad()
def decompose(network: Network, biases: str = "none") -> tuple[Tensor, Tensor]:
    """The logits, (classes), and the relevance of every token, (tokens, classes)."""
    x = embedded(network)
    for index, layer in enumerate(network.layers):
        x = run_layer(x, layer, network.pre, biases, index == 0)
    x = normed(x, network.final, biases)
    x = Decomposed(
        torch.einsum("t,td->d", network.reads, x.value)[None],
        torch.einsum("t,tkd->kd", network.reads, x.parts)[None],
    )
    for part in network.head:
        if isinstance(part, str):
            x = activated(x, part)
        elif isinstance(part, Map):
            x = mapped(x, part, biases)
        else:
            x = normed(x, part, biases)
    return x.value[0], x.parts[0]
