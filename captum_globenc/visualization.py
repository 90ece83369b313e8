"""How an explanation looks: in the terminal, as a page, in Captum's visualisation.

Blue is positive and orange negative, which people with colour-blindness tell apart, and
the tokens carry numbers that say the same, so nothing rests on colour alone.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from captum.attr import visualization as captum_visualization
from jinja2 import Environment, PackageLoader
from rich.cells import cell_len
from rich.color import Color
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.style import Style
from rich.text import Text
from torch import Tensor

from captum_globenc.adapters import unit_range
from captum_globenc.errors import InputError
from captum_globenc.explanation import (
    ClassScore,
    Explanation,
    MethodScores,
    class_scores,
    evaluating,
    find_class,
    readable_token,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# On dark and on light terminals alike: white letters on grounds of about one lightness,
# from grey (weak) to full colour (strong). Contrast with white is at least 4.5.
_WEAK = (118, 118, 118)
_POSITIVE = (0, 90, 220)
_NEGATIVE = (190, 80, 0)
_LETTERS = Color.from_rgb(255, 255, 255)
# Tokens that are weaker, relative to the strongest, have neither ground nor number, so
# that the others stand out.
_LEAST = 0.1
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


def to_html(explanation: Explanation) -> str:
    """The explanation as a page that needs no other file, script or network.

    Args:
        explanation (Explanation): of ``captum_globenc.explanation.explain``.

    Returns:
        *str*: the HTML.
    """
    environment = Environment(loader=PackageLoader("captum_globenc"), autoescape=True)
    methods = [
        {
            "title": _title(method, explanation.local),
            "seconds": method.seconds,
            "tokens": [
                {
                    "text": visible(token),
                    "score": score,
                    "number": _number(strength),
                    "strength": strength,
                }
                for token, score, strength in zip(
                    explanation.tokens,
                    method.scores,
                    _strengths(method),
                    strict=True,
                )
            ],
        }
        for method in explanation.methods
    ]
    return environment.get_template("explanation.html").render(
        explanation=explanation,
        direction=_direction(explanation.text),
        predicted=_described(explanation.predicted),
        target=_described(explanation.target),
        methods=methods,
        least=round(100 * _LEAST),
    )


def text_record(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    scores: Tensor,
    *,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    target: str | int | None = None,
    true_class: str | int | None = None,
    convergence_score: float = 0.0,
) -> captum_visualization.VisualizationDataRecord:
    r"""A row for ``captum.attr.visualization.visualize_text``, from one example.

    Runs the model once for the prediction. Tokens and labels are escaped, because
    Captum writes them into HTML as they are, and padding is left out.

    Args:
        model (PreTrainedModel): a sequence classifier.
        tokenizer (PreTrainedTokenizerBase): the model's tokenizer.
        input_ids (Tensor): (tokens), or (1, tokens).
        scores (Tensor): one score per token, of any method, shaped like ``input_ids``.
        attention_mask (Tensor, optional): likewise, 0 at padding. Default: no padding.
        token_type_ids (Tensor, optional): likewise, for pairs of sentences.
        target (str or int, optional): the class that the scores explain: its label or
            index. Default: the predicted class.
        true_class (str or int, optional): the class of the label, to be shown beside
            the prediction. Default: None, shown as a dash.
        convergence_score (float, optional): what the method leaves unexplained.
            Default: 0, for GlobEnc, which has no such remainder.

    Returns:
        *VisualizationDataRecord* whose ``word_attributions`` are the scores relative to
        the strongest, in [-1, 1], and whose ``attr_score`` is their sum as given. For a
        regression ``pred_prob`` is the value.

    Raises:
        InputError: shapes that are not those of one example, or an unknown class.

    Examples::

        >>> from captum_globenc import GlobEnc, demo
        >>> from captum_globenc.visualization import text_record
        >>> model, tokenizer = demo.load_classifier()
        >>> batch = tokenizer("A <b>lovely</b> film.", return_tensors="pt")
        >>> ids, mask = batch["input_ids"], batch["attention_mask"]
        >>> scores = GlobEnc(model).attribute(ids, additional_forward_args=(mask,))
        >>> record = text_record(model, tokenizer, ids, scores, true_class=1)
        >>> record.true_class, record.pred_class
        ('positive', 'positive')
        >>> record.raw_input_ids[:4]
        ['[CLS]', 'a', '&lt;', 'b']
    """
    if not hasattr(model, "config"):
        raise InputError(
            "model must be a sequence classifier of transformers, got "
            f"{type(model).__name__}: pass the model inside."
        )
    named = {"input_ids": input_ids, "attention_mask": attention_mask}
    named["token_type_ids"] = token_type_ids
    rows = {
        name: _one_row(name, values)
        for name, values in {**named, "scores": scores}.items()
        if values is not None
    }
    if len({len(row) for row in rows.values()}) > 1:
        shown = ", ".join(f"{name} {len(row)}" for name, row in rows.items())
        raise InputError(f"these have different numbers of tokens: {shown}.")
    if "attention_mask" in rows:
        attended = rows["attention_mask"].bool()
        rows = {name: row[attended.to(row.device)] for name, row in rows.items()}
    values = rows.pop("scores").detach()
    if not len(values) or not values.isfinite().all():
        raise InputError(
            "scores must be finite numbers, one for at least one attended token, got "
            f"{values.tolist()}."
        )
    inputs = {name: row[None].to(model.device) for name, row in rows.items()}
    with evaluating(model):
        outputs = class_scores(model, **inputs)
    predicted = max(outputs, key=lambda output: output.logit)
    explained = predicted if target is None else find_class(target, outputs)
    true = None if true_class is None else find_class(true_class, outputs)
    tokens = tokenizer.convert_ids_to_tokens(rows["input_ids"].tolist())
    likely = predicted.probability
    return captum_visualization.VisualizationDataRecord(
        word_attributions=unit_range(values),
        pred_prob=predicted.logit if likely is None else likely,
        pred_class=_escaped(predicted.label),
        true_class="\N{EN DASH}" if true is None else _escaped(true.label),
        attr_class=_escaped(explained.label),
        attr_score=float(values.sum()),
        raw_input_ids=[_escaped(readable_token(tokenizer, token)) for token in tokens],
        convergence_score=convergence_score,
    )


def _one_row(name: str, values: Tensor) -> Tensor:
    if isinstance(values, Tensor) and values.ndim == 2 and len(values) == 1:
        values = values[0]
    if not isinstance(values, Tensor) or values.ndim != 1:
        found = getattr(values, "shape", type(values).__name__)
        found = tuple(found) if isinstance(found, torch.Size) else found
        raise InputError(
            f"{name} must be a tensor of one example, (tokens) or (1, tokens), got "
            f"{found}; for a batch, call text_record row by row."
        )
    return values


def _escaped(text: str) -> str:
    return html.escape(visible(text))


@dataclass(frozen=True)
class _Sentence:
    """The tokens in lines, each with its number below it."""

    tokens: tuple[str, ...]
    method: MethodScores

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[Text]:
        above, below = _line(), _line()
        for token, strength in zip(self.tokens, _strengths(self.method), strict=True):
            shown = Text(_in_line(token), style=_style(strength))
            shown.truncate(options.max_width, overflow="ellipsis")
            number = _number(strength)
            width = max(shown.cell_len, cell_len(number))
            if above and above.cell_len + width > options.max_width:
                yield from (above, below)
                above, below = _line(), _line()
            above.append_text(shown).append(" " * (width - shown.cell_len + 1))
            below.append(number.ljust(width + 1))
        yield from (above, below)


def _line() -> Text:
    # Filled up to the width below, except for the blank after the last token.
    return Text(no_wrap=True, overflow="crop")


def _header(explanation: Explanation) -> Text:
    header = Text("Predicted: ")
    header.append(_described(explanation.predicted), style="bold")
    if explanation.target != explanation.predicted:
        header.append("   Explained: ")
        header.append(_described(explanation.target), style="bold")
    if explanation.dropped_tokens:
        kept = len(explanation.tokens)
        header.append(
            f"\nThe first {kept} of {kept + explanation.dropped_tokens} tokens: the "
            "text is longer than the model's positions."
        )
    return header


def _heading(method: MethodScores, local: str) -> Text:
    heading = Text("\n")
    heading.append(_title(method, local), style="bold")
    return heading.append(f"  {method.seconds:.2f} s")


def _legend() -> Text:
    least = round(100 * _LEAST)
    legend = Text(
        f"\nNumbers: 100 for a method's strongest token, none below {least}. "
    )
    legend.append("positive", style=_style(1)).append(" ")
    return legend.append("-negative", style=_style(-1))


def _title(method: MethodScores, local: str) -> str:
    return f"{method.name} ({local})" if method.name == "globenc" else method.name


def _described(output: ClassScore) -> str:
    """``positive (99.5%)``, or the value of a regression."""
    if output.probability is None:
        return f"{visible(output.label)} = {output.logit:.4g}"
    return f"{visible(output.label)} ({output.probability:.1%})"


def _strengths(method: MethodScores) -> list[float]:
    """Each score relative to the strongest, from -1 to 1."""
    most = max(abs(score) for score in method.scores)
    return [score / most if most else 0.0 for score in method.scores]


def _number(strength: float) -> str:
    return "" if abs(strength) < _LEAST else str(round(100 * strength))


def _style(strength: float) -> Style:
    if abs(strength) < _LEAST:
        return Style.null()
    colour = _NEGATIVE if strength < 0 else _POSITIVE
    ground = [
        round(weak + abs(strength) * (full - weak)) for weak, full in zip(_WEAK, colour)
    ]
    return Style(color=_LETTERS, bgcolor=Color.from_rgb(*ground))


def visible(token: str) -> str:
    """No control characters: a terminal would obey them."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) == "Cc" else c
        for c in token
    )


def _direction(text: str) -> str:
    """Which way the text runs: that of its first letter, as browsers decide it.

    They cannot here, where tokens such as [CLS] come first.
    """
    for c in text:
        if unicodedata.bidirectional(c) in ("L", "R", "AL"):
            return "ltr" if unicodedata.bidirectional(c) == "L" else "rtl"
    return "ltr"


def _in_line(token: str) -> str:
    """A token that keeps its place in the line.

    Terminals that reorder right-to-left text would else take words away from their
    numbers.
    """
    shown = visible(token)
    if any(unicodedata.bidirectional(c) in ("R", "AL") for c in shown):
        return _LEFT_TO_RIGHT_MARK + shown
    return shown
