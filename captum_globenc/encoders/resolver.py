"""The parts of an encoder, looked up by the paths of an architecture."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from captum.attr import InterpretableEmbeddingBase
from torch import Tensor, nn

from captum_globenc.encoders.architecture import Architecture, Family
from captum_globenc.encoders.parts import LayerParts, is_linear, is_norm
from captum_globenc.encoders.registry import model_type
from captum_globenc.errors import UnsupportedModelError


@dataclass(frozen=True)
class LayerModules:
    """The parts of one encoder layer.

    Args:
        name (str): the layer's name in the model.
        layer (nn.Module): the layer itself.
        attention (nn.Module): the layer attends inside it.
        parts (LayerParts): what decomposes the layer.
        watched (dict[str, nn.Module]): the parts whose inputs and outputs must rebuild
            the layer, by their names in :class:`~captum_globenc.Architecture`.
        feed_forward_layer_scale (Tensor or None): (hidden), multiplies the feed-forward
            branch.
    """

    name: str
    layer: nn.Module
    attention: nn.Module
    parts: LayerParts
    watched: dict[str, nn.Module]
    feed_forward_layer_scale: Tensor | None


@dataclass(frozen=True)
class Encoder:
    """An encoder found in a model, with its parts resolved.

    Args:
        root (nn.Module): the model that was searched, with its head.
        name (str): the encoder's name in it; "" for the model itself.
        module (nn.Module): the encoder itself.
        family (Family): its row of the table.
        architecture (Architecture): the layout of the row that fits.
        embeddings (nn.Module or None): takes ids, embeddings or images.
        positions (nn.Embedding or None): the table of position embeddings.
        patches (nn.Conv2d or None): cuts images into patches.
        layers (tuple[LayerModules, ...]): bottom layer first; of shared modules, each
            once.
        final_norm (nn.Module or None): after the last layer.
    """

    root: nn.Module
    name: str
    module: nn.Module
    family: Family
    architecture: Architecture
    embeddings: nn.Module | None
    positions: nn.Embedding | None
    patches: nn.Conv2d | None
    layers: tuple[LayerModules, ...]
    final_norm: nn.Module | None

    @property
    def max_tokens(self) -> int | None:
        """The longest input that the position table allows, in tokens; None: no limit.

        RoBERTa numbers positions from ``padding_idx + 1``, BART from an offset.
        """
        if self.positions is None:
            return None
        reserved = self.positions.padding_idx
        first = 0 if reserved is None else reserved + 1
        # BART's positions begin at an offset.
        return self.positions.num_embeddings - max(
            first, getattr(self.positions, "offset", 0)
        )

    @property
    def token_table(self) -> nn.Module | None:
        """The table of token embeddings, or what stands in for it."""
        table = getattr(self.module, "get_input_embeddings", None)
        if table is not None and not isinstance(
            self.embeddings, InterpretableEmbeddingBase
        ):
            return table()  # type: ignore[no-any-return]
        inside = [] if self.embeddings is None else self.embeddings.modules()
        kinds = (nn.Embedding, InterpretableEmbeddingBase)
        return next((module for module in inside if isinstance(module, kinds)), None)

    @property
    def token_weights(self) -> Tensor | None:
        """The weights of the table of token embeddings, where there is a plain one."""
        weights = getattr(self.token_table, "weight", None)
        return weights if isinstance(weights, Tensor) else None


def submodule(module: nn.Module, path: str) -> nn.Module | None:
    """The part at a path, None where there is none; "" is the module itself.

    Not ``get_submodule``: wrappers such as PEFT's pretend to have the parts of what
    they wrap. Wrappers that change nothing are looked through.
    """
    part: nn.Module | None = unwrapped(module)
    for name in path.split(".") if path else []:
        inner = None if part is None else part._modules.get(name)
        part = None if inner is None else unwrapped(inner)
    return part


def unwrapped(module: nn.Module) -> nn.Module:
    """What runs inside a compiled module, or one of which PEFT trains a copy."""
    parts = module._modules
    compiled, original = parts.get("_orig_mod"), parts.get("original_module")
    copies = parts.get("modules_to_save")
    if compiled is not None:
        return unwrapped(compiled)
    if original is not None and copies is not None:
        active = [] if module.disable_adapters else list(module.active_adapters)  # type: ignore[arg-type]
        trained = [copies._modules.get(name) for name in active]
        return next((copy for copy in trained if copy is not None), original)
    return module


def layers_of(module: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """The layers and their names; a ``*`` in the path is each part of a list."""
    owners = [("", unwrapped(module))]
    for name in path.split(".") if path else []:
        owners = [
            (f"{owner_name}.{part_name}".lstrip("."), unwrapped(part))
            for owner_name, owner in owners
            for part_name, part in owner._modules.items()
            if part is not None and name in (part_name, "*")
        ]
    lists = (nn.ModuleList, nn.Sequential)
    if not path and not isinstance(module, lists):
        return [("", module)]
    return [
        (f"{owner_name}.{name}".lstrip("."), layer)
        for owner_name, owner in owners
        if isinstance(owner, lists)
        for name, wrapped in owner.named_children()
        for layer in [unwrapped(wrapped)]
        # A stack may have other parts in between.
        if path or isinstance(layer, nn.TransformerEncoderLayer)
    ]


def fits(module: nn.Module, layout: Architecture) -> bool:
    """Whether an encoder has all the parts of a layout, as far as its first layer."""
    layers = layers_of(module, layout.layers)
    if not layers:
        return False
    first = layers[0][1]
    parts = [(module, getattr(layout, field)) for field in _OF_ENCODER]
    parts += [(first, getattr(layout, field)) for field in _OF_LAYER]
    final = submodule(module, layout.final_norm or "")
    return (
        all(_is_there(owner, path) for owner, path in parts if path)
        and not isinstance(final, nn.Identity)
        and all(
            _attribute(first, path) == value for path, value in layout.only_if.items()
        )
    )


def _is_there(owner: nn.Module, path: str) -> bool:
    value = _attribute(owner, path)
    return isinstance(value, Tensor) or submodule(owner, path) is not None


_OF_ENCODER = ("embeddings", "positions", "patches", "final_norm")
_OF_LAYER = (
    "attention",
    "output",
    "attention_norm",
    "output_norm",
    "feed_forward",
    "feed_forward_norm",
)


def _attribute(module: nn.Module, path: str) -> object:
    owner, _, name = path.rpartition(".")
    return getattr(submodule(module, owner), name, None)


_NORM = (is_norm, "LayerNorm or RMSNorm")
# Parts of a layer whose inputs and outputs are looked at, and what they must be.
_WATCHED: dict[str, tuple[Callable[[nn.Module], bool] | None, str]] = {
    "attention_norm": _NORM,
    "output_norm": _NORM,
    "feed_forward": (None, ""),
    "feed_forward_norm": (None, ""),
}
# Parts that a model may lack: what they say is then not checked.
_OPTIONAL = ("value", "input_norm")


def _of_kind(kind: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: isinstance(module, kind)


@dataclass(frozen=True)
class Resolver:
    """Looks up the parts of one encoder; says where one is missing."""

    name: str
    module: nn.Module
    family: Family
    architecture: Architecture

    def encoder(self, root: nn.Module) -> Encoder:
        """The encoder with all of its parts."""
        layout = self.architecture
        layers = layers_of(self.module, layout.layers)
        if not layers:
            raise UnsupportedModelError(
                f"{type(self.module).__name__} has no encoder layer at "
                f"{layout.layers!r}."
            )
        final_norm = self._part("final_norm", is_norm, "LayerNorm or RMSNorm")
        embeddings = self._part("embeddings")
        # Captum's stand-in hands on what it is given, and looks up no id or position.
        stands_in = isinstance(embeddings, InterpretableEmbeddingBase) or isinstance(
            submodule(self.module, layout.positions or ""), InterpretableEmbeddingBase
        )
        return Encoder(
            root=root,
            name=self.name,
            module=self.module,
            family=self.family,
            architecture=layout,
            embeddings=embeddings,
            positions=None
            if stands_in
            else self._part("positions", _of_kind(nn.Embedding), "Embedding"),  # type: ignore[arg-type]
            patches=self._part("patches", _of_kind(nn.Conv2d), "Conv2d"),  # type: ignore[arg-type]
            layers=tuple(
                self._layer(
                    path, layer, final_norm if index + 1 == len(layers) else None
                )
                for index, (path, layer) in enumerate(layers)
            ),
            final_norm=final_norm,
        )

    def _layer(
        self, path: str, layer: nn.Module, final_norm: nn.Module | None
    ) -> LayerModules:
        name = ".".join(part for part in (self.name, path) if part)
        where = (layer, name)
        watched = {
            field: self._part(field, *kind, *where) for field, kind in _WATCHED.items()
        }
        for field in _OPTIONAL:
            path = getattr(self.architecture, field)
            watched[field] = None if path is None else submodule(layer, path)
        attention = self._part("attention", None, "", *where)
        output = self._output(*where)
        assert attention is not None
        return LayerModules(
            name=name or type(layer).__name__,
            layer=layer,
            attention=attention,
            parts=LayerParts(
                output,
                self._layer_scale("attention_layer_scale", *where),
                watched["attention_norm"],
                watched["output_norm"],
                final_norm,
            ),
            watched={part: module for part, module in watched.items() if module},
            feed_forward_layer_scale=self._layer_scale(
                "feed_forward_layer_scale", *where
            ),
        )

    def _output(self, layer: nn.Module, name: str) -> nn.Module | Tensor:
        """The linear map after the heads, or the parameter that is its matrix."""
        value = _attribute(layer, self.architecture.output)
        if isinstance(value, Tensor) and is_linear(value):
            return value
        module = self._part("output", is_linear, "Linear", layer, name)
        assert module is not None
        return module

    def _part(
        self,
        field: str,
        accepts: Callable[[nn.Module], bool] | None = None,
        expected: str = "",
        owner: nn.Module | None = None,
        owner_name: str = "",
    ) -> nn.Module | None:
        """The part at the path of a field; None where the layout names none."""
        path = getattr(self.architecture, field)
        if path is None:
            return None
        owner = self.module if owner is None else owner
        where = f"{owner_name}." if owner_name else ""
        result = submodule(owner, path)
        if result is None:
            raise self._missing(field, f"{where}{path!r}", path, owner)
        if accepts is not None and not accepts(result):
            raise UnsupportedModelError(
                f"{self._described()}: its {field} at {where}{path!r} should be a "
                f"{expected} and is a {type(result).__name__}, which this package "
                "cannot decompose."
            )
        return result

    def _layer_scale(
        self, field: str, layer: nn.Module, layer_name: str
    ) -> Tensor | None:
        """The vector at the path of a field; None for a scale of 1."""
        path = getattr(self.architecture, field)
        if path is None:
            return None
        value = _attribute(layer, path)
        if isinstance(value, Tensor) and value.ndim == 1:
            return value
        if value == 1:
            return None
        raise self._missing(field, f"{layer_name}.{path!r}", path, layer)

    def _missing(
        self, field: str, where: str, path: str, owner: nn.Module
    ) -> UnsupportedModelError:
        near = difflib.get_close_matches(
            path, [n for n, _ in owner.named_modules() if n], n=1, cutoff=0.3
        )
        hint = f" (nearest: {near[0]!r})" if near else ""
        return UnsupportedModelError(
            f"{self._described()}: its {field} should be at {where}, and there is "
            f"nothing{hint}. Describe the model with "
            "captum_globenc.register_architecture."
        )

    def _described(self) -> str:
        kind = model_type(self.module)
        family = self.family.title if kind is None else f"model type {kind!r}"
        return f"{type(self.module).__name__} ({family})"
