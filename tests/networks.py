"""What tiny models compute for one example, as plain tensors.

The literal twins of AttnLRP and DecompX read these and nothing else: a network is its
word embeddings, its layers' matrices and its head. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from types import SimpleNamespace

import torch
import transformers as t
from torch import Tensor, nn

from tests import oracle
from tests.models import (
    FAMILIES,
    SIZES,
    VOCABULARY,
    encoder_of,
    in_own_dtype,
    mask_second,
    one,
    randomize,
    sentence,
)


@dataclass(frozen=True)
class Map:
    """W x + b."""

    weight: Tensor  # (out, in)
    bias: Tensor  # (out)


@dataclass(frozen=True)
class Norm:
    """LayerNorm, or RMSNorm, which takes no mean away."""

    gamma: Tensor
    beta: Tensor
    epsilon: float
    centred: bool


@dataclass(frozen=True)
class FeedForward:
    """down(f(up(x))), or with a gate down(f(gate(x)) ⊙ up(x))."""

    up: Map
    down: Map
    activation: str
    gate: Map | None = None


@dataclass(frozen=True)
class Layer:
    """One layer. Each head has its own rows, also where heads share a key and value."""

    heads: int
    query: Map
    key: Map
    value: Map
    output: Map
    norm1: Norm | None
    norm2: Norm
    feed_forward: FeedForward
    # A logit is scale × q·k + constant, or none where a source is not seen.
    scale: float
    constant: Tensor  # (heads, receivers, sources)
    seen: Tensor  # (receivers, sources)
    rotation: Tensor | None = None  # (positions, size, size), of queries and keys


@dataclass(frozen=True)
class Network:
    """One example's computation.

    The first layer's input is words @ projectionᵀ + offset, normed where there is a
    norm. A norm precedes each branch (``pre``), or follows each residual.
    """

    words: Tensor  # (tokens, size): word embeddings, or pixels of patches
    offset: Tensor  # (tokens, hidden): positions, types, a class token
    norm: Norm | None
    pre: bool
    layers: list[Layer]
    final: Norm | None
    reads: Tensor  # (tokens): the weight of each token in what the head reads
    head: list[Map | Norm | str]  # a string is an activation
    projection: Tensor | None = None  # (hidden, size)


# A function, and the limit of f(u) / u at 0.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "gelu": (oracle.gelu, 0.5),
    "gelu_new": (
        lambda u: (
            0.5
            * u
            * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u * u * u)))
        ),
        0.5,
    ),
    "silu": (lambda u: u / (1 + torch.exp(-u)), 0.5),
    "relu": (lambda u: u * (u > 0), 0.0),
    "tanh": (torch.tanh, 1.0),
}


def read_map(module: nn.Module) -> Map:
    return Map(*(tensor.detach() for tensor in oracle.matrix(module)))


def read_norm(module: nn.Module | None) -> Norm | None:
    if module is None or isinstance(module, nn.Identity):
        return None
    gamma = module.weight.detach().double()
    beta = getattr(module, "bias", None)
    return Norm(
        gamma,
        torch.zeros_like(gamma) if beta is None else beta.detach().double(),
        module.eps if hasattr(module, "eps") else module.variance_epsilon,
        isinstance(module, nn.LayerNorm),
    )


def part(whole: Map, index: int, count: int) -> Map:
    return Map(whole.weight.chunk(count)[index], whole.bias.chunk(count)[index])


def of_each_head(shared: Map, heads: int, groups: int) -> Map:
    """Grouped queries: neighbouring heads share keys and values."""

    def repeat(rows: Tensor) -> Tensor:
        whole = rows.unflatten(0, (groups, -1))
        return whole.repeat_interleave(heads // groups, 0).flatten(0, 1)

    return Map(repeat(shared.weight), repeat(shared.bias))


def read_feed_forward(
    layer: nn.Module, names: tuple[str, ...], activation: str
) -> FeedForward:
    """(up, down) or (up, down, gate); one map may make first the gate and then up."""
    maps = [read_map(attrgetter(name)(layer)) for name in names]
    if len(maps) == 2:
        return FeedForward(*maps, activation)
    up, down, gate = maps
    if names[0] == names[2]:
        gate, up = part(up, 0, 2), part(up, 1, 2)
    return FeedForward(up, down, activation, gate)


def rotations(tokens: int, size: int, base: float) -> Tensor:
    """The rotation of each position as a matrix, (positions, size, size)."""
    columns = []
    for column in range(size):
        basis = torch.zeros(tokens, size, dtype=torch.float64)
        basis[:, column] = 1
        columns.append(oracle.rotate(basis, base))
    return torch.stack(columns, -1)


@torch.no_grad()
def read_layers(
    encoder: nn.Module,
    recipe: oracle.Recipe,
    tokens: int,
    activation: str,
    feed_forward: tuple[str, ...] = (),
) -> list[Layer]:
    described = oracle.Model(encoder, recipe)
    heads, groups = described.heads, described.groups
    norms = ("norm1", "norm2") if recipe.norm1 else ("before", "middle")
    layers = []
    for index, module in enumerate(encoder.get_submodule(recipe.layers)):
        value = read_map(described.part(module, "value"))
        if recipe.fused:
            query, key, value = (part(value, n, 3) for n in range(3))
        else:
            query = read_map(described.part(module, "query"))
            key = read_map(described.part(module, "key"))
        size = len(query.bias) // heads
        pairs = [(i, j) for i in range(tokens) for j in range(tokens)]
        seen = torch.tensor([described.sees(i, j, index) for i, j in pairs])
        constant = torch.zeros(heads, tokens, tokens, dtype=torch.float64)
        if recipe.bias is not None:
            for i, j in pairs:
                constant[:, i, j] = recipe.bias(encoder, module, i, j, tokens)
        layers.append(
            Layer(
                heads=heads,
                query=query,
                key=of_each_head(key, heads, groups),
                value=of_each_head(value, heads, groups),
                output=read_map(described.part(module, "output")),
                norm1=read_norm(described.part(module, norms[0])),
                norm2=read_norm(described.part(module, norms[1])),
                feed_forward=read_feed_forward(
                    module, feed_forward or (recipe.up, recipe.down), activation
                ),
                scale=size**-0.5 if recipe.scaled else 1.0,
                constant=constant,
                seen=seen.view(tokens, tokens),
                rotation=None
                if recipe.rotary is None
                else rotations(tokens, size, recipe.rotary(index)),
            )
        )
    return layers


def post_norm(
    family: str,
    model: nn.Module,
    ids: Tensor,
    activation: str,
    head: list[Map | Norm | str],
) -> Network:
    """BERT and its like: the first token is read."""
    encoder = encoder_of(family, model)
    embeddings = encoder.embeddings
    positions = torch.arange(len(ids))
    if family == "roberta":  # positions count from the one behind the padding's
        positions = positions + model.config.pad_token_id + 1
    offset = embeddings.position_embeddings.weight[positions]
    if hasattr(embeddings, "token_type_embeddings"):
        offset = offset + embeddings.token_type_embeddings.weight[0]
    return Network(
        words=embeddings.word_embeddings.weight[ids],
        offset=offset,
        norm=read_norm(embeddings.LayerNorm),
        pre=False,
        layers=read_layers(encoder, FAMILIES[family].recipe, len(ids), activation),
        final=None,
        reads=one(ids, 0),
        head=head,
    )


def bert(model: nn.Module, ids: Tensor) -> Network:
    head = [read_map(model.bert.pooler.dense), "tanh", read_map(model.classifier)]
    return post_norm("bert", model, ids, model.config.hidden_act, head)


def roberta(model: nn.Module, ids: Tensor) -> Network:
    classifier = model.classifier
    head = [read_map(classifier.dense), "tanh", read_map(classifier.out_proj)]
    return post_norm("roberta", model, ids, model.config.hidden_act, head)


def distilbert(model: nn.Module, ids: Tensor) -> Network:
    head = [read_map(model.pre_classifier), "relu", read_map(model.classifier)]
    return post_norm("distilbert", model, ids, model.config.activation, head)


def modernbert(model: nn.Module, ids: Tensor) -> Network:
    embeddings = model.model.embeddings
    words = embeddings.tok_embeddings.weight[ids]
    return Network(
        words=words,
        offset=torch.zeros_like(words),
        norm=read_norm(embeddings.norm),
        pre=True,
        layers=read_layers(
            model.model,
            oracle.MODERNBERT,
            len(ids),
            model.config.hidden_activation,
            ("mlp.Wi", "mlp.Wo", "mlp.Wi"),
        ),
        final=read_norm(model.model.final_norm),
        reads=one(ids, 0),
        head=[
            read_map(model.head.dense),
            model.config.classifier_activation,
            read_norm(model.head.norm),
            read_map(model.classifier),
        ],
    )


def t5(model: nn.Module, ids: Tensor) -> Network:
    """The encoder, with a head on the mean of the tokens."""
    words = model.get_input_embeddings().weight[ids]
    inner = "layer.1.DenseReluDense."
    names = ("wi_1", "wo", "wi_0") if model.config.is_gated_act else ("wi", "wo")
    return Network(
        words=words,
        offset=torch.zeros_like(words),
        norm=None,
        pre=True,
        layers=read_layers(
            model.t5.encoder,
            oracle.T5,
            len(ids),
            model.config.dense_act_fn,
            tuple(inner + name for name in names),
        ),
        final=read_norm(model.t5.encoder.final_layer_norm),
        reads=torch.full((len(ids),), 1 / len(ids), dtype=torch.float64),
        head=[read_map(model.head)],
    )


def gpt2(model: nn.Module, ids: Tensor) -> Network:
    """The logits of the token that follows the last."""
    return Network(
        words=model.transformer.wte.weight[ids],
        offset=model.transformer.wpe.weight[: len(ids)],
        norm=None,
        pre=True,
        layers=read_layers(
            model.transformer,
            oracle.GPT2,
            len(ids),
            model.config.activation_function,
            ("mlp.c_fc", "mlp.c_proj"),
        ),
        final=read_norm(model.transformer.ln_f),
        reads=one(ids, len(ids) - 1),
        head=[read_map(model.lm_head)],
    )


def llama(model: nn.Module, ids: Tensor) -> Network:
    words = model.model.embed_tokens.weight[ids]
    return Network(
        words=words,
        offset=torch.zeros_like(words),
        norm=None,
        pre=True,
        layers=read_layers(
            model.model,
            oracle.LLAMA,
            len(ids),
            model.config.hidden_act,
            ("mlp.up_proj", "mlp.down_proj", "mlp.gate_proj"),
        ),
        final=read_norm(model.model.norm),
        reads=one(ids, len(ids) - 1),
        head=[read_map(model.score)],
    )


def patches(image: Tensor, size: int) -> Tensor:
    """(channels, height, width) → (patches, channels × size × size)."""
    tiles = image.unfold(1, size, size).unfold(2, size, size)
    return tiles.permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1)


def whole_image(rows: Tensor, shape: torch.Size, size: int) -> Tensor:
    """What patches() takes apart."""
    channels, height, width = shape
    tiles = rows.view(height // size, width // size, channels, size, size)
    return tiles.permute(2, 0, 3, 1, 4).reshape(shape)


def vit(model: nn.Module, image: Tensor) -> Network:
    """Pixels of patches are the words, behind a row of zeros for the class token."""
    embeddings, is_new = model.vit.embeddings, hasattr(model.vit, "layers")
    convolution = embeddings.patch_embeddings.projection
    pixels = patches(image.double(), model.config.patch_size)
    positions = embeddings.position_embeddings[0]
    shifted = [embeddings.cls_token[0], convolution.bias.expand(len(pixels), -1)]
    return Network(
        words=nn.functional.pad(pixels, (0, 0, 1, 0)),
        offset=torch.cat(shifted) + positions,
        norm=None,
        pre=True,
        layers=read_layers(
            model.vit,
            oracle.VIT if is_new else oracle.VIT_OLD,
            len(positions),
            model.config.hidden_act,
            ("mlp.fc1", "mlp.fc2") if is_new else (),
        ),
        final=read_norm(model.vit.layernorm),
        reads=one(positions, 0),
        head=[read_map(model.classifier)],
        projection=convolution.weight.flatten(1),
    )


class TorchClassifier(nn.Module):
    """Torch's own pre-LN encoder, with a head on the first token."""

    def __init__(self, *_: object) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 24)
        self.positions = nn.Embedding(40, 24)
        layer = nn.TransformerEncoderLayer(
            24, 4, 36, activation="gelu", norm_first=True, batch_first=True
        )
        final = nn.LayerNorm(24)
        self.stack = nn.TransformerEncoder(layer, 3, final, enable_nested_tensor=False)
        self.head = nn.Linear(24, 3)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        states = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        hidden = None if mask is None else mask == 0
        return self.head(self.stack(states, src_key_padding_mask=hidden)[:, 0])


class Described(nn.Module):
    """A torch layer, whose queries, keys and values are made by a module."""

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        attention = layer.self_attn
        self.together = nn.Linear(24, 72)
        self.together.weight = attention.in_proj_weight
        self.together.bias = attention.in_proj_bias
        self.layer = layer


TORCH = oracle.Recipe(
    layers="layers",
    value="together",
    fused=True,
    output="layer.self_attn.out_proj",
    before="layer.norm1",
    middle="layer.norm2",
    up="layer.linear1",
    down="layer.linear2",
)


def torch_layers(model: TorchClassifier, ids: Tensor) -> Network:
    encoder = nn.Module()
    encoder.layers = nn.ModuleList(Described(layer) for layer in model.stack.layers)
    encoder.config = SimpleNamespace(num_attention_heads=4)
    return Network(
        words=model.tokens.weight[ids],
        offset=model.positions.weight[: len(ids)],
        norm=None,
        pre=True,
        layers=read_layers(encoder, TORCH, len(ids), "gelu"),
        final=read_norm(model.stack.norm),
        reads=one(ids, 0),
        head=[read_map(model.head)],
    )


@dataclass(frozen=True)
class Case:
    """How to make a model, and what it computes for one example."""

    head: type[nn.Module]
    config: Callable[[], t.PretrainedConfig | None]
    read: Callable[[nn.Module, Tensor], Network]

    def build(self) -> nn.Module:
        """A random model of the case, in evaluation mode and float64."""
        torch.manual_seed(1)
        model = randomize(self.head(self.config()))
        generator = torch.Generator().manual_seed(2)
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                for parameter in (module.in_proj_weight, module.in_proj_bias):
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.data = 0.3 * noise
        return in_own_dtype(model.double().eval())

    @torch.no_grad()
    def network(self, model: nn.Module, inputs: Tensor) -> Network:
        return self.read(model, inputs)


def family_case(
    family: str, read: Callable[[nn.Module, Tensor], Network], **options: object
) -> Case:
    def config() -> t.PretrainedConfig:
        config = FAMILIES[family].config()
        for name, setting in options.items():
            setattr(config, name, setting)
        return config

    return Case(FAMILIES[family].head, config, read)


def vit_config() -> t.ViTConfig:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: SIZES[name] for name in (*names, "intermediate_size", "num_labels")}
    return t.ViTConfig(**sizes, image_size=12, patch_size=4)


BIASED = {"attention_bias": True, "mlp_bias": True}
CASES = {
    "bert": family_case("bert", bert),
    "bert-relu": family_case("bert", bert, hidden_act="relu"),
    "roberta": family_case("roberta", roberta),
    "distilbert": family_case("distilbert", distilbert),
    "torch": Case(TorchClassifier, lambda: None, torch_layers),
    "vit": Case(t.ViTForImageClassification, vit_config, vit),
    "gpt2": Case(mask_second(t.GPT2LMHeadModel), FAMILIES["gpt2"].config, gpt2),
    "llama": family_case("llama", llama),
    "llama-biased": family_case("llama", llama, **BIASED),
}
# Families that the installed release of transformers has as they are described here.
if "modernbert" in FAMILIES:
    CASES["modernbert"] = family_case("modernbert", modernbert)
    CASES["modernbert-biased"] = family_case(
        "modernbert", modernbert, norm_bias=True, classifier_bias=True, **BIASED
    )
if "t5" in FAMILIES:
    CASES["t5"] = family_case("t5", t5)
    CASES["t5-relu"] = family_case("t5", t5, dense_act_fn="relu", is_gated_act=False)


class TwoTokens(nn.Module):
    """Attention of size 1: q = 1, k = x ln 2, v = 3 x, read at the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(1, 1) for _ in range(3))
        with torch.no_grad():
            for part, weight, bias in (
                (self.query, 0.0, 1.0),
                (self.key, math.log(2), 0.0),
                (self.value, 3.0, 0.0),
            ):
                part.weight.fill_(weight)
                part.bias.fill_(bias)

    def forward(self, x: Tensor) -> Tensor:
        mixed = nn.functional.scaled_dot_product_attention(
            self.query(x), self.key(x), self.value(x)
        )
        return mixed[:, 0]


def example(name: str, tokens: int = 7) -> Tensor:
    """Ids of a sentence, or an image."""
    if name == "vit":
        generator = torch.Generator().manual_seed(tokens)
        return torch.randn(3, 12, 12, generator=generator, dtype=torch.float64)
    return sentence(tokens, seed=tokens)


@torch.no_grad()
def logits(name: str, model: nn.Module, inputs: Tensor) -> Tensor:
    """The model's own logits of one example, (classes); GPT-2's of the last token."""
    output = model(inputs[None])
    rows = getattr(output, "logits", output)[0]
    return rows[-1] if name == "gpt2" else rows


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest relevance."""
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max())
