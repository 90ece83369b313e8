"""Texts without their strongest tokens, and what a classifier says of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

#: Of the n tokens that are not special: what :func:`measures.aopc` masks.
MASKED_FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: What ERASER's measures remove or keep.
ERASED_FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5)


@dataclass(frozen=True)
class Texts:
    """A batch of tokenised texts.

    Args:
        inputs (dict[str, Tensor]): what the model takes, (batch, tokens) each:
            ``input_ids``, ``attention_mask`` and, for pairs, ``token_type_ids``.
        candidates (Tensor): (batch, tokens), True at the tokens that may be perturbed:
            neither special nor padding.
    """

    inputs: dict[str, Tensor]
    candidates: Tensor

    @classmethod
    def of(cls, encoding: Mapping[str, Tensor]) -> Texts:
        """The texts of a tokenizer's output with ``special_tokens_mask``."""
        special = encoding["special_tokens_mask"].bool()
        inputs = {k: v for k, v in encoding.items() if k != "special_tokens_mask"}
        return cls(inputs, ~special & inputs["attention_mask"].bool())

    @property
    def input_ids(self) -> Tensor:
        """(batch, tokens)."""
        return self.inputs["input_ids"]

    @property
    def attention_mask(self) -> Tensor:
        """(batch, tokens), 0 at padding."""
        return self.inputs["attention_mask"]

    @property
    def types(self) -> tuple[Tensor, ...]:
        """The token types of pairs, as the arguments that follow the target."""
        types = self.inputs.get("token_type_ids")
        return () if types is None else (types,)

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, index: Tensor | slice) -> Texts:
        """Some of the texts, or some of them several times."""
        inputs = {name: values[index] for name, values in self.inputs.items()}
        return Texts(inputs, self.candidates[index])

    @classmethod
    def joined(cls, parts: Sequence[Texts]) -> Texts:
        """Batches of one width, one after another."""
        inputs = {
            name: torch.cat([part.inputs[name] for part in parts])
            for name in parts[0].inputs
        }
        return cls(inputs, torch.cat([part.candidates for part in parts]))

    def trimmed(self) -> Texts:
        """Without the columns that are padding in every text."""
        used = self.attention_mask.bool().any(0)
        inputs = {name: values[:, used] for name, values in self.inputs.items()}
        return Texts(inputs, self.candidates[:, used])


def strongest(
    scores: Tensor,
    candidates: Tensor,
    fractions: Sequence[float],
    *,
    round_up: bool = False,
) -> Tensor:
    """The tokens with the highest scores, signs counted; of equal ones the first.

    Args:
        scores (Tensor): (batch, tokens).
        candidates (Tensor): (batch, tokens), the n tokens to choose from.
        fractions (sequence of float): which fraction K of them, for each result.
        round_up (bool, optional): choose ceil(n K) tokens instead of floor(n K).
            Default: False.

    Returns:
        *Tensor* of bool, (batch, fractions, tokens).
    """
    lowest = scores.double().masked_fill(~candidates, -torch.inf)
    # Ranks 0, 1, 2, ... from the strongest; stable, so that ties fall by position.
    order = lowest.sort(descending=True, stable=True, dim=-1).indices
    rank = order.argsort(-1)
    # Rounded first: 0.7 * 10 is 7.000000000000001 to a computer.
    count = torch.tensor(
        [
            [
                (math.ceil if round_up else math.floor)(round(n * k, 9))
                for k in fractions
            ]
            for n in candidates.sum(-1).tolist()
        ],
        device=scores.device,
    )
    return (rank[:, None] < count[..., None]) & candidates[:, None]


def masked(texts: Texts, chosen: Tensor, mask_token_id: int) -> Texts:
    """The chosen tokens replaced by the mask token; lengths stay.

    Args:
        texts (Texts): the batch.
        chosen (Tensor): (batch, variants, tokens).
        mask_token_id (int): what stands in their place.

    Returns:
        *Texts* with batch × variants rows, the variants of a text together.
    """
    batch, variants, _ = chosen.shape
    repeated = texts.rows(torch.arange(batch).repeat_interleave(variants))
    ids = repeated.input_ids.masked_fill(chosen.flatten(0, 1), mask_token_id)
    return Texts({**repeated.inputs, "input_ids": ids}, repeated.candidates)


def removed(texts: Texts, chosen: Tensor) -> Texts:
    """The chosen tokens taken out, the rest moved up, padding at the end.

    Args:
        texts (Texts): the batch.
        chosen (Tensor): (batch, variants, tokens).

    Returns:
        *Texts* with batch × variants rows, the variants of a text together.
    """
    batch, variants, _ = chosen.shape
    repeated = texts.rows(torch.arange(batch).repeat_interleave(variants))
    left = repeated.attention_mask.bool() & ~chosen.flatten(0, 1)
    # Kept tokens first, in their order: a stable sort of "taken out".
    order = (~left).sort(dim=-1, stable=True).indices
    inputs = {name: v.gather(1, order) for name, v in repeated.inputs.items()}
    inputs["attention_mask"] = left.gather(1, order).to(texts.attention_mask.dtype)
    candidates = repeated.candidates.gather(1, order) & inputs["attention_mask"].bool()
    return Texts(inputs, candidates)


def log_probabilities(
    model: PreTrainedModel, texts: Texts, target: Tensor, batch_size: int
) -> Tensor:
    r""":math:`\log p` of a class, in batches of about one length.

    Texts that are the same run once: methods often agree on the strongest token.

    Args:
        model (PreTrainedModel): a sequence classifier in evaluation mode.
        texts (Texts): the texts.
        target (Tensor): (texts), the class of each.
        batch_size (int): run so many texts at once.

    Returns:
        *Tensor* of shape (texts), float64.
    """
    rows = torch.cat(list(texts.inputs.values()), 1)
    _, inverse = torch.unique(rows, dim=0, return_inverse=True)
    # The first text of each kind.
    order = inverse.argsort(stable=True)
    counts = inverse.bincount()
    different = texts.rows(order[counts.cumsum(0) - counts])
    lengths = different.attention_mask.sum(-1)
    found = []
    by_length = lengths.argsort(stable=True)
    for start in range(0, len(different), batch_size):
        index = by_length[start : start + batch_size]
        found.append(class_log_probabilities(model, different.rows(index).trimmed()))
    values = torch.cat(found)[by_length.argsort()]
    return values[inverse, target].cpu()


@torch.no_grad()
def class_log_probabilities(model: PreTrainedModel, texts: Texts) -> Tensor:
    """(texts, classes): log-softmax of the logits, or log-sigmoid for multi-label."""
    logits: Tensor = model(**texts.inputs).logits.double()
    if model.config.problem_type == "multi_label_classification":
        return torch.nn.functional.logsigmoid(logits)
    return logits.log_softmax(-1)
