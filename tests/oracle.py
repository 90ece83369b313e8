r"""The slow, literal twin: GlobEnc from the formulas, in float64, with loops.

Nothing here calls the package. One example at a time, no padding, no identities: for
every pair of tokens the vector is built and its norm taken. The layer is computed along
the way from the model's weights by hand, so a test can hold the oracle itself against
the model's own hidden states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

BERT_LIKE = {
    "layers": "encoder.layer",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}
DISTILBERT = {
    "layers": "transformer.layer",
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "output": "attention.out_lin",
    "norm1": "sa_layer_norm",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
    "norm2": "output_layer_norm",
}


XLM_ROBERTA_XL = {
    "layers": "encoder.layer",
    "final": "encoder.LayerNorm",
    "before": "attention.self_attn_layer_norm",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "middle": "LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
}
ROBERTA_PRELAYERNORM = {
    **XLM_ROBERTA_XL,
    "final": "LayerNorm",
    "before": "attention.LayerNorm",
    "middle": "intermediate.LayerNorm",
}
ESM = {
    **XLM_ROBERTA_XL,
    "final": "encoder.emb_layer_norm_after",
    "before": "attention.LayerNorm",
}
VIT = {
    "layers": "layers",
    "before": "layernorm_before",
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "output": "attention.o_proj",
    "middle": "layernorm_after",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
VIT_OLD = {
    "layers": "encoder.layer",
    "before": "layernorm_before",
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "output": "attention.output.dense",
    "middle": "layernorm_after",
    "up": "intermediate.dense",
    "down": "output.dense",
}


@dataclass
class Layer:
    """The quantities of one encoder layer, one example.

    Norms: after the first and after the second residual, their weight and standard
    deviations (tokens); None where none follows.
    """

    x: Tensor  # (tokens, hidden), the input
    alpha: Tensor  # (heads, tokens, tokens)
    a: Tensor  # (receivers, sources, hidden), a_ij
    y: Tensor  # (tokens, hidden), after the first residual
    norm1: tuple[Tensor, Tensor] | None
    norm2: tuple[Tensor, Tensor] | None
    output: Tensor  # (tokens, hidden)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """(output, standard deviation) from the definition."""
    mean = x.sum(-1) / x.shape[-1]
    variance = ((x - mean[:, None]) ** 2).sum(-1) / x.shape[-1]
    deviation = (variance + norm.eps).sqrt()
    weight, bias = norm.weight.double(), norm.bias.double()
    return (x - mean[:, None]) / deviation[:, None] * weight + bias, deviation


def linear(x: Tensor, module: nn.Linear) -> Tensor:
    return x @ module.weight.double().T + module.bias.double()


@torch.no_grad()
def attend(x: Tensor, part: dict[str, nn.Module], heads: int) -> tuple[Tensor, Tensor]:
    """α (heads, receivers, sources) and a_ij, every f^h(x_j) on its own."""
    tokens, hidden = x.shape
    size = part["query"].out_features // heads
    query, key, value = (linear(x, part[n]) for n in ("query", "key", "value"))
    alpha = torch.zeros(heads, tokens, tokens, dtype=torch.float64)
    a = torch.zeros(tokens, tokens, hidden, dtype=torch.float64)
    output_weight = part["output"].weight.double()
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        for i in range(tokens):
            logits = torch.stack(
                [query[i, own] @ key[j, own] / math.sqrt(size) for j in range(tokens)]
            )
            exponentials = torch.exp(logits - logits.max())
            alpha[h, i] = exponentials / exponentials.sum()
        for j in range(tokens):
            transformed = output_weight[:, own] @ value[j, own]  # f^h(x_j)
            for i in range(tokens):
                a[i, j] += alpha[h, i, j] * transformed
    return alpha, a


@torch.no_grad()
def run_layer(x: Tensor, layer: nn.Module, paths: dict[str, str], heads: int) -> Layer:
    """One layer on one example, (tokens, hidden)."""
    outside = ("layers", "final")
    part = {n: layer.get_submodule(p) for n, p in paths.items() if n not in outside}
    if "before" in part:
        return run_pre_norm_layer(x, part, heads)
    alpha, a = attend(x, part, heads)
    y = x + a.sum(1) + part["output"].bias.double()
    z, s1 = layer_norm(y, part["norm1"])
    o = z + linear(gelu(linear(z, part["up"])), part["down"])
    output, s2 = layer_norm(o, part["norm2"])
    norm1 = part["norm1"].weight.double(), s1
    norm2 = part["norm2"].weight.double(), s2
    return Layer(x, alpha, a, y, norm1, norm2, output)


@torch.no_grad()
def run_pre_norm_layer(x: Tensor, part: dict[str, nn.Module], heads: int) -> Layer:
    """x' = x + attention(LN(x)), x'' = x' + FFN(LN(x'))."""
    alpha, a = attend(layer_norm(x, part["before"])[0], part, heads)
    y = x + a.sum(1) + part["output"].bias.double()
    z, _ = layer_norm(y, part["middle"])
    output = y + linear(gelu(linear(z, part["up"])), part["down"])
    return Layer(x, alpha, a, y, None, None, output)


def with_final_norm(last: Layer, norm: nn.LayerNorm) -> Layer:
    """The last pre-LN layer, with the norm that follows it."""
    output, deviation = layer_norm(last.output, norm)
    return replace(last, norm2=(norm.weight.double(), deviation), output=output)


def centre(v: Tensor) -> Tensor:
    return v - v.sum() / len(v)


@torch.no_grad()
def vectors(layer: Layer) -> dict[str, Tensor]:
    """a_ij, a_ij + δ x, g1_ij and g2_ij, each (receivers, sources, hidden)."""
    tokens = len(layer.x)
    plain, residual = layer.a.clone(), layer.a.clone()
    g1, g2 = torch.zeros_like(plain), torch.zeros_like(plain)
    for i in range(tokens):
        residual[i, i] += layer.x[i]
        for j in range(tokens):
            g1[i, j] = residual[i, j]
            if layer.norm1 is not None:
                gamma, deviation = layer.norm1
                g1[i, j] = gamma * centre(g1[i, j]) / deviation[i]
            g2[i, j] = g1[i, j]
            if layer.norm2 is not None:
                gamma, deviation = layer.norm2
                g2[i, j] = gamma * centre(g2[i, j]) / deviation[i]
    return {"N": plain, "N_RES": residual, "N_RES_LN": g1, "N_ENC": g2}


@torch.no_grad()
def local_score(layer: Layer, name: str) -> Tensor:
    """n_ij, (receivers, sources)."""
    tokens = len(layer.x)
    family = vectors(layer)
    weights = layer.alpha.sum(0) / len(layer.alpha)
    n = torch.zeros(tokens, tokens, dtype=torch.float64)
    for i in range(tokens):
        for j in range(tokens):
            if name in family:
                n[i, j] = (family[name][i, j] ** 2).sum().sqrt()
            elif name == "W":
                n[i, j] = weights[i, j]
            elif name == "W_FIXED_RES":
                n[i, j] = 0.5 * weights[i, j] + 0.5 * (i == j)
            elif name == "N_FIXED_RES":
                row = (family["N"][i] ** 2).sum(-1).sqrt()
                n[i, j] = 0.5 * row[j] / row.sum() + 0.5 * (i == j)
            elif name == "W_RES":
                others = sum(family["N_ENC"][i, k] for k in range(tokens) if k != i)
                others = others if isinstance(others, Tensor) else torch.zeros(1)
                mixed, own = others.norm(), family["N_ENC"][i, i].norm()
                r = mixed / (mixed + own)
                if i == j:
                    n[i, j] = 1 - r
                else:
                    rest = sum(weights[i, k] for k in range(tokens) if k != i)
                    n[i, j] = r * weights[i, j] / rest
            else:
                raise KeyError(name)
    return n


@torch.no_grad()
def run_encoder(encoder: nn.Module, paths: dict[str, str], ids: Tensor) -> list[Layer]:
    """All layers on one unpadded example of ids, (tokens)."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    bottom = encoder.get_submodule(paths["layers"])[0]
    hook = bottom.register_forward_pre_hook(keep, with_kwargs=True)
    encoder(input_ids=ids[None])
    hook.remove()
    layers = run_layers(encoder, paths, seen[0][0].double())
    if "final" in paths:
        norm = encoder.get_submodule(paths["final"])
        layers[-1] = with_final_norm(layers[-1], norm)
    return layers


@torch.no_grad()
def run_layers(encoder: nn.Module, paths: dict[str, str], x: Tensor) -> list[Layer]:
    """All layers on the embedded tokens of one example, (tokens, hidden)."""
    layers = []
    for module in encoder.get_submodule(paths["layers"]):
        layers.append(run_layer(x, module, paths, encoder.config.num_attention_heads))
        x = layers[-1].output
    return layers


def rollout(local: list[Tensor]) -> Tensor:
    """R^L by loops, (receivers, sources)."""
    result = local[0]
    for n in local[1:]:
        product = torch.zeros_like(result)
        for i in range(len(n)):
            for k in range(len(n)):
                product[i] += n[i, k] * result[k]
        result = product
    return result
