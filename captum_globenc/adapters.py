"""Token scores in the shapes that Captum, and people, use."""

from captum_globenc.attribution.adapters import (
    layer_matrix,
    mask_special_tokens,
    shaped_like,
    spread_over_embedding,
    to_image,
    to_words,
    unit_range,
)

__all__ = [
    "layer_matrix",
    "mask_special_tokens",
    "shaped_like",
    "spread_over_embedding",
    "to_image",
    "to_words",
    "unit_range",
]
