"""Relevance at a place: gradients of linearised runs, on a path from a baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_globenc._captum import TargetType, select_targets
from captum_globenc.attribution.arguments import shown
from captum_globenc.errors import InputError, is_whole
from captum_globenc.linearization.operations import AttentionRule
from captum_globenc.linearization.run import Place, propagate, values_at

#: What inputs are compared with, as for Captum's integrated gradients.
Baselines = Tensor | int | float | tuple[Tensor | int | float, ...] | None


@dataclass(frozen=True)
class Relevance:
    """Relevance of one batch.

    Args:
        parts (tuple[Tensor, ...]): of the values at every place, of their shapes.
        output (Tensor): what the parts explain: the selected outputs, less those of
            the baseline where there is one, (batch).
        is_turned (tuple[bool, ...]): whether a place has (tokens, batch, ...).
    """

    parts: tuple[Tensor, ...]
    output: Tensor
    is_turned: tuple[bool, ...]


def relevance(
    forward_func: Callable[..., Any],
    tensors: tuple[Tensor, ...],
    arguments: tuple[Any, ...],
    target: TargetType,
    places: Sequence[Place],
    rule: AttentionRule,
    keeps_own_biases: bool,
) -> Relevance:
    r"""Values times their gradient: :math:`\partial y / \partial x \odot x`.

    Args:
        forward_func (Callable): a model, or a function that calls one.
        tensors (tuple[Tensor, ...]): what it takes first.
        arguments (tuple): its further arguments.
        target (int, tuple, Tensor or list): the explained output, as in Captum.
        places (sequence): where relevance is read.
        rule (str): ``"attnlrp"`` or ``"cp"``.
        keeps_own_biases (bool): from the embedding block's output on, the biases in
            front of the first attention's values belong to their tokens.
    """
    found = propagate(
        forward_func,
        tensors,
        arguments,
        places,
        selector(target, len(tensors[0])),
        rule,
        keeps_own_biases=keeps_own_biases,
    )
    parts = [g * v for g, v in zip(found.gradients, found.values)]
    return Relevance(tuple(parts), found.output, found.is_turned)


@torch.inference_mode(False)
@torch.no_grad()
def integrated_relevance(
    forward_func: Callable[..., Any],
    tensors: tuple[Tensor, ...],
    arguments: tuple[Any, ...],
    target: TargetType,
    place: Place,
    rule: AttentionRule,
    baselines: Baselines,
    n_steps: int,
    with_output: bool,
) -> Relevance:
    r"""The mean gradient on a path from a baseline, times the difference from it.

    .. math:: \frac1n \sum_{k=1}^{n} \frac{\partial y}{\partial x}
        \Big|_{x_0 + \frac{k - 1/2}{n}(x - x_0)} \odot (x - x_0)

    A method of this project: integrated gradients (Sundararajan et al. 2017,
    arXiv:1703.01365) with the gradient of the linearised network. All points run as one
    batch.

    Args:
        forward_func (Callable): as for :func:`relevance`.
        tensors (tuple[Tensor, ...]): likewise.
        arguments (tuple): likewise.
        target (int, tuple, Tensor or list): likewise.
        place (str or ModulePlace): where the path is.
        rule (str): likewise.
        baselines (Tensor, int, float or tuple): in the place of the inputs; for ids, a
            tensor of numbers is the baseline of the embeddings at the place.
        n_steps (int): points on the path.
        with_output (bool): also run its two ends, for ``output``; else it is 0.
    """
    batch = len(tensors[0])
    is_turned = False
    if place == "inputs":
        ends, start = tensors, _given_baselines(baselines, tensors)
    else:
        end, is_turned = values_at(forward_func, tensors, arguments, place)
        check_examples(end, int(is_turned), batch)
        ends = (end,)
        start = (_start(forward_func, tensors, arguments, place, baselines, end),)
    dim = int(is_turned)  # Of the examples.

    def run(fractions: list[float]) -> tuple[tuple[Tensor, ...], Tensor]:
        count = len(fractions)
        points = [
            torch.cat([b + (e - b) * f for f in fractions], dim)
            if e.is_floating_point()
            else e.repeat(count, *[1] * (e.ndim - 1))
            for b, e in zip(start, ends)
        ]
        found = propagate(
            forward_func,
            tuple(points)
            if place == "inputs"
            else tuple(repeated(t, batch, count) for t in tensors),
            tuple(repeated(argument, batch, count) for argument in arguments),
            [place],
            selector(repeated(target, batch, count), batch * count),
            rule,
            None if place == "inputs" else points[0],
        )
        return found.gradients, found.output

    gradients, _ = run([(step + 0.5) / n_steps for step in range(n_steps)])
    numbers = [(b, e) for b, e in zip(start, ends) if e.is_floating_point()]
    parts = [
        torch.stack(g.chunk(n_steps, dim)).mean(0) * (e - b)
        for g, (b, e) in zip(gradients, numbers)
    ]
    output = parts[0].new_zeros(batch)
    if with_output:
        low, high = run([0.0, 1.0])[1].chunk(2)
        output = high - low
    return Relevance(tuple(parts), output, (is_turned,) * len(parts))


def check_steps(n_steps: Any, baselines: Baselines) -> None:
    """Raise InputError where there is no such path."""
    if not is_whole(n_steps) or n_steps < 1:
        raise InputError(f"n_steps must be at least 1, got {n_steps!r}.")
    if n_steps > 1 and baselines is None:
        raise InputError(
            f"n_steps={n_steps} needs a baseline, where the path begins: pass "
            "baselines=, such as the ids with every word replaced by the pad token."
        )


def check_examples(value: Tensor, dim: int, batch: int) -> None:
    """Raise InputError where all examples share the values of a layer."""
    if not value.ndim or value.shape[dim] % batch:
        raise InputError(
            f"the layer's values have shape {tuple(value.shape)}, and a part for each "
            f"of {batch} examples is expected: pass one example at a time."
        )


def repeated(value: Any, batch: int, count: int) -> Any:
    """An argument for that many copies of the batch; what is not per example stays."""
    if isinstance(value, Tensor) and value.ndim and len(value) == batch:
        return value.repeat(count, *[1] * (value.ndim - 1))
    return value * count if isinstance(value, list) and len(value) == batch else value


def selector(target: TargetType, batch: int) -> Callable[[Tensor], Tensor]:
    """Output tensor → the selected outputs, (batch).

    Args:
        target (int, tuple, Tensor or list): as in Captum.
        batch (int): the number of examples.
    """

    def select(output: Tensor) -> Tensor:
        selected = select_targets(output, target)
        if selected.numel() != batch:
            raise AssertionError(
                "target is needed where the output has several numbers per example, "
                f"got target {shown(target)} for an output of shape "
                f"{tuple(output.shape)} and {batch} examples."
            )
        flat: Tensor = selected.flatten()
        return flat

    return select


def _given_baselines(
    baselines: Baselines, tensors: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """A baseline of every input's shape."""
    given = baselines if isinstance(baselines, tuple) else (baselines,)
    if len(given) != len(tensors):
        raise InputError(
            f"one baseline per input is expected, got {len(given)} for {len(tensors)}."
        )
    result = []
    for baseline, tensor in zip(given, tensors):
        if not isinstance(baseline, Tensor | int | float):
            raise InputError(
                "a baseline must be a tensor or a number, got "
                f"{type(baseline).__name__}: {shown(baseline)}"
            )
        if isinstance(baseline, Tensor):
            baseline = baseline.to(tensor)
        else:
            baseline = torch.full_like(tensor, baseline)
        try:
            result.append(baseline.expand_as(tensor))
        except RuntimeError:
            raise InputError(
                f"a baseline of shape {tuple(baseline.shape)} does not fit the input "
                f"of shape {tuple(tensor.shape)}."
            ) from None
    return tuple(result)


def _start(
    forward_func: Callable[..., Any],
    tensors: tuple[Tensor, ...],
    arguments: tuple[Any, ...],
    place: Place,
    baselines: Baselines,
    end: Tensor,
) -> Tensor:
    """The values at a place for the baseline."""
    is_at_place = (
        isinstance(baselines, Tensor)
        and baselines.is_floating_point()
        and not tensors[0].is_floating_point()
    )
    if is_at_place:
        return _given_baselines(baselines, (end,))[0]
    assert baselines is not None
    given = baselines if isinstance(baselines, tuple) else (baselines, *tensors[1:])
    for baseline, tensor in zip(given, tensors):
        if not tensor.is_floating_point() and isinstance(baseline, float):
            raise InputError(
                f"the baseline of ids must be an id or a tensor, got {baseline!r}."
            )
    changed = _given_baselines(given, tensors)
    try:
        return values_at(forward_func, changed, arguments, place)[0]
    except IndexError as error:
        raise InputError(
            f"the model cannot look up the baseline {shown(baselines)}: {error}."
        ) from error
