"""The local scores: how much each receiver of a layer takes from each source."""

from captum_globenc.contributions.norm_scores import (
    LOCAL_SCORES,
    attention_weights,
    attention_weights_fixed_residual,
    attention_weights_residual,
    local_score,
    norms,
    norms_encoder,
    norms_fixed_residual,
    norms_residual,
    norms_residual_layernorm,
)

__all__ = [
    "LOCAL_SCORES",
    "attention_weights",
    "attention_weights_fixed_residual",
    "attention_weights_residual",
    "local_score",
    "norms",
    "norms_encoder",
    "norms_fixed_residual",
    "norms_residual",
    "norms_residual_layernorm",
]
