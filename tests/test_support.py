"""The support table, the command that lists and checks, and what is refused."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as t
from packaging.version import Version
from torch import Tensor, nn
from typer.testing import CliRunner

from captum_globenc import (
    Architecture,
    GlobEnc,
    InputError,
    ReconstructionError,
    UnsupportedModelError,
    register_architecture,
    support,
)
from captum_globenc.cli import app
from captum_globenc.encoders import registry, table
from captum_globenc.encoders.discovery import find_encoder
from captum_globenc.encoders.families import FAMILIES, REFUSED
from captum_globenc.encoders.parts import is_centred, is_norm
from tests import models
from tests.conftest import left_behind
from tests.models import build, encoder_of, padded, randomize, sentence

ROOT = Path(__file__).parents[1]


def run(*arguments: str):
    return CliRunner().invoke(app, ["models", *arguments], env={"COLUMNS": "200"})


def test_the_table_has_every_family() -> None:
    page = table.to_markdown()
    for name, family in FAMILIES.items():
        assert f"| {family.title} | " in page
        assert " " in name or f"`{name.split('.')[-1]}`" in page
    for name, reason in REFUSED.items():
        assert f"* `{name}` {reason}." in page
    listed = run()
    assert listed.exit_code == 0
    for name in FAMILIES:
        assert name in listed.output


@pytest.mark.parametrize("name", models.FAMILIES)
def test_what_the_table_says_of_attention_and_norms(name: str) -> None:
    model = build(name)
    encoder = find_encoder(model)
    assert encoder is not None
    later = GlobEnc(model).decompose(sentence(8)[None]).local.triu(1)
    assert encoder.family.causal == (not later.any())
    norms = [m for m in encoder.module.modules() if is_norm(m)]
    assert {is_centred(norm) for norm in norms} == {not encoder.family.rms_norm}


def test_the_newest_version_is_the_one_that_tests_are_pinned_to() -> None:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"transformers=={table.NEWEST_TESTED}" in pinned


@pytest.mark.parametrize("family", ["bert", "llama", "distilbert"])
def test_check(family: str, tmp_path: Path) -> None:
    build(family, torch.float32).save_pretrained(tmp_path)
    checked = run("--check", str(tmp_path))
    assert checked.exit_code == 0, checked.output
    assert f"{FAMILIES[family].title}: all 3 layers are rebuilt" in checked.output
    for index in range(3):
        assert f"layer.{index}" in checked.output or f"s.{index}" in checked.output


def test_check_of_images(tmp_path: Path) -> None:
    config = t.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=36,
        image_size=12,
        patch_size=4,
    )
    t.ViTModel(config).save_pretrained(tmp_path)
    checked = run("--check", str(tmp_path))
    assert checked.exit_code == 0, checked.output
    assert "ViT: all 2 layers" in checked.output


def test_check_of_what_is_no_model(tmp_path: Path) -> None:
    checked = run("--check", str(tmp_path))
    assert checked.exit_code == 2
    assert "cannot be loaded" in checked.output


SMALL = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 36,
    "num_labels": 3,
}
BUILD_REFUSED = {
    "fnet": lambda: t.FNetModel(t.FNetConfig(**SMALL)),
    "convbert": lambda: t.ConvBertModel(t.ConvBertConfig(**SMALL, embedding_size=24)),
    "funnel": lambda: t.FunnelBaseModel(
        t.FunnelConfig(
            vocab_size=97, d_model=24, n_head=4, d_head=6, block_sizes=[1, 1]
        )
    ),
    "longformer": lambda: t.LongformerModel(
        t.LongformerConfig(**SMALL, attention_window=4)
    ),
    "squeezebert": lambda: t.SqueezeBertModel(
        t.SqueezeBertConfig(**SMALL, embedding_size=24)
    ),
}


@pytest.mark.parametrize("family", BUILD_REFUSED)
def test_refused_with_the_reason(family: str) -> None:
    model = BUILD_REFUSED[family]().eval()
    ids = torch.randint(3, 90, (1, 8))
    reason = REFUSED[family][:40]
    with pytest.raises(UnsupportedModelError) as direct:
        GlobEnc(model).attribute(ids)
    assert reason in str(direct.value)
    with pytest.raises(UnsupportedModelError) as inside:
        GlobEnc(lambda ids: model(ids)[0]).attribute(ids)
    assert reason in str(inside.value)
    assert not left_behind(model)


def test_a_release_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
    row = registry._TABLE["bert"]
    registry._TABLE["bert"] = replace(row, since="99.0")
    with pytest.raises(UnsupportedModelError, match=r"needs transformers 99\.0"):
        GlobEnc(build("bert")).attribute(sentence(5)[None], 1)


class OwnLayer(nn.Module):
    """A pre-LN layer of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(24), nn.LayerNorm(24)
        self.mix = nn.Module()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)
        self.mlp = nn.Sequential(nn.Linear(24, 36), nn.GELU(), nn.Linear(36, 24))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.attend(self.first(x)))
        return x + self.mlp(self.second(x))

    def attend(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (4, 6)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).flatten(2)


class OwnEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(97, 24)
        self.steps = nn.ModuleList(OwnLayer() for _ in range(3))
        self.head = nn.Linear(24, 2)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.table(ids)
        for step in self.steps:
            states = step(states)
        return self.head(states[:, 0])


OWN = Architecture(
    embeddings="table",
    layers="steps",
    attention="",
    output="out",
    feed_forward_norm="second",
    feed_forward="mlp",
)


def own() -> nn.Module:
    torch.manual_seed(0)
    return randomize(OwnEncoder()).double().eval()


def test_a_model_of_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
    model, ids = own(), sentence(6)
    with pytest.raises(UnsupportedModelError, match="register_architecture"):
        GlobEnc(model).attribute(ids[None], 1)
    register_architecture(OwnEncoder, OWN)
    local = GlobEnc(model, local="N_RES").decompose(ids[None]).local[0]
    with torch.no_grad():
        x = model.table(ids[None])
        for index, step in enumerate(model.steps):
            normed = step.first(x)
            query, key, value = (
                part[0].view(6, 4, 6) for part in step.qkv(normed).chunk(3, -1)
            )
            for i in range(6):
                for j in range(6):
                    taken = (i == j) * x[0, j]
                    for h in range(4):
                        logits = key[:, h] @ query[i, h] / 6**0.5
                        alpha = logits.softmax(0)[j]
                        block = step.out.weight[:, 6 * h : 6 * h + 6]
                        taken = taken + alpha * (block @ value[j, h])
                    torch.testing.assert_close(
                        local[index, i, j], taken.norm(), rtol=1e-10, atol=0
                    )
            x = step(x)
    assert GlobEnc(model).attribute(ids[None], 1).shape == (1, 6)


def test_attention_that_is_called_by_its_own_name(monkeypatch) -> None:
    """What an import copied is seen, too."""
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
    register_architecture(OwnEncoder, OWN)
    copied = torch.nn.functional.scaled_dot_product_attention

    def attend(self: OwnLayer, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4)
        return copied(*heads).transpose(1, 2).flatten(2)

    expected = GlobEnc(own()).attribute(sentence(6)[None], 1)
    monkeypatch.setattr(OwnLayer, "attend", attend)
    found = GlobEnc(own()).attribute(sentence(6)[None], 1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_check_lists_the_layers_that_are_not_rebuilt(monkeypatch) -> None:
    model = build("bert", torch.float32)
    changed = model.bert.encoder.layer[1].output
    changed.register_forward_hook(lambda _, args, output: output + args[1])
    monkeypatch.setattr("captum_globenc.cli._check_model", lambda name: None)
    monkeypatch.setattr("captum_globenc.cli._load_encoders", lambda name: [model])
    checked = run("--check", "broken")
    assert checked.exit_code == 1
    assert "2 of 3 layers are rebuilt" in checked.output
    # The second layer's own output, and what the third is given, are what they are.
    rows = [line for line in checked.output.splitlines() if "layer." in line]
    assert len(rows) == 3
    assert "its output" in rows[1]
    report = support.check_model(model)
    good = [fit.is_within_tolerance for fit in report.layers.values()]
    assert good == [True, False, True]
    with pytest.raises(ReconstructionError, match=r"layer\.1"):
        GlobEnc(model).attribute(sentence(6)[None], 1)


FAMILIES_TO_BREAK = ["bert", "distilbert", "xlm-roberta-xl", "llama", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES_TO_BREAK)
@pytest.mark.parametrize("change", ["delete", "rename", "residual", "norm"])
def test_a_model_that_changes_under_us(family: str, change: str) -> None:
    model = build(family)
    encoder = encoder_of(family, model)
    recipe = models.FAMILIES[family].recipe
    layer = encoder.get_submodule(recipe.layers)[1]
    owner_path, _, name = recipe.output.rpartition(".")
    owner = layer.get_submodule(owner_path)
    projection = getattr(owner, name)
    if change == "delete":
        delattr(owner, name)
    elif change == "rename":
        delattr(owner, name)
        owner.projection = projection
    elif change == "residual":
        inner = layer.forward

        def twice(states, *args, **kwargs):
            output = inner(states, *args, **kwargs)
            if isinstance(output, tuple):
                return (output[0] + states, *output[1:])
            return output + states

        layer.forward = twice
    else:
        path = recipe.norm1 or recipe.middle
        norm = layer.get_submodule(path)
        plain = norm.forward
        # The norm now takes the residual stream in twice.
        norm.forward = lambda states: plain(states) + states
        if recipe.middle:
            # Of a pre-LN layer: attention reads what is not normed, and adds it.
            out = projection.forward
            projection.forward = lambda states: out(states) + states
    ids, mask = padded([sentence(6), sentence(4)])
    with pytest.raises((ReconstructionError, UnsupportedModelError)):
        GlobEnc(model).attribute(ids, 1, mask)


def test_check_takes_models_as_they_were_saved(tmp_path: Path) -> None:
    small = {"num_layers": 2, "d_model": 24, "d_kv": 6, "d_ff": 36, "num_heads": 4}
    t.T5EncoderModel(t.T5Config(vocab_size=97, **small)).save_pretrained(tmp_path)
    if "relative bias" in FAMILIES["t5"].positions and not too_old("t5"):
        assert "T5, encoder: all 2 layers" in run("--check", str(tmp_path)).output
    towers = {k: v for k, v in SMALL.items() if k not in ("vocab_size", "num_labels")}
    config = t.CLIPConfig(
        text_config={**SMALL, "max_position_embeddings": 8},
        vision_config={**towers, "image_size": 12, "patch_size": 4},
    )
    t.CLIPModel(config).save_pretrained(tmp_path)
    checked = run("--check", str(tmp_path)).output
    assert "CLIP, text: all 2 layers" in checked
    assert "CLIP, vision: all 2 layers" in checked


def test_check_of_a_model_that_lacks_weights(tmp_path: Path) -> None:
    model = t.BertForSequenceClassification(t.BertConfig(**SMALL))
    weights = model.state_dict()
    name = "bert.encoder.layer.0.attention.output.dense.weight"
    del weights[name]
    model.save_pretrained(tmp_path, state_dict=weights)
    checked = run("--check", str(tmp_path))
    assert checked.exit_code == 2
    assert f"lacks weights: {name}" in checked.output


def too_old(family: str) -> bool:
    return Version(t.__version__) < Version(FAMILIES[family].since)


def test_every_layer_sees_the_same_tokens() -> None:
    model = build("bert")
    ids, mask = padded([sentence(6), sentence(4)])
    layer = model.bert.encoder.layer[1]
    inner = layer.forward
    layer.forward = lambda states, *args, **kwargs: inner(states)
    with pytest.raises(UnsupportedModelError, match="attends to other tokens than"):
        GlobEnc(model).attribute(ids, 1, mask)


def test_a_wrong_path_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
    model, ids = own(), sentence(6)[None]
    registration = register_architecture(OwnEncoder, replace(OWN, feed_forward="mlp.0"))
    with pytest.raises(UnsupportedModelError, match="feed_forward output has shape"):
        GlobEnc(model).attribute(ids, 1)
    registration.remove()
    register_architecture(OwnEncoder, replace(OWN, batch_first=False))
    with pytest.raises(UnsupportedModelError, match="6 by 1 tokens"):
        GlobEnc(model).attribute(ids, 1)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_tokens_of_every_family_meet_in_attention_only(family: str) -> None:
    model = build(family)
    report = support.check_model(model, torch.stack([sentence(7), sentence(7)]))
    assert all(fit.is_within_tolerance for fit in report.layers.values())
    assert not left_behind(model)


@pytest.mark.parametrize("where", ["first", "second", "attend"])
def test_tokens_that_meet_elsewhere(monkeypatch, where: str) -> None:
    """In front of attention, in the feed-forward part, in the order of the values."""
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
    register_architecture(OwnEncoder, OWN)
    model, ids = own(), torch.stack([sentence(6), sentence(6, seed=1)])
    assert all(
        fit.is_within_tolerance
        for fit in support.check_model(model, ids).layers.values()
    )
    for step in model.steps:
        if where == "attend":
            step.attend = functools.partial(mixed, step.attend)
        else:
            part = getattr(step, where)
            part.forward = functools.partial(mixed, part.forward)
    report = support.check_model(model, ids)
    assert not any(fit.is_within_tolerance for fit in report.layers.values())
    parts = {fit.part for fit in report.layers.values()}
    assert all("its tokens" in part or "its values" in part for part in parts)


def mixed(function, states: Tensor) -> Tensor:
    return function(states + states.roll(1, dims=1))


def test_one_example_without_a_batch() -> None:
    layer = nn.TransformerEncoderLayer(24, 4, 36, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    states = torch.randn(5, 24)
    with pytest.raises(InputError, match="pass a batch of one"):
        GlobEnc(encoder).attribute(states, token_index=0)
