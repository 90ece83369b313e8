"""Attention of one's own: registered, patched in, or in place of a module."""

# Small functions are what their names say.
# ruff: noqa: D103

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention as attend_by_name
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from benchmarks.mutations.attending import Attend, Call, attention_function
from benchmarks.mutations.campaign import (
    EITHER,
    REFUSED,
    RIGHT,
    Trial,
    add,
    case,
    patch,
)
from benchmarks.mutations.models import (
    HEADS,
    Subject,
    TorchClassifier,
    subject,
)
from benchmarks.mutations.twin import tap
from tests import oracle

KIND = "attention"


# Softmax times values, with logits of one's own


def plain(c: Call) -> Tensor:
    return c.product(c.softmax())


def hot(c: Call) -> Tensor:
    return c.product(c.logits(5).softmax(-1))


def cold(c: Call) -> Tensor:
    return c.product(c.logits(0.2).softmax(-1))


def hot_by_torch(c: Call) -> Tensor:
    return functional.scaled_dot_product_attention(
        c.query * 5, c.key, c.value, c.mask, scale=c.scaling
    )


def hot_by_name(c: Call) -> Tensor:
    tap(c.logits(5).softmax(-1), c.value)
    return attend_by_name(c.query * 5, c.key, c.value, c.mask, scale=c.scaling)


def distances(c: Call) -> Tensor:
    tokens = torch.arange(c.query.shape[2])
    return (tokens[:, None] - tokens).abs()


def biased(c: Call) -> Tensor:
    slopes = torch.linspace(0.1, 0.5, c.query.shape[1])[:, None, None]
    return c.product((c.logits() - slopes * distances(c)).softmax(-1))


def windowed(c: Call) -> Tensor:
    far = distances(c) > 1
    return c.product(c.logits().masked_fill(far, -torch.inf).softmax(-1))


def hides_the_third(c: Call) -> Tensor:
    hidden = torch.arange(c.query.shape[2]) == 2
    alone = torch.eye(c.query.shape[2]).bool()
    logits = c.logits().masked_fill(hidden & ~alone, -torch.inf)
    return c.product(logits.softmax(-1))


def top_three(c: Call) -> Tensor:
    logits = c.logits()
    least = logits.topk(3, -1).values[..., -1:]
    return c.product(logits.masked_fill(logits < least, -torch.inf).softmax(-1))


def by_einsum(c: Call) -> Tensor:
    alpha = functional.softmax(c.logits(3), -1)
    tap(alpha, c.value)
    return torch.einsum("bhij,bhjd->bhid", alpha, c.value)


def by_bmm(c: Call) -> Tensor:
    alpha = torch.softmax(c.logits(3), -1)
    tap(alpha, c.value)
    product = torch.bmm(alpha.flatten(0, 1), c.value.flatten(0, 1))
    return product.view_as(c.query)


def softmax_in_float(c: Call) -> Tensor:
    alpha = functional.softmax(c.logits(3), -1, dtype=torch.float32)
    return c.product(alpha.to(c.value.dtype))


def dropout_that_is_off(c: Call) -> Tensor:
    alpha = nn.Softmax(-1)(c.logits(3))
    return c.product(functional.dropout(alpha, 0.5, training=False))


# Weights that are made otherwise, or changed after the softmax


def exponentials(c: Call) -> Tensor:
    logits = c.logits(3)
    alpha = (logits - logits.amax(-1, keepdim=True)).exp()
    return c.product(alpha / alpha.sum(-1, keepdim=True))


def exp_of_log_softmax(c: Call) -> Tensor:
    return c.product(c.logits(3).log_softmax(-1).exp())


def cloned(c: Call) -> Tensor:
    return c.product(c.logits(3).softmax(-1).clone())


def through_numpy(c: Call) -> Tensor:
    alpha = c.logits(3).softmax(-1).detach().numpy()
    return c.product(torch.from_numpy(alpha.copy()))


def queries_in_chunks(c: Call) -> Tensor:
    alphas = c.logits(3).softmax(-1)
    tap(alphas, c.value)
    chunks = c.logits(3).split(3, -2)
    return torch.cat([chunk.softmax(-1) @ c.value for chunk in chunks], -2)


def head_by_head(c: Call) -> Tensor:
    tap(c.logits(3).softmax(-1), c.value)
    heads = range(c.query.shape[1])
    logits = c.logits(3)
    return torch.stack([logits[:, h].softmax(-1) @ c.value[:, h] for h in heads], 1)


def mean_of_two(c: Call) -> Tensor:
    return c.product((c.softmax() + c.logits(5).softmax(-1)) / 2)


def sum_of_two_products(c: Call) -> Tensor:
    first, second = c.softmax(), c.logits(5).softmax(-1)
    tap((first + second) / 2, c.value)
    return (first @ c.value + second @ c.value) / 2


def differential(c: Call) -> Tensor:
    return c.product(c.softmax() - 0.4 * c.logits(0.5).softmax(-1))


def twice_the_same(c: Call) -> Tensor:
    alpha = c.logits(3).softmax(-1)
    _ = alpha @ c.value
    return c.product(alpha)


def first_result_is_thrown_away(c: Call) -> Tensor:
    _ = c.softmax() @ c.value
    return c.product(c.logits(5).softmax(-1))


def renormalised(c: Call) -> Tensor:
    alpha = c.softmax()
    alpha = alpha * (alpha >= alpha.topk(2, -1).values[..., -1:])
    return c.product(alpha / alpha.sum(-1, keepdim=True))


def clamped(c: Call) -> Tensor:
    return c.product(c.softmax().clamp(0.0, 0.2))


def gated_heads(c: Call) -> Tensor:
    gates = torch.linspace(0.1, 1.0, c.query.shape[1])[:, None, None]
    return c.product((gates * c.softmax()).to(c.value.dtype))


def two_heads_only(c: Call) -> Tensor:
    kept = (torch.arange(c.query.shape[1]) < 2)[:, None, None]
    return c.product(c.softmax() * kept)


def talking_heads(c: Call) -> Tensor:
    heads = c.query.shape[1]
    talk = (torch.eye(heads) + 0.5 * torch.eye(heads).roll(1, 0)).to(c.query.dtype)
    return c.product(torch.einsum("gh,bhij->bgij", talk, c.softmax()))


def halved_in_place(c: Call) -> Tensor:
    alpha = c.softmax()
    alpha *= 0.5
    return c.product(alpha)


def first_column_zeroed_in_place(c: Call) -> Tensor:
    alpha = c.softmax()
    alpha[..., 0] = 0
    return c.product(alpha)


def masked_again(c: Call) -> Tensor:
    return c.product(c.softmax().masked_fill(distances(c) > 2, 0.0))


def identity_added(c: Call) -> Tensor:
    eye = torch.eye(c.query.shape[2]).to(c.query.dtype)
    return c.product(c.softmax() + 0.5 * eye)


def squared(c: Call) -> Tensor:
    alpha = c.softmax() ** 2
    return c.product(alpha / alpha.sum(-1, keepdim=True))


def rounded(c: Call) -> Tensor:
    return c.product((c.softmax() * 8).round() / 8)


def transposed(c: Call) -> Tensor:
    return c.product(c.softmax().mT)


def over_the_wrong_axis(c: Call) -> Tensor:
    return c.product(c.logits().softmax(-2))


def weights_of_another_example(c: Call) -> Tensor:
    return c.product(c.softmax().roll(1, 0))


def off_by_one(c: Call) -> Tensor:
    logits = functional.pad(c.logits(), (0, 1))
    return c.product(logits.softmax(-1)[..., :-1])


def sink_without_value(c: Call) -> Tensor:
    return functional.scaled_dot_product_attention(
        c.query,
        functional.pad(c.key, (0, 0, 0, 1)),
        functional.pad(c.value, (0, 0, 0, 1)),
        functional.pad(c.mask, (0, 1)).expand(len(c.query), -1, -1, -1),
        scale=c.scaling,
    )


def sink_with_a_value(c: Call) -> Tensor:
    alpha = functional.pad(c.logits(), (0, 1)).softmax(-1)
    tap(alpha[..., :-1], c.value)
    return alpha @ functional.pad(c.value, (0, 0, 0, 1), value=0.7)


def sigmoid(c: Call) -> Tensor:
    return c.product(c.logits().sigmoid())


def rectified(c: Call) -> Tensor:
    alpha = c.logits().relu()
    return c.product(alpha / (alpha.sum(-1, keepdim=True) + 1e-3))


def scaled_after(c: Call) -> Tensor:
    alpha = c.softmax()
    tap(1.3 * alpha, c.value)
    return 1.3 * (alpha @ c.value)


def first_head_doubled_after(c: Call) -> Tensor:
    alpha = c.softmax()
    factor = torch.ones(c.query.shape[1], 1, 1, dtype=c.query.dtype)
    factor[0] = 2
    tap(factor * alpha, c.value)
    return factor * (alpha @ c.value)


def decoy_afterwards(c: Call) -> Tensor:
    context = c.product(c.logits(5).softmax(-1))
    _ = c.softmax() @ c.value
    return context


def attended_for_nothing(c: Call) -> Tensor:
    _ = c.softmax() @ c.value
    even = torch.ones_like(c.softmax()) / c.value.shape[2]
    tap(even, c.value)
    return c.value.mean(-2, keepdim=True).expand_as(c.value)


def softmax_of_softmax(c: Call) -> Tensor:
    return c.product((4 * c.softmax()).softmax(-1))


def product_of_transposes(c: Call) -> Tensor:
    alpha = c.logits(3).softmax(-1)
    tap(alpha, c.value)
    return (c.value.mT @ alpha.mT).mT


def sum_of_elements(c: Call) -> Tensor:
    alpha = c.logits(3).softmax(-1)
    tap(alpha, c.value)
    return (alpha[..., None] * c.value[:, :, None]).sum(-2)


def by_einsum_in_another_order(c: Call) -> Tensor:
    alpha = c.logits(3).softmax(-1)
    tap(alpha, c.value)
    return torch.einsum("bhjd,bhij->bhid", c.value, alpha)


def by_torch_in_two_chunks(c: Call) -> Tensor:
    tap(c.logits(2).softmax(-1), c.value)
    mask = c.mask.expand(len(c.query), c.query.shape[1], *c.mask.shape[-2:])
    parts = [
        attend_by_name(2 * q, c.key, c.value, m, scale=c.scaling)
        for q, m in zip(c.query.split(4, 2), mask.split(4, 2))
    ]
    return torch.cat(parts, 2)


def by_torch_in_two_groups_of_heads(c: Call) -> Tensor:
    tap(c.logits(2).softmax(-1), c.value)
    mask = c.mask.expand(len(c.query), c.query.shape[1], *c.mask.shape[-2:])
    each = [t.split(2, 1) for t in (2 * c.query, c.key, c.value, mask)]
    return torch.cat([attend_by_name(*g, scale=c.scaling) for g in zip(*each)], 1)


def by_torch_one_example_at_a_time(c: Call) -> Tensor:
    tap(c.logits(2).softmax(-1), c.value)
    mask = c.mask.expand(len(c.query), c.query.shape[1], *c.mask.shape[-2:])
    each = [t.split(1, 0) for t in (2 * c.query, c.key, c.value, mask)]
    return torch.cat([attend_by_name(*g, scale=c.scaling) for g in zip(*each)], 0)


# Values that are not those of the layer's own tokens


def values_rolled(c: Call) -> Tensor:
    alpha = c.softmax()
    tap(alpha.roll(-1, -1), c.value)
    return alpha @ c.value.roll(1, -2)


def values_rolled_by_torch(c: Call) -> Tensor:
    tap(c.softmax().roll(-1, -1), c.value)
    rolled = c.value.roll(1, -2)
    return attend_by_name(c.query, c.key, rolled, c.mask, scale=c.scaling)


def values_of_neighbours(c: Call) -> Tensor:
    alpha = c.softmax()
    tap((alpha + alpha.roll(-1, -1)) / 2, c.value)
    return alpha @ ((c.value + c.value.roll(1, -2)) / 2)


def values_of_other_heads(c: Call) -> Tensor:
    return c.product(c.softmax(), c.value.roll(1, 1))


def values_scaled(c: Call) -> Tensor:
    return c.product(c.softmax(), c.value * 1.2)


def values_shifted(c: Call) -> Tensor:
    return c.product(c.softmax(), c.value + 0.5)


def one_value_zeroed(c: Call) -> Tensor:
    kept = (torch.arange(c.query.shape[2]) != 1)[:, None]
    return c.product(c.softmax(), c.value * kept)


def values_normed(c: Call) -> Tensor:
    return c.product(c.softmax(), functional.normalize(c.value, dim=-1))


def values_of_another_example(c: Call) -> Tensor:
    return c.product(c.softmax(), c.value.flip(0))


def values_of_the_first_layer(c: Call) -> Tensor:
    return c.product(c.softmax(), c.first.get("value", c.value))


def values_with_those_of_the_first(c: Call) -> Tensor:
    return c.product(c.softmax(), (c.value + c.first.get("value", c.value)) / 2)


def values_of_another_sequence(c: Call) -> Tensor:
    torch.manual_seed(0)
    return c.product(c.softmax(), torch.randn_like(c.value))


def relative_values(c: Call) -> Tensor:
    tokens = torch.arange(c.query.shape[2])
    offset = (tokens[:, None] - tokens)[..., None].to(c.value)
    alpha = c.softmax()
    added = torch.einsum(
        "bhij,ijd->bhid",
        alpha,
        0.1 * offset.expand(*offset.shape[:2], c.value.shape[-1]),
    )
    return c.product(alpha) + added


def dropout_that_is_on(c: Call) -> Tensor:
    return c.product(functional.dropout(c.softmax(), 0.5, training=True))


def dropout_by_torch(c: Call) -> Tensor:
    return functional.scaled_dot_product_attention(
        c.query, c.key, c.value, c.mask, dropout_p=0.5, scale=c.scaling
    )


SOFTMAX: tuple[Attend, ...] = (
    plain,
    hot,
    cold,
    hot_by_torch,
    hot_by_name,
    biased,
    windowed,
    hides_the_third,
    top_three,
    by_einsum,
    by_bmm,
    softmax_in_float,
    dropout_that_is_off,
)
OTHERS: tuple[Attend, ...] = (
    exponentials,
    exp_of_log_softmax,
    cloned,
    through_numpy,
    queries_in_chunks,
    head_by_head,
    mean_of_two,
    sum_of_two_products,
    differential,
    twice_the_same,
    first_result_is_thrown_away,
    renormalised,
    clamped,
    gated_heads,
    two_heads_only,
    talking_heads,
    halved_in_place,
    first_column_zeroed_in_place,
    masked_again,
    identity_added,
    squared,
    rounded,
    transposed,
    over_the_wrong_axis,
    weights_of_another_example,
    off_by_one,
    sink_without_value,
    sink_with_a_value,
    sigmoid,
    rectified,
    scaled_after,
    first_head_doubled_after,
    decoy_afterwards,
    attended_for_nothing,
    softmax_of_softmax,
    product_of_transposes,
    sum_of_elements,
    by_einsum_in_another_order,
    by_torch_in_two_chunks,
    by_torch_in_two_groups_of_heads,
    by_torch_one_example_at_a_time,
    values_rolled,
    values_rolled_by_torch,
    values_of_neighbours,
    values_of_other_heads,
    values_scaled,
    values_shifted,
    one_value_zeroed,
    values_normed,
)
#: No scores are right: what is mixed in is of no token here, or left to chance.
NEVER: tuple[Attend, ...] = (
    values_of_another_example,
    values_of_the_first_layer,
    values_with_those_of_the_first,
    values_of_another_sequence,
    relative_values,
    dropout_that_is_on,
    dropout_by_torch,
)
REGISTERED = (
    "bert",
    "llama",
    "vit",
    "distilbert",
    "gpt2",
    "modernbert",
    "t5",
    "albert",
    "electra",
    "clip_text_model",
    "dinov2",
    "roberta",
    "qwen3",
    "esm",
    "nomic_bert",
)
PATCHED = ("bert", "gpt2", "vit", "llama", "distilbert", "electra", "modernbert")
#: Families whose attention knows the number of its layer.
NUMBERED = ("bert", "gpt2", "llama", "roberta")


def modelling_module(one: Subject) -> Any:
    """The module in which a family's attention is defined."""
    kind = type(one.part("attention")).__module__
    return importlib.import_module(kind)


def registered(attend: Attend, family: str, only: int | None = None) -> Trial:
    """The attention function is registered with transformers by a name."""
    name = f"campaign_{attend.__name__}"
    AttentionInterface.register(name, attention_function(attend, only))
    AttentionMaskInterface.register(name, eager_mask)
    one = subject(family, attention=name)
    return one.trial(truth=None) if attend in NEVER else one.trial()


def patched(attend: Attend, family: str, only: int | None = None) -> Trial:
    """The eager attention function is replaced in the module of the model."""
    one = subject(family, attention="eager")
    patch(
        modelling_module(one),
        "eager_attention_forward",
        attention_function(attend, only),
    )
    return one.trial(truth=None) if attend in NEVER else one.trial()


def _register_all() -> None:
    some = cycle(REGISTERED)
    eager = cycle(PATCHED)
    for group, accept in ((SOFTMAX, RIGHT), (OTHERS, EITHER), (NEVER, REFUSED)):
        for attend in group:
            # A layer's number is needed to know another layer's values.
            known = "first" in attend.__name__ and attend in NEVER
            families = ["bert", "gpt2"] if known else list(islice(some, 2))
            routes = [(registered, family, None) for family in families]
            routes.append((patched, "llama" if known else next(eager), None))
            if attend in (hot, values_rolled, halved_in_place, sigmoid):
                routes += [(registered, family, 1) for family in NUMBERED]
            for route, family, only in routes:
                words = [attend.__name__.replace("_", " "), route.__name__, family]
                if only is not None:
                    words.append(f"layer {only} only")
                make = _made(route, attend, family, only)
                add(KIND, ", ".join(words), accept, make)


def _made(route: Any, *arguments: Any) -> Callable[[], Trial]:
    return lambda: route(*arguments)


_register_all()


# An attention module whose forward is one's own


def _own_forward(attend: Attend, self: nn.Module) -> Callable[..., Any]:
    """BERT's attention module, written by hand."""

    def forward(states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        def heads(linear: nn.Module, of: Tensor) -> Tensor:
            return linear(of).unflatten(-1, (HEADS, -1)).transpose(1, 2)

        query, key, value = (
            heads(linear, states) for linear in (self.query, self.key, self.value)
        )
        tokens = query.shape[2]
        mask = query.new_zeros(1, 1, tokens, tokens)
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            mask = mask.masked_fill(~attention_mask, -torch.inf)
        elif attention_mask is not None:
            mask = mask + attention_mask
        call = Call(self, query, key, value, mask, self.scaling, {})
        return attend(call).transpose(1, 2).flatten(2), None

    return forward


@case(
    KIND,
    RIGHT,
    [(a, f) for a in (hot, hot_by_torch, hot_by_name) for f in ("bert", "electra")],
)
def own_module(attend: Attend, family: str) -> Trial:
    """Nothing of the model's own attention function is called."""
    one = subject(family)
    for layer in range(3):
        attention = one.part("attention", layer)
        patch(attention, "forward", _own_forward(attend, attention))
    return one.trial()


@case(
    KIND,
    EITHER,
    [(a,) for a in (queries_in_chunks, head_by_head, sigmoid, values_rolled)],
)
def own_module_in_one_layer(attend: Attend) -> Trial:
    """The other layers attend as ever."""
    one = subject("bert")
    attention = one.part("attention", 1)
    patch(attention, "forward", _own_forward(attend, attention))
    return one.trial()


def _twice(c: Call) -> Tensor:
    """The second call takes the first one's result as queries."""
    _ = attend_by_name(c.query, c.key, c.value, c.mask, scale=c.scaling)
    context = attend_by_name(c.query * 2, c.key, c.value, c.mask, scale=c.scaling)
    tap(c.logits(2).softmax(-1), c.value)
    return context


def _of_what_was_attended(c: Call) -> Tensor:
    """Attention to what attention gave."""
    alpha, second = c.softmax(), c.logits(2).softmax(-1)
    tap(second @ alpha, c.value)
    once = attend_by_name(c.query, c.key, c.value, c.mask, scale=c.scaling)
    return attend_by_name(c.query * 2, c.key, once, c.mask, scale=c.scaling)


@case(KIND, EITHER, [(_twice,), (_of_what_was_attended,)])
def attention_in_a_row(attend: Attend) -> Trial:
    """Two attentions in one layer."""
    return own_module(attend, "bert")


# torch.nn.MultiheadAttention


def _remade(one: Subject, kind: type[nn.MultiheadAttention], **options: Any) -> None:
    """Give every layer an attention of this class, with the weights it had."""
    for layer in one.layers:
        old = layer.self_attn
        new = kind(old.embed_dim, old.num_heads, batch_first=True, **options)
        new.load_state_dict(old.state_dict(), strict=False)
        layer.self_attn = new.to(one.dtype).eval()
        # Torch's fused layers would not ask it.
        layer.activation_relu_or_gelu = 0


@case(KIND, RIGHT, [(f, a) for f in ("torch-post", "torch-pre") for a in (True, False)])
def multihead_with_weights(family: str, average: bool) -> Trial:
    """Torch's attention computes its weights where they are wanted."""
    one = subject(family)
    truth = one.truth()
    for layer in one.layers:
        patch(layer, "_sa_block", _weighing(layer.self_attn, average))
        layer.activation_relu_or_gelu = 0
    return one.trial(truth=truth)


def _weighing(attention: nn.Module, average: bool) -> Callable[..., Tensor]:
    def block(
        x: Tensor, attn_mask: Tensor, key_padding_mask: Tensor, is_causal: bool = False
    ) -> Tensor:
        return attention(
            x, x, x, key_padding_mask, True, attn_mask, average, is_causal=is_causal
        )[0]

    return block


class Weighing(nn.MultiheadAttention):
    """Makes its weights whether they are wanted or not."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As ever, with weights."""
        return super().forward(*args, **{**kwargs, "need_weights": True})


@case(KIND, EITHER, [("torch-post",), ("torch-pre",)])
def multihead_that_always_weighs(family: str) -> Trial:
    """A class of one's own asks for the weights."""
    one = subject(family)
    truth = one.truth()
    _remade(one, Weighing)
    return one.trial(truth=truth)


@case(KIND, RIGHT, [("torch-post", False), ("torch-pre", False), ("torch-post", True)])
def multihead_on_the_fast_path(family: str, nested: bool) -> Trial:
    """Fused layers, and padding left out of them."""
    one = subject(family)
    one.encoder.enable_nested_tensor = nested
    truth = one.truth()

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            states = one.model.states(ids, mask)
        return one.model.head(states[:, 0])

    return one.trial(forward, truth)


@case(KIND, RIGHT, [("bool",), ("float",)])
def multihead_causal(kind: str) -> Trial:
    """A mask that hides later tokens, and a head on the last."""
    one = subject("torch-post", lengths=(7, 7))
    hidden = torch.ones(7, 7).triu(1).bool()
    if kind == "float":
        hidden = torch.zeros(7, 7).double().masked_fill(hidden, -torch.inf)

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        states = one.model.tokens(ids) + one.model.positions(torch.arange(7))
        return one.model.head(one.model.stack(states, mask=hidden)[:, -1])

    return one.trial(forward)


class RolledValues(nn.MultiheadAttention):
    """The values are those of the tokens before."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        """As ever, on rolled values."""
        return super().forward(query, key, value.roll(1, 1), **kwargs)


class OtherExample(nn.MultiheadAttention):
    """The values are those of another example."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        """As ever, on the values of another example."""
        return super().forward(query, key, value.flip(0), **kwargs)


class ScaledOutput(nn.MultiheadAttention):
    """The result is scaled."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As ever, times 1.3."""
        output, weights = super().forward(*args, **kwargs)
        return 1.3 * output, weights


class HotQueries(nn.MultiheadAttention):
    """The queries are of something larger."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        """As ever, with larger queries."""
        return super().forward(3 * query, key, value, **kwargs)


@case(KIND, RIGHT, [("torch-post",), ("torch-pre",)])
def multihead_with_hot_queries(family: str) -> Trial:
    """Logits of one's own."""
    one = subject(family)
    _remade(one, HotQueries)
    return one.trial()


@case(KIND, REFUSED, [("torch-post",), ("torch-pre",)])
def multihead_with_rolled_values(family: str) -> Trial:
    """The next token's share would be given to another."""
    one = subject(family)
    _remade(one, RolledValues)
    return one.trial(truth=None)


@case(KIND, REFUSED, [("torch-post",), ("torch-pre",)])
def multihead_of_another_example(family: str) -> Trial:
    """The values are of no token of the example."""
    one = subject(family)
    _remade(one, OtherExample)
    return one.trial(truth=None)


@case(KIND, REFUSED, [("torch-post",), ("torch-pre",)])
def multihead_scaled_after(family: str) -> Trial:
    """The layer's identity does not hold."""
    one = subject(family)
    _remade(one, ScaledOutput)
    return one.trial(truth=None)


@case(KIND, EITHER, [("add_zero_attn",), ("add_bias_kv",)])
def multihead_with_one_more_key(option: str) -> Trial:
    """A sink, with a value of its own or without."""
    one = subject("torch-post")
    _remade(one, nn.MultiheadAttention, **{option: True})
    for layer in one.layers:
        for bias in (layer.self_attn.bias_k, layer.self_attn.bias_v):
            if bias is not None:
                nn.init.normal_(bias)
    return one.trial()


@case(KIND, EITHER)
def multihead_that_runs_twice() -> Trial:
    """Both results are averaged, one of them of larger queries."""
    one = subject("torch-post")

    class Twice(nn.MultiheadAttention):
        def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            first = super().forward(query, *args, **kwargs)[0]
            return (first + super().forward(3 * query, *args, **kwargs)[0]) / 2, None

    _remade(one, Twice)
    return one.trial(truth=None)


@case(KIND, RIGHT, [(False,), (True,)])
def multihead_with_tokens_first(norm_first: bool) -> Trial:
    """States are (tokens, batch, hidden), and a norm follows the layers."""
    one = subject("torch-pre" if norm_first else "torch-post")
    truth = one.truth()
    for layer in one.layers:
        layer.self_attn.batch_first = False

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        model: TorchClassifier = one.model  # type: ignore[assignment]
        states = model.tokens(ids) + model.positions(torch.arange(ids.shape[1]))
        states = model.stack(states.transpose(0, 1), src_key_padding_mask=mask == 0)
        return model.head(states[0])

    return one.trial(forward, truth)


# Families that compute attention by themselves


@case(KIND, EITHER, [("deberta-v2",), ("mpnet",), ("roformer",)])
def families_of_their_own(family: str) -> Trial:
    """What the model says of its attention weights is the truth."""
    return _of_their_own(family)


def _of_their_own(family: str) -> Trial:
    import transformers as t

    from tests import models

    kind = {"deberta-v2": "DebertaV2", "mpnet": "MPNet", "roformer": "RoFormer"}[family]
    options: dict[str, Any] = dict(models.SIZES)
    if family == "deberta-v2":
        options |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    torch.manual_seed(0)
    model = getattr(t, f"{kind}ForSequenceClassification")(
        getattr(t, f"{kind}Config")(**options)
    )
    model = models.randomize(model).double().eval()
    ids, mask = models.padded([models.sentence(n, seed=n) for n in (8, 5)])
    encoder = getattr(model, family.partition("-")[0])
    recipe = oracle.BERT_LIKE
    if family == "mpnet":
        recipe = oracle.replace(
            recipe,
            value="attention.attn.v",
            output="attention.attn.o",
            norm1="attention.LayerNorm",
        )
    if family == "deberta-v2":
        recipe = oracle.replace(recipe, value="attention.self.value_proj")
    one = Subject(family, model, encoder, recipe, ids, mask, torch.float64)
    return one.trial(truth=_by_returned_weights(one))


def _by_returned_weights(one: Subject) -> Tensor:
    """The truth from the weights that each attention module returns."""
    values: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        values.append(output.unflatten(-1, (HEADS, -1)).transpose(1, 2))

    def attended(_: nn.Module, __: Any, output: Any) -> None:
        weights = [o for o in output[1:] if isinstance(o, Tensor) and o.ndim == 4]
        tap(weights[0], values[-1])

    hooks = []
    owner = one.recipe.value.rpartition(".")[0]
    for layer in one.layers:
        value = layer.get_submodule(one.recipe.value)
        hooks.append(value.register_forward_hook(keep))
        hooks.append(layer.get_submodule(owner).register_forward_hook(attended))

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        return one.model(ids, attention_mask=mask, output_attentions=True).logits

    truth = one.truth(forward)
    for hook in hooks:
        hook.remove()
    return truth
