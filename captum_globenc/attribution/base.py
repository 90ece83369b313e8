"""What the rollout methods share: one recorded run, a readout, and the sweep."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NoReturn, cast

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
from captum_globenc.attribution.adapters import shaped_like
from captum_globenc.attribution.arguments import (
    TokenIndex,
    as_tensors,
    check_call,
    check_function,
    check_target,
    readout_at,
    share,
)
from captum_globenc.contributions.contribution import Contribution
from captum_globenc.contributions.rollout import (
    Decomposition,
    ScaledTensor,
    decompose,
    sweep,
)
from captum_globenc.deferred import check_later, settled
from captum_globenc.encoders.weights import WeightCache
from captum_globenc.errors import InputError, NonFiniteActivationError, is_whole
from captum_globenc.recording.outputs import output_tensor
from captum_globenc.recording.readout import ReadoutKind
from captum_globenc.recording.run import EncoderRun, encoder_in, observe

#: What may be attributed: tensors, or a run that was recorded before.
Inputs = Tensor | tuple[Tensor, ...] | EncoderRun


class RolloutAttribution(Attribution):
    """Base of the methods that roll up the contributions of an encoder's layers.

    A method is a :class:`~captum_globenc.contributions.contribution.Contribution` and a
    constructor that hands it on.

    Args:
        forward_func (Callable): a Hugging Face model, an ``nn.Module`` around one, or
            any function that calls one.
        contribution (Contribution): of one layer.
        encoder (nn.Module, optional): the model or part of it to explain. Default: the
            one found in ``forward_func``.
        normalize (bool, optional): sizes of an example's scores sum to 1. Default:
            False.
        readout (str, optional): how it is determined which tokens the head reads,
            ``"gradient"`` or ``"pooling"``. Default: ``"gradient"``.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        contribution: Contribution,
        *,
        encoder: nn.Module | None = None,
        normalize: bool = False,
        readout: ReadoutKind = "gradient",
    ) -> None:
        check_function(forward_func)
        if encoder is not None and not isinstance(encoder, nn.Module):
            raise TypeError(
                f"encoder must be an nn.Module, got {type(encoder).__name__}."
            )
        if readout not in ("gradient", "pooling"):
            raise InputError(
                f'readout must be "gradient" or "pooling", got {readout!r}.'
            )
        Attribution.__init__(self, forward_func)
        self.contribution = contribution
        self.encoder = encoder
        self.normalize = normalize
        self.readout = readout
        self._weights = WeightCache()
        self._known: set[Hashable] = set()

    def attribute_future(self) -> NoReturn:
        """Not implemented."""
        raise NotImplementedError(
            f"attribute_future is not implemented for {type(self).__name__}"
        )

    @log_usage()
    def attribute(
        self,
        inputs: TensorOrTupleOfTensorsGeneric | EncoderRun,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        *,
        token_index: TokenIndex = None,
        internal_batch_size: int | None = None,
    ) -> TensorOrTupleOfTensorsGeneric:
        r"""Score every input token.

        Args:
            inputs (Tensor, tuple[Tensor, ...] or EncoderRun): input ids, (batch,
                tokens); embeddings, (batch, tokens, hidden); images, (batch, channels,
                height, width); or, for multiple choice, ids or embeddings with (batch,
                choices, ...), where every choice is explained by itself. In a tuple,
                the first tensor is that; the others (token types, positions, ...) are
                passed on and get zeros of their shape. The first tensor must arrive
                unchanged at the encoder; images may be resized as a whole and
                normalised by channel. A run of :func:`captum_globenc.record` replaces
                inputs and ``additional_forward_args``, without a further forward pass.
            target (int, tuple, Tensor, or list, optional): the output to explain, as
                for Captum's methods. For an output per token, (batch, tokens, classes)
                or the start and end logits (batch, tokens) of question answering, it
                selects the token: an int, or the first element of a tuple. For a head
                that reads several tokens it may change their weights. For a head that
                reads one token it does not change the scores. Default: None, a fixed
                positive combination of all outputs; for an output per token, the
                model's or its family's pooling. Class-aware scores need a target that
                selects one output of each example, and depend on it.
            additional_forward_args (Any, optional): further arguments of
                ``forward_func``, such as ``(attention_mask,)``. Default: None.
            token_index (int, Tensor, "mean", optional): the token of the last layer to
                explain, whatever the head reads: one position for all examples, a
                LongTensor (batch), for multiple choice (batch × choices), or the mean
                of all tokens. Default: None, what the head reads.
            internal_batch_size (int, optional): run at most this many examples at once;
                not allowed with a recorded run. Default: all.

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**, shaped like inputs:
            - for ids, token scores in the dtype of the forward output, exactly 0 at
              padding, and at least 0 where the method has no sign;
            - for embeddings, (batch, tokens, hidden), whose sum over the last dimension
              is the token score;
            - for images, the score of each patch spread over its pixels and channels,
              and 0 at a margin that makes no whole patch. The scores of special tokens
              belong to no pixel.

            Scores too large for the dtype are scaled per example, which keeps ratios.

        Raises:
            InputError: inputs, mask or token_index that cannot be attributed; inputs
                that do not arrive unchanged at the encoder; a head that reads padding.
            UnsupportedModelError: no supported encoder, attention that is not softmax
                weights times values, or a head whose readout cannot be determined.
            AssertionError: an illegal target, as for Captum's methods.
            ReconstructionError: the recorded parts do not rebuild a layer.
            NonFiniteActivationError: NaN or infinity in a layer.
        """
        tensors = self._checked(inputs, target)
        batch = tensors[0].shape[0]
        size = batch if internal_batch_size is None else internal_batch_size
        if not is_whole(size) or size < 1:
            raise InputError(f"internal_batch_size must be at least 1, got {size!r}.")
        if isinstance(inputs, EncoderRun):
            if internal_batch_size is not None:
                raise InputError(
                    "a run has been made already, whole: internal_batch_size belongs "
                    "to inputs."
                )
            given = additional_forward_args
            parts = [self._attribute(inputs, given, target, token_index)]
            is_in_tuple = len(tensors) > 1
        else:
            arguments = format_additional_forward_args(additional_forward_args) or ()
            parts = [
                self._attribute(
                    tuple(share(tensor, rows, batch) for tensor in tensors),
                    tuple(share(argument, rows, batch) for argument in arguments),
                    target[rows]
                    if isinstance(target, list)
                    else share(target, rows, batch),
                    share(token_index, rows, batch),
                )
                for start in range(0, batch, size)
                for rows in [slice(start, start + size)]
            ]
            is_in_tuple = is_tuple(inputs)
        zeros = [torch.zeros_like(other) for other in tensors[1:]]
        result = (torch.cat(parts), *zeros)
        return cast(TensorOrTupleOfTensorsGeneric, format_output(is_in_tuple, result))

    def _attribute(
        self,
        inputs: Inputs,
        arguments: object | None,
        target: TargetType,
        token_index: TokenIndex,
    ) -> Tensor:
        """Scores of one internal batch, in the shape of its first tensor."""
        run, rows = self._swept(inputs, arguments, target, token_index)
        row = rows[-1]
        first, dtype = run.inputs[0], output_tensor(run.output).dtype
        if first.is_floating_point():
            dtype = first.dtype
        elif not dtype.is_floating_point:
            dtype = row.values.dtype
        scores = self._scores(row, dtype).to(first.device)
        return shaped_like(scores, first, run.grid)

    def decompose(
        self, inputs: Inputs, additional_forward_args: object | None = None
    ) -> Decomposition:
        r"""The contributions of all layers and their rollout.

        Args:
            inputs (Tensor, tuple[Tensor, ...] or EncoderRun): as for ``attribute``.
            additional_forward_args (Any, optional): as for ``attribute``.

        Returns:
            *Decomposition* with ``local`` of shape (batch, layers, receivers, sources)
            and ``rollout(stop=None)``, (batch, receivers, sources), in float64 where
            the model computes in it, else in float32.

        Raises:
            InputError: inputs or mask that cannot be decomposed.
            UnsupportedModelError: no supported encoder.
            ReconstructionError: the recorded parts do not rebuild a layer.
            NonFiniteActivationError: NaN or infinity in a layer.
        """

        def decomposed() -> Decomposition:
            run = self._run(inputs, additional_forward_args, differentiate=False)
            device = run.final.device.type
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return decompose(run, self.contribution)

        return settled(self._known, decomposed)

    def _swept(
        self,
        inputs: Inputs,
        arguments: object | None,
        target: TargetType,
        token_index: TokenIndex,
    ) -> tuple[EncoderRun, list[ScaledTensor]]:
        """The run, and the rows of its sweep."""

        def call() -> tuple[EncoderRun, list[ScaledTensor]]:
            run = self._run(inputs, arguments, self._needs_gradient(token_index))
            return run, self._sweep(run, target, token_index)

        return settled(self._known, call)

    def _run(
        self, inputs: Inputs, arguments: object | None, differentiate: bool = True
    ) -> EncoderRun:
        """The run to explain: the one that is given, or a new one."""
        if isinstance(inputs, EncoderRun):
            if arguments is not None:
                raise InputError(
                    "additional_forward_args belong to the run: pass them to "
                    "captum_globenc.record, and the run alone here."
                )
            run = inputs
            own = encoder_in(self.forward_func, self.encoder)
            if own is not None and own.module is not run.encoder.module:
                raise InputError(
                    f"the run is of another {type(run.encoder.module).__name__} than "
                    "the model of this method: record it with this model."
                )
            run.check_unchanged()
        else:
            tensors = as_tensors(inputs)
            given = format_additional_forward_args(arguments) or ()
            if isinstance(self.forward_func, nn.Module):
                check_call(self.forward_func, (*tensors, *given))
            run = observe(
                self.forward_func,
                tensors,
                given,
                encoder_in(self.forward_func, self.encoder),
                self._weights,
                differentiate,
                is_named=self.encoder is not None,
            )
        run.check_fits()
        return run

    def _sweep(
        self, run: EncoderRun, target: TargetType, token_index: TokenIndex
    ) -> list[ScaledTensor]:
        """What is taken from each token, (batch, tokens), from the top down.

        The first row is what is read of the last layer's output; the row of index k is
        what is taken from the input of the k-th layer from the top.
        """
        output = output_tensor(run.output)
        select_targets(output, target)  # Raises where it is not legal.
        check_later(output.isnan().any(), _judge_output)
        with torch.no_grad(), torch.autocast(run.final.device.type, enabled=False):
            return list(self._rows(run, target, token_index))

    def _rows(
        self, run: EncoderRun, target: TargetType, token_index: TokenIndex
    ) -> Iterator[ScaledTensor]:
        """The rows of the sweep, from what is read of the last layer's output."""
        if token_index is None:
            readout = run.readout(target, self.readout)
        else:
            readout = readout_at(token_index, run)
        return sweep(run, self.contribution, readout)

    def _needs_gradient(self, token_index: TokenIndex) -> bool:
        """Whether the head must be followed by gradients."""
        return token_index is None

    def _scores(self, row: ScaledTensor, dtype: torch.dtype) -> Tensor:
        """The numbers of a row, (batch, tokens), normalised where asked for."""
        if self.normalize:
            total = row.values.abs().sum(-1, keepdim=True)
            return (row.values / total).to(dtype)
        return row.to(dtype)

    def _checked(self, inputs: Inputs, target: TargetType) -> Sequence[Tensor]:
        """The tensors that are attributed, and their target checked."""
        run = isinstance(inputs, EncoderRun)
        tensors = inputs.inputs if run else as_tensors(inputs)  # type: ignore[union-attr]
        check_target(target, tensors[0].shape[0])
        return tensors


def _judge_output(is_nan: list[float]) -> None:
    if any(is_nan):
        raise NonFiniteActivationError(
            "the output of forward_func holds NaN, though no encoder layer does: look "
            "for NaN in the head."
        )
