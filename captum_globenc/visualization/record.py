"""An example as a row of Captum's ``visualize_text``."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import torch
from captum.attr import visualization as captum_visualization
from torch import Tensor

from captum_globenc.attribution.adapters import unit_range
from captum_globenc.comparison.explanation import (
    class_scores,
    find_class,
    readable_token,
)
from captum_globenc.errors import InputError
from captum_globenc.recording.evaluation_mode import evaluating
from captum_globenc.visualization.text import visible

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
