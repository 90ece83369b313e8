"""What heads read, against the gradient of what they return.

The gradient of the output with respect to the last hidden states says which tokens the
head reads, whatever it does. Where a head is explained, it must be from these tokens;
where it is not recognised, the answer is an error and no number.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as t
from torch import Tensor, nn

from captum_globenc import GlobEnc, InputError, UnsupportedModelError
from tests.models import SIZES, build, padded, randomize, sentence

HIDDEN = 24
TOKENS = 7
Head = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Parts(nn.Module):
    """An encoder and maps that a head may be made of."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = t.BertModel(t.BertConfig(**SIZES))
        self.classify = nn.Linear(HIDDEN, 3)
        self.classify_two = nn.Linear(2 * HIDDEN, 3)
        self.down = nn.Linear(HIDDEN, 8)
        self.classify_small = nn.Linear(8, 3)
        self.norm = nn.LayerNorm(HIDDEN)
        self.lstm = nn.LSTM(HIDDEN, HIDDEN, batch_first=True)
        self.convolution = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1)
        self.attention = nn.MultiheadAttention(HIDDEN, 4, batch_first=True)


RECOGNISED: dict[str, Head] = {
    "first": lambda m, h, p: m.classify(h[:, 0]),
    "fourth": lambda m, h, p: m.classify(h[:, 3]),
    "last": lambda m, h, p: m.classify(h[:, -1]),
    "normed first": lambda m, h, p: m.classify(m.norm(h)[:, 0]),
    "pooled": lambda m, h, p: m.classify(p),
    "softmax": lambda m, h, p: m.classify(h[:, 2]).softmax(-1),
    "mean": lambda m, h, p: m.classify(h.mean(1)),
    "mean of logits": lambda m, h, p: m.classify(h).mean(1),
    "mean of what is projected": lambda m, h, p: m.classify_small(m.down(h).mean(1)),
    "first and fourth": lambda m, h, p: m.classify_two(
        torch.cat([h[:, 0], h[:, 3]], 1)
    ),
    "pooled and mean": lambda m, h, p: m.classify_two(torch.cat([p, h.mean(1)], 1)),
    "logits of the fourth": lambda m, h, p: m.classify(h)[:, 3],
    "their softmax": lambda m, h, p: m.classify(h)[:, 3].softmax(-1),
    "softmax, then the fourth": lambda m, h, p: m.classify(h).softmax(-1)[:, 3],
    "one logit of the fourth": lambda m, h, p: m.classify(h)[:, 3, 1],
    "one logit": lambda m, h, p: m.classify(h[:, 2])[:, 1],
}
REFUSED: dict[str, Head] = {
    "maximum": lambda m, h, p: m.classify(h.max(1).values),
    "maximum of logits": lambda m, h, p: m.classify(h).max(1).values,
    "sum": lambda m, h, p: m.classify(h.sum(1)),
    "sum of logits": lambda m, h, p: m.classify(h).sum(1),
    "mean without the first": lambda m, h, p: m.classify(h[:, 1:].mean(1)),
    "first and maximum": lambda m, h, p: m.classify_two(
        torch.cat([h[:, 0], h.max(1).values], 1)
    ),
    "pooled beside something": lambda m, h, p: m.classify(h.max(1).values + p),
    "no module": lambda m, h, p: h.mean(1) @ m.classify.weight.T,
    "no module, fourth": lambda m, h, p: h[:, 3] @ m.classify.weight.T,
    "similarity": lambda m, h, p: nn.functional.cosine_similarity(
        h.mean(1), torch.ones_like(p)
    ),
    "difference of logits": lambda m, h, p: (
        m.classify(h)[:, 3, 1] - m.classify(h)[:, 3, 0]
    ),
    "LSTM": lambda m, h, p: m.classify(m.lstm(h)[0])[:, -1],
    "convolution": lambda m, h, p: m.classify(m.convolution(h.mT).mT)[:, 3],
    "attention": lambda m, h, p: m.classify(m.attention(h, h, h)[0])[:, 3],
}


@pytest.fixture(scope="module")
def parts() -> Parts:
    torch.manual_seed(0)
    return randomize(Parts()).double().eval()


def forward(parts: Parts, head: Head) -> Callable[[Tensor], Tensor]:
    def run(ids: Tensor) -> Tensor:
        output = parts.bert(ids)
        return head(parts, output.last_hidden_state, output.pooler_output)

    return run


def read_by_gradient(parts: Parts, head: Head, ids: Tensor) -> Tensor:
    """(batch, tokens), whether the output changes with the token's last state."""
    states = parts.bert(ids).last_hidden_state.detach().requires_grad_()
    output = head(parts, states, parts.bert.pooler(states))
    chosen = output[:, 1] if output.ndim == 2 else output
    (gradient,) = torch.autograd.grad(chosen.sum(), states)
    return gradient.abs().sum(-1) > 1e-12


@pytest.mark.parametrize("head", RECOGNISED.values(), ids=RECOGNISED)
def test_what_is_read(parts, head) -> None:
    ids = torch.stack([sentence(TOKENS), sentence(TOKENS, seed=1)])
    run = forward(parts, head)
    output = run(ids)
    scores = GlobEnc(run).attribute(ids, 1 if output.ndim == 2 else None)
    read = read_by_gradient(parts, head, ids)
    rollout = GlobEnc(parts.bert).decompose(ids).rollout()
    if head is RECOGNISED["pooled and mean"]:
        weights = (torch.eye(TOKENS).double()[0] + 1 / TOKENS) / 2
        weights = weights.expand(2, -1)
    else:
        weights = read.double() / read.sum(-1, keepdim=True)
    expected = (weights[:, None] @ rollout)[:, 0]
    torch.testing.assert_close(scores, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("head", REFUSED.values(), ids=REFUSED)
def test_what_is_read_and_not_recognised(parts, head) -> None:
    ids = torch.stack([sentence(TOKENS), sentence(TOKENS, seed=1)])
    run = forward(parts, head)
    target = 1 if run(ids).ndim == 2 else None
    with pytest.raises(UnsupportedModelError, match="pass token_index"):
        GlobEnc(run).attribute(ids, target)
    assert (GlobEnc(run).attribute(ids, target, token_index=2) > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spread", [0.0, 15.0])
def test_in_half_precision_no_other_vector_passes_for_the_mean(dtype, spread) -> None:
    """Also where one dimension is far larger than the others, as in trained models."""
    torch.manual_seed(0)
    parts = randomize(Parts())
    with torch.no_grad():
        parts.bert.encoder.layer[-1].output.LayerNorm.bias[5] += spread
    parts = parts.to(dtype).eval()
    ids = torch.stack([sentence(30), sentence(30, seed=1)])
    mask = torch.ones_like(ids)

    def masked(m: nn.Module, h: Tensor, p: Tensor) -> Tensor:
        kept = mask[..., None].to(h.dtype)
        return m.classify((h * kept).sum(1) / kept.sum(1))

    expected = GlobEnc(parts.bert).attribute(ids, token_index="mean")
    for head in (RECOGNISED["mean"], masked):
        torch.testing.assert_close(
            GlobEnc(forward(parts, head)).attribute(ids, 1), expected
        )
    ramp = torch.linspace(0.5, 1.5, 30).to(dtype)[:, None] / 30
    others: list[Head] = [
        REFUSED["maximum"],
        REFUSED["mean without the first"],
        lambda m, h, p: m.classify(h[:, :15].mean(1)),
        lambda m, h, p: m.classify((ramp * h).sum(1)),
    ]
    for head in others:
        with pytest.raises(UnsupportedModelError, match="pass token_index"):
            GlobEnc(forward(parts, head)).attribute(ids, 1)


def test_a_decoder_after_the_encoder_is_no_head() -> None:
    torch.manual_seed(0)
    model = randomize(nn.Transformer(HIDDEN, 4, 2, 2, 36, batch_first=True)).double()
    # What runs after the encoder may use dropout.
    assert model.training
    states = torch.randn(2, TOKENS, HIDDEN, dtype=torch.float64)
    with pytest.raises(UnsupportedModelError, match="mixes tokens after it"):
        GlobEnc(lambda x: model(x, x)).attribute(states, (0, 1))


@pytest.mark.parametrize("family", ["bert", "distilbert", "xlm-roberta-xl"])
def test_a_first_token_that_is_padding(family: str) -> None:
    ids, mask = padded([sentence(8), sentence(5)])
    ids, mask = ids.flip(1), mask.flip(1)
    with pytest.raises(InputError, match="token 0 of example 1, which is padding"):
        GlobEnc(build(family)).attribute(ids, 1, (mask,))


@pytest.mark.parametrize("family", ["gpt2", "layoutlm"])
def test_a_mask_in_another_ones_place(family: str) -> None:
    head = {"gpt2": t.GPT2ForSequenceClassification}.get(
        family, t.LayoutLMForSequenceClassification
    )
    model = build(family, head=head)
    ids, mask = padded([sentence(8), sentence(5)])
    with pytest.raises(InputError, match="and not the attention mask"):
        GlobEnc(model).attribute(ids, 1, (mask,))


def test_both_towers_of_siglip() -> None:
    small = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 36,
    }
    texts = {**small, "vocab_size": 97, "max_position_embeddings": TOKENS}
    images = {**small, "image_size": 32, "patch_size": 8}
    model = randomize(
        t.SiglipModel(t.SiglipConfig(text_config=texts, vision_config=images))
    ).eval()
    ids = torch.stack([sentence(TOKENS), sentence(TOKENS, seed=1)])
    pixels = torch.randn(2, 3, 32, 32)
    seen = GlobEnc(
        lambda x: model(input_ids=ids, pixel_values=x).logits_per_image,
        encoder=model.vision_model,
    ).attribute(pixels, 1)
    expected = GlobEnc(model.vision_model).attribute(pixels, token_index="mean")
    torch.testing.assert_close(seen, expected)
    read = GlobEnc(
        lambda x: model(input_ids=x, pixel_values=pixels).logits_per_text,
        encoder=model.text_model,
    ).attribute(ids, 1)
    expected = GlobEnc(model.text_model).attribute(ids, token_index=TOKENS - 1)
    torch.testing.assert_close(read, expected)
