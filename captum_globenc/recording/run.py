"""Run a model once, as it is, and record per encoder layer what decomposes it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from captum_globenc._captum import TargetType, format_additional_forward_args
from captum_globenc.deferred import Judge, check_later, holds, settled
from captum_globenc.encoders.discovery import find_encoder, no_encoder_ran, unsupported
from captum_globenc.encoders.resolver import Encoder
from captum_globenc.encoders.weights import WeightCache
from captum_globenc.errors import GlobEncError, UnsupportedModelError
from captum_globenc.recording.compiled import ignore_compiler_warning
from captum_globenc.recording.evaluation_mode import evaluating
from captum_globenc.recording.inputs import (
    check_arrival,
    check_length,
    check_shape,
    countable,
)
from captum_globenc.recording.observer import Observer, hooked
from captum_globenc.recording.outputs import output_tensor, pooled_tensor
from captum_globenc.recording.readout import (
    ReadoutKind,
    by_gradient,
    by_pooling,
    gradients_of,
    no_gradient,
    not_found,
    pools_as_said,
    selected_outputs,
)
from captum_globenc.recording.recorder import Recorder
from captum_globenc.recording.records import (
    Grid,
    LayerRecord,
    Readout,
    check_unchanged,
)
from captum_globenc.recording.replay import Attention
from captum_globenc.recording.verification import Fit

# Of what errors speak that a head raises only because it runs with gradients.
_OF_GRADIENTS = ("grad", "differentiat", "in-place", "inplace", "Inference tensor")


@dataclass(frozen=True, eq=False, repr=False)
class EncoderRun:
    """One run of a model with an encoder, recorded by :func:`record`.

    Args:
        inputs (tuple[Tensor, ...]): what ``forward_func`` was given first.
        arguments (tuple): its further arguments.
        output (Any): what it returned.
        encoder (Encoder): the encoder that ran.
        layers (tuple[LayerRecord, ...]): bottom first.
        token_mask (Tensor): (batch, tokens), False at padding.
        final (Tensor): (batch, tokens, hidden), the last hidden states.
        grid (Grid or None): the patches of the image; None where there was none.
        fits (list[Fit]): how well each part of each layer is rebuilt.
        early (dict): modules in front of the layers → shapes of the tensors that they
            took and gave, as tensors without memory.
    """

    inputs: tuple[Tensor, ...]
    arguments: tuple[Any, ...]
    output: Any
    encoder: Encoder
    layers: tuple[LayerRecord, ...]
    token_mask: Tensor
    final: Tensor
    grid: Grid | None
    fits: list[Fit]
    early: dict[nn.Module, tuple[list[Tensor], list[Tensor]]]
    _states: dict[int, Tensor] = field(repr=False)
    _unfollowed: tuple[str, ...] = field(repr=False)
    _has_left_torch: bool = field(repr=False)
    _forward: Callable[[], Any] = field(repr=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, tokens)."""
        batch, tokens = self.token_mask.shape
        return batch, tokens

    @property
    def heads(self) -> int:
        """Attention heads of a layer."""
        return self.layers[0].heads

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the layers are decomposed."""
        return self.layers[0].dtype

    def __repr__(self) -> str:
        batch, tokens = self.shape
        return (
            f"EncoderRun({len(self.layers)} layers of "
            f"{type(self.encoder.module).__name__}, {batch} by {tokens} tokens)"
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an EncoderRun holds the model and what it computed, and cannot be copied "
            "or pickled: keep its Decomposition, or record it anew."
        )

    def check_fits(self) -> None:
        """Raise where a part of a layer is not rebuilt.

        Raises:
            ReconstructionError: one is not.
        """

        def judge(_: list[float]) -> None:
            for fit in self.fits:
                fit.raise_if_not()

        check_later(None, judge)

    def check_unchanged(self) -> None:
        """Raise where tensors of the run have been written to since.

        Raises:
            InputError: one has been.
        """
        check_unchanged(self.layers)

    def replay(
        self, layer: int, attention: Attention, hidden: Tensor | None = None
    ) -> Tensor:
        """Run one layer again with another attention, in this thread only.

        Args:
            layer (int): which, 0 for the lowest.
            attention (Callable): is given the layer's
                :class:`~captum_globenc.recording.attention.AttentionCall` and returns
                what takes the place of its output, (batch, heads, receivers, head
                size).
            hidden (Tensor, optional): another input of the same shape. Default: the
                layer's own.

        Returns:
            *Tensor* of shape (batch, tokens, hidden), the layer's output.
        """
        return self.layers[layer].replay(attention, hidden)

    def readout(
        self, target: TargetType = None, kind: ReadoutKind = "gradient"
    ) -> Readout:
        """Which hidden states the head reads for the target, and how much of each.

        Args:
            target (int, tuple, Tensor, or list, optional): as for Captum's methods.
                Without one, all outputs count; an output per token is read as the
                model pools it. Default: None.
            kind (str, optional): ``"gradient"``: the tokens are weighed by the norm of
                the gradient of the selected output; ``"pooling"``: as heads of the
                family pool the tokens, whatever the class. Default: ``"gradient"``.

        Returns:
            *Readout* with shares that sum to 1 in each example.

        Raises:
            InputError: the head reads padding.
            UnsupportedModelError: what it reads is not found.
        """
        if kind == "pooling":
            return self._pooled(self._by_family(is_checked=False))
        output = output_tensor(self.output)
        device = self.final.device.type
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device, enabled=False),
        ):
            if target is None and self._is_per_token(output):
                return self._without_target()
            selected = selected_outputs(output, target, len(self.token_mask))
            return self._weighed(selected)

    def gradient(self, target: TargetType = None) -> Tensor:
        """The gradient of the selected output with respect to the last hidden states.

        Args:
            target (int, tuple, Tensor, or list, optional): as for Captum's methods; it
                must select one output of each example. Default: None, where there is
                only one.

        Returns:
            *Tensor* of shape (batch, tokens, hidden), in float32 at least.

        Raises:
            AssertionError: the target selects several outputs.
            UnsupportedModelError: there is no gradient in an example, or the output
                depends on more than the last hidden states.
        """
        root, last = type(self.encoder.root).__name__, len(self.layers)
        device = self.final.device.type
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device, enabled=False),
        ):
            batch = len(self.token_mask)
            selected = selected_outputs(output_tensor(self.output), target, batch)
            if selected.shape[1] != 1:
                raise AssertionError(
                    "target must select one output of each example, whose gradient is "
                    f"taken; target {target!r} selects {selected.shape[1]} of them."
                )
            if self._unfollowed:
                raise no_gradient(root, f"it also reads {self._unfollowed[0]}")
            if self._has_left_torch:
                why = "it reads values that leave torch (item, numpy) or are detached"
                raise no_gradient(root, why)
            gradients = gradients_of(selected, self._states, self._batch_dimension)
        if gradients is None:
            raise no_gradient(root, "there is none, or it is 0, in an example")
        for layer, rows in sorted(gradients.items()):
            if layer < last:
                why = f"it also reads hidden states of layer {layer}"
                check_later(rows.any(), _judge_unread(no_gradient(root, why)))
        return gradients[last]

    def _weighed(self, selected: Tensor) -> Readout:
        root = type(self.encoder.root).__name__
        if self._unfollowed:
            raise not_found(root, f"it also reads {self._unfollowed[0]}")
        shares = self._shares(selected, self.token_mask)
        if shares is None:
            return self._pooled(self._by_family(is_checked=True))
        if self._has_left_torch and not self._depends_on_nothing_else(shares):
            raise not_found(root, "it reads values that leave torch (item, numpy)")
        return self._as_readout(shares)

    def _without_target(self) -> Readout:
        """An output per token: read as the model, or its family, pools tokens."""
        pooled = pooled_tensor(self.output)
        if pooled is not None and pooled.requires_grad:
            return self._weighed(selected_outputs(pooled, None, len(self.token_mask)))
        return self._pooled(self._by_family(is_checked=False))

    def _is_per_token(self, output: Tensor) -> bool:
        """Whether the output has a row, or a logit, for every token."""
        if tuple(output.shape[:2]) != self.shape:
            return False
        if not output.requires_grad:
            return output.ndim > 2
        # (batch, tokens, ...) could as well be (batch, classes, ...): outputs of tokens
        # each read a token of their own.
        everything = torch.ones_like(self.token_mask)
        for token in {0, output.shape[1] - 1}:
            selected = selected_outputs(output[:, token], None, len(output))
            shares = self._shares(selected, everything)
            if shares is None:
                return False
            of_its_own = shares[len(self.layers)][:, token] == 1
            if not holds(("an output per token", token), of_its_own):
                return False
        return True

    def _shares(self, selected: Tensor, token_mask: Tensor) -> dict[int, Tensor] | None:
        return by_gradient(selected, self._states, token_mask, self._batch_dimension)

    @property
    def _batch_dimension(self) -> int:
        """Of the states as the model has them."""
        return 0 if self.encoder.architecture.batch_first else 1

    def _by_family(self, is_checked: bool) -> Tensor:
        pooling = self.encoder.architecture.pooling
        root = type(self.encoder.root).__name__
        weights = by_pooling(pooling, self.token_mask, self.dtype)
        if weights is None:
            why = "there is no gradient, and " if is_checked else ""
            raise not_found(root, f"{why}no pooling is known of its family")
        if is_checked and not pools_as_said(
            weights, self._run_head, self.final, output_tensor(self.output)
        ):
            what = "the tokens' mean" if pooling == "mean" else f"the {pooling} token"
            raise not_found(root, f"there is no gradient, and it does not read {what}")
        return weights

    def _depends_on_nothing_else(self, shares: dict[int, Tensor]) -> bool:
        weights = shares[len(self.layers)]
        is_read = (weights > 0).to(weights)
        one = bool((is_read.sum(-1) == 1).all())
        return one and pools_as_said(
            is_read, self._run_head, self.final, output_tensor(self.output)
        )

    def _run_head(self, final: Tensor) -> Any:
        """The output of forward_func for other last hidden states."""
        encoder = self.encoder
        last = encoder.final_norm or encoder.layers[-1].layer
        states = final if encoder.architecture.batch_first else final.transpose(0, 1)

        thread = threading.get_ident()

        def replace(module: nn.Module, *rest: Any) -> Any:
            if module is not last or threading.get_ident() != thread:
                return None
            output = rest[-1]
            return (states, *output[1:]) if isinstance(output, tuple) else states

        with (
            torch.inference_mode(False),
            torch.no_grad(),
            evaluating(encoder.module),
            hooked(lambda *_: None, replace),
        ):
            return self._forward()

    def _pooled(self, weights: Tensor) -> Readout:
        return self._as_readout({len(self.layers): weights})

    def _as_readout(self, shares: dict[int, Tensor]) -> Readout:
        last = len(self.layers)
        shares = {layer: values.to(self.dtype) for layer, values in shares.items()}
        read = shares[last] > 0
        if len(shares) == 1 and holds("one token is read", read.sum(-1) == 1):
            # Of one token each, few rows of the top layer do.
            index = read.int().argmax(-1, keepdim=True)
            return Readout({last: read.to(self.dtype)}, index)
        return Readout(shares, None)


def _judge_unread(error: UnsupportedModelError) -> Judge:
    def judge(is_read: list[float]) -> None:
        if any(is_read):
            raise error

    return judge


def record(
    forward_func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor, ...],
    additional_forward_args: Any = None,
    *,
    encoder: nn.Module | None = None,
) -> EncoderRun:
    """Run a model once, as it is, and record its encoder.

    Methods take the run in the place of inputs, without a further forward pass.

    Args:
        forward_func (Callable): a Hugging Face model, an ``nn.Module`` around one, or
            any function that calls one.
        inputs (Tensor or tuple[Tensor, ...]): what it takes first.
        additional_forward_args (Any, optional): its further arguments. Default: None.
        encoder (nn.Module, optional): the model or part of it to record, where
            ``forward_func`` runs several. Default: the one found in it.

    Returns:
        *EncoderRun*.

    Raises:
        UnsupportedModelError: no supported encoder ran, or its attention is not known.
        ReconstructionError: the recorded parts do not rebuild a layer.
        NonFiniteActivationError: NaN or infinity in a layer.
        InputError: inputs that the encoder cannot take, or did not get.

    Examples::

        >>> from captum_globenc import GlobEnc, demo, record
        >>> model, tokenizer = demo.load_classifier()
        >>> batch = tokenizer(["A lovely film."], return_tensors="pt")
        >>> run = record(model, batch["input_ids"], batch["attention_mask"])
        >>> len(run.layers)
        3
        >>> scores = [GlobEnc(model, local=name).attribute(run) for name in ("N", "W")]
    """
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    arguments = format_additional_forward_args(additional_forward_args) or ()

    def recorded() -> EncoderRun:
        run = observe(
            forward_func,
            tensors,
            arguments,
            encoder_in(forward_func, encoder),
            WeightCache(),
            is_named=encoder is not None,
        )
        run.check_fits()
        return run

    return settled(set(), recorded)


def encoder_in(
    forward_func: Callable[..., Any], encoder: nn.Module | None
) -> Encoder | None:
    """The encoder, as far as it can be found without running a function.

    Raises:
        UnsupportedModelError: the model has no supported one.
    """
    root = encoder
    if root is None and isinstance(forward_func, nn.Module):
        root = forward_func
    if root is None:
        return None
    result = find_encoder(root)
    if result is None:
        raise unsupported(root)
    return result


def observe(
    forward_func: Callable[..., Any],
    tensors: tuple[Tensor, ...],
    arguments: tuple[Any, ...],
    encoder: Encoder | None,
    weights: WeightCache,
    differentiate: bool = True,
    is_named: bool = False,
) -> EncoderRun:
    """Run a model once and record its encoder; deviations are not judged.

    Args:
        forward_func (Callable): as for :func:`record`.
        tensors (tuple[Tensor, ...]): what it takes first.
        arguments (tuple): its further arguments.
        encoder (Encoder or None): the encoder; None: the first that runs.
        weights (WeightCache): prepared weights of earlier runs.
        differentiate (bool, optional): follow what the head does by gradients, for
            :meth:`EncoderRun.readout`. Default: True.
        is_named (bool, optional): the caller has named the encoder, among others that
            may read the inputs, too. Default: False.
    """
    tensors = tuple(map(countable, tensors))
    arguments = tuple(map(countable, arguments))
    first = tensors[0]

    def make_recorder(encoder: Encoder) -> Recorder:
        check_length(first, encoder)
        return Recorder(encoder, weights, _shape_of(first, encoder), differentiate)

    def forward() -> Any:
        return forward_func(*tensors, *arguments)

    observer = Observer(make_recorder, encoder, first, differentiate, is_named)
    ignore_compiler_warning()
    try:
        with observer.watching():
            output = forward()
    except GlobEncError:
        raise
    except RuntimeError as error:
        recorder = observer.recorder
        in_head = recorder is not None and recorder.is_in_head and differentiate
        if not in_head or not any(word in str(error) for word in _OF_GRADIENTS):
            raise
        # Heads that cannot run with gradients; what else is wrong shows again.
        return observe(
            forward_func, tensors, arguments, encoder, weights, False, is_named
        )
    recorder = observer.recorder
    if recorder is None:
        raise no_encoder_ran(observer.candidates)
    layers = recorder.finish()
    final = recorder.final
    assert final is not None
    batch_first = recorder.encoder.architecture.batch_first
    lowest = recorder.lowest
    check_shape(first, recorder.token_mask, recorder.grid)
    check_arrival(
        first,
        observer.lookups,
        [*observer.arrived, lowest if batch_first else lowest.transpose(0, 1)],
        recorder.encoder.token_weights,
        observer.embeddings,
        observer.embedded,
    )
    output_tensor(output)  # Raises where there is none.
    head, states = observer.head, dict(recorder.leaves)
    if head is not None and head.lowest is not None:
        states[0] = head.lowest
    observer.close()

    def as_rows(states: Tensor) -> Tensor:
        return states if batch_first else states.transpose(0, 1)

    return EncoderRun(
        inputs=tensors,
        arguments=arguments,
        output=output,
        encoder=recorder.encoder,
        layers=layers,
        token_mask=recorder.token_mask,
        final=as_rows(final),
        grid=recorder.grid,
        fits=recorder.fits,
        early=observer.early,
        _states=states,
        _unfollowed=() if head is None else tuple(head.unfollowed),
        _has_left_torch=head is not None and head.has_left_torch,
        _forward=forward,
    )


def _shape_of(inputs: Tensor, encoder: Encoder) -> tuple[int, int] | None:
    """(batch, tokens) of ids or embeddings; choices are folded into the batch."""
    if encoder.patches is not None or inputs.ndim < 2:
        return None
    tokens = inputs.shape[:-1] if inputs.is_floating_point() else inputs.shape
    return tokens[:-1].numel(), tokens[-1]
