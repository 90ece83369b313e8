"""Layers that do something else than their family's: hooks, patches, parts replaced."""

# Small functions are what their names say.
# ruff: noqa: D103

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions as Output,
)

from benchmarks.mutations.campaign import (
    EITHER,
    REFUSED,
    RIGHT,
    Scores,
    Trial,
    add,
    case,
    patch,
)
from benchmarks.mutations.models import DOUBLE, HIDDEN, Subject, subject
from captum_globenc import GlobEnc

KIND = "structure"
POST_NORM = ("bert", "distilbert", "albert", "roberta", "electra", "nomic_bert")
PRE_NORM = ("gpt2", "llama", "modernbert", "vit", "xlm-roberta-xl", "t5", "esm")
Change = Callable[[Tensor], Tensor]


# What a hook may do to vectors of tokens, (batch, tokens, hidden)


def rolled(states: Tensor) -> Tensor:
    return states.roll(1, 1)


def flipped_over_the_batch(states: Tensor) -> Tensor:
    return states.flip(0)


def one_token_zeroed(states: Tensor) -> Tensor:
    kept = torch.arange(states.shape[1]) != 1
    return states * kept[:, None]


def another_token_added(states: Tensor) -> Tensor:
    return torch.cat([states[:, :2], states[:, 2:3] + states[:, 1:2], states[:, 3:]], 1)


CHANGES: tuple[Change, ...] = (
    rolled,
    flipped_over_the_batch,
    one_token_zeroed,
    another_token_added,
)


def hooked(module: nn.Module, change: Change) -> None:
    """Change what comes out of a module."""

    def leave(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    module.register_forward_hook(leave)


def hooked_before(module: nn.Module, change: Change) -> None:
    """Change the hidden states that go into a layer."""

    def enter(_: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    module.register_forward_pre_hook(enter, with_kwargs=True)


# Hooks that break a layer's identities

#: (part, layer) → the families that have it.
_PLACES: dict[tuple[str, int], tuple[str, ...]] = {
    ("layer", 0): (*POST_NORM, *PRE_NORM),
    ("layer", 1): ("torch-post", "llama", "distilbert", "vit", "torch-pre", "gpt2"),
    ("layer", 2): ("bert", "gpt2", "roberta", "modernbert", "electra", "llama"),
    ("output", 0): (*PRE_NORM, *POST_NORM),
    ("output", 2): ("bert", "t5", "roberta", "esm", "distilbert", "dinov2"),
    ("norm1", 1): ("bert", "torch-post", "distilbert", "nomic_bert"),
    ("norm2", 1): ("roberta", "electra", "torch-post", "distilbert"),
    ("final", 2): ("gpt2", "llama", "modernbert", "vit", "xlm-roberta-xl", "t5"),
}


def is_top(part: str, layer: int, family: str) -> bool:
    """Whether a part gives the last hidden states."""
    return part == "final" or ((part, layer) == ("layer", 2) and family in POST_NORM)


def accepted(part: str, layer: int, family: str) -> frozenset[str]:
    """A hook on the last hidden states may be taken for a part of the head."""
    return EITHER if is_top(part, layer, family) else REFUSED


def hook_on(
    part: str, layer: int, change: Change, family: str, dtype: torch.dtype = DOUBLE
) -> Trial:
    """A hook changes what a part gives."""
    one = subject(family, dtype)
    hooked(one.part(part, layer), change)
    return one.trial() if is_top(part, layer, family) else one.trial(truth=None)


def scaled_by(units: int, dtype: torch.dtype) -> Change:
    """Scale by 1 and so many rounding units."""
    factor = 1 + units * torch.finfo(dtype).eps

    def scale(states: Tensor) -> Tensor:
        return states * factor

    scale.__name__ = f"scaled by 1 + {units} rounding units"
    return scale


# What must be seen: in half precision ten units, else what exceeds the rounding of sums
# over the hidden size, of a branch that may be a tenth of the sum.
_UNITS = {torch.float32: 100, DOUBLE: 100, torch.bfloat16: 10, torch.float16: 10}


def _register_hooks() -> None:
    for (part, layer), families in _PLACES.items():
        some = cycle(families)
        for change in CHANGES:
            for family in islice(some, 2):
                add_hook(KIND, part, layer, change, family, DOUBLE)
        for times in (1, 5, 50):
            for family, dtype in zip(islice(some, 4), _UNITS):
                if dtype == DOUBLE and family in ("llama", "t5"):
                    dtype = torch.float32  # their norms compute in it
                # What attention adds is but a part of the sum.
                units = times * _UNITS[dtype] * (3 if part == "output" else 1)
                scale = scaled_by(units, dtype)
                add_hook("rounding", part, layer, scale, family, dtype)


def add_hook(
    group: str,
    part: str,
    layer: int,
    change: Change,
    family: str,
    dtype: torch.dtype,
) -> None:
    """Register a case of a hook on a part of a layer."""
    words = change.__name__.replace("_", " ")
    kind = str(dtype).removeprefix("torch.")
    name = f"{part} of layer {layer} {words}, {family}, {kind}"
    accept = accepted(part, layer, family)
    add(group, name, accept, lambda: hook_on(part, layer, change, family, dtype))


_register_hooks()


# Hooks that change what the model computes, but no identity


def _scaled(states: Tensor) -> Tensor:
    return 1.3 * states


@case(
    KIND,
    EITHER,
    [
        (part, change, family)
        for part, families in (
            ("feed_forward", ("bert", "gpt2", "albert", "vit")),
            ("middle", ("gpt2", "llama", "esm")),
        )
        for family in families
        for change in (_scaled, one_token_zeroed)
    ],
)
def legal_hook(part: str, change: Change, family: str) -> Trial:
    """Each token by itself: another model, which may be explained or not."""
    one = subject(family)
    hooked(one.part(part, 1), change)
    return one.trial()


@case(
    KIND,
    EITHER,
    [
        (change, family)
        for change in (_scaled, one_token_zeroed)
        for family in ("bert", "roberta", "distilbert", "llama")
    ],
)
def embeddings_changed(change: Change, family: str) -> Trial:
    """Likewise in front of the first layer; whoever notices may refuse."""
    one = subject(family)
    hooked(one.part("embeddings"), change)
    return one.trial()


@case(
    KIND,
    EITHER,
    [
        (change, family)
        for change in (rolled, flipped_over_the_batch, another_token_added)
        for family in ("bert", "llama", "vit")
    ],
)
def tokens_mixed_in_the_embeddings(change: Change, family: str) -> Trial:
    """Right: the scores are of what enters the first layer, at its position."""
    one = subject(family)
    hooked(one.part("embeddings"), change)
    return one.trial()


@case(KIND, EITHER, [(f,) for f in ("gpt2", "llama", "vit", "torch-pre")])
def norm_in_front_of_attention_scaled(family: str) -> Trial:
    """Values of one's own scale; the true ones are seen."""
    one = subject(family)
    hooked(one.part("before", 1), _scaled)
    return one.trial()


@case(
    KIND,
    REFUSED,
    [
        (c, f)
        for c in (rolled, flipped_over_the_batch, another_token_added)
        for f in ("gpt2", "llama", "vit", "torch-pre", "modernbert")
    ],
)
def norm_in_front_of_attention(change: Change, family: str) -> Trial:
    """Values are made of other tokens than the layer's own."""
    one = subject(family)
    # ModernBERT's first layer has none.
    hooked(one.part("before", 1), change)
    return one.trial(truth=None)


@case(
    KIND,
    RIGHT,
    [(f,) for f in ("bert", "gpt2", "vit", "torch-post")],
)
def hook_that_copies(family: str) -> Trial:
    """Equal numbers in other memory."""
    one = subject(family)
    for layer in range(3):
        hooked(one.part("layer", layer), Tensor.clone)
        hooked_before(one.part("layer", layer), Tensor.clone)
    return one.trial()


# What stands between layers


def _linear_between(states: Tensor) -> Tensor:
    torch.manual_seed(1)
    weight = torch.eye(HIDDEN) + 0.3 * torch.randn(HIDDEN, HIDDEN)
    return states @ weight.to(states.dtype)


def _norm_between(states: Tensor) -> Tensor:
    return functional.layer_norm(states, (HIDDEN,))


def _one_unit_more(states: Tensor) -> Tensor:
    return states * (1 + 20 * torch.finfo(states.dtype).eps)


def _mean_over_neighbours(states: Tensor) -> Tensor:
    return (states + states.roll(1, 1)) / 2


@case(
    KIND,
    REFUSED,
    [
        (change, family)
        for change in (
            rolled,
            flipped_over_the_batch,
            one_token_zeroed,
            _linear_between,
            _norm_between,
            _mean_over_neighbours,
            _one_unit_more,
        )
        for family in ("bert", "gpt2", "torch-post")
    ],
)
def between_two_layers(change: Change, family: str) -> Trial:
    """The second layer does not get what the first one gave."""
    one = subject(family)
    hooked_before(one.part("layer", 1), change)
    return one.trial(truth=None)


@case(KIND, REFUSED, [("bert",), ("distilbert",)])
def tokens_dropped_between_layers(family: str) -> Trial:
    """From the second layer on there are fewer tokens."""
    one = subject(family, lengths=(8,))
    hooked_before(one.part("layer", 1), lambda states: states[:, :6])
    return one.trial(lambda ids, mask: one.forward(ids), truth=None)


@case(KIND, REFUSED, [("bert",), ("distilbert",)])
def tokens_added_in_front_of_the_layers(family: str) -> Trial:
    """A prompt of vectors that are no input."""
    one = subject(family, lengths=(8,))
    hooked_before(
        one.part("layer", 0), lambda states: torch.cat([states[:, 3:5], states], 1)
    )
    return one.trial(lambda ids, mask: one.forward(ids), truth=None)


@case(KIND, EITHER, [("bert",), ("roberta",)])
def mask_of_one_layer(family: str) -> Trial:
    """The second layer hides a token that the others show."""
    one = subject(family, lengths=(8, 8))

    def enter(_: nn.Module, args: Any, kwargs: Any) -> Any:
        mask = torch.ones(8, 8, dtype=torch.bool)
        mask[:, 2] = False
        return (args[0], mask.expand(2, 1, 8, 8), *args[2:]), kwargs

    one.part("layer", 1).register_forward_pre_hook(enter, with_kwargs=True)
    return one.trial()


# Layers: skipped, repeated, in another order


def _list_of(one: Subject) -> tuple[nn.Module, str]:
    owner, _, name = one.recipe.layers.rpartition(".")
    return one.encoder.get_submodule(owner), name


@case(KIND, REFUSED, [(f,) for f in ("bert", "gpt2", "llama", "vit", "torch-post")])
def layer_skipped(family: str) -> Trial:
    """Its forward hands on what it is given."""
    one = subject(family)
    layer = one.part("layer", 1)
    given = layer.forward

    def skip(states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = given(states, *args, **kwargs)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    patch(layer, "forward", skip)
    return one.trial(truth=None)


@case(KIND, REFUSED, [(f,) for f in ("bert", "distilbert", "vit", "torch-pre")])
def layer_repeated(family: str) -> Trial:
    """Its forward runs twice."""
    one = subject(family)
    layer = one.part("layer", 1)
    given = layer.forward

    def twice(states: Tensor, *args: Any, **kwargs: Any) -> Any:
        once = given(states, *args, **kwargs)
        once = once[0] if isinstance(once, tuple) else once
        return given(once, *args, **kwargs)

    patch(layer, "forward", twice)
    return one.trial(truth=None)


@case(KIND, RIGHT, [(f,) for f in ("bert", "gpt2", "vit", "torch-post", "llama")])
def layers_in_another_order(family: str) -> Trial:
    """Another model, which is what its list of layers says."""
    one = subject(family)
    owner, name = _list_of(one)
    setattr(owner, name, nn.ModuleList(reversed(one.layers)))
    return one.trial()


@case(KIND, RIGHT, [(f,) for f in ("bert", "distilbert", "vit", "torch-pre")])
def layer_removed(family: str) -> Trial:
    """A model of two layers, though its config says three."""
    one = subject(family)
    owner, name = _list_of(one)
    setattr(owner, name, nn.ModuleList([one.layers[0], one.layers[2]]))
    return one.trial()


@case(KIND, EITHER, [(f,) for f in ("bert", "distilbert", "vit", "torch-post")])
def layer_twice_in_the_list(family: str) -> Trial:
    """One module is two layers."""
    one = subject(family)
    owner, name = _list_of(one)
    first, second, _ = one.layers
    setattr(owner, name, nn.ModuleList([first, second, first]))
    return one.trial()


@case(KIND, EITHER, [("bert",)])
def layers_run_backwards(family: str) -> Trial:
    """The encoder goes through its list from the end."""
    one = subject(family)

    def forward(states: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        for layer in reversed(one.layers):
            states = layer(states, attention_mask)
        return Output(last_hidden_state=states)

    patch(one.encoder.encoder, "forward", forward)
    rollout = one.twin().rollout()
    return one.trial(truth=rollout[:, 0])


# Residuals


def _with_output(one: Subject, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Make the second layer's output of its output and its input."""
    layer = one.part("layer", 1)
    given = layer.forward

    def forward(states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = given(states, *args, **kwargs)
        if isinstance(output, tuple):
            return (change(output[0], states), *output[1:])
        return change(output, states)

    patch(layer, "forward", forward)


_RESIDUALS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "added once more": lambda output, states: output + states,
    "taken away": lambda output, states: output - states,
    "a little of it added": lambda output, states: output + 1e-5 * states,
    "of another token added": lambda output, states: output + states.roll(1, 1),
    "mixed in half": lambda output, states: (output + states) / 2,
}


@case(
    KIND,
    REFUSED,
    [(w, f) for w in _RESIDUALS for f in ("bert", "llama", "torch-post", "vit")],
)
def residual(what: str, family: str) -> Trial:
    """The layer's input reaches its output in one more way."""
    one = subject(family)
    _with_output(one, _RESIDUALS[what])
    return one.trial(truth=None)


_SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "missing": lambda branch, states: branch,
    "scaled": lambda branch, states: branch + 0.7 * states,
    "rolled": lambda branch, states: branch + states.roll(1, 1),
    "of another example": lambda branch, states: branch + states.flip(0),
    "with the branch gated": lambda branch, states: 0.5 * branch + states,
    "with the branch of one token gone": lambda branch, states: (
        one_token_zeroed(branch) + states
    ),
    "with the branch rolled": lambda branch, states: rolled(branch) + states,
}


@case(
    KIND,
    REFUSED,
    [(w, f) for w in _SUMS for f in ("bert", "electra")],
)
def first_sum(what: str, family: str) -> Trial:
    """What is added where attention meets the residual."""
    one = subject(family)
    part = one.part("layer", 1).attention.output

    def forward(states: Tensor, given: Tensor) -> Tensor:
        return part.LayerNorm(_SUMS[what](part.dense(states), given))

    patch(part, "forward", forward)
    return one.trial(truth=None)


@case(
    KIND,
    REFUSED,
    [
        (w, f)
        for w in ("missing", "scaled", "rolled", "of another example")
        for f in ("bert", "roberta")
    ],
)
def second_sum(what: str, family: str) -> Trial:
    """What is added where the feed-forward part meets the residual."""
    one = subject(family)
    part = one.part("layer", 1).output

    def forward(states: Tensor, given: Tensor) -> Tensor:
        return part.LayerNorm(_SUMS[what](part.dense(states), given))

    patch(part, "forward", forward)
    return one.trial(truth=None)


@case(KIND, REFUSED, [("gpt2",)])
def branches_in_parallel(family: str) -> Trial:
    """Attention and feed-forward part both take the layer's input."""
    one = subject(family)
    block = one.part("layer", 1)

    def forward(states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mask = kwargs.get("attention_mask")
        mixed = block.attn(block.ln_1(states), attention_mask=mask)[0]
        return states + mixed + block.mlp(block.ln_2(states))

    patch(block, "forward", forward)
    return one.trial(truth=None)


@case(KIND, REFUSED, [("bert",), ("vit",)])
def dense_connections(family: str) -> Trial:
    """The third layer also takes the first one's input."""
    one = subject(family)
    kept: list[Tensor] = []

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        kept[:] = [args[0] if args else kwargs["hidden_states"]]

    one.part("layer", 0).register_forward_pre_hook(enter, with_kwargs=True)
    hooked_before(one.part("layer", 2), lambda states: states + kept[0])
    return one.trial(truth=None)


# Norms


def _norm_forward(norm: nn.Module, kind: str) -> Callable[[Tensor], Tensor]:
    weight, bias = norm.weight, getattr(norm, "bias", None)

    def forward(x: Tensor) -> Tensor:
        epsilon = 0.5 if kind == "another epsilon" else 1e-12
        gamma = weight * 1.1 if kind == "another weight" else weight
        if kind == "no centring":
            scale = (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
            return gamma * x * scale + bias
        if kind == "no scale":
            return gamma * (x - x.mean(-1, keepdim=True)) + bias
        if kind == "over tokens":
            x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
            return gamma * x + bias
        return functional.layer_norm(x, x.shape[-1:], gamma, bias, epsilon)

    return forward


@case(
    KIND,
    REFUSED,
    [
        (kind, family, part)
        for kind in (
            "another epsilon",
            "another weight",
            "no centring",
            "no scale",
            "over tokens",
        )
        for family, part in (("bert", "norm1"), ("distilbert", "norm2"))
    ]
    + [("another epsilon", "gpt2", "final"), ("no centring", "vit", "final")],
)
def norm_that_lies(kind: str, family: str, part: str) -> Trial:
    """Its forward is not what its attributes say."""
    one = subject(family)
    norm = one.part(part, 1)
    patch(norm, "forward", _norm_forward(norm, kind))
    return one.trial(truth=None)


@case(KIND, EITHER, [("bert", "norm1"), ("bert", "norm2"), ("gpt2", "final")])
def norm_that_adds_more(family: str, part: str) -> Trial:
    """What a norm adds is in no score."""
    one = subject(family)
    hooked(one.part(part, 1), lambda states: states + 0.5)
    return one.trial()


def _rms(norm: nn.Module) -> nn.Module:
    new = nn.RMSNorm(HIDDEN, eps=1e-3, dtype=DOUBLE)
    new.weight.data.copy_(norm.weight)
    return new


def _plain_norm(norm: nn.Module) -> nn.Module:
    return nn.LayerNorm(HIDDEN, elementwise_affine=False)


@case(
    KIND,
    RIGHT,
    [(k, f) for k in (_rms, _plain_norm) for f in ("bert", "gpt2", "torch-post")],
)
def norms_replaced(kind: Callable[[nn.Module], nn.Module], family: str) -> Trial:
    """By norms of another kind, or without weights."""
    one = subject(family)
    for path, module in list(one.model.named_modules()):
        if isinstance(module, nn.LayerNorm):
            one.model.set_submodule(path, kind(module))
    if family == "torch-post":
        for layer in one.layers:
            layer.activation_relu_or_gelu = 0
    return one.trial()


@case(KIND, REFUSED, [("bert", "norm1"), ("electra", "norm2"), ("gpt2", "final")])
def norm_gone(family: str, part: str) -> Trial:
    """An identity in its place."""
    one = subject(family)
    if part == "final":
        one.encoder.set_submodule(one.recipe.final, nn.Identity())
    else:
        one.part("layer", 1).set_submodule(getattr(one.recipe, part), nn.Identity())
    return one.trial(truth=None)


@case(KIND, EITHER, [("bert",), ("distilbert",)])
def one_norm_in_two_places(family: str) -> Trial:
    """The layer's two norms are one module."""
    one = subject(family)
    layer = one.part("layer", 1)
    layer.set_submodule(one.recipe.norm2, layer.get_submodule(one.recipe.norm1))
    return one.trial(truth=_truth_of_a_copy(family))


def _truth_of_a_copy(family: str) -> Tensor:
    """The same weights, in two modules."""
    one = subject(family)
    layer = one.part("layer", 1)
    first = layer.get_submodule(one.recipe.norm1)
    layer.get_submodule(one.recipe.norm2).load_state_dict(first.state_dict())
    return one.truth()


# Projections


@case(KIND, RIGHT, [("bert",), ("gpt2",), ("llama",), ("vit",), ("t5",)])
def projection_shared_by_layers(family: str) -> Trial:
    """The first and the second layer have one output matrix."""
    one = subject(family)
    path = one.recipe.output
    one.part("layer", 1).set_submodule(path, one.part("output", 0))
    return one.trial()


@case(KIND, REFUSED, [("bert",), ("gpt2",), ("llama",), ("vit",)])
def projection_with_more(family: str) -> Trial:
    """A low-rank term is added to what the output matrix gives."""
    one = subject(family)
    torch.manual_seed(2)
    down, up = torch.randn(HIDDEN, 2).to(DOUBLE), torch.randn(2, HIDDEN).to(DOUBLE)

    def leave(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + args[0] @ down @ up * 0.1

    one.part("output", 1).register_forward_hook(leave)
    return one.trial(truth=None)


@case(KIND, EITHER, [("bert",), ("llama",), ("vit",), ("electra",)])
def values_with_more(family: str) -> Trial:
    """A low-rank term is added to the values of each token: seen, as they are."""
    one = subject(family)
    torch.manual_seed(2)
    value = one.part("value", 1)
    down = torch.randn(value.in_features, 2).to(DOUBLE)
    up = torch.randn(2, value.out_features).to(DOUBLE)

    def leave(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output + args[0] @ down @ up * 0.3

    value.register_forward_hook(leave)
    return one.trial()


@case(
    KIND,
    REFUSED,
    [
        (c, f)
        for c in (rolled, flipped_over_the_batch, another_token_added)
        for f in ("bert", "llama", "vit", "distilbert", "t5", "electra")
    ],
)
def values_of_other_tokens(change: Change, family: str) -> Trial:
    """A hook on the value projection."""
    one = subject(family)
    hooked(one.part("value", 1), change)
    return one.trial(truth=None)


@case(KIND, RIGHT, [("bert",), ("distilbert",)])
def weights_with_a_norm(family: str) -> Trial:
    """The output matrix is parametrised, its numbers made when they are asked for."""
    one = subject(family)
    torch.nn.utils.parametrizations.weight_norm(one.part("output", 1))
    return one.trial()


@case(KIND, RIGHT, [("bert",), ("llama",), ("vit",)])
def no_bias(family: str) -> Trial:
    """Linear maps without one."""
    one = subject(family)
    one.part("output", 1).bias = None
    one.part("value", 1).bias = None
    return one.trial()


@case(KIND, EITHER, [("bert",), ("electra",)])
def heads_pruned(family: str) -> Trial:
    """The second layer has two heads, the others four."""
    one = subject(family)
    attention = one.part("attention", 1)
    kept = 2 * attention.attention_head_size
    for name in ("query", "key", "value"):
        linear = getattr(attention, name)
        linear.weight.data = linear.weight.data[:kept]
        linear.bias.data = linear.bias.data[:kept]
        linear.out_features = kept
    output = one.part("output", 1)
    output.weight.data = output.weight.data[:, :kept]
    output.in_features = kept
    attention.num_attention_heads, attention.all_head_size = 2, kept
    return one.trial()


@case(KIND, EITHER, [("bert",), ("roberta",)])
def feed_forward_in_chunks(family: str) -> Trial:
    """Chunks of tokens, one after the other."""
    one = subject(family)
    truth = one.truth()
    for layer in one.layers:
        layer.chunk_size_feed_forward = 4
    return one.trial(truth=truth)


@case(KIND, RIGHT, [("bert",), ("vit",), ("torch-post",), ("distilbert",)])
def in_training_mode(family: str) -> Trial:
    """The encoder is explained in evaluation mode."""
    one = subject(family)
    truth = one.truth()
    one.model.train()
    return one.trial(truth=truth)


# Activations of one token that are far larger than all others


def _with_massive_token(family: str, size: float, dtype: torch.dtype) -> Subject:
    """The first token is so large that it hides others from a common measure."""
    one = subject(family, dtype)
    with torch.no_grad():
        if family == "vit":
            one.encoder.embeddings.cls_token *= size
        else:
            table = one.model.get_input_embeddings()
            table.weight[0] *= size
    return one


@case(
    KIND,
    RIGHT,
    [
        (f, s, d)
        for f, s in (
            ("gpt2", 1e4),
            ("llama", 1e5),
            ("vit", 1e4),
            ("xlm-roberta-xl", 1e6),
        )
        for d in (torch.float32, torch.bfloat16)
    ],
)
def massive_activation(family: str, size: float, dtype: torch.dtype) -> Trial:
    """Nothing is changed: real decoders have such tokens."""
    return _with_massive_token(family, size, dtype).trial()


@case(
    KIND,
    REFUSED,
    [
        (f, s, c, d)
        for f, s in (
            ("gpt2", 1e4),
            ("llama", 1e5),
            ("vit", 1e4),
            ("xlm-roberta-xl", 1e6),
        )
        for c in (one_token_zeroed, another_token_added, _scaled)
        for d in (torch.float32, torch.bfloat16)
        if d == torch.float32 or c is one_token_zeroed
    ],
)
def massive_activation_hides(
    family: str, size: float, change: Change, dtype: torch.dtype
) -> Trial:
    """Another token's attention branch is changed."""
    one = _with_massive_token(family, size, dtype)
    hooked(one.part("output", 1), change)
    return one.trial(truth=None)


# More than one encoder


def _pair() -> tuple[Subject, Subject, Callable[..., Tensor]]:
    first, second = subject("bert"), subject("electra")

    def both(ids: Tensor, mask: Tensor) -> Tensor:
        return first.forward(ids, mask) + second.forward(ids, mask)

    return first, second, both


@case(KIND, REFUSED)
def two_encoders() -> Trial:
    """Nobody says which."""
    first, _, both = _pair()
    return first.trial(both, truth=None)


@case(KIND, RIGHT, [(0,), (1,)])
def one_of_two_encoders(which: int) -> Trial:
    """The other one is part of the head."""
    pair = _pair()
    one = pair[which]
    globenc = GlobEnc(pair[2], encoder=one.model)  # type: ignore[arg-type]
    return Scores(
        lambda: globenc.attribute(one.inputs, 1, one.arguments),  # type: ignore[union-attr]
        one.truth(),  # type: ignore[union-attr]
    )
