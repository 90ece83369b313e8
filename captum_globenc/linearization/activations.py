"""Modules that are one element-wise activation, however many operations they take."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from captum_globenc.linearization.rules import slope_at_zero, through_origin

# Elements on which a module is tested.
_SAMPLE = 64


def takes_one_tensor(module: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether a module without parameters is called with one tensor of numbers."""
    return (
        len(args) == 1
        and isinstance(args[0], Tensor)
        and args[0].is_floating_point()
        and args[0].requires_grad
        and not module._modules
        and not module._parameters
        and not module._buffers
    )


def is_known_activation(module: nn.Module, u: Tensor) -> bool:
    """Whether a module is an activation with f(0) = 0, as its library wrote it."""
    if not is_trusted(module) or getattr(module, "inplace", False):
        return False
    with torch._C.DisableTorchFunction():
        return slope_of(module, u) is not None


def is_trusted(module: nn.Module) -> bool:
    """Whether a module is known to be element-wise, as its library wrote it."""
    kind = type(module)
    known = kind.__module__ in (
        "torch.nn.modules.activation",
        "transformers.activations",
    )
    return known and "forward" not in module.__dict__ and not _is_over_rows(module)


def slope_of(module: nn.Module, u: Tensor) -> float | None:
    """f'(0) of an element-wise module, on the device of u; None: f(0) is not 0."""
    # What two modules of a user are called may be the same.
    if not is_trusted(module):
        with suppress(Exception):
            return slope_at_zero(module.forward, None, u.device)
        return None
    settings = {k: v for k, v in module.__dict__.items() if not k.startswith("_")}
    return slope_at_zero(module.forward, (type(module), repr(settings)), u.device)


def linearized(module: nn.Module, u: Tensor, output: Any) -> Tensor | None:
    """The output with the slope through the origin, where a module is element-wise.

    Args:
        module (nn.Module): what ran.
        u (Tensor): what it was given.
        output (Any): what it gave.

    Returns:
        *Tensor*, the same values; None: it is no element-wise function with f(0) = 0.
    """
    if not isinstance(output, Tensor) or output.shape != u.shape or output is u:
        return None
    with torch._C.DisableTorchFunction():
        if not is_trusted(module) and not _is_elementwise(module, u, output):
            return None
        limit = slope_of(module, u)
        if limit is None:
            return None
        values = output.detach()
        return through_origin(u, lambda _: values.view_as(values), limit)


def _is_over_rows(module: nn.Module) -> bool:
    """Activations of torch's that are not element-wise."""
    return isinstance(
        module,
        (
            nn.Softmax,
            nn.Softmin,
            nn.Softmax2d,
            nn.LogSoftmax,
            nn.GLU,
            nn.MultiheadAttention,
        ),
    )


def _is_elementwise(module: nn.Module, u: Tensor, output: Tensor) -> bool:
    """Whether elements taken by themselves, in another order, give the same."""
    count = min(_SAMPLE, u.numel())
    index = torch.linspace(u.numel() - 1, 0, count, device=u.device).long()
    with torch.no_grad():
        try:
            alone = module.forward(u.detach().flatten()[index])
        except Exception:
            return False  # It needs the shape.
    if not isinstance(alone, Tensor) or alone.shape != index.shape:
        return False
    eps = torch.finfo(u.dtype).eps
    return torch.allclose(
        alone, output.detach().flatten()[index], rtol=8 * eps, atol=eps
    )
