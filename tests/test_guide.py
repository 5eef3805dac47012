"""The models that the guide shrinks: the code of each section as it stands there, with its search."""

import ast
import re
import sys
import types
from pathlib import Path

import pytest
import torch

import lilliput
from lilliput.task import leaves, predict

GUIDE = Path(__file__).parents[1] / "docs" / "guide"
KINDS = {
    "vision": ("A detector", "A segmenter", "A denoiser"),
    "series": ("Several steps ahead",),
    "text": ("A tagger", "A language model", "A sequence-to-sequence model", "A two-tower model"),
    "recommender": ("Shrink a recommender",),
}


def example(page: str, title: str) -> str:
    """The code of the section of a page."""
    text = (GUIDE / f"{page}.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^#+ {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return code


SLOW = ("A tagger", "A language model", "A sequence-to-sequence model", "A segmenter")
CASES = [
    pytest.param(page, title, id=title, marks=[pytest.mark.slow] if title in SLOW else [])
    for page, titles in KINDS.items()
    for title in titles
]


@pytest.mark.parametrize(("page", "title"), CASES)
def test_a_kind_of_model_is_shrunk(page: str, title: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = example(page, title)
    (model,) = [node for node in ast.parse(code).body if isinstance(node, ast.ClassDef)]
    assert (model.end_lineno or 0) - model.lineno < 20, "the model is short"
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # where the source of its functions is looked for
    torch.manual_seed(0)
    exec(compile(code, str(GUIDE / f"{page}.md"), "exec"), module.__dict__)
    task, summary = module.task, module.result.summary
    assert module.result.met and summary["chosen"]["packed_bytes"] < summary["dense"]["packed_bytes"] / 2
    assert summary["drop_val"] <= summary["floor"]
    # The file gives what was scored, in the structure that the model returns.
    loaded, inputs = lilliput.load(tmp_path / f"lilliput-{task.name}"), task.calibration(3)
    assert task.score(loaded).value == pytest.approx(summary["chosen"]["val"], rel=1e-2, abs=1e-2)
    given, whole = (leaves(predict(net, inputs)) for net in (loaded, module.model))
    assert [leaf.shape for leaf in given] == [leaf.shape for leaf in whole]
