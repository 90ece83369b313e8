"""What the parts of a layer compute: linear maps and norms, whatever their class."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class LayerParts(NamedTuple):
    """The parts that decompose a layer.

    Args:
        output (nn.Module or Tensor): :math:`W_O, b_O`, the linear map after the heads,
            or its matrix, (hidden, heads, head size).
        layer_scale (Tensor or None): (hidden), multiplies the attention branch.
        attention_norm (nn.Module or None): the norm after the first residual.
        output_norm (nn.Module or None): the norm after the second residual.
        final_norm (nn.Module or None): the norm after the last layer.
    """

    output: nn.Module | Tensor
    layer_scale: Tensor | None
    attention_norm: nn.Module | None
    output_norm: nn.Module | None
    final_norm: nn.Module | None

    @property
    def norms(self) -> dict[str, nn.Module]:
        """The norms that are there, in the order in which they are applied."""
        named = {name: getattr(self, name) for name in NORMS}
        return {name: norm for name, norm in named.items() if norm is not None}

    def tensors(self) -> list[Tensor]:
        """Everything that the decomposition depends on."""
        parts = (self.output, *self.norms.values())
        modules = [part for part in parts if isinstance(part, nn.Module)]
        values = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        values += [t for t in (self.output, self.layer_scale) if isinstance(t, Tensor)]
        return values


#: The norms after the residuals, in the order in which they are applied.
NORMS = ("attention_norm", "output_norm", "final_norm")


def is_linear(module: nn.Module | Tensor) -> bool:
    """Whether :func:`linear_map` knows what the module maps from and to."""
    if isinstance(module, Tensor):
        return module.ndim == 3
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", 0))
    return isinstance(module, Conv1D) or all(isinstance(n, int) for n in sizes)


def linear_map(module: nn.Module | Tensor) -> tuple[Tensor, Tensor | None]:
    """The matrix (out, in) and bias of a linear map, without gradients.

    A map with parts of its own, such as a LoRA adapter around a Linear, is asked what
    it makes of zero and of every unit vector. That it is linear indeed is checked with
    the layer, on every run.
    """
    weight = _matrix(module)
    if weight is not None:
        bias = getattr(module, "bias", None)
        return weight.detach(), None if bias is None else bias.detach()
    assert isinstance(module, nn.Module)
    unit = torch.eye(_inputs_of(module)).to(_like(module))
    with torch.no_grad():
        # One row: quantised maps take no single vector.
        at_zero = _apply(module, torch.zeros_like(unit[:1]))[0]
        return (_apply(module, unit) - at_zero).T, at_zero


def image_of_fixed_vector(module: nn.Module | Tensor) -> Tensor:
    """What a linear map makes of one vector: other where its matrix is another one."""
    weight = _matrix(module)
    with torch.no_grad():
        if weight is not None:
            return weight @ _fixed_vector(weight.shape[1], weight.dtype, weight.device)
        assert isinstance(module, nn.Module)
        like = _like(module)
        direction = _fixed_vector(_inputs_of(module), like.dtype, like.device)
        return _apply(module, direction[None])[0]


@functools.lru_cache(maxsize=64)
def _fixed_vector(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        vector = torch.linspace(-1, 1, size, dtype=torch.float64, device="cpu").sin()
        return vector.to(device, dtype)


def _matrix(module: nn.Module | Tensor) -> Tensor | None:
    """The matrix (out, in) of a map whose weights say all, None for any other.

    Quantised and adapted maps are Linears, too.
    """
    if isinstance(module, Tensor):
        return module.flatten(1)
    if isinstance(module, Conv1D):
        return module.weight.T
    if (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and module.weight.is_floating_point()
    ):
        return module.weight
    return None


def _inputs_of(module: nn.Module) -> int:
    """How many numbers a linear map takes."""
    return cast(int, module.in_features)


def _apply(module: nn.Module, vectors: Tensor) -> Tensor:
    # Past any hooks: what they change is no part of the map.
    result: Tensor = module.forward(vectors)
    return result


def _like(module: nn.Module) -> Tensor:
    """A tensor of the dtype and on the device that the module computes with."""
    values = (p for p in module.parameters() if p.is_floating_point())
    return next(values, torch.empty(0))


@dataclass(frozen=True)
class Norm:
    r"""A LayerNorm or an RMSNorm, :math:`\gamma \odot C(v) / s + \beta`.

    Args:
        gamma (Tensor): :math:`\gamma`, (hidden).
        beta (Tensor): :math:`\beta`, (hidden).
        centred (bool): whether :math:`C` takes the mean away (LayerNorm) or nothing
            (RMSNorm).
    """

    gamma: Tensor
    beta: Tensor
    centred: bool

    @classmethod
    def of(cls, module: nn.Module, hidden: Tensor) -> Norm:
        """Copies of a module's weights, like ``hidden`` (hidden size), of its dtype."""
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        ones, zeros = torch.ones_like(hidden), torch.zeros_like(hidden)
        return cls(
            ones if weight is None else weight.detach().to(hidden, copy=True),
            zeros if bias is None else bias.detach().to(hidden, copy=True),
            is_centred(module),
        )

    def linear(self, vectors: Tensor) -> Tensor:
        r""":math:`\gamma \odot C(v)` over the last dimension: no scale, no bias."""
        return (centre(vectors) if self.centred else vectors) * self.gamma

    def transposed(self, vectors: Tensor) -> Tensor:
        """The vectors on which v has the projections that ``linear(v)`` has on these.

        Args:
            vectors (Tensor): (..., hidden).
        """
        vectors = vectors * self.gamma
        return centre(vectors) if self.centred else vectors


def is_norm(module: nn.Module) -> bool:
    """Whether it is a LayerNorm or an RMSNorm, as far as its class says."""
    return is_centred(module) or "RMSNorm" in _kind(module) or _is_t5_norm(module)


def is_centred(module: nn.Module) -> bool:
    """Whether a norm takes the mean away."""
    return isinstance(module, nn.LayerNorm) or (
        "LayerNorm" in _kind(module) and not _is_t5_norm(module)
    )


def standard_deviation(norm: nn.Module, vectors: Tensor) -> Tensor:
    """A norm's denominators: sqrt(mean(C(v)²) + eps) over the last dimension.

    Args:
        norm (nn.Module): a LayerNorm or an RMSNorm.
        vectors (Tensor): its inputs, (..., hidden), in the dtype to compute in.

    Returns:
        *Tensor* of shape (...).
    """
    values = centre(vectors) if is_centred(norm) else vectors
    # Not var(), which takes five times as long.
    variance: Tensor = values.norm(dim=-1).square() / values.shape[-1]
    return (variance + epsilon(norm, vectors.dtype)).sqrt()


def centre(vectors: Tensor) -> Tensor:
    """``v - mean_d(v)`` over the last dimension."""
    return vectors - vectors.mean(-1, keepdim=True)


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _is_t5_norm(module: nn.Module) -> bool:
    # T5 calls its RMSNorm a LayerNorm.
    return "T5LayerNorm" in _kind(module)


def epsilon(module: nn.Module, dtype: torch.dtype) -> float:
    """What a norm adds to the variance, computing in this dtype."""
    for name in ("eps", "variance_epsilon", "epsilon"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    weight = getattr(module, "weight", None)
    # torch.nn.RMSNorm's default: that of the dtype which the model computes in.
    return torch.finfo(dtype if weight is None else weight.dtype).eps
