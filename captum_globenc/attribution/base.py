"""What the rollout methods share: one recorded run, a readout, and the sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from captum.attr import Attribution
from torch import Tensor, nn

from captum_globenc._captum import (
    TargetType,
    format_additional_forward_args,
    select_targets,
)
from captum_globenc.attribution.arguments import (
    TokenIndex,
    as_tensors,
    check_call,
    check_target,
    readout_at,
)
from captum_globenc.contributions.contribution import Contribution
from captum_globenc.contributions.rollout import (
    Decomposition,
    ScaledTensor,
    decompose,
    sweep,
)
from captum_globenc.encoders.weights import WeightCache
from captum_globenc.errors import InputError, NonFiniteActivationError
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
        readout (str, optional): how the tokens that the head reads are found,
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
        if not callable(forward_func):
            raise TypeError(
                "forward_func must be a model or a function, got "
                f"{type(forward_func).__name__}: {forward_func!r}"
            )
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

    def attribute_future(self) -> NoReturn:
        """Not implemented."""
        raise NotImplementedError(
            f"attribute_future is not implemented for {type(self).__name__}"
        )

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
        run = self._run(inputs, additional_forward_args, differentiate=False)
        with torch.no_grad(), torch.autocast(run.final.device.type, enabled=False):
            return decompose(run, self.contribution)

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
        for fit in run.fits:
            fit.raise_if_not()
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
        if output.isnan().any():
            raise NonFiniteActivationError(
                "the output of forward_func holds NaN, though no encoder layer does: "
                "look for NaN in the head."
            )
        if token_index is None:
            readout = run.readout(target, self.readout)
        else:
            readout = readout_at(token_index, run)
        with torch.no_grad(), torch.autocast(run.final.device.type, enabled=False):
            return list(sweep(run, self.contribution, readout))

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
