"""Bad input and models that are not what they seem: one sentence, no trace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers as t
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from captum_globenc import (
    Architecture,
    GlobEnc,
    GlobEncError,
    InputError,
    NonFiniteActivationError,
    ReconstructionError,
    UnsupportedModelError,
    register_architecture,
    supported_model_types,
)
from captum_globenc.encoders.registry import _TABLE
from tests.conftest import left_behind
from tests.models import SIZES, build, padded, randomize, sentence

IDS, MASK = padded([sentence(8), sentence(5)])
ZERO_ROW = MASK.clone()
ZERO_ROW[1] = 0


@pytest.fixture
def model() -> nn.Module:
    return build("bert", torch.float32)


@pytest.mark.parametrize(
    ("inputs", "mask", "options", "message"),
    [
        ([[1, 2, 3]], None, {}, r"must be a torch.Tensor.*got list: \[\[1, 2, 3\]\]"),
        ("a text", None, {}, "got str: 'a text'"),
        ((), None, {}, r"at least one tensor"),
        (torch.zeros(1, 0).long(), None, {}, r"shape \(1, 0\) hold no token"),
        (torch.zeros(0, 4).long(), None, {}, r"shape \(0, 4\) hold no token"),
        (torch.tensor([3, 4, 5]), None, {}, r"got shape \(3,\)"),
        (IDS.double(), MASK, {}, "must be integers, got torch.float64"),
        (IDS + 90, MASK, {}, r"input id \d+ is outside the vocabulary of 97"),
        (IDS, ZERO_ROW, {}, "mask of example 1 is all zero"),
        (IDS, ZERO_ROW[:, None, None].bool(), {}, "mask of example 1 is all zero"),
        (IDS, MASK[:, :-1], {}, r"shape \(2, 7\).* = \(2, 8\) is expected"),
        (IDS, MASK[:1], {}, r"shape \(1, 8\).* = \(2, 8\) is expected"),
        (IDS, MASK[:, None], {}, r"shape \(2, 1, 8\)"),
        (IDS, MASK[:, None, None, :-1].bool(), {}, r"shape \(2, 1, 1, 7\)"),
        (IDS, MASK[:, None, None], {}, r"dtype torch.int64 is not understood"),
        (
            IDS,
            MASK[:, None, None].double(),
            {},
            "mask is torch.float64 .* torch.float32",
        ),
        (IDS, MASK, {"token_index": MASK.bool()[:, 0]}, "got torch.bool"),
        ((IDS, MASK[:1]), None, {}, r"different batch sizes: \[2, 1\]"),
        (IDS, MASK, {"token_index": 8}, "token_index 8 is outside the 8 tokens"),
        (IDS, MASK, {"token_index": -9}, "token_index -9 is outside"),
        (IDS, MASK, {"token_index": 6}, "token_index 6 is padding in example 1"),
        (IDS, MASK, {"token_index": "max"}, "got 'max'"),
        (IDS, MASK, {"token_index": 1.5}, "got 1.5"),
        (IDS, MASK, {"token_index": torch.tensor([0, 1, 2])}, r"shape \(3,\)"),
        (IDS, MASK, {"token_index": torch.tensor([0.0, 1])}, "torch.float32"),
        (IDS, MASK, {"internal_batch_size": 0}, "at least 1, got 0"),
        (IDS, MASK, {"internal_batch_size": "4"}, "got '4'"),
    ],
)
def test_bad_input(model, inputs, mask, options, message) -> None:
    model.train()
    with pytest.raises(InputError, match=message) as caught:
        GlobEnc(model).attribute(
            inputs, target=1, additional_forward_args=mask, **options
        )
    assert isinstance(caught.value, GlobEncError | ValueError)
    assert "\n" not in str(caught.value)
    assert not left_behind(model)
    assert model.training
    assert model.config._attn_implementation == "sdpa"


def test_inputs_that_are_not_the_encoders_tokens(model) -> None:
    def with_a_token_in_front(ids):
        return model(torch.cat([torch.zeros_like(ids[:, :1]), ids], 1)).logits

    with pytest.raises(InputError, match=r"\(1, 5\).*saw \(batch, tokens\) = \(1, 6\)"):
        GlobEnc(with_a_token_in_front).attribute(sentence(5)[None], target=1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("N_EN", r"unknown local score 'N_EN'.*Did you mean 'N_ENC'"),
        ("n_enc", r"unknown local score 'n_enc'.*Did you mean 'N_ENC'"),
        ("rubbish", r"unknown local score 'rubbish'; known: W, "),
    ],
)
def test_unknown_local_score(model, name, message) -> None:
    with pytest.raises(InputError, match=message):
        GlobEnc(model, local=name)


def test_wrong_constructor_arguments(model) -> None:
    with pytest.raises(TypeError, match=r"forward_func must be .* got str"):
        GlobEnc("bert-base-uncased")
    with pytest.raises(TypeError, match=r"encoder must be an nn.Module, got str"):
        GlobEnc(model, encoder="bert")


@pytest.mark.parametrize("stop", [0, 4, -1, True])
def test_rollout_to_no_layer(model, stop) -> None:
    with pytest.raises(ValueError, match="stop must be 1 to 3"):
        GlobEnc(model).decompose(IDS, (MASK,)).rollout(stop=stop)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "part", ["attention.self.value", "attention.output.dense", "output.dense"]
)
def test_non_finite_activations_name_the_layer(model, part, value) -> None:
    layer = model.bert.encoder.layer[1]
    with torch.no_grad():
        layer.get_submodule(part).bias[3] = value
    with pytest.raises(NonFiniteActivationError, match=r"'bert.encoder.layer.1'"):
        GlobEnc(model).attribute(IDS, 1, (MASK,))
    assert not left_behind(model)


def test_a_family_outside_the_interface() -> None:
    config = t.ConvBertConfig(**{**SIZES, "embedding_size": 24})
    model = t.ConvBertForSequenceClassification(config).eval()
    expected = "model type 'convbert' is not supported: it mixes attention with conv"
    with pytest.raises(UnsupportedModelError, match=expected):
        GlobEnc(model).attribute(IDS, 1, (MASK,))
    expected = f"No supported encoder ran inside forward_func: {expected}"
    with pytest.raises(UnsupportedModelError, match=expected):
        GlobEnc(lambda *a: model(*a).logits).attribute(IDS, 1, (MASK,))
    assert not left_behind(model)


def test_a_module_without_an_encoder() -> None:
    with pytest.raises(UnsupportedModelError, match="no model type"):
        GlobEnc(nn.Linear(3, 2)).attribute(torch.zeros(1, 3), 1)
    with pytest.raises(UnsupportedModelError, match=r"seen: no torch.nn.Module"):
        GlobEnc(lambda x: x).attribute(torch.zeros(1, 3), 1)


def test_an_encoder_that_runs_twice(model) -> None:
    def twice(ids, mask):
        return model(ids, mask).logits - model(ids, mask).logits

    with pytest.raises(UnsupportedModelError, match="second time"):
        GlobEnc(twice).attribute(IDS, 1, (MASK,))
    assert not left_behind(model)


def test_two_encoders_in_a_closure(model) -> None:
    other = build("roberta", torch.float32)

    def difference(ids, mask):
        return other(ids, mask).logits - model(ids, mask).logits

    with pytest.raises(UnsupportedModelError, match=r"two encoders ran.*encoder="):
        GlobEnc(difference).attribute(IDS, 1, (MASK,))
    assert not left_behind(model)
    assert not left_behind(other)
    assert GlobEnc(difference, encoder=model).attribute(IDS, 1, (MASK,)).any()


def test_an_attribution_inside_another(model) -> None:
    def nested(ids, mask):
        GlobEnc(model).attribute(ids, 1, (mask,))
        return model(ids, mask).logits

    with pytest.raises(UnsupportedModelError, match="second time"):
        GlobEnc(nested).attribute(IDS, 1, (MASK,))
    assert not left_behind(model)
    assert GlobEnc(model).attribute(IDS, 1, (MASK,)).any()


def test_nan_in_the_head(model) -> None:
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(NonFiniteActivationError, match="in the head"):
        GlobEnc(model).attribute(IDS, 1, (MASK,))


@pytest.mark.parametrize(
    "path", ["attention.output.dense", "attention.output.LayerNorm", "output", ""]
)
@pytest.mark.parametrize("token", [1, 17, 31])
def test_a_patch_of_a_single_token(model, path, token) -> None:
    """Activation patching changes the layer: no position may go unnoticed."""

    def patch(_, __, output):
        changed = output.clone()
        changed[:, token] = 0
        return changed

    part = model.bert.encoder.layer[1].get_submodule(path)
    hook = part.register_forward_hook(patch)
    with pytest.raises(ReconstructionError, match=r"layer.*[12]"):
        GlobEnc(model).attribute(sentence(32)[None], target=1)
    hook.remove()
    assert not left_behind(model)


def test_an_encoder_that_runs_in_part(model) -> None:
    def first_layer_only(ids):
        return model.bert.encoder.layer[0](model.bert.embeddings(ids))

    with pytest.raises(UnsupportedModelError, match="1 of 3 layers"):
        GlobEnc(first_layer_only, encoder=model).attribute(IDS)
    assert not left_behind(model)


# Doubles: a model that is not what its row of the table says.


def second_residual(model) -> None:
    layer = model.bert.encoder.layer[1].attention.output
    original = layer.forward
    layer.forward = lambda hidden, tensor: original(hidden, 2 * tensor)


def residual_after_the_norm(model) -> None:
    layer = model.bert.encoder.layer[1].attention.output
    original = layer.forward
    layer.forward = lambda hidden, tensor: original(hidden, tensor) + tensor


def norm_before_attention(model) -> None:
    layer = model.bert.encoder.layer[1].attention.self
    original = layer.forward
    norm = nn.LayerNorm(24)
    layer.forward = lambda hidden, *a, **k: original(norm(hidden), *a, **k)


def scaled_attention(model) -> None:
    layer = model.bert.encoder.layer[1].attention.output.dense
    original = layer.forward
    layer.forward = lambda hidden: original(hidden) * 1.01


def second_feed_forward_residual(model) -> None:
    layer = model.bert.encoder.layer[1].output
    original = layer.forward
    layer.forward = lambda hidden, tensor: original(hidden, 1.01 * tensor)


def scaled_output(model) -> None:
    layer = model.bert.encoder.layer[1]
    original = layer.forward
    layer.forward = lambda *a, **k: original(*a, **k) * 1.01


def changed_between_layers(model) -> None:
    encoder = model.bert.encoder

    def forward(hidden, attention_mask, **_):
        for layer in encoder.layer:
            hidden = layer(hidden + 0.01, attention_mask)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)

    encoder.forward = forward


def another_norm(model) -> None:
    class Doubled(nn.LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    model.bert.encoder.layer[1].output.LayerNorm = randomize(Doubled(24))


def reweighted_attention(model) -> None:
    layer = model.bert.encoder.layer[1].attention.self
    original = layer.forward

    def forward(*args, **kwargs):
        context, weights = original(*args, **kwargs)
        return context.roll(1, dims=1), weights

    layer.forward = forward


@pytest.mark.parametrize(
    "spoil",
    [
        second_residual,
        residual_after_the_norm,
        scaled_attention,
        second_feed_forward_residual,
        scaled_output,
        changed_between_layers,
        another_norm,
        reweighted_attention,
    ],
)
@pytest.mark.parametrize("name", ["N_ENC", "W"])
def test_a_layer_that_is_not_as_described(model, spoil, name) -> None:
    spoil(model)
    with pytest.raises(ReconstructionError) as caught:
        GlobEnc(model, local=name).attribute(IDS, 1, (MASK,))
    assert "bert.encoder.layer." in caught.value.layer
    assert caught.value.error > caught.value.tolerance
    assert caught.value.tolerance < 1e-5
    assert f"{caught.value.error:.2g}" in str(caught.value)
    assert not left_behind(model)


def test_an_attention_function_of_the_users(model, monkeypatch) -> None:
    """What runs inside of it is seen."""
    tokens = torch.arange(8)
    near = ((tokens[:, None] - tokens).abs() < 3)[None, None]
    expected = GlobEnc(model).attribute(IDS[:1], 1, (near,))
    original = nn.functional.scaled_dot_product_attention

    def windowed(query, key, value, **kwargs):
        return original(query, key, value, **{**kwargs, "attn_mask": near})

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", windowed)
    found = GlobEnc(model).attribute(IDS[:1], 1)
    torch.testing.assert_close(found, expected)


def test_values_that_are_not_of_the_layers_input(model) -> None:
    norm_before_attention(model)
    with pytest.raises(ReconstructionError, match="what its values are made of"):
        GlobEnc(model).attribute(IDS, 1, (MASK,))


@pytest.mark.parametrize(
    "path", ["attention.output.dense", "output.LayerNorm", "output.dense"]
)
def test_a_part_that_is_missing(model, path) -> None:
    parent, _, name = path.rpartition(".")
    owner = model.bert.encoder.layer[2].get_submodule(parent)
    owner.renamed = getattr(owner, name)
    delattr(owner, name)
    with pytest.raises(UnsupportedModelError, match=rf"layer.2.*'{path}'.*nothing"):
        GlobEnc(model).attribute(IDS, 1, (MASK,))


def test_a_part_of_another_kind(model) -> None:
    model.bert.encoder.layer[0].output.LayerNorm = nn.GroupNorm(2, 24)
    with pytest.raises(UnsupportedModelError, match="RMSNorm and is a GroupNorm"):
        GlobEnc(model).attribute(IDS, 1, (MASK,))


def test_layers_that_are_missing(model) -> None:
    model.bert.encoder.blocks = model.bert.encoder.layer
    del model.bert.encoder.layer
    with pytest.raises(UnsupportedModelError, match=r"(?s)'encoder.layer'"):
        GlobEnc(model).attribute(IDS, 1, (MASK,))


def test_chunked_feed_forward_is_refused(model) -> None:
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 4
    with pytest.raises(UnsupportedModelError, match="chunk_size_feed_forward"):
        GlobEnc(model).attribute(IDS, 1, (MASK,))
    assert not left_behind(model)


class MyConfig(t.BertConfig):
    model_type = "my-bert"


class MyModel(t.BertForSequenceClassification):
    config_class = MyConfig


def test_registering_an_architecture(monkeypatch) -> None:
    monkeypatch.setattr("captum_globenc.encoders.registry._TABLE", dict(_TABLE))
    mine = randomize(MyModel(MyConfig(**SIZES))).double().eval()
    with pytest.raises(UnsupportedModelError, match="'my-bert' is not supported"):
        GlobEnc(mine).attribute(IDS, 1, (MASK,))
    registration = register_architecture(
        "my-bert",
        Architecture(
            embeddings="embeddings",
            positions="embeddings.position_embeddings",
            layers="encoder.layer",
            attention="attention.self",
            output="attention.output.dense",
            attention_norm="attention.output.LayerNorm",
            feed_forward="output.dense",
            output_norm="output.LayerNorm",
        ),
    )
    assert "my-bert" in supported_model_types()
    expected = GlobEnc(build("bert")).attribute(IDS, 1, (MASK,))
    assert torch.equal(GlobEnc(mine).attribute(IDS, 1, (MASK,)), expected)
    registration.remove()
    registration.remove()
    with pytest.raises(UnsupportedModelError, match="'my-bert' is not supported"):
        GlobEnc(mine).attribute(IDS, 1, (MASK,))
    described = _TABLE["bert"].layouts[0]
    with register_architecture("my-bert", described):
        assert torch.equal(GlobEnc(mine).attribute(IDS, 1, (MASK,)), expected)
    assert "my-bert" not in supported_model_types()
    with pytest.raises(TypeError, match="got dict"):
        register_architecture("my-bert", {"layers": "encoder.layer"})


def test_swapped_norms_in_a_registration(monkeypatch, model) -> None:
    """A wrong map never gives numbers."""
    table = dict(_TABLE)
    monkeypatch.setattr("captum_globenc.encoders.registry._TABLE", table)
    (right,) = table["bert"].layouts
    wrong = replace(
        right, attention_norm=right.output_norm, output_norm=right.attention_norm
    )
    with pytest.raises(ValueError, match="'bert' is registered already, as 'BERT'"):
        register_architecture("bert", wrong)
    del table["bert"]
    register_architecture("bert", wrong)
    with pytest.raises(ReconstructionError):
        GlobEnc(model).attribute(IDS, 1, (MASK,))
