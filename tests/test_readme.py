"""The README, the guides and the documentation: what they say to run runs.

Python blocks are executed page by page, in order, and share their names. A ``text``
block right after one is what it prints. Of the commands in ``sh`` blocks, those of
``captum-globenc`` are run where they are cheap, and those that install or test are what
``.ci/run`` runs; words in capitals that begin with YOUR_ are for the reader to fill in.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer

from captum_globenc.cli import app
from captum_globenc.encoders import registry

pytest.importorskip("pandas")

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "docs" / "benchmark-template.md"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted({*(ROOT / "docs").rglob("*.md")} - {TEMPLATE}),
]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """Language, text, and what stands between it and the block before."""
    content = page.read_text(encoding="utf-8")
    end = 0
    for found in BLOCK.finditer(content):
        indent, language, text = found.groups()
        yield (
            language,
            re.sub(f"^{indent}", "", text, flags=re.M),
            content[end : found.start()],
        )
        end = found.end()


def commands() -> list[tuple[str, str]]:
    """Each command of the pages' sh blocks, once, with its page."""
    found: dict[str, str] = {}
    for page in PAGES:
        for language, text, _ in blocks(page):
            if language == "sh":
                for command in text.replace("\\\n", " ").splitlines():
                    words = shlex.split(command, comments=True)
                    if words:
                        found.setdefault(shlex.join(words), name_of(page))
    return [(page, command) for command, page in found.items()]


def having(language: str) -> list[Path]:
    return [page for page in PAGES if language in [block[0] for block in blocks(page)]]


@pytest.mark.parametrize("page", having("python"), ids=name_of)
def test_python(
    page: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(registry, "_TABLE", dict(registry._TABLE))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    printed = None
    for language, text, between in blocks(page):
        if language == "python":
            exec(compile(text, name_of(page), "exec"), names)
            printed = capsys.readouterr().out
        elif language == "text" and printed is not None and not between.strip():
            assert printed == text
    if page.name == "README.md" and page.parent == ROOT:
        check_readme(names)


def check_readme(names: dict[str, object]) -> None:
    """What the README says of its results, without showing them."""
    scores = names["scores"]
    assert isinstance(scores, torch.Tensor)
    assert scores.shape == names["batch"]["input_ids"].shape  # type: ignore[index]
    assert (scores >= 0).all()
    assert not scores[names["batch"]["attention_mask"] == 0].any()  # type: ignore[index]
    rollout = names["decomposition"].rollout()[:, 0]  # type: ignore[attr-defined]
    torch.testing.assert_close(rollout, scores, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("page", "command"), commands())
def test_command(page: str, command: str, tmp_path: Path) -> None:
    program, *arguments = shlex.split(command)
    if program == "captum-globenc":
        check_options(arguments)
        # A benchmark without a limit takes minutes.
        if "YOUR_" not in command and (
            arguments[0] != "benchmark" or "--limit" in arguments
        ):
            binaries = Path(sys.executable).parent
            subprocess.run(
                [binaries / "python", "-m", "captum_globenc", *arguments],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                check=True,
                capture_output=True,
            )
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in arguments:
            assert "=" in target or re.search(f"^{target}:", makefile, re.M)
    elif [program, *arguments[:1]] == ["pip", "install"]:
        settings = configparser.ConfigParser()
        settings.read(ROOT / "setup.cfg")
        (ours,) = [a for a in arguments if a.startswith((".", "captum_globenc"))]
        for extra in re.findall(r"\[(.*)\]", ours):
            assert set(extra.split(",")) <= set(settings["options.extras_require"])
    elif program == "jupyter":
        assert list((ROOT / arguments[-1]).glob("*.ipynb"))
    elif program == "python":
        assert arguments == ["-m", "pytest"] or (ROOT / arguments[0]).is_file()
    else:
        assert (ROOT / program).is_file(), f"{page}: what is {command!r}?"


def check_options(arguments: list[str]) -> None:
    """Raise where the command line does not know a command or an option."""
    group = typer.main.get_command(app)
    command = group.commands[arguments[0]]  # type: ignore[attr-defined]
    command.make_context(arguments[0], list(arguments[1:]))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page: Path) -> None:
    """Links to files of this repository lead to files."""
    for target in re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target and "{" not in target:
            assert (page.parent / target).exists(), target


def test_cost_tables() -> None:
    """The README's figures are those of the benchmark's file."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    path = ROOT / "benchmarks" / "cost.json"
    results = json.loads(path.read_text("utf-8"))["results"]
    script = runpy.run_path(str(ROOT / "benchmarks" / "cost.py"))
    for table in script["markdown"](results).strip().split("\n\n"):
        assert table in readme
    assert [
        f"{run['model']}:{run['batch']}x{run['tokens']}" for run in results
    ] == list(script["SHAPES"])
    said = re.search(r"GlobEnc's by at most (\de-\d) of their value", readme)
    assert said is not None
    found = [run["largest_relative_difference_to_textbook"] for run in results]
    assert max(value for value in found if value is not None) <= float(said[1])


def test_citation() -> None:
    """The README and CITATION.cff name the same paper."""
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    for key in ("doi", "year", "start", "end"):
        value = re.search(rf"^  {key}: (.*)$", cited, re.M)[1]  # type: ignore[index]
        assert value in readme


def test_quality_table() -> None:
    """The figures of masking are those of the reports."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    names = {
        "GlobEnc": "globenc",
        "AttnLRP": "attnlrp",
        "DecompX": "decompx",
        "DecompX, three points from [PAD]": "integrated_decompx",
        "Captum's IntegratedGradients, 50 steps": "integrated_gradients",
        "Captum's KernelShap, 200 samples": "kernel_shap",
    }
    means = {}
    for report in ("six-layer", "embedded"):
        lines = (ROOT / "docs" / "benchmark" / report / "table.csv").read_text("utf-8")
        for method, measure, mean, *_ in (line.split(",") for line in lines.split()):
            means[report, method, measure] = mean
    rows = re.findall(
        r"^\| \**(.+?)\** \| \**([\d.]+)\** \| \**([\d.]+)\** \| \**[\d +]+\** \|$",
        readme,
        re.M,
    )
    assert [title for title, *_ in rows] == list(names)
    for title, *figures in rows:
        for report, figure in zip(("six-layer", "embedded"), figures, strict=True):
            assert float(figure) == round(float(means[report, names[title], "aopc"]), 3)
