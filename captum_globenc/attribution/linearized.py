"""What the methods of one linearised backward pass share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NoReturn

import torch
from captum.attr import Attribution, LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn

from captum_globenc._captum import (
    TargetType,
    TensorOrTupleOfTensorsGeneric,
    format_additional_forward_args,
    format_output,
    is_tuple,
)
from captum_globenc.attribution.arguments import (
    as_tensors,
    check_call,
    check_function,
    check_target,
    layers_in,
    share,
)
from captum_globenc.attribution.relevance import (
    Baselines,
    Relevance,
    check_examples,
    check_steps,
    integrated_relevance,
    relevance,
)
from captum_globenc.errors import InputError, is_whole, named
from captum_globenc.linearization.operations import AttentionRule
from captum_globenc.linearization.watching import ModulePlace, Place

#: Where the relevance of ids is read.
TokenPlace = Literal["word_embeddings", "block"]
_PLACES = {
    "word_embeddings": "the word embeddings",
    "block": "the output of the embedding block",
}
_RULES: dict[str, AttentionRule] = {"attnlrp": "attnlrp", "cp": "cp"}


class LinearizedAttribution(Attribution):
    """Base of the methods that propagate relevance in one linearised backward pass.

    Args:
        forward_func (Callable): a model, or any function that calls one.
        rule (str): ``"attnlrp"`` or ``"cp"``, see
            :mod:`captum_globenc.linearization.operations`.
        place (str): where the relevance of ids is read: ``"word_embeddings"`` or
            ``"block"``, the output of the embedding block, with positions and norm.
        keeps_own_biases (bool, optional): at the block, the biases in front of the
            first attention's values belong to their tokens. Default: False.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        rule: AttentionRule,
        *,
        place: TokenPlace,
        keeps_own_biases: bool = False,
    ) -> None:
        check_function(forward_func)
        named(_RULES, rule, "attention rule")
        named(_PLACES, place, "place")
        Attribution.__init__(self, forward_func)
        self.rule = rule
        self.place = place
        self._keeps_own_biases = keeps_own_biases

    def attribute_future(self) -> NoReturn:
        """Not implemented."""
        raise NotImplementedError(
            f"attribute_future is not implemented for {type(self).__name__}"
        )

    def has_convergence_delta(self) -> bool:
        """True: the relevance that tokens do not get is known."""
        return True

    def compute_convergence_delta(
        self, attributions: Tensor | tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        """Output minus the sum of attributions, (batch), as Captum's ``LRP`` has it.

        Args:
            attributions (Tensor or tuple[Tensor, ...]): of ``attribute``.
            output (Tensor): the selected output, (batch); with a baseline, less that of
                the baseline.
        """
        given = attributions if isinstance(attributions, tuple) else (attributions,)
        total = sum(part.reshape(output.numel(), -1).sum(1) for part in given)
        return output.flatten() - total

    @log_usage()
    def attribute(
        self,
        inputs: TensorOrTupleOfTensorsGeneric,
        target: TargetType = None,
        additional_forward_args: object | None = None,
        return_convergence_delta: bool = False,
        *,
        baselines: Baselines = None,
        n_steps: int = 1,
        internal_batch_size: int | None = None,
    ) -> TensorOrTupleOfTensorsGeneric | tuple[TensorOrTupleOfTensorsGeneric, Tensor]:
        r"""The relevance of every input for the target, with its sign.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): ids, (batch, tokens); embeddings,
                (batch, tokens, hidden); images, (batch, channels, height, width); or,
                for multiple choice, (batch, choices, ...). In a tuple, every tensor of
                numbers gets its relevance, and other integers than the first get zeros.
            target (int, tuple, Tensor, or list, optional): the output to explain, as
                for Captum's methods. For an output per token, (position, class).
                Default: None, for one output per example.
            additional_forward_args (Any, optional): further arguments of
                ``forward_func``, such as ``(attention_mask,)``. Default: None.
            return_convergence_delta (bool, optional): also return the delta. Default:
                False.
            baselines (Tensor, int, float or tuple, optional): where the path to the
                inputs begins, as for ``IntegratedGradients``; for ids, other ids, or a
                tensor of numbers: the embeddings at the place. Default: None, no path:
                the gradient at the inputs times the inputs.
            n_steps (int, optional): points on the path, in one batch. Default: 1.
            internal_batch_size (int, optional): run at most this many examples times
                points at once, but all points of an example. Default: all.

        Returns:
            *attributions* or *(attributions, delta)*:
            - **attributions**, *Tensor* or *tuple[Tensor, ...]*: for ids, the relevance
              of every token, (batch, tokens), 0 at padding; for embeddings and images,
              their shape, whose sum is the relevance.
            - **delta**, *Tensor* (batch): the selected output, less that of the
              baseline, minus the sum of attributions.

        Raises:
            InputError: inputs, baselines or target that cannot be attributed.
            UnsupportedModelError: an operation without a rule, or a place that is not
                found.
            ConservationError: the relevance of the output is not that of inputs and
                constants.
            NonFiniteActivationError: NaN or infinity in the output.
        """
        tensors, arguments = _checked(
            self.forward_func,
            inputs,
            target,
            additional_forward_args,
            baselines,
            n_steps,
        )
        found = [
            self._attribute(
                tuple(share(tensor, rows, batch) for tensor in tensors),
                tuple(share(argument, rows, batch) for argument in arguments),
                target[rows]
                if isinstance(target, list)
                else share(target, rows, batch),
                _rows_of(baselines, rows, tensors),
                n_steps,
                return_convergence_delta,
            )
            for batch in [len(tensors[0])]
            for rows in _batches(batch, internal_batch_size, n_steps)
        ]
        columns = zip(*(parts for parts, _ in found))
        result = format_output(is_tuple(inputs), tuple(map(torch.cat, columns)))
        if not return_convergence_delta:
            return result
        output = torch.cat([output for _, output in found])
        return result, self.compute_convergence_delta(result, output)

    def _attribute(
        self,
        tensors: tuple[Tensor, ...],
        arguments: tuple[Any, ...],
        target: TargetType,
        baselines: Baselines,
        n_steps: int,
        with_output: bool,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Relevance of one internal batch, and the output that it explains."""
        ids = tensors[0]
        has_ids = not ids.is_floating_point()
        places: list[Place] = [self.place] if has_ids else []
        if any(tensor.is_floating_point() for tensor in tensors):
            places.append("inputs")
        call = (self.forward_func, tensors, arguments, target)
        if baselines is None:
            found = relevance(*call, places, self.rule, self._keeps_own_biases)
        elif len(places) > 1:
            raise InputError(
                "a path from a baseline is for ids, or for tensors of numbers, and "
                "inputs hold both."
            )
        else:
            found = integrated_relevance(
                *call, places[0], self.rule, baselines, n_steps, with_output
            )
        parts = iter(found.parts)
        result = [self._of_ids(found, next(parts), ids)] if has_ids else []
        for tensor in tensors[len(result) :]:
            is_number = tensor.is_floating_point()
            result.append(next(parts) if is_number else torch.zeros_like(tensor))
        return tuple(result), found.output

    def _of_ids(self, found: Relevance, part: Tensor, ids: Tensor) -> Tensor:
        scores = part.sum(-1)
        if found.is_turned[0] and scores.ndim == 2:
            scores = scores.T
        return scores.reshape(ids.shape).to(ids.device)


class LayerLinearizedAttribution(LayerAttribution):
    """The same for what goes into a module or comes out of it.

    Args:
        forward_func (Callable): as for :class:`LinearizedAttribution`.
        layer (nn.Module or list[nn.Module]): where relevance is read.
        device_ids (list[int], optional): accepted as in Captum and not used.
        rule (str): as for :class:`LinearizedAttribution`.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | list[nn.Module],
        device_ids: list[int] | None,
        rule: AttentionRule,
    ) -> None:
        check_function(forward_func)
        named(_RULES, rule, "attention rule")
        layers_in(layer)
        LayerAttribution.__init__(self, forward_func, layer, device_ids)
        self.rule = rule

    def has_convergence_delta(self) -> bool:
        """True: the relevance that does not pass the layer is known."""
        return True

    compute_convergence_delta = LinearizedAttribution.compute_convergence_delta

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: TargetType = None,
        additional_forward_args: object | None = None,
        attribute_to_layer_input: bool = False,
        return_convergence_delta: bool = False,
        *,
        baselines: Baselines = None,
        n_steps: int = 1,
    ) -> Any:
        r"""The relevance of a layer's values for the target, with its sign.

        Args:
            inputs (Tensor or tuple[Tensor, ...]): what ``forward_func`` takes first.
            target (int, tuple, Tensor, or list, optional): the output to explain, as
                for Captum's methods. Default: None, for one output per example.
            additional_forward_args (Any, optional): further arguments of
                ``forward_func``. Default: None.
            attribute_to_layer_input (bool, optional): the layer's input instead of its
                output. Default: False.
            return_convergence_delta (bool, optional): also return the delta. Default:
                False.
            baselines (Tensor, int, float or tuple, optional): other inputs; the path
                goes from the layer's values for these to those for the inputs. For one
                layer only. Default: None, no path.
            n_steps (int, optional): points on the path, in one batch. Default: 1.

        Returns:
            *attributions* or *(attributions, delta)*: attributions are a *Tensor* of
            the shape of the layer's first tensor of numbers, or a *list[Tensor]* for a
            list of layers; the delta, (batch), is the output minus their sum, a list
            likewise.

        Raises:
            InputError: a layer that did not run, or ran several times; inputs,
                baselines or target that cannot be attributed.
            UnsupportedModelError: an operation without a rule.
            ConservationError: the relevance of the output is not that of inputs and
                constants.
            NonFiniteActivationError: NaN or infinity in the output.
        """
        tensors, arguments = _checked(
            self.forward_func,
            inputs,
            target,
            additional_forward_args,
            baselines,
            n_steps,
        )
        places = [
            ModulePlace(layer, attribute_to_layer_input)
            for layer in layers_in(self.layer)
        ]
        call = (self.forward_func, tensors, arguments, target)
        if baselines is None:
            found = relevance(*call, places, self.rule, False)
        elif len(places) > 1:
            raise InputError(
                f"a path from a baseline goes through one layer, got {len(places)}."
            )
        else:
            found = integrated_relevance(
                *call,
                places[0],
                self.rule,
                baselines,
                n_steps,
                return_convergence_delta,
            )
        parts = [part.contiguous() for part in found.parts]
        if return_convergence_delta:
            for part, is_turned in zip(parts, found.is_turned):
                check_examples(part, int(is_turned), len(tensors[0]))
        deltas = [
            self.compute_convergence_delta(
                part.transpose(0, 1) if is_turned else part, found.output
            )
            if return_convergence_delta
            else found.output
            for part, is_turned in zip(parts, found.is_turned)
        ]
        if not isinstance(self.layer, list):
            return (parts[0], deltas[0]) if return_convergence_delta else parts[0]
        return (parts, deltas) if return_convergence_delta else parts


def _checked(
    forward_func: Callable[..., Any],
    inputs: object,
    target: TargetType,
    additional_forward_args: object | None,
    baselines: Baselines,
    n_steps: int,
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """The inputs and further arguments as tuples, checked without running the model."""
    tensors = as_tensors(inputs)
    arguments = format_additional_forward_args(additional_forward_args) or ()
    check_target(target, len(tensors[0]))
    check_steps(n_steps, baselines)
    if isinstance(forward_func, nn.Module):
        check_call(forward_func, (*tensors, *arguments))
    return tensors, arguments


def _batches(batch: int, size: int | None, points: int) -> Iterator[slice]:
    """The examples of the internal batches."""
    if size is None:
        size = batch * points
    if not is_whole(size) or size < 1:
        raise InputError(f"internal_batch_size must be at least 1, got {size!r}.")
    examples = max(1, size // points)
    for start in range(0, batch, examples):
        yield slice(start, start + examples)


def _rows_of(
    baselines: Baselines, rows: slice, tensors: tuple[Tensor, ...]
) -> Baselines:
    """The baselines of some examples; what has no dimension of examples stays."""
    if not isinstance(baselines, tuple):
        return _rows_of_one(baselines, rows, tensors[0])  # type: ignore[no-any-return]
    parts = [_rows_of_one(b, rows, t) for b, t in zip(baselines, tensors)]
    return (*parts, *baselines[len(parts) :])


def _rows_of_one(baseline: Any, rows: slice, tensor: Tensor) -> Any:
    if not isinstance(baseline, Tensor):
        return baseline
    is_at_place = baseline.is_floating_point() and not tensor.is_floating_point()
    has_examples = baseline.ndim == tensor.ndim + is_at_place
    return share(baseline, rows, len(tensor)) if has_examples else baseline
