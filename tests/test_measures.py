"""The measures against slow literal twins and cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("pandas")

from captum_globenc import InputError
from captum_globenc.evaluation import (
    aopc,
    comprehensiveness,
    leave_one_out_tau,
    log_odds,
    probability_drop,
    rank_correlation,
    sufficiency,
)
from captum_globenc.evaluation.perturbation import (
    ERASED_FRACTIONS,
    MASKED_FRACTIONS,
    Texts,
    masked,
    removed,
    strongest,
)

MASK_ID, PAD_ID, CLS, SEP = 99, 0, 101, 102


def ranks(values: list[float]) -> list[float]:
    """Mean ranks by counting."""
    return [
        sum(other < value for other in values)
        + (sum(other == value for other in values) + 1) / 2
        for value in values
    ]


def spearman(a: list[float], b: list[float]) -> float:
    a, b = ranks(a), ranks(b)
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b))
    spread_a = sum((x - mean_a) ** 2 for x in a)
    spread_b = sum((y - mean_b) ** 2 for y in b)
    return covariance / math.sqrt(spread_a * spread_b)


def kendall(a: list[float], b: list[float]) -> float:
    """tau-b: pairs that agree minus pairs that do not, over those that are no tie."""
    agree = tied_a = tied_b = pairs = 0
    for i in range(len(a)):
        for j in range(i):
            pairs += 1
            tied_a += a[i] == a[j]
            tied_b += b[i] == b[j]
            product = (a[i] - a[j]) * (b[i] - b[j])
            agree += (product > 0) - (product < 0)
    return agree / math.sqrt((pairs - tied_a) * (pairs - tied_b))


@pytest.mark.parametrize(
    ("measure", "literal"), [(rank_correlation, spearman), (leave_one_out_tau, kendall)]
)
def test_rank_statistics(measure, literal) -> None:
    # Few different values: ties in most rows; negative ones, too.
    left = torch.randint(-3, 3, (12, 9)) / 2
    right = torch.randint(-2, 4, (12, 9)).double()
    mask = torch.rand(12, 9) < 0.8
    mask[:, :3] = True
    left[:, :2] = torch.tensor([0.0, 7.0])
    right[:, :2] = torch.tensor([1.0, -5.0])
    found = measure(left, right, mask)
    assert found.shape == (12,)
    assert found.dtype == torch.float64
    for row in range(12):
        a, b = left[row][mask[row]].tolist(), right[row][mask[row]].tolist()
        assert float(found[row]) == pytest.approx(literal(a, b), abs=1e-12)


def test_rank_statistics_by_hand() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 1.0, 2.0]])
    reference = torch.tensor([[10.0, 20.0, 30.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    found = rank_correlation(scores, reference)
    assert found.tolist() == pytest.approx([1, -1, math.sqrt(3) / 2])
    tau = leave_one_out_tau(scores, reference)
    assert tau.tolist() == pytest.approx([1, -1, 2 / math.sqrt(6)])


@pytest.mark.parametrize("measure", [rank_correlation, leave_one_out_tau])
def test_what_is_undefined_is_nan(measure) -> None:
    scores = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    reference = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [0, 1, 0]])
    assert measure(scores, reference, mask).isnan().all()
    # What is masked may hold anything.
    other = scores.masked_fill(mask == 0, math.nan)
    assert measure(other, reference, mask).isnan().all()


def test_padding_does_not_count() -> None:
    scores, reference = torch.rand(1, 5), torch.rand(1, 5)
    wide = torch.nn.functional.pad(scores, (0, 2)), torch.rand(1, 7)
    wide[1][:, :5] = reference
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    assert rank_correlation(*wide, mask) == rank_correlation(scores, reference)


def test_wrong_shapes() -> None:
    with pytest.raises(InputError, match=r"got \(2, 3\) and \(2, 4\)"):
        rank_correlation(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(InputError, match=r"mask has shape \(3,\)"):
        leave_one_out_tau(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3))
    with pytest.raises(InputError, match=r"got \(2,\) and \(3, 9\)"):
        aopc(torch.ones(2), torch.ones(3, 9))


def test_probability_measures() -> None:
    full, perturbed = torch.rand(4), torch.rand(4, 9)
    for measure in (aopc, comprehensiveness, sufficiency):
        for row in range(4):
            total = sum(float(full[row]) - float(p) for p in perturbed[row])
            assert float(measure(full, perturbed)[row]) == pytest.approx(total / 9)
    curve = probability_drop(full, perturbed)
    assert curve.shape == (4, 9)
    assert curve[2, 3] == pytest.approx(float(full[2]) - float(perturbed[2, 3]))
    found = log_odds(full.log(), perturbed.log())
    for row in range(4):
        total = sum(math.log(p) - math.log(full[row]) for p in perturbed[row].tolist())
        assert float(found[row]) == pytest.approx(total / 9, rel=1e-5)


def test_probability_measures_by_hand() -> None:
    full = torch.tensor([1.0, 0.5])
    perturbed = torch.tensor([[1.0, 0.5], [0.75, 0.5]])
    assert aopc(full, perturbed).tolist() == [0.25, -0.125]
    # Certain to begin with, and hopeless after: finite on log-probabilities.
    logs = log_odds(torch.tensor([0.0]), torch.tensor([[-1000.0, 0.0]]))
    assert logs.tolist() == [-500]


# The perturbed texts


def texts(*rows: list[int]) -> Texts:
    """Ids between [CLS] and [SEP], padded."""
    width = max(map(len, rows)) + 2
    ids = torch.full((len(rows), width), PAD_ID)
    special = torch.ones(len(rows), width)
    for at, row in enumerate(rows):
        ids[at, : len(row) + 2] = torch.tensor([CLS, *row, SEP])
        special[at, 1 : len(row) + 1] = 0
    mask = (ids != PAD_ID).long()
    return Texts.of(
        {"input_ids": ids, "attention_mask": mask, "special_tokens_mask": special}
    )


def literal_strongest(scores, candidates, fraction, round_up) -> set[int]:
    """By repeatedly taking the first of the largest."""
    left = [t for t in range(len(scores)) if candidates[t]]
    exact = round(len(left) * fraction, 9)
    count = math.ceil(exact) if round_up else math.floor(exact)
    chosen = set()
    for _ in range(count):
        best = left[0]
        for token in left:
            if scores[token] > scores[best]:
                best = token
        chosen.add(best)
        left.remove(best)
    return chosen


@pytest.mark.parametrize("round_up", [False, True])
def test_strongest(round_up: bool) -> None:
    batch = texts([1, 2, 3, 4, 5, 6, 7], [1, 2, 3], [1], [1] * 10)
    # Ties and negative scores; special tokens and padding have the largest.
    scores = torch.randint(-2, 2, batch.input_ids.shape).double()
    scores[~batch.candidates] = 10
    fractions = (*MASKED_FRACTIONS, *ERASED_FRACTIONS)
    found = strongest(scores, batch.candidates, fractions, round_up=round_up)
    assert found.shape == (4, len(fractions), 12)
    for row in range(4):
        for at, fraction in enumerate(fractions):
            expected = literal_strongest(
                scores[row].tolist(), batch.candidates[row], fraction, round_up
            )
            assert set(found[row, at].nonzero().flatten().tolist()) == expected


def test_one_token_is_never_masked_but_can_be_erased() -> None:
    batch = texts([7])
    scores = torch.ones(1, 3)
    assert not strongest(scores, batch.candidates, MASKED_FRACTIONS).any()
    erased = strongest(scores, batch.candidates, ERASED_FRACTIONS, round_up=True)
    assert erased[0].tolist() == [[False, True, False]] * 5


def test_whole_numbers_of_tokens_are_not_lost_to_rounding() -> None:
    """0.7 of 10 is 7, and 0.29 of 100 is 29, whatever floating point says."""
    batch = texts([1] * 10)
    counts = strongest(torch.rand(1, 12), batch.candidates, MASKED_FRACTIONS).sum(-1)
    assert counts[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    batch = texts([1] * 100)
    up = strongest(torch.rand(1, 102), batch.candidates, (0.29, 0.07), round_up=True)
    assert up.sum(-1)[0].tolist() == [29, 7]


def test_masked_and_removed() -> None:
    batch = texts([11, 12, 13], [21])
    chosen = torch.zeros(2, 2, 5, dtype=torch.bool)
    chosen[0, 0, 2] = chosen[0, 1, 1] = chosen[0, 1, 3] = chosen[1, 1, 1] = True
    hidden = masked(batch, chosen, MASK_ID)
    assert hidden.input_ids.tolist() == [
        [CLS, 11, MASK_ID, 13, SEP],
        [CLS, MASK_ID, 12, MASK_ID, SEP],
        [CLS, 21, SEP, PAD_ID, PAD_ID],
        [CLS, MASK_ID, SEP, PAD_ID, PAD_ID],
    ]
    assert torch.equal(
        hidden.attention_mask, batch.attention_mask.repeat_interleave(2, 0)
    )
    short = removed(batch, chosen)
    kept = [
        [i for i, m in zip(ids, mask) if m]
        for ids, mask in zip(short.input_ids.tolist(), short.attention_mask.tolist())
    ]
    assert kept == [[CLS, 11, 13, SEP], [CLS, 12, SEP], [CLS, 21, SEP], [CLS, SEP]]
    # Padding only at the end.
    assert (short.attention_mask.diff() <= 0).all()
    assert short.candidates.sum(-1).tolist() == [2, 1, 1, 0]
    assert short.trimmed().input_ids.shape == (4, 4)
    assert batch.input_ids.tolist()[0] == [CLS, 11, 12, 13, SEP]


def test_token_types_go_with_their_tokens() -> None:
    batch = texts([11, 12, 13])
    inputs = {**batch.inputs, "token_type_ids": torch.tensor([[0, 0, 1, 1, 1]])}
    pair = Texts(inputs, batch.candidates)
    chosen = torch.zeros(1, 1, 5, dtype=torch.bool)
    chosen[0, 0, 1] = True
    assert removed(pair, chosen).types[0].tolist() == [[0, 1, 1, 1, 0]]
