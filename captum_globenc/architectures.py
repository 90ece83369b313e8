"""Further model families: what the package needs to know of them."""

from captum_globenc.encoders.registry import (
    Registration,
    register_architecture,
    supported_model_types,
)

__all__ = ["Registration", "register_architecture", "supported_model_types"]
