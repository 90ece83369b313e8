"""One recorded run serves every method; a second method takes ten lines."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
import transformers as t
from torch import Tensor, nn

from captum_globenc import (
    LOCAL_SCORES,
    EncoderRun,
    GlobEnc,
    InputError,
    LayerGlobEnc,
    ReconstructionError,
    record,
)
from captum_globenc.attribution.base import RolloutAttribution
from captum_globenc.contributions.contribution import Contribution, Rows
from captum_globenc.recording.attention import AttentionCall
from captum_globenc.recording.records import LayerRecord, Receivers
from tests.conftest import left_behind
from tests.models import FAMILIES, build, encoder_of, padded, sentence

EXACT = {"rtol": 1e-12, "atol": 0}
IDS, MASK = padded([sentence(8), sentence(5)])
SOME = [name for name in ("bert", "llama", "deberta-v2", "xlnet") if name in FAMILIES]


@pytest.mark.parametrize("family", SOME)
def test_methods_give_the_same_to_the_last_bit_with_and_without_a_run(family) -> None:
    model = build(family, torch.float32)
    run = record(model, IDS, MASK)
    assert isinstance(run, EncoderRun)
    assert run.shape == (2, 8)
    assert torch.equal(run.token_mask, MASK.bool())
    for name in LOCAL_SCORES:
        method = GlobEnc(model, local=name)
        alone = method.attribute(IDS, 1, MASK)
        assert torch.equal(method.attribute(run, 1), alone)
        told = method.attribute(run, 1, token_index=2)
        assert torch.equal(told, method.attribute(IDS, 1, MASK, token_index=2))
        decomposition = method.decompose(run)
        assert torch.equal(decomposition.local, method.decompose(IDS, MASK).local)
    embeddings = getattr(encoder_of(family, model), "embeddings", None)
    if embeddings is not None:
        layered = LayerGlobEnc(model, embeddings)
        assert torch.equal(layered.attribute(run, 1), layered.attribute(IDS, 1, MASK))
    assert not left_behind(model)


def test_a_run_takes_its_arguments_with_it() -> None:
    model = build("bert")
    run = record(model, IDS, MASK)
    with pytest.raises(InputError, match="belong to the run"):
        GlobEnc(model).attribute(run, 1, MASK)
    with pytest.raises(AssertionError, match="target has 3 elements"):
        GlobEnc(model).attribute(run, [0, 1, 2])
    tuple_run = record(lambda i, p: model(i, p).logits, (IDS, MASK))
    scores, zeros = GlobEnc(model).attribute(tuple_run, 1)
    torch.testing.assert_close(scores, GlobEnc(model).attribute(run, 1), **EXACT)
    assert not zeros.any()


def test_a_run_is_not_used_once_it_has_been_written_to() -> None:
    model = build("bert")
    for write in (lambda x: x.zero_(), lambda x: x.data.mul_(1.5)):
        kept: list[Tensor] = []

        def forward(ids: Tensor, kept: list[Tensor] = kept) -> Tensor:
            output = model(ids, output_hidden_states=True)
            kept.append(output.hidden_states[1])
            return output.logits

        run = record(forward, IDS[:1])
        assert GlobEnc(model).attribute(run, 1).all()
        with torch.no_grad():
            write(kept[0])
        with pytest.raises(InputError, match="changed in place"):
            GlobEnc(model).attribute(run, 1)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_of_layers_taken_together_the_one_that_is_wrong_is_named(index: int) -> None:
    model = build("bert")
    run = record(model, IDS, MASK)
    layers = list(run.layers)
    wrong = layers[index]
    layers[index] = dataclasses.replace(wrong, context_probe=-wrong.context_probe)
    run = dataclasses.replace(run, layers=tuple(layers))
    with pytest.raises(ReconstructionError, match=rf"layer\.{index}.*attention output"):
        GlobEnc(model).attribute(run, 1)


def test_readouts_by_target() -> None:
    model = build("bert", head=t.BertForTokenClassification)
    run = record(model, IDS, MASK)
    one = run.readout((3, 1))
    assert one.receivers.tolist() == [[3], [3]]
    each = run.readout([(5, 0), (2, 2)])
    assert each.receivers.tolist() == [[5], [2]]
    assert run.readout(None).receivers.tolist() == [[0], [0]]
    assert run.readout((3, 1), "pooling").receivers.tolist() == [[0], [0]]
    with pytest.raises(InputError, match="token 6 of example 1, which is padding"):
        run.readout((6, 1))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_layer_runs_again(family: str) -> None:
    """With its own attention it gives what it gave; with no values, what is left."""
    model = build(family)
    run = record(lambda ids, mask: _logits(model, ids, mask), IDS, MASK)
    kept = MASK.bool()
    for index, layer in enumerate(run.layers):
        same = run.replay(index, lambda call: call.context)
        after = run.layers[index + 1].hidden if index < 2 else None
        if after is not None:
            torch.testing.assert_close(same[kept], after[kept], rtol=1e-9, atol=1e-12)
        changed = run.replay(index, lambda call: torch.zeros_like(call.context))
        assert not torch.allclose(changed[kept], same[kept])
        # α times the values is the attention's own output.
        seen: list[AttentionCall] = []
        run.replay(index, lambda call, seen=seen: (seen.append(call), call.context)[1])
        again = seen[0].attention().nan_to_num() @ seen[0].value
        rows = kept[:, None, :, None].expand_as(again)
        torch.testing.assert_close(again[rows], seen[0].context[rows])
        assert layer.call.context.numel() == 0


def _logits(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    output = model(ids, attention_mask=mask)
    return output.logits if "logits" in output else output[0]


def test_all_partial_rollouts_in_one_pass() -> None:
    found = GlobEnc(build("bert")).decompose(IDS, MASK)
    rollouts = found.rollouts()
    assert rollouts.shape == (2, 3, 8, 8)
    for stop in (1, 2, 3):
        torch.testing.assert_close(rollouts[:, stop - 1], found.rollout(stop), **EXACT)


# A second method, with numbers of either sign


def signed_share(layer: LayerRecord) -> Rows:
    """The part of the mean attention above the uniform one."""

    def rows(receivers: Receivers) -> Tensor:
        alpha = layer.attention(receivers).mean(1)
        count = layer.token_mask.sum(1)[:, None, None]
        return (alpha - 1 / count) * layer.token_mask[:, None]

    return rows


class AboveUniform(RolloutAttribution):
    def __init__(self, forward_func: Callable[..., Tensor]) -> None:
        share = Contribution("above uniform", signed_share, is_signed=True)
        super().__init__(forward_func, share)


def test_a_signed_method_of_ten_lines() -> None:
    model = build("bert")
    method = AboveUniform(model)
    run = record(model, IDS, MASK)
    local = method.decompose(run).local
    assert (local < 0).any()
    by_hand = local[:, 0]
    for layer in (1, 2):
        by_hand = local[:, layer] @ by_hand
    torch.testing.assert_close(method.decompose(run).rollout(), by_hand, **EXACT)
    scores = method.attribute(run, 1)
    torch.testing.assert_close(scores, by_hand[:, 0], rtol=1e-9, atol=1e-15)
    assert torch.equal(scores, method.attribute(IDS, 1, MASK))


# Nothing that another thread, or a child, could notice


def plain_torch() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 4, 36, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    return encoder, torch.randn(2, 6, 24)


def eager_bert() -> tuple[nn.Module, Tensor]:
    return build("bert", torch.float32, attention="eager"), IDS[:1]


def sdpa_bert() -> tuple[nn.Module, Tensor]:
    return build("bert", torch.float32), IDS[:1]


@pytest.mark.parametrize("make", [plain_torch, eager_bert, sdpa_bert])
def test_predictions_in_another_thread_are_bitwise_the_same(make) -> None:
    model, inputs = make()
    plain = nn.TransformerEncoder.__call__ if make is plain_torch else None
    with torch.no_grad():
        output = model(inputs)
        expected = output if plain else output.logits
    stop, different, runs = threading.Event(), [], []

    def predict() -> None:
        with torch.no_grad():
            while not stop.is_set():
                found = model(inputs)
                found = found if plain else found.logits
                runs.append(1)
                if not torch.equal(found, expected):
                    different.append((found - expected).abs().max())

    thread = threading.Thread(target=predict)
    thread.start()
    method = GlobEnc(model)
    scores = [method.attribute(inputs, None, token_index=1) for _ in range(30)]
    stop.set()
    thread.join()
    assert len(runs) > 10
    assert not different
    assert all(torch.equal(scores[0], other) for other in scores)
    assert not left_behind(model)


def test_several_threads_attribute_at_once() -> None:
    model = build("bert", torch.float32)
    expected = GlobEnc(model).attribute(IDS, 1, MASK)
    problems: list[object] = []

    def attribute() -> None:
        try:
            for _ in range(15):
                found = GlobEnc(model).attribute(IDS, 1, MASK)
                if not torch.equal(found, expected):
                    problems.append(found)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=attribute) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert not left_behind(model)


def test_training_mode_comes_back_only_when_all_are_done() -> None:
    model = build("bert", torch.float32).train()
    before = {name: module.training for name, module in model.named_modules()}
    entered, leave = threading.Event(), threading.Event()

    def slow(ids: Tensor) -> Tensor:
        output = model(ids).logits
        entered.set()
        leave.wait(10)
        return output

    thread = threading.Thread(
        target=lambda: GlobEnc(slow, encoder=model).attribute(IDS[:1], 1)
    )
    thread.start()
    entered.wait(10)
    first = GlobEnc(model).attribute(IDS[:1], 1)
    # The other run is not over yet.
    assert not model.bert.training
    leave.set()
    thread.join()
    assert before == {name: m.training for name, m in model.named_modules()}
    torch.testing.assert_close(first, GlobEnc(model.eval()).attribute(IDS[:1], 1))


def _child(model: nn.Module, queue: object) -> None:
    with torch.no_grad():
        queue.put(model(IDS[:1]).logits.tolist())  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_that_is_forked_in_the_middle() -> None:
    model = build("bert", torch.float32)
    context = multiprocessing.get_context("fork")
    with torch.no_grad():
        expected = model(IDS[:1]).logits.tolist()
    found: list[object] = []

    def forward(ids: Tensor) -> Tensor:
        output = model(ids).logits
        queue = context.SimpleQueue()
        child = context.Process(target=_child, args=(model, queue))
        child.start()
        found.append(queue.get())
        child.join()
        return output

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        GlobEnc(forward).attribute(IDS[:1], 1)
    finally:
        torch.set_num_threads(threads)
    assert found == [expected]


def test_exceptions_leave_nothing_behind() -> None:
    model = build("bert", torch.float32)
    before = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())

    def fails(ids: Tensor) -> Tensor:
        model(ids)
        raise RuntimeError("of the caller's own")

    for _ in range(3):
        with pytest.raises(RuntimeError, match="of the caller's own"):
            GlobEnc(fails).attribute(IDS[:1], 1)
    assert before == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    assert torch._C._len_torch_function_stack() == 0
    assert not left_behind(model)


def test_methods_are_copied_and_pickled() -> None:
    method = GlobEnc(build("bert"), readout="pooling")
    expected = method.attribute(IDS, 1, MASK)
    for other in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        torch.testing.assert_close(other.attribute(IDS, 1, MASK), expected, **EXACT)
