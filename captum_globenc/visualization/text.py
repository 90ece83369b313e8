"""How tokens, classes, methods and numbers are written, wherever they are shown."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from captum_globenc.comparison.explanation import ClassScore, Explanation, MethodScores

# Tokens that are weaker, relative to the strongest, have no number, so that the others
# stand out.
LEAST = 0.1
_INVISIBLE = ("Cc", "Cs", "Zl", "Zp")


def visible(token: str) -> str:
    """No control characters, line ends or what is no character.

    A terminal would obey them, and XML cannot hold them.
    """
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if unicodedata.category(c) in _INVISIBLE or c in "\ufffe\uffff"
        else c
        for c in token
    )


def shortened(text: str, longest: int) -> str:
    """At most so many characters, the last an ellipsis where some are left out."""
    if len(text) <= longest:
        return text
    return text[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"


def direction(text: str) -> str:
    """Which way the text runs: that of its first letter, as browsers decide it.

    They cannot where tokens such as [CLS] come first.
    """
    for c in text:
        if unicodedata.bidirectional(c) in ("L", "R", "AL"):
            return "ltr" if unicodedata.bidirectional(c) == "L" else "rtl"
    return "ltr"


def title(method: MethodScores, local: str) -> str:
    """``globenc (N_ENC)``, or the name alone of any other method."""
    return f"{method.name} ({local})" if method.name == "globenc" else method.name


def described(output: ClassScore) -> str:
    """``positive (99.5%)``, or the value of a regression."""
    if output.probability is None:
        return f"{visible(output.label)} = {output.logit:.4g}"
    return f"{visible(output.label)} ({output.probability:.1%})"


def unknown_tokens(explanation: Explanation) -> str:
    """A warning where the model cannot tell words apart, else nothing."""
    unknown = sum(explanation.unknown)
    if not unknown:
        return ""
    all_of = len(explanation.tokens) - sum(explanation.special)
    return (
        f"{unknown} of {all_of} tokens are not in the tokenizer's vocabulary: to the "
        "model they are all the same."
    )


def strengths(scores: Iterable[float]) -> list[float]:
    """Each score relative to the strongest, from -1 to 1."""
    scores = list(scores)
    most = max(map(abs, scores))
    return [score / most if most else 0.0 for score in scores]


def number(strength: float) -> str:
    """In percent of the strongest; none for what is weak."""
    return "" if abs(strength) < LEAST else str(round(100 * strength))
