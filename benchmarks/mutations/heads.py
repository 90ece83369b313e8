"""Heads of all makes. The truth is their gradient, taken here with autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.mutations.campaign import (
    EITHER,
    REFUSED,
    RIGHT,
    Scores,
    Trial,
    add,
    case,
)
from benchmarks.mutations.models import DOUBLE, HIDDEN, LENGTHS, Subject, subject
from benchmarks.mutations.twin import shares, watch
from captum_globenc import GlobEnc
from tests import models

KIND = "heads"
Target = int | tuple[int, ...] | list[int] | list[tuple[int, ...]] | None


class Parts(nn.Module):
    """What heads may be made of."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = nn.Linear(HIDDEN, 3)
        self.classify_two = nn.Linear(2 * HIDDEN, 3)
        self.classify_four = nn.Linear(4 * HIDDEN, 3)
        self.dense = nn.Linear(HIDDEN, HIDDEN)
        self.words = nn.Linear(HIDDEN, models.VOCABULARY)
        self.ask = nn.Linear(HIDDEN, 1)
        self.norm = nn.LayerNorm(HIDDEN)
        self.lstm = nn.LSTM(HIDDEN, HIDDEN, batch_first=True)
        self.both_ways = nn.LSTM(HIDDEN, 12, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.convolution = nn.Conv1d(HIDDEN, HIDDEN, 3, padding=1)
        self.attention = nn.MultiheadAttention(HIDDEN, 4, batch_first=True)
        self.bilinear = nn.Bilinear(HIDDEN, HIDDEN, 3)
        self.decoder = nn.TransformerDecoderLayer(HIDDEN, 4, 36, batch_first=True)
        self.query = nn.Parameter(torch.randn(1, 1, HIDDEN))
        self.vector = nn.Parameter(torch.randn(HIDDEN))
        self.mixture = nn.Parameter(torch.tensor([0.4, 0.3, 0.2, 0.1]))
        self.batch_norm = nn.BatchNorm1d(HIDDEN)

    @classmethod
    def make(cls, dtype: torch.dtype = DOUBLE) -> Parts:
        """The same on every call."""
        torch.manual_seed(3)
        return models.randomize(cls()).to(dtype).eval()  # type: ignore[return-value]


@dataclass
class Reading:
    """What a head is given.

    Args:
        parts (Parts): maps and so on.
        layers (tuple[Tensor, ...]): the output of the embeddings and of each layer.
        mask (Tensor): (batch, tokens).
        ids (Tensor): likewise.
    """

    parts: Parts
    layers: tuple[Tensor, ...]
    mask: Tensor
    ids: Tensor

    @property
    def last(self) -> Tensor:
        """The last hidden states, (batch, tokens, hidden)."""
        return self.layers[-1]

    @property
    def ends(self) -> Tensor:
        """The last token of each example that is no padding."""
        return self.mask.sum(-1) - 1

    @property
    def kept(self) -> Tensor:
        """The mask, (batch, tokens, 1)."""
        return self.mask[..., None].to(self.last)

    def mean(self) -> Tensor:
        """The mean over tokens that are no padding."""
        return (self.last * self.kept).sum(1) / self.kept.sum(1)

    def without_padding(self, low: float = -1e9) -> Tensor:
        """Padding so low that no maximum is there."""
        return self.last.masked_fill(self.kept == 0, low)


Head = Callable[[Reading], Any]
_ROWS = torch.arange(2)


def _classify(r: Reading, vector: Tensor) -> Tensor:
    return r.parts.classify(vector)


def _pooled_by_attention(r: Reading) -> Tensor:
    logits = r.parts.ask(r.last).masked_fill(r.kept == 0, -1e9)
    return r.parts.classify((logits.softmax(1) * r.last).sum(1))


def _own_attention(r: Reading) -> Tensor:
    logits = r.parts.dense(r.last) @ r.last.mT
    alpha = logits.masked_fill(r.mask[:, None] == 0, -1e9).softmax(-1)
    return r.parts.classify(r.parts.norm(alpha @ r.last)[:, 0])


def _attention_layer(r: Reading) -> Tensor:
    hidden = r.mask == 0
    mixed, _ = r.parts.attention(r.last, r.last, r.last, key_padding_mask=hidden)
    return r.parts.classify(mixed[:, 0])


def _cross_attention(r: Reading) -> Tensor:
    query = r.parts.query.expand(len(r.last), -1, -1)
    hidden = r.mask == 0
    decoded = r.parts.decoder(query, r.last, memory_key_padding_mask=hidden)
    return r.parts.classify(decoded[:, 0])


def _top_two(r: Reading) -> Tensor:
    weights = r.parts.ask(r.without_padding(-1e3))[..., 0]
    chosen = weights.masked_fill(r.mask == 0, -1e9).topk(2, -1).indices
    rows = torch.arange(len(r.last))[:, None]
    return r.parts.classify(r.last[rows, chosen].mean(1))


def _recurrence(r: Reading) -> Tensor:
    state = torch.zeros_like(r.last[:, 0])
    for token in range(4):
        state = torch.tanh(r.parts.dense(state) + r.last[:, token])
    return r.parts.classify(state)


def _second_head_unused(r: Reading) -> Tensor:
    r.parts.words(r.last)
    r.parts.classify(r.last[:, 0])
    return r.parts.classify(r.last[:, 3])


def _pooled_unused(r: Reading) -> Tensor:
    torch.tanh(r.parts.dense(r.last[:, 0]))
    return r.without_padding().amax(1) @ r.parts.classify.weight.T


def _mean_of_others_into_first(r: Reading) -> Tensor:
    states = r.last
    states[:, 0] = states[:, 1:4].mean(1)
    return r.parts.classify(states[:, 0])


def _others_zeroed(r: Reading) -> Tensor:
    states = r.last
    states[:, 2:] = 0
    return r.parts.classify(states.sum(1))


def _rectified_in_place(r: Reading) -> Tensor:
    return r.parts.classify(r.last.relu_()[:, 2])


def _tokens_swapped_in_place(r: Reading) -> Tensor:
    states = r.last
    states[:, 0], states[:, 3] = states[:, 3].clone(), states[:, 0].clone()
    return r.parts.classify(states[:, 0])


def _zeroed_when_done(r: Reading) -> Tensor:
    output = r.parts.classify(r.last[:, 3])
    r.last.detach().zero_()
    return output


def _last_four(r: Reading) -> Tensor:
    return r.parts.classify_four(torch.cat([h[:, 0] for h in r.layers[-4:]], -1))


def _scalar_mixture(r: Reading) -> Tensor:
    mixed = sum(w * h for w, h in zip(r.parts.mixture.softmax(0), r.layers))
    return r.parts.classify((mixed * r.kept).sum(1) / r.kept.sum(1))


def _two(r: Reading, first: Tensor, second: Tensor) -> Tensor:
    return r.parts.classify_two(torch.cat([first, second], -1))


def _tokens(r: Reading) -> Tensor:
    return r.parts.classify(r.last)


def _starts(r: Reading) -> Tensor:
    return r.parts.ask(r.last)[..., 0].masked_fill(r.mask == 0, -1e9)


def _gathered(r: Reading) -> Tensor:
    index = r.ends[:, None, None].expand(-1, 1, HIDDEN)
    return r.parts.classify(r.last.gather(1, index)[:, 0])


def _by_one_hot(r: Reading) -> Tensor:
    picked = functional.one_hot(torch.tensor(3), r.last.shape[1])[:, None]
    return r.parts.classify((r.last * picked).sum(1))


# One token, however it is taken
ONE: dict[str, tuple[Head, Target]] = {
    "first": (lambda r: _classify(r, r.last[:, 0]), 1),
    "third": (lambda r: _classify(r, r.last[:, 2]), 1),
    "the last that is no padding": (lambda r: _classify(r, r.last[_ROWS, r.ends]), 1),
    "where the largest id is": (
        lambda r: _classify(r, r.last[_ROWS, r.ids.argmax(-1)]),
        1,
    ),
    "another token of each example": (
        lambda r: _classify(r, r.last[_ROWS, torch.tensor([3, 1])]),
        1,
    ),
    "gathered": (_gathered, 1),
    "one-hot times states": (_by_one_hot, 1),
    "tanh of a map": (lambda r: _classify(r, r.parts.dense(r.last[:, 0]).tanh()), 1),
    "normed": (lambda r: _classify(r, r.parts.norm(r.last)[:, 0]), 1),
    "no module": (lambda r: r.last[:, 3] @ r.parts.classify.weight.T, 1),
    "rolled, then the third": (lambda r: _classify(r, r.last.roll(1, 1)[:, 2]), 1),
    "normed, rolled, then the first": (
        lambda r: _classify(r, r.parts.norm(r.last).roll(-2, 1)[:, 0]),
        1,
    ),
    "logits of a token": (_tokens, (2, 1)),
    "logits of rolled tokens": (lambda r: _tokens(r).roll(1, 1), (2, 1)),
    "logits of flipped tokens": (lambda r: _classify(r, r.last.flip(1)), (5, 0)),
    "logits, another token each": (_tokens, [(3, 1), (1, 0)]),
    "logits, permuted": (lambda r: _tokens(r)[:, torch.tensor([3, 0, 1, 2])], (0, 1)),
    "words": (lambda r: r.parts.words(r.last), (3, 57)),
    "words, log-softmax": (lambda r: r.parts.words(r.last).log_softmax(-1), (3, 57)),
    "start logits": (lambda r: r.parts.ask(r.last)[..., 0], 2),
    "largest start logit": (lambda r: _starts(r).amax(1), None),
    "softmax": (lambda r: _classify(r, r.last[:, 2]).softmax(-1), 1),
    "log-softmax": (lambda r: _classify(r, r.last[:, 2]).log_softmax(-1), 1),
    "one number": (lambda r: _classify(r, r.last[:, 3])[:, 1], None),
    "one number, one dimension more": (lambda r: r.parts.ask(r.last[:, 3]), 0),
    "all classes, no target": (lambda r: _classify(r, r.last[:, 3]), None),
    "softmax, no target": (lambda r: _classify(r, r.last[:, 3]).softmax(-1), None),
    "difference of two logits": (
        lambda r: _classify(r, r.last[:, 3])[:, 1] - _classify(r, r.last[:, 3])[:, 0],
        None,
    ),
    "largest logit": (lambda r: _classify(r, r.last[:, 3]).amax(-1), None),
    "cosine of one token": (
        lambda r: functional.cosine_similarity(r.last[:, 3], r.parts.vector, -1),
        None,
    ),
    "norm of one token": (lambda r: r.last[:, 3].norm(dim=-1), None),
    "cumulated, then the first": (lambda r: _classify(r, r.last.cumsum(1)[:, 0]), 1),
    "LSTM, then the first": (lambda r: _classify(r, r.parts.lstm(r.last)[0][:, 0]), 1),
    "second head is not returned": (_second_head_unused, 1),
    "target is another class for each": (
        lambda r: _classify(r, r.last[:, 3]),
        [0, 2],
    ),
    "in a tuple": (lambda r: (_classify(r, r.last[:, 3]), r.last), 1),
    "in a dict": (lambda r: {"logits": _classify(r, r.last[:, 3])}, 1),
    "in an output with a loss": (
        lambda r: SequenceClassifierOutput(
            loss=r.last.sum(), logits=_classify(r, r.last[:, 3])
        ),
        1,
    ),
    "in an output with states": (
        lambda r: SequenceClassifierOutput(
            logits=_classify(r, r.last[:, 3]), hidden_states=r.layers
        ),
        1,
    ),
    "by einsum": (
        lambda r: torch.einsum("btd,cd->btc", r.last, r.parts.classify.weight)[:, 3],
        1,
    ),
    "batch norm": (lambda r: _classify(r, r.parts.batch_norm(r.last[:, 3])), 1),
    "looked up in a list": (
        lambda r: _classify(r, torch.stack([s[3] for s in list(r.last)])),
        1,
    ),
}
# Several tokens
SEVERAL: dict[str, tuple[Head, Target]] = {
    "mean": (lambda r: _classify(r, r.mean()), 1),
    "mean of logits": (
        lambda r: (_tokens(r) * r.kept).sum(1) / r.kept.sum(1),
        1,
    ),
    "mean, no module": (lambda r: r.mean() @ r.parts.classify.weight.T, 1),
    "mean, of length one": (
        lambda r: _classify(r, functional.normalize(r.mean(), dim=-1)),
        1,
    ),
    "mean without the first": (lambda r: _classify(r, r.last[:, 1:5].mean(1)), 1),
    "sum": (lambda r: _classify(r, (r.last * r.kept).sum(1)), 1),
    "maximum": (lambda r: _classify(r, r.without_padding().amax(1)), 1),
    "maximum, no module": (
        lambda r: r.without_padding().amax(1) @ r.parts.classify.weight.T,
        1,
    ),
    "maximum of logits": (
        lambda r: _tokens(r).masked_fill(r.kept == 0, -1e9).amax(1),
        1,
    ),
    "logsumexp": (lambda r: _classify(r, r.without_padding(-1e3).logsumexp(1)), 1),
    "two best tokens": (_top_two, 1),
    "spread": (lambda r: _classify(r, r.last[:, :5].std(1)), 1),
    "median": (lambda r: _classify(r, r.last[:, :5].median(1).values), 1),
    "sorted": (lambda r: _classify(r, r.last[:, :5].sort(1).values[:, 1]), 1),
    "pooled by attention": (_pooled_by_attention, 1),
    "own attention": (_own_attention, 1),
    "attention layer": (_attention_layer, 1),
    "cross-attention": (_cross_attention, 1),
    "LSTM": (lambda r: _classify(r, r.parts.lstm(r.last)[0][_ROWS, r.ends]), 1),
    "LSTM, its state": (
        lambda r: _classify(r, r.parts.lstm(r.last[:, :5])[1][0][-1]),
        1,
    ),
    "LSTM both ways": (
        lambda r: _classify(r, r.parts.both_ways(r.last[:, :5])[0][:, 0]),
        1,
    ),
    "GRU": (lambda r: _classify(r, r.parts.gru(r.last)[0][_ROWS, r.ends]), 1),
    "recurrence of one's own": (_recurrence, 1),
    "convolution": (
        lambda r: _classify(r, r.parts.convolution(r.last[:, :5].mT).mT[:, 3]),
        1,
    ),
    "convolution, maximum": (
        lambda r: _classify(r, r.parts.convolution(r.last[:, :5].mT).relu().amax(-1)),
        1,
    ),
    "convolution, token logits": (
        lambda r: _classify(r, r.parts.convolution(r.last[:, :5].mT).mT),
        (2, 1),
    ),
    "pooled by torch": (
        lambda r: _classify(r, functional.avg_pool1d(r.last[:, :5].mT, 2).mT[:, 1]),
        1,
    ),
    "first and third": (lambda r: _two(r, r.last[:, 0], r.last[:, 2]), 1),
    "first and mean": (lambda r: _two(r, r.last[:, 0], r.mean()), 1),
    "maximum beside the first": (
        lambda r: _two(r, r.last[:, 0], r.without_padding().amax(1)),
        1,
    ),
    "first beside the maximum": (
        lambda r: _two(r, r.without_padding().amax(1), r.last[:, 0]),
        1,
    ),
    "maximum added to the first": (
        lambda r: _classify(r, r.last[:, 0] + r.without_padding().amax(1)),
        1,
    ),
    "difference of two tokens": (
        lambda r: _classify(r, r.last[:, 0] - r.last[:, 3]),
        1,
    ),
    "absolute difference": (
        lambda r: _classify(r, (r.last[:, 0] - r.last[:, 3]).abs()),
        1,
    ),
    "product of two tokens": (lambda r: _classify(r, r.last[:, 1] * r.last[:, 3]), 1),
    "bilinear": (lambda r: r.parts.bilinear(r.last[:, 0], r.last[:, 3]), 1),
    "cosine of two tokens": (
        lambda r: functional.cosine_similarity(r.last[:, 0], r.last[:, 3], -1),
        None,
    ),
    "cosine of the mean": (
        lambda r: functional.cosine_similarity(r.mean(), r.parts.vector, -1),
        None,
    ),
    "start as a probability": (lambda r: _starts(r).softmax(-1), 2),
    "gated by the mean": (
        lambda r: _classify(r, r.last[:, 2] * r.mean().sigmoid()),
        1,
    ),
    "token logits beside the mean": (
        lambda r: _classify(r, r.last + r.mean()[:, None]),
        (2, 1),
    ),
    "cumulated": (lambda r: _classify(r, r.last.cumsum(1)[:, 3]), 1),
    "Fourier transform": (
        lambda r: _classify(r, torch.fft.fft(r.last[:, :5], dim=1).abs()[:, 1]),
        1,
    ),
    "a little of another token": (
        lambda r: _classify(r, r.last[:, 0] + 1e-3 * r.last[:, 3]),
        1,
    ),
    "all tokens, weighted": (
        lambda r: _classify(r, (r.last * r.kept * r.ids[..., None] / 97).sum(1)),
        1,
    ),
    "pooled is not used": (_pooled_unused, 1),
}
# In-place: the states that were recorded change
IN_PLACE: dict[str, tuple[Head, Target]] = {
    "mean of others written into the first": (_mean_of_others_into_first, 1),
    "others zeroed": (_others_zeroed, 1),
    "rectified in place": (_rectified_in_place, 1),
    "tokens swapped in place": (_tokens_swapped_in_place, 1),
}
# Lower layers
LOWER: dict[str, tuple[Head, Target]] = {
    "last of all layers": (lambda r: _classify(r, r.layers[-1][:, 2]), 1),
    "the last but one": (lambda r: _classify(r, r.layers[-2][:, 0]), 1),
    "the last but one, mean": (
        lambda r: _classify(r, (r.layers[-2] * r.kept).sum(1) / r.kept.sum(1)),
        1,
    ),
    "last four in a row": (_last_four, 1),
    "mixture of all layers": (_scalar_mixture, 1),
    "embeddings only": (lambda r: _classify(r, r.layers[0][:, 3]), 1),
    "embeddings beside the first": (
        lambda r: _two(r, r.layers[-1][:, 0], r.layers[0][:, 3]),
        1,
    ),
    "first layer beside the last": (
        lambda r: _two(r, r.layers[-1][:, 0], r.layers[1][:, 2]),
        1,
    ),
    "maximum over layers": (
        lambda r: _classify(r, torch.stack([h[:, 0] for h in r.layers]).amax(0)),
        1,
    ),
    "difference of two layers": (
        lambda r: _classify(r, r.layers[-1][:, 0] - r.layers[-2][:, 0]),
        1,
    ),
}


def closure(encoder: nn.Module, parts: Parts, head: Head, layers: bool) -> Any:
    """A forward function of an encoder of transformers and a head."""

    def forward(ids: Tensor, mask: Tensor) -> Any:
        output = encoder(ids, attention_mask=mask, output_hidden_states=layers)
        states = output.hidden_states if layers else (output.last_hidden_state,)
        return head(Reading(parts, tuple(states), mask, ids))

    return forward


def first_tensor(output: Any) -> Tensor:
    """The scores in what a head returns."""
    if isinstance(output, Tensor):
        return output
    return output["logits"] if hasattr(output, "keys") else output[0]


def chosen(output: Tensor, target: Target) -> Tensor:
    """The sum of what the target names in each example."""
    if target is None:
        # Of several outputs all count, none as much as another.
        weights = torch.linspace(0.5, 1.5, max(1, output[0].numel())).to(output)
        return (output.flatten(1) * weights).sum() if output.ndim > 1 else output.sum()
    rows = target if isinstance(target, list) else [target] * len(output)
    paths = [path if isinstance(path, tuple) else (path,) for path in rows]
    return torch.stack([output[(row, *path)] for row, path in enumerate(paths)]).sum()


def truth_of(
    one: Subject, parts: Parts, head: Head, target: Target, layers: bool
) -> Tensor:
    """Rollout rows of all layers, weighted by the norms of the head's gradient."""
    twin = watch(one.encoder, one.recipe, lambda: one.encoder(one.inputs, one.mask))
    read = twin.states if layers else twin.states[-1:]
    leaves = [state.to(one.dtype).requires_grad_() for state in read]
    # Not the leaves themselves: a head may write in place.
    given = tuple(leaf * 1 for leaf in leaves)
    output = head(Reading(parts, given, one.mask, one.inputs))  # type: ignore[arg-type]
    selected = chosen(first_tensor(output), target)
    grads = torch.autograd.grad(selected, leaves, allow_unused=True)
    found = [torch.zeros_like(s) if g is None else g for s, g in zip(leaves, grads)]
    count = len(twin.layers)
    stops = range(count + 1) if layers else [count]
    rollouts = torch.stack([twin.rollout(stop) for stop in stops], 1)
    return (shares(found)[:, :, None] @ rollouts).sum(1)[:, 0]


def trial(
    head: Head,
    target: Target,
    layers: bool = False,
    lengths: tuple[int, ...] = LENGTHS,
    wrap: Callable[[Any], Any] = lambda forward: forward,
    truth: Tensor | str | None = "by gradient",
) -> Trial:
    """A head on a BERT."""
    one = subject("bert", lengths=lengths)
    one.model, parts = one.encoder, Parts.make()
    if isinstance(truth, str):
        truth = truth_of(one, parts, head, target, layers)
    forward = wrap(closure(one.encoder, parts, head, layers))
    return Scores(
        lambda: GlobEnc(forward).attribute(one.inputs, target, one.arguments), truth
    )


def _register(group: dict[str, tuple[Head, Target]], accept: Any, layers: bool) -> None:
    words = ", of hidden_states" if layers else ""
    for name, (head, target) in group.items():
        add(KIND, name + words, accept, _made(head, target, layers))


def _made(head: Head, target: Target, layers: bool) -> Callable[[], Trial]:
    return lambda: trial(head, target, layers)


for _group, _accept, _layers in (
    (ONE, RIGHT, False),
    (SEVERAL, RIGHT, False),
    (IN_PLACE, EITHER, False),
    (LOWER, RIGHT, True),
):
    _register(_group, _accept, _layers)


@case(KIND, EITHER)
def states_zeroed_when_all_is_done() -> Trial:
    """What was read is no longer there."""
    one = subject("bert")
    truth = one.twin().rollout()[:, 3]
    return trial(_zeroed_when_done, 1, truth=truth)


# Without gradients around it


def _no_grad(forward: Any) -> Any:
    return torch.no_grad()(forward)


def _inference(forward: Any) -> Any:
    return torch.inference_mode()(forward)


_BEHIND = ("first", "third", "no module", "logits of a token")
_BEHIND_SEVERAL = ("maximum", "mean", "LSTM", "pooled by attention")


@case(
    KIND,
    RIGHT,
    [(n, w) for n in (*_BEHIND, *_BEHIND_SEVERAL) for w in (_no_grad, _inference)],
)
def closure_without_gradients(name: str, wrap: Callable[[Any], Any]) -> Trial:
    """The closure switches them off for the whole run."""
    head, target = {**ONE, **SEVERAL}[name]
    return trial(head, target, wrap=wrap)


@case(KIND, RIGHT, [("third",), ("maximum",)])
def called_without_gradients(name: str) -> Trial:
    """Whoever calls the package has switched them off."""
    head, target = {**ONE, **SEVERAL}[name]
    built = trial(head, target)
    assert isinstance(built, Scores)

    def found() -> Tensor:
        with torch.inference_mode():
            return built.found()

    return Scores(found, built.truth)


def _detached(r: Reading, token: int) -> Tensor:
    return r.parts.classify(r.last.detach()[:, token])


def _by_numpy(r: Reading, token: int) -> Tensor:
    states = r.last.detach().numpy()
    return torch.from_numpy(
        states[:, token] @ r.parts.classify.weight.detach().numpy().T
    )


def _by_numpy_without_detach(r: Reading, token: int) -> Tensor:
    states = r.last.numpy() if not r.last.requires_grad else r.last.detach().numpy()
    return torch.from_numpy(
        states[:, token] @ r.parts.classify.weight.detach().numpy().T
    )


def _of_data(r: Reading, token: int) -> Tensor:
    return r.parts.classify(r.last.data[:, token])


def _head_under_no_grad(r: Reading, token: int) -> Tensor:
    with torch.no_grad():
        return r.parts.classify(r.last[:, token])


def _head_under_inference_mode(r: Reading, token: int) -> Tensor:
    with torch.inference_mode():
        return r.parts.classify(r.last[:, token])


def _by_lists(r: Reading, token: int) -> Tensor:
    return torch.tensor(r.parts.classify(r.last[:, token]).tolist(), dtype=DOUBLE)


def _label(r: Reading, token: int) -> Tensor:
    return r.parts.classify(r.last[:, token]).argmax(-1)


class _NoGradient(torch.autograd.Function):
    """Hands values on, and no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


def _by_a_function_without_gradient(r: Reading, token: int) -> Tensor:
    return r.parts.classify(_NoGradient.apply(r.last)[:, token])


def _dead(r: Reading, token: int) -> Tensor:
    return (r.parts.classify(r.last[:, token]) - 1e6).relu()


def _dead_in_one_example(r: Reading, token: int) -> Tensor:
    output = r.parts.classify(r.last[:, token])
    return (output + torch.tensor([[1e6], [-1e6]])).relu()


def _weights_of_zero(r: Reading, token: int) -> Tensor:
    return r.last[:, token] @ torch.zeros(HIDDEN, 3).to(r.last)


def _constant(r: Reading, token: int) -> Tensor:
    return torch.ones(len(r.last), 3).to(r.last)


_BLIND = (
    _detached,
    _by_numpy,
    _by_numpy_without_detach,
    _of_data,
    _head_under_no_grad,
    _head_under_inference_mode,
    _by_lists,
    _label,
    _by_a_function_without_gradient,
    _dead,
    _dead_in_one_example,
    _weights_of_zero,
    _constant,
)


def _blind(head: Callable[[Reading, int], Tensor], token: int) -> Trial:
    one = subject("bert")
    target = None if head is _label else 1
    rollout = watch(
        one.encoder, one.recipe, lambda: one.encoder(one.inputs, one.mask)
    ).rollout()
    return trial(lambda r: head(r, token), target, truth=rollout[:, token])


@case(KIND, EITHER, [(head,) for head in _BLIND])
def blind_head_on_the_first(head: Callable[[Reading, int], Tensor]) -> Trial:
    """No gradient comes back, and the family's pooling is what is read."""
    return _blind(head, 0)


#: Of these nothing but another token's own values could tell what is read.
_ZERO = (_label, _dead, _dead_in_one_example)


@case(KIND, EITHER, [(head,) for head in _BLIND[:-2] if head not in _ZERO])
def blind_head_on_the_third(head: Callable[[Reading, int], Tensor]) -> Trial:
    """No gradient comes back, and the family's pooling is not what is read."""
    return _blind(head, 2)


@case(KIND, EITHER, [(head,) for head in _ZERO], decided=False)
def gradient_of_zero_on_the_third(head: Callable[[Reading, int], Tensor]) -> Trial:
    """The output does not change with any token, and the third makes it."""
    return _blind(head, 2)


# Padding, and tokens that cannot be told apart


@case(KIND, EITHER, [("mean of all",), ("last of all",), ("sum of all",)])
def padding_is_read(what: str) -> Trial:
    """Right: rows of padding count as those of other tokens."""
    heads: dict[str, Head] = {
        "mean of all": lambda r: _classify(r, r.last.mean(1)),
        "last of all": lambda r: _classify(r, r.last[:, -1]),
        "sum of all": lambda r: _classify(r, r.last.sum(1)),
    }
    return trial(heads[what], 1)


@case(KIND, RIGHT, [("mean of all",), ("minus two",), ("sum of all",)])
def no_padding(what: str) -> Trial:
    """The same heads where there is none."""
    heads: dict[str, Head] = {
        "mean of all": lambda r: _classify(r, r.last.mean(1)),
        "minus two": lambda r: _classify(r, r.last[:, -2]),
        "sum of all": lambda r: _classify(r, r.last.sum(1)),
    }
    return trial(heads[what], 1, lengths=(7, 7))


@case(KIND, RIGHT, [(0,), (3,), (-1,)])
def equal_tokens(token: int) -> Trial:
    """Without positions equal ids have equal states, and one of them is read."""
    one = subject("torch-post", lengths=(4,))
    ids = torch.tensor([[3, 5, 4, 3], [7, 7, 7, 7]])
    one.inputs, one.mask = ids, None

    def forward(ids: Tensor) -> Tensor:
        return one.model.head(one.model.stack(one.model.tokens(ids))[:, token])

    one.forward = forward  # type: ignore[method-assign]
    rollout = one.twin().rollout()
    return one.trial(truth=rollout[:, token])


# Heads of families


def _family_head(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    def masked(states: Tensor, kept: Tensor) -> Tensor:
        return states.masked_fill(kept == 0, -1e9).amax(1)

    return {
        "first": lambda s, kept: s[:, 0],
        "third": lambda s, kept: s[:, 2],
        "mean": lambda s, kept: (s * kept).sum(1) / kept.sum(1),
        "maximum": masked,
        "third of rolled": lambda s, kept: s.roll(-1, 1)[:, 2],
        "first and fourth": lambda s, kept: s[:, 0] + s[:, 3] * 2,
    }[name]


@case(
    KIND,
    RIGHT,
    [
        (f, h)
        for f in (
            "distilbert",
            "roberta",
            "electra",
            "albert",
            "gpt2",
            "llama",
            "modernbert",
            "t5",
            "esm",
            "vit",
            "torch-post",
            "torch-pre",
        )
        for h in ("third", "mean", "maximum", "third of rolled", "first and fourth")
    ],
)
def of_family(family: str, name: str) -> Trial:
    """No module at all, on the last hidden states of another family."""
    one = subject(family)
    torch.manual_seed(4)
    weight, head = torch.randn(HIDDEN, 3).to(DOUBLE), _family_head(name)

    def forward(inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        if family in ("torch-post", "torch-pre"):
            states = one.model.states(inputs, mask)
        elif mask is None:
            states = one.encoder(inputs).last_hidden_state
        else:
            states = one.encoder(inputs, attention_mask=mask).last_hidden_state
        kept = torch.ones(states.shape[:2]) if mask is None else mask
        return head(states, kept[..., None].to(states)) @ weight

    return one.trial(forward)


# Models of transformers with other heads


def _questions() -> Subject:
    one = subject("bert")
    torch.manual_seed(5)
    model = models.randomize(
        transformers.BertForQuestionAnswering(
            transformers.BertConfig(**{**models.SIZES, "num_labels": 2})
        )
    )
    one.model = model.double().eval()
    one.encoder = one.model.bert
    return one


@case(KIND, RIGHT, [("start", 2), ("end", 4), ("start", None), ("end", None)])
def question_answering(which: str, token: int | None) -> Trial:
    """Start and end logits of a token, or the largest of them."""
    one = _questions()

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        output = one.model(ids, attention_mask=mask)
        logits = output[f"{which}_logits"].masked_fill(mask == 0, -1e9)
        return logits if token is not None else logits.amax(-1)

    twin = one.twin(forward)
    logits = one.model.qa_outputs(twin.states[-1])[..., 0 if which == "start" else 1]
    best = logits.masked_fill(one.mask == 0, -1e9).argmax(-1)
    truth = twin.rollout()[_ROWS, best if token is None else token]
    return Scores(
        lambda: GlobEnc(forward).attribute(one.inputs, token, one.arguments), truth
    )


@case(KIND, RIGHT, [((2, 57),), ((0, 3),)])
def masked_language_model(target: tuple[int, int]) -> Trial:
    """The logit of a word at a token."""
    one = subject("bert")
    torch.manual_seed(5)
    model = models.randomize(
        transformers.BertForMaskedLM(transformers.BertConfig(**models.SIZES))
    )
    one.model = model.double().eval()
    one.encoder = one.model.bert
    truth = one.twin().rollout()[:, target[0]]
    return Scores(
        lambda: GlobEnc(one.model).attribute(one.inputs, target, one.arguments), truth
    )


@case(KIND, EITHER, [(0,), (1,)])
def multiple_choice(target: int) -> Trial:
    """Every choice is explained by itself, whichever the target is."""
    one = subject("bert", lengths=(6, 6, 6, 6))
    torch.manual_seed(5)
    model = models.randomize(
        transformers.BertForMultipleChoice(transformers.BertConfig(**models.SIZES))
    )
    one.model = model.double().eval()
    one.encoder = one.model.bert
    ids = one.inputs.view(2, 2, 6)
    one.mask, one.inputs = None, ids
    truth = one.twin().rollout()[:, 0].view(2, 2, 6)
    return Scores(lambda: GlobEnc(one.model).attribute(ids, target), truth)


# Another model in the head


@case(KIND, RIGHT, [("beside",), ("on top",)])
def second_encoder_in_the_head(where: str) -> Trial:
    """The one to explain is named; the other is a part of the head."""
    one, other = subject("bert"), subject("electra")
    parts = Parts.make()
    width = torch.randn(HIDDEN, 16, generator=torch.Generator().manual_seed(6))

    def read(states: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        if where == "beside":
            second = other.encoder(ids, attention_mask=mask).last_hidden_state
            return parts.classify(states[:, 3] + second[:, 0])
        second = other.encoder(
            inputs_embeds=states @ width.to(states), attention_mask=mask
        ).last_hidden_state
        return parts.classify(second[:, 0])

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        states = one.encoder(ids, attention_mask=mask).last_hidden_state
        return read(states, ids, mask)

    twin = one.twin(lambda ids, mask: one.encoder(ids, attention_mask=mask))
    leaf = twin.states[-1].requires_grad_()
    output = read(leaf, one.inputs, one.mask)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad(output[:, 1].sum(), leaf)
    truth = (shares([grad]) @ twin.rollout())[:, 0]
    globenc = GlobEnc(forward, encoder=one.encoder)
    return Scores(lambda: globenc.attribute(one.inputs, 1, one.arguments), truth)


@case(KIND, REFUSED)
def second_encoder_and_nobody_says_which() -> Trial:
    """Two could be explained."""
    one, other = subject("bert"), subject("electra")
    parts = Parts.make()

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        first = one.encoder(ids, attention_mask=mask).last_hidden_state
        second = other.encoder(ids, attention_mask=mask).last_hidden_state
        return parts.classify(first[:, 0] + second[:, 0])

    return one.trial(forward, truth=None)


# Heads that mix examples


@case(KIND, REFUSED, [("flipped",), ("rolled mean",), ("compared",)])
def examples_mixed(what: str) -> Trial:
    """The output of an example is of another's tokens."""
    heads: dict[str, Head] = {
        "flipped": lambda r: _classify(r, r.last.flip(0)[:, 0]),
        "rolled mean": lambda r: _classify(r, r.last.roll(1, 0).mean(1)),
        "compared": lambda r: r.last[:, 0] @ r.last[:, 0].T,
    }
    return trial(heads[what], 1, lengths=(7, 7), truth=None)
