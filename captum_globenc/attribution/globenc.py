"""GlobEnc as a Captum attribution method."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NoReturn, cast

import torch
from captum.attr import Attribution
from captum.log import log_usage
from torch import Tensor, nn

from captum_globenc._captum import (
    TargetType,
    TensorOrTupleOfTensorsGeneric,
    format_additional_forward_args,
    format_output,
    is_tuple,
    select_targets,
)
from captum_globenc.adapters import spread_over_embedding
from captum_globenc.aggregation import Decomposition, blocks, sweep
from captum_globenc.architectures import Encoder, find_encoder, unsupported
from captum_globenc.capture import record
from captum_globenc.errors import InputError
from captum_globenc.local import LOCAL_SCORES
from captum_globenc.records import EncoderRecord
from captum_globenc.weights import WeightCache

TokenIndex = int | Tensor | Literal["mean"] | None


class GlobEnc(Attribution):
    r"""Global token attribution for transformer encoders, in one forward pass.

    Every encoder layer is decomposed into how much each token takes from every other,
    through attention, value vectors, both residuals and both LayerNorms; rollout
    combines the layers. More details in the paper:

    Modarressi, Fayyaz, Yaghoobzadeh and Pilehvar, *GlobEnc: Quantifying Global Token
    Attribution by Incorporating the Whole Encoder Layer in Transformers*, NAACL 2022,
    https://arxiv.org/abs/2205.03286

    The scores say how much of each input token reaches the representation that the
    head reads. They do not depend on the class: ``target`` is validated as Captum does
    and used only to find the token that a token-level head reads.

    The encoder is explained in evaluation mode (no dropout), whatever mode the model is
    in, and the model is left as it was found: mode, gradients, hooks and attention
    implementation.

    Args:
        forward_func (Callable): a Hugging Face model, an ``nn.Module`` around one, or
            any function that calls one.
        encoder (nn.Module, optional): the model or part of it to explain, where
            ``forward_func`` runs several. Default: the one found in ``forward_func``.
        local (str, optional): the score of one layer, a key of
            ``captum_globenc.LOCAL_SCORES``: ``"W"``, ``"W_FIXED_RES"``, ``"W_RES"``,
            ``"N"``, ``"N_FIXED_RES"``, ``"N_RES"``, ``"N_RES_LN"`` or ``"N_ENC"``.
            Default: ``"N_ENC"``, the method of the paper.
        normalize (bool, optional): scores of an example sum to 1. Default: False.

    Examples::

        >>> from captum_globenc import GlobEnc, demo
        >>> model, tokenizer = demo.load_classifier()
        >>> batch = tokenizer(["A lovely film."], return_tensors="pt")
        >>> globenc = GlobEnc(model)
        >>> scores = globenc.attribute(
        ...     batch["input_ids"],
        ...     target=1,
        ...     additional_forward_args=(batch["attention_mask"],),
        ... )
        >>> scores.shape == batch["input_ids"].shape
        True
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        encoder: nn.Module | None = None,
        local: str = "N_ENC",
        normalize: bool = False,
    ) -> None:
        if not callable(forward_func):
            raise TypeError(
                "forward_func must be a model or a function, got "
                f"{type(forward_func).__name__}: {forward_func!r}"
            )
        if encoder is not None and not isinstance(encoder, nn.Module):
            raise TypeError(
                f"encoder must be an nn.Module, got {type(encoder).__name__}."
            )
        Attribution.__init__(self, forward_func)
        check_local_score(local)
        self.encoder = encoder
        self.local = local
        self.normalize = normalize
        self._weights = WeightCache()

    @log_usage()
    def attribute(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        *,
        token_index: TokenIndex = None,
        internal_batch_size: int | None = None,
    ) -> TensorOrTupleOfTensorsGeneric:
        r"""Score every input token.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): input ids, (batch, tokens), or
                embeddings, (batch, tokens, hidden). In a tuple that is the first one;
                the others (token types, positions, ...) are passed on and get zeros.
            target (int, tuple, Tensor, or list, optional): as for Captum's methods. It
                must be valid for the output and does not change the scores, but for an
                output per token, (batch, tokens, classes), where it names the token to
                explain: an int, or the first element of a tuple. Default: None.
            additional_forward_args (Any, optional): further arguments of
                ``forward_func``, such as ``(attention_mask,)``. Default: None.
            token_index (int, Tensor, "mean", optional): the token of the last layer to
                explain: one position for all examples, a LongTensor (batch), or the
                mean over all tokens. Default: the token that the head reads, which is
                the one in ``target`` for an output per token, and otherwise the first
                attended token ([CLS]).
            internal_batch_size (int, optional): run at most so many examples at once.
                Default: all.

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**, shaped like inputs:
            - for ids, (batch, tokens) in the dtype of the forward output, at least 0,
              and exactly 0 at padding;
            - for embeddings, (batch, tokens, hidden), whose sum over the last dimension
              is the token score.

            Scores too large for the dtype are scaled per example; ratios are kept.

        Raises:
            InputError: inputs, mask or token_index that cannot be attributed.
            UnsupportedModelError: no supported encoder.
            ReconstructionError: the recorded parts do not rebuild a layer.
            NonFiniteActivationError: NaN or infinity in a layer.
        """
        tensors = _as_tensors(inputs)
        arguments = format_additional_forward_args(additional_forward_args) or ()
        batch = tensors[0].shape[0]
        size = batch if internal_batch_size is None else internal_batch_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise InputError(f"internal_batch_size must be at least 1, got {size!r}.")
        _check_length_of_target(target, batch)
        parts = [
            self._attribute(
                tuple(_part(t, first, size, batch) for t in tensors),
                _part(target, first, size, batch),
                tuple(_part(a, first, size, batch) for a in arguments),
                _part(token_index, first, size, batch),
            )
            for first in range(0, batch, size)
        ]
        scores = torch.cat(parts)
        first, *others = tensors
        if first.ndim == 3:
            scores = spread_over_embedding(scores, first)
        result = (scores, *(torch.zeros_like(other) for other in others))
        return cast(
            TensorOrTupleOfTensorsGeneric, format_output(is_tuple(inputs), result)
        )

    def attribute_future(self) -> NoReturn:
        """Not implemented."""
        raise NotImplementedError(
            f"attribute_future is not implemented for {type(self).__name__}"
        )

    def decompose(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        additional_forward_args: object | None = None,
    ) -> Decomposition:
        r"""The local scores of all layers and their rollout.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): as for :meth:`attribute`.
            additional_forward_args (Any, optional): as for :meth:`attribute`.

        Returns:
            *Decomposition* with ``local`` of shape (batch, layers, receivers, sources)
            and ``rollout(stop=None)``, (batch, receivers, sources).
        """
        tensors = _as_tensors(inputs)
        arguments = format_additional_forward_args(additional_forward_args) or ()
        with torch.no_grad():
            _, run = self._run(tensors, arguments)
            batch, tokens = run.shape
            score = LOCAL_SCORES[self.local]
            local = torch.zeros(
                (batch, len(run.layers), tokens, tokens),
                dtype=run.layers[0].dtype,
                device=run.attended.device,
            )
            for index, layer in enumerate(run.layers):
                rows = score(layer)
                for block in blocks(run.shape, run.heads):
                    local[:, index, block] = rows(block)
            pairs = run.attended[:, :, None] & run.attended[:, None, :]
            local.masked_fill_(~pairs[:, None], 0)
        return Decomposition(local, run.attended, self.local)

    def _attribute(
        self,
        tensors: tuple[Tensor, ...],
        target: TargetType,
        arguments: tuple[Any, ...],
        token_index: TokenIndex,
    ) -> Tensor:
        """Scores of one internal batch, (batch, tokens)."""
        with torch.no_grad():
            output, run = self._run(tensors, arguments)
            select_targets(output, target)
            if token_index is None:
                token_index = _token_of_target(output, target, run)
            start, top = _start(token_index, run)
            scores = sweep(run, LOCAL_SCORES[self.local], start, top)
            dtype = (tensors[0] if tensors[0].is_floating_point() else output).dtype
            if not dtype.is_floating_point:
                dtype = run.layers[0].dtype
            if self.normalize:
                shares = scores.values / scores.values.sum(-1, keepdim=True)
                return shares.to(tensors[0].device, dtype)
            return scores.to(dtype).to(tensors[0].device)

    def _run(
        self, tensors: tuple[Tensor, ...], arguments: tuple[Any, ...]
    ) -> tuple[Tensor, EncoderRecord]:
        """Call the model once, recording its encoder."""
        output, run = record(
            lambda: self.forward_func(*tensors, *arguments),
            self._find_encoder(),
            self._weights,
        )
        if run.shape != tuple(tensors[0].shape[:2]):
            raise InputError(
                f"inputs have shape {tuple(tensors[0].shape)} and the encoder saw "
                f"(batch, tokens) = {run.shape}; inputs must be its tokens: ids "
                "(batch, tokens) or embeddings (batch, tokens, hidden)."
            )
        return _output_tensor(output), run

    def _find_encoder(self) -> Encoder | None:
        """The encoder, as far as it can be found without running a function."""
        root = self.encoder
        if root is None and isinstance(self.forward_func, nn.Module):
            root = self.forward_func
        if root is None:
            return None
        encoder = find_encoder(root)
        if encoder is None:
            raise unsupported(root)
        return encoder


def check_local_score(name: object) -> None:
    """Raise where there is no local score of this name."""
    if name in LOCAL_SCORES:
        return
    near = difflib.get_close_matches(str(name).upper(), LOCAL_SCORES, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InputError(
        f"unknown local score {name!r}; known: {', '.join(LOCAL_SCORES)}.{hint}"
    )


def _as_tensors(inputs: object) -> tuple[Tensor, ...]:
    """The inputs as a tuple, checked as far as they can be without a model."""
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            shown = repr(tensor)
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            raise InputError(
                "inputs must be a torch.Tensor or a tuple of them, got "
                f"{type(tensor).__name__}: {shown}"
            )
    if not tensors:
        raise InputError("inputs must hold at least one tensor, got ().")
    first = tensors[0]
    if first.ndim not in (2, 3):
        raise InputError(
            "inputs must be ids (batch, tokens) or embeddings (batch, tokens, hidden), "
            f"got shape {tuple(first.shape)}."
        )
    if first.numel() == 0:
        raise InputError(
            f"inputs of shape {tuple(first.shape)} hold no token to explain."
        )
    sizes = [t.shape[0] if t.ndim else 0 for t in tensors]
    if len(set(sizes)) > 1:
        raise InputError(f"inputs have different batch sizes: {sizes}.")
    return tensors


def _check_length_of_target(target: Any, batch: int) -> None:
    # Captum raises AssertionError for it; its own tests count on that.
    several = isinstance(target, list) or (
        isinstance(target, Tensor) and target.numel() > 1
    )
    if several and len(target) != batch:
        raise AssertionError(
            f"target has {len(target)} elements, and inputs have {batch} examples."
        )


def _part(value: Any, first: int, size: int, batch: int) -> Any:
    """The share of an argument that belongs to the examples of an internal batch.

    Tensors and lists with one element per example are cut; anything else is passed as
    it is.
    """
    if size >= batch:
        return value
    per_example = (isinstance(value, Tensor) and value.ndim > 0) or isinstance(
        value, list
    )
    if per_example and len(value) == batch:
        return value[first : first + size]
    return value


def _output_tensor(output: Any) -> Tensor:
    """The logits: the output itself, or the first tensor of scores in it."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        named = {k: v for k, v in output.items() if k != "loss"}
        output = (named["logits"],) if "logits" in named else tuple(named.values())
    if isinstance(output, tuple | list):
        for value in output:
            if isinstance(value, Tensor) and value.ndim > 0:
                return value
    raise InputError(
        "forward_func must return a tensor or a Hugging Face output with one, got "
        f"{type(output).__name__}."
    )


def _token_of_target(
    output: Tensor, target: TargetType, run: EncoderRecord
) -> TokenIndex:
    """The token that a token-level head reads for this target; None for other heads."""
    if target is None or output.ndim < 3 or tuple(output.shape[:2]) != run.shape:
        return None
    if isinstance(target, list):
        chosen = [t[0] if isinstance(t, tuple) else t for t in target]
        return torch.tensor(chosen, device=run.attended.device)
    if isinstance(target, Tensor):
        return int(target)
    return int(target[0] if isinstance(target, tuple) else target)


def _start(token_index: TokenIndex, run: EncoderRecord) -> tuple[Tensor, Tensor | None]:
    """Weights of the top layer's receivers, and which they are where they are few.

    Returns:
        *tuple* of weights, (batch, tokens), and receivers, (batch, 1), or None for all.
    """
    batch, tokens = run.shape
    attended = run.attended
    dtype = run.layers[0].dtype
    if isinstance(token_index, str) and token_index == "mean":
        return attended.to(dtype) / attended.sum(-1, keepdim=True), None
    if token_index is None:
        index = attended.int().argmax(-1)
    elif isinstance(token_index, Tensor):
        if token_index.is_floating_point() or token_index.numel() not in (1, batch):
            raise InputError(
                f"token_index must be a LongTensor of shape ({batch},), got "
                f"{token_index.dtype} of shape {tuple(token_index.shape)}."
            )
        index = token_index.to(attended.device, torch.long).flatten().expand(batch)
    elif isinstance(token_index, int) and not isinstance(token_index, bool):
        index = torch.full((batch,), token_index, device=attended.device)
    else:
        raise InputError(
            'token_index must be an int, a LongTensor (batch,), "mean" or None, got '
            f"{token_index!r}."
        )
    for example, position in enumerate(index.tolist()):
        if not -tokens <= position < tokens:
            raise InputError(
                f"token_index {position} is outside the {tokens} tokens of the input."
            )
        if not attended[example, position]:
            raise InputError(f"token_index {position} is padding in example {example}.")
    index = index % tokens
    start = nn.functional.one_hot(index, tokens).to(dtype)
    return start, index[:, None]
