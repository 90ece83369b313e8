"""The wheel in a clean environment, without the checkout: `make wheel` (minutes)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.wheel
def test_wheel_runs_explain(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("captum_globenc-*.whl")
    assert wheel.stat().st_size < 17_000_000
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    binaries = environment / ("Scripts" if os.name == "nt" else "bin")
    subprocess.run(
        [
            binaries / "python",
            *("-m", "pip", "install", "--quiet"),
            *("--constraint", ROOT / "constraints.txt"),
            wheel,
        ],
        check=True,
    )
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    run = subprocess.run(
        [binaries / "captum-globenc", "explain", "A lovely film.", "--json"],
        cwd=tmp_path,
        env=variables,
        check=True,
        capture_output=True,
        text=True,
    )
    explanation = json.loads(run.stdout)
    assert explanation["predicted"]["label"] == "positive"
    assert [method["name"] for method in explanation["methods"]] == [
        "globenc",
        "attnlrp",
        "decompx",
        "integrated_gradients",
    ]
    installed = subprocess.run(
        [binaries / "python", "-c", "import captum_globenc as c; print(c.__file__)"],
        cwd=tmp_path,
        env=variables,
        check=True,
        capture_output=True,
        text=True,
    )
    assert str(environment) in installed.stdout
