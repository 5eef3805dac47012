"""Names in model.onnx: the network's own and the producer's, or none where every byte counts."""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import lilliput
from lilliput.onnx.session import Session
from lilliput.search.question import question

X = torch.linspace(-1, 1, 24).reshape(2, 3, 4)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 2))


def test_a_file_names_its_tensors_and_who_made_it(tmp_path: Path) -> None:
    model = net()
    lilliput.attach(model, "1.weight", lilliput.LowRank(2))
    lilliput.save(model, X[:1], tmp_path)
    proto = onnx.load(tmp_path / "model.onnx")
    assert (proto.producer_name, proto.producer_version) == ("lilliput", version("lilliput"))
    values = {tensor.name for tensor in proto.graph.initializer} | {o for n in proto.graph.node for o in n.output}
    assert {"1.0.weight", "1.1.weight", "3.weight", "3.bias"} <= values  # a layer of low rank is two


def test_without_names_it_is_smaller_and_computes_the_same(tmp_path: Path) -> None:
    sizes = [lilliput.save(net(), X[:1], tmp_path / str(strip), strip=strip)["model.onnx"] for strip in (False, True)]
    named, nameless = (onnx.load(tmp_path / str(strip) / "model.onnx") for strip in (False, True))
    assert sizes[1] < sizes[0] and not nameless.producer_name
    assert max(len(tensor.name) for tensor in nameless.graph.initializer) == 1
    assert [v.name for v in nameless.graph.input] == [v.name for v in named.graph.input]
    assert [v.name for v in nameless.graph.output] == [v.name for v in named.graph.output]
    np.testing.assert_array_equal(Session(nameless).outputs(X), Session(named).outputs(X))


@pytest.mark.parametrize(
    ("asked", "nameless"),
    [
        ({}, False),
        ({"file": "onnx"}, True),
        ({"file": "onnx", "strip": False}, False),
        ({"objective": "latency", "file": "onnx"}, False),
        ({"objective": "latency", "file": "onnx", "max_bytes": 9000}, True),
        ({"strip": True}, True),
    ],
)
def test_names_go_where_the_bytes_of_the_file_are_what_counts(asked: dict[str, object], nameless: bool) -> None:
    assert question(**asked).nameless is nameless  # type: ignore[arg-type]
