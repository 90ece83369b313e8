"""How well a model fits its row of the table of families."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from captum_globenc.contributions.norm_scores import LOCAL_SCORES
from captum_globenc.contributions.rollout import decompose
from captum_globenc.encoders.discovery import find_encoder, unsupported
from captum_globenc.encoders.resolver import Encoder
from captum_globenc.encoders.weights import WeightCache
from captum_globenc.errors import InputError
from captum_globenc.recording.evaluation_mode import evaluating
from captum_globenc.recording.isolation import front_isolation, isolation
from captum_globenc.recording.run import observe
from captum_globenc.recording.verification import Fit


@dataclass(frozen=True)
class Report:
    """How well a model's recorded parts rebuild its layers.

    Args:
        family (str): the title of the model's family.
        layers (dict[str, Fit]): layer → its part that is rebuilt least well, or how
            much its tokens change with others that they do not attend to.
        seconds (float): how long one decomposition took.
    """

    family: str
    layers: dict[str, Fit]
    seconds: float


def check_model(model: nn.Module, *inputs: Tensor) -> Report:
    """Decompose inputs and compare each layer with its parts.

    Besides what every run checks, this sees whether tokens and examples meet in
    attention only, and whether values are made of the layer's own tokens.

    Args:
        model (nn.Module): holds one supported encoder.
        *inputs (Tensor): what the model is called with. Default: random ids, or random
            images, of a model of transformers.

    Returns:
        *Report*.

    Raises:
        GlobEncError: the model cannot be decomposed.
    """
    encoder = find_encoder(model)
    if encoder is None:
        raise unsupported(model)
    if not inputs:
        inputs = (_random_inputs(model, encoder),)
    start = time.perf_counter()
    run = observe(model, inputs[:1], inputs[1:], encoder, WeightCache(), False)
    with torch.no_grad():
        decompose(run, LOCAL_SCORES["N_ENC"])
    seconds = time.perf_counter() - start
    worst: dict[str, Fit] = {}
    with evaluating(model):
        for fit in (*run.fits, *isolation(run), *front_isolation(model, run)):
            known = worst.setdefault(fit.layer, fit)
            if fit.deviation / fit.limit > known.deviation / known.limit:
                worst[fit.layer] = fit
    return Report(encoder.family.title, worst, seconds)


def _random_inputs(model: nn.Module, encoder: Encoder) -> Tensor:
    """Two examples, of at most so many tokens, the same on every run."""
    generator = torch.Generator().manual_seed(0)
    config = getattr(model, "config", None)
    if config is None:
        raise InputError(
            f"{type(model).__name__} has no config of transformers from which inputs "
            "could be made: pass the tensors that it is called with."
        )
    if encoder.patches is not None:
        size, channels = config.image_size, getattr(config, "num_channels", 3)
        height, width = (size, size) if isinstance(size, int) else size
        shape = (2, channels, height, width)
        return torch.randn(shape, generator=generator).to(
            next(model.parameters()).dtype
        )
    # Not the special tokens at the start of a vocabulary.
    first = min(10, config.vocab_size // 2)
    tokens = min(16, encoder.max_tokens or 16)
    return torch.randint(first, config.vocab_size, (2, tokens), generator=generator)
