"""Letters of any script, as far as the installed fonts have them.

Matplotlib shapes and orders letters by itself, right-to-left scripts included. What it
does not do is to look for a font that has them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import matplotlib as mpl
from matplotlib.font_manager import (
    FontPath,
    FontProperties,
    findfont,
    fontManager,
    get_font,
)

from captum_globenc.visualization.text import shortened, visible

# Matplotlib's own, whose glyphs are boxes that say which script is missing.
_NOT_LETTERS = "Last Resort"
# Joiners, marks and modifiers such as the skin tones of emoji.
_COMBINING = ("Cf", "Mn", "Me", "Sk")
_PLAIN = {"style": "normal", "variant": "normal", "weight": 400, "stretch": "normal"}


def drawable(
    tokens: Sequence[str], longest: int = 24
) -> tuple[list[str], dict[str, Any]]:
    """Tokens as matplotlib can draw them, and the properties to draw them with.

    Control characters become visible, long tokens end in an ellipsis, and blank ones
    are an open box. A character that no installed font has is written as its code
    point, such as U+4E16, and an emoji by its name, such as :party popper:, because
    matplotlib cannot draw the coloured ones of a font. Joiners, marks and modifiers
    that no font has are left out.

    Args:
        tokens (sequence of str): any text.
        longest (int, optional): characters of a token that are kept. Default: 24.

    Returns:
        *tuple[list[str], dict]*: one short string per token, and arguments of
        ``matplotlib.text.Text``: fonts, and no formulas.
    """
    shown = [shortened(visible(token), longest) for token in tokens]
    used = frozenset("".join(shown)) - set(" ")
    usual = tuple(mpl.rcParams["font.family"])
    families, missing = _fonts(used, usual)
    drawn = [shortened(_spelled(token, missing), longest).strip() for token in shown]
    # Joiners alone are not printable.
    drawn = [
        token if any(map(str.isprintable, token)) else "\N{OPEN BOX}" for token in drawn
    ]
    return drawn, {
        "fontfamily": [*usual, *families],
        "parse_math": False,
        "usetex": False,
    }


def _spelled(token: str, missing: frozenset[str]) -> str:
    return "".join(
        c if c not in missing else _named(c)
        for c in token
        if c not in missing or unicodedata.category(c) not in _COMBINING
    )


def _named(character: str) -> str:
    name = unicodedata.name(character, "")
    if name and unicodedata.category(character) == "So":
        return f":{name.lower()}:"
    return f"U+{ord(character):04X}"


@lru_cache(maxsize=32)
def _fonts(
    characters: frozenset[str], usual: tuple[str, ...]
) -> tuple[list[str], frozenset[str]]:
    """Families that together have what the usual ones lack, and what none has."""
    missing = characters
    for family in usual:
        missing -= _having(findfont(FontProperties(family=[family])), missing)
    families: list[str] = []
    # Opening every font takes a while.
    faces = _installed(characters) if missing else {}
    covered = {family: _having(path, missing) for family, path in faces.items()}
    while found := {family: have & missing for family, have in covered.items()}:
        # Few fonts, so that a sentence looks of one piece; of equals the first.
        best = max(found, key=lambda family: len(found[family]))
        if not found[best]:
            break
        families.append(best)
        missing -= found[best]
    return families, missing


def _installed(characters: Iterable[str]) -> dict[str, FontPath]:
    """A regular face of every family, those first that suit running text best."""
    region = _region(characters)
    faces = {
        entry.name: FontPath(entry.fname, entry.index)
        for entry in fontManager.ttflist
        if not entry.name.startswith(_NOT_LETTERS)
        and all(getattr(entry, key) == value for key, value in _PLAIN.items())
    }
    ranked = sorted(
        faces,
        key=lambda name: (
            "Sans" not in name,
            "Mono" in name,
            not name.endswith(region),
            name,
        ),
    )
    return {name: faces[name] for name in ranked}


def _region(characters: Iterable[str]) -> str:
    """Chinese characters look different in Japan and Korea, and fonts say for whom."""
    names = {unicodedata.name(c, "").split(" ")[0] for c in characters}
    if names & {"HIRAGANA", "KATAKANA"}:
        return " JP"
    return " KR" if "HANGUL" in names else " SC"


def _having(path: FontPath | str, characters: Iterable[str]) -> frozenset[str]:
    try:
        font = get_font(path)
    except (OSError, RuntimeError):  # a file that is no font, or gone
        return frozenset()
    return frozenset(c for c in characters if font.get_char_index(ord(c)))
