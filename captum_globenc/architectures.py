"""Where the parts of an encoder are: one table, model type → paths.

A row holds module paths only. What the parts do is checked on every run: parts that do
not rebuild their layer raise
:class:`~captum_globenc.errors.ReconstructionError`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from torch import nn

from captum_globenc.errors import UnsupportedModelError


@dataclass(frozen=True)
class Architecture:
    r"""A family of post-LN encoders: paths to its parts.

    The layer must compute, with ``z`` the output of ``attention_norm``,

    .. code-block:: text

        y = x + output(attention(x))      z  = attention_norm(y)
        o = z + feed_forward(z)           x' = output_norm(o)

    Args:
        embeddings (str): from the encoder: the module that takes ``input_ids`` or
            ``inputs_embeds``.
        positions (str): from the encoder: the table of position embeddings.
        layers (str): from the encoder: the list of layers.
        attention (str): from a layer: the module that calls the attention function of
            ``transformers.AttentionInterface``.
        output (str): from a layer: the linear map after the heads, :math:`W_O, b_O`.
        attention_norm (str): from a layer: the LayerNorm after the first residual.
        feed_forward (str): from a layer: the last linear map of the feed-forward part.
        output_norm (str): from a layer: the LayerNorm after the second residual.
    """

    embeddings: str
    positions: str
    layers: str
    attention: str
    output: str
    attention_norm: str
    feed_forward: str
    output_norm: str


_BERT = Architecture(
    embeddings="embeddings",
    positions="embeddings.position_embeddings",
    layers="encoder.layer",
    attention="attention.self",
    output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    feed_forward="output.dense",
    output_norm="output.LayerNorm",
)

_DISTILBERT = Architecture(
    embeddings="embeddings",
    positions="embeddings.position_embeddings",
    layers="transformer.layer",
    attention="attention",
    output="attention.out_lin",
    attention_norm="sa_layer_norm",
    feed_forward="ffn.lin2",
    output_norm="output_layer_norm",
)

_TABLE: dict[str, Architecture] = {
    "bert": _BERT,
    "distilbert": _DISTILBERT,
    "electra": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
}


def supported_model_types() -> tuple[str, ...]:
    """The registered values of ``config.model_type``, in alphabetical order."""
    return tuple(sorted(_TABLE))


def register_architecture(model_type: str, architecture: Architecture) -> None:
    """Teach the package a model family.

    Args:
        model_type (str): the ``config.model_type`` of the family's models.
        architecture (Architecture): where the parts of the encoder are. An earlier
            entry for the same model type is replaced.

    Examples::

        >>> from captum_globenc import Architecture, register_architecture
        >>> register_architecture(
        ...     "their-bert",
        ...     Architecture(
        ...         embeddings="embeddings",
        ...         positions="embeddings.position_embeddings",
        ...         layers="encoder.layer",
        ...         attention="attention.self",
        ...         output="attention.output.dense",
        ...         attention_norm="attention.output.LayerNorm",
        ...         feed_forward="output.dense",
        ...         output_norm="output.LayerNorm",
        ...     ),
        ... )
    """
    if not isinstance(architecture, Architecture):
        raise TypeError(
            "architecture must be a captum_globenc.Architecture, got "
            f"{type(architecture).__name__}"
        )
    _TABLE[model_type] = architecture


@dataclass(frozen=True)
class LayerModules:
    """The parts of one encoder layer."""

    name: str
    layer: nn.Module
    attention: nn.Module
    output: nn.Linear
    attention_norm: nn.LayerNorm
    feed_forward: nn.Linear
    output_norm: nn.LayerNorm


@dataclass(frozen=True)
class Encoder:
    """An encoder found in a model, with its parts resolved.

    Args:
        root (nn.Module): the model that was searched, with its head.
        module (nn.Module): the encoder itself.
        embeddings (nn.Module): takes ids or embeddings.
        positions (nn.Embedding): the table of position embeddings.
        layers (tuple[LayerModules, ...]): bottom layer first.
    """

    root: nn.Module
    module: nn.Module
    embeddings: nn.Module
    positions: nn.Embedding
    layers: tuple[LayerModules, ...]

    @property
    def max_tokens(self) -> int:
        """The longest input that the position table allows, in tokens.

        RoBERTa numbers positions from ``padding_idx + 1``.
        """
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
        architecture = _TABLE.get(model_type(module) or "")
        if architecture is None or id(module) in found:
            continue
        # The head and the encoder share one config: the encoder is the module from
        # which the path to the layers starts.
        if _submodule(module, architecture.layers.split(".")[0]) is None:
            continue
        found[id(module)] = (name, module, architecture)
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
    known = [t for t in types if t in _TABLE]
    if known:
        return UnsupportedModelError(
            f"{type(root).__name__} has model type {known[0]!r}, whose layers are "
            f"expected at {_TABLE[known[0]].layers!r} of one of its parts, and no part "
            "has that. Pass the whole encoder, or describe the changed model with "
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


def _resolve(
    root: nn.Module, name: str, module: nn.Module, architecture: Architecture
) -> Encoder:
    prefix = f"{name}." if name else ""

    def part(owner: nn.Module, owner_name: str, field: str, kind: type) -> nn.Module:
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

    layer_list = part(module, "", "layers", nn.ModuleList)
    assert isinstance(layer_list, nn.ModuleList)
    if len(layer_list) == 0:
        raise UnsupportedModelError(f"{type(module).__name__} has no encoder layer.")
    kinds = {
        "attention": nn.Module,
        "output": nn.Linear,
        "attention_norm": nn.LayerNorm,
        "feed_forward": nn.Linear,
        "output_norm": nn.LayerNorm,
    }
    layers = []
    for index, layer in enumerate(layer_list):
        layer_name = f"{prefix}{architecture.layers}.{index}"
        parts = {f: part(layer, f"{layer_name}.", f, k) for f, k in kinds.items()}
        layers.append(LayerModules(name=layer_name, layer=layer, **parts))  # type: ignore[arg-type]
    positions = part(module, "", "positions", nn.Embedding)
    assert isinstance(positions, nn.Embedding)
    return Encoder(
        root=root,
        module=module,
        embeddings=part(module, "", "embeddings", nn.Module),
        positions=positions,
        layers=tuple(layers),
    )
