"""Plans are told apart by all of their settings, and an export that was refused is not tried again."""

from typing import Any

import pytest
import torch
from torch import nn

from lilliput import Distill, ExportError, Recipe, Task, Train
from lilliput.graph.stages import Narrow, RemoveBlocks
from lilliput.search import points
from lilliput.search.points import Clock, Press
from lilliput.search.space import identity, structure, topology

TRAINING = Train(steps=1, rules=(Distill(),))


def test_plans_share_a_graph_only_where_shapes_alone_differ() -> None:
    first, other, narrow = (
        Recipe((*stages, TRAINING))
        for stages in ((RemoveBlocks(("1",)),), (RemoveBlocks(("2",)),), (RemoveBlocks(("1",)), Narrow(0.5)))
    )
    assert topology(first) != topology(other)
    assert topology(first) == topology(narrow) and identity(structure(first)) != identity(structure(narrow))


def test_a_refused_export_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(8, 2)
    tries: list[Any] = []

    def refuse(*arguments: Any) -> Any:
        tries.append(arguments)
        raise ExportError("trace: torch could not export it")

    monkeypatch.setattr(points.onnx_export, "trace", refuse)
    press = Press(Task("toy", (x, x), (x, x), loss="mse", metric="mse"), Clock(None))
    for _ in range(2):
        with pytest.raises(ExportError, match="could not export"):
            press.structure(nn.Linear(2, 2), "plain")
    assert len(tries) == 1
