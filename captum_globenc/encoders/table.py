"""What the table of families says, for people."""

from __future__ import annotations

from typing import NamedTuple

from captum_globenc.encoders.architecture import Family
from captum_globenc.encoders.families import FAMILIES, REFUSED

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
