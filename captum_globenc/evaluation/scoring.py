"""One batch of texts, all methods, all measures: a record per text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from captum.metrics import infidelity, sensitivity_max
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from captum_globenc.attribution.globenc import GlobEnc
from captum_globenc.comparison.methods import METHODS, Scorer, logits_of, random_numbers
from captum_globenc.contributions.norm_scores import LOCAL_SCORES
from captum_globenc.errors import (
    GlobEncError,
    InputError,
    NonFiniteActivationError,
)
from captum_globenc.evaluation import measures
from captum_globenc.evaluation.perturbation import (
    ERASED_FRACTIONS,
    MASKED_FRACTIONS,
    Texts,
    class_log_probabilities,
    log_probabilities,
    masked,
    removed,
    strongest,
)

_REFERENCE = "input_x_gradient"
_PERTURBED_SHARE = 0.3
_INFIDELITY_SAMPLES = 10
_SENSITIVITY_SAMPLES = 5
# The same random numbers for every text, whatever ran before.
_SEED = 0

Record = dict[str, Any]


@dataclass
class Judge:
    """What scores a batch: a model, methods and measures.

    Args:
        model (PreTrainedModel): a sequence classifier in evaluation mode.
        tokenizer (PreTrainedTokenizerBase): with a mask token.
        scorers (dict[str, Scorer]): the methods.
        measures (sequence of str): of ``captum_globenc.evaluation.MEASURES``.
        per_layer (bool): also the rank correlation of every local score in every layer.
        max_tokens (int or None): longer texts are cut.
        batch_size (int): so many perturbed texts run at once.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    scorers: Mapping[str, Scorer]
    measures: Sequence[str]
    per_layer: bool
    max_tokens: int | None
    batch_size: int
    _reference: Scorer = field(init=False)

    def __post_init__(self) -> None:
        self._reference = METHODS[_REFERENCE].build(self.model, self.tokenizer)

    def tokenize(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> Texts:
        """A padded batch on the model's device.

        Raises:
            InputError: the tokenizer cannot pad.
        """
        if self.tokenizer.pad_token_id is None:
            raise InputError(
                f"{type(self.tokenizer).__name__} has no pad token, which batches "
                "need: set tokenizer.pad_token."
            )
        encoding = self.tokenizer(
            *([list(texts)] if pairs is None else [list(texts), list(pairs)]),
            padding=True,
            # On the left it would move the positions of some models.
            padding_side="right",
            truncation=self.max_tokens is not None,
            max_length=self.max_tokens,
            return_tensors="pt",
            return_special_tokens_mask=True,
        )
        if pairs is None:
            # All the same then, and the model's default.
            encoding.pop("token_type_ids", None)
        return Texts.of({k: v.to(self.model.device) for k, v in encoding.items()})

    def records(self, texts: Texts) -> list[Record]:
        """The measures of each text.

        Returns:
            *list* of records: "tokens" (how many), "predicted" (the class explained),
            "probability"; "methods": name → measure → number, and for "aopc" also
            "curve"; and where asked for "layers": local score → "rollout" and "single"
            → a rank correlation per layer, bottom first.

        Raises:
            NonFiniteActivationError: the model or a method gives NaN or infinity.
        """
        everything = class_log_probabilities(self.model, texts)
        if not everything.isfinite().all():
            raise NonFiniteActivationError(
                f"{type(self.model).__name__} gives NaN or infinity for a text."
            )
        full, target = everything.max(-1)
        reference = None
        if self.per_layer or "rank_correlation" in self.measures:
            reference = self._score("the reference", self._reference, texts, target)
        drops = None
        if "leave_one_out_tau" in self.measures:
            drops = self._leave_one_out(texts, full.cpu(), target)
        records: list[Record] = [
            {
                "tokens": int(tokens),
                "predicted": int(chosen),
                "probability": float(best.exp()),
                "methods": {},
            }
            for tokens, chosen, best in zip(
                texts.attention_mask.sum(-1), target, full, strict=True
            )
        ]
        scores = {
            name: self._score(name, scorer, texts, target)
            for name, scorer in self.scorers.items()
        }
        curves = self._curves(texts, target, scores)
        for name, scorer in self.scorers.items():
            measured = self._ranked(texts, scores[name], reference, drops)
            measured |= self._changed(full.cpu(), curves[name])
            measured |= self._captums(texts, target, scores[name], name, scorer)
            for row, record in enumerate(records):
                record["methods"][name] = {
                    measure: values[row].tolist()
                    for measure, values in measured.items()
                }
        if self.per_layer and reference is not None:
            for record, layers in zip(records, self._layers(texts, reference)):
                record["layers"] = layers
        return records

    def _score(self, name: str, scorer: Scorer, texts: Texts, target: Tensor) -> Tensor:
        """The scores of a method, 0 at padding."""
        try:
            scores = scorer(texts.input_ids, texts.attention_mask, target, *texts.types)
        except GlobEncError:
            raise
        except Exception as error:  # whatever a method raises
            raise InputError(
                f"method {name!r} fails: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(scores, Tensor):
            raise InputError(
                f"method {name!r} gives {type(scores).__name__}, and a tensor of "
                "scores is expected."
            )
        scores = scores.detach()
        if scores.shape != texts.input_ids.shape:
            raise InputError(
                f"method {name!r} gives scores of shape {tuple(scores.shape)}, and "
                f"(batch, tokens) = {tuple(texts.input_ids.shape)} is expected."
            )
        scores = scores.masked_fill(texts.attention_mask == 0, 0)
        if not scores.isfinite().all():
            raise NonFiniteActivationError(
                f"method {name!r} gives NaN or infinity for a text."
            )
        return scores

    def _ranked(
        self,
        texts: Texts,
        scores: Tensor,
        reference: Tensor | None,
        drops: Tensor | None,
    ) -> dict[str, Tensor]:
        """The rank statistics, (batch) each."""
        found = {}
        if "rank_correlation" in self.measures and reference is not None:
            found["rank_correlation"] = measures.rank_correlation(
                scores, reference, texts.attention_mask
            )
        if drops is not None:
            found["leave_one_out_tau"] = measures.leave_one_out_tau(
                scores.cpu(), drops, texts.candidates.cpu()
            )
        return found

    def _variants(self, texts: Texts, scores: Tensor) -> dict[str, Texts]:
        """The texts that the measures need: "masked", "removed", "kept"."""
        found = {}
        if {"aopc", "log_odds"} & set(self.measures):
            chosen = strongest(scores, texts.candidates, MASKED_FRACTIONS)
            found["masked"] = masked(texts, chosen, self.mask_token)
        erased = {"comprehensiveness", "sufficiency"} & set(self.measures)
        if erased:
            chosen = strongest(
                scores, texts.candidates, ERASED_FRACTIONS, round_up=True
            )
            if "comprehensiveness" in erased:
                found["removed"] = removed(texts, chosen)
            if "sufficiency" in erased:
                rest = texts.candidates[:, None] & ~chosen
                found["kept"] = removed(texts, rest)
        return found

    def _curves(
        self, texts: Texts, target: Tensor, scores: Mapping[str, Tensor]
    ) -> dict[str, dict[str, Tensor]]:
        """Method → variant → log-probabilities, (batch, fractions)."""
        variants = {
            (name, kind): made
            for name, own in scores.items()
            for kind, made in self._variants(texts, own).items()
        }
        found: dict[str, dict[str, Tensor]] = {name: {} for name in scores}
        if variants:
            # All in one go: methods often ask for the same text.
            each = [len(made) // len(texts) for made in variants.values()]
            logs = log_probabilities(
                self.model,
                Texts.joined(list(variants.values())),
                torch.cat([target.repeat_interleave(count) for count in each]),
                self.batch_size,
            )
            sizes = [len(made) for made in variants.values()]
            for (name, kind), part in zip(variants, logs.split(sizes), strict=True):
                found[name][kind] = part.view(len(texts), -1)
        return found

    def _changed(self, full: Tensor, curves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The measures of what perturbing does, (batch), and the curve of AOPC."""
        found = {}
        if "masked" in curves:
            logs = curves["masked"]
            if "aopc" in self.measures:
                found["aopc"] = measures.aopc(full.exp(), logs.exp())
                found["curve"] = measures.probability_drop(full.exp(), logs.exp())
            if "log_odds" in self.measures:
                found["log_odds"] = measures.log_odds(full, logs)
        if "removed" in curves:
            found["comprehensiveness"] = measures.comprehensiveness(
                full.exp(), curves["removed"].exp()
            )
        if "kept" in curves:
            found["sufficiency"] = measures.sufficiency(
                full.exp(), curves["kept"].exp()
            )
        return found

    def _leave_one_out(self, texts: Texts, full: Tensor, target: Tensor) -> Tensor:
        """p(x) - p(x without token t), (batch, tokens), 0 where t is no candidate."""
        drops = torch.zeros(texts.input_ids.shape, dtype=torch.float64)
        for row in range(len(texts)):
            text = texts.rows(slice(row, row + 1))
            positions = text.candidates[0].nonzero().flatten()
            if len(positions):
                one_each = torch.nn.functional.one_hot(positions, drops.shape[1]).bool()
                variants = masked(text, one_each[None], self.mask_token)
                logs = log_probabilities(
                    self.model,
                    variants,
                    target[row].expand(len(variants)),
                    self.batch_size,
                )
                drops[row, positions.cpu()] = full[row].exp() - logs.exp()
        return drops

    def _captums(
        self, texts: Texts, target: Tensor, scores: Tensor, name: str, scorer: Scorer
    ) -> dict[str, Tensor]:
        """Captum's infidelity and sensitivity, text by text, on perturbed ids.

        A perturbation replaces each candidate by the mask token with probability 0.3;
        for the infidelity it is 1 where it does and 0 elsewhere, and what it costs is a
        drop of probability.
        """
        found: dict[str, list[Tensor]] = {}
        for row in range(len(texts)):
            text = texts.rows(slice(row, row + 1)).trimmed()
            own = scores[row : row + 1, texts.attention_mask[row].bool()]
            if "infidelity" in self.measures:
                value = self._infidelity(text, target[row : row + 1], own)
                found.setdefault("infidelity", []).append(value)
            if "sensitivity" in self.measures:
                value = self._sensitivity(text, target[row : row + 1], name, scorer)
                found.setdefault("sensitivity", []).append(value)
        return {measure: torch.cat(values) for measure, values in found.items()}

    def _infidelity(self, text: Texts, target: Tensor, scores: Tensor) -> Tensor:
        def probabilities(ids: Tensor) -> Tensor:
            repeated = text.rows(torch.zeros(len(ids), dtype=torch.long))
            inputs = {**repeated.inputs, "input_ids": ids}
            varied = Texts(inputs, repeated.candidates)
            return class_log_probabilities(self.model, varied).exp()

        def perturb(ids: Tensor) -> tuple[Tensor, Tensor]:
            chosen = self._drawn(text, len(ids))
            return chosen.double(), ids.masked_fill(chosen, self.mask_token)

        with random_numbers(_SEED):
            found: Tensor = infidelity(
                probabilities,
                perturb,
                text.input_ids,
                scores.double(),
                target=target,
                n_perturb_samples=_INFIDELITY_SAMPLES,
                normalize=True,
            )
        return found.cpu()

    def _sensitivity(
        self, text: Texts, target: Tensor, name: str, scorer: Scorer
    ) -> Tensor:
        def explain(ids: Tensor | tuple[Tensor, ...]) -> Tensor:
            (ids,) = ids if isinstance(ids, tuple) else (ids,)
            varied = Texts({**text.inputs, "input_ids": ids}, text.candidates)
            return self._score(name, scorer, varied, target).double()

        with random_numbers(_SEED):
            found: Tensor = sensitivity_max(
                explain,
                text.input_ids,
                perturb_func=lambda ids, *_: ids.masked_fill(
                    self._drawn(text, len(ids)), self.mask_token
                ),
                n_perturb_samples=_SENSITIVITY_SAMPLES,
                max_examples_per_batch=1,
            )
        return found.cpu()

    def _drawn(self, text: Texts, count: int) -> Tensor:
        drawn = torch.rand(count, text.input_ids.shape[1]) < _PERTURBED_SHARE
        return drawn.to(text.candidates.device) & text.candidates

    def _layers(self, texts: Texts, reference: Tensor) -> list[Record]:
        """Rank correlation of [CLS]'s row of every local score, layer by layer."""
        rows = torch.arange(len(texts))
        first = texts.attention_mask.int().argmax(-1)
        found: list[Record] = [{} for _ in rows]
        for name in LOCAL_SCORES:
            forward = logits_of(self.model, "input_ids")
            method = GlobEnc(forward, encoder=self.model, local=name)
            arguments = (texts.attention_mask, *texts.types)
            decomposition = method.decompose(texts.input_ids, arguments)
            for kind in ("rollout", "single"):
                by_layer = []
                for layer in range(decomposition.local.shape[1]):
                    whole = (
                        decomposition.rollout(stop=layer + 1)
                        if kind == "rollout"
                        else decomposition.local[:, layer]
                    )
                    by_layer.append(
                        measures.rank_correlation(
                            whole[rows, first], reference, texts.attention_mask
                        )
                    )
                for row, values in enumerate(torch.stack(by_layer, 1).tolist()):
                    found[row].setdefault(name, {})[kind] = values
        return found

    @property
    def mask_token(self) -> int:
        """The id that stands for a token that is left out.

        Raises:
            InputError: the tokenizer has none.
        """
        if self.tokenizer.mask_token_id is None:
            raise InputError(
                f"{type(self.tokenizer).__name__} has no mask token, which stands for "
                "a token that is left out: set tokenizer.mask_token."
            )
        return int(self.tokenizer.mask_token_id)
