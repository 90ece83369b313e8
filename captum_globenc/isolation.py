r"""Do tokens meet in attention only?

The identities of :mod:`captum_globenc.reconstruction` hold for each token by itself.
They cannot see whether a value was made of one token or of several: a convolution in
front of attention, or a feed-forward part that mixes tokens, passes them. So here
attention is taken out, every token attends to itself alone, and every second token is
changed at the input of the layers: what the others come to may then not change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_globenc.encoders import Encoder
from captum_globenc.interface import attending_by, switched
from captum_globenc.reconstruction import Fit, tolerance

_PART = "its tokens without those that they attend to"


def isolation(run: Callable[[], object], encoder: Encoder) -> dict[str, Fit]:
    """How much tokens change with others where attention does not connect them.

    Args:
        run (callable): runs the encoder, twice with the same inputs.
        encoder (Encoder): the encoder, in evaluation mode.

    Returns:
        *dict*: layer → the largest change, relative to the largest output.
    """
    with torch.no_grad():
        plain = _outputs(run, encoder, changed=False)
        changed = _outputs(run, encoder, changed=True)
    found: dict[str, Fit] = {}
    for name, before, after in zip(
        (layer.name for layer in encoder.layers), plain, changed
    ):
        kept = slice(0, None, 2)
        change = (before[:, kept] - after[:, kept]).abs().max()
        relative = float(change / before.abs().max())
        found[name] = Fit(_PART, relative, tolerance(before.dtype))
    return found


def _outputs(
    run: Callable[[], object], encoder: Encoder, changed: bool
) -> list[Tensor]:
    """The layers' outputs, (batch, tokens, hidden) each."""
    outputs: list[Tensor] = []
    batch_first = encoder.architecture.batch_first

    def turned(vectors: Tensor) -> Tensor:
        return vectors if batch_first else vectors.transpose(0, 1)

    def enter(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if not changed:
            return args, kwargs
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": _other(kwargs["hidden_states"])}
        return (_other(args[0]), *args[1:]), kwargs

    def _other(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        turned(hidden)[:, 1::2] *= -1
        return hidden

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        outputs.append(turned(output).float())

    with ExitStack() as undo:
        undo.enter_context(_alone(list(encoder.module.modules())))
        first = encoder.layers[0].layer
        undo.callback(first.register_forward_pre_hook(enter, with_kwargs=True).remove)
        for layer in encoder.layers:
            undo.callback(layer.layer.register_forward_hook(leave).remove)
        run()
    return outputs


@contextmanager
def _alone(modules: list[nn.Module]) -> Iterator[None]:
    """Every token attends to itself alone."""

    def alone(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)

    with attending_by(alone), switched(modules):
        yield
