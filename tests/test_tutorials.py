"""The tutorials as they are kept: ``make docs`` runs them and fails with an assert.

Here is checked what running them does not show.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def name_of(path: Path) -> str:
    return path.stem


def order() -> list[str]:
    """``TUTORIALS`` of docs/conf.py, which cannot be imported without Sphinx."""
    tree = ast.parse((ROOT / "docs" / "conf.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "TUTORIALS":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise AssertionError("docs/conf.py has no TUTORIALS")


def read(path: Path) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def sources(notebook: dict[str, Any], kind: str) -> list[str]:
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == kind]


def test_order() -> None:
    assert sorted(order()) == [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_kept_without_outputs(path: Path) -> None:
    notebook = read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert re.fullmatch("[a-zA-Z0-9_-]{1,64}", cell["id"])
        # No times of a run, no state of an editor.
        assert set(cell["metadata"]) <= {"tags", "mystnb"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_begins_with_what_the_reader_will_have(path: Path) -> None:
    first = read(path)["cells"][0]
    assert first["cell_type"] == "markdown"
    title, _, promise = "".join(first["source"]).partition("\n\n")
    assert re.fullmatch("# .+", title)
    assert promise.startswith("At the end you have ")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_claims_are_asserted(path: Path) -> None:
    code = "\n".join(sources(read(path), "code"))
    assert sum(isinstance(n, ast.Assert) for n in ast.walk(ast.parse(code))) >= 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_needs_nothing_from_elsewhere(path: Path) -> None:
    code = "\n".join(sources(read(path), "code"))
    # No hub, no download, no file of one machine, no command of a shell.
    for forbidden in (
        r"https?:|from_pretrained|hf_hub|load_dataset|fetch_",
        r"[\"']/|[\"']~|\b[A-Z]:\\",
        r"^[!%]",
    ):
        assert not re.findall(forbidden, code, re.MULTILINE)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_links(path: Path) -> None:
    """Relative links exist for readers of the repository, and on the site."""
    text = "\n".join(sources(read(path), "markdown"))
    for target in re.findall(r"\]\(([^)\s#]+)", text):
        if "://" not in target:
            assert (FOLDER / target).is_file(), target
            # What the site has: other notebooks, and what docs/conf.py finds in docs/.
            assert re.fullmatch(r"\w+\.ipynb|\.\./docs/.+\.md", target), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_pictures_are_described(path: Path) -> None:
    for cell in read(path)["cells"]:
        if "plt.subplots" in "".join(cell["source"]):
            alt = cell["metadata"]["mystnb"]["image"]["alt"]
            assert len(alt.split()) >= 10, cell["id"]
