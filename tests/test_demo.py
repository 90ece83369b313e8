"""The embedded classifier, and the paper's claim on it."""

from __future__ import annotations

from importlib.resources import files

import pytest
import torch
from scipy.stats import spearmanr

from captum_globenc import GlobEnc, demo
from tests.conftest import left_behind


@pytest.fixture(scope="module")
def classifier():
    return demo.load_classifier()


def test_size_and_shape(classifier) -> None:
    model, tokenizer = classifier
    folder = files("captum_globenc") / "data" / "demo_classifier"
    size = sum(len(file.read_bytes()) for file in folder.iterdir())
    assert size <= 16_000_000
    assert model.config.num_hidden_layers >= 3
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.dtype == torch.float32
    assert not model.training
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 256
    assert len(tokenizer) == model.config.vocab_size
    assert (folder / "NOTICE.md").read_text(encoding="utf-8").count("Licen") >= 2


def test_the_tokenizer_spells_what_it_does_not_know(classifier) -> None:
    _, tokenizer = classifier
    ids = tokenizer("Zyzzyva's film, 2026!")["input_ids"]
    assert tokenizer.unk_token_id not in ids
    spelt = tokenizer.decode(ids, skip_special_tokens=True)
    assert spelt.replace(" ", "") == "zyzzyva'sfilm,2026!"


def test_held_out_accuracy(classifier) -> None:
    """On the 200 that ship; the docs state the accuracy on all 1,000."""
    model, tokenizer = classifier
    sentences = demo.held_out_sentences()
    assert len(sentences) == len({text for text, _ in sentences}) == 200
    texts, labels = zip(*sentences)
    batch = tokenizer(list(texts), padding=True, return_tensors="pt")
    with torch.no_grad():
        predicted = model(**batch).logits.argmax(-1)
    accuracy = (predicted == torch.tensor(labels)).double().mean()
    assert accuracy >= 0.82


def test_rank_correlation_with_gradient_saliency(classifier) -> None:
    """Spearman's ρ with ‖∇ e ⊙ e‖₂ at the word embeddings, mean of 100 sentences."""
    model, tokenizer = classifier
    methods = {
        name: GlobEnc(model, local=name)
        for name in ("N_ENC", "N_RES_LN", "W", "W_FIXED_RES")
    }
    correlations: dict[str, list[float]] = {name: [] for name in methods}
    for text, _ in demo.held_out_sentences()[:100]:
        batch = tokenizer(text, return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embeddings, attention_mask=mask).logits
        predicted = int(logits.argmax())
        (gradient,) = torch.autograd.grad(logits[0, predicted], embeddings)
        reference = (gradient * embeddings).norm(dim=-1)[0].detach()
        for name, method in methods.items():
            scores = method.attribute(ids, predicted, (mask,))[0]
            correlations[name].append(spearmanr(scores, reference).statistic)
    mean = {name: sum(values) / len(values) for name, values in correlations.items()}
    assert mean["N_ENC"] >= 0.7
    assert mean["N_ENC"] > max(mean["N_RES_LN"], mean["W"], mean["W_FIXED_RES"])
    assert not left_behind(model)


def test_a_batch_equals_single_sentences_on_a_real_model(classifier) -> None:
    model, tokenizer = classifier
    texts = [text for text, _ in demo.held_out_sentences()[:16]]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    globenc = GlobEnc(model)
    together = globenc.attribute(batch["input_ids"], 1, (batch["attention_mask"],))
    for row, text in enumerate(texts):
        single = tokenizer(text, return_tensors="pt")["input_ids"]
        alone = globenc.attribute(single, target=1)
        torch.testing.assert_close(
            together[row, : single.shape[1]], alone[0], rtol=1e-4, atol=0
        )
