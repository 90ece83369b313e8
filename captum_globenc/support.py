"""What the table of families says, for people; and how well a model fits its row."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from captum_globenc.contributions.norm_scores import LOCAL_SCORES
from captum_globenc.contributions.rollout import decompose
from captum_globenc.encoders.architecture import Family
from captum_globenc.encoders.discovery import find_encoder, unsupported
from captum_globenc.encoders.families import FAMILIES, REFUSED
from captum_globenc.encoders.resolver import Encoder
from captum_globenc.encoders.weights import WeightCache
from captum_globenc.errors import InputError
from captum_globenc.recording.evaluation_mode import evaluating
from captum_globenc.recording.isolation import front_isolation, isolation
from captum_globenc.recording.run import observe
from captum_globenc.recording.verification import Fit

#: The newest transformers that the tests ran with.
NEWEST_TESTED = "5.23.0"
# How attention knows of positions → what its scores need beyond the paper.
_EXTENSIONS = {
    "rotary": "rotary positions",
    "relative bias": "relative bias",
    "disentangled": "disentangled attention",
}


class Row(NamedTuple):
    """A family as the support table shows it, all of it text."""

    name: str
    title: str
    norms: str
    attention: str
    extension: str
    since: str
    note: str


def rows() -> list[Row]:
    """The table of families, in alphabetical order of their titles."""
    table = [_row(name, family) for name, family in FAMILIES.items()]
    return sorted(table, key=lambda row: row.title.lower())


def _row(name: str, family: Family) -> Row:
    placements = {layout.is_pre_norm for layout in family.layouts}
    placed = " or ".join("pre-LN" if pre else "post-LN" for pre in sorted(placements))
    scaled = any(layout.attention_layer_scale for layout in family.layouts)
    extensions = [
        *(["pre-LN layers"] if True in placements else []),
        *(["RMSNorm"] if family.rms_norm else []),
        *(["LayerScale"] if scaled else []),
        *(words for kind, words in _EXTENSIONS.items() if kind in family.positions),
    ]
    return Row(
        name,
        family.title,
        f"{placed}, {'RMSNorm' if family.rms_norm else 'LayerNorm'}",
        _attention(family),
        ", ".join(extensions) or "none: all is the paper's",
        family.since,
        family.note,
    )


def _attention(family: Family) -> str:
    """What there is in attention beside queries and keys."""
    # Learned positions are in the embeddings, not here.
    inside = family.positions.replace("learned", "none")
    if family.causal:
        return "causal" if inside == "none" else f"causal, {inside}"
    return inside


def to_markdown() -> str:
    """The support table and the families that are refused, as Markdown."""
    head = [
        "Family",
        "`model_type` or class",
        "Norms",
        "Mask and bias of attention",
        "Extensions of the paper",
        "`transformers`",
        "Note",
    ]
    lines = [head, ["---"] * len(head)]
    lines += [
        [
            row.title,
            # Of a class its own name: a whole path makes the table too wide.
            f"`{row.name.rpartition('.')[2]}`" if " " not in row.name else "",
            row.norms,
            row.attention,
            row.extension,
            f"{row.since} to {NEWEST_TESTED}",
            row.note,
        ]
        for row in rows()
    ]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    refused = "\n".join(f"* `{name}` {why}." for name, why in sorted(REFUSED.items()))
    table = f":::{{div}} wide\n\n{table}\n\n:::"
    return f"{table}\n\n## Refused, with the reason\n\n{refused}\n"


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
