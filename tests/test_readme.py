"""The code in the README and the guides runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("pandas")

ROOT = Path(__file__).parents[1]


def code(page: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^( *)```python\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [re.sub(f"^{indent}", "", block, flags=re.M) for indent, block in blocks]


def test_readme(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    blocks = code("README.md")
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    scores = names["scores"]
    assert isinstance(scores, torch.Tensor)
    assert scores.shape == names["batch"]["input_ids"].shape
    assert (scores >= 0).all()
    assert not scores[names["batch"]["attention_mask"] == 0].any()
    table = names["result"].table
    assert set(table.index.get_level_values("method")) == {
        "GlobEnc",
        "gradient",
        "chance",
    }
    rollout = names["decomposition"].rollout()[:, 0]
    torch.testing.assert_close(rollout, scores, rtol=1e-4, atol=0)


def test_contributing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from captum_globenc import architectures

    monkeypatch.setattr(architectures, "_TABLE", dict(architectures._TABLE))
    for block in code("CONTRIBUTING.md"):
        exec(block, {})
    printed = capsys.readouterr().out
    assert "my-bert" in architectures.supported_model_types()
    for part in ("query", "dense", "LayerNorm"):
        assert part in printed
