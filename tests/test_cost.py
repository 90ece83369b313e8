"""The script that measures the price runs; its textbook form gives the same scores."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "cost.py"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_script_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "cost.json"
    given = ["--batch", "1", "--tokens", "6", "--single-tokens", "4"]
    given += ["--rounds", "1", "--slow-rounds", "1"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given, "--output", str(output)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    first, single = json.loads(output.read_text("utf-8"))["results"]
    assert first["largest_relative_difference_to_textbook"] < 1e-4
    assert len(first["methods"]) == 4
    assert single["tokens"] == 4
    assert list(single["methods"]) == ["forward pass", "GlobEnc"]
