"""The methods of the registry as test parameters. A method with settings that have no default needs a line in MADE."""

from typing import Any

import pytest
import torch
from torch import nn

from lilliput import registry
from lilliput.recipe import Recipe
from lilliput.task import Task

CHECKER = torch.arange(6 * 18).reshape(6, 18) % 3 != 0

MADE: dict[str, list[dict[str, Any]]] = {
    "LowRank": [{"rank": 2}],
    "Reshape": [{"inside": (108,)}],
    "Masked": [{"mask": CHECKER}, {"mask": torch.arange(6)[:, None].expand(6, 18) != 2, "block": (1, 18)}],
    "Uniform": [
        {},
        {"bits": 4, "per": 9, "symmetric": False},
        {"bits": 2, "per": "tensor", "range": "minmax"},
        {"grid": "reduced", "range": "pairs"},
    ],
    "Train": [{"steps": 2}],
    "Prune": [
        {"sparsity": 0.5},
        {"sparsity": 0.4, "score": "taylor", "pattern": "block 2x1", "allocation": "erk"},
        {"sparsity": 0.5, "score": "wanda", "pattern": "2:4", "where": "3"},
        {"allocation": [["3.weight", 0.5]], "score": "random", "every": 1},
    ],
    "Rounds": [{"sparsity": 0.5, "rounds": 3}, {"sparsity": 0.6, "rounds": 2, "score": "grasp", "allocation": "erk"}],
    "Quantize": [
        {},
        {"bits": 3, "per": "tensor", "symmetric": False, "biases": "float32", "allocation": [["7.weight", 8]]},
        {"bits": 3, "per": 9, "grid": "reduced", "rounding": "gptq"},
    ],
    "Factorize": [{"rank": 2}, {"energy": 0.5}, {"budget": 0.7}, {"allocation": [["3.weight", 3]]}],
    "Seam": [{"classes": [0, 1, 2, 3], "steps": 3}, {"classes": [0, 1, 2, 3], "steps": 3, "pattern": "channel"}],
    "Lottery": [{"sparsity": 0.5, "rounds": 2, "training": {"stage": "Train", "steps": 2}, "rewind": 0.5}],
    "STE": [{}, {"sparsity": 0.5, "pattern": "2:4", "where": "3", "decay": 2e-4, "every": 1}],
    "TopKAST": [{}, {"sparsity": 0.5, "allocation": "erk", "pattern": "block 2x1", "every": 1}],
    "STR": [{}, {"sparsity": 0.9}, {"sparsity": 0.5, "allocation": "erk", "every": 1}],
    "ACDC": [{}, {"allocation": [["3.weight", 0.5]], "phases": 2, "warmup": 0.0}],
    "PruneChannels": [
        {"sparsity": 0.5},
        {"sparsity": 0.4, "score": "taylor", "allocation": "global"},
        {"sparsity": 0.5, "score": "batchnorm_scale", "where": "0"},
    ],
    "PruneHeads": [],  # the model of these tests has none
    "Features": [{"paths": ["0", "3"]}],
    "SparseGPT": [{"sparsity": 0.5}, {"sparsity": 0.5, "pattern": "2:4", "where": "3", "width": 4}],
    "OBC": [{"sparsity": 0.5}, {"allocation": [["3.weight", 0.5]], "pattern": "block 2x1"}],
    "WoodFisher": [{"sparsity": 0.5}, {"sparsity": 0.6, "rounds": 2, "allocation": "erk", "size": 5}],
    "PruneToBudget": [{"macs": 4000}, {"bytes": 1200, "score": "taylor", "pattern": "block 2x1"}],
    "RemoveBlocks": [],  # nor has it a residual block
    "EarlierStride": [{"layers": ["0"]}],
    "Narrow": [{"width": 0.5}, {"width": 0.5, "multiple": 1, "spread": True}],
    "PruneRows": [],  # nor a table
    "FoldRows": [],
    "NarrowTables": [],
    "DropTables": [],
    "Encode": [{"code": {"code": "Uniform", "bits": 4}}],
    "PatternLock": [{"least": 0.0}],
    "Squeeze": [
        {"allocation": [["3.weight", "tensor", 0.05]]},
        {"allocation": [["0.weight", "channel", 4], ["7.bias", "tensor", 8]]},
    ],
}


def made(kind: str) -> list[Any]:
    """One `pytest.param` for each way of making each method of a kind."""
    cases = []
    for entry in registry.methods():
        if kind in entry.kinds:
            for i, settings in enumerate(MADE.get(entry.name, [{}])):
                cases.append(pytest.param((entry, settings), id=f"{entry.name}{i or ''}"))
    return cases


def pytest_generate_tests(metafunc: Any) -> None:
    for kind, fixture in (("Code", "code"), ("Code", "code_for"), ("Stage", "stage"), ("Rule", "rule")):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, made(kind), indirect=True)


@pytest.fixture
def code(request: Any) -> Any:
    """A function that makes the code anew."""
    entry, settings = request.param
    return lambda: entry.load()(**settings)


@pytest.fixture
def code_for(request: Any) -> Any:
    """A function that makes the code anew for a tensor: a mask, or another setting of its size, is given its shape."""
    entry, settings = request.param

    def make(tensor: torch.Tensor) -> Any:
        fitted = dict(settings)
        if "mask" in settings and "block" not in settings:
            fitted["mask"] = (torch.arange(tensor.numel()) % 3 != 0).reshape(tensor.shape)
        if "inside" in settings:
            fitted["inside"] = (tensor.numel(),)
        return entry.load()(**fitted)

    return make


@pytest.fixture
def stage(request: Any) -> Any:
    entry, settings = request.param
    return Recipe.parse([{"stage": entry.name, **settings}]).stages[0]


rule = stage


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    net(torch.randn(16, 2, 5, 5))
    return net.eval()


@pytest.fixture
def task() -> Task:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(24, 2, 5, 5, generator=generator), torch.arange(24) % 4
    return Task("tiny", train=(x, y), val=(x[:8], y[:8]), batch_size=8)
