"""Which family a module belongs to, and the one door for further families."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager

from torch import nn

from captum_globenc.encoders.architecture import Architecture, Family
from captum_globenc.encoders.families import FAMILIES, REFUSED, TORCH_STACK

_TABLE = FAMILIES


def supported_model_types() -> tuple[str, ...]:
    """The registered names, in alphabetical order: model types, then classes."""
    return tuple(sorted(_TABLE, key=lambda name: (" " in name or "." in name, name)))


class Registration(AbstractContextManager["Registration"]):
    """A registered family, with the way back.

    Args:
        name (str): under which the family is registered.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._row = _TABLE[name]

    def remove(self) -> None:
        """Take the family out of the table again; a second time does nothing."""
        if _TABLE.get(self.name) is self._row:
            del _TABLE[self.name]

    def __exit__(self, *_: object) -> None:
        self.remove()


def register_architecture(
    model_type: str | type[nn.Module], architecture: Architecture
) -> Registration:
    """Teach the package a model family.

    Args:
        model_type (str or type[nn.Module]): the ``config.model_type`` of the family's
            models or, for models without one, the class of the encoder: the module
            from which the paths start. Subclasses count.
        architecture (Architecture): where the parts of the encoder are.

    Returns:
        *Registration*: ``remove()`` takes the family out again, as does leaving it as a
        context manager.

    Raises:
        TypeError: a key or description of another type.
        ValueError: the family is registered already; ``remove()`` that first.

    Examples::

        >>> from captum_globenc import Architecture, register_architecture
        >>> registration = register_architecture(
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
        >>> registration.remove()
    """
    if not isinstance(architecture, Architecture):
        raise TypeError(
            "architecture must be a captum_globenc.Architecture, got "
            f"{type(architecture).__name__}"
        )
    if isinstance(model_type, type) and issubclass(model_type, nn.Module):
        name = _class_name(model_type)
    elif isinstance(model_type, str):
        name = model_type
    else:
        raise TypeError(
            "model_type must be a config.model_type or a class of torch.nn.Module, got "
            f"{model_type!r}"
        )
    if name in _TABLE:
        raise ValueError(
            f"{name!r} is registered already, as {_TABLE[name].title!r}: remove() that "
            "registration first, or register a subclass or a model_type of your own."
        )
    _TABLE[name] = Family(title=name, layouts=(architecture,), positions="any")
    return Registration(name)


def family_of(name: str | None) -> Family | None:
    """The row of this name."""
    return _TABLE.get(name or "")


def reason_against(model_type: str) -> str | None:
    """Why a known family cannot be decomposed; None where that is not known."""
    return REFUSED.get(model_type)


def names_of(module: nn.Module) -> tuple[str, ...]:
    """The names under which a module's family may be registered, best first."""
    named = model_type(module)
    own = [] if named is None else [named]
    if _is_torch_stack(module):
        own.append(TORCH_STACK)
    return (*own, *_class_names(type(module)))  # type: ignore[arg-type]


def model_type(module: nn.Module) -> str | None:
    """``config.model_type`` of a Hugging Face module, None for any other module."""
    # From __dict__: looking for a missing attribute of a module is slow, and this is
    # asked of every part of a model.
    value = getattr(vars(module).get("config"), "model_type", None)
    return value if isinstance(value, str) else None


def _is_torch_stack(module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList | nn.Sequential):
        return any(isinstance(m, nn.TransformerEncoderLayer) for m in module.children())
    return isinstance(module, nn.TransformerEncoderLayer)


@functools.cache
def _class_names(kind: type) -> tuple[str, ...]:
    return tuple(_class_name(base) for base in kind.__mro__)


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
