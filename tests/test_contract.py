"""Captum's contract: what goes in, what comes out, what is left as it was."""

from __future__ import annotations

import copy
import functools
import threading

import pytest
import torch
import transformers as t
from captum.attr import Attribution, InputXGradient, Saliency
from captum.testing.attr.helpers.gen_test_utils import (
    get_target_layer,
    parse_test_config,
)
from captum.testing.attr.helpers.test_config import config as captum_config
from torch import nn

from captum_globenc import (
    ALTI,
    AttentionRollout,
    GlobEnc,
    LayerGlobEnc,
    ValueZeroing,
)
from tests.conftest import left_behind
from tests.models import build, padded, sentence

EXACT = {"rtol": 1e-12, "atol": 0}


class Logits(nn.Module):
    """As Captum wants a model: a tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids, mask=None):
        return self.model(ids, attention_mask=mask).logits


IDS, MASK = padded([sentence(n, seed=n) for n in (8, 5, 7, 3)])
CLASSES = Logits(build("bert"))
TOKENS = Logits(build("bert", head=t.BertForTokenClassification))

ClassAware = functools.partial(GlobEnc, class_aware=True)
# What is left of tiny differences depends on how sums are ordered.
LIMITS = {ValueZeroing: {"rtol": 1e-9, "atol": 0}}

# Entries in the form of Captum's own test configuration.
CONFIG = [
    {
        "name": f"globenc_{name}",
        "algorithms": [GlobEnc],
        "model": model,
        "attribute_args": {
            "inputs": IDS,
            "additional_forward_args": (MASK,),
            "target": target,
        },
    }
    for name, model, target in [
        ("single_target", CLASSES, 1),
        ("negative_target", CLASSES, -1),
        ("single_tensor_target", CLASSES, torch.tensor([2])),
        ("scalar_tensor_target", CLASSES, torch.tensor(2)),
        ("multi_target", CLASSES, [0, 1, 1, 2]),
        ("multi_tensor_target", CLASSES, torch.tensor([2, 1, 0, 0])),
        ("tuple_target", CLASSES, (2,)),
        ("tuple_targets", CLASSES, [(0,), (1,), (2,), (0,)]),
        ("token_target", TOKENS, (1, 2)),
        ("token_targets", TOKENS, [(0, 1), (4, 0), (2, 2), (1, 1)]),
        ("no_target", CLASSES, None),
    ]
]


EMBEDDINGS = "model.bert.embeddings"
LAYERS = ["model.bert.encoder.layer.0", "model.bert.encoder.layer.2"]
LAYER_CONFIG = [
    {
        **entry,
        "name": f"layer_{entry['name']}_{layer}",
        "algorithms": [LayerGlobEnc],
        "layer": layer,
    }
    for entry in CONFIG
    for layer in (EMBEDDINGS, EMBEDDINGS + ".word_embeddings", *LAYERS, LAYERS)
]
CONFIG += LAYER_CONFIG
CONFIG += [
    {**entry, "name": f"{name}_{entry['name']}", "algorithms": [method]}
    for name, method, layered in [
        ("alti", ALTI, False),
        ("attention_rollout", AttentionRollout, False),
        ("value_zeroing", ValueZeroing, False),
        ("class_aware", ClassAware, False),
        ("class_aware", functools.partial(LayerGlobEnc, class_aware=True), True),
    ]
    for entry in CONFIG
    if ("layer" in entry) == layered
    # Class-aware scores are those of one output.
    and (name != "class_aware" or entry["attribute_args"]["target"] is not None)
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
        for key, value in captums.items():
            if key not in ("model", "layer", "attribute_args"):
                assert isinstance(entry[key], type(value))
        assert isinstance(entry["model"], nn.Module)
        assert {"inputs", "target"} <= entry["attribute_args"].keys()


@pytest.mark.parametrize("entry", CONFIG, ids=lambda entry: entry["name"])
def test_targets(entry: dict) -> None:
    """Captum's battery: row i of a batch is what example i gives by itself."""
    method, _, args = configured(entry)
    attributions = method.attribute(**args)
    target = args["target"]
    limit = LIMITS.get(type(method), EXACT)
    if getattr(method, "class_aware", False):
        limit = {"rtol": 1e-12, "atol": 1e-12}  # Parts of either sign cancel.
    for row in range(len(IDS)):
        several = isinstance(target, list) or (
            isinstance(target, torch.Tensor) and target.numel() > 1
        )
        single = target[row] if several else target
        if isinstance(single, torch.Tensor):
            single = single.item()
        alone = method.attribute(IDS[row : row + 1], single, (MASK[row : row + 1],))
        if isinstance(attributions, torch.Tensor):
            torch.testing.assert_close(attributions[row], alone[0], **limit)
        else:
            for part, own in zip(attributions, alone, strict=True):
                torch.testing.assert_close(part[row], own[0], **limit)


@pytest.mark.parametrize("entry", CONFIG, ids=lambda entry: entry["name"])
def test_hook_removal(entry: dict) -> None:
    """Captum's battery: no hook is left, neither after a success nor a failure."""
    method, model, args = configured(entry)
    method.attribute(**args)
    assert not left_behind(model)
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
        (3, IndexError),
        (-4, IndexError),
        ([0, 1, 2, 3], RuntimeError),
    ],
    ids=str,
)
def test_illegal_targets_fail_as_in_captum(target, error) -> None:
    """The same kind of error as Captum's own methods."""
    embeddings = CLASSES.model.get_input_embeddings()(IDS).detach().requires_grad_()

    def forward(embeddings, mask):
        return CLASSES.model(inputs_embeds=embeddings, attention_mask=mask).logits

    with pytest.raises(error):
        Saliency(forward).attribute(embeddings, target, additional_forward_args=MASK)
    with pytest.raises(error):
        GlobEnc(CLASSES).attribute(IDS, target, MASK)
    assert not left_behind(CLASSES)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.tensor([0.5, 1.0, 1.0, 2.0]), "must hold integers.*float32"),
        (torch.tensor([True, False, True, True]), "must hold integers.*bool"),
        ([("a",), (1,), (1,), (1,)], "tuples of integers only"),
        ([(1,), 1, 2, 0], "tuples of integers only"),
        ((), "must be None, an int"),
        ("positive", "got str: 'positive'"),
        (0.5, "got float: 0.5"),
        ([0, 1], "target has 2 elements, and inputs have 4 examples"),
    ],
    ids=str,
)
def test_illegal_targets_get_one_clear_sentence(target, message) -> None:
    for model in (CLASSES, TOKENS):
        with pytest.raises(AssertionError, match=message):
            GlobEnc(model).attribute(IDS, target, MASK)


@pytest.mark.parametrize(
    "make", [GlobEnc, ALTI, AttentionRollout, ValueZeroing, ClassAware]
)
def test_the_class(make) -> None:
    method = make(CLASSES)
    assert isinstance(method, Attribution)
    assert method.get_name()
    assert not method.has_convergence_delta()
    assert method.multiplies_by_inputs is False
    # NoiseTunnel calls it without the logging around it.
    assert callable(method.attribute.__wrapped__)
    with pytest.raises(NotImplementedError, match="attribute_future"):
        method.attribute_future()


@pytest.mark.parametrize("make", [GlobEnc, ALTI, ValueZeroing, ClassAware])
def test_tuples_and_dtypes(make) -> None:
    method = make(CLASSES)
    scores = method.attribute(IDS, 1, MASK)
    (single,) = method.attribute((IDS,), 1, (MASK,))
    torch.testing.assert_close(single, scores, **EXACT)
    assert scores.shape == IDS.shape
    assert scores.dtype == CLASSES(IDS).dtype
    assert scores.is_contiguous()
    assert not scores.requires_grad
    assert (scores >= 0).all() or make is ClassAware
    assert not scores[MASK == 0].any()


def test_a_model_returning_integers_gets_floats() -> None:
    scores = GlobEnc(lambda ids: CLASSES(ids).argmax(-1)).attribute(IDS[:1])
    assert scores.is_floating_point()


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, torch.enable_grad], ids=str
)
@pytest.mark.parametrize("make", [GlobEnc, ALTI, ValueZeroing, ClassAware])
def test_grad_modes(mode, make) -> None:
    expected = make(CLASSES).attribute(IDS, 1, MASK)
    method = make(CLASSES)
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        inside = method.attribute(IDS, 1, MASK)
        assert before == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    torch.testing.assert_close(inside.clone(), expected, **EXACT)
    # What was prepared inside must serve outside, too.
    torch.testing.assert_close(method.attribute(IDS, 1, MASK), expected, **EXACT)


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = build("bert")
        method = GlobEnc(model)
        first = method.attribute(IDS, 1, MASK)
        model.bert.encoder.layer[0].attention.output.dense.weight.mul_(2)
        second = method.attribute(IDS, 1, MASK)
        fresh = GlobEnc(model).attribute(IDS, 1, MASK)
    assert not torch.equal(first, second)
    torch.testing.assert_close(second.clone(), fresh.clone(), **EXACT)


def test_a_closure_that_enables_grad() -> None:
    def forward(ids, mask):
        with torch.enable_grad():
            return CLASSES(ids, mask)

    scores = GlobEnc(forward).attribute(IDS, 1, MASK)
    torch.testing.assert_close(
        scores, GlobEnc(CLASSES).attribute(IDS, 1, MASK), **EXACT
    )
    assert not scores.requires_grad


def test_train_mode_explains_the_model_in_evaluation_mode() -> None:
    model = build("bert")
    expected = GlobEnc(model).attribute(IDS, 1, (MASK,))
    model.train()
    model.bert.encoder.layer[1].eval()
    modes = [module.training for module in model.modules()]
    assert any(modes)
    assert not all(modes)
    scores = GlobEnc(model).attribute(IDS, 1, (MASK,))
    torch.testing.assert_close(scores, expected, **EXACT)
    assert modes == [module.training for module in model.modules()]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_everything_is_left_as_it_was(attention: str) -> None:
    model = build("bert", attention=attention)
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()

    def forward(embeddings, mask):
        return model(inputs_embeds=embeddings, attention_mask=mask).logits

    def observe():
        logits = forward(embeddings, MASK)
        gradients = torch.autograd.grad(logits[:, 1].sum(), embeddings)[0]
        product = InputXGradient(forward).attribute(embeddings, 1, MASK)
        return logits.detach(), gradients, product.detach()

    before = observe()
    model.bert.pooler.dense.weight.grad = torch.ones(24, 24).double()
    state = copy.deepcopy(model.state_dict())
    attributions = GlobEnc(forward).attribute(embeddings, 1, MASK)
    GlobEnc(model).attribute(IDS, 1, (MASK,))
    for old, new in zip(before, observe()):
        assert torch.equal(old, new)
    assert embeddings.requires_grad
    assert embeddings.grad is None
    assert not attributions.requires_grad
    assert torch.equal(model.bert.pooler.dense.weight.grad, torch.ones(24, 24).double())
    assert all(p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert model.config._attn_implementation == attention
    assert not left_behind(model)


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("where", ["model", "head", "closure"])
def test_everything_is_left_as_it_was_after_an_exception(where: str) -> None:
    model = build("bert").train()
    expected = GlobEnc(model).attribute(IDS, 1, (MASK,))

    def fail(*_):
        raise BrokenError

    def closure(ids, mask):
        model(ids, mask)
        raise BrokenError

    broken = {
        "model": model.bert.encoder.layer[1].intermediate,
        "head": model.classifier,
        "closure": None,
    }[where]
    hook = broken.register_forward_hook(fail) if broken is not None else None
    with pytest.raises(BrokenError):
        GlobEnc(closure if where == "closure" else model).attribute(IDS, 1, (MASK,))
    if hook is not None:
        hook.remove()
    assert model.training
    assert model.bert.encoder.training
    assert model.config._attn_implementation == "sdpa"
    assert not left_behind(model)
    scores = GlobEnc(model).attribute(IDS, 1, (MASK,))
    torch.testing.assert_close(scores, expected, **EXACT)


@pytest.mark.parametrize("make", [GlobEnc, ALTI, ValueZeroing, ClassAware])
@pytest.mark.parametrize("shared", [True, False])
def test_threads(shared: bool, make) -> None:
    """Attributions in several threads, and plain use of the model beside them."""
    models = [build("bert"), build("roberta")]
    if shared:
        models[1] = models[0]
    expected = [make(model).attribute(IDS, 1, (MASK,)) for model in models]
    with torch.no_grad():
        logits = [model(IDS, MASK).logits for model in models]
    problems: list[str] = []

    def explain(which: int) -> None:
        for _ in range(3 if make is ValueZeroing else 10):
            scores = make(models[which]).attribute(IDS, 1, (MASK,))
            if not torch.allclose(scores, expected[which], rtol=1e-10):
                problems.append(f"scores of model {which}")

    def use(which: int) -> None:
        for _ in range(30):
            with torch.no_grad():
                output = models[which](IDS, MASK).logits
            if not torch.allclose(output, logits[which], rtol=1e-10):
                problems.append(f"output of model {which}")

    def guarded(task, which: int) -> None:
        try:
            task(which)
        except Exception as error:
            problems.append(repr(error))

    threads = [
        threading.Thread(target=guarded, args=(task, which))
        for task in (explain, use)
        for which in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert not any(left_behind(model) for model in models)
