"""The page about results, as it stands there, in order."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

import lilliput

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "use-the-result.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_page_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    page = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    for block in BLOCKS:
        exec(compile(block, str(PAGE), "exec"), page.__dict__)
    said = vars(page)
    assert len(BLOCKS) == 6
    assert float((said["answers"] == said["y"][400:]).float().mean()) > 0.85
    assert said["names"][0] == "dense" and (tmp_path / "lilliput-larger" / "model.onnx").exists()
    assert said["task"].score(lilliput.load("lilliput-trained")).value > 0.85
    weights = torch.load("weights.pt", weights_only=True)
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert said["worst"][0].startswith("class ") and 0 <= said["worst"][1] < 1
