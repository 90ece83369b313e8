"""The benchmark as a whole: methods, records, resuming, processes, errors."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import time

import pytest
import torch
from captum.attr import (
    FeatureAblation,
    GradientShap,
    InputXGradient,
    IntegratedGradients,
    LayerIntegratedGradients,
    NoiseTunnel,
    Occlusion,
    Saliency,
)

pytest.importorskip("pandas")

from captum_globenc import LOCAL_SCORES, GlobEnc, InputError, demo
from captum_globenc.comparison.batches import by_length
from captum_globenc.evaluation import MEASURES, PRESETS, benchmark
from captum_globenc.evaluation.scoring import Judge
from captum_globenc.methods import METHODS, scorer_of
from tests.conftest import left_behind

TEXTS = [
    ("A lovely film, full of wit, that never becomes dull.", 1),
    ("Dull.", 0),
    ("Too long and too loud, but the ending almost saves it.", 0),
    ("A warm and funny comedy.", 1),
    ("No.", 0),
]
QUIET = {"progress": False, "cost_texts": 0}


@pytest.fixture(scope="module")
def loaded():
    return demo.load_classifier()


def judge(loaded, methods=(), measures=MEASURES[:6], per_layer=False) -> Judge:
    scorers = {name: METHODS[name].build(*loaded) for name in methods}
    return Judge(*loaded, scorers, measures, per_layer, 256, 64)


@pytest.fixture(scope="module")
def batch(loaded):
    return judge(loaded).tokenize([text for text, _ in TEXTS])


# Methods


@pytest.mark.parametrize("name", METHODS)
def test_no_method_is_fed_padding(loaded, batch, name: str) -> None:
    """A batch gives what single texts give, and every forward pass gets the mask."""
    model, tokenizer = loaded
    scorer = METHODS[name].build(model, tokenizer)
    target = torch.tensor([1, 0, 0, 1, 0])
    seen: list[bool] = []

    def look(_, args, kwargs) -> None:
        ids = kwargs.get("input_ids")
        tokens = ids if ids is not None else kwargs["inputs_embeds"]
        mask = kwargs["attention_mask"]
        assert mask.shape == tokens.shape[:2]
        # One and the same for all the rows of a text; nothing but the text's own.
        lengths = set(mask.sum(-1).tolist())
        assert lengths <= set(batch.attention_mask.sum(-1).tolist())
        seen.append(True)

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        together = scorer(batch.input_ids, batch.attention_mask, target)
    finally:
        hook.remove()
    assert seen or name == "random"
    assert not together.requires_grad
    assert together.shape == batch.input_ids.shape
    assert not together[batch.attention_mask == 0].any()
    for row in range(len(TEXTS)):
        used = batch.attention_mask[row].bool()
        ids = batch.input_ids[row : row + 1, used]
        alone = scorer(ids, torch.ones_like(ids), target[row : row + 1])[0]
        largest = alone.abs().max()
        torch.testing.assert_close(
            together[row, used], alone, rtol=1e-4, atol=1e-4 * float(largest)
        )
    # The same again: what is drawn at random is drawn alike.
    again = scorer(batch.input_ids, batch.attention_mask, target)
    torch.testing.assert_close(again, together, rtol=1e-5, atol=1e-7)
    assert not left_behind(model)
    assert all(p.grad is None for p in model.parameters())


def test_a_method_that_is_fed_padding_is_caught(loaded, batch) -> None:
    """The test above would see it: without a mask the scores change."""
    model, _ = loaded

    def scorer(ids, mask, target):
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        method = InputXGradient(lambda e: model(inputs_embeds=e).logits)
        return method.attribute(embeddings, target).sum(-1).detach()

    target = torch.tensor([1, 0, 0, 1, 0])
    together = scorer(batch.input_ids, batch.attention_mask, target)
    ids = batch.input_ids[1:2, batch.attention_mask[1].bool()]
    alone = scorer(ids, torch.ones_like(ids), target[1:2])[0]
    assert together[1, len(alone) :].abs().max() > 0
    assert not torch.allclose(together[1, : len(alone)], alone, rtol=0.01)
    # Given to the benchmark as an object, it never sees padding.
    safe = scorer_of(
        InputXGradient(lambda e, _: model(inputs_embeds=e).logits), *loaded
    )
    found = safe(batch.input_ids, batch.attention_mask, target)
    torch.testing.assert_close(found[1, : len(alone)], alone, rtol=1e-4, atol=1e-5)
    assert not found[1, len(alone) :].any()


@pytest.mark.parametrize("name", ["integrated_gradients", "gradient_shap", "occlusion"])
def test_special_tokens_are_those_of_the_baseline(loaded, batch, name: str) -> None:
    scores = METHODS[name].build(*loaded)(
        batch.input_ids, batch.attention_mask, torch.zeros(5, dtype=torch.long)
    )
    assert not scores[~batch.candidates].any()
    assert scores[batch.candidates].any()


def test_random_numbers_outside_are_left_alone(loaded, batch) -> None:
    import numpy as np

    scorer = METHODS["gradient_shap"].build(*loaded)
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    scorer(batch.input_ids[:1], batch.attention_mask[:1], torch.tensor([1]))
    assert (torch.rand(1), np.random.rand()) == expected


def test_feature_ablation_by_hand(loaded) -> None:
    model, tokenizer = loaded
    ids = tokenizer(TEXTS[3][0], return_tensors="pt")["input_ids"]
    mask = torch.ones_like(ids)
    found = METHODS["feature_ablation"].build(*loaded)(ids, mask, torch.tensor([1]))
    with torch.no_grad():
        full = model(ids, mask).logits[0, 1]
        for token in range(1, ids.shape[1] - 1):
            without = ids.clone()
            without[0, token] = tokenizer.pad_token_id
            drop = full - model(without, mask).logits[0, 1]
            assert float(found[0, token]) == pytest.approx(float(drop), abs=1e-5)


def test_attention_in_the_last_layer_by_hand(loaded, batch) -> None:
    model = copy.deepcopy(loaded[0])
    found = METHODS["attention_last"].build(model, loaded[1])(
        batch.input_ids, batch.attention_mask, torch.zeros(5, dtype=torch.long)
    )
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**batch.inputs, output_attentions=True).attentions[-1]
    torch.testing.assert_close(found, weights.mean(1)[:, 0], rtol=1e-4, atol=1e-6)


def test_captums_methods_are_called_as_they_want(loaded, batch) -> None:
    model, _ = loaded

    def on_ids(ids, mask):
        return model(ids, attention_mask=mask).logits

    def on_embeddings(embeddings, mask):
        return model(inputs_embeds=embeddings, attention_mask=mask).logits

    layer = model.get_input_embeddings()
    target = torch.tensor([1, 0, 0, 1, 0])
    given = batch.input_ids, batch.attention_mask, target
    by_name = {
        "integrated_gradients": IntegratedGradients(on_embeddings),
        "feature_ablation": FeatureAblation(on_ids),
        "N_ENC": GlobEnc(on_ids),
        "input_x_gradient_sum": InputXGradient(on_embeddings),
    }
    for name, method in by_name.items():
        found = scorer_of(method, *loaded)(*given)
        expected = METHODS[name].build(*loaded)(*given)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    layered = scorer_of(LayerIntegratedGradients(on_ids, layer), *loaded)(*given)
    expected = METHODS["integrated_gradients"].build(*loaded)(*given)
    torch.testing.assert_close(layered, expected, rtol=1e-3, atol=1e-4)
    tunnel = scorer_of(NoiseTunnel(Saliency(on_embeddings)), *loaded)(*given)
    assert tunnel.shape == batch.input_ids.shape
    with pytest.raises(TypeError, match="got int: 3"):
        scorer_of(3, *loaded)


# Records and measures


def literal_drop(loaded, text: str, scores: list[float], hide) -> float:
    """p(x) - p(perturbed) for the predicted class, one text, no batches."""
    model, tokenizer = loaded
    ids = tokenizer(text)["input_ids"]
    with torch.no_grad():
        full = model(torch.tensor([ids])).logits.softmax(-1)[0]
        best = int(full.argmax())
        changed = hide(ids, scores)
        after = model(torch.tensor([changed])).logits.softmax(-1)[0, best]
    return float(full[best] - after)


def test_measures_of_a_text_against_a_literal_twin(loaded) -> None:
    model, tokenizer = loaded
    text = TEXTS[2][0]
    found = benchmark(*loaded, [text, TEXTS[1][0]], ["saliency"], **QUIET).records[0]
    ids = tokenizer(text)["input_ids"]
    embeddings = model.get_input_embeddings()(torch.tensor([ids])).detach()
    embeddings.requires_grad_()
    logits = model(inputs_embeds=embeddings).logits[0]
    best = int(logits.argmax())
    slope = torch.autograd.grad(logits[best], embeddings)[0][0]
    scores = slope.abs().sum(-1).tolist()
    inner = sorted(range(1, len(ids) - 1), key=lambda token: -scores[token])

    def mask_top(fraction):
        chosen = inner[: math.floor(round(fraction * len(inner), 9))]
        return lambda ids, _: [
            tokenizer.mask_token_id if at in chosen else token
            for at, token in enumerate(ids)
        ]

    def erase(fraction, keep):
        chosen = inner[: math.ceil(round(fraction * len(inner), 9))]
        ends = (0, len(ids) - 1)
        return lambda ids, _: [
            token
            for at, token in enumerate(ids)
            if at in ends or (at in chosen) == keep
        ]

    measured = found["methods"]["saliency"]
    curve = [literal_drop(loaded, text, scores, mask_top(k / 10)) for k in range(1, 10)]
    assert measured["curve"] == pytest.approx(curve, abs=1e-5)
    assert measured["aopc"] == pytest.approx(sum(curve) / 9, abs=1e-5)
    for name, keep in (("comprehensiveness", False), ("sufficiency", True)):
        drops = [
            literal_drop(loaded, text, scores, erase(k, keep))
            for k in (0.01, 0.05, 0.1, 0.2, 0.5)
        ]
        assert measured[name] == pytest.approx(sum(drops) / 5, abs=1e-5)
    assert found["predicted"] == best
    assert found["tokens"] == len(ids)


def test_the_reference_correlates_with_itself(loaded) -> None:
    result = benchmark(*loaded, TEXTS, ["input_x_gradient"], **QUIET)
    row = result.table.loc[("input_x_gradient", "rank_correlation")]
    assert row["mean"] == pytest.approx(1)
    assert row["n"] == 5
    assert result.accuracy == 1


def test_paired_differences(loaded) -> None:
    result = benchmark(*loaded, TEXTS, ["globenc", "saliency", "random"], **QUIET)
    found = result.differences("saliency")
    assert set(found.index.get_level_values("method")) == {"globenc", "random"}
    for method, measure in found.index:
        pairs = [
            record["methods"][method][measure] - record["methods"]["saliency"][measure]
            for record in result.records
        ]
        defined = [pair for pair in pairs if not math.isnan(pair)]
        row = found.loc[(method, measure)]
        assert row["n"] == len(defined)
        assert row["mean"] == pytest.approx(sum(defined) / len(defined))
        assert row["low"] <= row["mean"] <= row["high"]
    with pytest.raises(InputError, match=r"unknown method 'salience'.*'saliency'"):
        result.differences("salience")


def test_short_texts_and_undefined_numbers(loaded) -> None:
    result = benchmark(*loaded, ["Dull", "No"], ["globenc"], **QUIET)
    table = result.table.loc["globenc"]
    # One token: nothing to rank, nothing masked.
    assert table.loc["leave_one_out_tau", "n"] == 0
    assert math.isnan(table.loc["leave_one_out_tau", "mean"])
    assert table.loc["aopc", "mean"] == pytest.approx(0, abs=1e-6)
    assert table.loc["comprehensiveness", "mean"] > 0
    assert result.accuracy is None


def test_constant_scores(loaded) -> None:
    constant = {"constant": lambda ids, mask, target: torch.ones(ids.shape)}
    result = benchmark(*loaded, TEXTS, constant, **QUIET)
    assert result.table.loc[("constant", "rank_correlation"), "n"] == 0
    assert result.table.loc[("constant", "aopc"), "n"] == 5
    assert "test_constant_scores" in result.methods["constant"]


def test_captums_metrics(loaded) -> None:
    result = benchmark(
        *loaded,
        TEXTS[:2],
        ["globenc", "random"],
        measures=["infidelity", "sensitivity"],
        **QUIET,
    )
    assert (result.table["mean"] >= 0).all()
    again = benchmark(
        *loaded,
        TEXTS[:2],
        ["globenc", "random"],
        measures=["infidelity", "sensitivity"],
        batch_size=1,
        **QUIET,
    )
    torch.testing.assert_close(
        torch.tensor(result.table.to_numpy(float)),
        torch.tensor(again.table.to_numpy(float)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_layers_are_rows_of_the_decomposition(loaded) -> None:
    result = benchmark(
        *loaded,
        TEXTS[:1],
        ["N_ENC"],
        measures=["rank_correlation"],
        per_layer=True,
        **QUIET,
    )
    layers = result.layers.set_index(["local", "kind", "layer"])["mean"]
    assert len(layers) == len(LOCAL_SCORES) * 2 * 3
    whole = result.table.loc[("N_ENC", "rank_correlation"), "mean"]
    assert layers["N_ENC", "rollout", 3] == pytest.approx(whole)
    # One layer is its own rollout.
    assert layers["W", "single", 1] == layers["W", "rollout", 1]
    assert layers["W", "single", 3] != layers["W", "rollout", 3]


def test_pairs_keep_their_token_types(loaded) -> None:
    seen = []

    def scorer(ids, mask, target, types):
        seen.append(types)
        return mask.double() * torch.arange(ids.shape[1])

    import datasets

    data = datasets.Dataset.from_dict(
        {"text": [["A", "film."], ["Dull."]], "other": ["It is good.", "It is not."]}
    )
    result = benchmark(
        *loaded,
        data,
        {"mine": scorer, "globenc": "globenc"},
        pair_column="other",
        **QUIET,
    )
    assert seen[0].tolist()[0] == [0] * 5 + [1] * 5
    assert len(result.records) == 2


# Running


def numbers(result) -> torch.Tensor:
    return torch.tensor(result.table.to_numpy(float))


def test_batches_and_processes_give_the_same(loaded) -> None:
    names = ["globenc", "kernel_shap", "saliency", "random"]
    one = benchmark(*loaded, TEXTS, names, batch_size=5, **QUIET)
    for options in ({"batch_size": 1}, {"batch_size": 2, "processes": 2}):
        other = benchmark(*loaded, TEXTS, names, **options, **QUIET)
        torch.testing.assert_close(
            numbers(other), numbers(one), rtol=1e-4, atol=1e-5, equal_nan=True
        )


def test_an_interrupted_run_goes_on(loaded, tmp_path) -> None:
    folder = tmp_path / "run"
    calls = []

    def counted(ids, mask, target):
        calls.append(len(ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return torch.rand(ids.shape, generator=torch.Generator().manual_seed(0))

    options = {"batch_size": 2, "output": folder, **QUIET}
    with pytest.raises(KeyboardInterrupt):
        benchmark(*loaded, TEXTS, {"mine": counted}, **options)
    lines = (folder / "run.jsonl").read_text().splitlines()
    saved = {json.loads(line)["index"] for line in lines}
    assert len(saved) == len(lines) == 3
    missing = min(set(range(5)) - saved)
    # Half a line, as a killed run leaves it.
    with (folder / "run.jsonl").open("a") as file:
        file.write(f'{{"index": {missing}, "tok')
    result = benchmark(*loaded, TEXTS, {"mine": counted}, **options)
    assert calls == [1, 2, 2, 2]
    assert [record["index"] for record in result.records] == [0, 1, 2, 3, 4]
    assert len((folder / "run.jsonl").read_text().splitlines()) == 5
    benchmark(*loaded, TEXTS, {"mine": counted}, **options)
    assert len(calls) == 4
    with pytest.raises(InputError, match=r"holds a run with another measures"):
        benchmark(*loaded, TEXTS, {"mine": counted}, measures=["aopc"], **options)


def test_what_is_saved(loaded, tmp_path) -> None:
    folder = tmp_path / "report"
    result = benchmark(
        *loaded,
        TEXTS,
        ["globenc", "random"],
        per_layer=True,
        cost_texts=2,
        output=folder,
        progress=False,
    )
    assert {path.name for path in folder.iterdir()} == {
        "aopc.svg", "cost.csv", "curves.csv", "index.html", "layers.csv", "layers.svg",
        "quality_against_cost.svg", "result.json", "run-cost.json", "run.json",
        "run.jsonl", "table.csv",
    }  # fmt: skip
    saved = json.loads((folder / "result.json").read_text())
    assert saved["accuracy"] == 1
    assert saved["settings"]["versions"]["captum"]
    assert len(saved["table"]) == 12
    cost = result.costs
    assert list(cost.index) == ["forward pass", "globenc", "random"]
    assert cost.loc["forward pass", "ratio"] == 1
    assert cost.loc["globenc", "forwards"] == 1
    assert cost.loc["random", "forwards"] == 0
    assert cost.loc["globenc", "memory"] > 0


def test_batches_hold_little_padding(loaded) -> None:
    """On the shipped sentences: most of it was padding in the order of the file."""
    texts, shapes = demo.held_out_sentences()[:60], []
    tokens = sum(map(len, loaded[1]([text for text, _ in texts])["input_ids"]))

    def seen(ids, mask, target):
        shapes.append(ids.shape)
        return ids * mask.float()

    options = {"measures": ["rank_correlation"], **QUIET}
    result = benchmark(*loaded, texts, {"mine": seen}, **options)
    assert [record["index"] for record in result.records] == list(range(60))
    assert [record["label"] for record in result.records] == [y for _, y in texts]
    sizes, widths = zip(*shapes)
    assert sizes == (12, 16, 16, 16)
    assert sorted(widths, reverse=True) == list(widths)
    assert sum(size * width for size, width in shapes) <= 1.3 * tokens
    # The same numbers, to rounding, as text by text.
    alone = benchmark(*loaded, texts, {"mine": seen}, batch_size=1, **options)
    assert sum(size * width for size, width in shapes[4:]) == tokens
    torch.testing.assert_close(
        numbers(result), numbers(alone), rtol=1e-4, atol=1e-5, equal_nan=True
    )


def test_windows_are_sorted_one_after_another() -> None:
    """No more than a window is read ahead; every item comes once."""
    items, read = [f"{'x' * (i * 7 % 11)}{i}" for i in range(150)], []

    def reading():
        for item in items:
            read.append(item)
            yield item

    batches = by_length(reading(), 2, lambda window: [len(item) for item in window])
    first = next(batches)
    assert len(read) == 64
    assert len(first[0]) == max(map(len, items[:64]))
    found = [first, *batches]
    assert sorted(item for batch in found for item in batch) == sorted(items)
    assert {len(batch) for batch in found} == {2}
    for start in (0, 64, 128):
        window = [item for batch in found[start // 2 :][:32] for item in batch]
        assert set(window) == set(items[start : start + 64])
        assert [len(item) for item in window] == sorted(map(len, window))[::-1]


def test_passes_are_counted(loaded) -> None:
    result = benchmark(
        *loaded,
        TEXTS[:1],
        ["integrated_gradients", "saliency", "feature_ablation"],
        measures=["rank_correlation"],
        cost_texts=1,
        progress=False,
    )
    cost = result.costs[["forwards", "backwards"]]
    assert cost.loc["integrated_gradients"].tolist() == [50, 50]
    assert cost.loc["saliency"].tolist() == [1, 1]
    # The text itself, and once without each of its 13 tokens.
    tokens = len(loaded[1](TEXTS[0][0])["input_ids"])
    assert cost.loc["feature_ablation"].tolist() == [1 + tokens, 0]


def test_the_model_is_left_as_it_was(loaded) -> None:
    model = copy.deepcopy(loaded[0]).train()
    benchmark(model, loaded[1], TEXTS[:2], ["globenc", "deep_lift"], **QUIET)
    assert all(module.training for module in model.modules())
    assert not left_behind(model)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["globenk"]}, "Did you mean 'globenc'"),
        ({"methods": []}, "no method asked for"),
        ({"methods": {}}, "no method asked for"),
        ({"methods": {"mine": 3}}, "got int"),
        ({"measures": ["aopk"]}, "unknown measure 'aopk'; known: rank_correlation"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"processes": True}, "processes must be at least 1, got True"),
        ({"texts": []}, "holds no rows"),
        ({"texts": ["  "]}, "expected words"),
        ({"texts": "nowhere.csv"}, "nowhere.csv does not exist"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"limit": 2.0}, "limit must be at least 1, got 2.0"),
        ({"methods": {"": "random"}}, "name must be words, got ''"),
        ({"methods": {1: "random"}}, "name must be words, got 1"),
        ({"methods": {"mine": Saliency}}, r"is the class Saliency: give an object"),
        ({"texts": [("A film.", 7)]}, "label 7 is no class"),
    ],
    ids=str,
)
def test_what_makes_no_benchmark(loaded, change, message) -> None:
    given = {"texts": TEXTS, "methods": ["random"], **change}
    with pytest.raises(InputError, match=message):
        benchmark(*loaded, given.pop("texts"), **given, **QUIET)


def test_scores_that_cannot_be_judged(loaded) -> None:
    from captum_globenc import NonFiniteActivationError

    wrong = {"mine": lambda ids, mask, target: torch.ones(len(ids), 2)}
    with pytest.raises(InputError, match=r"'mine' gives scores of shape \(5, 2\)"):
        benchmark(*loaded, TEXTS, wrong, **QUIET)
    nan = {"mine": lambda ids, mask, target: torch.full(ids.shape, math.nan)}
    with pytest.raises(NonFiniteActivationError, match="'mine' gives NaN"):
        benchmark(*loaded, TEXTS, nan, **QUIET)
    for wrong, found in [(lambda *_: [1.0], "list"), (lambda *_: None, "NoneType")]:
        with pytest.raises(InputError, match=f"'mine' gives {found}"):
            benchmark(*loaded, TEXTS, {"mine": wrong}, **QUIET)
    occlusion = Occlusion(lambda ids, mask: loaded[0](ids, mask).logits)
    with pytest.raises(InputError, match=r"'mine' fails: TypeError.*sliding_window"):
        benchmark(*loaded, TEXTS, {"mine": occlusion}, **QUIET)
    with pytest.raises(InputError, match="cannot be sent to another process"):
        benchmark(*loaded, TEXTS, nan, processes=2, **QUIET)


def test_own_methods_that_draw_do_not_depend_on_the_batch(loaded) -> None:
    def forward(embeddings, mask):
        return loaded[0](inputs_embeds=embeddings, attention_mask=mask).logits

    mine = {"mine": GradientShap(forward)}
    one = benchmark(*loaded, TEXTS[:3], mine, batch_size=3, **QUIET)
    other = benchmark(*loaded, TEXTS[:3], mine, batch_size=1, **QUIET)
    torch.testing.assert_close(
        numbers(one), numbers(other), rtol=1e-4, atol=1e-5, equal_nan=True
    )


def test_padding_on_the_left_changes_nothing(loaded) -> None:
    model, tokenizer = loaded
    left = copy.deepcopy(tokenizer)
    left.padding_side = "left"
    expected = benchmark(*loaded, TEXTS, ["globenc"], **QUIET)
    found = benchmark(model, left, TEXTS, ["globenc"], **QUIET)
    assert torch.equal(numbers(found), numbers(expected))


def test_a_folder_with_other_files_is_left_alone(loaded, tmp_path) -> None:
    mine = tmp_path / "run.jsonl"
    mine.write_text('{"text": "A film."}\n')
    with pytest.raises(InputError, match="holds files that are no run"):
        benchmark(*loaded, mine, ["random"], output=tmp_path, **QUIET)
    assert mine.read_text() == '{"text": "A film."}\n'
    assert list(tmp_path.iterdir()) == [mine]


@pytest.mark.parametrize("content", ["", "[1]", '{"model": '])
@pytest.mark.parametrize("file", ["run.json", "run-cost.json"])
def test_a_damaged_folder_gets_one_sentence(loaded, tmp_path, file, content) -> None:
    options = {"output": tmp_path, "cost_texts": 1, "progress": False}
    benchmark(*loaded, TEXTS[:1], ["random"], **options)
    (tmp_path / file).write_text(content)
    with pytest.raises(InputError, match=f"{file}' is damaged"):
        benchmark(*loaded, TEXTS[:1], ["random"], **options)


def test_what_makes_another_run(loaded, tmp_path) -> None:
    """Never another run's numbers."""
    model, tokenizer = loaded
    data = tmp_path / "texts.csv"
    data.write_text("text\na good film\n")
    options = {"output": tmp_path / "run", **QUIET}

    def up(ids, mask, target):
        return ids.float()

    def down(ids, mask, target):
        return -ids.float()

    benchmark(*loaded, data, {"mine": up}, **options)
    with pytest.raises(InputError, match=r"another (methods|sources)"):
        benchmark(*loaded, data, {"mine": down}, **options)
    turned = copy.deepcopy(model)
    with torch.no_grad():
        weight = turned.bert.encoder.layer[0].output.dense.weight
        weight.copy_(weight.flip(0))
    with pytest.raises(InputError, match="another weights"):
        benchmark(turned, tokenizer, data, {"mine": up}, **options)
    data.write_text("text\na baad film\n")
    with pytest.raises(InputError, match="another data"):
        benchmark(*loaded, data, {"mine": up}, **options)


def test_the_cost_is_measured_again_on_more_texts(loaded, tmp_path) -> None:
    options = {"output": tmp_path, "progress": False, "cost_texts": 3}
    one = benchmark(*loaded, TEXTS, ["saliency"], limit=1, **options)
    more = benchmark(*loaded, TEXTS, ["saliency"], limit=5, **options)
    same = benchmark(*loaded, TEXTS, ["saliency"], limit=5, **options)
    assert (one.settings["cost_texts"], more.settings["cost_texts"]) == (1, 3)
    assert one.cost != more.cost == same.cost


def test_a_regression_is_no_classifier(loaded) -> None:
    import transformers as t

    config = copy.deepcopy(loaded[0].config)
    config.num_labels = 1
    model = t.BertForSequenceClassification(config).eval()
    with pytest.raises(InputError, match="has 1 output, a number"):
        benchmark(model, loaded[1], TEXTS, ["random"], **QUIET)


SCRIPT = """
from captum_globenc import demo
from captum_globenc.evaluation import benchmark
{guard}
    benchmark(
        *demo.load_classifier(), {texts!r}, ["globenc", "kernel_shap"],
        batch_size=1, cost_texts=0, progress=False, output={output!r}, **{options!r}
    )
"""


def script(tmp_path, guard: str, **options) -> list[str]:
    texts = [text for text, _ in TEXTS] * 4
    path = tmp_path / "script.py"
    path.write_text(
        SCRIPT.format(
            guard=guard, texts=texts, output=str(tmp_path / "run"), options=options
        )
    )
    return [sys.executable, str(path)]


def test_a_killed_run_loses_at_most_one_batch(loaded, tmp_path) -> None:
    command = script(tmp_path, 'if __name__ == "__main__":')
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    kept = tmp_path / "run" / "run.jsonl"
    for _ in range(3_000):  # A busy machine takes long to import torch.
        if kept.exists() and len(kept.read_text().splitlines()) >= 2:
            break
        time.sleep(0.1)
    process.kill()
    _, problems = process.communicate()
    before = kept.read_text().splitlines()
    assert 2 <= len(before) < 20, problems
    subprocess.run(command, check=True, capture_output=True)
    after = kept.read_text().splitlines()
    assert after[: len(before)] == before
    assert sorted(json.loads(line)["index"] for line in after) == list(range(20))


def test_a_script_without_a_guard_ends(tmp_path) -> None:
    command = script(tmp_path, "if True:", processes=2)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1
    assert "a process ended before its work was done" in done.stderr


def test_a_tokenizer_without_a_mask_token(loaded) -> None:
    model, tokenizer = loaded
    unpadded = copy.deepcopy(tokenizer)
    unpadded.pad_token = None
    with pytest.raises(InputError, match="has no pad token"):
        benchmark(model, unpadded, TEXTS, ["random"], **QUIET)
    bare = copy.deepcopy(tokenizer)
    bare.mask_token = None
    with pytest.raises(
        InputError, match=r"has no mask token.*set tokenizer.mask_token"
    ):
        benchmark(model, bare, TEXTS, ["random"], **QUIET)


def test_presets_name_what_there_is() -> None:
    for preset in PRESETS.values():
        assert set(preset.methods) <= set(METHODS)
        assert set(preset.measures) <= set(MEASURES)
    assert set(PRESETS["paper"].methods) == set(LOCAL_SCORES)
    assert PRESETS["paper-sst2"].data == "hub:nyu-mll/glue:sst2:validation"
