"""Other threads, other processes, and what is left behind."""

# Small functions are what their names say.
# ruff: noqa: D103

from __future__ import annotations

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.modules import module as module_hooks
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from benchmarks.mutations.attending import attention_function
from benchmarks.mutations.campaign import RIGHT, Holds, Trial, case
from benchmarks.mutations.models import Subject, subject
from captum_globenc import GlobEnc, GlobEncError, LayerGlobEnc

KIND = "threads"
_ORIGINAL = functional.scaled_dot_product_attention
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


@contextlib.contextmanager
def _taking_turns() -> Iterator[None]:
    """Let threads take turns as often as Python can, to find what they share."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _in_thread(work: Callable[[], None]) -> tuple[threading.Thread, list[str]]:
    """Run something in another thread; what it raises is kept."""
    raised: list[str] = []

    def run() -> None:
        try:
            work()
        except Exception as error:
            raised.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


# Predictions of another thread


@case(
    KIND,
    RIGHT,
    [
        ("bert", "eager"),
        ("bert", "sdpa"),
        ("gpt2", "eager"),
        ("llama", "sdpa"),
        ("vit", "eager"),
        ("modernbert", "eager"),
        ("torch-post", "fused"),
        ("torch-pre", "fused"),
    ],
)
def predictions_meanwhile(family: str, attention: str) -> Trial:
    """To the last bit what they are alone, as long as attributions run."""
    kind = "sdpa" if attention == "fused" else attention
    one = subject(family, torch.float32, attention=kind)

    def predict() -> Tensor:
        with torch.no_grad():
            return one.forward(one.inputs, *one.arguments)

    def ask() -> str:
        alone, other = predict(), []
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                other.append(torch.equal(predict(), alone))

        with _taking_turns():
            thread, raised = _in_thread(work)
            try:
                for _ in range(20):
                    one.attribute()
            finally:
                stop.set()
                thread.join()
        if raised:
            return raised[0]
        wrong = other.count(False)
        return f"{wrong} of {len(other)} predictions are others" if wrong else ""

    return Holds(ask)


@case(KIND, RIGHT, [("bert", "eager"), ("torch-post", "fused"), ("gpt2", "sdpa")])
def prediction_inside_a_run(family: str, attention: str) -> Trial:
    """Another thread predicts while this one is in the middle of its forward pass."""
    kind = "sdpa" if attention == "fused" else attention
    one = subject(family, torch.float32, attention=kind)

    def predict() -> Tensor:
        with torch.no_grad():
            return one.forward(one.inputs, *one.arguments)

    def ask() -> str:
        alone, other = predict(), []
        layer = one.part("layer", 1)
        raised: list[str] = []
        own = threading.get_ident()

        def enter(*_: Any) -> None:
            if threading.get_ident() != own:
                return
            thread, problems = _in_thread(lambda: other.append(predict()))
            thread.join()
            raised.extend(problems)

        hook = layer.register_forward_pre_hook(enter)
        one.attribute()
        hook.remove()
        if raised:
            return raised[0]
        if not other:
            return "nothing ran"
        # Hooks take torch's layers off their fast path: another order of sums.
        exact = attention != "fused"
        same = (
            torch.equal(other[0], alone)
            if exact
            else torch.allclose(other[0], alone, rtol=1e-4, atol=1e-5)
        )
        return "" if same else "the prediction is another"

    return Holds(ask)


@case(KIND, RIGHT, [("bert", "eager"), ("torch-post", "fused"), ("llama", "sdpa")])
def prediction_of_another_model_inside_a_run(family: str, attention: str) -> Trial:
    """A model that nobody explains, in another thread, in the middle of a run."""
    kind = "sdpa" if attention == "fused" else attention
    one = subject(family, torch.float32, attention=kind)
    two = subject(family, torch.float32, attention=kind)

    def predict() -> Tensor:
        with torch.no_grad():
            return two.forward(two.inputs, *two.arguments)

    def ask() -> str:
        alone, other = predict(), []
        raised: list[str] = []

        def enter(*_: Any) -> None:
            thread, problems = _in_thread(lambda: other.append(predict()))
            thread.join()
            raised.extend(problems)

        hook = one.part("layer", 1).register_forward_pre_hook(enter)
        one.attribute()
        hook.remove()
        if raised or not other:
            return (raised or ["nothing ran"])[0]
        return "" if torch.equal(other[0], alone) else "the prediction is another"

    return Holds(ask)


@case(KIND, RIGHT, [("bert", "sdpa"), ("gpt2", "eager"), ("torch-post", "sdpa")])
def two_threads_attribute(family: str, attention: str) -> Trial:
    """One model, two threads, the scores of either alone."""
    return _two_threads(subject(family, attention=attention), None)


@case(KIND, RIGHT, [("bert", "gpt2"), ("vit", "torch-post")])
def two_threads_attribute_two_models(first: str, second: str) -> Trial:
    """Two models, two threads, the scores of either alone."""
    return _two_threads(subject(first), subject(second))


def _two_threads(one: Subject, two: Subject | None) -> Trial:
    two = two or one

    def ask() -> str:
        alone, other = one.attribute(), two.attribute()
        found: list[bool] = []

        def work() -> None:
            found.extend(torch.equal(two.attribute(), other) for _ in range(20))

        with _taking_turns():
            thread, raised = _in_thread(work)
            found.extend(torch.equal(one.attribute(), alone) for _ in range(20))
            thread.join()
        if raised:
            return raised[0]
        return f"{found.count(False)} scores are others" if not all(found) else ""

    return Holds(ask)


@case(KIND, RIGHT, [("bert",), ("vit",)])
def training_meanwhile(family: str) -> Trial:
    """Another thread computes gradients of another model: they stay what they are."""
    one, two = subject(family), subject(family)

    def gradients() -> Tensor:
        two.model.zero_grad()
        two.forward(two.inputs, *two.arguments).sum().backward()
        grads = [p.grad for p in two.model.parameters() if p.grad is not None]
        return torch.cat([grad.flatten() for grad in grads])

    def ask() -> str:
        alone, other = gradients(), []
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                other.append(torch.equal(gradients(), alone))

        with _taking_turns():
            thread, raised = _in_thread(work)
            try:
                for _ in range(10):
                    one.attribute()
            finally:
                stop.set()
                thread.join()
        if raised:
            return raised[0]
        return "" if all(other) else f"{other.count(False)} gradients are others"

    return Holds(ask)


# Fork


@case(KIND, RIGHT, [("bert", "eager"), ("gpt2", "sdpa"), ("torch-post", "sdpa")])
def fork_in_the_middle(family: str, attention: str) -> Trial:
    """A child of a run has no patched function, and predicts what its parent does."""
    one = subject(family, torch.float32, attention=attention)

    def predict() -> Tensor:
        with torch.no_grad():
            return one.forward(one.inputs, *one.arguments)

    def child(alone: Tensor) -> int:
        """What is wrong in the child, as a number."""
        if functional.scaled_dot_product_attention is not _ORIGINAL:
            return 1
        if not torch.backends.mha.get_fastpath_enabled():
            return 2
        exact = {"rtol": 1e-4, "atol": 1e-5} if family == "torch-post" else {}
        found: list[Tensor] = []
        # A thread of its own: the forked one is still in the middle of its run.
        thread, raised = _in_thread(lambda: found.append(predict()))
        thread.join()
        if raised or not found:
            return 3
        if exact:
            return 0 if torch.allclose(found[0], alone, **exact) else 4
        return 0 if torch.equal(found[0], alone) else 4

    def ask() -> str:
        alone = predict()
        codes: list[int] = []

        def enter(*_: Any) -> None:
            if codes:
                return
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                process = os.fork()
            if process == 0:
                code = 5
                try:
                    codes.append(0)
                    code = child(alone)
                finally:
                    os._exit(code)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))

        hook = one.part("layer", 1).register_forward_pre_hook(enter)
        one.attribute()
        hook.remove()
        problems = {
            1: "torch's attention is patched in the child",
            2: "torch's fast path is off in the child",
            3: "the child cannot predict",
            4: "the child predicts something else",
            5: "the child fails",
        }
        return "" if codes == [0] else problems.get(codes[0], f"exit {codes[0]}")

    return Holds(ask)


# What is left behind


def _state(one: Subject) -> dict[str, Any]:
    """All that an attribution could leave changed."""
    modules = list(one.model.named_modules())
    configs = [
        (name, config._attn_implementation)
        for name, module in modules
        if hasattr(config := vars(module).get("config"), "_attn_implementation")
    ]
    return {
        "hooks": [
            (name, hooks, len(getattr(module, hooks)))
            for name, module in modules
            for hooks in _HOOKS
        ],
        "global hooks": [len(getattr(module_hooks, name)) for name in _GLOBAL_HOOKS],
        "attention": configs,
        "training": [module.training for _, module in modules],
        "forward": [vars(module).get("forward") for _, module in modules],
        "torch's attention": functional.scaled_dot_product_attention is _ORIGINAL,
        "torch's softmax": (functional.softmax, torch.softmax, Tensor.softmax),
        "torch's products": (torch.matmul, torch.bmm, torch.einsum, Tensor.__matmul__),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "gradients": [p.grad is None for p in one.model.parameters()],
        "needs gradients": [p.requires_grad for p in one.model.parameters()],
        "versions": [p._version for p in one.model.parameters()],
        "attention functions": sorted(
            name for name in AttentionInterface() if not name.startswith("campaign")
        ),
        "mask functions": sorted(
            name for name in AttentionMaskInterface() if not name.startswith("campaign")
        ),
        "inputs": one.inputs._version,
        "random state": torch.get_rng_state().tolist(),
    }


class OwnError(RuntimeError):
    """What a forward function raises here."""


def nothing(one: Subject) -> Any:
    return one.attribute()


def at_the_end(one: Subject) -> Any:
    def forward(*arguments: Tensor) -> Tensor:
        one.forward(*arguments)
        raise OwnError

    return one.attribute(forward)


def at_the_start(one: Subject) -> Any:
    def forward(*arguments: Tensor) -> Tensor:
        raise OwnError

    return one.attribute(forward)


def in_the_second_layer(one: Subject) -> Any:
    def enter(*_: Any) -> None:
        raise OwnError

    hook = one.part("layer", 1).register_forward_pre_hook(enter)
    try:
        return one.attribute()
    finally:
        hook.remove()


def in_attention(one: Subject) -> Any:
    inner = one.part("attention", 1)

    def leave(*_: Any) -> None:
        raise OwnError

    hook = inner.register_forward_hook(leave)
    try:
        return one.attribute()
    finally:
        hook.remove()


def refused_by_the_package(one: Subject) -> Any:
    def forward(*arguments: Tensor) -> Tensor:
        return one.forward(*arguments) + one.forward(*arguments)

    return one.attribute(forward)


def by_an_interrupt(one: Subject) -> Any:
    def forward(*arguments: Tensor) -> Tensor:
        one.forward(*arguments)
        raise KeyboardInterrupt

    return one.attribute(forward)


def with_a_wrong_target(one: Subject) -> Any:
    return GlobEnc(one.forward).attribute(one.inputs, 99, one.arguments)


def by_layers(one: Subject) -> Any:
    method = LayerGlobEnc(one.forward, one.part("layer", 1))
    return method.attribute(one.inputs, 1, one.arguments)


def decomposed(one: Subject) -> Any:
    return GlobEnc(one.forward).decompose(one.inputs, one.arguments)


@case(
    KIND,
    RIGHT,
    [
        (what, family, attention)
        for what in (
            nothing,
            at_the_end,
            at_the_start,
            in_the_second_layer,
            in_attention,
            refused_by_the_package,
            by_an_interrupt,
            with_a_wrong_target,
            by_layers,
            decomposed,
        )
        for family, attention in (
            ("bert", "eager"),
            ("torch-post", "sdpa"),
            ("gpt2", "sdpa"),
        )
    ],
)
def left_as_it_was(
    what: Callable[[Subject], Any], family: str, attention: str
) -> Trial:
    """Model, config and torch are as before, also where something was raised."""
    one = subject(family, attention=attention)
    # Not the head, whose dropout would be left to chance.
    one.encoder.train()
    one.part("layer", 0).eval()
    # The package may register names when it is first used.
    subject("bert").attribute()

    def ask() -> str:
        before = _state(one)
        raised = ""
        try:
            what(one)
        except (OwnError, KeyboardInterrupt, GlobEncError, AssertionError):
            pass
        except IndexError as error:
            raised = "" if what is with_a_wrong_target else str(error)
        after = _state(one)
        changed = [name for name in before if before[name] != after[name]]
        return raised or ", ".join(changed)

    return Holds(ask)


@case(KIND, RIGHT, [("bert",), ("torch-pre",)])
def attributes_after_a_failure(family: str) -> Trial:
    """A failed run is not in the way of the next."""
    one = subject(family)

    def ask() -> str:
        expected = one.attribute()
        for what in (at_the_end, in_the_second_layer, in_attention):
            with contextlib.suppress(OwnError):
                what(one)
        return "" if torch.equal(one.attribute(), expected) else "other scores"

    return Holds(ask)


@case(KIND, RIGHT)
def own_attention_while_another_thread_is_recorded() -> Trial:
    """A registered function of another model is called as ever."""
    calls: list[int] = []

    def attend(c: Any) -> Tensor:
        calls.append(threading.get_ident())
        return c.softmax() @ c.value

    AttentionInterface.register("campaign_counted", attention_function(attend))
    two = subject("bert", torch.float32, attention="campaign_counted")
    one = subject("bert", torch.float32)

    def ask() -> str:
        def enter(*_: Any) -> None:
            thread, _raised = _in_thread(lambda: two.forward(two.inputs))
            thread.join()

        hook = one.part("layer", 1).register_forward_pre_hook(enter)
        one.attribute()
        hook.remove()
        return "" if len(calls) == 3 else f"called {len(calls)} times"

    return Holds(ask)


@case(KIND, RIGHT)
def one_attribution_inside_another() -> Trial:
    """Of another model, by a head: refused, or the scores that it has alone."""
    one, two = subject("bert"), subject("gpt2")
    expected = two.truth()

    def ask() -> str:
        found: list[Tensor] = []

        def forward(ids: Tensor, mask: Tensor) -> Tensor:
            output = one.forward(ids, mask)
            found.append(two.attribute())
            return output

        try:
            one.attribute(forward)
        except GlobEncError:
            return ""
        same = torch.allclose(found[0], expected, rtol=1e-6)
        return "" if same else "the inner scores are others"

    return Holds(ask)
