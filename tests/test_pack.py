"""model.lil: as long as it was counted, exact when read back, and refused whole where a byte is wrong."""

import hashlib
import itertools
import os
import struct
import zlib

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lilliput.errors import ExportError, StoreError
from lilliput.export import pack
from lilliput.export.graph import read_attribute, write_attribute
from lilliput.export.names import ATTRIBUTES, OPERATORS
from lilliput.export.network import Network
from lilliput.export.onnx import Session
from lilliput.stored.base import limits
from lilliput.stored.bits import ByteReader, ByteWriter, varint
from lilliput.stored.einsum import Einsum, product
from lilliput.stored.grid import Grid, half
from lilliput.stored.plain import Plain
from lilliput.stored.sparse import Sparse
from lilliput.stored.table import Table


def model(weight):
    """x (batch, 8) -> Gemm with `weight` (16, 8), a bias and a small constant."""
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Reshape", ["r", "shape"], ["y"]),
    ]
    tensors = [
        numpy_helper.from_array(weight.astype(np.float32), "w"),
        numpy_helper.from_array(np.linspace(-1, 1, 16, dtype=np.float32), "b"),
        numpy_helper.from_array(np.array([-1, 4, 4]), "shape"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 4])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def grid(shape, bits, affine=False, per="channel", group=None, seed=0):
    draw = np.random.default_rng(seed)
    low, high = limits(bits, affine)
    codes = np.clip(np.round(draw.normal((low + high) / 2, (high - low) / 6 + 0.4, shape)), low, high).astype(int)
    scales = (1,) * len(shape) if per == "tensor" else (shape[0],) + (1,) * (len(shape) - 1)
    if group:
        scales = (shape[0], codes.size // shape[0] // group, 1)
    scale = half(draw.random(scales) + 0.1)
    return Grid(codes, bits, scale, draw.integers(low, high + 1, scales) if affine else None, group)


def sparse(values, share=0.3, block=None, seed=0):
    draw = np.random.default_rng(seed)
    shape = tuple(n // b for n, b in zip((16, 8), block or (1, 1), strict=True))
    mask = draw.random(shape) < share
    for axis, b in enumerate(block or ()):
        mask = np.repeat(mask, b, axis)
    kept = int(mask.sum())
    inner = {
        "float32": lambda: Plain(draw.standard_normal(kept).astype(np.float32)),
        "float16": lambda: Plain(draw.standard_normal(kept).astype(np.float16)),
        "grid": lambda: grid((kept,), 4, per="tensor"),
        "whole": lambda: grid((16, 8), 5),
        "affine": lambda: grid((16, 8), 3, affine=True),
        "group": lambda: grid((16, 8), 3, group=4),
        "plain": lambda: Plain(np.ones((16, 8), np.float16)),
    }[values]()
    return Sparse(mask, inner, block)


def floats(*shape):
    return Plain(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


def mask(share=0.5):
    return np.random.default_rng(1).random((16, 8)) < share


def two_of_four():
    draw = np.random.default_rng(0)
    mask = np.concatenate([draw.permutation([True, True, False, False]) for _ in range(32)]).reshape(16, 8)
    return Sparse(mask, Plain(draw.standard_normal(64).astype(np.float32)))


KINDS = {
    "float32": lambda: Plain(np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)),
    "float16": lambda: Plain(np.random.default_rng(0).standard_normal((16, 8)).astype(np.float16)),
    "int8": lambda: Plain(np.arange(128, dtype=np.int8).reshape(16, 8) - 64),
    **{f"grid{b}": lambda b=b: grid((16, 8), b) for b in (2, 3, 4, 5, 6, 8, 11)},
    **{f"affine{b}": lambda b=b: grid((16, 8), b, affine=True) for b in (1, 3, 8)},
    "tensor": lambda: grid((16, 8), 4, per="tensor"),
    "group": lambda: grid((16, 8), 3, group=4),
    "coded": lambda: Grid(np.eye(16, 8, dtype=int), 8, half(np.ones((1, 1)))),
    "zeros": lambda: Grid(np.zeros((16, 8), int), 2, half(np.ones((1, 1)))),
    **{
        f"sparse {v}": lambda v=v: sparse(v)
        for v in ("float32", "float16", "grid", "whole", "affine", "group", "plain")
    },
    "sparse 5%": lambda: sparse("float32", 0.05),
    "sparse 95%": lambda: sparse("float32", 0.95),
    "sparse none": lambda: sparse("float32", 0.0),
    "blocks": lambda: sparse("whole", 0.5, (4, 2)),
    "2:4": two_of_four,
    "product": lambda: product((grid((16, 3), 4), grid((3, 8), 5, affine=True)), (16, 8)),
    "einsum": lambda: Einsum((floats(4, 3), floats(3, 4, 2), floats(2, 2, 4)), "ar,rbs,sdc->abdc", (16, 8)),
    "stacks": lambda: product((floats(4, 4, 2), floats(4, 2, 8)), (16, 8)),
    "table": lambda: Table(np.random.default_rng(0).integers(0, 16, (16, 8)), floats(16).array),
    "table of pairs": lambda: Table(np.random.default_rng(0).integers(0, 5, (16, 4)), floats(5, 2).array),
    "table of one": lambda: Table(np.zeros((16, 8), int), np.ones(1, np.float16)),
    "sparse table": lambda: Sparse(mask(), Table(np.random.default_rng(0).integers(0, 9, (16, 8)), floats(9).array)),
    "sparse product": lambda: Sparse(mask(), product((floats(16, 1), floats(1, 8)), (16, 8))),
    "sparse product decoded": lambda: Sparse(mask(0.1), product((floats(16, 8), floats(8, 8)), (16, 8))),
    "sparse sparse": lambda: Sparse(mask(), Sparse(mask(0.9), floats(16, 8))),
    "product of sparse": lambda: product((sparse("float32"), Plain(np.eye(8, dtype=np.float16))), (16, 8)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_counted_bytes_are_the_file_section_by_section(kind, tmp_path):
    stored = {"w": KINDS[kind]()}
    proto = model(stored["w"].decode())
    counted = pack.size(proto, stored)
    written = pack.write(proto, stored, tmp_path / "model.lil")
    assert counted == written
    assert counted.tensors["w"] == -(-stored["w"].storage().bits // 8)
    assert counted.size_bytes == (tmp_path / "model.lil").stat().st_size
    assert counted.header <= 11


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_decodes_to_the_same_tensors_and_computes_the_same(kind, tmp_path):
    stored = {"w": KINDS[kind]()}
    proto = model(stored["w"].decode())
    pack.write(proto, stored, tmp_path / "model.lil")
    network = pack.load(tmp_path)
    name = next(name for name, value in network.stored().items() if value.shape == (16, 8))
    back = network.stored()[name]
    assert type(back) is type(stored["w"])
    assert np.array_equal(network.tensors()[name], stored["w"].decode())
    assert back.storage() == stored["w"].storage()
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = Session(proto).outputs(x)
    assert np.array_equal(network(x).numpy(), expected)
    network.save_onnx(tmp_path / "again.onnx")
    assert np.array_equal(Session(tmp_path / "again.onnx").outputs(x), expected)


def test_names_are_those_of_inputs_and_outputs_only(tmp_path):
    proto = model(np.ones((16, 8)))
    for node, name in zip(proto.graph.node, ("secret1", "secret2", "secret3"), strict=True):
        node.name = name
    pack.write(proto, {}, tmp_path / "model.lil")
    data = (tmp_path / "model.lil").read_bytes()
    assert b"secret" not in data and b"Gemm" not in data
    network = pack.read(tmp_path / "model.lil")
    assert network.session.input_names == ["x"]
    assert [output.name for output in network.proto().graph.output] == ["y"]


def test_the_graph_of_a_small_network_takes_few_bytes():
    assert pack.size(model(np.ones((16, 8))), {}).graph <= 110


def damaged(data):
    """The file with a byte changed, cut, lengthened, or of another kind."""
    for at in range(0, len(data), 7):
        yield data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :]
    yield from (data[:n] for n in (0, 1, 3, 4, 7, 8, 9, len(data) // 2, len(data) - 1))
    yield data + b"\0"
    yield b"PK\3\4" + data[4:]


def test_a_damaged_file_is_refused(tmp_path):
    stored = {"w": KINDS["sparse whole"]()}
    pack.write(model(stored["w"].decode()), stored, tmp_path / "model.lil")
    data = (tmp_path / "model.lil").read_bytes()
    for broken in damaged(data):
        (tmp_path / "broken.lil").write_bytes(broken)
        with pytest.raises(StoreError, match=r"broken\.lil"):
            pack.read(tmp_path / "broken.lil")


def signed(data):
    """With a checksum that fits: what someone who means harm would write."""
    return data[:4] + struct.pack("<I", zlib.crc32(data[8:])) + data[8:]


def test_a_hostile_file_with_a_right_checksum_is_refused_or_whole(tmp_path):
    kinds = ["sparse whole", "coded", "product", "group"]
    draw = np.random.default_rng(0)
    for kind in kinds:
        stored = {"w": KINDS[kind]()}
        pack.write(model(stored["w"].decode()), stored, tmp_path / "model.lil")
        data = (tmp_path / "model.lil").read_bytes()
        for at in draw.integers(8, len(data), 25):
            broken = signed(data[:at] + bytes([data[at] ^ int(draw.integers(1, 256))]) + data[at + 1 :])
            (tmp_path / "broken.lil").write_bytes(broken)
            try:
                network = pack.read(tmp_path / "broken.lil")
            except StoreError:
                continue
            assert all(np.asarray(x).size < 1 << 24 for x in network.tensors().values())


def test_sizes_are_checked_before_memory_is_taken(tmp_path):
    head = bytearray()
    number = varint
    head += number(9) + number(20) + number(0)
    head += number(1) + b"\1x" + number(1) + number(1) + number(0)
    head += number(1) + b"\1y" + number(1) + number(1) + number(0)
    # One sparse tensor of 2^50 values whose mask is said to be empty.
    head += number(1) + number(2) + number(1) + number(2**50) + number(0) + number(2) + number(0) + number(0)
    head += number(0) + number(0) + number(0) + number(2)
    body = number(len(head) << 2) + bytes(head)
    (tmp_path / "bomb.lil").write_bytes(signed(pack.MAGIC + bytes([pack.VERSION]) + bytes(4) + body))
    with pytest.raises(StoreError, match=r"more values|valid packed"):
        pack.read(tmp_path / "bomb.lil")
    squeezed = zlib.compressobj(9, zlib.DEFLATED, -15)
    flood = squeezed.compress(bytes(1 << 26)) + squeezed.flush()
    body = number(len(flood) << 2 | 1) + flood
    (tmp_path / "flood.lil").write_bytes(signed(pack.MAGIC + bytes([pack.VERSION]) + bytes(4) + body))
    with pytest.raises(StoreError, match="cannot be expanded"):
        pack.read(tmp_path / "flood.lil")


def test_another_version_is_named(tmp_path):
    pack.write(model(np.ones((16, 8))), {}, tmp_path / "model.lil")
    data = bytearray((tmp_path / "model.lil").read_bytes())
    data[3] = 9
    (tmp_path / "new.lil").write_bytes(data)
    with pytest.raises(StoreError, match="version 1 or 2, got 9"):
        pack.read(tmp_path / "new.lil")


@pytest.mark.skipif(os.name != "posix", reason="read-only folders")
def test_what_was_there_survives_a_failed_write(tmp_path):
    pack.write(model(np.ones((16, 8))), {}, tmp_path / "model.lil")
    before = (tmp_path / "model.lil").read_bytes()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="could not be written"):
        pack.write(model(np.ones((16, 8))), {}, tmp_path / "file" / "model.lil")
    with pytest.raises(StoreError, match="could not be written"):
        (tmp_path / "taken").mkdir()
        pack.write(model(np.ones((16, 8))), {}, tmp_path / "taken")
    assert (tmp_path / "model.lil").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "model.lil", "taken"]


def test_a_tensor_of_another_shape_and_a_subgraph_are_refused(tmp_path):
    with pytest.raises(ExportError, match=r"must have the shape \(16, 8\)"):
        pack.write(model(np.ones((16, 8))), {"w": Plain(np.ones((8, 8), np.float32))}, tmp_path / "model.lil")
    proto = model(np.ones((16, 8)))
    branch = helper.make_graph(
        [helper.make_node("Relu", ["h"], ["z"])], "b", [], [helper.make_empty_tensor_value_info("z")]
    )
    proto.graph.node[1].CopyFrom(helper.make_node("If", ["c"], ["r"], then_branch=branch, else_branch=branch))
    proto.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    with pytest.raises(ExportError, match="subgraph"):
        pack.write(proto, {}, tmp_path / "model.lil")
    assert not (tmp_path / "model.lil").exists()


def test_every_standard_operator_and_attribute_has_its_number():
    schemas = [s for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""]
    newer = {s.name for s in schemas} - set(OPERATORS), {a for s in schemas for a in s.attributes} - set(ATTRIBUTES)
    if tuple(map(int, onnx.__version__.split(".")[:2])) <= (1, 23):
        assert newer == (set(), set())
    for names, length, digest in ((OPERATORS, 203, "21a4d7164932571d"), (ATTRIBUTES, 160, "fb7804916bde8dd4")):
        assert len(set(names)) == len(names)
        # What has been published: names may be added behind it, never moved.
        assert hashlib.sha256(" ".join(names[:length]).encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize(
    "op_type, attributes",
    [
        ("Softmax", {"axis": -1}),
        ("LeakyRelu", {"alpha": 0.3}),
        ("NewOp", {"word": "a", "words": ["b", "c"], "f": [0.5, 2.0]}),
    ],
)
def test_attributes_of_every_type_come_back(op_type, attributes):
    proto = model(np.ones((16, 8)))
    proto.graph.node[1].CopyFrom(
        helper.make_node(op_type, ["h"], ["r"], domain="own" if op_type == "NewOp" else "", **attributes)
    )
    proto.opset_import.append(helper.make_opsetid("own", 2))
    head, _ = pack._written(proto, pack._prepared(proto, {})[1], counted=True)
    reader = ByteReader(pack._expanded(head[1], head[0]))
    assert (reader.number(), reader.number(), reader.count(), reader.text(), reader.number()) == (9, 20, 1, "own", 2)
    for attribute in proto.graph.node[1].attribute:
        out = ByteWriter()
        write_attribute(attribute, out)
        back = read_attribute(ByteReader(bytes(out.data)))
        assert back.type == attribute.type and back.name == attribute.name
        assert np.all(
            np.isclose(helper.get_attribute_value(back), helper.get_attribute_value(attribute))
            if attribute.type in (1, 6)
            else helper.get_attribute_value(back) == helper.get_attribute_value(attribute)
        )


def test_numbers_and_bits_survive():
    for number in itertools.chain(range(-300, 300), (2**40, -(2**62))):
        out = ByteWriter()
        out.signed(number)
        assert ByteReader(bytes(out.data)).signed() == number


def test_a_loaded_network_is_a_module():
    network = Network(model(np.ones((16, 8))), {})
    assert isinstance(network, nn.Module) and not list(network.parameters())
    assert network.eval()(torch.zeros(2, 8)).shape == (2, 4, 4)
