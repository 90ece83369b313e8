"""Attribution methods that can be compared, each reduced to one score per token.

A scorer is a function ``(input_ids, attention_mask, target) → scores``: ids, mask and
scores are (batch, tokens), and ``target`` is a LongTensor (batch). For pairs of
sentences it gets ``token_type_ids`` as a fourth argument. Scores of padding are 0, and
so are those of the tokens that a baseline does not change ([CLS] and [SEP]) where a
method has one. Those that draw random numbers draw the same ones for the same text.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from captum.attr import (
    Attribution,
    DeepLift,
    FeatureAblation,
    GradientAttribution,
    GradientShap,
    InputXGradient,
    IntegratedGradients,
    KernelShap,
    LayerAttribution,
    Occlusion,
    Saliency,
)
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from captum_globenc import catalogue
from captum_globenc.attribution.alti import ALTI
from captum_globenc.attribution.attnlrp import AttnLRP
from captum_globenc.attribution.base import RolloutAttribution
from captum_globenc.attribution.decompx import DecompX
from captum_globenc.attribution.globenc import GlobEnc
from captum_globenc.attribution.linearized import (
    LayerLinearizedAttribution,
    LinearizedAttribution,
)
from captum_globenc.attribution.value_zeroing import ValueZeroing
from captum_globenc.catalogue import (
    DEFAULT_LOCAL,
    GRADIENT_SHAP_SAMPLES,
    KERNEL_SHAP_SAMPLES,
    POINTS,
    ROLLOUTS,
    STEPS,
    WINDOW,
    check_methods,
    rollout_of,
)
from captum_globenc.errors import InputError

Scorer = Callable[..., Tensor]
Builder = Callable[[PreTrainedModel, PreTrainedTokenizerBase], Scorer]

_STEPS_AT_ONCE = 25
_SAMPLES_AT_ONCE = 50
_LINEARIZED = LinearizedAttribution | LayerLinearizedAttribution


@dataclass(frozen=True)
class Method:
    """A method by its name.

    Args:
        build (Callable): ``(model, tokenizer) → Scorer``, for a sequence classifier in
            evaluation mode.
        reduction (str): what is computed and how it becomes one score per token.
        local (str or None): the local score whose rollout the scores are. Default:
            None, for methods that are no rollout.
    """

    build: Builder
    reduction: str
    local: str | None = None


def scorer_of(
    method: Attribution | Scorer,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> Scorer:
    """A scorer from a Captum method, or from a function that is one already.

    Each text is attributed by itself, without padding and with random numbers that
    depend on it alone: methods of Captum's that draw baselines or permute take them
    from the whole batch. (GlobEnc and its layer method need no such care.)

    Args:
        method (Attribution or Callable): anything with Captum's ``attribute``, whose
            ``forward_func`` takes the attention mask as its second argument; or a
            scorer. Gradient methods that are no layer methods get the word embeddings
            as inputs, all others the ids. Where ``attribute`` takes ``baselines``, they
            are the same with every token but [CLS] and [SEP] replaced by the pad token;
            AttnLRP and DecompX run without.
            What comes back with a hidden dimension is summed over it.
        model (PreTrainedModel): gives the word embeddings.
        tokenizer (PreTrainedTokenizerBase): gives the special tokens.

    Returns:
        *Callable*: a scorer, as above.

    Raises:
        TypeError: it is neither.
    """
    if not hasattr(method, "attribute"):
        if not callable(method):
            raise TypeError(
                "a method must have Captum's attribute, or be a function (ids, mask, "
                f"target) → scores, got {type(method).__name__}: {method!r}"
            )
        return method
    scores = _captum_scorer(method, model, tokenizer)
    is_ours = isinstance(method, RolloutAttribution | _LINEARIZED)
    return scores if is_ours else _repeatable(scores)


def _captum_scorer(
    method: Attribution,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: Callable[[Tensor], dict[str, Any]] = lambda ids: {},
    reduce: Callable[[Tensor], Tensor] = lambda found: found.sum(-1),
) -> Scorer:
    """A Captum method as a scorer of batches.

    ``options`` gives arguments of its ``attribute``, and ``reduce`` takes the hidden
    dimension away, where there is one.
    """
    # NoiseTunnel takes what the method inside takes.
    inner = getattr(method, "attribution_method", method)
    on_embeddings = isinstance(inner, GradientAttribution) and not isinstance(
        inner, LayerAttribution
    )
    wants_baselines = not isinstance(inner, _LINEARIZED) and (
        "baselines" in inspect.signature(inner.attribute).parameters
    )

    def scores(ids: Tensor, mask: Tensor, target: Tensor, *types: Tensor) -> Tensor:
        embed = model.get_input_embeddings() if on_embeddings else _unchanged
        more = options(ids)
        if wants_baselines:
            more["baselines"] = embed(_blank(ids, tokenizer)).detach()
        inputs = embed(ids).detach()
        if on_embeddings:
            # A leaf, so that no gradient reaches the model's weights; Captum would
            # make it one by itself, with a warning.
            inputs.requires_grad_()
        found: Tensor = method.attribute(
            inputs, target=target, additional_forward_args=(mask, *types), **more
        )
        return (found if found.ndim == 2 else reduce(found)).detach()

    return scores


def methods_named(
    names: str | Iterable[str], *, local: str = DEFAULT_LOCAL
) -> dict[str, Method]:
    """The methods of these names, in this order, each once.

    Args:
        names (str or iterable of str): keys of ``METHODS``.
        local (str, optional): the local score of ``globenc``. Default: ``"N_ENC"``.

    Returns:
        *dict* of name → Method.

    Raises:
        InputError: no name, an unknown name or an unknown local score.
    """
    available = {**METHODS, "globenc": _globenc_of(local)}
    return {name: available[name] for name in check_methods(names, local, METHODS)}


def _rollout_of(method: Callable[..., RolloutAttribution]) -> Builder:
    """A rollout method, made with ``method(forward_func, encoder=model)``."""

    def build(model: PreTrainedModel, _: PreTrainedTokenizerBase) -> Scorer:
        made = method(logits_of(model, "input_ids"), encoder=model)

        def scores(ids: Tensor, mask: Tensor, target: Tensor, *types: Tensor) -> Tensor:
            found: Tensor = made.attribute(ids, target, (mask, *types))
            return found

        return scores

    return build


def _globenc_of(local: str) -> Method:
    build = _rollout_of(functools.partial(GlobEnc, local=local))
    return Method(build, rollout_of(local), local)


def _attention_last(model: PreTrainedModel, _: PreTrainedTokenizerBase) -> Scorer:
    method = GlobEnc(logits_of(model, "input_ids"), encoder=model, local="W")

    def scores(ids: Tensor, mask: Tensor, target: Tensor, *types: Tensor) -> Tensor:
        local = method.decompose(ids, (mask, *types)).local
        return local[torch.arange(len(ids)), -1, mask.int().argmax(-1)]

    return scores


def _integrated_gradients(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Scorer:
    _pad_token(tokenizer)
    return _captum_scorer(
        IntegratedGradients(logits_of(model, "inputs_embeds")),
        model,
        tokenizer,
        lambda ids: {
            "n_steps": STEPS,
            "internal_batch_size": max(_STEPS_AT_ONCE, len(ids)),
        },
    )


def _saliency(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Scorer:
    method = Saliency(logits_of(model, "inputs_embeds"))
    return _captum_scorer(method, model, tokenizer)


def _input_x_gradient(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Scorer:
    method = InputXGradient(logits_of(model, "inputs_embeds"))
    return _captum_scorer(
        method, model, tokenizer, reduce=lambda found: found.norm(dim=-1)
    )


def _input_x_gradient_sum(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Scorer:
    method = InputXGradient(logits_of(model, "inputs_embeds"))
    return _captum_scorer(method, model, tokenizer)


def _deep_lift(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Scorer:
    _pad_token(tokenizer)
    scores = _captum_scorer(DeepLift(_Logits(model)), model, tokenizer)

    def quiet(*given: Tensor) -> Tensor:
        with warnings.catch_warnings():
            # That it hooks the model's activations for a while.
            warnings.filterwarnings("ignore", message="Setting forward, backward hooks")
            return scores(*given)

    return quiet


def _gradient_shap(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Scorer:
    _pad_token(tokenizer)
    return _repeatable(
        _captum_scorer(
            GradientShap(logits_of(model, "inputs_embeds")),
            model,
            tokenizer,
            lambda ids: {"n_samples": GRADIENT_SHAP_SAMPLES, "stdevs": 0.0},
        )
    )


def _kernel_shap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Scorer:
    _pad_token(tokenizer)
    scores = _captum_scorer(
        KernelShap(logits_of(model, "input_ids")),
        model,
        tokenizer,
        lambda ids: {
            "n_samples": KERNEL_SHAP_SAMPLES,
            "perturbations_per_eval": _SAMPLES_AT_ONCE,
        },
    )
    # The regression fits noise to tokens that are the same in the baseline.
    return _repeatable(_where_changed(scores, tokenizer))


def _feature_ablation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Scorer:
    _pad_token(tokenizer)
    method = FeatureAblation(logits_of(model, "input_ids"))
    return _captum_scorer(method, model, tokenizer)


def _occlusion(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Scorer:
    _pad_token(tokenizer)
    scores = _captum_scorer(
        Occlusion(logits_of(model, "input_ids")),
        model,
        tokenizer,
        lambda ids: {
            "sliding_window_shapes": (min(WINDOW, ids.shape[1]),),
            "perturbations_per_eval": _SAMPLES_AT_ONCE,
        },
    )
    # A window reaches over the ends of what it changes, and those of a padded text
    # would end elsewhere.
    return _repeatable(_where_changed(scores, tokenizer))


def _random(_: PreTrainedModel, __: PreTrainedTokenizerBase) -> Scorer:
    return _repeatable(lambda ids, *_: torch.rand(ids.shape, device=ids.device))


def _linearized(
    kind: Callable[..., LinearizedAttribution],
) -> Builder:
    def build(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Scorer:
        method = kind(logits_of(model, "input_ids"))
        return _captum_scorer(method, model, tokenizer)

    return build


def _integrated(
    kind: Callable[..., LinearizedAttribution],
) -> Builder:
    def build(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Scorer:
        _pad_token(tokenizer)
        return _captum_scorer(
            kind(logits_of(model, "input_ids")),
            model,
            tokenizer,
            lambda ids: {"baselines": _blank(ids, tokenizer), "n_steps": POINTS},
        )

    return build


_BUILDERS: dict[str, Builder] = {
    **{
        name: _rollout_of(functools.partial(GlobEnc, local=local))
        for name, local in ROLLOUTS.items()
    },
    "attention_last": _attention_last,
    "alti": _rollout_of(ALTI),
    "value_zeroing": _rollout_of(ValueZeroing),
    "globenc_class_aware": _rollout_of(functools.partial(GlobEnc, class_aware=True)),
    "attnlrp": _linearized(AttnLRP),
    "decompx": _linearized(DecompX),
    "decompx_absdot": _linearized(functools.partial(DecompX, biases="absdot")),
    "integrated_attnlrp": _integrated(AttnLRP),
    "integrated_decompx": _integrated(DecompX),
    "integrated_gradients": _integrated_gradients,
    "saliency": _saliency,
    "input_x_gradient": _input_x_gradient,
    "input_x_gradient_sum": _input_x_gradient_sum,
    "gradient_shap": _gradient_shap,
    "deep_lift": _deep_lift,
    "feature_ablation": _feature_ablation,
    "occlusion": _occlusion,
    "kernel_shap": _kernel_shap,
    "random": _random,
}

#: Every method by its name.
METHODS: dict[str, Method] = {
    name: Method(_BUILDERS[name], reduction, ROLLOUTS.get(name))
    for name, reduction in catalogue.METHODS.items()
}


def logits_of(model: PreTrainedModel, name: str) -> Callable[..., Tensor]:
    """The model as a function of ids or of embeddings, as Captum needs it."""

    def logits(inputs: Tensor, attention_mask: Tensor, *types: Tensor) -> Tensor:
        named = {"token_type_ids": types[0]} if types else {}
        output = model(**{name: inputs}, attention_mask=attention_mask, **named)
        return output.logits  # type: ignore[no-any-return]

    return logits


class _Logits(nn.Module):
    """The same on embeddings as a module, which DeepLift hooks."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, mask: Tensor, *types: Tensor) -> Tensor:
        return logits_of(self.model, "inputs_embeds")(inputs, mask, *types)


def _repeatable(scores: Scorer) -> Scorer:
    """Each text by itself, without padding, and with the same random numbers always.

    The scores then do not depend on what else is in the batch, or ran before.
    """

    def one_by_one(ids: Tensor, mask: Tensor, target: Tensor, *types: Tensor) -> Tensor:
        found = torch.zeros(ids.shape, device=ids.device)
        for row, used in enumerate(mask.bool()):
            own = [part[row : row + 1, used] for part in (ids, mask, *types)]
            seed = zlib.crc32(own[0].cpu().numpy().tobytes())
            with random_numbers(seed):
                values = scores(*own[:2], target[row : row + 1], *own[2:])
            found[row, used] = values[0].to(found)
        return found

    return one_by_one


def _where_changed(scores: Scorer, tokenizer: PreTrainedTokenizerBase) -> Scorer:
    """0 at tokens that are the same in the baseline."""

    def masked(ids: Tensor, *given: Tensor) -> Tensor:
        return scores(ids, *given).masked_fill(ids == _blank(ids, tokenizer), 0)

    return masked


@contextmanager
def random_numbers(seed: int) -> Iterator[None]:
    """From this seed inside, and as if nothing had been drawn outside."""
    # Captum draws from both.
    before = np.random.get_state()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            np.random.seed(seed)
            yield
    finally:
        np.random.set_state(before)


def _unchanged(ids: Tensor) -> Tensor:
    return ids


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.pad_token_id is None:
        raise InputError(
            "this method needs a pad token for its baseline, and "
            f"{type(tokenizer).__name__} has none: set tokenizer.pad_token."
        )
    return int(tokenizer.pad_token_id)


def _blank(input_ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The ids with every token but [CLS] and [SEP] replaced by the pad token."""
    frame = [
        i for i in (tokenizer.cls_token_id, tokenizer.sep_token_id) if i is not None
    ]
    kept = torch.isin(input_ids, input_ids.new_tensor(frame))
    return input_ids.where(kept, input_ids.new_tensor(_pad_token(tokenizer)))
