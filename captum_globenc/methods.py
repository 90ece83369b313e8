"""The methods that can be compared on one sentence: one table, name → function.

Every function takes ``(model, input_ids, attention_mask, target, tokenizer)`` with ids
and mask of shape (1, tokens) and returns scores of shape (tokens,). The model is a
sequence classifier in evaluation mode.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from functools import partial

import torch
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from captum_globenc.attribution.globenc import GlobEnc
from captum_globenc.errors import InputError
from captum_globenc.local import local_score

Method = Callable[
    [PreTrainedModel, Tensor, Tensor, int, PreTrainedTokenizerBase], Tensor
]

_STEPS = 50
_STEPS_AT_ONCE = 25


def globenc(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    target: int,
    tokenizer: PreTrainedTokenizerBase,
    *,
    local: str = "N_ENC",
) -> Tensor:
    """GlobEnc: how much of each token reaches [CLS]; at least 0, for any target."""
    scores: Tensor = GlobEnc(model, local=local).attribute(
        input_ids, target=target, additional_forward_args=(attention_mask,)
    )
    return scores[0]


def integrated_gradients(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    target: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Tensor:
    """Integrated gradients of the word embeddings: their sum over hidden, signed.

    50 steps from a baseline in which every token but [CLS] and [SEP] is the pad token.
    """
    embed = model.get_input_embeddings()
    attributions: Tensor = IntegratedGradients(_logits_of(model)).attribute(
        embed(input_ids).detach(),
        baselines=embed(_blank(input_ids, tokenizer)).detach(),
        target=target,
        additional_forward_args=(attention_mask,),
        n_steps=_STEPS,
        internal_batch_size=_STEPS_AT_ONCE,
    )
    return attributions.sum(-1)[0]


def saliency(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    target: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Tensor:
    """Gradients of the word embeddings: sum of their absolute values over hidden."""
    gradients: Tensor = Saliency(_logits_of(model)).attribute(
        _embeddings(model, input_ids),
        target=target,
        additional_forward_args=(attention_mask,),
    )
    return gradients.sum(-1)[0]


def input_x_gradient(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    target: int,
    tokenizer: PreTrainedTokenizerBase,
) -> Tensor:
    """Word embeddings times their gradients: L2 norm over hidden.

    The gradient-based reference that the GlobEnc paper compares with.
    """
    products: Tensor = InputXGradient(_logits_of(model)).attribute(
        _embeddings(model, input_ids),
        target=target,
        additional_forward_args=(attention_mask,),
    )
    norms: Tensor = torch.linalg.vector_norm(products, dim=-1)
    return norms[0]


METHODS: dict[str, Method] = {
    "globenc": globenc,
    "integrated_gradients": integrated_gradients,
    "saliency": saliency,
    "input_x_gradient": input_x_gradient,
}


def methods_named(
    names: str | Iterable[str], *, local: str = "N_ENC"
) -> dict[str, Method]:
    """The methods of these names, in this order, each once.

    Args:
        names (str or iterable of str): keys of ``METHODS``.
        local (str, optional): the local score of ``globenc``. Default: ``"N_ENC"``.

    Raises:
        InputError: no name, an unknown name or an unknown local score.
    """
    local_score(local)  # Raises where there is none.
    available: dict[str, Method] = {**METHODS, "globenc": partial(globenc, local=local)}
    chosen = {}
    for name in [names] if isinstance(names, str) else names:
        if name not in available:
            near = difflib.get_close_matches(str(name).lower(), available, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"unknown method {name!r}; known: {', '.join(available)}.{hint}"
            )
        chosen[name] = available[name]
    if not chosen:
        raise InputError(f"no method asked for; known: {', '.join(available)}.")
    return chosen


def _logits_of(model: PreTrainedModel) -> Callable[[Tensor, Tensor], Tensor]:
    """The model as a function of embeddings, as Captum's gradient methods need it."""

    def logits(embeddings: Tensor, attention_mask: Tensor) -> Tensor:
        output = model(inputs_embeds=embeddings, attention_mask=attention_mask)
        return output.logits  # type: ignore[no-any-return]

    return logits


def _embeddings(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Word embeddings as a leaf, so that no gradient reaches the model's weights."""
    embeddings: Tensor = model.get_input_embeddings()(input_ids)
    # Captum would set requires_grad by itself, with a warning.
    return embeddings.detach().requires_grad_()


def _blank(input_ids: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The ids with every token but [CLS] and [SEP] replaced by the pad token."""
    if tokenizer.pad_token_id is None:
        raise InputError(
            "integrated_gradients needs a pad token for its baseline, and "
            f"{type(tokenizer).__name__} has none: set tokenizer.pad_token."
        )
    frame = [
        i for i in (tokenizer.cls_token_id, tokenizer.sep_token_id) if i is not None
    ]
    kept = torch.isin(input_ids, input_ids.new_tensor(frame))
    return input_ids.where(kept, input_ids.new_tensor(tokenizer.pad_token_id))
