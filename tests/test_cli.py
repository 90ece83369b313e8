from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import transformers as t
from typer.testing import CliRunner

from captum_globenc import LOCAL_SCORES, __version__, catalogue, demo
from captum_globenc.cli import app
from captum_globenc.methods import METHODS

SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "vocab_size": 5800,
}


def run(*arguments):
    # As on a terminal of 80 columns without colour.
    result = CliRunner().invoke(
        app, [str(a) for a in arguments], env={"COLUMNS": "80", "NO_COLOR": "1"}
    )
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def run_for_real(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "captum_globenc", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def save(folder, model):
    """A model's folder, with the tokenizer of the embedded classifier."""
    _, tokenizer = demo.load_classifier()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders to load: one good model and several that are wrong in some way."""
    root = tmp_path_factory.mktemp("models")
    labels = {"id2label": {0: "bad", 1: "fair", 2: "good"}}
    save(
        root / "good",
        t.BertForSequenceClassification(t.BertConfig(**SMALL, **labels)),
    )
    save(root / "headless", t.BertForMaskedLM(t.BertConfig(**SMALL)))
    save(root / "fnet", t.FNetForSequenceClassification(t.FNetConfig(**SMALL)))
    (root / "empty").mkdir()
    wordless = t.BertForSequenceClassification(t.BertConfig(**SMALL))
    wordless.save_pretrained(root / "wordless")
    save(root / "broken", t.BertForSequenceClassification(t.BertConfig(**SMALL)))
    (root / "broken" / "model.safetensors").write_bytes(b"no weights\nhere")
    return root


def test_version_and_help() -> None:
    assert run("--version").stdout == f"captum-globenc {__version__}\n"
    group = run("--help")
    assert group.exit_code == 0
    assert "explain" in group.stdout
    command = run("explain", "--help")
    for text in (group.stdout, command.stdout):
        lines = [line.strip() for line in text.splitlines()]
        assert (
            'captum-globenc explain "Too long and too loud." --target positive' in lines
        )
    for name in (*METHODS, *LOCAL_SCORES):
        assert name in command.stdout


HEAVY = (
    *("captum", "datasets", "matplotlib", "numpy", "pandas", "scipy", "sklearn"),
    *("torch", "transformers"),
)
# Runs a command in a fresh interpreter and says which of these it has imported.
DRIVER = f"""
import atexit, sys
atexit.register(lambda: print("\\n", *({set(HEAVY)!r} & set(sys.modules))))
"""
AT_ONCE: dict[str, tuple[int, list[str]]] = {
    "help": (0, ["--help"]),
    "help of explain": (0, ["explain", "--help"]),
    "help of benchmark": (0, ["benchmark", "--help"]),
    "version": (0, ["--version"]),
    "table of families": (0, ["models"]),
    "check of nothing": (2, ["models", "--check", "{}/none"]),
    "option": (2, ["explain", "x", "--metods", "globenc"]),
    "method": (2, ["explain", "x", "--methods", "globenk"]),
    "local score": (2, ["explain", "x", "--local", "N_ENCC"]),
    "empty text": (2, ["explain", " "]),
    "label": (2, ["explain", "x", "--target", "possitive"]),
    "index": (2, ["explain", "x", "--target", "2"]),
    "label of a folder": (
        2,
        ["explain", "x", "--model", "{}/good", "--target", "positive"],
    ),
    "no such folder": (2, ["explain", "x", "--model", "{}/none"]),
    "no such model": (2, ["explain", "x", "--model", "no-such/model"]),
    "impossible name": (2, ["explain", "x", "--model", "no..such"]),
    "empty folder": (2, ["explain", "x", "--model", "{}/empty"]),
    "page": (2, ["explain", "x", "--html", "{}/none/x.html"]),
    "preset": (2, ["benchmark", "--preset", "papr"]),
    "method of a benchmark": (2, ["benchmark", "--methods", "globenk"]),
    "measure": (2, ["benchmark", "--measures", "aopk"]),
    "limit": (2, ["benchmark", "--limit", "0"]),
    "data": (2, ["benchmark", "--data", "{}/none.csv"]),
    "model of a benchmark": (2, ["benchmark", "--model", "{}/none"]),
}


def imported(code: str, *arguments: str) -> tuple[int, set[str]]:
    """The exit code of a fresh interpreter and which heavy modules it has imported."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER + code, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, set(done.stdout.splitlines()[-1].split())


RUN = "from captum_globenc.cli import app; app(prog_name='captum-globenc')"


@pytest.mark.parametrize(("code", "arguments"), AT_ONCE.values(), ids=AT_ONCE)
def test_what_needs_no_model_waits_for_none(folders, code, arguments) -> None:
    arguments = [argument.replace("{}", str(folders)) for argument in arguments]
    assert imported(RUN, *arguments) == (code, set())


def test_explain_imports_what_torch_transformers_and_captum_do() -> None:
    code, found = imported(RUN, "explain", "Fine.", "--methods", "globenc")
    assert code == 0
    assert {"torch", "transformers", "captum"} <= found
    code, needed = imported(
        "import captum.attr\n"
        "from transformers import AutoTokenizer, BertForSequenceClassification\n"
    )
    assert code == 0
    assert found <= needed


def test_names_are_those_that_there_are() -> None:
    assert list(LOCAL_SCORES) == list(catalogue.LOCAL_SCORES)
    assert list(METHODS) == list(catalogue.METHODS)
    for name, method in METHODS.items():
        assert method.reduction == catalogue.METHODS[name]
        assert method.local == catalogue.ROLLOUTS.get(name)


def test_explain_prints_the_default_methods_under_one_another() -> None:
    result = run("explain", "A lovely film.")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("Predicted: positive (9")
    headings = [line.split()[0] for line in lines if line.endswith(" s")]
    assert headings == ["globenc", "attnlrp", "decompx", "integrated_gradients"]
    sentences = [line.split() for line in lines if line.startswith("[CLS]")]
    assert sentences == [["[CLS]", "a", "lovely", "film", ".", "[SEP]"]] * 4
    assert result.stderr == ""


def test_options_reach_the_explanation(folders) -> None:
    result = run(
        "explain", "A lovely film.", "--model", folders / "good", "--target", "FAIR",
        "--methods", "saliency, globenc", "--local", "N_RES", "--json",
    )  # fmt: skip
    assert result.exit_code == 0
    explanation = json.loads(result.stdout)
    assert explanation["model"] == "good"
    assert explanation["target"]["index"] == 1
    assert explanation["local"] == "N_RES"
    assert [m["name"] for m in explanation["methods"]] == ["saliency", "globenc"]
    assert explanation["tokens"] == ["[CLS]", "a", "lovely", "film", ".", "[SEP]"]


def test_truncate() -> None:
    result = run(
        "explain", "long " * 300, "--truncate", "--methods", "globenc", "--json"
    )
    assert len(json.loads(result.stdout)["tokens"]) == 256


def test_page_is_written_and_named(tmp_path) -> None:
    page = tmp_path / "página.html"
    arguments = ("explain", "Fine — 😀", "--methods", "globenc", "--html", page)
    result = run(*arguments)
    assert result.stdout.splitlines()[-1] == f"Wrote {page}"
    assert "Fine — 😀" in page.read_text(encoding="utf-8")
    result = run(*arguments, "--json")
    assert json.loads(result.stdout)["text"] == "Fine — 😀"
    assert result.stderr == f"Wrote {page}\n"


def test_text_that_begins_with_a_dash() -> None:
    result = run("explain", "--json", "--methods", "globenc", "--", "-1 out of 10.")
    assert json.loads(result.stdout)["text"] == "-1 out of 10."


BAD_INPUT = {
    "empty text": ([""], r"the text is empty ('')"),
    "blank text": (["  "], r"the text is empty ('  ')"),
    "long text": (["long " * 300], "302 tokens and the model has positions for 256"),
    "method": (["x", "--methods", "globenc,salience"], "unknown method 'salience'"),
    "near method": (["x", "--methods", "GlobEnc"], "Did you mean 'globenc'?"),
    "no method": (["x", "--methods", ","], "no method asked for; known: globenc"),
    "local": (["x", "--local", "foo"], "unknown local score 'foo'"),
    "near local": (["x", "--local", "N_ENCC"], "Did you mean 'N_ENC'?"),
    "label": (["x", "--target", "great"], "unknown label 'great'; known: 0 negative,"),
    "near label": (["x", "--target", "possitive"], "Did you mean 'positive'?"),
    "index": (["x", "--target", "7"], "'7' is outside the model's 2 labels"),
    "negative index": (["x", "--target", "-1"], "'-1' is outside the model's 2 labels"),
    "page": (["x", "--html", "{}/none/x.html"], "none/x.html': it is no file"),
    "page is a folder": (["x", "--html", "{}"], "cannot write"),
    "no such folder": (["x", "--model", "{}/none"], "none': there is no such folder"),
    "empty folder": (["x", "--model", "{}/empty"], "empty' cannot be loaded"),
    "broken weights": (["x", "--model", "{}/broken"], "broken' cannot be loaded"),
    "unsupported": (["x", "--model", "{}/fnet"], "model type 'fnet' is not supported"),
    "no tokenizer": (
        ["x", "--model", "{}/wordless", "--methods", "globenc"],
        "wordless' comes without a tokenizer: it knows",
    ),
    "no head": (
        ["x", "--model", "{}/headless"],
        "headless' is no trained sequence classifier: it has no weights for",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_sentence_and_exit_code_2(folders, arguments, message) -> None:
    result = run("explain", *(a.replace("{}", str(folders)) for a in arguments))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.startswith("captum-globenc: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["x", "y"], ["x", "--metods", "globenc"]])
def test_wrong_usage_is_exit_code_2(arguments) -> None:
    result = run("explain", *arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr
    assert result.stdout == ""


def test_real_run_with_all_it_can_print() -> None:
    done = run_for_real("explain", "Naïve 世界 😀 [bold]", COLUMNS="60")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    rows = [line.split() for line in done.stdout.splitlines()]
    sentence = ["[CLS]", "naive", "世", "界", "😀", "[", "bold", "]", "[SEP]"]
    assert rows.count(sentence) == 4


def test_letters_that_the_encoding_lacks() -> None:
    # Four columns: [CLS] is cut, with an ellipsis, which ASCII does not have.
    result = CliRunner(charset="ascii").invoke(
        app, ["explain", "Fine.", "--methods", "globenc"], env={"COLUMNS": "4"}
    )
    assert result.exit_code == 0
    assert "[CL?" in result.stdout_bytes.decode("ascii")


def test_real_run_without_a_network() -> None:
    done = run_for_real("explain", "x", "--model", "no-such/model", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "captum-globenc: model 'no-such/model': there is no such folder, and the "
        "Hugging Face hub has no such model or cannot be reached.\n"
    )
