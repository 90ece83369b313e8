"""Token attribution for transformers, as Captum methods.

The public names are loaded when they are first used, so that ``import captum_globenc``
and the command line's ``--help`` do not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from captum_globenc import demo
    from captum_globenc.attribution.alti import ALTI
    from captum_globenc.attribution.attention_rollout import AttentionRollout
    from captum_globenc.attribution.attnlrp import AttnLRP, LayerAttnLRP
    from captum_globenc.attribution.decompx import DecompX, LayerDecompX
    from captum_globenc.attribution.globenc import GlobEnc
    from captum_globenc.attribution.layer_globenc import LayerGlobEnc
    from captum_globenc.attribution.value_zeroing import ValueZeroing
    from captum_globenc.contributions.norm_scores import LOCAL_SCORES
    from captum_globenc.contributions.rollout import Decomposition
    from captum_globenc.encoders.architecture import Architecture
    from captum_globenc.encoders.registry import (
        register_architecture,
        supported_model_types,
    )
    from captum_globenc.errors import (
        ConservationError,
        GlobEncError,
        InputError,
        NonFiniteActivationError,
        ReconstructionError,
        UnsupportedModelError,
    )
    from captum_globenc.recording.run import EncoderRun, record

_HOMES = {
    "ALTI": "attribution.alti",
    "Architecture": "encoders.architecture",
    "AttentionRollout": "attribution.attention_rollout",
    "AttnLRP": "attribution.attnlrp",
    "ConservationError": "errors",
    "DecompX": "attribution.decompx",
    "Decomposition": "contributions.rollout",
    "EncoderRun": "recording.run",
    "GlobEnc": "attribution.globenc",
    "GlobEncError": "errors",
    "InputError": "errors",
    "LOCAL_SCORES": "contributions.norm_scores",
    "LayerAttnLRP": "attribution.attnlrp",
    "LayerDecompX": "attribution.decompx",
    "LayerGlobEnc": "attribution.layer_globenc",
    "NonFiniteActivationError": "errors",
    "ReconstructionError": "errors",
    "UnsupportedModelError": "errors",
    "ValueZeroing": "attribution.value_zeroing",
    "record": "recording.run",
    "register_architecture": "encoders.registry",
    "supported_model_types": "encoders.registry",
}

__all__ = [
    "ALTI",
    "LOCAL_SCORES",
    "Architecture",
    "AttentionRollout",
    "AttnLRP",
    "ConservationError",
    "DecompX",
    "Decomposition",
    "EncoderRun",
    "GlobEnc",
    "GlobEncError",
    "InputError",
    "LayerAttnLRP",
    "LayerDecompX",
    "LayerGlobEnc",
    "NonFiniteActivationError",
    "ReconstructionError",
    "UnsupportedModelError",
    "ValueZeroing",
    "demo",
    "record",
    "register_architecture",
    "supported_model_types",
]


def __getattr__(name: str) -> Any:
    if name == "demo":
        return importlib.import_module("captum_globenc.demo")
    if name in _HOMES:
        return getattr(importlib.import_module(f"captum_globenc.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'captum_globenc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
