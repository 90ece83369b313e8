"""The twins of AttnLRP and DecompX themselves: their sums, and cases by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.networks import (
    CASES,
    FeedForward,
    Layer,
    Map,
    Network,
    Norm,
    error,
    example,
    logits,
)
from tests.oracle_attnlrp import Tape, Value, explain
from tests.oracle_decompx import RULES, decompose, spread

LIMIT = 1e-10


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def vector(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64)


def case(name: str) -> tuple[Network, Tensor]:
    """A network, and the logits of the model that it was read from."""
    model, inputs = CASES[name].build(), example(name)
    return CASES[name].network(model, inputs), logits(name, model, inputs)


@pytest.mark.parametrize("attention", ["attnlrp", "cp"])
@pytest.mark.parametrize("name", CASES)
def test_relevance_and_what_is_absorbed_sum_to_the_models_output(
    name: str, attention: str
) -> None:
    network, expected = case(name)
    for target in range(2):
        found = explain(network, target, attention)
        assert error(found.logits, expected) <= LIMIT
        whole = found.words.sum() + found.absorbed
        torch.testing.assert_close(whole, expected[target], rtol=LIMIT, atol=LIMIT)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CASES)
def test_parts_sum_to_the_models_output(name: str, rule: str) -> None:
    network, expected = case(name)
    found, relevance = decompose(network, rule)
    assert error(found, expected) <= LIMIT
    if rule != "none":
        # 1e-12 in the denominators is never spread.
        assert error(relevance.sum(0), expected) <= LIMIT


@pytest.mark.parametrize("name", CASES)
def test_both_agree_where_both_are_linear(name: str) -> None:
    """Without the biases of the first values, which a source token keeps in DecompX.

    Attention weights, deviations, slopes and gates are constants for both.
    """
    network, _ = case(name)
    first = network.layers[0]
    value = replace(first.value, bias=torch.zeros_like(first.value.bias))
    first = replace(first, value=value)
    if network.pre and first.norm1 is not None:
        beta = torch.zeros_like(first.norm1.beta)
        first = replace(first, norm1=replace(first.norm1, beta=beta))
    network = replace(network, layers=[first, *network.layers[1:]])
    _, relevance = decompose(network)
    for target in range(2):
        found = explain(network, target, "cp").block.sum(-1)
        assert error(relevance[:, target], found) <= LIMIT


def test_rules_spread_a_bias_by_hand() -> None:
    """Vectors (1, 0), (3, -1) and (0, 0) take a bias (1, 1)."""
    parts, bias = matrix([1.0, 0.0], [3.0, -1.0], [0.0, 0.0])[None], vector(1.0, 1.0)
    by_hand = {
        "none": (0.0, 0.0, 0.0),
        "absdot": (1 / 3, 2 / 3, 0.0),
        # Cosines 1/√2 and 2/√20.
        "abssim": (math.sqrt(5) / (math.sqrt(5) + math.sqrt(2)), None, 0.0),
        "norm": (1 / (1 + math.sqrt(10)), None, 0.0),
        "equal": (0.5, 0.5, 0.0),
        "cls": (1.0, 0.0, 0.0),
    }
    assert tuple(by_hand) == RULES
    for rule, (first, second, third) in by_hand.items():
        shares = vector(first, 1 - first if second is None else second, third)
        expected = parts[0] + shares[:, None] * bias
        torch.testing.assert_close(spread(parts, bias, rule)[0], expected)
    nothing = torch.zeros(1, 2, 2, dtype=torch.float64)
    for rule in RULES[:-1]:
        assert not spread(nothing, bias, rule).any()


def even_layer(value_bias: Tensor) -> Layer:
    """Two tokens of size 2 that share attention evenly, and one ReLU unit."""
    zero, same = matrix([0.0, 0.0], [0.0, 0.0]), matrix([1.0, 0.0], [0.0, 1.0])
    norm = Norm(vector(1.0, 1.0), vector(0.0, 0.0), 0.0, True)
    return Layer(
        heads=1,
        query=Map(zero, vector(0.0, 0.0)),
        key=Map(same, vector(0.0, 0.0)),
        value=Map(same, value_bias),
        output=Map(same, vector(0.0, 0.0)),
        norm1=norm,
        norm2=norm,
        feed_forward=FeedForward(
            Map(matrix([1.0, 0.0]), vector(0.0)),
            Map(matrix([1.0], [0.0]), vector(0.0, 0.0)),
            "relu",
        ),
        scale=1.0,
        constant=torch.zeros(1, 2, 2, dtype=torch.float64),
        seen=torch.ones(2, 2, dtype=torch.bool),
    )


def test_decompx_on_two_tokens_by_hand() -> None:
    """One layer on (1, -1) and (2, 0), the first token's first entry + 1 as the output.

    Values with their bias (1, 0) are (2, -1) and (3, 0), and half of each is mixed in:
    the parts (1, -1) + (1, -0.5) = (2, -1.5) and (1.5, 0). Their sum (3.5, -1.5) has
    the mean 1 and the deviation 2.5, so the norm gives (0.7, -0.7) and (0.3, -0.3), and
    in sum (1, -1). The unit is alive and adds (0.7, 0) and (0.3, 0): (1.4, -0.7) and
    (0.6, -0.3), in sum (2, -1), whose deviation is 1.5. The norm gives (0.7, -0.7) and
    (0.3, -0.3) again.
    """
    network = Network(
        words=matrix([1.0, -1.0], [2.0, 0.0]),
        offset=torch.zeros(2, 2, dtype=torch.float64),
        norm=None,
        pre=False,
        layers=[even_layer(vector(1.0, 0.0))],
        final=None,
        reads=vector(1.0, 0.0),
        head=[Map(matrix([1.0, 0.0]), vector(1.0))],
    )
    by_hand = {
        "none": (0.7, 0.3),
        "absdot": (1.4, 0.6),
        "abssim": (1.2, 0.8),
        "norm": (1.4, 0.6),
        "equal": (1.2, 0.8),
        "cls": (1.7, 0.3),
    }
    for rule, expected in by_hand.items():
        output, relevance = decompose(network, rule)
        torch.testing.assert_close(output, vector(2.0))
        torch.testing.assert_close(relevance[:, 0], vector(*expected))


def test_attnlrp_on_two_tokens_by_hand() -> None:
    """Attention of size 1 on x = (1, 2): q = 1, k = x ln 2, v = 3 x, read at token 0.

    Exponentials 2 and 4 are weights 1/3 and 2/3; of 1 + 4 = 5 half goes to each factor:
    1/2 and 2 to the values, and as much to the weights. The softmax gives the logits
    ln 2 (1/2 - 5/6) = -ln 2 / 3 and 2 ln 2 (2 - 5/3) = 2 ln 2 / 3. Half of it is the
    keys', -ln 2 / 6 and ln 2 / 3; the other half ln 2 / 6 is the query's, a bias.
    """
    two = math.log(2)
    layer = replace(
        even_layer(vector(0.0)),
        query=Map(matrix([0.0]), vector(1.0)),
        key=Map(matrix([two]), vector(0.0)),
        value=Map(matrix([3.0]), vector(0.0)),
        output=Map(matrix([1.0]), vector(0.0)),
    )
    for share, by_hand in (
        (0.5, vector(0.5 - two / 6, 2 + two / 3)),
        (1.0, vector(1.0, 4.0)),
    ):
        tape, x = Tape(), Value(matrix([1.0], [2.0]))
        output = tape.attention(x, layer, share)
        torch.testing.assert_close(output.value, matrix([5.0], [5.0]))
        output.receive(matrix([5.0], [0.0]), matrix([1.0], [0.0]))
        tape.run_back()
        torch.testing.assert_close(x.relevance[:, 0], by_hand)
        torch.testing.assert_close(x.relevance.sum() + tape.absorbed, vector(5.0)[0])


def test_a_gated_product_by_hand() -> None:
    """Up 2 x = 4 times a dead ReLU, and times one that gives 3 of x + 1 at x = 2."""
    for gate_bias, share, by_hand in (
        (-9.0, 0.5, 0.0),
        # 12 = 3 × 4: half to up, and of the gate's half the bias has one part in three.
        (1.0, 0.5, 6.0 + 4.0),
        (1.0, 1.0, 12.0),
    ):
        described = FeedForward(
            Map(matrix([2.0]), vector(0.0)),
            Map(matrix([1.0]), vector(0.0)),
            "relu",
            Map(matrix([1.0]), vector(gate_bias)),
        )
        tape, x = Tape(), Value(matrix([2.0]))
        output = tape.feed_forward(x, described, share)
        output.receive(output.value, torch.ones_like(output.value))
        tape.run_back()
        torch.testing.assert_close(x.relevance, matrix([by_hand]))


@pytest.mark.parametrize(
    ("name", "slope"),
    [("gelu", 0.5), ("gelu_new", 0.5), ("silu", 0.5), ("relu", 0.0), ("tanh", 1.0)],
)
def test_at_an_activation_of_zero_the_limit_goes_on(name: str, slope: float) -> None:
    """u = a - b at a = b = 3, and y = 2 f(u): a and b take ± 3 × 2 × the slope."""
    tape, x = Tape(), Value(matrix([3.0, 3.0]))
    u = tape.map(x, Map(matrix([1.0, -1.0]), vector(0.0)))
    y = tape.map(tape.activation(u, name), Map(matrix([2.0]), vector(0.0)))
    y.receive(y.value, torch.ones_like(y.value))
    tape.run_back()
    torch.testing.assert_close(x.relevance, matrix([6 * slope, -6 * slope]))


def test_a_saturated_tanh_hands_all_of_it_on() -> None:
    tape, x = Tape(), Value(matrix([30.0, 20.0]))
    z = tape.activation(tape.map(x, Map(matrix([1.0, 1.0]), vector(0.0))), "tanh")
    assert z.value.item() == 1
    z.receive(matrix([1.0]), matrix([1.0]))
    tape.run_back()
    torch.testing.assert_close(x.relevance, matrix([0.6, 0.4]))


def test_a_receiver_that_sees_nothing_gives_nothing() -> None:
    seen = torch.tensor([[True, True], [False, False]])
    layer = replace(even_layer(vector(1.0, 0.0)), seen=seen)
    tape, x = Tape(), Value(matrix([1.0, -1.0], [2.0, 0.0]))
    output = tape.attention(x, layer, 0.5)
    assert not output.value[1].any()
    output.receive(matrix([0.0, 0.0], [0.0, 0.0]), matrix([0.0, 0.0], [1.0, 1.0]))
    tape.run_back()
    assert not x.relevance.any()
