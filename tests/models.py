"""Tiny random models of every supported family, with LayerNorms that do something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as t
from torch import Tensor, nn

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


@dataclass(frozen=True)
class Family:
    """How to build a family's model and where an oracle finds its weights."""

    config: Callable[[], t.PretrainedConfig]
    head: type[nn.Module]
    encoder: str
    paths: dict[str, str]


FAMILIES = {
    "bert": Family(
        lambda: t.BertConfig(**SIZES),
        t.BertForSequenceClassification,
        "bert",
        oracle.BERT_LIKE,
    ),
    "roberta": Family(
        lambda: t.RobertaConfig(**SIZES),
        t.RobertaForSequenceClassification,
        "roberta",
        oracle.BERT_LIKE,
    ),
    "xlm-roberta": Family(
        lambda: t.XLMRobertaConfig(**SIZES),
        t.XLMRobertaForSequenceClassification,
        "roberta",
        oracle.BERT_LIKE,
    ),
    "electra": Family(
        # An embedding size of its own: ELECTRA then has a projection in between.
        lambda: t.ElectraConfig(**SIZES, embedding_size=16),
        t.ElectraForSequenceClassification,
        "electra",
        oracle.BERT_LIKE,
    ),
    "camembert": Family(
        lambda: t.CamembertConfig(**SIZES),
        t.CamembertForSequenceClassification,
        "roberta",
        oracle.BERT_LIKE,
    ),
    "data2vec-text": Family(
        lambda: t.Data2VecTextConfig(**SIZES),
        t.Data2VecTextForSequenceClassification,
        "data2vec_text",
        oracle.BERT_LIKE,
    ),
    "ernie": Family(
        lambda: t.ErnieConfig(**SIZES),
        t.ErnieForSequenceClassification,
        "ernie",
        oracle.BERT_LIKE,
    ),
    "xlm-roberta-xl": Family(
        lambda: t.XLMRobertaXLConfig(**SIZES),
        t.XLMRobertaXLForSequenceClassification,
        "roberta",
        oracle.XLM_ROBERTA_XL,
    ),
    "roberta-prelayernorm": Family(
        lambda: t.RobertaPreLayerNormConfig(**SIZES),
        t.RobertaPreLayerNormForSequenceClassification,
        "roberta_prelayernorm",
        oracle.ROBERTA_PRELAYERNORM,
    ),
    "esm": Family(
        # A table of positions: what the oracle does not know is rotation.
        lambda: t.EsmConfig(
            **{k: v for k, v in SIZES.items() if k != "type_vocab_size"},
            mask_token_id=3,
            token_dropout=False,
            position_embedding_type="absolute",
        ),
        t.EsmForSequenceClassification,
        "esm",
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
        "distilbert",
        oracle.DISTILBERT,
    ),
}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of a size at which every part matters; norms neither 1 nor 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: torch.Size) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.copy_(1 + 0.4 * draw(module.weight.shape))
                module.bias.copy_(0.3 * draw(module.bias.shape))
            elif isinstance(module, nn.Linear):
                module.weight.copy_(draw(module.weight.shape) * 0.3)
                if module.bias is not None:
                    module.bias.copy_(0.2 * draw(module.bias.shape))
            elif isinstance(module, nn.Embedding):
                module.weight.copy_(draw(module.weight.shape))
    return model


def build(
    family: str,
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
    head: type[nn.Module] | None = None,
) -> nn.Module:
    """A random model of the family, in evaluation mode."""
    described = FAMILIES[family]
    config = described.config()
    config._attn_implementation = attention
    if head is t.BertForQuestionAnswering:
        config.num_labels = 2  # start and end
    return randomize((head or described.head)(config)).to(dtype).eval()


def encoder_of(family: str, model: nn.Module) -> nn.Module:
    return model.get_submodule(FAMILIES[family].encoder)


def numbers_positions_from_padding(family: str) -> bool:
    """As RoBERTa does: the first position is the one after the padding's."""
    model = build(family)
    table = encoder_of(family, model).get_submodule("embeddings.position_embeddings")
    return table.padding_idx is not None


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
