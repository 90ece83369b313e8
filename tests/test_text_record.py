"""Records for Captum's visualize_text, drawn by Captum itself."""

from __future__ import annotations

import re

import pytest
import torch
from captum.attr import visualization

from captum_globenc import GlobEnc, InputError, demo
from captum_globenc.visualization import text_record
from tests.conftest import left_behind

TEXTS = ["A <script>lovely</script> film & more.", "Dull."]


@pytest.fixture(scope="module")
def demo_model():
    return demo.load_classifier()


@pytest.fixture
def batch(demo_model):
    return demo_model[1](TEXTS, padding=True, return_tensors="pt")


def scored(model, batch):
    return GlobEnc(model).attribute(
        batch["input_ids"], additional_forward_args=(batch["attention_mask"],)
    )


def records(demo_model, batch, **options):
    rows = zip(
        batch["input_ids"], batch["attention_mask"], scored(demo_model[0], batch)
    )
    return [
        text_record(*demo_model, ids, scores, attention_mask=mask, **options)
        for ids, mask, scores in rows
    ]


def test_what_is_in_a_record(demo_model, batch) -> None:
    model, _ = demo_model
    model.train()
    with torch.no_grad():
        probabilities = model.eval()(**batch).logits.softmax(-1)
    scores = scored(model, batch)
    model.train()
    first, second = records(demo_model, batch, target=0, true_class="positive")
    assert model.training
    model.eval()
    assert first.raw_input_ids[:5] == ["[CLS]", "a", "&lt;", "script", "&gt;"]
    assert second.raw_input_ids == ["[CLS]", "dull", ".", "[SEP]"]
    for row, record in enumerate((first, second)):
        tokens = int(batch["attention_mask"][row].sum())
        expected = scores[row, :tokens] / scores[row].max()
        torch.testing.assert_close(record.word_attributions, expected)
        assert len(record.raw_input_ids) == tokens
        best = int(probabilities[row].argmax())
        assert record.pred_class == model.config.id2label[best]
        assert record.pred_prob == pytest.approx(float(probabilities[row, best]))
        assert (record.attr_class, record.true_class) == ("negative", "positive")
        assert record.attr_score == pytest.approx(float(scores[row].sum()))
        assert record.convergence_score == 0
    assert not left_behind(model)


def test_captum_draws_it(demo_model, batch, capsys) -> None:
    page = visualization.visualize_text(records(demo_model, batch)).data
    assert "<script" not in page
    assert "&lt;" in page
    marks = re.findall(
        r"hsl\((\d+), \d+%, (\d+)%\).*?<font[^>]*> (.*?)\s*</font>", page, re.S
    )
    lightness = {word: int(value) for hue, value, word in marks if hue == "120"}
    assert {"film", "&amp;", "dull"} <= lightness.keys()
    # The strongest token of each sentence is the darkest.
    for record in records(demo_model, batch):
        strongest = record.raw_input_ids[int(record.word_attributions.argmax())]
        assert lightness[strongest] == 50


def test_labels_are_escaped(demo_model, batch) -> None:
    model, _ = demo_model
    before = model.config.id2label
    try:
        model.config.id2label = {0: "<b>bad</b>", 1: "good & fine"}
        first, second = records(demo_model, batch, true_class="<b>bad</b>")
    finally:
        model.config.id2label = before
    assert first.true_class == "&lt;b&gt;bad&lt;/b&gt;"
    assert {first.pred_class, second.pred_class} <= {
        "&lt;b&gt;bad&lt;/b&gt;",
        "good &amp; fine",
    }


def test_one_example_with_a_batch_dimension(demo_model) -> None:
    model, tokenizer = demo_model
    encoded = tokenizer("A lovely film.", return_tensors="pt")
    scores = torch.linspace(-2, 1, 6)
    record = text_record(
        model,
        tokenizer,
        encoded["input_ids"],
        scores,
        token_type_ids=torch.zeros(1, 6, dtype=torch.long),
    )
    torch.testing.assert_close(record.word_attributions, scores / 2)
    assert record.true_class == "\N{EN DASH}"
    assert record.attr_class == record.pred_class == "positive"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.ones(5)}, "input_ids 4, scores 5"),
        ({"scores": torch.ones(2, 4)}, r"scores must be .* one example.*\(2, 4\)"),
        ({"scores": [1.0] * 4}, "got list"),
        ({"scores": torch.tensor([1.0, 2.0, float("nan"), 1.0])}, "finite numbers"),
        ({"attention_mask": torch.zeros(4)}, "at least one attended token"),
        ({"input_ids": torch.ones(2, 4).long()}, "call text_record row by row"),
        ({"target": "positve"}, "Did you mean 'positive'"),
        ({"true_class": 7}, "target 7 is outside the model's 2 labels"),
    ],
)
def test_what_cannot_be_a_record(demo_model, change, message) -> None:
    model, tokenizer = demo_model
    given = {"input_ids": torch.tensor([2, 30, 40, 3]), "scores": torch.ones(4)}
    with pytest.raises(InputError, match=message):
        text_record(model, tokenizer, **{**given, **change})


def test_numbers_are_indices_and_names_are_labels(demo_model) -> None:
    model, tokenizer = demo_model
    given = (torch.tensor([2, 30, 40, 3]), torch.ones(4))
    before = model.config.id2label
    try:
        model.config.id2label = {0: "1", 1: "0"}
        by_index = text_record(
            model, tokenizer, *given, target=torch.tensor(1), true_class=-2
        )
        by_name = text_record(model, tokenizer, *given, target="1", true_class="0")
    finally:
        model.config.id2label = before
    assert (by_index.attr_class, by_index.true_class) == ("0", "1")
    assert (by_name.attr_class, by_name.true_class) == ("1", "0")
    with pytest.raises(InputError, match=r"got float: 0\.5"):
        text_record(model, tokenizer, *given, target=0.5)


def test_a_wrapper_is_no_classifier(demo_model) -> None:
    wrapper = torch.nn.Sequential(demo_model[0])
    with pytest.raises(InputError, match="got Sequential: pass the model inside"):
        text_record(wrapper, demo_model[1], torch.tensor([2, 3]), torch.ones(2))
