"""One export, many variants: names, shapes, narrow types that cost no time, files that compute what the model does."""

import inspect
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lilliput.code.base import pack
from lilliput.errors import ExportError
from lilliput.export.onnx import Session, Structure, agreement, clean, load_onnx, opset_of, stripped, trace, verify
from lilliput.stored.einsum import product
from lilliput.stored.grid import Grid, half
from lilliput.stored.plain import Plain
from lilliput.stored.sparse import Sparse


class Small(nn.Module):
    """(N, 1, 8, 8) -> (N, 3), a convolution with a shortcut, pooling and a linear layer."""

    def __init__(self, width=8):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.pool, self.flat, self.last = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.last(self.flat(self.pool(torch.relu(self.second(h) + h))))


class Words(nn.Module):
    """Tied embeddings, a GRU and a mask: two named inputs."""

    def __init__(self):
        super().__init__()
        self.embed, self.gru = nn.Embedding(20, 6), nn.GRU(6, 6, batch_first=True)
        self.out = nn.Linear(6, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens, mask):
        return self.out(self.gru(self.embed(tokens) * mask[..., None])[0].mean(1))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model = Small().train()
    return model, trace(model, torch.zeros(1, 1, 8, 8))


@pytest.fixture(scope="module")
def words():
    torch.manual_seed(0)
    model = Words().eval()
    inputs = {"tokens": torch.randint(0, 20, (5, 4)), "mask": torch.ones(5, 4)}
    return model, inputs, trace(model, inputs)


def images(count=7):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def grids(structure, bits, **options):
    found = {}
    for name, w in structure.weights.items():
        top = 2 ** (bits - 1) - 1
        scale = half(np.abs(w).reshape(len(w), -1).max(1) / top * 1.01 + 1e-4).reshape(-1, *[1] * (w.ndim - 1))
        found[name] = Grid(np.clip(np.round(w / scale), -top, top).astype(int), bits, scale)
    return found


def operators(proto, tmp_path):
    Session(proto, optimised=str(tmp_path / "o.onnx"))
    return Counter(node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node)


def test_trace_names_weights_by_key_and_leaves_the_model_alone(small):
    model, structure = small
    assert model.training and structure.unused == {"unused"}
    assert set(structure.weights) == set(model.state_dict()) - {"unused"}
    for name, value in structure.weights.items():
        assert np.array_equal(value, model.state_dict()[name].numpy())
    assert not structure.constants  # pooling and flattening hold no channel numbers


def test_artifact_computes_what_the_model_computes_for_any_batch(small):
    model, structure = small
    for count in (1, 2, 7):
        expected = model.eval()(images(count)).detach().numpy()
        assert verify(Session(structure.proto).outputs(images(count)), expected, exact=True)["max_abs"] < 1e-5
    model.train()


def test_export_is_deterministic_and_quiet(small, capfd):
    model, structure = small
    again = trace(model, torch.zeros(1, 1, 8, 8))
    assert again.proto.SerializeToString(deterministic=True) == structure.proto.SerializeToString(deterministic=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8, 12])
def test_narrow_weights_are_widened_once_at_load(small, bits, tmp_path):
    _, structure = small
    stored = grids(structure, bits)
    narrow, wide = structure.write(stored), structure.fill(stored)
    onnx.checker.check_model(narrow, full_check=True)
    assert np.array_equal(Session(narrow).outputs(images()), Session(wide).outputs(images()))
    assert operators(narrow, tmp_path) == operators(wide, tmp_path)
    assert not {"Cast", "Mul", "Sub"} & set(operators(narrow, tmp_path))
    assert narrow.ByteSize() < wide.ByteSize()


@pytest.mark.parametrize(
    "change", ["affine", "group", "sparse", "sparse list", "half", "int8", "product", "wide affine"]
)
def test_every_kind_gives_its_decoded_values(small, change, tmp_path):
    _, structure = small
    draw, shape = np.random.default_rng(0), (8, 8, 3, 3)
    codes, scale = draw.integers(0, 16, shape), half(np.full((8, 1, 1, 1), 0.02))
    mask = draw.random(shape) < 0.3
    value = {
        "affine": lambda: Grid(codes, 4, scale, np.full(scale.shape, 8)),
        "wide affine": lambda: Grid(codes * 17, 8, scale, np.full(scale.shape, 3)),
        "group": lambda: Grid(codes - 7, 5, half(draw.random((8, 6, 1))), group=12),
        "sparse": lambda: Sparse(mask, Grid(codes, 4, scale, np.full(scale.shape, 5))),
        "sparse list": lambda: Sparse(mask, Grid(draw.integers(-7, 8, mask.sum()), 4, half(0.1))),
        "half": lambda: Plain(draw.standard_normal(shape).astype(np.float16)),
        "int8": lambda: Plain(draw.integers(-3, 4, shape).astype(np.int8)),
        "product": lambda: product((Plain(np.ones((8, 2), np.float32)), Plain(np.ones((2, 72), np.float32))), shape),
    }[change]()
    stored = {"second.weight": value}
    narrow = structure.write(stored)
    assert np.array_equal(Session(narrow).outputs(images()), Session(structure.fill(stored)).outputs(images()))
    assert operators(narrow, tmp_path) == operators(structure.proto, tmp_path)
    held = {t.name: t for t in structure.fill(stored).graph.initializer}
    assert np.array_equal(numpy_helper.to_array(held["second.weight"]), value.decode())


def test_four_bits_take_half_a_byte(small):
    _, structure = small
    four, eight = (structure.write(grids(structure, bits)) for bits in (4, 8))
    assert opset_of(four) == 21
    kinds = Counter(t.data_type for t in four.graph.initializer)
    assert kinds[TensorProto.INT4] and not kinds[TensorProto.INT8]
    assert eight.ByteSize() - four.ByteSize() >= 0.45 * (8 * 9 + 8 * 8 * 9)


def test_a_narrower_network_is_written_into_the_same_structure(small):
    _, structure = small
    narrower = Small(5).eval()
    stored = {name: Plain(value.numpy()) for name, value in narrower.state_dict().items()}
    expected = narrower(images()).detach().numpy()
    verify(Session(structure.write(stored)).outputs(images()), expected, exact=True)


class Heads(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.first, self.last, self.width = nn.Linear(4, width), nn.Linear(width // 2, 3), width

    def forward(self, x):
        return self.last(self.first(x).reshape(x.shape[0], 2, self.width // 2)).mean(1)


def test_a_graph_that_holds_channel_numbers_asks_to_be_traced_again():
    structure = trace(Heads(8).eval(), torch.zeros(1, 4))
    stored = {name: Plain(value.numpy()) for name, value in Heads(12).state_dict().items()}
    with pytest.raises(ExportError, match="Trace the narrower model"):
        structure.write(stored)


def test_a_name_that_is_no_tensor_is_an_error_with_near_misses(small):
    _, structure = small
    assert structure.write({"unused": Plain(np.ones(2, np.float32))})
    with pytest.raises(KeyError, match=r"first\.weight"):
        structure.write({"frist.weight": Plain(np.ones(2, np.float32))})


def test_tied_tensors_dict_inputs_and_recurrent_cells(words, tmp_path):
    model, inputs, structure = words
    assert structure.aliases == {"out.weight": "embed.weight"}
    assert set(structure.weights) == set(model.state_dict()) - {"out.weight"}
    expected = model(**inputs).detach().numpy()
    verify(Session(structure.proto).outputs(inputs), expected, exact=True)
    stored = grids(structure, 8)
    narrow, wide = structure.write(stored), structure.fill(stored)
    assert np.array_equal(Session(narrow).outputs(inputs), Session(wide).outputs(inputs))
    assert operators(narrow, tmp_path) == operators(wide, tmp_path)


def test_a_small_perceptron_fits_its_bytes():
    class Perceptron(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(40, 64), nn.Linear(64, 72), nn.Linear(72, 10)

        def forward(self, x):
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    structure = trace(Perceptron(), torch.zeros(1, 40))
    stored = {
        n: Plain(w.astype(np.float16)) if w.ndim == 1 else grids(structure, 8)[n] for n, w in structure.weights.items()
    }
    counted = sum(value.storage().size_bytes for value in stored.values())
    assert stripped(structure.write(stored)).ByteSize() - counted < 700


def test_agreement_and_verify():
    a = np.array([[0.0, 1.0], [1.0, 0.0]])
    assert agreement(a, a) == {"max_abs": 0.0, "mean_abs": 0.0, "changed": 0.0}
    tie = np.array([[0.5, 0.50005], [1.0, 0.0]])
    verify(np.array([[0.50005, 0.5], [1.0, 0.0]]), tie, exact=True)  # a change within the margin
    with pytest.raises(ExportError, match="1 of 2 changed"):
        verify(np.array([[1.0, 0.0], [1.0, 0.0]]), a, exact=True)
    many = np.tile(a, (200, 1))
    few = many.copy()
    few[:2] = few[:2, ::-1]
    assert verify(few, many, exact=False)["changed"] == 0.005
    few[2:4] = few[2:4, ::-1]
    with pytest.raises(ExportError, match=r"got 1\.0%"):
        verify(few, many, exact=False)
    with pytest.raises(ExportError, match="finite"):
        verify(a * np.nan, a, exact=False)


def test_inputs_are_checked_by_name_and_number(words):
    _, inputs, structure = words
    session = Session(structure.proto)
    assert np.array_equal(session.outputs(tuple(inputs.values())), session.outputs(inputs))
    with pytest.raises(ValueError, match="inputs must have tokens, mask"):
        session.outputs({"tokens": inputs["tokens"]})
    with pytest.raises(ValueError, match="takes 2 inputs"):
        session.outputs(inputs["tokens"])


class Continues(nn.Module):
    """A causal mask, and torch is not told that it is one."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embed, self.body = nn.Embedding(9, 8), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, tokens):
        return self.body(self.embed(tokens), nn.Transformer.generate_square_subsequent_mask(tokens.shape[1]))


def test_a_causal_mask_need_not_be_called_one():
    torch.manual_seed(0)
    model, tokens = Continues().eval(), torch.arange(15).reshape(3, 5) % 9
    with torch.no_grad():
        expected = model(tokens)
    assert torch.allclose(Session(trace(model, tokens[:1]).proto)(tokens), expected, atol=1e-5)


class Branches(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


class Scaled(nn.Module):
    def forward(self, x):
        return x * float(x.abs().max())


class Arrays(nn.Module):
    def forward(self, x):
        return torch.from_numpy(np.tanh(x.numpy()))


@pytest.mark.parametrize("kind", [Branches, Scaled, Arrays])
def test_a_model_that_torch_cannot_export_is_an_export_error_that_names_its_line(kind, capfd):
    line = inspect.getsourcelines(kind.forward)[1] + 1
    with pytest.raises(ExportError, match=rf"could not export {kind.__name__}: .*\(test_export.py, line {line}\)"):
        trace(kind(), torch.zeros(1, 4))
    assert capfd.readouterr() == ("", "")


def test_from_onnx_folds_batch_norm_and_keeps_names(tmp_path):
    draw = np.random.default_rng(0)
    tensors = {
        "w": draw.standard_normal((4, 1, 3, 3)),
        "g": draw.random(4) + 1,
        "b": draw.random(4),
        "m": draw.random(4),
        "v": draw.random(4) + 1,
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", "g", "b", "m", "v"], ["n"]),
        helper.make_node("Relu", ["n"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 8, 8])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in tensors.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(proto, tmp_path / "m.onnx")
    structure = Structure.from_onnx(tmp_path / "m.onnx", images())
    assert set(structure.weights) == {"w", "w.bias"}
    assert [node.op_type for node in structure.proto.graph.node] == ["Conv", "Relu"]
    assert np.allclose(Session(structure.proto).outputs(images()), Session(proto).outputs(images()), atol=1e-5)


def test_a_file_that_is_no_model_or_reads_elsewhere_is_refused(tmp_path, small):
    (tmp_path / "no.onnx").write_bytes(b"nothing of the kind")
    with pytest.raises(ExportError, match="must be an ONNX model"):
        load_onnx(tmp_path / "no.onnx")
    proto = onnx.ModelProto()
    proto.CopyFrom(small[1].proto)
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "../secret.bin"), ("offset", "0"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    (tmp_path / "out.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ExportError, match="must lie in files beside it"):
        load_onnx(tmp_path / "out.onnx")


def test_cleaning_changes_no_output(small):
    _, structure = small
    assert np.array_equal(Session(clean(structure.proto)).outputs(images()), Session(structure.proto).outputs(images()))


def test_what_the_runtime_raises_about_inputs_is_an_error_of_the_export():
    words = torch.tensor([[0, 1]])
    net = nn.Sequential(nn.Embedding(4, 2), nn.Flatten()).eval()
    session = Session(trace(net, words).write(pack(net)))
    with pytest.raises(ExportError, match="ONNX Runtime raised"):
        session.predict(torch.tensor([[0, 9]]))
