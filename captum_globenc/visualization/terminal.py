"""An explanation in a terminal.

Blue is positive and orange negative, which people with colour-blindness tell apart, and
the tokens carry numbers that say the same, so nothing rests on colour alone.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from rich.cells import cell_len
from rich.color import Color
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.style import Style
from rich.text import Text

from captum_globenc.comparison.explanation import Explanation, MethodScores
from captum_globenc.visualization.text import (
    LEAST,
    described,
    number,
    strengths,
    title,
    unknown_tokens,
    visible,
)

# On dark and on light terminals alike: white letters on grounds of about one lightness,
# from grey (weak) to full colour (strong). Contrast with white is at least 4.5.
_WEAK = (118, 118, 118)
_POSITIVE = (0, 90, 220)
_NEGATIVE = (190, 80, 0)
_LETTERS = Color.from_rgb(255, 255, 255)
_LEFT_TO_RIGHT_MARK = "\N{LEFT-TO-RIGHT MARK}"


def to_terminal(explanation: Explanation) -> RenderableType:
    """The explanation for a terminal, as something that ``rich`` prints.

    Args:
        explanation (Explanation): of ``captum_globenc.explanation.explain``.

    Returns:
        *RenderableType*: the prediction and, per method, the tokens with the colour of
        their score and, below them, their score in percent of the strongest.
    """
    parts: list[RenderableType] = [_header(explanation)]
    for method in explanation.methods:
        parts += [_heading(method, explanation.local)]
        parts += [_Sentence(explanation.tokens, method)]
    return Group(*parts, _legend())


@dataclass(frozen=True)
class _Sentence:
    """The tokens in lines, each with its number below it."""

    tokens: tuple[str, ...]
    method: MethodScores

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[Text]:
        above, below = _line(), _line()
        for token, strength in zip(
            self.tokens, strengths(self.method.scores), strict=True
        ):
            shown = Text(_in_line(token), style=_style(strength))
            shown.truncate(options.max_width, overflow="ellipsis")
            below_it = number(strength)
            width = max(shown.cell_len, cell_len(below_it))
            if above and above.cell_len + width > options.max_width:
                yield from (above, below)
                above, below = _line(), _line()
            above.append_text(shown).append(" " * (width - shown.cell_len + 1))
            below.append(below_it.ljust(width + 1))
        yield from (above, below)


def _line() -> Text:
    # Filled up to the width below, except for the blank after the last token.
    return Text(no_wrap=True, overflow="crop")


def _header(explanation: Explanation) -> Text:
    header = Text("Predicted: ")
    header.append(described(explanation.predicted), style="bold")
    if explanation.target != explanation.predicted:
        header.append("   Explained: ")
        header.append(described(explanation.target), style="bold")
    if explanation.dropped_tokens:
        kept = len(explanation.tokens)
        header.append(
            f"\nThe first {kept} of {kept + explanation.dropped_tokens} tokens: the "
            "text is longer than the model's positions."
        )
    if unknown := unknown_tokens(explanation):
        header.append(f"\n{unknown}")
    return header


def _heading(method: MethodScores, local: str) -> Text:
    heading = Text("\n")
    heading.append(title(method, local), style="bold")
    return heading.append(f"  {method.seconds:.2f} s")


def _legend() -> Text:
    least = round(100 * LEAST)
    legend = Text(
        f"\nNumbers: 100 for a method's strongest token, none below {least}. "
    )
    legend.append("positive", style=_style(1)).append(" ")
    return legend.append("-negative", style=_style(-1))


def _style(strength: float) -> Style:
    if abs(strength) < LEAST:
        return Style.null()
    colour = _NEGATIVE if strength < 0 else _POSITIVE
    ground = [
        round(weak + abs(strength) * (full - weak)) for weak, full in zip(_WEAK, colour)
    ]
    return Style(color=_LETTERS, bgcolor=Color.from_rgb(*ground))


def _in_line(token: str) -> str:
    """A token that keeps its place in the line.

    Terminals that reorder right-to-left text would else take words away from their
    numbers.
    """
    shown = visible(token)
    if any(unicodedata.bidirectional(c) in ("R", "AL") for c in shown):
        return _LEFT_TO_RIGHT_MARK + shown
    return shown
