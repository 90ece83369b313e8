"""Models as users have them: wrapped, adapted, compiled, checkpointed, half precise."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Normalize,
    Pooling,
    Transformer,
)
from torch import Tensor, nn

from captum_globenc import GlobEnc, LayerGlobEnc, demo
from captum_globenc.recording.outputs import output_tensor
from tests.conftest import left_behind
from tests.models import FAMILIES, build, encoder_of, padded, sentence

# PEFT asks transformers for it by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
EXACT = {"rtol": 1e-12, "atol": 0}
CLOSE = {"rtol": 1e-9, "atol": 1e-14}


def batch() -> tuple[Tensor, Tensor]:
    return padded([sentence(8), sentence(5)])


def scores_of(forward, **options: object) -> Tensor:
    ids, mask = batch()
    return GlobEnc(forward).attribute(ids, 1, mask, **options)


@pytest.fixture
def no_compiled_code() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "llama", "t5"])
@pytest.mark.usefixtures("no_compiled_code")
def test_compiled(family: str) -> None:
    if family not in FAMILIES:
        pytest.skip("not in this release of transformers")
    expected = scores_of(build(family))
    ids, mask = batch()
    model = build(family)
    compiled = torch.compile(model, backend="eager")
    plain = output_tensor(compiled(ids, mask))
    torch.testing.assert_close(scores_of(compiled), expected, **EXACT)
    in_place = build(family)
    in_place.compile(backend="eager")
    in_place(ids, mask)
    torch.testing.assert_close(scores_of(in_place), expected, **EXACT)
    # What was compiled still serves.
    torch.testing.assert_close(output_tensor(compiled(ids, mask)), plain, **EXACT)
    assert not left_behind(model)


@pytest.mark.usefixtures("no_compiled_code")
def test_a_compiled_encoder_inside_a_model() -> None:
    expected = scores_of(build("bert"))
    model = build("bert")
    model.bert = torch.compile(model.bert, backend="eager")
    model(*batch())
    torch.testing.assert_close(scores_of(model), expected, **EXACT)


def test_data_parallel() -> None:
    model = build("roberta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parallel = nn.DataParallel(model)
    torch.testing.assert_close(scores_of(parallel), scores_of(model), **EXACT)
    ids, mask = batch()
    layer = parallel.module.roberta.embeddings
    found = LayerGlobEnc(parallel, layer).attribute(ids, 1, mask)
    torch.testing.assert_close(found.sum(-1), scores_of(model), **CLOSE)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["bert", "xlm-roberta-xl", "llama"])
def test_gradient_checkpointing(family: str, reentrant: bool) -> None:
    model = build(family)
    expected = scores_of(model)
    # Its name changes from one release of transformers to the next.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": reentrant})
    own = left_behind(model)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(scores_of(model), expected, **EXACT)
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert model.training
    assert left_behind(model) == own


@pytest.mark.parametrize(
    "part", ["bert.encoder", "bert.encoder.layer.1", "bert.encoder.layer.1.attention"]
)
@pytest.mark.usefixtures("no_compiled_code")
def test_compiled_parts(part: str) -> None:
    expected = scores_of(build("bert"))
    model = build("bert")
    compiled = torch.compile(model.get_submodule(part), backend="eager")
    model.set_submodule(part, compiled)
    torch.testing.assert_close(scores_of(model), expected, **EXACT)


def test_adapters_on_norms_and_embeddings() -> None:
    """PEFT trains copies of whole modules; the one that is active counts."""
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        target_modules=["query", "word_embeddings"],
        modules_to_save=["LayerNorm"],
    )
    model = peft.get_peft_model(build("bert"), config).double().eval()
    expected = scores_of(build("bert"))
    torch.testing.assert_close(scores_of(model), expected, **CLOSE)
    changed = build("bert")
    for name, parameter in changed.named_parameters():
        if "encoder" in name and "LayerNorm" in name:
            parameter.data.mul_(1.5)
    for name, parameter in model.named_parameters():
        if "encoder" in name and "modules_to_save" in name:
            parameter.data.mul_(1.5)
    torch.testing.assert_close(scores_of(model), scores_of(changed), **CLOSE)
    with model.disable_adapter():
        torch.testing.assert_close(scores_of(model), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
def test_maps_quantised_to_half_precision() -> None:
    model = build("bert", torch.float32)
    expected = scores_of(model)
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.float16)
    torch.testing.assert_close(scores_of(small), expected, rtol=1e-2, atol=1e-4)


def adapted(family: str, targets: list[str]) -> peft.PeftModel:
    torch.manual_seed(4)
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=3, lora_alpha=6, target_modules=targets, lora_dropout=0.1
    )
    model = peft.get_peft_model(build(family), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    return model.double().eval()


LORA = [
    ("bert", ["query", "value"]),
    ("bert", ["query", "key", "value", "dense"]),
    ("distilbert", ["q_lin", "v_lin", "out_lin", "lin2"]),
    ("llama", ["q_proj", "v_proj", "o_proj", "down_proj"]),
    ("gpt2", ["c_attn", "c_proj"]),
]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(("family", "targets"), LORA, ids=str)
def test_lora(family: str, targets: list[str]) -> None:
    """An adapter counts as if it were merged into the weights."""
    model = adapted(family, targets)
    found = scores_of(model)
    with model.disable_adapter():
        plain = scores_of(model)
    torch.testing.assert_close(plain, scores_of(build(family)), **CLOSE)
    assert (found - plain).abs().max() > 1e-3
    assert not left_behind(model)
    inner = model.base_model.model
    torch.testing.assert_close(scores_of(inner), found, **EXACT)
    merged = model.merge_and_unload()
    torch.testing.assert_close(scores_of(merged), found, **CLOSE)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_an_adapter_that_is_switched_between_runs() -> None:
    """Weights that were kept from the last run are not used for another adapter."""
    model = adapted("bert", ["value", "dense"])
    globenc = GlobEnc(model)
    ids, mask = batch()
    first = globenc.attribute(ids, 1, mask)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-1)
    second = globenc.attribute(ids, 1, mask)
    torch.testing.assert_close(second, scores_of(model), **EXACT)
    assert not torch.allclose(first, second)
    with model.disable_adapter():
        torch.testing.assert_close(
            globenc.attribute(ids, 1, mask), scores_of(build("bert")), **CLOSE
        )


def sentence_model(pooling: str, folder: Path) -> SentenceTransformer:
    classifier, tokenizer = demo.load_classifier()
    classifier.bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformer = Transformer(str(folder))
    pooled = Pooling(transformer.get_embedding_dimension(), pooling)
    return SentenceTransformer(modules=[transformer, pooled, Normalize()], device="cpu")


@pytest.mark.parametrize("pooling", ["cls", "mean", "lasttoken"])
def test_sentence_transformers(pooling: str, tmp_path: Path) -> None:
    """A similarity of two texts is explained from the tokens that are pooled."""
    model = sentence_model(pooling, tmp_path)
    texts = ["A lovely film, full of wit.", "Dull."]
    features = model.tokenize(texts)
    ids, mask = features["input_ids"], features["attention_mask"]
    other = model.encode(["What a film!"], convert_to_tensor=True)

    def similarity(ids: Tensor, mask: Tensor) -> Tensor:
        output = model({"input_ids": ids, "attention_mask": mask})
        return output["sentence_embedding"] @ other.T

    scores = GlobEnc(similarity).attribute(ids, 0, mask)
    encoder = model[0].auto_model
    read = {"cls": 0, "mean": "mean", "lasttoken": mask.sum(1) - 1}[pooling]

    def base(ids: Tensor, mask: Tensor) -> Tensor:
        return encoder(input_ids=ids, attention_mask=mask).last_hidden_state

    expected = GlobEnc(base).attribute(ids, None, mask, token_index=read)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
    assert not scores[mask == 0].any()


def test_a_pooling_by_maximum(tmp_path: Path) -> None:
    """Each token counts by the dimensions in which it is the largest."""
    model = sentence_model("max", tmp_path)
    features = model.tokenize(["A lovely film, full of wit."])
    ids, mask = features["input_ids"], features["attention_mask"]

    def embed(ids: Tensor, mask: Tensor) -> Tensor:
        return model({"input_ids": ids, "attention_mask": mask})["sentence_embedding"]

    states = model[0].auto_model(ids, attention_mask=mask).last_hidden_state
    states = states.detach().requires_grad_()
    pooled = nn.functional.normalize(states.max(1).values, dim=-1)
    (gradient,) = torch.autograd.grad(pooled[0, 0], states)
    weights = gradient.norm(dim=-1) / gradient.norm(dim=-1).sum()
    rollout = GlobEnc(model[0].auto_model).decompose(ids, mask).rollout()
    scores = GlobEnc(embed).attribute(ids, 0, mask)
    torch.testing.assert_close(scores, (weights[:, None] @ rollout)[:, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    ids, mask = batch()
    scores = GlobEnc(build(family, dtype)).attribute(ids, 1, mask)
    assert scores.dtype == dtype
    assert not scores[mask == 0].any()
    precise = GlobEnc(build(family, torch.float32)).attribute(ids, 1, mask)
    error = (scores.float() - precise).norm() / precise.norm()
    assert error < (0.05 if dtype == torch.float16 else 0.25)


@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
def test_autocast(family: str) -> None:
    if family not in FAMILIES:
        pytest.skip("not in this release of transformers")
    model = build(family, torch.float32)
    expected = scores_of(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = scores_of(model)
    error = (found - expected).norm() / expected.norm()
    assert error < 0.25


def test_a_prefix_of_a_module_of_the_users() -> None:
    class Lightning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.ModuleDict({"backbone": build("electra")})

        def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net["backbone"](ids, attention_mask=mask).logits}

    expected = scores_of(build("electra"))
    torch.testing.assert_close(scores_of(Lightning().eval()), expected, **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_in_training_mode_stay_in_it(family: str) -> None:
    """Dropout is off while the encoder is explained, and on again after it."""
    model = build(family)
    expected = scores_of(model)
    encoder_of(family, model).train()
    torch.testing.assert_close(scores_of(model), expected, **EXACT)
    assert encoder_of(family, model).training
