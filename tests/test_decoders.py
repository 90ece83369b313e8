"""Decoders as classifiers: the last attended token, wherever the padding is."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from torch import Tensor

from captum_globenc import GlobEnc
from captum_globenc.errors import InputError, UnsupportedModelError
from tests import oracle
from tests.models import FAMILIES, PAD, build, encoder_of, sentence

DECODERS = [f for f in ("gpt2", "llama", "mistral", "qwen2", "qwen3") if f in FAMILIES]
LENGTHS = (8, 5)


def left_padded() -> tuple[Tensor, Tensor, list[Tensor]]:
    sentences = [sentence(n, seed=n) for n in LENGTHS]
    ids = torch.full((2, 9), PAD)
    mask = torch.zeros(2, 9, dtype=torch.long)
    for row, example in enumerate(sentences):
        ids[row, -len(example) :] = example
        mask[row, -len(example) :] = 1
    return ids, mask, sentences


@pytest.mark.parametrize("family", DECODERS)
def test_left_padding(family: str) -> None:
    """Each row equals the oracle's scores of its sentence, from its last token."""
    model = build(family)
    ids, mask, sentences = left_padded()
    # Positions count from the first attended token, as generation has them.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def forward(ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        return model(ids, attention_mask=mask, position_ids=positions).logits

    scores = GlobEnc(forward).attribute(ids, 1, (mask, positions))
    for row, example in enumerate(sentences):
        encoder = encoder_of(family, model)
        layers = oracle.run_encoder(encoder, FAMILIES[family].recipe, example)
        local = [oracle.local_score(layer, "N_ENC") for layer in layers]
        expected = oracle.rollout(local)[-1]
        n = len(example)
        torch.testing.assert_close(scores[row, -n:], expected, rtol=1e-9, atol=1e-14)
        assert not scores[row, :-n].any()


@pytest.mark.parametrize("family", DECODERS)
def test_embeddings_with_padding(family: str) -> None:
    """Without ids such a model reads the last token: padding, if it is on the right."""
    model = build(family)
    embeddings = model.get_input_embeddings()

    def forward(vectors: Tensor, mask: Tensor) -> Tensor:
        return model(inputs_embeds=vectors, attention_mask=mask).logits

    example = sentence(6)[None]
    padded = torch.cat([example, torch.full((1, 2), PAD)], dim=1)
    mask = (padded != PAD).long()
    with pytest.raises(InputError, match="padding: pad on the other side, or pass"):
        GlobEnc(forward).attribute(embeddings(padded), 1, mask)
    found = GlobEnc(forward).attribute(embeddings(padded), 1, mask, token_index=5)
    expected = GlobEnc(model).attribute(example, 1)
    # Scores of embeddings are spread over the hidden dimension.
    torch.testing.assert_close(found.sum(-1)[:, :6], expected)
    assert not found[:, 6:].any()


@pytest.mark.parametrize("family", DECODERS)
def test_no_token_takes_from_later_ones(family: str) -> None:
    ids, mask, _ = left_padded()
    local = GlobEnc(build(family)).decompose(ids, (mask,)).local
    assert not local.triu(1).any()


@pytest.mark.parametrize("kind", ["Bart", "MBart"])
def test_a_decoder_that_reads_the_tokens_too(kind: str) -> None:
    """Its classifier reads the decoder; the encoder is explained for a token."""
    config = getattr(t, f"{kind}Config")(
        vocab_size=97,
        d_model=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=36,
        decoder_ffn_dim=36,
        max_position_embeddings=40,
        num_labels=3,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    model = getattr(t, f"{kind}ForSequenceClassification")(config).double().eval()
    ids = torch.tensor([[0, 5, 6, 7, 2]])
    with pytest.raises(UnsupportedModelError, match="tokens by themselves"):
        GlobEnc(model).attribute(ids, 1)
    scores = GlobEnc(model).attribute(ids, 1, token_index="mean")
    rollout = GlobEnc(model).decompose(ids).rollout()
    torch.testing.assert_close(scores, rollout.mean(1), rtol=1e-12, atol=0)
