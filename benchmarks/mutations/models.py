"""The models of the campaign: tiny, random, and with a twin."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.mutations.campaign import Scores
from benchmarks.mutations.twin import Twin, shares, watch
from captum_globenc import GlobEnc
from tests import models, oracle

HIDDEN, HEADS = 24, 4
LENGTHS = (8, 5)
DOUBLE = torch.float64

TEXT = (
    "bert",
    "roberta",
    "distilbert",
    "electra",
    "albert",
    "gpt2",
    "llama",
    "qwen3",
    "modernbert",
    "nomic_bert",
    "t5",
    "clip_text_model",
    "esm",
    "xlm-roberta-xl",
    *(name for name in ("bart", "mbart") if name in models.FAMILIES),
)
IMAGES = ("vit", "dinov2", "clip_vision_model")
TORCH = ("torch-post", "torch-pre")
ALL = (*TEXT, *IMAGES, *TORCH)

_IMAGE_SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": HEADS,
    "intermediate_size": 36,
    "image_size": 12,
    "patch_size": 4,
    "num_labels": 3,
}
_CLIP_VISION = replace(
    oracle.VIT,
    layers="encoder.layers",
    before="layer_norm1",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.out_proj",
    middle="layer_norm2",
    final="",
)
_TORCH_POST = oracle.Recipe(
    layers="layers",
    value="self_attn",
    output="self_attn.out_proj",
    norm1="norm1",
    norm2="norm2",
    feed_forward="linear2",
)
_TORCH_PRE = oracle.Recipe(
    layers="layers",
    value="self_attn",
    output="self_attn.out_proj",
    before="norm1",
    middle="norm2",
    feed_forward="linear2",
)
#: From a layer: the module whose output is added in the second residual.
FEED_FORWARD = {
    "distilbert": "ffn.lin2",
    "albert": "ffn_output",
    "gpt2": "mlp",
    "xlm-roberta-xl": "output.dense",
    "bert": "output.dense",
    "roberta": "output.dense",
    "electra": "output.dense",
    "esm": "output.dense",
}
#: From a layer: where its attention is.
ATTENTION = {
    "bert": "attention.self",
    "roberta": "attention.self",
    "electra": "attention.self",
    "distilbert": "attention",
    "albert": "attention",
    "gpt2": "attn",
    "llama": "self_attn",
    "modernbert": "attn",
    "t5": "layer.0.SelfAttention",
    "vit": "attention",
    "torch-post": "self_attn",
    "torch-pre": "self_attn",
}


@dataclass
class Subject:
    """A model, where its parts are, and inputs that it takes.

    Args:
        name (str): the family's.
        model (nn.Module): with a head, in evaluation mode.
        encoder (nn.Module): from which the recipe's paths start.
        recipe (oracle.Recipe): where the parts are.
        inputs (Tensor): ids, or images.
        mask (Tensor or None): (batch, tokens), for texts.
        dtype (torch.dtype): the model's.
    """

    name: str
    model: nn.Module
    encoder: nn.Module
    recipe: oracle.Recipe
    inputs: Tensor
    mask: Tensor | None
    dtype: torch.dtype

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """What follows the inputs."""
        return () if self.mask is None else (self.mask,)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """The model's scores of classes, (batch, classes)."""
        if self.mask is None:
            output = self.model(inputs)
        else:
            output = self.model(inputs, attention_mask=mask)
        if isinstance(output, Tensor):
            return output
        return output["logits"] if "logits" in output else output[0]

    @property
    def layers(self) -> list[nn.Module]:
        """The layers, each once."""
        return list(self.encoder.get_submodule(self.recipe.layers))

    @property
    def top(self) -> nn.Module:
        """The module whose output is the last hidden states."""
        path = self.recipe.final
        return self.encoder.get_submodule(path) if path else self.layers[-1]

    def part(self, name: str, layer: int = 0) -> nn.Module:
        """A part of a layer: "layer", "embeddings", or a name of the recipe."""
        whole = self.layers[min(layer, len(self.layers) - 1)]
        if name == "layer":
            return whole
        if name == "final":
            return self.top
        if name == "embeddings":
            return embeddings_of(self.encoder)
        if name == "attention":
            path = ATTENTION[self.name]
        elif name == "feed_forward":
            path = self.recipe.feed_forward or FEED_FORWARD[self.name]
        else:
            path = getattr(self.recipe, name)
        return whole.get_submodule(path)

    def twin(self, forward: Callable[..., Any] | None = None) -> Twin:
        """What the model does with the inputs."""
        run = forward or self.forward
        return watch(
            self.encoder, self.recipe, lambda: run(self.inputs, *self.arguments)
        )

    def weights(self, forward: Callable[..., Any] | None = None) -> Tensor:
        """What the head reads by its gradient, (batch, tokens), for class 1."""
        run, leaves = forward or self.forward, []

        def leaf(_: nn.Module, __: Any, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            leaves.append(states.detach().requires_grad_())
            kept = leaves[-1] + 0
            return (kept, *output[1:]) if isinstance(output, tuple) else kept

        # What other hooks make of the last hidden states is a part of the head.
        hook = self.top.register_forward_hook(leaf, prepend=True)
        try:
            with torch.enable_grad():
                output = run(self.inputs, *self.arguments)
                grads = torch.autograd.grad(output[:, 1].sum(), leaves[-1:])
        finally:
            hook.remove()
        return shares(list(grads))[:, 0]

    def truth(self, forward: Callable[..., Any] | None = None) -> Tensor:
        """The true scores of what the head reads, shaped like the inputs."""
        rollout = self.twin(forward).rollout()
        return self.spread((self.weights(forward)[:, None] @ rollout)[:, 0])

    def spread(self, scores: Tensor) -> Tensor:
        """Scores of tokens as scores of inputs."""
        if self.inputs.ndim != 4:
            return scores
        batch, channels, side, _ = self.inputs.shape
        patches = side // 4
        scores = scores[:, -(patches**2) :].view(batch, 1, patches, patches)
        scores = scores.repeat_interleave(4, 2).repeat_interleave(4, 3) / 16 / channels
        return scores.expand(-1, channels, -1, -1)

    def attribute(
        self, forward: Callable[..., Any] | None = None, **options: Any
    ) -> Tensor:
        """What the package says, for class 1."""
        globenc = GlobEnc(forward or self.forward)
        return globenc.attribute(self.inputs, 1, self.arguments, **options)

    def trial(
        self,
        forward: Callable[..., Any] | None = None,
        truth: Tensor | str | None = "of the run",
        **options: Any,
    ) -> Scores:
        """The package's scores against the truth of this very run."""
        if isinstance(truth, str):
            truth = self.truth(forward)
        return Scores(lambda: self.attribute(forward, **options), truth, self.dtype)


def subject(
    family: str,
    dtype: torch.dtype = DOUBLE,
    attention: str = "sdpa",
    lengths: tuple[int, ...] = LENGTHS,
) -> Subject:
    """A model of a family and padded inputs for it, the same on every call."""
    torch.manual_seed(0)
    if family in IMAGES:
        return _image_subject(family, dtype, attention)
    texts = [models.sentence(n, seed=row) for row, n in enumerate(lengths)]
    ids, mask = models.padded(texts)
    if family in TORCH:
        model: nn.Module = TorchClassifier(family == "torch-pre").to(dtype).eval()
        recipe = _TORCH_PRE if family == "torch-pre" else _TORCH_POST
        return Subject(family, model, model.stack, recipe, ids, mask, dtype)
    model = models.build(family, dtype, attention)
    encoder = models.encoder_of(family, model)
    recipe = models.FAMILIES[family].recipe
    return Subject(family, model, encoder, recipe, ids, mask, dtype)


def _image_subject(family: str, dtype: torch.dtype, attention: str) -> Subject:
    if family == "clip_vision_model":
        sizes = {k: v for k, v in _IMAGE_SIZES.items() if k != "num_labels"}
        config: Any = transformers.CLIPVisionConfig(**sizes, projection_dim=3)
        kind: Any = transformers.CLIPVisionModelWithProjection
    elif family == "vit":
        config = transformers.ViTConfig(**_IMAGE_SIZES)
        kind = transformers.ViTForImageClassification
    else:
        config = transformers.Dinov2Config(**_IMAGE_SIZES, mlp_ratio=2)
        kind = transformers.Dinov2ForImageClassification
    config._attn_implementation = attention
    model = models.randomize(kind(config)).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "cls_token" in name or "position" in name or "lambda" in name:
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.data = drawn.to(dtype)
    images = torch.randn(2, 3, 12, 12, generator=generator).to(dtype)
    encoder, recipe = {
        "vit": lambda: (model.vit, oracle.VIT),
        "dinov2": lambda: (model.dinov2, oracle.DINOV2),
        "clip_vision_model": lambda: (clip_encoder(model), _CLIP_VISION),
    }[family]()
    return Subject(family, model, encoder, recipe, images, None, dtype)


def clip_encoder(model: nn.Module) -> nn.Module:
    """The part of CLIP's vision tower that holds ``encoder.layers``."""
    return next(m for m in model.modules() if hasattr(m, "encoder"))


class TorchClassifier(nn.Module):
    """Embeddings, torch's own layers, and a head on the first token."""

    def __init__(self, norm_first: bool = False, **options: Any) -> None:
        super().__init__()
        self.tokens = nn.Embedding(models.VOCABULARY, HIDDEN)
        self.positions = nn.Embedding(40, HIDDEN)
        layer = nn.TransformerEncoderLayer(
            HIDDEN,
            HEADS,
            36,
            activation="gelu",
            norm_first=norm_first,
            batch_first=True,
            **options,
        )
        self.stack = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(HIDDEN, 3)
        models.randomize(self)
        generator = torch.Generator().manual_seed(2)
        for module in self.modules():
            if isinstance(module, nn.MultiheadAttention):
                for parameter in (module.in_proj_weight, module.in_proj_bias):
                    drawn = torch.randn(parameter.shape, generator=generator)
                    parameter.data = 0.3 * drawn

    def states(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The last hidden states."""
        states = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        hidden = None if mask is None else mask == 0
        return self.stack(states, src_key_padding_mask=hidden)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The logits."""
        return self.head(self.states(ids, attention_mask)[:, 0])


def embeddings_of(encoder: nn.Module) -> nn.Module:
    """The module whose output enters the first layer, or the table of tokens."""
    for name in ("embeddings", "embed_tokens", "wte"):
        if hasattr(encoder, name):
            return getattr(encoder, name)
    raise LookupError(type(encoder).__name__)


def deep(
    family: str, seed: int, dtype: torch.dtype, spread: float | None, layers: int = 12
) -> Subject:
    """A random model of many layers.

    Args:
        family (str): "bert", "roberta", "distilbert", "gpt2", "llama", ...
        seed (int): of its weights and its sentences.
        dtype (torch.dtype): the model's.
        spread (float or None): standard deviation of the weights, or None: norms and
            biases are random, too.
        layers (int, optional): how many. Default: 12.
    """
    described = models.FAMILIES[family]
    config = copy.deepcopy(described.config())
    config.initializer_range = spread or 0.02
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    setattr(config, name, layers)
    if hasattr(config, "layer_types"):
        config.layer_types = [config.layer_types[i % 3] for i in range(layers)]
    config._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    model = described.head(config)
    if spread is None:
        models.randomize(model, seed)
    model = model.to(dtype).eval()
    ids, mask = models.padded([models.sentence(n, seed=seed + n) for n in (12, 7)])
    encoder = models.encoder_of(family, model)
    return Subject(family, model, encoder, described.recipe, ids, mask, dtype)
