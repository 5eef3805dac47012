"""Einsum and attention: what ONNX's reference computes, for shapes that its node tests do not have."""

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from lilliput.engine.compile import compile
from lilliput.engine.graph import Node
from lilliput.engine.ops.einsum import parsed


def agrees(node: object, shapes: dict[str, tuple[int, ...]], made: list[str], opset: int = 21) -> None:
    given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    graph = helper.make_graph(
        [node], "g", given, [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in made]
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    draw = np.random.default_rng(0)
    feeds = {n: draw.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    outputs = compile(proto, tune=False)(**feeds)
    for a, b in zip(
        outputs if isinstance(outputs, tuple) else (outputs,), ReferenceEvaluator(proto).run(None, feeds), strict=True
    ):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bhqd,bhkd->bhqk", [(2, 3, 4, 5), (2, 3, 6, 5)]),
        ("...ij,...jk", [(2, 1, 4, 5), (1, 3, 5, 6)]),
        ("iij,j->i", [(3, 3, 4), (4,)]),
        ("ij,jk,kl->li", [(2, 3), (3, 4), (4, 5)]),
        ("i,j->ij", [(3,), (4,)]),
        ("bij->b", [(2, 3, 4)]),
        ("ab,ab->a", [(3, 4), (3, 4)]),
    ],
)
def test_einsum(equation: str, shapes: list[tuple[int, ...]]) -> None:
    names = [f"x{i}" for i in range(len(shapes))]
    agrees(helper.make_node("Einsum", names, ["y"], equation=equation), dict(zip(names, shapes, strict=True)), ["y"])


def test_einsum_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="equation must fit"):
        parsed("ij,jk->ik", [2], Node("Einsum", [], [], name="e"))


@pytest.mark.parametrize("attrs", [{}, {"is_causal": 1, "softcap": 2.0}])
def test_attention_with_shared_heads_and_a_past(attrs: dict[str, object]) -> None:
    shapes = {"q": (2, 5, 24), "k": (2, 5, 12), "v": (2, 5, 8), "pk": (2, 2, 3, 6), "pv": (2, 2, 3, 4)}
    node = helper.make_node(
        "Attention", ["q", "k", "v", "", "pk", "pv"], ["y", "k2", "v2"], q_num_heads=4, kv_num_heads=2, **attrs
    )
    agrees(node, shapes, ["y", "k2", "v2"], 24)
