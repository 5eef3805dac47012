"""Static int8: what a runtime fuses, what stays exact, what is chosen and left out."""

from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional as F

import lilliput
from lilliput.errors import NotSupported
from lilliput.export.guard import saturating
from lilliput.onnx.session import Session
from lilliput.onnx.trace import trace
from lilliput.quant.static import observe, static, written
from lilliput.search.integers import Group, _choices, _split, integers

T = TypeVar("T")


class Mobile(nn.Module):
    """A strided, a depthwise, a pointwise and a full convolution with a residual sum, a pool and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, stride=2)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.full = nn.Conv2d(16, 32, 3, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu6(self.stem(x))
        x = x + self.point(F.relu6(self.depth(x)))
        x = F.max_pool2d(torch.relu(self.full(x)), 2)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.fixture
def mobile() -> tuple[ModelProto, torch.Tensor, list[dict[str, Any]]]:
    torch.manual_seed(0)
    x = torch.randn(24, 3, 32, 32)
    proto = trace(Mobile().eval(), x[:1]).proto
    return proto, x, [{proto.graph.input[0].name: x[i : i + 8].numpy()} for i in range(0, 24, 8)]


def kinds(proto: ModelProto, folder: Path) -> Counter[str]:
    """The operators that the runtime makes of a file."""
    Session(proto, optimised=str(folder / "optimised.onnx"))
    return Counter(node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node)


def returned(pieces: Generator[float, None, T]) -> T:
    """What work in pieces returns at its end."""
    while True:
        try:
            next(pieces)
        except StopIteration as end:
            return cast(T, end.value)


def apart(proto: ModelProto, other: ModelProto, x: Any) -> float:
    dense = Session(proto).outputs(x)
    return float(np.square(Session(other).outputs(x) - dense).sum() / np.square(dense - dense.mean(0)).sum())


def test_the_runtime_computes_everything_in_integers(mobile: Any, tmp_path: Path) -> None:
    proto, x, runs = mobile
    small = static(proto, runs)
    found = kinds(small, tmp_path)
    assert found["QLinearConv"] == 4 and found["QLinearAdd"] == 1 and found["QGemm"] == 1
    assert not found["Conv"] and not found["FusedConv"] and not found["Clip"] and not found["Relu"]
    assert apart(proto, small, x) < 0.02
    assert small.ByteSize() < proto.ByteSize() / 2


def test_no_pair_of_weights_can_saturate(mobile: Any) -> None:
    proto, _, runs = mobile
    assert not saturating(static(proto, runs))


@pytest.mark.parametrize("rule", ["mse", "minmax"])
def test_only_what_is_chosen_is_quantized(mobile: Any, tmp_path: Path, rule: str) -> None:
    proto, x, runs = mobile
    seen = observe(proto, runs)
    full = next(site.name for site in seen.sites if site.weight == "full.weight")
    small = written(seen, [full], rule)
    found = kinds(small, tmp_path)
    assert found["QLinearConv"] == 1 and not found["QLinearAdd"] and not found["QGemm"]
    assert apart(proto, small, x) < apart(proto, written(seen, [s.name for s in seen.sites], rule), x)
    assert apart(proto, written(seen, [], rule), x) < 1e-10


def test_a_series_and_a_product_without_bias(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv1d(4, 8, 5, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 12, 6, bias=False))
    x = torch.randn(64, 4, 16)
    proto = trace(net.eval(), x[:1]).proto
    small = static(proto, [{proto.graph.input[0].name: x.numpy()}])
    assert apart(proto, small, x) < 0.01
    assert kinds(small, tmp_path)["QLinearConv"] == 1


def test_dead_outputs_keep_their_bias() -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        net[0].weight[1] = 0  # type: ignore[index, operator]
        net[0].bias[1] = 5.0  # type: ignore[index, operator]
        net[2].weight[:, 1] = 10  # type: ignore[index, operator]
    x = torch.randn(64, 8)
    proto = trace(net.eval(), x[:1]).proto
    small = static(proto, [{proto.graph.input[0].name: x.numpy()}])
    assert np.abs(Session(small).outputs(x) - Session(proto).outputs(x)).max() < 0.5


def test_values_that_are_outputs_keep_their_names() -> None:
    draw = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Conv", ["r", "v"], ["y"], pads=[1, 1, 1, 1]),
    ]
    tensors = [
        numpy_helper.from_array(draw.standard_normal(shape).astype("f"), name)
        for name, shape in (("w", (8, 3, 3, 3)), ("v", (4, 8, 3, 3)))
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", 1, ["n", 3, 8, 8])], [value(n, 1, None) for n in ("c", "r", "y")], tensors
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = draw.standard_normal((4, 3, 8, 8)).astype("f")
    small = static(proto, [{"x": x}])
    assert [o.name for o in small.graph.output] == ["c", "r", "y"]
    for a, b in zip(Session(proto).all({"x": x}), Session(small).all({"x": x}), strict=True):
        assert np.square(a - b).sum() < 0.01 * np.square(a).sum()


def test_what_cannot_be_quantized_is_said() -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(NotSupported, match="has none"):
        static(proto, [{"x": np.ones(1, "f")}])
    with pytest.raises(ValueError, match="at least one run, got none"):
        static(proto, [])


def test_the_group_that_hurts_is_found_alone() -> None:
    names = tuple("abcdefgh")

    def harm(part: tuple[str, ...]) -> float:
        return 1.0 * ("f" in part) + 0.002 * len(part)

    groups = returned(_split(Group(names, 1.02), harm, float("inf"), 0.0))
    assert Group(("f",), 1.002) in groups and sum(len(group.names) for group in groups) == 8


def test_choices_leave_out_what_hurts_for_what_it_gains() -> None:
    groups = [Group(("a",), 0.1, 0.2), Group(("b",), 4.0, 0.1), Group(("c",), 0.2, 0.3)]
    choices = _choices(groups)
    assert set(choices[0].names) == {"a", "b", "c"} and set(choices[1].names) == {"a", "c"}
    assert choices[0].time < choices[1].time < 1


def test_integers_are_measured(mobile: Any) -> None:
    proto, x, runs = mobile
    dense = torch.from_numpy(Session(proto).outputs(x))
    task = lilliput.Task("mobile", train=(x, dense.argmax(1)), val=(x, dense.argmax(1)))
    found = returned(integers(observe(proto, runs), task, x, seconds=2.0))
    harms = [choice.harm for choice in found.choices]
    assert harms == sorted(harms, reverse=True)
    for choice in found.choices:
        assert apart(proto, found.write(choice), x) < 0.05
