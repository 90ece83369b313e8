"""What later calls of one method assume, and what they do where it does not hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from captum_globenc import GlobEnc, InputError, NonFiniteActivationError, record
from captum_globenc.recording import grouping
from tests.models import build, padded, sentence

IDS, MASK = padded([sentence(7), sentence(5)])


class Counted(nn.Module):
    """A model and how often it ran."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        self.calls += 1
        return self.model(ids, mask).logits


@pytest.mark.parametrize("held", [grouping._HELD, 1], ids=["stacked", "single"])
def test_weights_that_change_behind_torch_are_prepared_again(
    held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "_HELD", held)
    counted = Counted(build("bert"))
    globenc = GlobEnc(counted)
    for _ in range(3):
        globenc.attribute(IDS, 1, MASK)
    for layer in (2, 0, 1):
        parts = counted.model.bert.encoder.layer[layer].attention.output
        parts.LayerNorm.weight.data.mul_(1.5)
        parts.dense.weight.data.mul_(0.5)
        before = counted.calls
        scores = globenc.attribute(IDS, 1, MASK)
        assert counted.calls - before <= 2
        assert torch.equal(scores, GlobEnc(counted).attribute(IDS, 1, MASK))
        for _ in range(2):
            assert torch.equal(scores, globenc.attribute(IDS, 1, MASK))


@pytest.mark.parametrize("held", [grouping._HELD, 1], ids=["stacked", "single"])
@pytest.mark.parametrize("calls", [0, 3])
def test_a_weight_that_is_no_number_is_an_error(
    calls: int, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "_HELD", held)
    model = build("bert")
    globenc = GlobEnc(model)
    for _ in range(calls):
        globenc.attribute(IDS, 1, MASK)
    model.bert.encoder.layer[2].attention.output.dense.bias.data[0] = torch.nan
    with pytest.raises(NonFiniteActivationError, match="activations hold NaN"):
        globenc.attribute(IDS, 1, MASK)


def test_an_output_per_token_that_is_zero_at_padding() -> None:
    encoder = build("bert").bert
    head = nn.Linear(encoder.config.hidden_size, 3).double()

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        return head(encoder(ids, mask)[0]) * mask[..., None]

    scores = GlobEnc(forward, encoder=encoder).attribute(IDS, None, (MASK,))
    assert scores.shape == IDS.shape
    assert (scores > 0).equal(MASK.bool())


def test_a_head_that_is_another_one_in_the_next_call() -> None:
    encoder = build("bert").bert
    weight = torch.linspace(-1, 1, encoder.config.hidden_size).double()
    reads, calls = {"kind": "first"}, []

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        calls.append(reads["kind"])
        hidden = encoder(ids, mask)[0]
        if reads["kind"] == "mean":
            hidden = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        else:
            hidden = hidden[:, 0]
        return hidden @ weight[:, None]

    globenc = GlobEnc(forward, encoder=encoder)
    for kind in ("first", "first", "mean", "mean", "first", "first", "first"):
        reads["kind"] = kind
        before = len(calls)
        scores = globenc.attribute(IDS, 0, (MASK,))
        assert len(calls) - before <= 2
        alone = GlobEnc(forward, encoder=encoder).attribute(IDS, 0, (MASK,))
        torch.testing.assert_close(scores, alone, rtol=1e-12, atol=0)


def test_checks_of_a_record_inside_another_call_are_its_own() -> None:
    model, other = build("bert"), build("bert")
    seen = []

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        with pytest.raises(InputError, match="outside the vocabulary"):
            record(other, ids + 1_000, mask)
        seen.append(record(other, ids, mask).fits)
        return model(ids, mask).logits

    scores = GlobEnc(forward, encoder=model.bert).attribute(IDS, 1, (MASK,))
    assert torch.equal(scores, GlobEnc(model).attribute(IDS, 1, MASK))
    assert seen[0]
    assert all(fit.is_within_tolerance for fit in seen[0])


def test_an_error_of_the_closure_keeps_its_type() -> None:
    model = build("bert")

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        model(ids, mask)
        raise KeyError("mine")

    globenc = GlobEnc(forward, encoder=model)
    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            globenc.attribute(IDS, 1, (MASK,))
