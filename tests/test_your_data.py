"""Every example of the page about data, as it stands there."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

from lilliput.task import Task, length, take

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "your-data.md"
EXAMPLES = dict(
    re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
)
SIZES = {  # examples to train on, and the shape of what the targets of one look like
    "Hugging Face data sets": (4, ()),
    "Several inputs": (40, ()),
    "Examples of different lengths": (20, (3,)),
    "Streams": (50, ()),
    "Tables": (4, ()),
    "Arrays larger than memory": (150, ()),
    "Random transforms": (40, ()),
    "Metrics of other libraries": (60, ()),
}


def test_the_page_has_an_example_of_each_kind() -> None:
    assert list(EXAMPLES) == list(SIZES)
    assert all(len(block.strip().splitlines()) <= 12 for block in EXAMPLES.values())


@pytest.mark.parametrize("title", SIZES)
def test_an_example_makes_a_task(title: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    page = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)
    exec(compile(EXAMPLES[title], str(PAGE), "exec"), page.__dict__)
    examples, shape = SIZES[title]
    for task in (thing for thing in vars(page).values() if isinstance(thing, Task)):
        batch = next(task.batches(1, seed=0, batch_size=4))
        assert task.examples == examples and batch.targets.shape[1:] == shape and length(batch.inputs) == 4
        places = () if shape == () else shape
        outputs = torch.randn(task.size("val"), *places, 1 if title == "Tables" else 10)
        outputs = outputs[..., :3] if title.startswith("Metrics") else outputs
        assert torch.isfinite(task.loss(take(outputs, slice(0, 4)), batch))
        assert task.rate(outputs, "val").value >= 0
