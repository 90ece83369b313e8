r"""The slow, literal twin: GlobEnc from the formulas, in float64, with loops.

Nothing here calls the package. One example at a time, no padding, no identities: for
every pair of tokens the vector is built and its norm taken. The layer is computed along
the way from the model's weights by hand, so a test can hold the oracle itself against
the model's own hidden states.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """How a family computes a layer, and where its weights are.

    Post-LN where ``norm1`` is named, pre-LN where ``middle`` is.
    """

    layers: str
    value: str
    output: str
    query: str = ""
    key: str = ""
    norm1: str = ""
    norm2: str = ""
    before: str = ""
    middle: str = ""
    final: str = ""
    # Either two linear maps with GELU in between, or a module that is asked.
    up: str = ""
    down: str = ""
    feed_forward: str = ""
    # Where one linear map makes queries, keys and values, it is ``value``.
    fused: bool = False
    # Norms of each head's queries and keys (Qwen3).
    query_norm: str = ""
    key_norm: str = ""
    # Vectors that multiply the two branches (LayerScale).
    scale1: str = ""
    scale2: str = ""
    causal: bool = False
    scaled: bool = True
    # Hidden states of the layers are (batch, tokens, hidden), not (tokens, batch, ...).
    batch_first: bool = True
    # Base of the rotation and reach of the window of a layer, by its number.
    rotary: Callable[[int], float] | None = None
    window: Callable[[int], int | None] = lambda index: None
    # What turns together: neighbours, or an entry of either half.
    neighbours: bool = False
    # (encoder, layer, receiver, source, tokens) → (heads), added to the logits.
    bias: Callable[[nn.Module, nn.Module, int, int, int], Tensor] | None = None
    # (layer, x, heads) → queries, keys and values of each head, where no three linear
    # maps make them.
    split: Callable[[nn.Module, Tensor, int], list[list[Tensor]]] | None = None
    # (encoder, layer, head, query, key, receiver, source) → the logit, where it is not
    # the scaled product of query and key.
    logit: Callable[..., Tensor] | None = None


BERT_LIKE = Recipe(
    layers="encoder.layer",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    norm1="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    norm2="output.LayerNorm",
)
DISTILBERT = Recipe(
    layers="transformer.layer",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    output="attention.out_lin",
    norm1="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    norm2="output_layer_norm",
)
ALBERT = Recipe(
    layers="encoder.albert_layer_groups.0.albert_layers",
    query="attention.query",
    key="attention.key",
    value="attention.value",
    output="attention.dense",
    norm1="attention.LayerNorm",
    up="ffn",
    down="ffn_output",
    norm2="full_layer_layer_norm",
)
NOMIC_BERT = Recipe(
    layers="layers",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    norm1="post_attention_layernorm",
    feed_forward="mlp",
    norm2="post_mlp_layernorm",
    rotary=lambda index: 1000.0,
)
XLM_ROBERTA_XL = Recipe(
    layers="encoder.layer",
    final="encoder.LayerNorm",
    before="attention.self_attn_layer_norm",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    middle="LayerNorm",
    up="intermediate.dense",
    down="output.dense",
)
ROBERTA_PRELAYERNORM = replace(
    XLM_ROBERTA_XL,
    final="LayerNorm",
    before="attention.LayerNorm",
    middle="intermediate.LayerNorm",
)
ESM = replace(
    XLM_ROBERTA_XL, final="encoder.emb_layer_norm_after", before="attention.LayerNorm"
)
MODERNBERT = Recipe(
    layers="layers",
    final="final_norm",
    before="attn_norm",
    value="attn.Wqkv",
    fused=True,
    output="attn.Wo",
    middle="mlp_norm",
    feed_forward="mlp",
    # Every third layer sees all tokens, the others two to either side.
    rotary=lambda index: 160_000.0 if index % 3 == 0 else 10_000.0,
    window=lambda index: None if index % 3 == 0 else 2,
)
EUROBERT = Recipe(
    layers="layers",
    final="norm",
    before="input_layernorm",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    middle="post_attention_layernorm",
    feed_forward="mlp",
    rotary=lambda index: 10_000.0,
)
LLAMA = replace(EUROBERT, causal=True)
QWEN3 = replace(LLAMA, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")
GPT2 = Recipe(
    layers="h",
    final="ln_f",
    before="ln_1",
    value="attn.c_attn",
    fused=True,
    output="attn.c_proj",
    middle="ln_2",
    feed_forward="mlp",
    causal=True,
)
CLIP = Recipe(
    layers="encoder.layers",
    before="layer_norm1",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.out_proj",
    middle="layer_norm2",
    feed_forward="mlp",
)
CLIP_TEXT = replace(CLIP, final="final_layer_norm", causal=True)
SIGLIP_TEXT = replace(CLIP, final="final_layer_norm")
SIGLIP_VISION = replace(CLIP, final="post_layernorm")
VIT = Recipe(
    layers="layers",
    final="layernorm",
    before="layernorm_before",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.o_proj",
    middle="layernorm_after",
    feed_forward="mlp",
)
# As in transformers 5.0.
VIT_OLD = replace(
    VIT,
    layers="encoder.layer",
    query="attention.attention.query",
    key="attention.attention.key",
    value="attention.attention.value",
    output="attention.output.dense",
    feed_forward="",
    up="intermediate.dense",
    down="output.dense",
)
DINOV2 = replace(
    VIT,
    layers="encoder.layer",
    before="norm1",
    middle="norm2",
    scale1="layer_scale1.lambda1",
    scale2="layer_scale2.lambda1",
)
DINOV2_OLD = replace(
    DINOV2,
    query="attention.attention.query",
    key="attention.attention.key",
    value="attention.attention.value",
    output="attention.output.dense",
)


def t5_bucket(i: int, j: int, buckets: int, farthest: int) -> int:
    """The bucket of the distance of two tokens.

    Half of the buckets are for sources behind, half for sources in front; of each half
    one half is exact and the other grows with the logarithm (Raffel et al. 2020).
    """
    half = buckets // 2
    exact, distance = half // 2, abs(j - i)
    bucket = distance
    if distance >= exact:
        growth = math.log(distance / exact) / math.log(farthest / exact)
        bucket = min(exact + int(growth * (half - exact)), half - 1)
    return bucket + half if j > i else bucket


def t5_bias(encoder: nn.Module, _: nn.Module, i: int, j: int, tokens: int) -> Tensor:
    """The bias of T5's first layer, which all use."""
    attention = encoder.get_submodule("block.0.layer.0.SelfAttention")
    bucket = t5_bucket(
        i,
        j,
        attention.relative_attention_num_buckets,
        attention.relative_attention_max_distance,
    )
    return attention.relative_attention_bias.weight[bucket].double()


T5 = Recipe(
    layers="block",
    final="final_layer_norm",
    before="layer.0.layer_norm",
    query="layer.0.SelfAttention.q",
    key="layer.0.SelfAttention.k",
    value="layer.0.SelfAttention.v",
    output="layer.0.SelfAttention.o",
    middle="layer.1.layer_norm",
    feed_forward="layer.1.DenseReluDense",
    scaled=False,
    bias=t5_bias,
)


def beit_bias(
    encoder: nn.Module, layer: nn.Module, i: int, j: int, tokens: int
) -> Tensor:
    """The bias of a layer, or one that all share: the offset of two patches.

    The last three rows of the table are for [CLS] to patch, patch to [CLS] and [CLS]
    to itself (Bao et al. 2022).
    """
    owner = getattr(layer, "relative_position_bias", None)
    if owner is None:
        owner = encoder.shared_position_bias
    table = owner.relative_position_bias_table.double()
    side = math.isqrt(tokens - 1)
    if i == 0 or j == 0:
        return table[-1 if i == j else (-3 if i == 0 else -2)]
    down = (i - 1) // side - (j - 1) // side + side - 1
    right = (i - 1) % side - (j - 1) % side + side - 1
    return table[down * (2 * side - 1) + right]


BEIT = replace(VIT, scale1="lambda_1", scale2="lambda_2", bias=beit_bias)


def mpnet_bias(encoder: nn.Module, _: nn.Module, i: int, j: int, tokens: int) -> Tensor:
    """T5's bias in MPNet, which all layers use (Song et al. 2020).

    Released code has 32 buckets up to a distance of 128, whatever the configuration.
    """
    table = encoder.get_submodule("encoder.relative_attention_bias")
    return table.weight[t5_bucket(i, j, 32, 128)].double()


MPNET = replace(
    BERT_LIKE,
    query="attention.attn.q",
    key="attention.attn.k",
    value="attention.attn.v",
    output="attention.attn.o",
    norm1="attention.LayerNorm",
    bias=mpnet_bias,
)
# Su et al. 2021: pairs of neighbours turn.
ROFORMER = replace(BERT_LIKE, rotary=lambda index: 10_000.0, neighbours=True)


def disentangled(
    head: int,
    query: Tensor,
    key: Tensor,
    position: Tensor,
    to_key: nn.Module | None,
    to_query: nn.Module | None,
) -> Tensor:
    """Disentangled attention (He et al. 2021, DeBERTa, equations 2 and 4).

    Content to content, content to position and position to content, those that there
    are, over the root of the head size times their number. ``position`` embeds the
    relative position; two maps make a key and a query of it.
    """
    own = slice(head * len(query), (head + 1) * len(query))
    terms = [query @ key]
    if to_key is not None:
        terms.append(query @ linear(position, to_key)[own])
    if to_query is not None:
        terms.append(key @ linear(position, to_query)[own])
    return torch.stack(terms).sum() / math.sqrt(len(query) * len(terms))


def deberta_split(layer: nn.Module, x: Tensor, heads: int) -> list[list[Tensor]]:
    """One map makes query, key and value of a head side by side; keys have no bias."""
    attention = layer.get_submodule("attention.self")
    parts = linear(x, attention.in_proj).chunk(3 * heads, -1)
    query_bias = attention.q_bias.double().chunk(heads)
    value_bias = attention.v_bias.double().chunk(heads)
    return [
        [parts[3 * h] + query_bias[h] for h in range(heads)],
        [parts[3 * h + 1] for h in range(heads)],
        [parts[3 * h + 2] + value_bias[h] for h in range(heads)],
    ]


def deberta_logit(
    encoder: nn.Module,
    layer: nn.Module,
    head: int,
    query: Tensor,
    key: Tensor,
    i: int,
    j: int,
) -> Tensor:
    """DeBERTa's: distances beyond a span k count as k (equation 3 of the paper).

    In both terms released code takes δ(i, j), where the paper has δ(j, i) in the last.
    """
    attention = layer.get_submodule("attention.self")
    span = attention.max_relative_positions
    distance = min(max(i - j, -span), span - 1)
    position = encoder.encoder.rel_embeddings.weight[distance + span].double()
    to_key = getattr(attention, "pos_proj", None)
    to_query = getattr(attention, "pos_q_proj", None)
    return disentangled(head, query, key, position, to_key, to_query)


def log_bucket(distance: int, buckets: int, farthest: int) -> int:
    """The bucket of a distance: half exact, then by its logarithm, signed.

    As in the released code of DeBERTa-v2, which v3 (He et al. 2023) uses.
    """
    half = buckets // 2
    if abs(distance) <= half:
        return distance
    growth = math.log(abs(distance) / half) / math.log((farthest - 1) / half)
    # Their quotient is 1 at the farthest but for rounding.
    bucket = half + math.ceil(round(growth * (half - 1), 6))
    return bucket if distance > 0 else -bucket


def deberta_v2_logit(
    encoder: nn.Module,
    layer: nn.Module,
    head: int,
    query: Tensor,
    key: Tensor,
    i: int,
    j: int,
) -> Tensor:
    """DeBERTa-v2's and v3's: buckets of distances, and maps that content may share."""
    attention = layer.get_submodule("attention.self")
    span, distance = attention.pos_ebd_size, i - j
    if attention.position_buckets > 0:
        farthest = attention.max_relative_positions
        distance = log_bucket(distance, attention.position_buckets, farthest)
    distance = min(max(distance, -span), span - 1)
    position = encoder.encoder.rel_embeddings.weight[distance + span].double()
    if "layer_norm" in encoder.encoder.norm_rel_ebd:
        position = norm_of(position[None], encoder.encoder.LayerNorm)[0][0]
    to_key = getattr(attention, "pos_key_proj", None)
    to_query = getattr(attention, "pos_query_proj", None)
    if attention.share_att_key:
        kinds = attention.pos_att_type
        to_key = attention.key_proj if "c2p" in kinds else None
        to_query = attention.query_proj if "p2c" in kinds else None
    return disentangled(head, query, key, position, to_key, to_query)


DEBERTA = replace(
    BERT_LIKE,
    query="",
    key="",
    value="",
    split=deberta_split,
    logit=deberta_logit,
)
DEBERTA_V2 = replace(
    BERT_LIKE,
    query="attention.self.query_proj",
    key="attention.self.key_proj",
    value="attention.self.value_proj",
    logit=deberta_v2_logit,
)


def xlnet_split(layer: nn.Module, x: Tensor, heads: int) -> list[list[Tensor]]:
    """Parameters (hidden, heads, size) make queries, keys and values, without bias."""
    attention = layer.rel_attn
    return [
        [x @ weight[:, h].double() for h in range(heads)]
        for weight in (attention.q, attention.k, attention.v)
    ]


def xlnet_logit(
    encoder: nn.Module,
    layer: nn.Module,
    head: int,
    query: Tensor,
    key: Tensor,
    i: int,
    j: int,
) -> Tensor:
    """Transformer-XL's relative attention (Dai et al. 2019, section 3.3), as in XLNet.

    (q_i + u)ᵀ k_j + (q_i + v)ᵀ W_R r_{i - j}, with r sines and, behind them, cosines.
    """
    attention, hidden = layer.rel_attn, encoder.config.d_model
    angles = [(i - j) / 10_000 ** (2 * n / hidden) for n in range(hidden // 2)]
    waves = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    position = torch.tensor(waves, dtype=torch.float64) @ attention.r[:, head].double()
    content = (query + attention.r_w_bias[head].double()) @ key
    relative = (query + attention.r_r_bias[head].double()) @ position
    return (content + relative) / math.sqrt(len(query))


XLNET = Recipe(
    layers="layer",
    batch_first=False,
    value="",
    split=xlnet_split,
    logit=xlnet_logit,
    output="rel_attn.o",
    norm1="rel_attn.layer_norm",
    up="ff.layer_1",
    down="ff.layer_2",
    norm2="ff.layer_norm",
)
BART = Recipe(
    layers="layers",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.out_proj",
    norm1="self_attn_layer_norm",
    up="fc1",
    down="fc2",
    norm2="final_layer_norm",
)
MBART = replace(
    BART,
    final="layer_norm",
    before="self_attn_layer_norm",
    middle="final_layer_norm",
    norm1="",
    norm2="",
)


@dataclass
class Layer:
    """The quantities of one encoder layer, one example.

    ``norm1`` follows the first residual and ``norms2`` the second, in order: the weight
    of each, its denominators (tokens), and whether it centres.
    """

    x: Tensor  # (tokens, hidden), the input
    alpha: Tensor  # (heads, tokens, tokens)
    a: Tensor  # (receivers, sources, hidden), a_ij
    y: Tensor  # (tokens, hidden), after the first residual
    norm1: tuple[Tensor, Tensor, bool] | None
    norms2: list[tuple[Tensor, Tensor, bool]]
    output: Tensor  # (tokens, hidden)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def norm_of(x: Tensor, norm: nn.Module) -> tuple[Tensor, tuple[Tensor, Tensor, bool]]:
    """LayerNorm or RMSNorm from the definition: output, (weight, denominators, ...)."""
    weight = norm.weight.double()
    centred = isinstance(norm, nn.LayerNorm)
    centred = centred or type(norm).__name__ == "DebertaLayerNorm"
    mean = x.sum(-1, keepdim=True) / x.shape[-1] if centred else 0
    epsilon = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    deviation = (((x - mean) ** 2).sum(-1) / x.shape[-1] + epsilon).sqrt()
    output = (x - mean) / deviation[:, None] * weight
    if getattr(norm, "bias", None) is not None:
        output = output + norm.bias.double()
    return output, (weight, deviation, centred)


def matrix(module: nn.Module | nn.Parameter) -> tuple[Tensor, Tensor]:
    """(weight (out, in), bias) of a Linear, or of GPT-2's transposed one.

    Or of XLNet's output, a parameter (hidden, heads, size).
    """
    if isinstance(module, nn.Parameter):
        weight = module.double().flatten(1)
    elif isinstance(module, nn.Linear):
        weight = module.weight.double()
    else:
        weight = module.weight.double().T
    bias = getattr(module, "bias", None)
    return weight, torch.zeros(len(weight)).double() if bias is None else bias.double()


def linear(x: Tensor, module: nn.Module) -> Tensor:
    weight, bias = matrix(module)
    return x @ weight.T + bias


def rotate(x: Tensor, base: float, neighbours: bool = False) -> Tensor:
    """Rotary positions: turn (x_k, x_{k + half}) by position × base^(-2k / size).

    Or neighbours, (x_2k, x_{2k + 1}), by the same.
    """
    tokens, size = x.shape
    result = torch.zeros_like(x)
    for position in range(tokens):
        for k in range(size // 2):
            angle = position * base ** (-2 * k / size)
            one, other = (2 * k, 2 * k + 1) if neighbours else (k, k + size // 2)
            first, second = x[position, one], x[position, other]
            result[position, one] = first * math.cos(angle) - second * math.sin(angle)
            result[position, other] = second * math.cos(angle) + first * math.sin(angle)
    return result


class Model:
    """A layer stack with its recipe: what the formulas need of it."""

    def __init__(self, encoder: nn.Module, recipe: Recipe) -> None:
        config = encoder.config
        self.encoder, self.recipe = encoder, recipe
        self.heads = config.num_attention_heads
        self.groups = getattr(config, "num_key_value_heads", None) or self.heads

    def part(self, layer: nn.Module, name: str) -> nn.Module | None:
        path = getattr(self.recipe, name)
        return attrgetter(path)(layer) if path else None

    def scale(self, layer: nn.Module, name: str) -> Tensor | float:
        path = getattr(self.recipe, name)
        if not path:
            return 1.0
        owner, _, attribute = path.rpartition(".")
        return getattr(layer.get_submodule(owner), attribute).double()

    def heads_of(self, x: Tensor, layer: nn.Module, index: int) -> list[list[Tensor]]:
        """Queries, keys and values of each head, (tokens, size) each."""
        recipe = self.recipe
        if recipe.split is not None:
            return recipe.split(layer, x, self.heads)
        if recipe.fused:
            together = linear(x, self.part(layer, "value"))
            whole = together.chunk(3, -1)
        else:
            whole = [linear(x, self.part(layer, n)) for n in ("query", "key", "value")]
        counts = (self.heads, self.groups, self.groups)
        split = [list(w.chunk(n, -1)) for w, n in zip(whole, counts)]
        for which, name in ((0, "query_norm"), (1, "key_norm")):
            norm = self.part(layer, name)
            if norm is not None:
                split[which] = [norm_of(head, norm)[0] for head in split[which]]
        if recipe.rotary is not None:
            base = recipe.rotary(index)
            # RoFormer may turn its values, too.
            values = getattr(self.encoder.config, "rotary_value", False)
            for which in (0, 1, 2) if values else (0, 1):
                split[which] = [
                    rotate(head, base, recipe.neighbours) for head in split[which]
                ]
        # Grouped queries: neighbouring heads share keys and values.
        share = self.heads // self.groups
        return [
            split[0],
            [split[1][h // share] for h in range(self.heads)],
            [split[2][h // share] for h in range(self.heads)],
        ]

    def sees(self, i: int, j: int, index: int) -> bool:
        reach = self.recipe.window(index)
        return (not self.recipe.causal or j <= i) and (
            reach is None or abs(i - j) <= reach
        )

    @torch.no_grad()
    def attend(self, x: Tensor, layer: nn.Module, index: int) -> tuple[Tensor, Tensor]:
        """α (heads, receivers, sources) and a_ij, every f^h(x_j) on its own."""
        tokens = len(x)
        query, key, value = self.heads_of(x, layer, index)
        size = query[0].shape[-1]
        factor = 1 / math.sqrt(size) if self.recipe.scaled else 1.0
        weight, _ = matrix(self.part(layer, "output"))
        alpha = torch.zeros(self.heads, tokens, tokens, dtype=torch.float64)
        a = torch.zeros(tokens, tokens, len(weight), dtype=torch.float64)
        scale = self.scale(layer, "scale1")
        for h in range(self.heads):
            for i in range(tokens):
                seen = [j for j in range(tokens) if self.sees(i, j, index)]
                logits = torch.stack([query[h][i] @ key[h][j] * factor for j in seen])
                if self.recipe.logit is not None:
                    own = (self.encoder, layer, h, query[h][i])
                    logits = torch.stack(
                        [self.recipe.logit(*own, key[h][j], i, j) for j in seen]
                    )
                if self.recipe.bias is not None:
                    table = [
                        self.recipe.bias(self.encoder, layer, i, j, tokens)
                        for j in seen
                    ]
                    logits = logits + torch.stack([entry[h] for entry in table])
                exponentials = torch.exp(logits - logits.max())
                alpha[h, i, seen] = exponentials / exponentials.sum()
            for j in range(tokens):
                own = weight[:, h * size : (h + 1) * size]
                transformed = scale * (own @ value[h][j])  # f^h(x_j)
                for i in range(tokens):
                    a[i, j] += alpha[h, i, j] * transformed
        return alpha, a

    @torch.no_grad()
    def feed_forward(self, z: Tensor, layer: nn.Module) -> Tensor:
        module = self.part(layer, "feed_forward")
        if module is not None:
            return module.double()(z[None])[0]
        up, down = self.part(layer, "up"), self.part(layer, "down")
        return linear(gelu(linear(z, up)), down)

    @torch.no_grad()
    def run_layer(self, x: Tensor, layer: nn.Module, index: int) -> Layer:
        """One layer on one example, (tokens, hidden)."""
        _, offset = matrix(self.part(layer, "output"))
        offset = self.scale(layer, "scale1") * offset
        first = self.part(layer, "norm1")
        if first is not None:
            alpha, a = self.attend(x, layer, index)
            y = x + a.sum(1) + offset
            z, norm1 = norm_of(y, first)
            o = z + self.feed_forward(z, layer)
            output, norm2 = norm_of(o, self.part(layer, "norm2"))
            return Layer(x, alpha, a, y, norm1, [norm2], output)
        before = self.part(layer, "before")
        normed = x if isinstance(before, nn.Identity) else norm_of(x, before)[0]
        alpha, a = self.attend(normed, layer, index)
        y = x + a.sum(1) + offset
        z, _ = norm_of(y, self.part(layer, "middle"))
        output = y + self.scale(layer, "scale2") * self.feed_forward(z, layer)
        return Layer(x, alpha, a, y, None, [], output)


def with_final_norm(last: Layer, norm: nn.Module) -> Layer:
    """The last layer, with the norm that follows it."""
    output, described = norm_of(last.output, norm)
    return replace(last, norms2=[*last.norms2, described], output=output)


def through(v: Tensor, norm: tuple[Tensor, Tensor, bool], i: int) -> Tensor:
    """γ ⊙ C(v) / s_i for one vector."""
    gamma, deviation, centred = norm
    centre = v.sum() / len(v) if centred else 0
    return gamma * (v - centre) / deviation[i]


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
                g1[i, j] = through(g1[i, j], layer.norm1, i)
            g2[i, j] = g1[i, j]
            for norm in layer.norms2:
                g2[i, j] = through(g2[i, j], norm, i)
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
                rest = sum(float(weights[i, k]) for k in range(tokens) if k != i)
                # A token that sees itself alone takes everything from itself.
                r = mixed / (mixed + own) if rest else 0.0
                if i == j:
                    n[i, j] = 1 - r
                elif rest:
                    n[i, j] = r * weights[i, j] / rest
            else:
                raise KeyError(name)
    return n


@torch.no_grad()
def run_encoder(
    encoder: nn.Module, recipe: Recipe, inputs: Tensor, name: str = "input_ids"
) -> list[Layer]:
    """All layers on one unpadded example of ids, (tokens), or one image."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        if not seen:
            seen.append(args[0] if args else kwargs["hidden_states"])

    bottom = encoder.get_submodule(recipe.layers)[0]
    hook = bottom.register_forward_pre_hook(keep, with_kwargs=True)
    encoder(**{name: inputs[None]})
    hook.remove()
    x = seen[0][0] if recipe.batch_first else seen[0][:, 0]
    return run_layers(encoder, recipe, x.double())


@torch.no_grad()
def run_layers(encoder: nn.Module, recipe: Recipe, x: Tensor) -> list[Layer]:
    """All layers on the embedded tokens of one example, (tokens, hidden)."""
    # Modules that are asked are brought to float64 below: not the caller's.
    model = Model(copy.deepcopy(encoder), recipe)
    modules = list(model.encoder.get_submodule(recipe.layers))
    if len(modules) == 1:  # ALBERT's serves as every layer
        modules *= encoder.config.num_hidden_layers
    layers = []
    for index, module in enumerate(modules):
        layers.append(model.run_layer(x, module, index))
        x = layers[-1].output
    if recipe.final:
        norm = model.encoder.get_submodule(recipe.final)
        layers[-1] = with_final_norm(layers[-1], norm)
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
