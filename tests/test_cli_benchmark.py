from __future__ import annotations

import json

import pytest

pytest.importorskip("pandas")

from captum_globenc.methods import METHODS
from tests.test_cli import run

QUICK = ["--methods", "globenc,random", "--limit", "3"]


@pytest.fixture
def reviews(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text(
        "review,mood\nA lovely film.,positive\n"
        '"Dull, and far too long.",negative\n'
        "Not bad.,POSITIVE\n"
    )
    return path


def test_the_shipped_sentences(tmp_path) -> None:
    result = run("benchmark", *QUICK, "--output", tmp_path / "report")
    assert result.exit_code == 0
    assert result.stdout.startswith("3 texts, accuracy 1.000; mean ± std")
    for word in ("rank corr", "aopc", "LOO tau", "forward pass", "x forward"):
        assert word in result.stdout
    tables = result.stdout.partition("Wrote")[0]
    assert max(map(len, tables.splitlines())) <= 80
    assert f"Wrote {tmp_path / 'report' / 'index.html'}" in result.stdout.replace(
        "\n", ""
    )
    saved = json.loads((tmp_path / "report" / "result.json").read_text())
    assert list(saved["methods"]) == ["globenc", "random"]
    assert saved["settings"]["model"] == "demo_classifier"
    assert saved["examples"] == 3
    # More of the same: what is there is not measured again.
    again = run("benchmark", *QUICK[:3], "5", "--output", tmp_path / "report")
    assert again.stdout.startswith("5 texts")


def test_a_file(reviews) -> None:
    columns = ["--text-column", "review", "--label-column", "mood"]
    result = run(
        "benchmark", "--data", reviews, *columns, "--methods", "random",
        "--measures", "aopc,log_odds", "--batch-size", "2",
    )  # fmt: skip
    assert result.exit_code == 0
    assert "3 texts, accuracy" in result.stdout
    assert "LOO tau" not in result.stdout


def test_the_papers_preset() -> None:
    result = run("benchmark", "--preset", "paper", "--limit", "2")
    assert result.exit_code == 0
    assert "Rank correlation by layer" in result.stdout
    for local in ("W_FIXED_RES", "N_RES_LN", "N_ENC"):
        assert result.stdout.count(local) == 3


def test_help_names_everything() -> None:
    text = run("benchmark", "--help").stdout + run("explain", "--help").stdout
    for name in (*METHODS, "rank_correlation", "sensitivity", "paper-sst2", "full"):
        assert name in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "papr"], "unknown preset 'papr'; known: default, paper,"),
        (["--methods", "globenk"], "Did you mean 'globenc'?"),
        (["--measures", "aopk"], "unknown measure 'aopk'"),
        (["--data", "nowhere.csv"], "nowhere.csv does not exist"),
        (["--limit", "0"], "limit must be at least 1, got 0"),
        (["--processes", "0"], "processes must be at least 1"),
        (["--model", "no/such"], "model 'no/such': there is no such folder"),
    ],
    ids=str,
)
def test_wrong_arguments_end_with_one_sentence(monkeypatch, arguments, message) -> None:
    monkeypatch.setattr("captum_globenc.cli._hub_knows", lambda name: False)
    result = run("benchmark", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("captum-globenc: ")
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_errors_in_a_file_name_the_line(reviews) -> None:
    given = ["benchmark", "--data", reviews, "--methods", "random"]
    result = run(*given, "--text-column", "reveiw")
    assert "line 2: no column 'reveiw'" in result.stderr
    assert "Did you mean 'review'?" in result.stderr
    with reviews.open("a") as file:
        file.write("Hm.,mixed\n")
    result = run(*given, "--text-column", "review", "--label-column", "mood")
    assert result.exit_code == 2
    assert "reviews.csv, line 5: label 'mixed' is no class; known: 0 negative" in (
        result.stderr
    )


def test_the_papers_own_models_need_the_hub(monkeypatch) -> None:
    monkeypatch.setattr("captum_globenc.cli._hub_knows", lambda name: False)
    result = run("benchmark", "--preset", "paper-sst2", "--limit", "1")
    assert result.exit_code == 2
    assert "TehranNLP-org/bert-base-uncased-cls-sst2" in result.stderr
    assert "cannot be reached" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_without_the_extra(monkeypatch) -> None:
    import sys

    for name in [n for n in sys.modules if n.startswith("captum_globenc.evaluation")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("captum_globenc.evaluation", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("benchmark")
    assert result.exit_code == 2
    assert 'pip install "captum_globenc[benchmark]"' in result.stderr
