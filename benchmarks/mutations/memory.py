"""What is recorded must be what ran, whatever happens to the memory afterwards."""

# Small functions are what their names say.
# ruff: noqa: D103

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from benchmarks.mutations.attending import Attend, Call, attention_function
from benchmarks.mutations.campaign import EITHER, RIGHT, Scores, Trial, case, patch
from benchmarks.mutations.models import Subject, subject
from captum_globenc import GlobEnc
from tests import models

KIND = "memory"


def _after(one: Subject, change: Callable[[Any], None], **options: Any) -> Trial:
    """The model runs, then something is changed, then the logits are returned."""
    truth = one.truth()

    def forward(inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            output = one.model(inputs, **options)
        else:
            output = one.model(inputs, attention_mask=mask, **options)
        logits = output.logits.clone()
        change(output)
        return logits

    return Scores(
        lambda: GlobEnc(forward).attribute(one.inputs, 1, one.arguments),
        truth,
        one.dtype,
    )


# Hidden states


def zeroed(states: Tensor) -> None:
    states.zero_()


def doubled(states: Tensor) -> None:
    states.mul_(2)


def overwritten(states: Tensor) -> None:
    states.copy_(torch.randn_like(states))


def one_row_overwritten(states: Tensor) -> None:
    states[:, 1] = 0


def zeroed_by_data(states: Tensor) -> None:
    states.data.zero_()


def zeroed_by_numpy(states: Tensor) -> None:
    states.detach().numpy()[:] = 0


@case(
    KIND,
    EITHER,
    [
        (c, f, index)
        for c in (zeroed, doubled, overwritten, one_row_overwritten)
        for f, index in (("bert", 1), ("bert", 0), ("gpt2", 1), ("vit", 2))
    ]
    + [
        (c, f, 1)
        for c in (zeroed_by_data, zeroed_by_numpy)
        for f in ("bert", "llama", "vit")
    ],
)
def hidden_states(change: Callable[[Tensor], None], family: str, index: int) -> Trial:
    """States that the model hands out are changed when it has run."""
    one = subject(family)

    def after(output: Any) -> None:
        with torch.no_grad():
            change(output.hidden_states[index].detach())

    return _after(one, after, output_hidden_states=True)


# Weights


def by_mul(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(2)


def by_data_mul(weight: nn.Parameter) -> None:
    weight.data.mul_(2)


def by_data(weight: nn.Parameter) -> None:
    weight.data = weight.data * 2


def by_data_copy(weight: nn.Parameter) -> None:
    weight.data.copy_(torch.randn_like(weight))


def by_numpy(weight: nn.Parameter) -> None:
    weight.detach().numpy()[:] *= 2


def by_one_row(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight[0] = 5


WAYS = (by_mul, by_data_mul, by_data, by_data_copy, by_numpy, by_one_row)


@case(
    KIND,
    EITHER,
    [(w, p, f) for w in WAYS for p, f in (("output", "bert"), ("output", "llama"))]
    + [(w, "norm1", "bert") for w in WAYS]
    + [(by_mul, "value", "bert"), (by_data_mul, "value", "bert")]
    + [(by_mul, "final", "gpt2"), (by_data_mul, "final", "gpt2")],
)
def weights_at_the_end_of_the_run(
    way: Callable[[nn.Parameter], None], part: str, family: str
) -> Trial:
    """Weights are changed when the model has run: true is what ran."""
    one = subject(family)

    def after(_: Any) -> None:
        for layer in range(3):
            way(one.part(part, layer).weight)  # type: ignore[arg-type]

    return _after(one, after)


@case(KIND, EITHER, [("load_state_dict",), ("assign",), ("optimizer",), ("half",)])
def model_at_the_end_of_the_run(how: str) -> Trial:
    """The whole model is another one when it has run."""
    one = subject("bert")

    def after(output: Any) -> None:
        with torch.no_grad():
            other = {k: v * 1.5 for k, v in one.model.state_dict().items()}
        if how == "load_state_dict":
            one.model.load_state_dict(other)
        elif how == "assign":
            one.model.load_state_dict(other, assign=True)
        elif how == "half":
            one.model.half()
        else:
            for parameter in one.model.parameters():
                parameter.grad = torch.ones_like(parameter)
            torch.optim.SGD(one.model.parameters(), lr=0.1).step()

    return _after(one, after)


# Between two attributions of one GlobEnc


def _twice(one: Subject, change: Callable[[], None]) -> Trial:
    """One GlobEnc, called before and after a change; true is what the second ran."""
    globenc = GlobEnc(one.forward)

    def found() -> Tensor:
        return globenc.attribute(one.inputs, 1, one.arguments)

    found()
    change()
    return Scores(found, one.truth(), one.dtype)


@case(
    KIND,
    RIGHT,
    [(w, p) for w in (by_mul, by_data, by_one_row) for p in ("output", "norm1")],
)
def weights_between_runs(way: Callable[[nn.Parameter], None], part: str) -> Trial:
    """What was prepared of the old weights is dropped."""
    one = subject("bert")
    return _twice(one, lambda: way(one.part(part, 1).weight))  # type: ignore[arg-type]


@case(
    KIND,
    EITHER,
    [
        (w, p)
        for w in (by_data_mul, by_data_copy, by_numpy)
        for p in ("output", "norm1")
    ],
)
def weights_between_runs_unseen(
    way: Callable[[nn.Parameter], None], part: str
) -> Trial:
    """The weights' versions say nothing of it."""
    one = subject("bert")
    return _twice(one, lambda: way(one.part(part, 1).weight))  # type: ignore[arg-type]


@case(
    KIND,
    RIGHT,
    [("bias",), ("norm epsilon",), ("dtype",), ("module",), ("parameter",), ("load",)],
)
def model_between_runs(what: str) -> Trial:
    """Other parts of the model change."""
    one = subject("bert")

    def change() -> None:
        output, norm = one.part("output", 1), one.part("norm1", 1)
        if what == "bias":
            output.bias.data += 1  # type: ignore[union-attr]
        elif what == "norm epsilon":
            norm.eps = 0.5  # type: ignore[assignment]
        elif what == "dtype":
            one.model.float()
            one.dtype = torch.float32
        elif what == "module":
            new = nn.Linear(24, 24).double()
            one.part("layer", 1).attention.output.dense = new
        elif what == "parameter":
            output.weight = nn.Parameter(torch.randn_like(output.weight))
        else:
            state = {k: v * 1.1 for k, v in one.model.state_dict().items()}
            one.model.load_state_dict(state)

    return _twice(one, change)


@case(KIND, RIGHT, [("bert", 2, 8), ("bert", 4, 2), ("distilbert", 4, 8)])
def shared_weights_of_other_heads(family: str, before: int, after: int) -> Trial:
    """Two models have the same weights and another number of heads."""
    current: list[Subject] = []

    def make(heads: int) -> Subject:
        torch.manual_seed(0)
        if family == "bert":
            sizes = {**models.SIZES, "num_attention_heads": heads}
            config: Any = transformers.BertConfig(**sizes)
            kind: Any = transformers.BertForSequenceClassification
        else:
            config = models.FAMILIES[family].config()
            config.n_heads = heads
            kind = models.FAMILIES[family].head
        one = subject(family)
        one.model = models.randomize(kind(config)).double().eval()
        one.encoder = models.encoder_of(family, one.model)
        return one

    first, second = make(before), make(after)
    second.model.load_state_dict(first.model.state_dict(), assign=True)
    current[:] = [first]
    globenc = GlobEnc(lambda ids, mask: current[0].forward(ids, mask))

    def found() -> Tensor:
        return globenc.attribute(first.inputs, 1, first.arguments)

    found()
    current[:] = [second]
    return Scores(found, second.truth())


@case(KIND, RIGHT, [("deepcopy",), ("another model",)])
def other_models_between_runs(what: str) -> Trial:
    """The closure goes on with another model."""
    first = subject("bert")
    if what == "deepcopy":
        second = copy.deepcopy(first)
        with torch.no_grad():
            for parameter in second.model.parameters():
                parameter.mul_(1.2)
    else:
        second = subject("roberta")
    current = [first]
    globenc = GlobEnc(lambda ids, mask: current[0].forward(ids, mask))

    def found() -> Tensor:
        return globenc.attribute(first.inputs, 1, first.arguments)

    found()
    current[:] = [second]
    return Scores(found, second.truth())


# Buffers that are used again


def _buffered(name: str) -> Attend:
    """Attention that keeps one buffer for all layers."""
    buffers: dict[str, Tensor] = {}

    def into(what: str, tensor: Tensor) -> Tensor:
        return buffers.setdefault(what, torch.empty_like(tensor)).copy_(tensor)

    def attend(c: Call) -> Tensor:
        query, key, value = c.query, c.key, c.value
        if name in ("values", "all"):
            value = into("value", value)
        if name in ("queries and keys", "all"):
            query, key = into("query", query), into("key", key)
        if name in ("values", "queries and keys", "all"):
            return functional.scaled_dot_product_attention(
                query, key, value, c.mask, scale=c.scaling
            )
        alpha = c.softmax()
        if name == "weights":
            alpha = into("alpha", alpha)
        if name == "result":
            buffer = buffers.setdefault("context", torch.empty_like(query))
            return torch.matmul(alpha, value, out=buffer) * 1
        context = alpha @ value
        if name == "values zeroed":
            value.zero_()
        if name == "weights zeroed":
            alpha.zero_()
        return context

    return torch.no_grad()(attend)


@case(
    KIND,
    EITHER,
    [
        (n, f)
        for n in (
            "values",
            "queries and keys",
            "all",
            "weights",
            "result",
            "values zeroed",
            "weights zeroed",
        )
        for f in ("bert", "gpt2")
    ],
)
def buffers_in_attention(name: str, family: str) -> Trial:
    """Later layers overwrite what earlier ones made."""
    registered = f"campaign_{name.replace(' ', '_')}"
    AttentionInterface.register(registered, attention_function(_buffered(name)))
    AttentionMaskInterface.register(registered, eager_mask)
    one = subject(family, attention=registered)
    return one.trial(truth=subject(family).truth())


@case(KIND, EITHER, [("bert",), ("electra",)])
def residual_added_in_place(family: str) -> Trial:
    """The layer's input is its sum with attention when attention is done."""
    one = subject(family)
    truth = one.truth()
    for layer in one.layers:
        part = layer.attention.output

        def forward(states: Tensor, given: Tensor, part: Any = part) -> Tensor:
            return part.LayerNorm(given.add_(part.dense(states)))

        patch(part, "forward", forward)

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            return one.forward(ids, mask)

    return one.trial(run, truth)


@case(KIND, EITHER, [("norm1",), ("norm2",)])
def norm_in_place(part: str) -> Trial:
    """A norm writes its result over its input."""
    one = subject("bert")
    truth = one.truth()
    for layer in range(3):
        norm = one.part(part, layer)

        def forward(x: Tensor, norm: Any = norm) -> Tensor:
            normed = functional.layer_norm(
                x, x.shape[-1:], norm.weight, norm.bias, norm.eps
            )
            return x.copy_(normed)

        patch(norm, "forward", forward)

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad():
            return one.forward(ids, mask)

    return one.trial(run, truth)


@case(KIND, EITHER, [("bert",), ("vit",)])
def layer_output_in_a_buffer(family: str) -> Trial:
    """All layers write into one tensor, as inference engines do."""
    one = subject(family)
    truth = one.truth()
    buffers: list[Tensor] = []

    def leave(_: nn.Module, __: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        if not buffers or buffers[0].shape != states.shape:
            buffers[:] = [torch.empty_like(states)]
        with torch.no_grad():
            kept = buffers[0].copy_(states)
        return (kept, *output[1:]) if isinstance(output, tuple) else kept

    for layer in one.layers:
        layer.register_forward_hook(leave)

    def run(*arguments: Tensor) -> Tensor:
        with torch.no_grad():
            return one.forward(*arguments)

    return one.trial(run, truth)
