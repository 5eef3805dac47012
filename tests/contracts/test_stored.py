"""What holds for every code on every kind of layer: its tensor is as small in both files as it is counted.

Each tensor is written alone, as one graph of the operators of its kind: no export by torch, so that this stays fast. In
model.onnx a tensor may take FACTOR times the counted bytes, where each value counts as 4 bits at least, since integers
are not narrower there and zeros are written out; and ROOM bytes for the nodes. A code may refuse a tensor, if it says
which and why.
"""

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from lilliput.code.base import attach, pack
from lilliput.errors import NotSupported
from lilliput.onnx.session import Session
from lilliput.stored.base import section
from lilliput.stored.operators import Operators

FACTOR, ROOM = 3, 700
LAYERS = {
    "linear": (lambda: nn.Linear(144, 48), "weight"),
    "conv1d": (lambda: nn.Conv1d(48, 48, 3), "weight"),
    "conv2d": (lambda: nn.Conv2d(16, 48, 3), "weight"),
    "grouped": (lambda: nn.Conv2d(32, 48, 3, groups=2), "weight"),
    "depthwise": (lambda: nn.Conv2d(768, 768, 3, groups=768), "weight"),
    "embedding": (lambda: nn.Embedding(48, 144), "weight"),
    "gru": (lambda: nn.GRU(8, 48), "weight_hh_l0"),
    "lstm": (lambda: nn.LSTM(8, 36), "weight_hh_l0"),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rooted", [True, False], ids=["root", "inside"])
def test_a_coded_tensor_is_as_small_in_both_files_as_it_is_counted(code_for, layer, rooted):
    torch.manual_seed(0)
    make, attribute = LAYERS[layer]
    module = make()
    model, name = (module, attribute) if rooted else (nn.ModuleList([module]), f"0.{attribute}")
    made = code_for(getattr(module, attribute))
    try:
        attach(model, name, made)
    except NotSupported as error:
        assert type(made).__name__ in str(error) and name in str(error) and ": " in str(error)
        return
    with torch.no_grad():
        decoded = getattr(module, attribute).numpy()
    stored = pack(model)[name]
    np.testing.assert_allclose(stored.decode(), decoded, rtol=0, atol=1e-6)
    counted = stored.storage().size_bytes
    assert len(section(stored)) == counted == stored.cost("lil")

    writer = Operators(tiny=True)
    stored.onnx(writer, "w")
    output = helper.make_tensor_value_info("w", TensorProto.FLOAT, list(stored.shape))
    graph = helper.make_graph(writer.nodes, "g", [], [output], list(writer.tensors.values()))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    np.testing.assert_array_equal(Session(proto).all({})[0], stored.decode())
    assert (
        not writer.decoded and stored.cost("onnx") <= proto.ByteSize() < FACTOR * max(counted, decoded.size // 2) + ROOM
    )
