"""Every example of the guide to tasks, end to end: the code on the page, then a search of one trial."""

import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import lilliput
from lilliput.task import leaves, predict

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "tasks.md"
EXAMPLES = dict(
    re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
)


def test_the_page_has_an_example_of_each_kind() -> None:
    assert len(EXAMPLES) == 7
    for title, block in EXAMPLES.items():
        body = [line for line in block.split("\n\n")[-1].splitlines() if line and not line.startswith(" ")]
        assert len(body) <= 10, f"{title}: what makes network and task is short"


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_is_shrunk(title: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)  # where the source of its functions is looked for
    torch.manual_seed(0)
    exec(compile(EXAMPLES[title], str(PAGE), "exec"), page.__dict__)
    model, task = page.model, page.task
    result = lilliput.shrink(model, task, floor="30r", budget=None, trials=1, out=tmp_path / "out")
    summary = result.summary
    assert result.met and summary["chosen"]["onnx_bytes"] < summary["dense"]["onnx_bytes"] / 1.5
    assert summary["dense"]["val"] == pytest.approx(task.score(model).value, abs=1e-3)
    # Structures were trained and quantized, not only the dense network.
    names = [point["name"] for point in summary["points"] if point["status"] == "done"]
    assert any("width" in name and "bits" in name for name in names), summary["points"]
    low, high = summary["drop_corrected_interval"]
    assert np.isfinite([low, high]).all()
    # What the files compute is what was scored, in the structure that the model returns.
    loaded = lilliput.load(tmp_path / "out")
    assert task.score(loaded).value == pytest.approx(summary["chosen"]["val"], abs=1e-2 * abs(summary["chosen"]["val"]))
    inputs = task.calibration(3)
    mine, theirs = predict(model, inputs), predict(loaded, inputs)
    assert type(theirs).__mro__[1] in (type(mine), torch._C.TensorBase), "a tensor, or a dictionary of them"
    assert [leaf.shape for leaf in leaves(mine)] == [leaf.shape for leaf in leaves(theirs)]
