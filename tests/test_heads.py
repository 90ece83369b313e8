"""What heads read, against the gradient of what they return.

The gradient of the output with respect to the last hidden states says how much the head
reads of each token, whatever it does. Here it is taken by hand, with the head run on
the states alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import transformers as t
from packaging.version import Version
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


HEADS: dict[str, Head] = {
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


def shares_by_hand(parts: Parts, head: Head, ids: Tensor, target: int) -> Tensor:
    """(batch, tokens): each token's part of the gradient's norms."""
    shares = []
    for example in ids:
        states = parts.bert(example[None]).last_hidden_state.detach().requires_grad_()
        output = head(parts, states, parts.bert.pooler(states))
        chosen = output[0, target] if output.ndim == 2 else output[0]
        (gradient,) = torch.autograd.grad(chosen, states)
        norms = [float((row**2).sum().sqrt()) for row in gradient[0]]
        shares.append([norm / sum(norms) for norm in norms])
    return torch.tensor(shares, dtype=torch.float64)


@pytest.mark.parametrize("target", [0, 2])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_what_is_read(parts, head, target) -> None:
    ids = torch.stack([sentence(TOKENS), sentence(TOKENS, seed=1)])
    run = forward(parts, head)
    output = run(ids)
    scores = GlobEnc(run).attribute(ids, target if output.ndim == 2 else None)
    rollout = GlobEnc(parts.bert).decompose(ids).rollout()
    weights = shares_by_hand(parts, head, ids, target)
    expected = (weights[:, None] @ rollout)[:, 0]
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=0)
    told = GlobEnc(run).attribute(ids, 1 if output.ndim == 2 else None, token_index=2)
    torch.testing.assert_close(told, rollout[:, 2], rtol=1e-12, atol=0)


HOW_THE_CLOSURE_RUNS: dict[str, Callable[[], object]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "nothing": nullcontext,
}


@pytest.mark.parametrize("outer", HOW_THE_CLOSURE_RUNS)
@pytest.mark.parametrize("inner", HOW_THE_CLOSURE_RUNS)
@pytest.mark.parametrize("head_mode", HOW_THE_CLOSURE_RUNS)
def test_grad_modes_of_callers_and_closures(parts, outer, inner, head_mode) -> None:
    ids = torch.stack([sentence(TOKENS), sentence(TOKENS, seed=1)])

    def run(ids: Tensor) -> Tensor:
        with HOW_THE_CLOSURE_RUNS[inner]():
            states = parts.bert(ids).last_hidden_state
        with HOW_THE_CLOSURE_RUNS[head_mode]():
            return parts.classify(parts.norm(states)[:, 3])

    method = GlobEnc(run)
    with HOW_THE_CLOSURE_RUNS[outer]():
        before = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        scores = method.attribute(ids, 1)
        assert before == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        told = method.attribute(ids, 1, token_index=3)
        assert torch.equal(scores, told)


def numpy_head(m: nn.Module, h: Tensor, p: Tensor) -> Tensor:
    return torch.from_numpy(h[:, 0].numpy() @ m.classify.weight.detach().numpy().T)


def numpy_maximum(m: nn.Module, h: Tensor, p: Tensor) -> Tensor:
    return torch.from_numpy(h.max(1).values.numpy())


def partly_numpy(m: nn.Module, h: Tensor, p: Tensor) -> Tensor:
    return m.classify(h[:, 0]) + float(h[:, 3].sum())


def logging(m: nn.Module, h: Tensor, p: Tensor) -> Tensor:
    logits = m.classify(h[:, 0])
    assert len(str(logits[0, 0].item())) > 1
    assert len(logits.tolist()) == 2
    return logits


def detached(m: nn.Module, h: Tensor, p: Tensor) -> Tensor:
    return m.classify(h[:, 3].detach()).detach() + h.data.mean(1)[:, :3]


def into_a_buffer(m: nn.Module, h: Tensor, p: Tensor) -> Tensor:
    return torch.mul(h[:, 0, :3], 2, out=torch.empty(2, 3, dtype=h.dtype))


@pytest.mark.parametrize("head", [numpy_head, logging, into_a_buffer])
def test_heads_that_leave_torch_and_read_the_first_token(parts, head) -> None:
    ids = torch.stack([sentence(TOKENS), sentence(TOKENS, seed=1)])
    scores = GlobEnc(forward(parts, head)).attribute(ids, 1)
    expected = GlobEnc(parts.bert).decompose(ids).rollout()[:, 0]
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("head", [numpy_maximum, partly_numpy])
def test_heads_that_leave_torch_and_read_more(parts, head) -> None:
    ids = torch.stack([sentence(TOKENS), sentence(TOKENS, seed=1)])
    with pytest.raises(UnsupportedModelError, match=r"could not be found.*token_index"):
        GlobEnc(forward(parts, head)).attribute(ids, 1)
    assert GlobEnc(forward(parts, head)).attribute(ids, 1, token_index=0).all()
    pooled = GlobEnc(forward(parts, head), readout="pooling").attribute(ids, 1)
    expected = GlobEnc(parts.bert).decompose(ids).rollout()[:, 0]
    torch.testing.assert_close(pooled, expected, rtol=1e-12, atol=0)


def test_what_is_detached_is_read_all_the_same(parts) -> None:
    ids = torch.stack([sentence(TOKENS), sentence(TOKENS, seed=1)])

    def attached(m: nn.Module, h: Tensor, p: Tensor) -> Tensor:
        return m.classify(h[:, 3]) + h.mean(1)[:, :3]

    scores = GlobEnc(forward(parts, detached)).attribute(ids, 1)
    expected = GlobEnc(forward(parts, attached)).attribute(ids, 1)
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=0)


def test_a_head_that_writes_in_place(parts) -> None:
    """What it reads is followed through what it writes."""
    ids = torch.stack([sentence(TOKENS), sentence(TOKENS, seed=1)])

    def head(m: nn.Module, h: Tensor, p: Tensor) -> Tensor:
        h[:, 0] = h[:, 1:].mean(1)
        return m.classify(h[:, 0])

    scores = GlobEnc(forward(parts, head)).attribute(ids, 1)
    rollout = GlobEnc(parts.bert).decompose(ids).rollout()
    torch.testing.assert_close(scores, rollout[:, 1:].mean(1), rtol=1e-12, atol=0)


def test_a_gradient_of_zero(parts) -> None:
    """A dead unit: what the family's heads read, where it is seen to be read."""
    ids = torch.stack([sentence(TOKENS), sentence(TOKENS, seed=1)])

    def dead(m: nn.Module, h: Tensor, p: Tensor) -> Tensor:
        return m.classify(h[:, 0]).clamp(max=-1e6)

    scores = GlobEnc(forward(parts, dead)).attribute(ids, 1)
    expected = GlobEnc(parts.bert).decompose(ids).rollout()[:, 0]
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=0)


LOWER: dict[str, Callable[[nn.Module, tuple[Tensor, ...]], Tensor]] = {
    "one below": lambda m, states: m.classify(states[-2][:, 0]),
    "several, concatenated": lambda m, states: m.classify_two(
        torch.cat([states[-1][:, 0], states[-2][:, 3]], 1)
    ),
    "mean of layers": lambda m, states: m.classify(torch.stack(states).mean(0)[:, 0]),
    "weighted": lambda m, states: m.classify(
        (0.2 * states[0] + 0.3 * states[2] + 0.5 * states[3]).mean(1)
    ),
    "embeddings only": lambda m, states: m.classify(states[0].max(1).values),
}


@pytest.mark.parametrize("head", LOWER.values(), ids=LOWER)
def test_heads_that_read_lower_layers(parts, head) -> None:
    """Every hidden state counts by its part of the gradient's norms."""
    ids = torch.stack([sentence(TOKENS), sentence(TOKENS, seed=1)])

    def run(ids: Tensor) -> Tensor:
        return head(parts, parts.bert(ids, output_hidden_states=True).hidden_states)

    scores = GlobEnc(run).attribute(ids, 1)
    decomposition = GlobEnc(parts.bert).decompose(ids)
    identity = torch.eye(TOKENS, dtype=torch.float64).expand(2, -1, -1)
    rollouts = [identity, *(decomposition.rollout(stop) for stop in (1, 2, 3))]
    with torch.no_grad():
        whole = parts.bert(ids, output_hidden_states=True).hidden_states
    states = tuple(state.detach().requires_grad_() for state in whole)
    gradients = torch.autograd.grad(
        head(parts, states)[:, 1].sum(), states, allow_unused=True
    )
    expected, total = torch.zeros(2, TOKENS).double(), torch.zeros(2, 1).double()
    for gradient, rollout in zip(gradients, rollouts):
        if gradient is not None:
            norms = (gradient**2).sum(-1).sqrt()
            expected = expected + (norms[:, None] @ rollout)[:, 0]
            total = total + norms.sum(1, keepdim=True)
    torch.testing.assert_close(scores, expected / total, rtol=1e-9, atol=0)


def test_a_head_that_writes_into_a_lower_layer(parts) -> None:
    def run(ids: Tensor) -> Tensor:
        states = parts.bert(ids, output_hidden_states=True).hidden_states
        states[1][:, 0] = 0
        return parts.classify(states[1][:, 0])

    with pytest.raises(InputError, match="were changed in place"):
        GlobEnc(run).attribute(sentence(TOKENS)[None], 1)


def test_a_head_that_reads_attention_weights(parts) -> None:
    eager = copy.deepcopy(parts)
    eager.bert.set_attn_implementation("eager")

    def run(ids: Tensor) -> Tensor:
        output = eager.bert(ids, output_attentions=True)
        return output.attentions[-1].mean(1)[:, 0, :3] + output.pooler_output[:, :3]

    def by_numpy(ids: Tensor) -> Tensor:
        output = eager.bert(ids, output_attentions=True)
        weights = torch.from_numpy(output.attentions[-1].numpy())
        return weights.mean(1)[:, 0, :3] + output.pooler_output[:, :3]

    for forward_func in (run, by_numpy):
        with pytest.raises(UnsupportedModelError, match="made inside the encoder"):
            GlobEnc(forward_func).attribute(sentence(TOKENS)[None], 1)


OUT_OF_SIGHT: dict[str, Head] = {
    "a copy": lambda m, h, p: m.classify(torch.tensor(h[:, 1])),
    "detach_": lambda m, h, p: m.classify(h[:, 1].clone().detach_()),
    "rounding": lambda m, h, p: m.classify((h[:, 1] * 1000).round() / 1000),
    "integers": lambda m, h, p: m.classify((h[:, 1] * 1000).long().to(h) / 1000),
    "numpy": lambda m, h, p: m.classify(torch.from_numpy(h[:, 1].numpy())),
}


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.parametrize("head", OUT_OF_SIGHT.values(), ids=OUT_OF_SIGHT)
def test_a_part_of_the_head_without_gradient(parts, head) -> None:
    ids = torch.stack([sentence(TOKENS), sentence(TOKENS, seed=1)])

    def run(ids: Tensor) -> Tensor:
        states = parts.bert(ids).last_hidden_state
        return parts.classify(states[:, 0]) + head(parts, states, states[:, 0])

    with pytest.raises(UnsupportedModelError, match="reads values that leave torch"):
        GlobEnc(run).attribute(ids, 1)


@pytest.mark.parametrize("part", ["encoder.layer.0", "encoder.layer.1.attention"])
@pytest.mark.parametrize("keep", [Tensor.detach, Tensor.clone, lambda o: o[:, 1]])
def test_what_hooks_keep_of_the_encoder(parts, part, keep) -> None:
    ids = torch.stack([sentence(TOKENS), sentence(TOKENS, seed=1)])
    kept: dict[str, Tensor] = {}

    def hook(_: nn.Module, __: object, output: object) -> None:
        states = output[0] if isinstance(output, tuple) else output
        kept["states"] = keep(states)

    def run(ids: Tensor) -> Tensor:
        states = parts.bert(ids).last_hidden_state
        lower = kept["states"]
        lower = lower if lower.ndim == 2 else lower[:, 1]
        return parts.classify(states[:, 0]) + parts.classify(lower)

    handle = parts.bert.get_submodule(part).register_forward_hook(hook)
    try:
        with pytest.raises(UnsupportedModelError, match="made inside the encoder"):
            GlobEnc(run).attribute(ids, 1)
    finally:
        handle.remove()


@pytest.mark.parametrize("seen", [True, False])
def test_lower_layers_through_code_that_is_not_seen(parts, seen) -> None:
    if not seen and Version(t.__version__) < Version("5.20"):
        pytest.skip("older releases keep hidden states before hooks see them")
    ids = torch.stack([sentence(TOKENS), sentence(TOKENS, seed=1)])

    class Second(torch.autograd.Function):
        @staticmethod
        def forward(ctx, states):
            ctx.shape = states.shape
            return states[:, 1].clone()

        @staticmethod
        def backward(ctx, gradient):
            whole = gradient.new_zeros(ctx.shape)
            whole[:, 1] = gradient
            return whole

    def run(ids: Tensor) -> Tensor:
        output = parts.bert(ids, output_hidden_states=True)
        lower = output.hidden_states[1]
        second = lower[:, 1] if seen else Second.apply(lower)
        return parts.classify(output.last_hidden_state[:, 0]) + parts.classify(second)

    rollout = GlobEnc(parts.bert).decompose(ids).rollout()
    scores = GlobEnc(run).attribute(ids, 1)
    assert not torch.allclose(scores, rollout[:, 0])
    if not seen:
        expected = test_lower_layers_through_code_that_is_not_seen.scores
        torch.testing.assert_close(scores, expected, rtol=1e-12, atol=0)
    test_lower_layers_through_code_that_is_not_seen.scores = scores


def test_inputs_that_the_head_reads_by_itself(parts) -> None:
    ids = torch.stack([sentence(TOKENS), sentence(TOKENS, seed=1)])
    wide = nn.Embedding(97, 3).double()

    def run(ids: Tensor) -> Tensor:
        return parts.classify(parts.bert(ids).pooler_output) + wide(ids).sum(1)

    with pytest.raises(UnsupportedModelError, match="past the encoder"):
        GlobEnc(run).attribute(ids, 1)


@pytest.mark.parametrize("labels", [TOKENS - 1, TOKENS, TOKENS + 1])
def test_a_mean_with_as_many_labels_as_tokens(parts, labels) -> None:
    ids = torch.stack([sentence(TOKENS), sentence(TOKENS, seed=1)])
    out = nn.Linear(HIDDEN, labels).double()
    scores = GlobEnc(lambda i: out(parts.bert(i).last_hidden_state.mean(1))).attribute(
        ids
    )
    expected = GlobEnc(parts.bert).decompose(ids).rollout().mean(1)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=0)


def test_classes_without_a_gradient(parts) -> None:
    """A mean that only returns the largest class is not taken for the first token."""
    ids = torch.stack([sentence(TOKENS), sentence(TOKENS, seed=1)])
    for seed in range(10):
        torch.manual_seed(seed)
        out = nn.Linear(HIDDEN, 3).double()

        def run(ids: Tensor, out: nn.Module = out) -> Tensor:
            return out(parts.bert(ids).last_hidden_state.mean(1)).argmax(-1)

        with pytest.raises(UnsupportedModelError, match="token_index"):
            GlobEnc(run).attribute(ids)


def test_a_head_in_training_mode() -> None:
    """Its dropout is off, too, and its statistics stay."""
    model = nn.Sequential()
    model.bert = t.BertModel(t.BertConfig(**SIZES))
    model.norm, model.drop = nn.BatchNorm1d(HIDDEN), nn.Dropout(0.5)
    model.out = nn.Linear(HIDDEN, 3)

    def forward(ids: Tensor) -> Tensor:
        states = model.bert(ids).last_hidden_state
        pooled = (states.softmax(1) * states).sum(1)
        return model.out(model.drop(model.norm(pooled)).tanh())

    model.forward = forward
    randomize(model).eval()
    ids = torch.stack([sentence(TOKENS), sentence(TOKENS, seed=1)])
    expected = GlobEnc(model).attribute(ids, 1)
    before = model.norm.running_mean.clone()
    model.train()
    torch.testing.assert_close(GlobEnc(model).attribute(ids, 1), expected)
    assert torch.equal(model.norm.running_mean, before)
    assert model.drop.training


def test_examples_that_the_head_mixes(parts) -> None:
    ids = torch.stack([sentence(TOKENS), sentence(TOKENS, seed=1)])

    def flipped(m: nn.Module, h: Tensor, p: Tensor) -> Tensor:
        return m.classify(h[:, 0]).flip(0)

    with pytest.raises(UnsupportedModelError, match="depend on other examples"):
        GlobEnc(forward(parts, flipped)).attribute(ids, 1)
    alone = GlobEnc(forward(parts, flipped)).attribute(ids, 1, internal_batch_size=1)
    expected = GlobEnc(parts.bert).decompose(ids).rollout()[:, 0]
    torch.testing.assert_close(alone, expected, rtol=1e-12, atol=0)


def test_pooling_of_the_family(parts) -> None:
    ids = torch.stack([sentence(TOKENS), sentence(TOKENS, seed=1)])
    method = GlobEnc(forward(parts, HEADS["LSTM"]), readout="pooling")
    expected = GlobEnc(parts.bert).decompose(ids).rollout()[:, 0]
    torch.testing.assert_close(method.attribute(ids, 1), expected, rtol=1e-12, atol=0)
    with pytest.raises(InputError, match="got 'mean'"):
        GlobEnc(parts.bert, readout="mean")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["mean", "fourth", "maximum", "LSTM"])
def test_half_precision(dtype, name) -> None:
    torch.manual_seed(0)
    parts = randomize(Parts()).eval()
    ids = torch.stack([sentence(30), sentence(30, seed=1)])
    exact = GlobEnc(forward(parts, HEADS[name]), normalize=True).attribute(ids, 1)
    low = GlobEnc(forward(parts.to(dtype), HEADS[name]), normalize=True)
    found = low.attribute(ids, 1).float()
    assert (found - exact).norm() / exact.norm() < 0.1


def test_a_decoder_after_the_encoder() -> None:
    torch.manual_seed(0)
    model = randomize(nn.Transformer(HIDDEN, 4, 2, 2, 36, batch_first=True)).double()
    # What runs after the encoder may use dropout.
    model.eval()
    states = torch.randn(2, TOKENS, HIDDEN, dtype=torch.float64)
    other = torch.randn(2, 3, HIDDEN, dtype=torch.float64)
    for target in (states, other):
        run = lambda x, y=target: model(x, x if y is states else y)  # noqa: E731
        assert GlobEnc(run).attribute(states, (0, 1)).all()


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
    # Its head attends to all patches.
    pooled = GlobEnc(lambda x: model.vision_model(x).pooler_output[:, :1])
    assert pooled.attribute(pixels, 0).shape == seen.shape
    assert (seen > 0).all()
    read = GlobEnc(
        lambda x: model(input_ids=x, pixel_values=pixels).logits_per_text,
        encoder=model.text_model,
    ).attribute(ids, 1)
    expected = GlobEnc(model.text_model).attribute(ids, token_index=TOKENS - 1)
    torch.testing.assert_close(read, expected)
