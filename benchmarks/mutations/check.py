"""``check_model`` must see tokens and examples that meet outside of attention."""

# Small functions are what their names say.
# ruff: noqa: D103

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from benchmarks.mutations.attending import Attend, Call, attention_function
from benchmarks.mutations.attention import modelling_module
from benchmarks.mutations.campaign import (
    EITHER,
    REFUSED,
    RIGHT,
    Seen,
    Trial,
    case,
    patch,
)
from benchmarks.mutations.models import ALL, Subject, subject
from benchmarks.mutations.structure import Change, hooked, hooked_before
from captum_globenc.support import check_model

KIND = "check_model"


def _checked(one: Subject, is_legal: bool = False, default: bool = False) -> Trial:
    """Two texts of one length, or two images; by default the package's own."""
    inputs = () if default else (one.inputs,)
    return Seen(lambda: check_model(one.model, *inputs), is_legal)


def _subject(family: str, attention: str = "sdpa") -> Subject:
    return subject(family, attention=attention, lengths=(9, 9))


@case(KIND, RIGHT, [(family,) for family in ALL])
def nothing_changed(family: str) -> Trial:
    """There is nothing to see."""
    return _checked(_subject(family), is_legal=True)


@case(KIND, RIGHT, [(f, d) for f in ("bert", "llama", "vit") for d in ("bf16", "fp32")])
def nothing_changed_in_another_dtype(family: str, kind: str) -> Trial:
    """Nor in a coarser one."""
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    return _checked(subject(family, dtype, lengths=(9, 9)), is_legal=True)


@case(KIND, RIGHT, [("bert",), ("gpt2",), ("vit",)])
def nothing_changed_for_random_inputs(family: str) -> Trial:
    """Nor by what is drawn where nothing is given."""
    return _checked(_subject(family), is_legal=True, default=True)


# How tokens may meet


def shifted_by_one(states: Tensor) -> Tensor:
    return states.roll(1, 1)


def shifted_by_two(states: Tensor) -> Tensor:
    return states.roll(2, 1)


def shifted_by_four(states: Tensor) -> Tensor:
    return states.roll(4, 1)


def one_third_of_the_second_before(states: Tensor) -> Tensor:
    return states + states.roll(2, 1) / 3


def convolved(states: Tensor) -> Tensor:
    kernel = torch.tensor([0.25, 0.5, 0.25]).to(states).expand(states.shape[-1], 1, 3)
    return functional.conv1d(
        states.mT, kernel, padding=1, groups=len(kernel)
    ).mT.contiguous()


def mean_added(states: Tensor) -> Tensor:
    return states + states.mean(1, keepdim=True)


def third_taken_from_sixth(states: Tensor) -> Tensor:
    return torch.cat([states[:, :2], states[:, 5:6], states[:, 3:]], 1)


def gated_by_the_mean(states: Tensor) -> Tensor:
    return states * states.mean((1, 2), keepdim=True).sigmoid()


def examples_flipped(states: Tensor) -> Tensor:
    return states.flip(0)


def mean_of_examples_taken_away(states: Tensor) -> Tensor:
    return states - states.mean(0, keepdim=True)


def one_token_of_another_example(states: Tensor) -> Tensor:
    other = states.roll(1, 0)
    return torch.cat([states[:, :3], other[:, 3:4], states[:, 4:]], 1)


MIXES: tuple[Change, ...] = (
    shifted_by_one,
    shifted_by_two,
    shifted_by_four,
    one_third_of_the_second_before,
    convolved,
    mean_added,
    third_taken_from_sixth,
    gated_by_the_mean,
    examples_flipped,
    mean_of_examples_taken_away,
    one_token_of_another_example,
)


@case(
    KIND,
    REFUSED,
    [
        (m, f)
        for index, m in enumerate(MIXES)
        for f in (
            ("bert", "llama", "torch-post"),
            ("distilbert", "gpt2", "vit"),
            ("electra", "modernbert", "t5"),
        )[index % 3]
    ],
)
def in_the_feed_forward_part(mix: Change, family: str) -> Trial:
    """No identity of a run is broken."""
    one = _subject(family)
    hooked(one.part("feed_forward", 1), mix)
    for layer in one.layers:
        layer.activation_relu_or_gelu = 0  # not on torch's fast path
    return _checked(one)


@case(
    KIND,
    REFUSED,
    [
        (m, f)
        for index, m in enumerate(MIXES)
        for f in (("bert", "vit"), ("llama", "roberta"), ("gpt2", "distilbert"))[
            index % 3
        ]
    ],
)
def in_the_embeddings(mix: Change, family: str) -> Trial:
    """In front of the first layer."""
    one = _subject(family)
    hooked(one.part("embeddings"), mix)
    return _checked(one)


@case(
    KIND,
    REFUSED,
    [
        (m, f)
        for index, m in enumerate(MIXES)
        for f in (("bert", "llama"), ("vit", "t5"), ("distilbert", "electra"))[
            index % 3
        ]
    ],
)
def in_the_values(mix: Change, family: str) -> Trial:
    """A hook on the projection of values."""
    one = _subject(family)
    hooked(one.part("value", 1), mix)
    return _checked(one)


@case(
    KIND,
    REFUSED,
    [
        (m, f)
        for index, m in enumerate(MIXES[:-1])
        for f in (("bert",), ("vit",), ("llama",), ("gpt2",))[index % 4]
    ],
)
def in_front_of_the_values(mix: Change, family: str) -> Trial:
    """What the projection of values is given; queries and keys are as ever."""
    one = _subject(family)
    if family == "gpt2":
        # One map makes all three.
        hooked_before(one.part("attention", 1).c_attn, mix)
    else:
        hooked_before(one.part("value", 1), mix)
    return _checked(one)


@case(
    KIND,
    REFUSED,
    [
        (m, f)
        for index, m in enumerate(MIXES)
        for f in (("gpt2",), ("llama",), ("vit",), ("torch-pre",))[index % 4]
    ],
)
def in_the_norm_before_attention(mix: Change, family: str) -> Trial:
    """Queries, keys and values are of other tokens."""
    one = _subject(family)
    hooked(one.part("before", 1), mix)
    return _checked(one)


@case(KIND, EITHER, [(shifted_by_one, "bert"), (convolved, "vit"), (mean_added, "t5")])
def in_the_queries(mix: Change, family: str) -> Trial:
    """Logits may come about in any way: a part of attention."""
    one = _subject(family)
    hooked(one.part("query", 1), mix)
    return _checked(one, is_legal=True)


def _attend_with(mix: Change) -> Attend:
    """Attention whose values, (batch, tokens, heads × size), are mixed."""

    def attend(c: Call) -> Tensor:
        together = c.value.transpose(1, 2).flatten(2)
        value = mix(together).unflatten(2, (c.value.shape[1], -1)).transpose(1, 2)
        return functional.scaled_dot_product_attention(
            c.query, c.key, value, c.mask, scale=c.scaling
        )

    return attend


@case(
    KIND,
    REFUSED,
    [
        (m, f)
        for index, m in enumerate(MIXES)
        for f in (("bert", "gpt2"), ("llama", "vit"), ("distilbert", "modernbert"))[
            index % 3
        ]
    ],
)
def in_a_registered_attention(mix: Change, family: str) -> Trial:
    """Values are mixed inside of the attention function."""
    name = f"campaign_mixing_{mix.__name__}"
    AttentionInterface.register(name, attention_function(_attend_with(mix)))
    AttentionMaskInterface.register(name, eager_mask)
    return _checked(_subject(family, attention=name))


@case(
    KIND,
    REFUSED,
    [(m, f) for m in MIXES[:4] + MIXES[-3:] for f in ("bert", "vit")],
)
def in_a_patched_attention(mix: Change, family: str) -> Trial:
    """Likewise where the eager function is replaced."""
    one = _subject(family, attention="eager")
    function = attention_function(_attend_with(mix))
    patch(modelling_module(one), "eager_attention_forward", function)
    return _checked(one)


def _of_the_first_layer(c: Call) -> Tensor:
    value = c.first.get("value", c.value)
    return functional.scaled_dot_product_attention(
        c.query, c.key, value, c.mask, scale=c.scaling
    )


def _with_the_first_layer(c: Call) -> Tensor:
    value = (c.value + c.first.get("value", c.value)) / 2
    return functional.scaled_dot_product_attention(
        c.query, c.key, value, c.mask, scale=c.scaling
    )


@case(
    KIND,
    REFUSED,
    [
        (a, f)
        for a in (_of_the_first_layer, _with_the_first_layer)
        for f in ("bert", "llama", "gpt2")
    ],
)
def values_of_another_layer(attend: Attend, family: str) -> Trial:
    """Value residuals, as some decoders have."""
    name = f"campaign_checked{attend.__name__}"
    AttentionInterface.register(name, attention_function(attend))
    AttentionMaskInterface.register(name, eager_mask)
    return _checked(_subject(family, attention=name))


@case(KIND, REFUSED, [("bert",), ("llama",)])
def values_of_another_sequence(family: str) -> Trial:
    """Values that no token of the text has made."""
    fixed = torch.randn(1, 1, 9, 6, dtype=torch.float64)

    def attend(c: Call) -> Tensor:
        value = fixed.expand_as(c.value)
        return functional.scaled_dot_product_attention(
            c.query, c.key, value, c.mask, scale=c.scaling
        )

    AttentionInterface.register("campaign_fixed", attention_function(attend))
    AttentionMaskInterface.register("campaign_fixed", eager_mask)
    return _checked(_subject(family, attention="campaign_fixed"))


def hot(c: Call) -> Tensor:
    return c.logits(5).softmax(-1) @ c.value


def windowed(c: Call) -> Tensor:
    tokens = torch.arange(c.query.shape[2])
    far = (tokens[:, None] - tokens).abs() > 2
    return c.logits().masked_fill(far, -torch.inf).softmax(-1) @ c.value


def by_torch(c: Call) -> Tensor:
    return functional.scaled_dot_product_attention(
        3 * c.query, c.key, c.value, c.mask, scale=c.scaling
    )


@case(
    KIND,
    RIGHT,
    [(a, f) for a in (hot, windowed, by_torch) for f in ("bert", "llama", "vit")],
)
def legal_attention(attend: Attend, family: str) -> Trial:
    """Logits of one's own, and the values that they should be."""
    name = f"campaign_legal_{attend.__name__}"
    AttentionInterface.register(name, attention_function(attend))
    AttentionMaskInterface.register(name, eager_mask)
    return _checked(_subject(family, attention=name), is_legal=True)


def scaled(states: Tensor) -> Tensor:
    return 1.5 * states


@case(
    KIND,
    RIGHT,
    [(f,) for f in ("bert", "gpt2", "distilbert")],
)
def legal_hook(family: str) -> Trial:
    """Each token by itself."""
    one = _subject(family)
    hooked(one.part("embeddings", 1), scaled)
    return _checked(one, is_legal=True)


@case(KIND, REFUSED, [("bert",), ("gpt2",)])
def mixing_after_the_layers_below(family: str) -> Trial:
    """A layer is given what the layer below did not give."""
    one = _subject(family)
    hooked_before(one.part("layer", 1), shifted_by_two)
    return _checked(one)


@case(KIND, REFUSED, [("layer",), ("output",), ("norm1",)])
def broken_identity(part: str) -> Trial:
    """What each run sees is in the report, too."""
    one = _subject("bert")
    hooked(one.part(part, 1), scaled)
    return _checked(one)


@case(KIND, REFUSED, [("post",), ("pre",)])
def convolution_in_torch_layers(kind: str) -> Trial:
    """A convolution in front of each layer's attention."""
    one = _subject(f"torch-{kind}")
    for layer in one.layers:
        layer.activation_relu_or_gelu = 0
        own = layer._sa_block

        def block(x: Tensor, *args: object, own: Callable = own, **kwargs: object):
            return own(convolved(x), *args, **kwargs)

        patch(layer, "_sa_block", block)
    return _checked(one)
