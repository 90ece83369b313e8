r"""The slow, literal twins of the other rollout methods, in float64, with loops.

As in :mod:`tests.oracle`, nothing here calls the package: one example at a time, no
padding, every vector built.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests import oracle
from tests.oracle import Layer, Model, Recipe


@dataclass
class Step:
    """A layer as it ran, and where its weights are."""

    layer: Layer
    module: nn.Module
    model: Model


def steps_of(encoder: nn.Module, recipe: Recipe, layers: list[Layer]) -> list[Step]:
    """The layers of :func:`tests.oracle.run_layers` with their modules."""
    model = Model(copy.deepcopy(encoder), recipe)
    modules = list(model.encoder.get_submodule(recipe.layers))
    if len(modules) == 1:  # ALBERT's serves as every layer
        modules *= len(layers)
    return [Step(x, m, model) for x, m in zip(layers, modules, strict=True)]


@torch.no_grad()
def alti(step: Step) -> Tensor:
    """c_ij of Ferrando et al. 2022, (receivers, sources)."""
    layer, norm = step.layer, step.model.part(step.module, "norm1")
    state = layer.y if norm is None else oracle.norm_of(layer.y, norm)[0]
    g1 = oracle.vectors(layer)["N_RES_LN"]
    tokens = len(layer.x)
    c = torch.zeros(tokens, tokens, dtype=torch.float64)
    for i in range(tokens):
        size = sum(abs(entry) for entry in state[i].tolist())
        for j in range(tokens):
            pairs = zip(g1[i, j].tolist(), state[i].tolist())
            distance = sum(abs(part - whole) for part, whole in pairs)
            c[i, j] = max(0.0, size - distance)
        if c[i].sum() > 0:
            c[i] = c[i] / c[i].sum()
        else:
            c[i, i] = 1.0
    return c


@torch.no_grad()
def value_zeroing(step: Step) -> Tensor:
    """c_ij of Mohebbi et al. 2023, (receivers, sources)."""
    layer, tokens = step.layer, len(step.layer.x)
    whole = layer.y - layer.a.sum(1)  # What no value makes: residual and bias.
    clean = behind_attention(step, whole + layer.a.sum(1))
    c = torch.zeros(tokens, tokens, dtype=torch.float64)
    for j in range(tokens):
        others = torch.zeros_like(layer.y)
        for k in range(tokens):
            if k != j:
                others += layer.a[:, k]
        changed = behind_attention(step, whole + others)
        for i in range(tokens):
            c[i, j] = cosine_distance(clean[i], changed[i])
    for i in range(tokens):
        if c[i].sum() > 0:
            c[i] = c[i] / c[i].sum()
        else:
            c[i, i] = 1.0
    return c


def cosine_distance(u: Tensor, v: Tensor) -> float:
    """1 - cos(u, v), by the sine and cosine of half the angle between unit vectors."""
    u, v = u / u.norm(), v / v.norm()
    return float(2 * torch.sin(torch.atan2((u - v).norm(), (u + v).norm())) ** 2)


@torch.no_grad()
def behind_attention(step: Step, y: Tensor) -> Tensor:
    """The layer's output, from the sum of the first residual on."""
    model, module = step.model, step.module
    first = model.part(module, "norm1")
    if first is not None:
        z = oracle.norm_of(y, first)[0]
        o = z + model.feed_forward(z, module)
        return oracle.norm_of(o, model.part(module, "norm2"))[0]
    z = oracle.norm_of(y, model.part(module, "middle"))[0]
    return y + model.scale(module, "scale2") * model.feed_forward(z, module)


@torch.no_grad()
def top_projection(layer: Layer, gradient: Tensor) -> Tensor:
    """r_j = Σ_i ⟨∂y/∂x_i, g2_ij⟩, (sources), of a gradient (receivers, hidden)."""
    g2 = oracle.vectors(layer)["N_ENC"]
    tokens = len(layer.x)
    r = torch.zeros(tokens, dtype=torch.float64)
    for j in range(tokens):
        for i in range(tokens):
            for part, slope in zip(g2[i, j].tolist(), gradient[i].tolist()):
                r[j] += part * slope
    return r


@torch.no_grad()
def class_aware(layers: list[Layer], gradient: Tensor) -> Iterator[Tensor]:
    """r, then r n^{L-1}, and so on down to the input of the encoder, (sources)."""
    row = top_projection(layers[-1], gradient)
    yield row
    for layer in reversed(layers[:-1]):
        n = oracle.local_score(layer, "N_ENC")
        below = torch.zeros_like(row)
        for i in range(len(row)):
            for j in range(len(row)):
                below[j] += row[i] * n[i, j]
        row = below
        yield row
