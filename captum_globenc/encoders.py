"""Find the encoder in a model, and the parts of its layers by their paths."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TypeVar

from captum.attr import InterpretableEmbeddingBase
from torch import nn

from captum_globenc.architectures import (
    Architecture,
    layouts_of,
    supported_model_types,
)
from captum_globenc.errors import UnsupportedModelError

Part = TypeVar("Part", bound=nn.Module)


@dataclass(frozen=True)
class LayerModules:
    """The parts of one encoder layer.

    Args:
        name (str): the layer's name in the model.
        layer (nn.Module): the layer itself.
        attention (nn.Module): calls the attention function.
        output (nn.Linear): the linear map after the heads.
        norms (tuple[nn.LayerNorm or None, nn.LayerNorm or None]): the norms that follow
            the first and the second residual. That of a pre-LN encoder's last layer is
            the final norm.
        watched (dict[str, nn.Module]): the parts whose inputs and outputs must rebuild
            the layer, by their names in :class:`Architecture`.
    """

    name: str
    layer: nn.Module
    attention: nn.Module
    output: nn.Linear
    norms: tuple[nn.LayerNorm | None, nn.LayerNorm | None]
    watched: dict[str, nn.Module]


@dataclass(frozen=True)
class Encoder:
    """An encoder found in a model, with its parts resolved.

    Args:
        root (nn.Module): the model that was searched, with its head.
        module (nn.Module): the encoder itself.
        is_pre_norm (bool): whether the norms are in front of the layers' parts.
        embeddings (nn.Module): takes ids, embeddings or images.
        positions (nn.Embedding or None): the table of position embeddings.
        patches (nn.Conv2d or None): cuts images into patches.
        layers (tuple[LayerModules, ...]): bottom layer first.
        final_norm (nn.LayerNorm or None): after the last layer of a pre-LN encoder.
    """

    root: nn.Module
    module: nn.Module
    is_pre_norm: bool
    embeddings: nn.Module
    positions: nn.Embedding | None
    patches: nn.Conv2d | None
    layers: tuple[LayerModules, ...]
    final_norm: nn.LayerNorm | None

    @property
    def max_tokens(self) -> int | None:
        """The longest input that the position table allows, in tokens; None: no limit.

        RoBERTa numbers positions from ``padding_idx + 1``.
        """
        if self.positions is None:
            return None
        reserved = self.positions.padding_idx
        return self.positions.num_embeddings - (0 if reserved is None else reserved + 1)


def find_encoder(root: nn.Module) -> Encoder | None:
    """The one supported encoder inside ``root`` (``root`` itself included).

    Args:
        root (nn.Module): a model or a part of one.

    Returns:
        *Encoder* or *None* where ``root`` holds no model of a registered type.

    Raises:
        UnsupportedModelError: two encoders, or a part is missing or of another kind.
    """
    found: dict[int, tuple[str, nn.Module, Architecture]] = {}
    for name, module in root.named_modules():
        # The head and the encoder share one config: the encoder is the module from
        # which the path to the layers starts.
        layouts = [
            layout
            for layout in layouts_of(model_type(module))
            if _submodule(module, layout.layers.split(".")[0]) is not None
        ]
        if layouts and id(module) not in found:
            fitting = [layout for layout in layouts if _fits(module, layout)]
            found[id(module)] = (name, module, (fitting or layouts)[0])
    if len(found) > 1:
        names = ", ".join(repr(name) for name, _, _ in found.values())
        raise UnsupportedModelError(
            f"{type(root).__name__} holds {len(found)} encoders ({names}) and one is "
            "expected: pass the one to explain as encoder=."
        )
    for name, module, architecture in found.values():
        return _resolve(root, name, module, architecture)
    return None


def unsupported(root: nn.Module) -> UnsupportedModelError:
    """The error for a model without a registered encoder."""
    types = list(
        dict.fromkeys(t for m in root.modules() if (t := model_type(m)) is not None)
    )
    known = [t for t in types if layouts_of(t)]
    if known:
        path = layouts_of(known[0])[0].layers
        return UnsupportedModelError(
            f"{type(root).__name__} has model type {known[0]!r}, whose layers are "
            f"expected at {path!r} of one of its parts, and no part has that. "
            "Pass the whole encoder, or describe the changed model with "
            "captum_globenc.register_architecture."
        )
    if types:
        found = "model type " + ", ".join(repr(t) for t in types)
    else:
        found = "no model type (no part has a transformers config)"
    return UnsupportedModelError(
        f"{type(root).__name__}: {found} is not supported. Supported model types: "
        f"{', '.join(supported_model_types())}. To add one, describe its layers with "
        "captum_globenc.register_architecture(model_type, Architecture(...))."
    )


def model_type(module: nn.Module) -> str | None:
    """``config.model_type`` of a Hugging Face module, None for any other module."""
    # From __dict__: looking for a missing attribute of a module is slow, and this is
    # asked of every part of a model.
    value = getattr(vars(module).get("config"), "model_type", None)
    return value if isinstance(value, str) else None


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None


def _fits(module: nn.Module, layout: Architecture) -> bool:
    """Whether an encoder has all the parts of a layout, as far as its first layer."""
    of_encoder = {"layers", "embeddings", "positions", "patches", "final_norm"}
    layers = _submodule(module, layout.layers)
    first = next(layers.children(), None) if layers is not None else None
    return first is not None and all(
        _submodule(module if field in of_encoder else first, path) is not None
        for field, path in vars(layout).items()
        if path is not None
    )


def _resolve(
    root: nn.Module, name: str, module: nn.Module, architecture: Architecture
) -> Encoder:
    prefix = f"{name}." if name else ""

    def part(
        field: str, kind: type[Part], owner: nn.Module = module, owner_name: str = ""
    ) -> Part:
        path = getattr(architecture, field)
        result = _submodule(owner, path)
        if result is None:
            near = difflib.get_close_matches(
                path, [n for n, _ in owner.named_modules() if n], n=1, cutoff=0.3
            )
            hint = f" (nearest: {near[0]!r})" if near else ""
            raise UnsupportedModelError(
                f"{type(module).__name__} (model type {model_type(module)!r}): its "
                f"{field} should be at {owner_name}{path!r}, and there is nothing"
                f"{hint}. Describe the model with captum_globenc.register_architecture."
            )
        if not isinstance(result, kind):
            raise UnsupportedModelError(
                f"{type(module).__name__} (model type {model_type(module)!r}): its "
                f"{field} at {owner_name}{path!r} should be a {kind.__name__} and is a "
                f"{type(result).__name__}, which this package cannot decompose."
            )
        return result

    def optional(field: str, kind: type[Part]) -> Part | None:
        return None if getattr(architecture, field) is None else part(field, kind)

    layer_list = part("layers", nn.ModuleList)
    if len(layer_list) == 0:
        raise UnsupportedModelError(f"{type(module).__name__} has no encoder layer.")
    final_norm = optional("final_norm", nn.LayerNorm)
    layers = []
    for index, layer in enumerate(layer_list):
        layer_name = f"{prefix}{architecture.layers}.{index}"
        where = (layer, f"{layer_name}.")
        watched: dict[str, nn.Module] = {
            "feed_forward": part("feed_forward", nn.Module, *where)
        }
        norms: tuple[nn.LayerNorm | None, nn.LayerNorm | None]
        if architecture.is_pre_norm:
            watched["feed_forward_norm"] = part("feed_forward_norm", nn.Module, *where)
            norms = (None, final_norm if index + 1 == len(layer_list) else None)
        else:
            norms = (
                part("attention_norm", nn.LayerNorm, *where),
                part("output_norm", nn.LayerNorm, *where),
            )
            watched.update(zip(("attention_norm", "output_norm"), norms))
        layers.append(
            LayerModules(
                name=layer_name,
                layer=layer,
                attention=part("attention", nn.Module, *where),
                output=part("output", nn.Linear, *where),
                norms=norms,
                watched=watched,
            )
        )
    embeddings = part("embeddings", nn.Module)
    # Captum's stand-in hands on what it is given: it looks up no id and no position.
    stands_in = isinstance(embeddings, InterpretableEmbeddingBase) or isinstance(
        _submodule(module, architecture.positions or ""), InterpretableEmbeddingBase
    )
    return Encoder(
        root=root,
        module=module,
        is_pre_norm=architecture.is_pre_norm,
        embeddings=embeddings,
        positions=None if stands_in else optional("positions", nn.Embedding),
        patches=optional("patches", nn.Conv2d),
        layers=tuple(layers),
        final_norm=final_norm,
    )
