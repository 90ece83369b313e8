"""One sentence, one classifier, several methods: what to show and what to save."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from captum_globenc.attribution.globenc import GlobEnc
from captum_globenc.catalogue import DEFAULT_LOCAL, DEFAULT_METHODS
from captum_globenc.comparison.checks import check_text, class_index
from captum_globenc.comparison.methods import Method, logits_of, methods_named
from captum_globenc.contributions.rollout import Decomposition
from captum_globenc.encoders.discovery import find_encoder, unsupported
from captum_globenc.errors import InputError, NonFiniteActivationError
from captum_globenc.recording.evaluation_mode import evaluating


@dataclass(frozen=True)
class ClassScore:
    """What the model says about one class.

    Args:
        index (int): position among the model's outputs.
        label (str): its name in the model's config.
        logit (float): the output itself.
        probability (float or None): softmax of the outputs, or the sigmoid of this one
            for a multi-label model; None for a regression, whose value is ``logit``.
    """

    index: int
    label: str
    logit: float
    probability: float | None


@dataclass(frozen=True)
class MethodScores:
    """One method's scores.

    Args:
        name (str): a key of ``captum_globenc.methods.METHODS``.
        scores (tuple[float, ...]): one per token, special tokens included.
        seconds (float): the time it took, preparation at first use included.
        local (str or None): the local score whose rollout the scores are. Default:
            None, for methods that are no rollout.
    """

    name: str
    scores: tuple[float, ...]
    seconds: float
    local: str | None = None


@dataclass(frozen=True)
class Explanation:
    """The methods' scores for one sentence.

    Args:
        text (str): the sentence as it was given.
        model (str): name or folder of the model.
        tokens (tuple[str, ...]): the tokens that the model saw, readable.
        special (tuple[bool, ...]): which of them the tokenizer added ([CLS], [SEP]).
        unknown (tuple[bool, ...]): which are not in the tokenizer's vocabulary, so that
            they are all the same to the model.
        dropped_tokens (int): how many tokens truncation cut off at the end.
        predicted (ClassScore): the class with the largest output.
        target (ClassScore): the class that is explained.
        local (str): the local score of ``globenc``.
        methods (tuple[MethodScores, ...]): in the order asked for.
        decompositions (dict[str, Decomposition]): the layers of the methods that are
            rollouts, by the name of the local score, each of a batch of one. Default:
            none, as they are made only where asked for.
    """

    text: str
    model: str
    tokens: tuple[str, ...]
    special: tuple[bool, ...]
    unknown: tuple[bool, ...]
    dropped_tokens: int
    predicted: ClassScore
    target: ClassScore
    local: str
    methods: tuple[MethodScores, ...]
    decompositions: dict[str, Decomposition] = field(
        default_factory=dict, compare=False, repr=False
    )

    def to_dict(self) -> dict[str, Any]:
        """Everything but the decompositions as plain values, for JSON.

        Returns:
            *dict* with the names above, and dicts for what is nested; floats finite.
        """
        plain = asdict(replace(self, decompositions={}))
        del plain["decompositions"]
        return plain


def explain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    methods: str | Iterable[str] = DEFAULT_METHODS,
    *,
    local: str = DEFAULT_LOCAL,
    target: str | int | None = None,
    truncate: bool = False,
    decompose: bool = False,
) -> Explanation:
    r"""Score the tokens of a sentence by several methods.

    The model runs in evaluation mode and is left as it was found.

    Args:
        model (PreTrainedModel): a sequence classifier with a supported encoder.
        tokenizer (PreTrainedTokenizerBase): the model's tokenizer.
        text (str): the sentence.
        methods (str or iterable of str, optional): keys of
            ``captum_globenc.methods.METHODS``. Default: globenc, attnlrp, decompx
            and integrated_gradients.
        local (str, optional): the local score of ``globenc``, a key of
            ``captum_globenc.LOCAL_SCORES``. Default: ``"N_ENC"``.
        target (str or int, optional): the class to explain: its label (in any case,
            where that is unambiguous) or its index. Default: the predicted class.
        truncate (bool, optional): cut a text that is too long instead of raising.
            Default: False.
        decompose (bool, optional): keep the layers of the methods that are rollouts,
            for one more forward pass each. Default: False.

    Returns:
        *Explanation*. Its seconds per method are those of one run, preparation at
        first use included.

    Raises:
        InputError: text, method, local score or target that cannot be explained.
        UnsupportedModelError: no supported encoder.
        NonFiniteActivationError: NaN or infinity in outputs or scores.

    Examples::

        >>> from captum_globenc import demo
        >>> from captum_globenc.explanation import explain
        >>> explanation = explain(*demo.load_classifier(), "A lovely film.")
        >>> explanation.predicted.label
        'positive'
        >>> explanation.tokens
        ('[CLS]', 'a', 'lovely', 'film', '.', '[SEP]')
    """
    chosen = methods_named(methods, local=local)
    check_text(text)
    encoder = find_encoder(model)
    if encoder is None:
        raise unsupported(model)
    encoding, dropped = _tokenize(tokenizer, text, encoder.max_tokens, truncate)
    ids = torch.tensor([encoding["input_ids"]], device=model.device)
    _check_vocabulary(ids, model)
    mask = torch.ones_like(ids)
    with evaluating(model):
        outputs = class_scores(model, input_ids=ids, attention_mask=mask)
        predicted = max(outputs, key=lambda output: output.logit)
        explained = predicted if target is None else find_class(target, outputs)
        scores = tuple(
            _timed(name, method, model, ids, mask, explained.index, tokenizer)
            for name, method in chosen.items()
        )
        rollouts = dict.fromkeys(m.local for m in chosen.values() if m.local)
        decompositions = {
            name: GlobEnc(
                logits_of(model, "input_ids"), encoder=model, local=name
            ).decompose(ids, (mask,))
            for name in (rollouts if decompose else ())
        }
    return Explanation(
        text=text,
        model=_model_name(model),
        tokens=_readable_tokens(tokenizer, encoding, text),
        special=tuple(bool(flag) for flag in encoding["special_tokens_mask"]),
        unknown=tuple(
            token == tokenizer.unk_token_id for token in encoding["input_ids"]
        ),
        dropped_tokens=dropped,
        predicted=predicted,
        target=explained,
        local=local,
        methods=scores,
        decompositions=decompositions,
    )


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, most: int | None, truncate: bool
) -> tuple[BatchEncoding, int]:
    """The encoding, of at most ``most`` tokens, and how many were cut off for that."""
    # verbose=False: a text longer than tokenizer.model_max_length is handled here.
    encoding = tokenizer(text, return_special_tokens_mask=True, verbose=False)
    tokens = len(encoding["input_ids"])
    if all(encoding["special_tokens_mask"]):
        raise InputError(f"the tokenizer finds no token in the text {text!r}.")
    if most is None or tokens <= most:
        return encoding, 0
    if not truncate:
        raise InputError(
            f"the text has {tokens} tokens and the model has positions for {most}: "
            "shorten it, or ask for truncation (truncate=True, on the command line "
            "--truncate)."
        )
    encoding = tokenizer(
        text, return_special_tokens_mask=True, truncation=True, max_length=most
    )
    return encoding, tokens - len(encoding["input_ids"])


def _check_vocabulary(ids: Tensor, model: PreTrainedModel) -> None:
    size = cast(int, model.get_input_embeddings().num_embeddings)
    largest = int(ids.max())
    if largest >= size:
        raise InputError(
            f"the tokenizer gives id {largest} and {type(model).__name__} has a "
            f"vocabulary of {size}: the tokenizer belongs to another model."
        )


def class_scores(model: PreTrainedModel, **inputs: Tensor) -> list[ClassScore]:
    """The model's outputs for one sentence, one per class.

    Args:
        model (PreTrainedModel): a sequence classifier.
        **inputs (Tensor): its inputs, (1, tokens) each.

    Raises:
        InputError: the model is no sequence classifier.
        NonFiniteActivationError: NaN or infinity in the outputs.
    """
    with torch.no_grad():
        output = model(**inputs)
    logits = getattr(output, "logits", None)
    if logits is None or logits.ndim != 2:
        raise InputError(
            f"{type(model).__name__} is no sequence classifier: logits of shape "
            f"(1, labels) are expected, got {None if logits is None else logits.shape}."
        )
    values = logits[0].double()
    if not values.isfinite().all():
        raise NonFiniteActivationError(
            f"{type(model).__name__} gives NaN or infinity for this text."
        )
    probabilities = _probabilities(values, model.config.problem_type)
    labels = class_names(model)
    return [
        ClassScore(index, labels.get(index, str(index)), logit, probability)
        for index, (logit, probability) in enumerate(
            zip(values.tolist(), probabilities, strict=True)
        )
    ]


def class_names(model: PreTrainedModel) -> dict[int, str]:
    """Class → its name in the model's config, empty where that has none."""
    labels = model.config.id2label or {}
    return {int(index): str(name) for index, name in labels.items()}


def _probabilities(logits: Tensor, problem_type: str | None) -> list[Any]:
    if problem_type == "multi_label_classification":
        return logits.sigmoid().tolist()
    # As transformers does where no problem type is set: one output is a regression.
    if problem_type == "regression" or len(logits) == 1:
        return [None] * len(logits)
    return logits.softmax(0).tolist()


def find_class(target: object, outputs: list[ClassScore]) -> ClassScore:
    """The class that is meant: an index, or the name of a label or of an index.

    Raises:
        InputError: there is none of that name or index.
    """
    return outputs[class_index(target, [output.label for output in outputs])]


def _timed(
    name: str,
    method: Method,
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    target: int,
    tokenizer: PreTrainedTokenizerBase,
) -> MethodScores:
    start = time.perf_counter()
    scorer = method.build(model, tokenizer)
    # tolist also waits for an accelerator, so it belongs inside.
    scores = scorer(ids, mask, torch.tensor([target], device=ids.device))[0].tolist()
    seconds = time.perf_counter() - start
    if not all(map(math.isfinite, scores)):
        raise NonFiniteActivationError(f"{name} gives NaN or infinity for this text.")
    return MethodScores(name, tuple(scores), seconds, method.local)


def _readable_tokens(
    tokenizer: PreTrainedTokenizerBase, encoding: BatchEncoding, text: str
) -> tuple[str, ...]:
    """The tokens as text; what the vocabulary does not hold is taken from ``text``."""
    tokens = tokenizer.convert_ids_to_tokens(encoding["input_ids"])
    readable = []
    for position, token in enumerate(tokens):
        shown = readable_token(tokenizer, token)
        unknown = encoding["input_ids"][position] == tokenizer.unk_token_id
        if encoding.is_fast and (unknown or "\N{REPLACEMENT CHARACTER}" in shown):
            # Not in the vocabulary, or a byte of a longer character: from the text.
            span = encoding.token_to_chars(0, position)
            found = text[span.start : span.end].strip() if span else ""
            shown = found or shown
        readable.append(shown)
    return tuple(readable)


def readable_token(tokenizer: PreTrainedTokenizerBase, token: str) -> str:
    """A token as text: ``film`` for ``Ġfilm``, a sign for white space."""
    return tokenizer.convert_tokens_to_string([token]).strip() or "\N{OPEN BOX}"


def _model_name(model: PreTrainedModel) -> str:
    """The name on the hub or the folder's name: pages need not show a whole path."""
    name = model.name_or_path or type(model).__name__
    return Path(name).name if Path(name).is_absolute() else name
