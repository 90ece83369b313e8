r"""Do tokens meet in attention only, and are values made of the layer's own tokens?

The identities of :mod:`captum_globenc.recording.verification` hold for each token by
itself. They cannot see whether a value was made of one token or of several: a
convolution in front of attention, or a feed-forward part that mixes tokens, passes
them. So here each layer runs again with attention taken out, every token attending to
itself alone. Then

* a random half of all tokens is changed: the others may not change;
* all tokens of all examples are shuffled: so must be the values and what comes out.

The same is asked of what is in front of the layers, with other inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from captum_globenc.recording.attention import AttentionCall
from captum_globenc.recording.replay import hidden_states
from captum_globenc.recording.run import EncoderRun
from captum_globenc.recording.verification import Fit, rounding_unit

# Of two tokens one changes and the other not in a quarter of the draws, to either side.
_DRAWS = 10
# Rounding of a whole layer, in units: its sums are not taken apart here.
_UNITS = 256.0


def isolation(run: EncoderRun) -> Iterator[Fit]:
    """How far each layer is from a function of single tokens.

    Args:
        run (EncoderRun): of a few examples without padding.

    Yields:
        *Fit* of each layer: the largest change, relative to the largest output.
    """
    generator = torch.Generator().manual_seed(0)
    for index, layer in enumerate(run.layers):
        limit = _UNITS * rounding_unit(layer.hidden.dtype)
        hidden = layer.hidden
        output, values = _alone(run, index, hidden)
        change = shuffled = made_of_others = torch.zeros(())
        for _ in range(_DRAWS):
            kept = torch.rand(run.shape, generator=generator) < 0.5
            kept = kept.to(hidden.device)[..., None]
            other = -hidden.roll(1, -1)
            changed, _ = _alone(run, index, torch.where(kept, hidden, other))
            change = torch.maximum(change, _change(output, changed, kept))
            order = torch.randperm(run.shape[0] * run.shape[1], generator=generator)
            again, values_again = _alone(run, index, _shuffle(hidden, order))
            shuffled = torch.maximum(
                shuffled, _difference(_shuffle(output, order), again)
            )
            made_of_others = torch.maximum(
                made_of_others, _difference(_shuffle(values, order), values_again)
            )
        yield Fit(layer.name, "its tokens without attention", float(change), limit)
        what = "its tokens without attention, in another order"
        yield Fit(layer.name, what, float(shuffled), limit)
        what = "its values, with tokens in another order"
        yield Fit(layer.name, what, float(made_of_others), limit)


def front_isolation(model: nn.Module, run: EncoderRun) -> Iterator[Fit]:
    """How much tokens in front of the layers change with others.

    Args:
        model (nn.Module): takes the inputs of the run.
        run (EncoderRun): of ids or images.

    Yields:
        *Fit* of the input of the first layer.
    """
    inputs, generator = run.inputs[0], torch.Generator().manual_seed(1)
    if run.grid is None and (inputs.ndim != 2 or inputs.is_floating_point()):
        return
    before = run.layers[0].hidden
    change = torch.zeros(())
    for _ in range(_DRAWS):
        kept = torch.rand(run.shape, generator=generator) < 0.5
        kept, changed = kept.to(inputs.device), inputs.clone()
        if run.grid is None:
            # Ids that occur, so that none is padding or outside the vocabulary.
            order = torch.randperm(inputs.numel(), generator=generator)
            other = inputs.flatten()[order.to(inputs.device)].view_as(inputs)
            changed = torch.where(kept, inputs, other)
        else:
            rows, columns = run.grid[:2]
            kept[:, : -rows * columns] = True
            patches = kept[:, -rows * columns :].view(-1, 1, rows, columns)
            height, width = inputs.shape[-2] // rows, inputs.shape[-1] // columns
            whole = patches.repeat_interleave(height, 2).repeat_interleave(width, 3)
            part = changed[..., : rows * height, : columns * width]
            part.copy_(torch.where(whole, part, -part))
        after = _first_hidden(model, (changed, *run.inputs[1:]), run)
        change = torch.maximum(change, _change(before, after, kept[..., None]))
    limit = _UNITS * rounding_unit(before.dtype)
    yield Fit(run.layers[0].name, "its tokens in front of it", float(change), limit)


class _ReachedError(Exception):
    """The first layer has been reached."""


def _first_hidden(
    model: nn.Module, inputs: tuple[Tensor, ...], run: EncoderRun
) -> Tensor:
    """What goes into the first layer, (batch, tokens, hidden)."""
    inputs_of_first: list[Tensor] = []

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        inputs_of_first.append(hidden_states(args, kwargs))
        raise _ReachedError

    first = run.encoder.layers[0].layer
    hook = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            model(*inputs, *run.arguments)
    except _ReachedError:
        pass
    finally:
        hook.remove()
    batch_first = run.encoder.architecture.batch_first
    return inputs_of_first[0] if batch_first else inputs_of_first[0].transpose(0, 1)


def _change(before: Tensor, after: Tensor, kept: Tensor) -> Tensor:
    """The largest change of what is kept, relative to the largest value."""
    return ((after - before) * kept).abs().max() / before.abs().max()


def _alone(run: EncoderRun, index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's output where every token attends to itself, and its values.

    Returns:
        *tuple* of (batch, tokens, hidden) and (batch, tokens, heads × head size).
    """
    values: list[Tensor] = []

    def own(call: AttentionCall) -> Tensor:
        values.append(call.value.transpose(1, 2).flatten(2))
        return call.value

    output = run.replay(index, own, hidden)
    return output.float(), values[0].float()


def _shuffle(values: Tensor, order: Tensor) -> Tensor:
    """Tokens of all examples in another order, (batch, tokens, n)."""
    return values.flatten(0, 1)[order.to(values.device)].view_as(values)


def _difference(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).abs().max() / first.abs().max()
