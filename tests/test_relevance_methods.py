"""AttnLRP, DecompX and their layer variants as methods of Captum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers as t
from captum.attr import (
    Attribution,
    IntegratedGradients,
    LayerAttribution,
    LayerIntegratedGradients,
    NoiseTunnel,
    Saliency,
)
from captum.metrics import infidelity, sensitivity_max
from captum.testing.attr.helpers.gen_test_utils import (
    get_target_layer,
    parse_test_config,
)
from captum.testing.attr.helpers.test_config import config as captum_config
from torch import Tensor, nn

from captum_globenc import AttnLRP, DecompX, LayerAttnLRP, LayerDecompX
from captum_globenc.errors import InputError, UnsupportedModelError
from tests.conftest import left_behind
from tests.models import (
    FAMILIES,
    PAD,
    SIZES,
    build,
    encoder_of,
    padded,
    randomize,
    sentence,
)

METHODS = (AttnLRP, DecompX)
PAIRS = ((AttnLRP, LayerAttnLRP), (DecompX, LayerDecompX))
EXACT = {"rtol": 1e-10, "atol": 1e-12}
CAPTUM = {"rtol": 1e-6, "atol": 1e-7}  # Its points are in float32.
LENGTHS = (8, 5, 7, 3)
IDS, MASK = padded([sentence(n, seed=n) for n in LENGTHS])


class Logits(nn.Module):
    """As Captum wants a model: a tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.model(ids, attention_mask=mask).logits


CLASSES = Logits(build("bert"))
TOKENS = Logits(build("bert", head=t.BertForTokenClassification))
TABLE = CLASSES.model.get_input_embeddings()
VECTORS = TABLE(IDS).detach()


def on_vectors(vectors: Tensor, mask: Tensor | None = None) -> Tensor:
    return CLASSES.model(inputs_embeds=vectors, attention_mask=mask).logits


def plain(model: Callable[..., Tensor], *args: object) -> Tensor:
    with torch.no_grad():
        return model(*args)


def total(part: Tensor) -> Tensor:
    """The sum of each example."""
    return part.flatten(1).sum(1)


# Captum's batteries

TARGETS = [
    ("single", CLASSES, 1),
    ("negative", CLASSES, -1),
    ("tensor", CLASSES, torch.tensor([2])),
    ("scalar_tensor", CLASSES, torch.tensor(2)),
    ("list", CLASSES, [0, 1, 1, 2]),
    ("tensor_of_each", CLASSES, torch.tensor([2, 1, 0, 0])),
    ("tuple", CLASSES, (2,)),
    ("tuples", CLASSES, [(0,), (1,), (2,), (0,)]),
    ("token", TOKENS, (1, 2)),
    ("tokens", TOKENS, [(0, 1), (4, 0), (2, 2), (1, 1)]),
]
CONFIG = [
    {
        "name": f"{kind.__name__}_{name}",
        "algorithms": [kind],
        "model": model,
        "attribute_args": {
            "inputs": IDS,
            "additional_forward_args": (MASK,),
            "target": target,
        },
    }
    for kind in METHODS
    for name, model, target in TARGETS
]
CONFIG += [
    {
        "name": f"{kind.__name__}_{name}_{layer}",
        "algorithms": [kind],
        "model": model,
        "layer": layer,
        "attribute_args": {
            "inputs": IDS,
            "additional_forward_args": (MASK,),
            "target": target,
        },
    }
    for _, kind in PAIRS
    for name, model, target in (TARGETS[0], TARGETS[4], TARGETS[9])
    for layer in (
        "model.bert.embeddings",
        "model.bert.encoder.layer.1",
        ["model.bert.embeddings.word_embeddings", "model.bert.encoder.layer.2"],
    )
]


def configured(entry: dict) -> tuple[Attribution, nn.Module, dict]:
    algorithms, model, args, layer, *_ = parse_test_config(entry)
    if layer is None:
        return algorithms[0](model), model, args
    return algorithms[0](model, get_target_layer(model, layer)), model, args


def test_the_entries_have_the_form_of_captums() -> None:
    of_a_layer = next(e for e in captum_config if isinstance(e.get("layer"), str))
    for entry in CONFIG:
        captums = of_a_layer if "layer" in entry else captum_config[0]
        assert captums.keys() - {"layer"} <= entry.keys()
        for key in ("name", "algorithms"):
            assert isinstance(entry[key], type(captums[key]))


@pytest.mark.parametrize("entry", CONFIG, ids=lambda entry: entry["name"])
def test_targets(entry: dict) -> None:
    """Row i of a batch is what example i gives by itself; no hook is left."""
    method, model, args = configured(entry)
    attributions = method.attribute(**args)
    assert not left_behind(model)
    target = args["target"]
    for row in range(len(IDS)):
        several = isinstance(target, list) or (
            isinstance(target, Tensor) and target.numel() > 1
        )
        single = target[row] if several else target
        single = single.item() if isinstance(single, Tensor) else single
        alone = method.attribute(IDS[row : row + 1], single, (MASK[row : row + 1],))
        if isinstance(attributions, Tensor):
            torch.testing.assert_close(attributions[row], alone[0], **EXACT)
        else:
            for part, own in zip(attributions, alone, strict=True):
                torch.testing.assert_close(part[row], own[0], **EXACT)
    with pytest.raises(AssertionError):
        method.attribute(**{**args, "target": (9999,) * 20})
    assert not left_behind(model)


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ([0, 1], AssertionError),
        (torch.tensor([0, 1, 2]), AssertionError),
        ((0, 1, 2), AssertionError),
        (torch.tensor([0.5]), AssertionError),
        ("positive", AssertionError),
        (0.5, AssertionError),
        (None, AssertionError),
        (3, IndexError),
        (-4, IndexError),
        ([0, 1, 2, 3], RuntimeError),
    ],
    ids=str,
)
def test_illegal_targets_fail_as_in_captum(target: object, error: type) -> None:
    if not (target is None or isinstance(target, float)):
        with pytest.raises(error):
            Saliency(on_vectors).attribute(
                VECTORS.requires_grad_(), target, additional_forward_args=MASK
            )
        VECTORS.requires_grad_(False)
    for method, layered in PAIRS:
        with pytest.raises(error):
            method(CLASSES).attribute(IDS, target, MASK)
        with pytest.raises(error):
            layered(CLASSES, CLASSES.model.bert.pooler).attribute(IDS, target, MASK)
    assert not left_behind(CLASSES)


def test_an_output_of_several_numbers_needs_a_target() -> None:
    for method in METHODS:
        with pytest.raises(
            AssertionError, match=r"target is needed .* got target None"
        ):
            method(CLASSES).attribute(IDS, None, MASK)
        with pytest.raises(AssertionError, match=r"target is needed .*\(4, 8, 3\)"):
            method(TOKENS).attribute(IDS, 1, MASK)
        one = method(lambda ids, mask: CLASSES(ids, mask)[:, 1])
        expected = method(CLASSES).attribute(IDS, 1, MASK)
        torch.testing.assert_close(one.attribute(IDS, None, MASK), expected, **EXACT)


def test_the_classes() -> None:
    for method, layered in PAIRS:
        for made in (method(CLASSES), layered(CLASSES, CLASSES.model.bert.pooler)):
            assert isinstance(made, Attribution)
            assert made.get_name()
            assert made.has_convergence_delta()
            assert callable(made.attribute.__wrapped__)
        assert isinstance(made, LayerAttribution)
        with pytest.raises(NotImplementedError, match="attribute_future"):
            method(CLASSES).attribute_future()
        for wrong in (None, 3, "model"):
            with pytest.raises(TypeError, match="must be a model or a function, got"):
                method(wrong)
            with pytest.raises(TypeError, match="must be a model or a function, got"):
                layered(wrong, CLASSES)
        for wrong in (None, "layer", [CLASSES, 1]):
            with pytest.raises(TypeError, match=r"layer must be an nn\.Module or a"):
                layered(CLASSES, wrong)
        with pytest.raises(InputError, match="at least one module"):
            layered(CLASSES, [])
        with pytest.raises(InputError, match="Did you mean 'block'"):
            method(CLASSES, place="blok")
    with pytest.raises(InputError, match="Did you mean 'attnlrp'"):
        AttnLRP(CLASSES, attention="attnlpr")
    with pytest.raises(InputError, match="unknown way to share biases 'all'"):
        DecompX(CLASSES, biases="all")


# What comes back


@pytest.mark.parametrize("method", METHODS)
def test_shapes_and_tuples(method) -> None:
    made = method(CLASSES)
    scores, delta = made.attribute(IDS, 1, MASK, True)
    assert scores.shape == IDS.shape
    assert delta.shape == (4,)
    assert scores.dtype == delta.dtype == torch.float64
    assert scores.is_contiguous()
    assert not scores.requires_grad
    assert (scores[MASK == 1] != 0).all()
    assert not scores[MASK == 0].any()
    assert (scores < 0).any()
    assert (scores > 0).any()
    (single,) = made.attribute((IDS,), 1, (MASK,))
    assert torch.equal(single, scores)
    parts, delta = made.attribute((IDS, MASK), 1, return_convergence_delta=True)
    assert torch.equal(parts[0], scores)
    assert parts[1].shape == MASK.shape
    assert not parts[1].any()
    torch.testing.assert_close(total(parts[0]) + delta, plain(CLASSES, IDS, MASK)[:, 1])
    labels = torch.zeros(4, dtype=torch.long)
    parts, delta = method(lambda ids, labels, mask: CLASSES(ids, mask)).attribute(
        (IDS, labels), 1, MASK, True
    )
    assert parts[1].shape == (4,)
    torch.testing.assert_close(total(parts[0]) + delta, plain(CLASSES, IDS, MASK)[:, 1])


@pytest.mark.parametrize("method", METHODS)
def test_embeddings(method) -> None:
    """Of their shape, and by token what ids give at the word embeddings."""
    found, delta = method(on_vectors).attribute(VECTORS, 1, MASK, True)
    assert found.shape == VECTORS.shape
    assert found.is_contiguous()
    scores, rest = method(CLASSES, place="word_embeddings").attribute(
        IDS, 1, MASK, True
    )
    torch.testing.assert_close(found.sum(-1), scores, **EXACT)
    torch.testing.assert_close(delta, rest, **EXACT)
    with pytest.raises(InputError, match="input ids must be integers"):
        method(CLASSES.model).attribute(VECTORS, 1, MASK)


@pytest.mark.parametrize("method", METHODS)
def test_several_tensors_of_numbers(method) -> None:
    """A linear model of two inputs: each has its own part."""
    weights = torch.arange(1.0, 7).view(3, 2).double()
    first, second = VECTORS[:, 0, :3], VECTORS[:, 1, :3]

    def forward(first: Tensor, second: Tensor, scale: float) -> Tensor:
        return (first - 2 * second) @ weights * scale + 5

    found, delta = method(forward).attribute(
        (first, second), 1, additional_forward_args=3.0, return_convergence_delta=True
    )
    torch.testing.assert_close(found[0], 3 * first * weights[:, 1], **EXACT)
    torch.testing.assert_close(found[1], -6 * second * weights[:, 1], **EXACT)
    torch.testing.assert_close(delta, torch.full((4,), 5.0).double(), **EXACT)


@pytest.mark.parametrize("method", METHODS)
def test_ids_beside_numbers(method) -> None:
    def forward(ids: Tensor, shift: Tensor, mask: Tensor) -> Tensor:
        return on_vectors(TABLE(ids) + shift, mask)

    shift = torch.randn_like(VECTORS)
    (scores, other), delta = method(forward, place="word_embeddings").attribute(
        (IDS, shift), 1, MASK, True
    )
    assert scores.shape == IDS.shape
    assert other.shape == shift.shape
    output = plain(forward, IDS, shift, MASK)[:, 1]
    torch.testing.assert_close(total(scores) + total(other) + delta, output, **EXACT)
    # Together they are what the model takes.
    whole = method(on_vectors).attribute(VECTORS + shift, 1, MASK)
    torch.testing.assert_close(scores + other.sum(-1), whole.sum(-1), **EXACT)
    with pytest.raises(InputError, match="for ids, or for tensors of numbers"):
        method(forward).attribute((IDS, shift), 1, MASK, baselines=(PAD, 0.0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", ["block", "word_embeddings"])
def test_the_delta_is_the_rest_of_the_output(place: str, method) -> None:
    made = method(CLASSES, place=place)
    for target in (0, 2, [0, 1, 2, 0]):
        scores, delta = made.attribute(IDS, target, MASK, True)
        chosen = torch.tensor(target).expand(4)
        output = plain(CLASSES, IDS, MASK).gather(1, chosen[:, None])[:, 0]
        torch.testing.assert_close(total(scores) + delta, output, **EXACT)
        assert torch.equal(made.compute_convergence_delta(scores, output), delta)
        again = made.compute_convergence_delta((scores, 0 * IDS), output)
        assert torch.equal(again, delta)


HEADS: dict[str, tuple[type[nn.Module], object]] = {
    "tokens": (t.BertForTokenClassification, (1, 2)),
    "a token of each": (t.BertForTokenClassification, [(0, 1), (4, 0), (2, 2), (1, 1)]),
    "masked word": (t.BertForMaskedLM, (2, 7)),
    "answer": (t.BertForQuestionAnswering, 2),
    "next sentence": (t.BertForNextSentencePrediction, 1),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("head", "target"), HEADS.values(), ids=HEADS)
def test_heads(head: type[nn.Module], target, method) -> None:
    """A raw model is taken, too: of an answer, the start."""
    model = build("bert", head=head)
    output = plain(model, IDS, MASK)
    output = output.start_logits if "start_logits" in output else output.logits
    each = target if isinstance(target, list) else [target] * len(IDS)
    chosen = torch.stack([row[index] for row, index in zip(output, each)])
    scores, delta = method(model).attribute(IDS, target, MASK, True)
    torch.testing.assert_close(total(scores) + delta, chosen, **EXACT)
    assert not scores[MASK == 0].any()


@pytest.mark.parametrize("method", METHODS)
def test_multiple_choice(method) -> None:
    """Ids of (batch, choices, tokens); each choice has a logit of its own."""
    model = build("bert", head=t.BertForMultipleChoice)
    ids = torch.stack([IDS, IDS.flip(0), IDS.roll(1, 0)])
    mask = torch.stack([MASK, MASK.flip(0), MASK.roll(1, 0)])
    for options in ({}, {"baselines": PAD, "n_steps": 2}):
        scores, delta = method(model).attribute(
            ids, 1, (mask,), return_convergence_delta=True, **options
        )
        assert scores.shape == ids.shape
        assert not scores[:, [0, 2, 3]].any()
        assert not scores[mask == 0].any()
        for row in range(3):
            alone, rest = method(model).attribute(
                ids[row : row + 1],
                1,
                (mask[row : row + 1],),
                return_convergence_delta=True,
                **options,
            )
            torch.testing.assert_close(scores[row], alone[0], **EXACT)
            torch.testing.assert_close(delta[row], rest[0], **EXACT)
    # As many examples as tokens are no other layout.
    square = torch.stack(
        [torch.stack([sentence(4, seed), sentence(4, seed + 9)]) for seed in range(4)]
    )
    together = method(model).attribute(square, 0, baselines=PAD, n_steps=2)
    for row in range(4):
        alone = method(model).attribute(
            square[row : row + 1], 0, baselines=PAD, n_steps=2
        )
        torch.testing.assert_close(together[row], alone[0], **EXACT)


@pytest.mark.parametrize("method", METHODS)
def test_images(method) -> None:
    torch.manual_seed(0)
    sizes = {k: SIZES[k] for k in ("hidden_size", "num_attention_heads", "num_labels")}
    config = t.ViTConfig(
        **sizes, num_hidden_layers=2, intermediate_size=36, image_size=8, patch_size=4
    )
    model = randomize(t.ViTForImageClassification(config)).double().eval()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    found, delta = method(model).attribute(images, 1, return_convergence_delta=True)
    assert found.shape == images.shape
    output = plain(model, images).logits[:, 1]
    torch.testing.assert_close(total(found) + delta, output, **EXACT)
    path, delta = method(model).attribute(
        images, 1, return_convergence_delta=True, baselines=0.0, n_steps=3
    )
    output = output - plain(model, 0 * images).logits[:, 1]
    torch.testing.assert_close(total(path) + delta, output, **EXACT)


class ReLUNetwork(nn.Module):
    """A convolution, norms with fixed statistics, and ReLUs, some in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(4 * 16, 12)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.out = nn.Linear(12, 3)

    def forward(self, images: Tensor) -> Tensor:
        states = nn.functional.relu(self.norm(self.convolution(images)), inplace=True)
        states = nn.functional.max_pool2d(states, 2).flatten(1)
        return self.out(self.hidden(states).relu_())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [2, 3, 40])
def test_where_gradients_are_slopes_it_is_integrated_gradients(
    steps: int, method
) -> None:
    """The slope of a ReLU through the origin is its gradient: Captum's own numbers."""
    model = ReLUNetwork().double().eval()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    start = 0.3 * torch.randn(1, 3, 8, 8, dtype=torch.float64)
    for baseline in (0.0, start):
        captums = IntegratedGradients(model).attribute(
            images, baseline, [0, 1, 2], n_steps=steps, method="riemann_middle"
        )
        found, delta = method(model).attribute(
            images,
            [0, 1, 2],
            return_convergence_delta=True,
            baselines=baseline,
            n_steps=steps,
        )
        torch.testing.assert_close(found, captums, **CAPTUM)
    change = plain(model, images) - plain(model, start)
    rest = change.diagonal() - total(captums)
    torch.testing.assert_close(delta, rest, **CAPTUM)


@pytest.mark.parametrize("method", METHODS)
def test_there_more_steps_are_more_complete(method) -> None:
    model = ReLUNetwork().double().eval()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    deltas = [
        method(model)
        .attribute(
            images,
            1,
            return_convergence_delta=True,
            baselines=0.0,
            n_steps=steps,
        )[1]
        .abs()
        .max()
        for steps in (1, 8, 64, 256)
    ]
    assert deltas == sorted(deltas, reverse=True)
    assert deltas[-1] < 0.01 * deltas[0]


def from_block(states: Tensor, mask: Tensor) -> Tensor:
    """The classifier, from the output of its embedding block on."""
    bert = CLASSES.model.bert
    hidden = torch.zeros(mask.shape, dtype=torch.float64)
    hidden = hidden.masked_fill(mask == 0, -torch.inf)[:, None, None]
    states = bert.encoder(states, hidden).last_hidden_state
    return CLASSES.model.classifier(bert.pooler(states))


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_path_by_a_loop_over_points(steps: int) -> None:
    """The mean of the slopes at midpoints, times the difference of its ends.

    The slope at a point is the relevance there, by entry, over the value.
    """
    block = CLASSES.model.bert.embeddings
    start = torch.where(MASK == 1, PAD, IDS)
    cases: list[tuple[dict, Tensor, Tensor, Callable]] = [
        ({"place": "word_embeddings"}, VECTORS, TABLE(start).detach(), on_vectors),
        (
            {"place": "block"},
            plain(block, IDS),
            plain(block, start),
            from_block,
        ),
    ]
    for method in (AttnLRP, DecompX):
        for options, end, begin, forward in cases:
            slopes = torch.zeros_like(end)
            for k in range(steps):
                point = begin + (k + 0.5) / steps * (end - begin)
                found = method(forward).attribute(point, 2, (MASK,))
                slopes += torch.where(point == 0, 0.0, found / point) / steps
            expected = (slopes * (end - begin)).sum(-1)
            scores, delta = method(CLASSES, **options).attribute(
                IDS, 2, MASK, True, baselines=start, n_steps=steps
            )
            torch.testing.assert_close(scores, expected, rtol=1e-8, atol=1e-10)
            change = plain(CLASSES, IDS, MASK) - plain(CLASSES, start, MASK)
            torch.testing.assert_close(delta, change[:, 2] - total(scores), **EXACT)
            if options["place"] == "word_embeddings":
                of_vectors = method(on_vectors).attribute(
                    VECTORS, 2, MASK, baselines=begin, n_steps=steps
                )
                torch.testing.assert_close(of_vectors.sum(-1), scores, **EXACT)


@pytest.mark.parametrize("method", METHODS)
def test_a_path_converges(method) -> None:
    """Not to the difference of the outputs: slopes are not gradients."""
    deltas = [
        method(CLASSES).attribute(IDS, 1, MASK, True, baselines=PAD, n_steps=steps)[1]
        for steps in (2, 32, 256)
    ]
    changes = [(deltas[i] - deltas[2]).abs().max() for i in (0, 1)]
    assert changes[1] < 0.1 * changes[0]
    assert deltas[2].abs().max() > 0.1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", ["block", "word_embeddings"])
def test_baselines(place: str, method) -> None:
    """A number, ids, and embeddings are ways to say the same."""
    made = method(CLASSES, place=place)
    options = {"target": 1, "additional_forward_args": (MASK,), "n_steps": 2}
    expected = made.attribute(IDS, baselines=PAD, **options)
    block = CLASSES.model.bert.embeddings if place == "block" else TABLE
    row = torch.full((IDS.shape[1],), PAD)
    for same in (
        torch.full_like(IDS, PAD),
        row,
        row[None],
        (PAD,),
        (row,),
        plain(block, row.expand_as(IDS)),
        plain(block, row[None]),
        plain(block, row[None])[0],
    ):
        found = made.attribute(IDS, baselines=same, **options)
        torch.testing.assert_close(found, expected, **EXACT)
    zero = made.attribute(IDS, baselines=torch.zeros(24), **options)
    assert not torch.allclose(zero, expected)
    # From the values themselves there is no way to go.
    assert not made.attribute(IDS, baselines=IDS, **options).any()
    # From zero, one step is half way.
    if place == "word_embeddings":
        half = method(on_vectors).attribute(VECTORS / 2, 1, MASK).sum(-1) * 2
        one = made.attribute(IDS, 1, MASK, baselines=torch.zeros(24), n_steps=1)
        torch.testing.assert_close(one, half, **EXACT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_steps": 2}, "n_steps=2 needs a baseline"),
        ({"n_steps": 0, "baselines": PAD}, "n_steps must be at least 1, got 0"),
        ({"n_steps": -3, "baselines": PAD}, "n_steps must be at least 1, got -3"),
        ({"n_steps": 1.5, "baselines": PAD}, "n_steps must be at least 1, got 1.5"),
        ({"n_steps": True, "baselines": PAD}, "n_steps must be at least 1, got True"),
        ({"baselines": 0.5}, "baseline of ids must be an id or a tensor, got 0.5"),
        ({"baselines": "pad"}, "must be a tensor or a number, got str: 'pad'"),
        ({"baselines": [PAD]}, r"must be a tensor or a number, got list: \[1\]"),
        ({"baselines": (PAD, PAD)}, "one baseline per input is expected, got 2 for 1"),
        (
            {"baselines": torch.ones(3, 8, dtype=torch.long)},
            r"a baseline of shape \(3, 8\) does not fit the input of shape \(4, 8\)",
        ),
        (
            {"baselines": torch.zeros(4, 8)},
            r"baseline of shape \(4, 8\) does not fit the input of shape \(4, 8, 24\)",
        ),
        ({"baselines": 5000}, "cannot look up the baseline 5000"),
        ({"internal_batch_size": 0}, "internal_batch_size must be at least 1, got 0"),
    ],
    ids=str,
)
def test_wrong_baselines_and_steps(options: dict, message: str) -> None:
    for method, layered in PAIRS:
        with pytest.raises(InputError, match=message):
            method(CLASSES).attribute(IDS, 1, MASK, **options)
        if "internal_batch_size" not in options:
            layer = layered(CLASSES, CLASSES.model.bert.embeddings)
            with pytest.raises(InputError, match=message):
                layer.attribute(IDS, 1, MASK, **options)
    assert not left_behind(CLASSES)


@pytest.mark.parametrize("method", METHODS)
def test_internal_batches(method) -> None:
    made = method(CLASSES)
    target = [0, 1, 2, 1]
    square, row = IDS[:, :4], torch.tensor([0, PAD, 7, PAD])
    for size in (1, 3, 4, 100):
        for options in ({}, {"baselines": PAD, "n_steps": 3}):
            expected = made.attribute(IDS, target, MASK, True, **options)
            found = made.attribute(
                IDS, target, MASK, True, internal_batch_size=size, **options
            )
            torch.testing.assert_close(found, expected, **EXACT)
        # As many tokens as examples: a row of ids is of tokens.
        for baselines in (row, torch.randn(4, 24), IDS[:, 4:]):
            options = {"baselines": baselines, "n_steps": 2}
            torch.testing.assert_close(
                made.attribute(square, target, internal_batch_size=size, **options),
                made.attribute(square, target, **options),
                **EXACT,
            )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"baselines": PAD, "n_steps": 3}], ids=str)
def test_examples_do_not_meet(options: dict, method) -> None:
    """Nor does padding have relevance, on either side and however much of it."""
    made = method(CLASSES)
    together, delta = made.attribute(
        IDS, 1, (MASK,), return_convergence_delta=True, **options
    )
    assert not together[MASK == 0].any()
    for row, length in enumerate(LENGTHS):
        alone, rest = made.attribute(
            IDS[row : row + 1, :length], 1, return_convergence_delta=True, **options
        )
        torch.testing.assert_close(together[row, :length], alone[0], **EXACT)
        torch.testing.assert_close(delta[row], rest[0], **EXACT)


# Layers


@pytest.mark.parametrize(("method", "layered"), PAIRS)
def test_layers_where_ids_have_their_relevance(method, layered) -> None:
    bert = CLASSES.model.bert
    for place, layer in (
        ("word_embeddings", bert.embeddings.word_embeddings),
        ("block", bert.embeddings),
    ):
        found, delta = layered(CLASSES, layer).attribute(
            IDS, 1, MASK, return_convergence_delta=True
        )
        assert found.shape == (*IDS.shape, 24)
        assert found.is_contiguous()
        scores, rest = method(CLASSES, place=place).attribute(IDS, 1, MASK, True)
        if method is DecompX and place == "block":
            # There, the biases of the first values are their tokens'.
            value = bert.encoder.layer[0].attention.self.value
            of_values = layered(CLASSES, value).attribute(IDS, 1, MASK)
            values = bert.encoder.layer[0].attention.self.value(plain(layer, IDS))
            own = (of_values / values * value.bias).sum(-1).detach()
            assert own.abs().max() > 0.01
            torch.testing.assert_close(scores, found.sum(-1) + own, **EXACT)
            torch.testing.assert_close(rest, delta - own.sum(-1), **EXACT)
        else:
            torch.testing.assert_close(scores, found.sum(-1), **EXACT)
            torch.testing.assert_close(rest, delta, **EXACT)


@pytest.mark.parametrize(("method", "layered"), PAIRS)
def test_every_layer_by_a_run_that_begins_there(method, layered) -> None:
    """A layer's relevance is that of its values as inputs of the rest."""
    bert = CLASSES.model.bert
    hidden = torch.zeros(MASK.shape).double().masked_fill(MASK == 0, -torch.inf)
    states = plain(bert.embeddings, IDS)
    for index, layer in enumerate(bert.encoder.layer):

        def rest(states: Tensor, index: int = index) -> Tensor:
            for layer in bert.encoder.layer[index:]:
                states = layer(states, hidden[:, None, None])
            return CLASSES.model.classifier(bert.pooler(states))

        expected, delta = method(rest).attribute(states, 1, None, True)
        at_input, after = layered(CLASSES, layer).attribute(
            IDS, 1, MASK, attribute_to_layer_input=True, return_convergence_delta=True
        )
        torch.testing.assert_close(at_input, expected, **EXACT)
        torch.testing.assert_close(after, delta, **EXACT)
        before = bert.encoder.layer[index - 1] if index else bert.embeddings
        at_output = layered(CLASSES, before).attribute(IDS, 1, MASK)
        torch.testing.assert_close(at_output, expected, **EXACT)
        states = plain(layer, states, hidden[:, None, None])


@pytest.mark.parametrize(("method", "layered"), PAIRS)
def test_the_head_by_hand(method, layered) -> None:
    """W pooled + b, and pooled = tanh(u)."""
    model = CLASSES.model
    weight, bias = model.classifier.weight.detach(), model.classifier.bias.detach()
    pooled: list[Tensor] = []
    hook = model.bert.pooler.register_forward_hook(lambda *a: pooled.append(a[2]))
    output = plain(CLASSES, IDS, MASK)
    hook.remove()
    of_pooled = weight[1] * pooled[0]
    for layer, is_input, expected in (
        (model.classifier, True, of_pooled),
        (model.bert.pooler, False, of_pooled),
        (model.dropout, False, of_pooled),
        (model.bert.pooler.activation, False, of_pooled),
        # tanh(u) is u times a constant: u has what it has.
        (model.bert.pooler.activation, True, of_pooled),
        (model.bert.pooler.dense, False, of_pooled),
    ):
        found, delta = layered(CLASSES, layer).attribute(
            IDS, 1, MASK, is_input, return_convergence_delta=True
        )
        torch.testing.assert_close(found, expected, **EXACT)
        torch.testing.assert_close(delta, bias[1].expand(4), **EXACT)
    at_logits = layered(CLASSES, model.classifier).attribute(IDS, 1, MASK)
    expected = torch.zeros(4, 3).double()
    expected[:, 1] = output[:, 1]
    torch.testing.assert_close(at_logits, expected, **EXACT)
    at_bert = layered(CLASSES, model.bert).attribute(IDS, 1, MASK)
    assert not at_bert[:, 1:].any()  # The head reads the first token.
    slope = pooled[0] / torch.atanh(pooled[0])
    states = at_bert[:, 0] / ((weight[1] * slope) @ model.bert.pooler.dense.weight)
    assert (states != 0).all()
    again = plain(model.classifier, plain(model.bert.pooler, states[:, None].detach()))
    torch.testing.assert_close(again, output, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("method", "layered"), PAIRS)
def test_lists_of_layers(method, layered) -> None:
    model = CLASSES.model
    layers = [model.bert.embeddings.LayerNorm, *model.bert.encoder.layer]
    parts, deltas = layered(CLASSES, layers).attribute(
        IDS, 1, MASK, return_convergence_delta=True
    )
    assert isinstance(parts, list)
    assert isinstance(deltas, list)
    assert isinstance(layered(CLASSES, layers[:1]).attribute(IDS, 1, MASK), list)
    output = plain(CLASSES, IDS, MASK)[:, 1]
    for layer, part, delta in zip(layers, parts, deltas, strict=True):
        alone, rest = layered(CLASSES, layer).attribute(
            IDS, 1, MASK, return_convergence_delta=True
        )
        torch.testing.assert_close(part, alone, **EXACT)
        torch.testing.assert_close(delta, rest, **EXACT)
        torch.testing.assert_close(total(part) + delta, output, **EXACT)
    with pytest.raises(InputError, match="goes through one layer, got 4"):
        layered(CLASSES, layers).attribute(IDS, 1, MASK, baselines=PAD)


@pytest.mark.parametrize(("method", "layered"), PAIRS)
def test_parts_of_the_embeddings(method, layered) -> None:
    """Word, position and type embeddings are what the sum of them is made of."""
    embeddings = CLASSES.model.bert.embeddings
    names = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    ids, row = IDS[:1], slice(0, 1)
    parts = [
        layered(CLASSES, getattr(embeddings, name)).attribute(ids, 1, MASK[row])
        for name in names
    ]
    whole = layered(CLASSES, embeddings.LayerNorm).attribute(
        ids, 1, MASK[row], attribute_to_layer_input=True
    )
    torch.testing.assert_close(sum(parts), whole, **EXACT)
    shared = layered(CLASSES, embeddings.position_embeddings)
    assert shared.attribute(IDS, 1, MASK).shape == (1, 8, 24)
    with pytest.raises(InputError, match="a part for each of 4 examples is expected"):
        shared.attribute(IDS, 1, MASK, return_convergence_delta=True)
    with pytest.raises(InputError, match="a part for each of 4 examples is expected"):
        shared.attribute(IDS, 1, MASK, baselines=PAD)


@pytest.mark.parametrize(("method", "layered"), PAIRS)
def test_paths_through_layers(method, layered) -> None:
    bert = CLASSES.model.bert
    options = {"baselines": PAD, "n_steps": 3, "return_convergence_delta": True}
    found, delta = layered(CLASSES, bert.embeddings).attribute(IDS, 1, MASK, **options)
    scores, rest = AttnLRP(
        CLASSES, attention="cp" if method is DecompX else "attnlrp"
    ).attribute(IDS, 1, MASK, **options)
    torch.testing.assert_close(found.sum(-1), scores, **EXACT)
    torch.testing.assert_close(delta, rest, **EXACT)
    layer = layered(CLASSES, bert.encoder.layer[1])
    change = plain(CLASSES, IDS, MASK) - plain(CLASSES, PAD + 0 * IDS, MASK)
    for is_input in (True, False):
        found, delta = layer.attribute(IDS, 1, MASK, is_input, **options)
        assert found.shape == (4, 8, 24)
        torch.testing.assert_close(total(found) + delta, change[:, 1], **EXACT)
    # Where slopes are gradients, it is Captum's.
    network = ReLUNetwork().double().eval()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    captums = LayerIntegratedGradients(network, network.convolution).attribute(
        images, 0.0, 1, n_steps=5, method="riemann_middle"
    )
    found = layered(network, network.convolution).attribute(
        images, 1, baselines=0.0, n_steps=5
    )
    torch.testing.assert_close(found, captums, **CAPTUM)


@pytest.mark.parametrize("layered", [LayerAttnLRP, LayerDecompX])
def test_layers_that_are_no_place(layered) -> None:
    model = build("albert")
    group = model.albert.encoder.albert_layer_groups[0]
    with pytest.raises(InputError, match="AlbertLayerGroup runs several times"):
        layered(model, group).attribute(IDS, 1, MASK)
    with pytest.raises(InputError, match="layer Linear did not run"):
        layered(CLASSES, nn.Linear(2, 2)).attribute(IDS, 1, MASK)
    with pytest.raises(InputError, match="pass its modules, as list"):
        layered(CLASSES, CLASSES.model.bert.encoder.layer).attribute(IDS, 1, MASK)
    table = CLASSES.model.bert.embeddings.word_embeddings
    with pytest.raises(InputError, match="Embedding has no tensor of numbers that"):
        layered(CLASSES, table).attribute(IDS, 1, MASK, attribute_to_layer_input=True)
    assert not left_behind(CLASSES)
    assert not left_behind(model)


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5


@pytest.mark.parametrize("layered", [LayerAttnLRP, LayerDecompX])
def test_a_layer_in_front_of_an_activation(layered) -> None:
    """The activation is of the layer's values, and not of what they are made of."""
    layer = Scaled()
    x = torch.randn(2, 3, 4, dtype=torch.float64)

    def forward(x: Tensor) -> Tensor:
        return torch.tanh(layer(x) * 3).sum((1, 2))

    for is_input in (False, True):
        found, delta = layered(forward, layer).attribute(
            x, attribute_to_layer_input=is_input, return_convergence_delta=True
        )
        torch.testing.assert_close(found, torch.tanh(1.5 * x), **EXACT)
        assert delta.abs().max() < 1e-12


@pytest.mark.parametrize("layered", [LayerAttnLRP, LayerDecompX])
def test_layers_with_tokens_first(layered) -> None:
    """Deltas are of examples in any layout, of several and of one."""
    torch.manual_seed(0)
    first = nn.TransformerEncoderLayer(24, 4, 36, batch_first=True).double().eval()
    other = nn.TransformerEncoderLayer(24, 4, 36).double().eval()
    other.load_state_dict(first.state_dict())
    for states in (VECTORS, VECTORS[:1], VECTORS[:, :4]):
        found = layered(lambda x: first(x)[:, 0], first.norm1).attribute(
            states, 1, return_convergence_delta=True
        )
        turned = layered(lambda x: other(x.transpose(0, 1))[0], other.norm1).attribute(
            states, 1, return_convergence_delta=True
        )
        torch.testing.assert_close(turned[0].transpose(0, 1), found[0], **EXACT)
        if len(states) != states.shape[1]:
            torch.testing.assert_close(turned[1], found[1], **EXACT)


# Decoders and other families


def language_model(kind: str, **options: object) -> nn.Module | None:
    """A tiny model that predicts tokens; None: this release has no such one."""
    head = getattr(t, f"{kind}ForCausalLM", None) or getattr(
        t, f"{kind}LMHeadModel", None
    )
    config = getattr(t, f"{kind}TextConfig", None) or getattr(t, f"{kind}Config", None)
    if head is None or config is None:
        return None
    sizes = {
        k: v for k, v in SIZES.items() if k not in ("type_vocab_size", "num_labels")
    }
    torch.manual_seed(0)
    return randomize(head(config(**{**sizes, **options}))).double().eval()


GQA = {"num_key_value_heads": 2}
GEMMA = {**GQA, "head_dim": 6, "query_pre_attn_scalar": 6}
DECODERS: dict[str, dict] = {
    "GPT2": {
        "n_embd": 24,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": 36,
        "n_positions": 40,
    },
    "Llama": GQA,
    "Mistral": {**GQA, "sliding_window": 3},
    "Qwen2": GQA,
    "Qwen3": {**GQA, "head_dim": 6},
    "Gemma": {**GQA, "head_dim": 6},
    "Gemma2": GEMMA,
    "Gemma3": GEMMA,
    "Phi3": GQA,
    "GPTNeoX": {},
    "Bloom": {"n_layer": 3, "n_head": 4},
    "OPT": {"ffn_dim": 36, "word_embed_proj_dim": 24},
    "Olmo2": GQA,
    "Cohere": GQA,
}


@pytest.mark.parametrize("kind", DECODERS)
def test_decoders(kind: str) -> None:
    """The logit of a next token; tokens behind its position have exactly nothing."""
    model = language_model(kind, **DECODERS[kind])
    if model is None:
        pytest.skip(f"this release of transformers has no {kind}")
    ids = torch.stack([sentence(7, seed=1), sentence(7, seed=2)])
    target = [(3, 11), (5, 12)]
    output = plain(model, ids).logits
    chosen = torch.stack([row[index] for row, index in zip(output, target)])
    for method in METHODS:
        for place in ("block", "word_embeddings"):
            made = method(model, place=place)
            scores, delta = made.attribute(ids, target, None, True)
            torch.testing.assert_close(
                total(scores) + delta, chosen, rtol=1e-6, atol=1e-6
            )
            assert scores[0, :4].all() or kind == "Mistral"
            assert not scores[0, 4:].any()
            assert not scores[1, 6:].any()
            alone = made.attribute(ids[:1, :5], (3, 11))
            torch.testing.assert_close(scores[:1, :5], alone, rtol=1e-5, atol=1e-6)
        path = method(model).attribute(ids, target, baselines=PAD, n_steps=2)
        assert path[0, :4].any()
        assert not path[0, 4:].any()
    if kind in ("Llama", "Mistral", "Qwen3", "Gemma", "Olmo2"):
        # Without biases there is nothing that tokens could not have.
        scores, delta = DecompX(model).attribute(ids, target, None, True)
        assert delta.abs().max() < 1e-6 * scores.abs().max()
        layers = list(model.model.layers)
        parts = LayerDecompX(model, layers).attribute(ids, target)
        for part in parts:
            torch.testing.assert_close(total(part), chosen, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_encoders_with_decoders(kind: str, method) -> None:
    """The encoder's tokens are explained; what the decoder has read is a constant."""
    common = {
        "vocab_size": 97,
        "d_model": 24,
        "pad_token_id": PAD,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    }
    if kind == "bart":
        sizes = {
            f"{side}_{name}": size
            for side in ("encoder", "decoder")
            for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 36))
        }
        config = t.BartConfig(**common, **sizes, max_position_embeddings=40)
        model = t.BartForConditionalGeneration(config)
    else:
        config = t.T5Config(**common, d_kv=6, d_ff=36, num_layers=2, num_heads=4)
        model = t.T5ForConditionalGeneration(config)
    model = randomize(model).double().eval()
    prefix = torch.tensor([[2, 5, 6]]).expand(4, -1)

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        return model(ids, mask, decoder_input_ids=prefix).logits

    output = plain(forward, IDS, MASK)[:, 2, 7]
    for place in ("block", "word_embeddings"):
        scores, delta = method(forward, place=place).attribute(IDS, (2, 7), MASK, True)
        torch.testing.assert_close(total(scores) + delta, output, rtol=1e-6, atol=1e-6)
        assert (scores[MASK == 1] != 0).all()
        assert not scores[MASK == 0].any()
    with pytest.raises(UnsupportedModelError, match="looked up twice"):
        method(lambda ids: model(ids, decoder_input_ids=ids).logits).attribute(
            IDS, (2, 7)
        )


@pytest.mark.parametrize("method", METHODS)
def test_a_decoder_that_reads_the_same_ids(method) -> None:
    """BART's classifier hands them on, shifted by one."""
    sizes = {
        f"{side}_{name}": size
        for side in ("encoder", "decoder")
        for name, size in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 36))
    }
    config = t.BartConfig(
        vocab_size=97,
        d_model=24,
        max_position_embeddings=40,
        pad_token_id=PAD,
        eos_token_id=2,
        decoder_start_token_id=2,
        num_labels=3,
        **sizes,
    )
    model = randomize(t.BartForSequenceClassification(config)).double().eval()
    with pytest.raises(UnsupportedModelError, match="shifted by one for a decoder"):
        method(model).attribute(IDS, 1, MASK)
    with pytest.raises(UnsupportedModelError, match="shifted by one for a decoder"):
        DecompX(model, biases="absdot").attribute(IDS, 1, MASK)
    table = model.get_input_embeddings()
    shifted = model.model.decoder.config.decoder_start_token_id + 0 * IDS
    shifted[:, 1:] = IDS[:, :-1]

    def both(encoded: Tensor, decoded: Tensor, mask: Tensor) -> Tensor:
        states = model.model(
            inputs_embeds=encoded, decoder_inputs_embeds=decoded, attention_mask=mask
        )[0]
        ends = states[torch.arange(len(IDS)), (IDS == 2).int().argmax(1)]
        return model.classification_head(ends)

    vectors = table(IDS).detach(), table(shifted).detach()
    parts, delta = method(both).attribute(vectors, 1, MASK, True)
    output = plain(model, IDS, MASK).logits[:, 1]
    assert all(part.any() for part in parts)
    torch.testing.assert_close(sum(map(total, parts)) + delta, output, **EXACT)


@pytest.mark.parametrize("biases", ["none", "absdot"])
def test_ids_that_are_read_beside_the_model(biases: str) -> None:
    """In another table, in part, by a second model, or in another order."""
    bag = randomize(nn.Embedding(97, 3)).double()
    table = CLASSES.model.get_input_embeddings()
    beside = {
        "another table": lambda ids, mask: CLASSES(ids, mask) + bag(ids).sum(1),
        "in front": lambda ids, mask: bag(ids).sum(1) + CLASSES(ids, mask),
        "a copy": lambda ids, mask: CLASSES(ids, mask) + bag(ids.clone()).sum(1),
        "in part": lambda ids, mask: CLASSES(ids, mask) + table(ids[:, :2]).sum(),
    }
    for forward in beside.values():
        with pytest.raises(UnsupportedModelError, match=r"twice|second time"):
            DecompX(forward, biases=biases).attribute(IDS, 1, MASK)

    def twice(ids: Tensor, mask: Tensor) -> Tensor:
        return CLASSES(ids, mask) + CLASSES(ids, mask)

    def flipped(ids: Tensor, mask: Tensor) -> Tensor:
        return CLASSES(ids.flip(1), mask.flip(1))

    for forward, what in ((twice, "looked up twice"), (flipped, "not looked up")):
        with pytest.raises(UnsupportedModelError, match=what):
            DecompX(forward, biases=biases).attribute(IDS, 1, MASK)


@pytest.mark.parametrize("method", METHODS)
def test_ids_that_look_like_types_or_positions(method) -> None:
    """They are not taken for a second lookup of the ids."""
    for ids in (torch.zeros_like(IDS), torch.arange(IDS.shape[1]).expand_as(IDS)):
        method(CLASSES).attribute(ids, 1, MASK)
        method(CLASSES).attribute(IDS, 1, MASK, baselines=ids, n_steps=2)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_families(family: str) -> None:
    """Conservation and independence of examples, wherever a model can be run."""
    model = build(family)

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        output = model(ids, attention_mask=mask)
        return output.logits if "logits" in output else output[0]

    output = plain(forward, IDS, MASK)
    assert hasattr(encoder_of(family, model), "forward")
    for method in METHODS:
        scores, delta = method(forward).attribute(IDS, 1, MASK, True)
        torch.testing.assert_close(
            total(scores) + delta, output[:, 1], rtol=1e-6, atol=1e-6
        )
        assert not scores[MASK == 0].any()
        assert (scores[MASK == 1] != 0).float().mean() > 0.5
        alone = method(forward).attribute(IDS[1:2], 1, MASK[1:2])
        torch.testing.assert_close(scores[1:2], alone, rtol=1e-6, atol=1e-8)


# Captum's own objects


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq", "vargrad"])
def test_noise_tunnel(kind: str, method) -> None:
    made = method(on_vectors)
    plain_one = made.attribute(VECTORS, [1, 2, 0, 1], MASK)
    options = {"nt_type": kind, "nt_samples": 3, "target": [1, 2, 0, 1]}
    options["additional_forward_args"] = (MASK,)
    tunnel = NoiseTunnel(made)
    still = tunnel.attribute(VECTORS, stdevs=1e-9, **options)
    expected = {
        "smoothgrad": plain_one,
        "smoothgrad_sq": plain_one**2,
        "vargrad": 0 * plain_one,
    }
    torch.testing.assert_close(still, expected[kind], rtol=1e-6, atol=1e-9)
    noisy = tunnel.attribute(VECTORS, stdevs=0.5, **options)
    assert noisy.shape == VECTORS.shape
    assert not torch.allclose(noisy, expected[kind], rtol=1e-3)
    path = tunnel.attribute(VECTORS, stdevs=1e-9, baselines=0.0, n_steps=2, **options)
    assert path.shape == VECTORS.shape


@pytest.mark.parametrize("method", METHODS)
def test_infidelity(method) -> None:
    """The definition, with what Captum drew; for ids, too."""
    drawn: list[tuple[Tensor, Tensor]] = []

    def perturb(ids: Tensor) -> tuple[Tensor, Tensor]:
        replaced = torch.rand(ids.shape) < 0.3
        drawn.append((replaced.double(), ids.masked_fill(replaced, PAD)))
        return drawn[-1]

    scores = method(CLASSES).attribute(IDS, 1, MASK)
    found = infidelity(
        CLASSES,
        perturb,
        IDS,
        scores,
        additional_forward_args=(MASK,),
        target=1,
        n_perturb_samples=1,
    )
    ((replaced, perturbed),) = drawn
    change = plain(CLASSES, IDS, MASK) - plain(CLASSES, perturbed, MASK)
    expected = ((replaced * scores).sum(-1) - change[:, 1]) ** 2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_sensitivity(method) -> None:
    options = {"target": 1, "additional_forward_args": (MASK,), "n_perturb_samples": 2}
    on_tokens = sensitivity_max(
        method(CLASSES).attribute,
        IDS,
        perturb_func=lambda ids, *_: ids.masked_fill(torch.rand(ids.shape) < 0.3, PAD),
        **options,
    )
    assert on_tokens.shape == (4,)
    assert (on_tokens > 0).all()
    small, large = (
        sensitivity_max(
            method(on_vectors).attribute, VECTORS, perturb_radius=radius, **options
        )
        for radius in (1e-9, 0.1)
    )
    assert (small < 1e-5).all()
    assert (large > small).all()


def test_gradients_of_captum_are_as_before() -> None:
    vectors = VECTORS.clone().requires_grad_()
    before = Saliency(on_vectors).attribute(
        vectors, 1, abs=False, additional_forward_args=MASK
    )
    for method, layered in PAIRS:
        method(CLASSES).attribute(IDS, 1, MASK, baselines=PAD, n_steps=2)
        layered(CLASSES, CLASSES.model.bert.pooler).attribute(IDS, 1, MASK)
    after = Saliency(on_vectors).attribute(
        vectors, 1, abs=False, additional_forward_args=MASK
    )
    assert torch.equal(before, after)
