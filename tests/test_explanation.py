from __future__ import annotations

import copy
import html
import io
import json
import re

import pytest
import torch
import transformers as t
from rich.cells import cell_len
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from captum_globenc import GlobEnc, InputError, UnsupportedModelError, demo
from captum_globenc.errors import NonFiniteActivationError
from captum_globenc.explanation import (
    ClassScore,
    Explanation,
    MethodScores,
    explain,
)
from captum_globenc.methods import METHODS, methods_named
from captum_globenc.visualization import to_html, to_terminal

TEXT = "A lovely film, though too long."


@pytest.fixture(scope="module")
def demo_model():
    return demo.load_classifier()


def tiny(tokenizer, **settings):
    config = t.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        **settings,
    )
    return t.BertForSequenceClassification(config).eval()


def encoded(tokenizer, text=TEXT):
    batch = tokenizer(text, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


def gradient(model, ids, mask, target):
    """The word embeddings and the gradient of one logit, without Captum."""
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, attention_mask=mask).logits
    return embeddings, torch.autograd.grad(logits[0, target], embeddings)[0]


# Methods


def scores_of(method, model, ids, mask, target, tokenizer):
    scorer = method.build(model, tokenizer)
    return scorer(ids, mask, torch.tensor([target]))[0]


def test_globenc_is_the_public_class(demo_model) -> None:
    model, tokenizer = demo_model
    ids, mask = encoded(tokenizer)
    for local in ("N_ENC", "W"):
        method = methods_named("globenc", local=local)["globenc"]
        expected = GlobEnc(model, local=local).attribute(
            ids, additional_forward_args=(mask,)
        )
        assert torch.equal(
            scores_of(method, model, ids, mask, 1, tokenizer), expected[0]
        )


def test_saliency_is_the_sum_of_absolute_gradients(demo_model) -> None:
    model, tokenizer = demo_model
    ids, mask = encoded(tokenizer)
    _, expected = gradient(model, ids, mask, 1)
    scores = scores_of(METHODS["saliency"], model, ids, mask, 1, tokenizer)
    torch.testing.assert_close(scores, expected.abs().sum(-1)[0])


def test_input_x_gradient_is_the_norm_of_the_product(demo_model) -> None:
    model, tokenizer = demo_model
    ids, mask = encoded(tokenizer)
    embeddings, slope = gradient(model, ids, mask, 0)
    scores = scores_of(METHODS["input_x_gradient"], model, ids, mask, 0, tokenizer)
    torch.testing.assert_close(scores, (embeddings * slope).norm(dim=-1)[0])


def test_integrated_gradients_add_up_from_the_padded_baseline(demo_model) -> None:
    model, tokenizer = demo_model
    ids, mask = encoded(tokenizer)
    scores = scores_of(METHODS["integrated_gradients"], model, ids, mask, 1, tokenizer)
    blank = torch.full_like(ids, tokenizer.pad_token_id)
    blank[0, 0], blank[0, -1] = ids[0, 0], ids[0, -1]
    with torch.no_grad():
        change = model(ids, mask).logits - model(blank, mask).logits
    assert scores.sum() == pytest.approx(change[0, 1].item(), rel=0.02)
    # [CLS] and [SEP] are the same in the baseline.
    assert scores[0] == scores[-1] == 0
    assert (scores < 0).any()
    assert (scores > 0).any()


def test_integrated_gradients_need_a_pad_token(demo_model) -> None:
    model, tokenizer = demo_model
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    with pytest.raises(InputError, match="needs a pad token"):
        scores_of(METHODS["integrated_gradients"], model, *encoded(tokenizer), 0, bare)


def test_methods_come_in_the_order_asked_for_and_once() -> None:
    assert list(methods_named(["saliency", "globenc", "saliency"])) == [
        "saliency",
        "globenc",
    ]


def test_no_method() -> None:
    with pytest.raises(InputError, match="no method asked for; known: globenc"):
        methods_named([])


# Explanations


def test_explanation_of_the_default_methods(demo_model) -> None:
    model, tokenizer = demo_model
    explanation = explain(model, tokenizer, TEXT)
    ids, mask = encoded(tokenizer)
    with torch.no_grad():
        probabilities = model(ids, mask).logits.softmax(-1)[0]
    best = int(probabilities.argmax())
    assert explanation.predicted == explanation.target
    assert explanation.predicted.index == best
    assert explanation.predicted.label == model.config.id2label[best]
    assert explanation.predicted.probability == pytest.approx(probabilities[best])
    assert explanation.tokens == tuple(tokenizer.convert_ids_to_tokens(ids[0]))
    assert not any(explanation.unknown)
    assert explanation.special == (True, *[False] * (ids.shape[1] - 2), True)
    assert explanation.model == "demo_classifier"
    assert explanation.dropped_tokens == 0
    names = [method.name for method in explanation.methods]
    assert names == ["globenc", "attnlrp", "decompx", "integrated_gradients"]
    for method in explanation.methods:
        scores = scores_of(METHODS[method.name], model, ids, mask, best, tokenizer)
        assert method.scores == pytest.approx(scores.tolist())
        assert method.seconds > 0


def test_model_is_left_as_it_was_found(demo_model) -> None:
    _, tokenizer = demo_model
    model = tiny(tokenizer)
    quiet = explain(model, tokenizer, TEXT).to_dict()
    model.train()
    model.bert.embeddings.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    # In evaluation mode also where the model is not: the same scores, no dropout.
    loud = explain(model, tokenizer, TEXT).to_dict()
    assert [m["scores"] for m in loud["methods"]] == [
        m["scores"] for m in quiet["methods"]
    ]
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert all(torch.equal(model.state_dict()[n], weights[n]) for n in weights)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("target", ["negative", "NEGATIVE", "0", 0])
def test_target_by_label_or_index(demo_model, target) -> None:
    explanation = explain(*demo_model, "A lovely film.", "saliency", target=target)
    assert (explanation.target.index, explanation.target.label) == (0, "negative")
    assert explanation.predicted.label == "positive"
    assert explanation.target.probability < 0.5 < explanation.predicted.probability


def test_signed_scores_turn_with_the_target(demo_model) -> None:
    by_target = [
        explain(*demo_model, "A lovely film.", "integrated_gradients", target=target)
        for target in (0, 1)
    ]
    word = by_target[0].tokens.index("lovely")
    against, towards = (e.methods[0].scores[word] for e in by_target)
    assert against < 0 < towards


def test_label_comes_before_index(demo_model) -> None:
    _, tokenizer = demo_model
    model = tiny(tokenizer, id2label={0: "2", 1: "1", 2: "one", 3: "One"})
    assert explain(model, tokenizer, TEXT, "globenc", target="2").target.index == 0
    assert explain(model, tokenizer, TEXT, "globenc", target="3").target.label == "One"
    assert explain(model, tokenizer, TEXT, "globenc", target="one").target.index == 2
    # "ONE" could be either of two labels.
    with pytest.raises(InputError, match="unknown label 'ONE'"):
        explain(model, tokenizer, TEXT, "globenc", target="ONE")


def test_many_labels_are_not_all_listed(demo_model) -> None:
    _, tokenizer = demo_model
    model = tiny(tokenizer, num_labels=150)
    with pytest.raises(InputError, match=r"19 LABEL_19, \.\.\.") as caught:
        explain(model, tokenizer, TEXT, target="none")
    assert "LABEL_20" not in str(caught.value)


def test_multi_label_probabilities_are_sigmoids(demo_model) -> None:
    _, tokenizer = demo_model
    model = tiny(tokenizer, num_labels=3, problem_type="multi_label_classification")
    explanation = explain(model, tokenizer, TEXT, "globenc", target=2)
    for output in (explanation.target, explanation.predicted):
        expected = torch.tensor(output.logit).sigmoid().item()
        assert output.probability == pytest.approx(expected)


def test_regression_has_a_value_and_no_probability(demo_model) -> None:
    _, tokenizer = demo_model
    model = tiny(tokenizer, num_labels=1)
    explanation = explain(model, tokenizer, TEXT)
    with torch.no_grad():
        value = model(*encoded(tokenizer)).logits.item()
    assert explanation.predicted.probability is None
    assert explanation.predicted.logit == pytest.approx(value, abs=1e-6)
    assert f"LABEL_0 = {value:.4g}" in printed(explanation)


def test_to_dict_is_json(demo_model) -> None:
    explanation = explain(*demo_model, 'é "q" 😀')
    parsed = json.loads(json.dumps(explanation.to_dict(), allow_nan=False))
    assert parsed["text"] == 'é "q" 😀'
    assert parsed["tokens"] == list(explanation.tokens)
    assert parsed["predicted"]["label"] in ("negative", "positive")
    assert [len(m["scores"]) for m in parsed["methods"]] == [len(parsed["tokens"])] * 4


def test_truncation_only_when_asked(demo_model) -> None:
    text = "long " * 300
    with pytest.raises(InputError, match=r"302 tokens .* positions for 256"):
        explain(*demo_model, text)
    explanation = explain(*demo_model, text, "globenc", truncate=True)
    assert len(explanation.tokens) == 256
    assert explanation.tokens[-1] == "[SEP]"
    assert explanation.dropped_tokens == 46
    assert "256 of 302 tokens" in printed(explanation)
    assert "256 of 302 tokens" in to_html(explanation)


def test_text_that_just_fits(demo_model) -> None:
    explanation = explain(*demo_model, "long " * 254, "globenc")
    assert len(explanation.tokens) == 256
    assert explanation.dropped_tokens == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"text is empty \(''\)"),
        (" \n ", r"text is empty \(' \\n '\)"),
        ("\x00", r"no token in the text '\\x00'"),
        ("a \udcff", r"not valid Unicode: it holds '\\udcff'"),
        (["a"], r"text must be a str, got list: \['a'\]"),
    ],
)
def test_text_without_anything_to_explain(demo_model, text, message) -> None:
    with pytest.raises(InputError, match=message):
        explain(*demo_model, text)


def test_unsupported_model(demo_model) -> None:
    _, tokenizer = demo_model
    config = t.FNetConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1)
    with pytest.raises(UnsupportedModelError, match="model type 'fnet'"):
        explain(t.FNetForSequenceClassification(config), tokenizer, TEXT)


def test_model_without_sequence_classification(demo_model) -> None:
    model, tokenizer = demo_model
    with pytest.raises(InputError, match="BertModel is no sequence classifier"):
        explain(model.bert, tokenizer, TEXT)
    tagger = t.BertForTokenClassification(tiny(tokenizer).config)
    with pytest.raises(InputError, match="is no sequence classifier"):
        explain(tagger, tokenizer, TEXT)


def test_tokenizer_of_another_model(demo_model) -> None:
    _, tokenizer = demo_model
    model = tiny(tokenizer)
    model.resize_token_embeddings(10)
    with pytest.raises(InputError, match="tokenizer belongs to another model"):
        explain(model, tokenizer, TEXT)


def test_infinite_output(demo_model) -> None:
    _, tokenizer = demo_model
    model = tiny(tokenizer)
    with torch.no_grad():
        model.classifier.bias.fill_(float("inf"))
    with pytest.raises(NonFiniteActivationError, match="NaN or infinity"):
        explain(model, tokenizer, TEXT)


def test_byte_level_tokens_are_readable() -> None:
    tokenizer = byte_level_tokenizer(["lovely"])
    config = t.RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=42,
        pad_token_id=1,
    )
    model = t.RobertaForSequenceClassification(config).eval()
    explanation = explain(model, tokenizer, "a lovely é", ["globenc", "saliency"])
    # é is two bytes, and two tokens; the open box is the blank before it.
    assert explanation.tokens == ("<s>", "a", "lovely", "␣", "é", "é", "</s>")
    assert explain(model, tokenizer, "a" * 38, "globenc").tokens[1:-1] == ("a",) * 38
    with pytest.raises(InputError, match=r"41 tokens .* positions for 40"):
        explain(model, tokenizer, "a" * 39)


def byte_level_tokenizer(words):
    """RoBERTa's kind: bytes as letters, and each of the words as one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    pieces, merges = [*specials, *alphabet], []
    for word in words:
        whole = "Ġ"
        for letter in word:
            merges.append((whole, letter))
            whole += letter
            pieces.append(whole)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return t.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        cls_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        sep_token="</s>",
        unk_token="<unk>",
    )


# How it looks


def made(tokens, scores, text="text") -> Explanation:
    output = ClassScore(1, "positive", 2.5, 0.924)
    return Explanation(
        text=text,
        model="model",
        tokens=tuple(tokens),
        special=(False,) * len(tokens),
        unknown=(False,) * len(tokens),
        dropped_tokens=0,
        predicted=output,
        target=output,
        local="N_ENC",
        methods=(MethodScores("saliency", tuple(scores), 0.5),),
    )


def printed(explanation, width=80, colour=None) -> str:
    console = Console(
        width=width,
        file=io.StringIO(),
        color_system=colour,
        force_terminal=colour is not None,
        _environ={},
    )
    console.print(to_terminal(explanation))
    return console.file.getvalue()


def numbers_below(lines, token):
    """The number that stands below a token."""
    (row,) = [i for i, line in enumerate(lines) if re.search(rf"\b{token}\b", line)]
    start = lines[row].index(token)
    return lines[row + 1][start:].split(" ")[0]


def test_terminal_without_colour() -> None:
    explanation = made(["[CLS]", "good", "bad", "the"], [0.5, 4.0, -2.0, 0.1])
    lines = printed(explanation).splitlines()
    assert "positive (92.4%)" in lines[0]
    assert "saliency  0.50 s" in lines
    assert numbers_below(lines, "good") == "100"
    assert numbers_below(lines, "bad") == "-50"
    assert numbers_below(lines, "the") == ""
    assert "\x1b" not in "".join(lines)


def test_terminal_colours() -> None:
    text = printed(
        made(["good", "half", "bad", "the"], [4.0, 2.0, -4.0, 0.1]), colour="truecolor"
    )

    def ground(token):
        found = re.search(rf"48;2;(\d+);(\d+);(\d+)m{token}\x1b", text)
        return found and tuple(map(int, found.groups()))

    assert ground("good") == (0, 90, 220)
    assert ground("bad") == (190, 80, 0)
    assert ground("half") == (59, 104, 169)
    assert ground("the") is None


def test_terminal_names_the_target_where_it_is_not_the_prediction(demo_model) -> None:
    explanation = explain(*demo_model, "A lovely film.", "globenc", target="negative")
    assert "Explained: negative (0." in printed(explanation)
    assert "globenc (N_ENC)" in printed(explanation)


@pytest.mark.parametrize("count", [8, 40, 120])
def test_terminal_is_compact_and_fits(count) -> None:
    tokens = [("世界", "film", "unbelievably", "a")[i % 4] for i in range(count)]
    lines = printed(made(tokens, range(1, count + 1))).splitlines()
    assert max(cell_len(line) for line in lines) <= 80
    assert sum(line.count("film") for line in lines) == count // 4
    # Two lines for each row of tokens, and few besides.
    assert len(lines) <= 2 * (count * 6.5 // 80 + 2) + 6


def test_terminal_cuts_a_token_that_is_wider_than_it() -> None:
    lines = printed(made(["a", "b" * 200, "c"], [1, 2, 3]), width=30).splitlines()
    assert max(map(len, lines)) <= 30
    assert any(line.startswith("b" * 29 + "…") for line in lines)


def test_terminal_takes_tokens_literally() -> None:
    explanation = made(["[bold]", "[/]", "\x1b[31m", ":smile:"], [1, 2, 3, 4])
    text = printed(explanation)
    assert "[bold]" in text
    assert "[/]" in text
    assert ":smile:" in text
    assert "\x1b" not in text
    assert "�[31m" in text


def test_terminal_keeps_right_to_left_words_over_their_numbers() -> None:
    lines = printed(made(["שלם", "דבר", "!"], [1.0, 2.0, 4.0])).splitlines()
    (row,) = [i for i, line in enumerate(lines) if "שלם" in line]
    assert lines[row].rstrip() == "\u200eשלם \u200eדבר !"
    assert lines[row + 1].rstrip() == "25  50  100"


def test_scores_that_are_all_zero() -> None:
    text = printed(made(["a", "b"], [0.0, 0.0]))
    assert re.search(r"^a b *$", text, re.MULTILINE)
    assert "--strength: 0.000" in to_html(made(["a", "b"], [0.0, 0.0]))


HOSTILE = "<script>alert(1)</script> & \"quotes\" 'single'"


def test_page_escapes_everything() -> None:
    page = to_html(made([HOSTILE, "b"], [1.0, -2.0], text=HOSTILE))
    assert "<script" not in page
    assert "alert(1)" in page
    titles = re.findall(r'title="([^"]*)"', page)
    assert html.unescape(titles[0]) == f"{HOSTILE}: 1"
    assert html.unescape(titles[1]) == "b: -2"


def test_page_stands_alone() -> None:
    page = to_html(made(["a", "b"], [1.0, -2.0]))
    assert not re.search(r"https?:|src=|href=|@import|url\(", page)
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page
    assert re.search(r'class="token negative" style="--strength: 1.000"', page)
    assert re.search(r'class="token positive" style="--strength: 0.500"', page)
    assert re.search(r"<b[^>]*>b</b><small>-100</small>", page)


def test_decompositions_only_when_asked(demo_model) -> None:
    model, tokenizer = demo_model
    methods = ["saliency", "globenc", "N_RES", "attention_rollout", "W_FIXED_RES"]
    assert explain(model, tokenizer, TEXT, methods).decompositions == {}
    explanation = explain(model, tokenizer, TEXT, methods, decompose=True)
    assert list(explanation.decompositions) == ["N_ENC", "N_RES", "W_FIXED_RES"]
    assert explanation.methods[0].local is None
    for method in explanation.methods[1:]:
        decomposition = explanation.decompositions[method.local]
        assert method.scores == pytest.approx(
            decomposition.rollout()[0, 0].tolist(), rel=1e-4
        )
    assert "decompositions" not in explanation.to_dict()


@pytest.mark.parametrize(
    ("text", "direction"),
    [("12 film שלם", "ltr"), ("«שלם» film", "rtl"), ("1", "ltr")],
)
def test_page_follows_the_direction_of_the_text(text, direction) -> None:
    page = to_html(made(["[CLS]", "x"], [1.0, 2.0], text=text))
    assert f'<p class="tokens" dir="{direction}"' in page
    assert '<h1 dir="auto"' in page


@pytest.mark.parametrize(
    ("names", "label"), [(None, "1"), ({"0": "no", "1": "yes"}, "yes")], ids=str
)
def test_labels_without_names_or_with_keys_of_text(names, label) -> None:
    model, tokenizer = demo.load_classifier()
    model.config.id2label = names
    assert (
        explain(model, tokenizer, "A film.", "random", target=1).target.label == label
    )
