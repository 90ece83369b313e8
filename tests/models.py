"""Tiny random models of every supported family, with LayerNorms that do something."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import transformers as t
from packaging.version import Version
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from tests import oracle

VOCABULARY = 97
PAD, BOS, EOS = 1, 0, 2
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 36,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
    "pad_token_id": PAD,
    "num_labels": 3,
}


def first(ids: Tensor) -> Tensor:
    """The weight of each token of a sentence in what the head reads."""
    return one(ids, 0)


def last(ids: Tensor) -> Tensor:
    return one(ids, len(ids) - 1)


def mean(ids: Tensor) -> Tensor:
    return torch.full((len(ids),), 1 / len(ids), dtype=torch.float64)


def largest(ids: Tensor) -> Tensor:
    return one(ids, int(ids.argmax()))


def one(ids: Tensor, index: int) -> Tensor:
    return nn.functional.one_hot(torch.tensor(index), len(ids)).double()


class PooledT5(nn.Module):
    """A T5 encoder with a head that reads the mean of the tokens."""

    def __init__(self, config: t.T5Config) -> None:
        super().__init__()
        self.config = config
        self.t5 = t.T5EncoderModel(config)
        self.head = nn.Linear(config.d_model, config.num_labels)

    def forward(
        self, ids: Tensor | None = None, attention_mask=None, inputs_embeds=None
    ) -> SequenceClassifierOutput:
        states = self.t5(ids, attention_mask, inputs_embeds=inputs_embeds)[0]
        mask = (
            torch.ones(states.shape[:2]) if attention_mask is None else attention_mask
        )
        mask = mask[..., None].to(states)
        pooled = (states * mask).sum(1) / mask.sum(1)
        return SequenceClassifierOutput(logits=self.head(pooled))

    def get_input_embeddings(self) -> nn.Module:
        return self.t5.get_input_embeddings()


class PooledSiglip(nn.Module):
    """SigLIP's text tower with a head that reads the last token.

    Its own head reads the last position, which in a padded batch would be padding.
    """

    def __init__(self, config: t.SiglipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.tower = t.SiglipTextModel(config)
        self.head = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, ids: Tensor, attention_mask=None) -> SequenceClassifierOutput:
        states = self.tower(ids, attention_mask).last_hidden_state
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        pooled = states[torch.arange(len(ids)), mask.sum(-1).long() - 1]
        return SequenceClassifierOutput(logits=self.head(pooled))

    def get_input_embeddings(self) -> nn.Module:
        return self.tower.get_input_embeddings()


class FirstOfBart(nn.Module):
    """The encoder of BART or mBART with a head that reads the first token."""

    def __init__(self, config: t.BartConfig | t.MBartConfig) -> None:
        super().__init__()
        self.config = config
        if config.model_type == "bart":
            self.encoder = t.models.bart.modeling_bart.BartEncoder(config)
        else:
            self.encoder = t.models.mbart.modeling_mbart.MBartEncoder(config)
        self.head = nn.Linear(config.d_model, config.num_labels)

    def forward(
        self, ids: Tensor | None = None, attention_mask=None, inputs_embeds=None
    ) -> SequenceClassifierOutput:
        states = self.encoder(ids, attention_mask, inputs_embeds=inputs_embeds)[0]
        return SequenceClassifierOutput(logits=self.head(states[:, 0]))

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()


def mask_second(head: type[nn.Module]) -> type[nn.Module]:
    """The same head, whose second argument is the attention mask as others have it."""

    class Head(head):
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            return super().forward(input_ids, attention_mask=attention_mask, **kwargs)

    return Head


@dataclass(frozen=True)
class Family:
    """How to build a family's model and where an oracle finds its weights."""

    config: Callable[[], t.PretrainedConfig]
    head: type[nn.Module]
    # Of these the first that is there: releases of transformers differ.
    encoder: tuple[str, ...]
    recipe: oracle.Recipe
    reads: Callable[[Tensor], Tensor] = first
    since: str = "5.0"
    # Whether inputs_embeds give what ids give: in "padded" batches, for "whole" ones
    # only, because the model looks for padding in ids, or "never".
    embeddings: str = "padded"


def bert_like(kind: str, encoder: str, **options: object) -> Family:
    return Family(
        lambda: getattr(t, f"{kind}Config")(**{**SIZES, **options}),
        getattr(t, f"{kind}ForSequenceClassification"),
        (encoder,),
        oracle.BERT_LIKE,
    )


def decoder(kind: str, recipe: oracle.Recipe, **options: object) -> Family:
    sizes = {k: v for k, v in SIZES.items() if k != "type_vocab_size"}
    return Family(
        lambda: getattr(t, f"{kind}Config")(
            **{**sizes, "num_key_value_heads": 2, **options}
        ),
        getattr(t, f"{kind}ForSequenceClassification"),
        ("model",),
        recipe,
        last,
        embeddings="whole",
    )


def bart_like(kind: str, recipe: oracle.Recipe, **options: object) -> Family:
    sizes = {
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in (("layers", 3), ("attention_heads", 4), ("ffn_dim", 36))
    }
    return Family(
        lambda: getattr(t, f"{kind}Config")(
            vocab_size=VOCABULARY,
            d_model=24,
            max_position_embeddings=40,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            num_labels=3,
            **sizes,
            **options,
        ),
        FirstOfBart,
        ("encoder",),
        recipe,
    )


_ALL = {
    "bert": bert_like("Bert", "bert"),
    "roberta": bert_like("Roberta", "roberta"),
    "xlm-roberta": bert_like("XLMRoberta", "roberta"),
    # An embedding size of its own: ELECTRA then has a projection in between.
    "electra": bert_like("Electra", "electra", embedding_size=16),
    "camembert": bert_like("Camembert", "roberta"),
    "data2vec-text": bert_like("Data2VecText", "data2vec_text"),
    "ernie": bert_like("Ernie", "ernie"),
    "layoutlm": replace(
        bert_like("LayoutLM", "layoutlm"),
        head=mask_second(t.LayoutLMForSequenceClassification),
    ),
    # Spans shorter than sentences, so that distances are cut off.
    "deberta": replace(
        bert_like(
            "Deberta",
            "deberta",
            relative_attention=True,
            max_relative_positions=4,
            pos_att_type=["c2p", "p2c"],
            position_biased_input=False,
            type_vocab_size=0,
        ),
        recipe=oracle.DEBERTA,
    ),
    # As DeBERTa-v3 is.
    "deberta-v2": replace(
        bert_like(
            "DebertaV2",
            "deberta",
            relative_attention=True,
            max_relative_positions=8,
            position_buckets=6,
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            pos_att_type=["p2c", "c2p"],
            position_biased_input=False,
            type_vocab_size=0,
        ),
        recipe=oracle.DEBERTA_V2,
    ),
    "mpnet": replace(bert_like("MPNet", "mpnet"), recipe=oracle.MPNET),
    "roformer": replace(
        bert_like("RoFormer", "roformer", embedding_size=16), recipe=oracle.ROFORMER
    ),
    # With blocks its attention is no matrix over all tokens.
    "big_bird": bert_like(
        "BigBird", "bert", attention_type="original_full", hidden_act="gelu"
    ),
    "xlnet": Family(
        # By default the last token is read, and padding is on the left.
        lambda: t.XLNetConfig(
            vocab_size=VOCABULARY,
            d_model=24,
            n_layer=3,
            n_head=4,
            d_inner=36,
            summary_type="first",
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            num_labels=3,
        ),
        t.XLNetForSequenceClassification,
        ("transformer",),
        oracle.XLNET,
    ),
    "bart": bart_like("Bart", oracle.BART),
    "mbart": bart_like("MBart", oracle.MBART, scale_embedding=True),
    "albert": replace(
        bert_like("Albert", "albert", embedding_size=16, hidden_act="gelu"),
        recipe=oracle.ALBERT,
    ),
    "xlm-roberta-xl": replace(
        bert_like("XLMRobertaXL", "roberta"), recipe=oracle.XLM_ROBERTA_XL
    ),
    "roberta-prelayernorm": replace(
        bert_like("RobertaPreLayerNorm", "roberta_prelayernorm"),
        recipe=oracle.ROBERTA_PRELAYERNORM,
    ),
    "esm": Family(
        lambda: t.EsmConfig(
            **{k: v for k, v in SIZES.items() if k != "type_vocab_size"},
            mask_token_id=3,
            token_dropout=False,
            position_embedding_type="absolute",
        ),
        t.EsmForSequenceClassification,
        ("esm",),
        oracle.ESM,
    ),
    "distilbert": Family(
        lambda: t.DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=24,
            n_layers=3,
            n_heads=4,
            hidden_dim=36,
            max_position_embeddings=40,
            pad_token_id=PAD,
            num_labels=3,
        ),
        t.DistilBertForSequenceClassification,
        ("distilbert",),
        oracle.DISTILBERT,
    ),
    "modernbert": Family(
        lambda: t.ModernBertConfig(
            **{k: v for k, v in SIZES.items() if k != "type_vocab_size"},
            local_attention=4,
            bos_token_id=BOS,
            eos_token_id=EOS,
            cls_token_id=BOS,
            sep_token_id=EOS,
        ),
        t.ModernBertForSequenceClassification,
        ("model",),
        oracle.MODERNBERT,
        since="5.1",
    ),
    "eurobert": replace(
        decoder("EuroBert", oracle.EUROBERT, classifier_pooling="mean")
        if hasattr(t, "EuroBertConfig")
        else Family(t.BertConfig, nn.Module, (), oracle.EUROBERT),
        reads=mean,
        since="5.3",
        embeddings="padded",
    ),
    "nomic_bert": replace(
        Family(
            lambda: t.NomicBertConfig(**SIZES),
            getattr(t, "NomicBertForSequenceClassification", nn.Module),
            ("nomic_bert",),
            oracle.NOMIC_BERT,
        ),
        since="5.5",
    ),
    "gpt2": Family(
        lambda: t.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=24,
            n_layer=3,
            n_head=4,
            n_inner=36,
            n_positions=40,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            num_labels=3,
        ),
        mask_second(t.GPT2ForSequenceClassification),
        ("transformer",),
        oracle.GPT2,
        last,
        embeddings="whole",
    ),
    "llama": decoder("Llama", oracle.LLAMA),
    "mistral": decoder("Mistral", oracle.LLAMA, sliding_window=100),
    "qwen2": decoder("Qwen2", oracle.LLAMA),
    "qwen3": decoder("Qwen3", oracle.QWEN3, head_dim=6),
    "t5": Family(
        lambda: t.T5Config(
            vocab_size=VOCABULARY,
            d_model=24,
            d_kv=6,
            d_ff=36,
            num_layers=3,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=7,
            feed_forward_proj="gated-gelu",
            pad_token_id=PAD,
            num_labels=3,
        ),
        PooledT5,
        ("t5.encoder",),
        oracle.T5,
        mean,
        since="5.15",
    ),
    "clip_text_model": Family(
        # The end of a text is where its largest id is.
        lambda: t.CLIPTextConfig(
            **{k: v for k, v in SIZES.items() if k != "type_vocab_size"},
            hidden_act="gelu",
            projection_dim=3,
            eos_token_id=2,
        ),
        t.CLIPTextModelWithProjection,
        ("text_model.encoder", "text_model"),
        oracle.CLIP_TEXT,
        largest,
        embeddings="never",
    ),
    "siglip_text_model": Family(
        lambda: t.SiglipTextConfig(
            **{k: v for k, v in SIZES.items() if k != "type_vocab_size"},
        ),
        PooledSiglip,
        ("tower.text_model", "tower"),
        oracle.SIGLIP_TEXT,
        last,
        embeddings="never",
    ),
}
# Families that the installed release of transformers routes so that it can be recorded.
FAMILIES = {
    name: family
    for name, family in _ALL.items()
    if Version(t.__version__) >= Version(family.since)
}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of a size at which every part matters; norms neither 1 nor 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for module in model.modules():
            kind = type(module).__name__
            if "Norm" in kind and getattr(module, "weight", None) is not None:
                module.weight.copy_(1 + 0.4 * draw(module.weight.shape))
                if getattr(module, "bias", None) is not None:
                    module.bias.copy_(0.3 * draw(module.bias.shape))
            elif isinstance(module, nn.Linear) or kind == "Conv1D":
                module.weight.copy_(draw(module.weight.shape) * 0.3)
                if module.bias is not None:
                    module.bias.copy_(0.2 * draw(module.bias.shape))
            elif isinstance(module, nn.Embedding) and "Sinusoidal" not in kind:
                module.weight.copy_(draw(module.weight.shape))
            elif kind in ("DisentangledSelfAttention", "XLNetRelativeAttention"):
                for parameter in module.parameters(recurse=False):
                    parameter.copy_(draw(parameter.shape) * 0.3)
    return model


def in_own_dtype(model: nn.Module) -> nn.Module:
    """Rounding out of the way: some norms and rotations compute in float32 by default.

    Transformers has them do so whatever the model's dtype is, and a comparison in
    float64 would find that.
    """
    for module in model.modules():
        kind = type(module).__name__
        if "RMSNorm" in kind or "T5LayerNorm" in kind:
            module.forward = functools.partial(_rms_norm, module)
        elif "Rotary" in kind:
            module.forward = functools.partial(_rotary, module)
        elif kind == "DebertaLayerNorm":
            module.forward = functools.partial(_layer_norm, module)
        elif kind == "RoFormerSinusoidalPositionalEmbedding":
            positions = torch.arange(len(module.weight)).double()
            module.weight.data = _waves(positions, module.weight.shape[1])
        elif kind == "XLNetModel":
            module.relative_positional_encoding = functools.partial(_relative, module)
    return model


def _layer_norm(module: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.layer_norm(
        x, x.shape[-1:], module.weight, module.bias, module.variance_epsilon
    )


def _waves(positions: Tensor, size: int) -> Tensor:
    """Sines and, behind them, cosines, (positions, size)."""
    frequencies = 10_000 ** (-torch.arange(0, size, 2).double() / size)
    angles = positions[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)


def _relative(
    module: nn.Module, queries: int, keys: int, bsz: int, **_: torch.device
) -> Tensor:
    waves = _waves(torch.arange(keys, -queries, -1).double(), module.d_model)
    return waves[:, None].expand(-1, bsz, -1).to(module.word_embedding.weight)


def _rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    scale = (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
    return module.weight * x * scale


def _rotary(
    module: nn.Module, x: Tensor, position_ids: Tensor, *kind: str
) -> tuple[Tensor, Tensor]:
    frequencies = getattr(module, "_".join([*kind, "inv_freq"])).double()
    size = 2 * len(frequencies)
    # From the base, because the frequencies themselves are in float32.
    base = (frequencies[1] ** (-size / 2) / 1000).round() * 1000
    powers = base ** (-torch.arange(0, size, 2).double() / size)
    angles = position_ids[..., None].double() * powers
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(x), angles.sin().to(x)


def _turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    return turn(q), turn(k)


# ModernBERT also rotates in float32.
t.models.modernbert.modeling_modernbert.apply_rotary_pos_emb = _turned


def _root(query_layer: Tensor, scale_factor: int) -> Tensor:
    return torch.tensor(query_layer.shape[-1] * scale_factor).double().sqrt()


# DeBERTa takes the root that it divides by in float32.
t.models.deberta.modeling_deberta.scaled_size_sqrt = _root
t.models.deberta_v2.modeling_deberta_v2.scaled_size_sqrt = _root


def build(
    family: str,
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
    head: type[nn.Module] | None = None,
) -> nn.Module:
    """A random model of the family, in evaluation mode."""
    described = FAMILIES[family]
    config = described.config()
    kind = head or described.head
    # LayoutLM had no sdpa in older releases of transformers.
    known = getattr(kind, "_supports_sdpa", True)
    config._attn_implementation = attention if known else "eager"
    if head is t.BertForQuestionAnswering:
        config.num_labels = 2  # start and end
    model = randomize(kind(config)).to(dtype).eval()
    return in_own_dtype(model) if dtype == torch.float64 else model


def encoder_of(family: str, model: nn.Module) -> nn.Module:
    """The module that holds the layers and runs them."""
    described = FAMILIES[family]
    start = described.recipe.layers.split(".")[0]
    for path in described.encoder:
        try:
            encoder = model.get_submodule(path)
        except AttributeError:
            continue
        if hasattr(encoder, start):
            return encoder
    raise LookupError(family)


def position_table(family: str) -> nn.Embedding | None:
    encoder = encoder_of(family, build(family))
    tables = [
        module
        for name, module in encoder.named_modules()
        if name.endswith(
            ("position_embeddings", "position_embedding", "wpe", "embed_positions")
        )
    ]
    return tables[0] if tables else None


def takes_padded_embeddings(family: str) -> bool:
    padded = FAMILIES[family].embeddings == "padded"
    return padded and not numbers_positions_from_padding(family)


def numbers_positions_from_padding(family: str) -> bool:
    """As RoBERTa does: the first position is the one after the padding's."""
    table = position_table(family)
    return table is not None and table.padding_idx is not None


def within(model: nn.Module, limit: dict[str, float]) -> dict[str, float]:
    """A limit, or that of eager attention, whose softmax is always in float32.

    LayoutLM had no sdpa in older releases of transformers.
    """
    has_sdpa = getattr(model, "_supports_sdpa", True)
    return limit if has_sdpa else {"rtol": 1e-4, "atol": 1e-6}


def sentence(tokens: int, seed: int = 0) -> Tensor:
    """Ids of one example, (tokens), without padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (tokens,), generator=generator)
    ids[0], ids[-1] = BOS, EOS
    return ids


def padded(sentences: list[Tensor], extra: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (batch, tokens), padded on the right."""
    width = max(len(s) for s in sentences) + extra
    ids = torch.full((len(sentences), width), PAD)
    mask = torch.zeros(len(sentences), width, dtype=torch.long)
    for row, example in enumerate(sentences):
        ids[row, : len(example)] = example
        mask[row, : len(example)] = 1
    return ids, mask
