"""Find the encoder in a model."""

from __future__ import annotations

from collections.abc import Iterator

import transformers
from packaging.version import Version
from torch import nn

from captum_globenc.encoders.architecture import Architecture, Family
from captum_globenc.encoders.registry import (
    family_of,
    model_type,
    names_of,
    reason_against,
    supported_model_types,
)
from captum_globenc.encoders.resolver import (
    Encoder,
    Resolver,
    fits,
    submodule,
)
from captum_globenc.errors import UnsupportedModelError


def find_encoder(root: nn.Module) -> Encoder | None:
    """The one supported encoder inside ``root`` (``root`` itself included).

    Args:
        root (nn.Module): a model or a part of one.

    Returns:
        *Encoder* or *None* where ``root`` holds no model of a registered family.

    Raises:
        UnsupportedModelError: two encoders, or a part is missing or of another kind.
    """
    matches = list(_matches(root))
    if len(matches) > 1:
        # One may lie inside another, and be seen on another path.
        parts = [set(module.modules()) for _, module, *_ in matches]
        matches = [
            match
            for index, match in enumerate(matches)
            if not any(match[1] in inside for inside in parts[:index])
        ]
    if len(matches) > 1:
        names = ", ".join(repr(name) for name, *_ in matches)
        raise UnsupportedModelError(
            f"{type(root).__name__} holds {len(matches)} encoders ({names}) and one is "
            "expected: pass the one to explain as encoder=."
        )
    for name, module, family, architecture in matches:
        if _is_too_old_for(family):
            raise _too_old(family)
        return Resolver(name, module, family, architecture).encoder(root)
    return None


def _matches(
    root: nn.Module,
) -> Iterator[tuple[str, nn.Module, Family, Architecture]]:
    """Encoders of known families, in the order of their names; not inside others."""
    seen, waiting = set(), [("", root)]
    while waiting:
        name, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        match = _match(module)
        if match is not None:
            yield (name, module, *match)
            continue
        parts = [
            (f"{name}.{own}".lstrip("."), part) for own, part in module.named_children()
        ]
        waiting += reversed(parts)


def _is_too_old_for(family: Family) -> bool:
    return Version(transformers.__version__) < Version(family.since)


def _too_old(family: Family) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{family.title} needs transformers {family.since} or newer, whose attention "
        f"for it can be recorded, and transformers {transformers.__version__} is "
        "installed."
    )


def _match(module: nn.Module) -> tuple[Family, Architecture] | None:
    """The family of an encoder, and the layout of it that fits best."""
    for name in names_of(module):
        family = family_of(name)
        # The head and the encoder share one config: the encoder is the module from
        # which the path to the layers starts.
        layouts = [
            layout
            for layout in (() if family is None else family.layouts)
            if submodule(module, layout.layers.split(".")[0]) is not None
        ]
        if family is not None and layouts:
            fitting = [layout for layout in layouts if fits(module, layout)]
            return family, (fitting or layouts)[0]
    return None


def unsupported(root: nn.Module) -> UnsupportedModelError:
    """The error for a model without a registered encoder."""
    types = list(
        dict.fromkeys(t for m in root.modules() if (t := model_type(m)) is not None)
    )
    known = [family for t in types if (family := family_of(t)) is not None]
    if known and _is_too_old_for(known[0]):
        return _too_old(known[0])
    if known:
        path = known[0].layouts[0].layers
        return UnsupportedModelError(
            f"{type(root).__name__} has model type {types[0]!r}, whose layers are "
            f"expected at {path!r} of one of its parts, and no part has that. "
            "Pass the whole encoder, or describe the changed model with "
            "captum_globenc.register_architecture."
        )
    reasons = refusals(types)
    if reasons:
        return UnsupportedModelError(f"{type(root).__name__}: {reasons}")
    if types:
        what = "model type " + ", ".join(repr(t) for t in types)
    else:
        what = "no model type (no part has a transformers config)"
    return UnsupportedModelError(
        f"{type(root).__name__}: {what} is not supported. Supported model types: "
        f"{', '.join(supported_model_types())}. To add one, describe its layers with "
        "captum_globenc.register_architecture(model_type, Architecture(...))."
    )


def refusals(types: list[str]) -> str:
    """Why known families among these model types cannot be decomposed; "" for none."""
    reasons = [
        f"model type {kind!r} is not supported: it {reason}."
        for kind in dict.fromkeys(types)
        if (reason := reason_against(kind)) is not None
    ]
    if reasons:
        reasons.append(
            "Captum's own methods, such as LayerIntegratedGradients, need no "
            "decomposition and explain it."
        )
    return " ".join(reasons)


def no_encoder_ran(candidates: list[tuple[str, str | None]]) -> UnsupportedModelError:
    """The error for a function in which no registered encoder ran.

    Args:
        candidates (list[tuple[str, str or None]]): class and model type of what ran.
    """
    reasons = refusals([kind for _, kind in candidates if kind is not None])
    if reasons:
        return UnsupportedModelError(
            f"No supported encoder ran inside forward_func: {reasons}"
        )
    names = [
        f"{name} of model type {kind!r}" if kind else name for name, kind in candidates
    ]
    ran = ", ".join(dict.fromkeys(names)) or "no torch.nn.Module"
    return UnsupportedModelError(
        "No supported encoder ran inside forward_func (seen: "
        f"{ran}; supported model types: {', '.join(supported_model_types())})"
        ". Pass the whole model as encoder=, or describe its layers with "
        "captum_globenc.register_architecture. What torch.compile made of a function "
        "cannot be seen: pass the function itself."
    )
