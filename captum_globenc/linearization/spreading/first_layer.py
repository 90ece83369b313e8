"""A run that is put down on a tape, from the input of the first layer on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from captum_globenc.errors import NonFiniteActivationError, UnsupportedModelError
from captum_globenc.linearization.activations import (
    is_trusted,
    linearized,
    slope_of,
    takes_one_tensor,
)
from captum_globenc.linearization.operations import is_dependent, is_number
from captum_globenc.linearization.spreading.rules import RULES, sloped
from captum_globenc.linearization.spreading.tape import Tape
from captum_globenc.recording.compiled import ignore_compiler_warning, uncompiled
from captum_globenc.recording.evaluation_mode import evaluating
from captum_globenc.recording.inputs import countable
from captum_globenc.recording.observer import hooked
from captum_globenc.recording.outputs import output_tensor


class TapedRun:
    """One run, seen in the calling thread only.

    Args:
        inputs (tuple[Tensor, ...]): what forward_func takes first: ids (..., tokens),
            embeddings or images (batch, ...).
    """

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        self.tape = Tape(RULES)
        #: (batch, tokens) of the first layer's input.
        self.shape = (0, 0)
        #: Its rows are tokens first.
        self.is_turned = False
        self._inputs = inputs
        self._thread = threading.get_ident()
        self._undo = ExitStack()
        self._modules: list[nn.Module] = []
        self._names: dict[nn.Module, str] = {}
        self._stacked: set[nn.Module] = set()

    def run(
        self,
        forward_func: Callable[..., Any],
        arguments: tuple[Any, ...],
        select: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """The selected outputs, (batch)."""
        ignore_compiler_warning()
        with self._undo as undo:
            undo.enter_context(torch.inference_mode(False))
            undo.enter_context(torch.enable_grad())
            undo.enter_context(hooked(self._enter, self._leave))
            given = [
                countable(_detached(value)) for value in (*self._inputs, *arguments)
            ]
            with self.tape:
                output = output_tensor(forward_func(*given))
                if not bool(output.detach().isfinite().all()):
                    raise NonFiniteActivationError(
                        "the output of forward_func holds NaN or infinity."
                    )
                selected = select(output)
        if not self.shape[0]:
            raise UnsupportedModelError(
                "no stack of layers (an nn.ModuleList) ran in forward_func, so the "
                "output of the embedding block, where biases begin to be spread, is "
                'not known: use biases="none".'
            )
        if not selected.requires_grad:
            raise UnsupportedModelError(
                "the selected output does not depend on the tokens by operations that "
                "are linearised: return logits, not probabilities."
            )
        return selected

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if self._is_elsewhere():
            return None
        if not self._modules:
            self._undo.enter_context(evaluating(module))
            self._undo.enter_context(uncompiled(module))
        if module not in self._names:
            self._search(module)
        self._modules.append(module)
        self._locate()
        if torch.is_inference_mode_enabled():
            self._undo.enter_context(torch.inference_mode(False))
            torch._C._set_grad_enabled(True)
        is_in_place = getattr(module, "inplace", False)
        if takes_one_tensor(module, args) and is_trusted(module) and not is_in_place:
            self.tape.is_paused = True
        if self.shape[0] or module not in self._stacked:
            return None
        index = next((i for i, arg in enumerate(args) if is_number(arg)), None)
        if index is None:
            return None
        with torch._C.DisableTorchFunction():
            self._begin(module, args[index])
            start = self.tape.start(args[index])
        return (*args[:index], start, *args[index + 1 :])

    def _leave(
        self, module: nn.Module, args: Any, kwargs: Any, output: Any = None
    ) -> Any:
        if self._is_elsewhere():
            return None
        self.tape.is_paused = False
        if takes_one_tensor(module, args):
            self._activate(module, args[0], output)
        self._modules.pop()
        self._locate()
        return None

    def _activate(self, module: nn.Module, u: Tensor, output: Any) -> None:
        """Put down a module that is element-wise as one activation."""
        with torch._C.DisableTorchFunction():
            if linearized(module, u, output) is not None:
                limit = slope_of(module, u)
                assert limit is not None
                operand = self.tape.gather(u)
                step = sloped(self.tape, operand, u.detach(), output.detach(), limit)
                self.tape.note(output, step)
            elif is_dependent(output) and not self.tape.is_known(output):
                self.tape.refuse(output, "an activation is not 0 where its input is")

    def _begin(self, layer: nn.Module, hidden: Tensor) -> None:
        """Find out which dimensions of the first layer's input are batch and tokens."""
        given = self._inputs[0]
        batch, tokens = len(given), None
        if not given.is_floating_point():
            batch, tokens = given.shape[:-1].numel(), given.shape[-1]
        is_first = getattr(getattr(layer, "self_attn", None), "batch_first", None)
        first, second = (*hidden.shape, 0)[:2]
        shapes = [(first, second), (second, first)]
        fits = [
            hidden.ndim == 3 and shape[0] == batch and tokens in (None, shape[1])
            for shape in shapes
        ]
        self.is_turned = (not is_first) if is_first is not None else not fits[0]
        if not fits[self.is_turned]:
            raise UnsupportedModelError(
                f"the input of the first layer, {type(layer).__name__}, has shape "
                f"{tuple(hidden.shape)}, and a vector for each token of {batch} "
                f'examples is expected: use biases="none".'
            )
        self.shape = shapes[self.is_turned]

    def _is_elsewhere(self) -> bool:
        return torch.compiler.is_compiling() or threading.get_ident() != self._thread

    def _search(self, root: nn.Module) -> None:
        """Find names, and stacks of layers."""
        for name, module in root.named_modules():
            self._names.setdefault(module, name)
            if isinstance(module, nn.ModuleList):
                self._stacked.update(module)

    def _locate(self) -> None:
        if self._modules:
            module = self._modules[-1]
            name = self._names.get(module, "")
            self.tape.where = f"{name!r} ({type(module).__name__})"
        else:
            self.tape.where = "forward_func"


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
