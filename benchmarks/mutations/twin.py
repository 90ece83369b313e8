"""The truth: the formulas of GlobEnc on what a model really did, in float64.

Nothing here calls the package. Plain hooks keep what goes into each layer and each
norm; attention weights and values come from the attention function itself, which a case
that has one of its own hands to :func:`tap`. Every vector is built and its norm taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.oracle import Recipe, matrix

_TAPS: list[list[tuple[Tensor, Tensor]]] = []


def tap(alpha: Tensor, value: Tensor) -> None:
    """Tell the twin what multiplies what, both (batch, heads, ..., ...)."""
    if _TAPS:
        _TAPS[-1].append((alpha.detach().double(), value.detach().double()))


@dataclass
class Layer:
    """What was seen of one layer."""

    hidden: Tensor
    output: Tensor
    norms: dict[str, tuple[nn.Module, Tensor, Tensor]] = field(default_factory=dict)
    scale: Tensor | float = 1.0
    attention: tuple[Tensor, Tensor] | None = None

    def vectors(self) -> Tensor:
        """What each receiver takes of each source, (batch, receivers, sources, d)."""
        assert self.attention is not None
        # A sink may stand behind the tokens.
        tokens = self.hidden.shape[1]
        alpha, value = self.attention[0][..., :tokens], self.attention[1][:, :, :tokens]
        heads = self.output.unflatten(1, (alpha.shape[1], -1))
        transformed = torch.einsum("dhe,bhje->bhjd", heads, value) * self.scale
        vectors = torch.einsum("bhij,bhjd->bijd", alpha, transformed)
        own = torch.arange(vectors.shape[1])
        vectors[:, own, own] += self.hidden
        for name in ("norm1", "norm2", "final"):
            if name in self.norms:
                vectors = _through(vectors, *self.norms[name])
        return vectors


@dataclass
class Twin:
    """One run of an encoder.

    Args:
        layers (list[Layer]): in the order in which they ran.
        states (list[Tensor]): (batch, tokens, hidden): the input of each layer, and
            what comes out of the last one and of a final norm.
    """

    layers: list[Layer]
    states: list[Tensor]

    def local(self) -> Tensor:
        """The scores of each layer, (batch, layers, receivers, sources)."""
        return torch.stack([layer.vectors().norm(dim=-1) for layer in self.layers], 1)

    def rollout(self, stop: int | None = None, start: int = 0) -> Tensor:
        """What a layer's output takes of the input, (batch, receivers, sources)."""
        local = self.local()
        product = torch.eye(local.shape[-1]).double().expand(len(local), -1, -1)
        for n in local.unbind(1)[start:stop]:
            product = n @ product
        return product


def watch(
    encoder: nn.Module,
    recipe: Recipe,
    run: Callable[[], object],
    batch_first: bool = True,
) -> Twin:
    """Run a model and keep what its layers did.

    Args:
        encoder (nn.Module): from which the recipe's paths start.
        recipe (Recipe): where the parts are.
        run (callable): runs the encoder, once.
        batch_first (bool, optional): False: states are (tokens, batch, hidden).
    """
    layers: list[Layer] = []
    last: list[Tensor] = []
    begun: list[int] = []

    def turned(states: Tensor) -> Tensor:
        states = states.detach().double().clone()
        return states if batch_first else states.transpose(0, 1)

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = turned(args[0] if args else kwargs["hidden_states"])
        weight, _ = matrix(module.get_submodule(recipe.output))
        layers.append(Layer(hidden, weight.detach().clone()))
        begun.append(len(_TAPS[-1]))

    def end(_: nn.Module, __: Any, output: Any) -> None:
        taps = _TAPS[-1][begun[-1] :]
        assert len(taps) == 1, f"{len(taps)} attentions in a layer"
        layers[-1].attention = taps[0]
        last[:] = [turned(output[0] if isinstance(output, tuple) else output)]

    def norm(name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            weight = getattr(module, "weight", None)
            kept = 1.0 if weight is None else weight.detach().double().clone()
            layers[-1].norms[name] = (module, torch.as_tensor(kept), turned(args[0]))

        return enter

    def ended(_: nn.Module, __: Any, output: Tensor) -> None:
        last[:] = [turned(output)]

    with ExitStack() as undo:
        undo.enter_context(torch.no_grad())
        undo.enter_context(_tapping())
        modules = encoder.get_submodule(recipe.layers)
        listed = [modules] if _is_layer(modules) else list(modules)
        for module in dict.fromkeys(listed):
            handles = [
                module.register_forward_pre_hook(begin, with_kwargs=True),
                module.register_forward_hook(end),
            ]
            for name in ("norm1", "norm2"):
                path = getattr(recipe, name)
                if path:
                    part = module.get_submodule(path)
                    handles.append(part.register_forward_pre_hook(norm(name)))
            for handle in handles:
                undo.callback(handle.remove)
        if recipe.final:
            final = encoder.get_submodule(recipe.final)
            undo.callback(final.register_forward_pre_hook(norm("final")).remove)
            undo.callback(final.register_forward_hook(ended).remove)
        run()
    if recipe.scale1:
        owner, _, attribute = recipe.scale1.rpartition(".")
        for layer, module in zip(layers, encoder.get_submodule(recipe.layers)):
            scale = getattr(module.get_submodule(owner), attribute)
            layer.scale = scale.detach().double()
    return Twin(layers, [*(layer.hidden for layer in layers), *last])


def shares(gradients: list[Tensor]) -> Tensor:
    """The share of each token of each layer, (batch, layers, tokens).

    Args:
        gradients (list[Tensor]): (batch, tokens, hidden) each.
    """
    norms = torch.stack([gradient.double().norm(dim=-1) for gradient in gradients], 1)
    return norms / norms.sum((1, 2), keepdim=True)


def _through(vectors: Tensor, norm: nn.Module, weight: Tensor, given: Tensor) -> Tensor:
    """γ ⊙ centre(v) / s, with s of what the norm was given."""
    centred = isinstance(norm, nn.LayerNorm)
    epsilon = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", 0.0)
    if centred:
        vectors = vectors - vectors.mean(-1, keepdim=True)
        given = given - given.mean(-1, keepdim=True)
    scale = (given.square().mean(-1) + epsilon).sqrt()
    return weight * vectors / scale[:, :, None, None]


def _is_layer(modules: nn.Module) -> bool:
    return not isinstance(modules, nn.ModuleList | nn.Sequential)


@contextmanager
def _tapping() -> Iterator[None]:
    """Collect what attends, torch's own function included."""
    original = functional.scaled_dot_product_attention
    fused = torch.backends.mha.get_fastpath_enabled()
    _TAPS.append([])

    def tapped(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any):
        tap(*_weights(query, key, value, *args, **kwargs))
        return original(query, key, value, *args, **kwargs)

    try:
        functional.scaled_dot_product_attention = tapped
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        functional.scaled_dot_product_attention = original
        torch.backends.mha.set_fastpath_enabled(fused)
        _TAPS.pop()


def _weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """The softmax and the values of a call of torch's attention."""
    if enable_gqa:
        share = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(share, 1) for each in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = query.double() @ key.double().mT * scale
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask.double()
    # A row that attends to nothing, as padding may, is no number.
    return logits.softmax(-1).nan_to_num(), value.double()
