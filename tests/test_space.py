"""Plans are told apart by all of their settings, and an export that was refused is not tried again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lilliput import Distill, ExportError, Recipe, Task, Train
from lilliput.graph.stages import EarlierStride, Narrow, RemoveBlocks
from lilliput.proposal import Known, Proposals
from lilliput.runner import Runner
from lilliput.search import points
from lilliput.search.points import Clock, Press
from lilliput.search.space import Space, identity, structure, topology
from lilliput.store import Store
from lilliput.task import call

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


def striding() -> tuple[nn.Module, Task]:
    """The first convolution that may take a stride lies in a block that may go."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, padding=1), nn.ReLU(), block, nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    x, y = torch.randn(24, 3, 16, 16), torch.arange(24) % 4
    return net.eval(), Task("striding", train=(x, y), val=(x, y), batch_size=8)


def looked_up() -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(300, 12), nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 3)).eval()
    x, y = torch.randint(0, 300, (24, 4)), torch.arange(24) % 3
    return net, Task("ids", train=(x, y), val=(x, y), batch_size=8)


def test_a_plan_whose_stride_was_removed_takes_another(tmp_path: Path) -> None:
    """What a method offers on the dense network is asked for anew where an earlier stage took it away."""
    model, task = striding()
    space = Space.of(Runner(model, task, Store(tmp_path)), Known())
    remove, stride = (
        next(axis for axis in space.axes if axis.name == name) for name in ("RemoveBlocks", "EarlierStride")
    )
    assert stride.offered.options[0].layers == ("2.0",) and "2.0" in remove.offered.options[-1].blocks
    space.axes = replace(remove, offered=Proposals((RemoveBlocks(("2.0",)),))), stride
    plan = space.plan({"RemoveBlocks": 1, "EarlierStride": 1})
    assert [stage.layers for stage in plan.stages if isinstance(stage, EarlierStride)] == [("3",)]
    assert call(space.runner.make(structure(plan)), task.example).shape == (1, 4)


@pytest.mark.parametrize("make", [striding, looked_up])
def test_every_starter_builds_and_runs(make: Callable[[], tuple[nn.Module, Task]], tmp_path: Path) -> None:
    model, task = make()
    space = Space.of(Runner(model, task, Store(tmp_path)), Known())
    for choice in space.starters():
        made = space.runner.make(structure(space.plan(choice)))
        assert call(made, task.example).shape == call(model, task.example).shape
    assert space.axes[-1].name == "FromScratch"
