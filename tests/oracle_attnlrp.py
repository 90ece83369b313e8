"""The slow, literal twin of AttnLRP: relevance, operation by operation, from the end.

Achtibat et al. 2024 (arXiv:2402.05602), in float64 and without a stabiliser. Nothing
here calls the package, and nothing here is a gradient: every operation hands the
relevance of its output on to its inputs by the paper's equation.

    z = W x + b             R_i = Σ_j x_i W_ji R_j / z_j     sums, too
    f(u)                    R_u = R_f
    s = softmax(x)          R_i = x_i (R_i - s_i Σ_j R_j)
    z = Σ a b               Σ a b R / (2 z) for a, and as much for b
    γ (x - mean) / s + β    as a linear map, s a constant

The bias b takes its part of z and keeps it. A gated feed-forward is a product. What is
not seen gets no logit, so no relevance. With ``attention="cp"`` attention weights are
constants and values take the whole, and of a gated product the gate is a constant.

R_j / z_j is 0 / 0 where a value is exactly 0. It is then the limit of R / z, which is
handed on beside R: every equation gives it without the factor that is the value itself,
and for f(u) at 0 it is the limit of f(u) / u times that of R_f / f.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.networks import ACTIVATIONS, FeedForward, Layer, Map, Network, Norm


class Value:
    """What an operation gave, the relevance that it has received, and lim R / value."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.relevance = torch.zeros_like(value)
        self.limit = torch.zeros_like(value)

    def per_unit(self) -> Tensor:
        """R / value."""
        zero = self.value == 0
        divisor = torch.where(zero, 1.0, self.value)
        return torch.where(zero, self.limit, self.relevance / divisor)

    def receive(self, relevance: Tensor, limit: Tensor) -> None:
        self.relevance = self.relevance + relevance
        self.limit = self.limit + limit


class Tape:
    """Operations in the order in which they ran, and how each hands relevance on.

    ``absorbed`` is what biases and constants have taken, and what the softmax's rule
    does not conserve: relevance at the inputs and this sum to the output.
    """

    def __init__(self) -> None:
        self.rules: list[Callable[[], None]] = []
        self.absorbed = torch.zeros((), dtype=torch.float64)

    def run_back(self) -> None:
        for rule in reversed(self.rules):
            rule()

    def linear(
        self, x: Value, pattern: str, weight: Tensor, bias: Tensor | float = 0.0
    ) -> Value:
        """An einsum of the value and a constant, plus a constant."""
        z = Value(torch.einsum(pattern, x.value, weight) + bias)
        back = "{2},{1}->{0}".format(*pattern.replace("->", ",").split(","))

        def rule() -> None:
            limit = torch.einsum(back, z.per_unit(), weight)
            x.receive(x.value * limit, limit)
            self.absorbed = self.absorbed + (bias * z.per_unit()).sum()

        self.rules.append(rule)
        return z

    def sum(self, x: Value, y: Value) -> Value:
        z = Value(x.value + y.value)

        def rule() -> None:
            for term in (x, y):
                term.receive(term.value * z.per_unit(), z.per_unit())

        self.rules.append(rule)
        return z

    def activation(self, u: Value, name: str) -> Value:
        function, slope = ACTIVATIONS[name]
        f = Value(function(u.value))

        def rule() -> None:
            u.receive(f.relevance, slope * f.limit)

        self.rules.append(rule)
        return f

    def norm(self, x: Value, norm: Norm | None) -> Value:
        """The matrix of each token: γ (1 - 1/d) / s, or γ / s without centring."""
        if norm is None:
            return x
        size = x.value.shape[-1]
        centring = torch.eye(size, dtype=torch.float64) - norm.centred / size
        centred = x.value @ centring
        deviation = (centred.square().mean(-1) + norm.epsilon).sqrt()
        matrices = norm.gamma[:, None] * centring / deviation[..., None, None]
        tokens = "t" * (x.value.dim() - 1)
        return self.linear(x, f"{tokens}i,{tokens}ji->{tokens}j", matrices, norm.beta)

    def softmax(self, x: Value, seen: Tensor) -> Value:
        """A row that sees nothing is zeros."""
        exponentials = torch.exp(x.value - x.value.amax(-1, keepdim=True)) * seen
        total = exponentials.sum(-1, keepdim=True)
        s = Value(exponentials / torch.where(total == 0, 1.0, total))

        def rule() -> None:
            whole = s.relevance.sum(-1, keepdim=True)
            limit = s.relevance - s.value * whole
            x.receive(x.value * limit, limit)
            self.absorbed = self.absorbed + (s.relevance - x.value * limit).sum()

        self.rules.append(rule)
        return s

    def product(self, a: Value, b: Value, pattern: str, share: float) -> Value:
        """Of the relevance the second factor gets this share, the first the rest."""
        z = Value(torch.einsum(pattern, a.value, b.value))
        left, right, out = pattern.replace("->", ",").split(",")

        def rule() -> None:
            unit = z.per_unit()
            to_a = (1 - share) * torch.einsum(f"{out},{right}->{left}", unit, b.value)
            to_b = share * torch.einsum(f"{out},{left}->{right}", unit, a.value)
            a.receive(a.value * to_a, to_a)
            b.receive(b.value * to_b, to_b)

        self.rules.append(rule)
        return z

    def attention(self, x: Value, layer: Layer, share: float) -> Value:
        """``share`` is the values' part of α v."""

        def of_heads(part: Map) -> Value:
            weight = part.weight.unflatten(0, (layer.heads, -1))
            bias = part.bias.view(layer.heads, 1, -1)
            return self.linear(x, "ti,hpi->htp", weight, bias)

        query, key, value = map(of_heads, (layer.query, layer.key, layer.value))
        if layer.rotation is not None:
            query = self.linear(query, "htp,trp->htr", layer.rotation)
            key = self.linear(key, "htp,trp->htr", layer.rotation)
        products = self.product(query, key, "hip,hjp->hij", 0.5)
        scale = torch.tensor(layer.scale, dtype=torch.float64)
        logits = self.linear(products, "hij,->hij", scale, layer.constant)
        weights = self.softmax(logits, layer.seen)
        mixed = self.product(weights, value, "hij,hjp->hip", share)
        output = layer.output.weight.unflatten(1, (layer.heads, -1))
        return self.linear(mixed, "hip,dhp->id", output, layer.output.bias)

    def feed_forward(self, x: Value, described: FeedForward, share: float) -> Value:
        """``share`` is the ungated factor's part of the product."""
        inner = self.map(x, described.up)
        if described.gate is None:
            inner = self.activation(inner, described.activation)
        else:
            gate = self.activation(self.map(x, described.gate), described.activation)
            inner = self.product(gate, inner, "tf,tf->tf", share)
        return self.map(inner, described.down)

    def map(self, x: Value, part: Map) -> Value:
        tokens = "t" * (x.value.dim() - 1)
        return self.linear(x, f"{tokens}i,oi->{tokens}o", part.weight, part.bias)

    def layer(self, x: Value, layer: Layer, pre: bool, share: float) -> Value:
        if pre:
            mixed = self.attention(self.norm(x, layer.norm1), layer, share)
            y = self.sum(x, mixed)
            normed = self.norm(y, layer.norm2)
            return self.sum(y, self.feed_forward(normed, layer.feed_forward, share))
        z = self.norm(self.sum(x, self.attention(x, layer, share)), layer.norm1)
        inner = self.feed_forward(z, layer.feed_forward, share)
        return self.norm(self.sum(z, inner), layer.norm2)


@dataclass(frozen=True)
class Explained:
    """The logits, and relevance for one of them."""

    logits: Tensor  # (classes)
    words: Tensor  # (tokens, size), of each entry of the network's words
    block: Tensor  # (tokens, hidden), of the first layer's input
    absorbed: Tensor  # what the words did not get


@torch.no_grad()
def explain(network: Network, target: int, attention: str = "attnlrp") -> Explained:
    share = {"attnlrp": 0.5, "cp": 1.0}[attention]
    tape, words = Tape(), Value(network.words)
    projection = network.projection
    if projection is None:
        projection = torch.eye(words.value.shape[-1], dtype=torch.float64)
    x = tape.linear(words, "ti,di->td", projection, network.offset)
    block = x = tape.norm(x, network.norm)
    for layer in network.layers:
        x = tape.layer(x, layer, network.pre, share)
    x = tape.linear(tape.norm(x, network.final), "td,t->d", network.reads)
    for part in network.head:
        if isinstance(part, str):
            x = tape.activation(x, part)
        elif isinstance(part, Map):
            x = tape.map(x, part)
        else:
            x = tape.norm(x, part)
    chosen = torch.zeros_like(x.value)
    chosen[target] = 1
    x.receive(chosen * x.value, chosen)
    tape.run_back()
    return Explained(x.value, words.relevance, block.relevance, tape.absorbed)
