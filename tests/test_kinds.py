"""Kinds of storing are open: one that is defined here, outside of the package, is written, read and run like any."""

from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from lilliput.errors import ExportError, StoreError
from lilliput.export import pack
from lilliput.onnx.names import stripped
from lilliput.onnx.narrow import narrow
from lilliput.onnx.session import Session
from lilliput.stored.base import Storage, Stored, section
from lilliput.stored.einsum import Einsum, product
from lilliput.stored.grid import Grid, half
from lilliput.stored.operators import Operators
from lilliput.stored.plain import Plain
from lilliput.stored.shared import Shared
from lilliput.stored.sparse import Sparse
from lilliput.stored.table import Table


@dataclass(frozen=True, eq=False)
class Added(Stored):
    """The sum of two stored tensors."""

    a: Stored
    b: Stored

    @property
    def shape(self):
        return self.a.shape

    @property
    def values(self):
        return self.a.values + self.b.values

    @property
    def bits(self):
        return (self.a.bits + self.b.bits) / 2

    def decode(self):
        return self.a.decode() + self.b.decode()

    def storage(self):
        return Storage((*self.a.storage().parts, *self.b.storage().parts))

    def write(self, head, section):
        head.tensor(self.a, section)
        head.tensor(self.b, section)

    @classmethod
    def read(cls, head, axes):
        (first, _), (second, _) = head.tensor(), head.tensor()
        return lambda source, shape, mask: cls(first(source), second(source))

    def onnx(self, writer, name):
        parts = [writer.fresh(), writer.fresh()]
        self.a.onnx(writer, parts[0])
        self.b.onnx(writer, parts[1])
        writer.node("Add", parts, name)


@dataclass(frozen=True, eq=False)
class Drawn(Stored):
    """Random numbers that only their seed stands for; it has no operators in ONNX."""

    seed: int
    shape: tuple[int, ...]

    values, bits = 1, 64.0

    def decode(self):
        return np.random.default_rng(self.seed).random(self.shape, np.float32)

    def storage(self):
        return Storage((("seed", 1, 64),))

    def write(self, head, section):
        section.numbers(np.array([self.seed], np.uint64), 64)

    @classmethod
    def read(cls, head, axes):
        def plan(source, shape, mask):
            source.claim(shape)
            return cls(int(source.numbers(1, 64)[0]), shape)

        return plan


def graph(**weights):
    """x (batch, 512) times each weight (512, 512) in turn."""
    names = ["x", *(f"h{i}" for i in range(1, len(weights))), "y"]
    nodes = [helper.make_node("MatMul", [a, w], [b]) for a, w, b in zip(names, weights, names[1:], strict=False)]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 512])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 512])],
        [numpy_helper.from_array(value.decode(), name) for name, value in weights.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def through(tmp_path, **weights):
    """The packed file's bytes, the narrow ONNX model, what is read, and the names that were decoded."""
    proto, x = graph(**weights), torch.randn(2, 512, generator=torch.Generator().manual_seed(0)) / 16
    decoded = []
    small = stripped(narrow(proto, weights, decoded))
    onnx.checker.check_model(small, full_check=True)
    expected = Session(proto).outputs(x)
    assert np.array_equal(Session(small).outputs(x), expected)
    assert pack.size(proto, weights) == pack.write(proto, weights, tmp_path / "model.lil")
    network = pack.read(tmp_path / "model.lil")
    assert np.array_equal(network(x).numpy(), expected)
    network.save_onnx(tmp_path / "again.onnx")
    assert np.array_equal(Session(tmp_path / "again.onnx").outputs(x), expected)
    return (tmp_path / "model.lil").stat().st_size, small, network, decoded


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def low_rank(rank=8):
    return product((Plain(normal(512, rank)), Plain(normal(rank, 512))), (512, 512))


def train():
    return Einsum((Plain(normal(32, 4)), Plain(normal(16, 4, 512))), "ar,brc->abc", (512, 512))


def table(k=16):
    return Table(np.random.default_rng(0).integers(0, k, (512, 512)), np.sort(normal(k)))


def test_a_kind_from_elsewhere_goes_into_every_file_and_back(tmp_path):
    value = Added(low_rank(), Sparse(np.random.default_rng(0).random((512, 512)) < 0.01, Plain(normal(512, 512))))
    size, small, network, decoded = through(tmp_path, w=value)
    assert isinstance(network.stored()["t0"], Added) and Added.tag == "Added"
    assert value.storage().size_bytes == len(section(value)) < size < value.storage().size_bytes + 200
    assert decoded == [] and "Add" in [node.op_type for node in small.graph.node]


def test_a_kind_without_operators_is_written_decoded_and_named(tmp_path):
    size, small, network, decoded = through(tmp_path, w=Drawn(7, (512, 512)))
    assert size < 200 and small.ByteSize() > 512 * 512 * 4 and decoded == ["w"]
    assert network.stored()["t0"].seed == 7


def test_a_kind_that_is_not_installed_is_named(tmp_path):
    value = Drawn(7, (512, 512))
    pack.write(graph(w=value), {"w": value}, tmp_path / "model.lil")
    known = Stored.kinds.pop("Drawn")
    try:
        with pytest.raises(StoreError, match=r"model\.lil.*'Drawn'.*Install the package"):
            pack.read(tmp_path / "model.lil")
    finally:
        Stored.kinds["Drawn"] = known


def test_two_kinds_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"'Drawn'.*Rename"):
        type("Drawn", (Stored,), {"__module__": "elsewhere"})


@pytest.mark.parametrize(
    ("make", "operator", "most"),
    [
        (low_rank, "MatMul", 34_000),
        (train, "Einsum", 133_000),
        (table, "Gather", 1.01 * 131_136),
        (lambda: Sparse(np.random.default_rng(0).random((512, 512)) < 0.5, low_rank()), "BitShift", 66_600),
        (lambda: Sparse(np.random.default_rng(0).random((512, 512)) < 0.5, table(15)), "Gather", 1.01 * 131_136),
    ],
    ids=["low rank", "einsum", "table", "masked low rank", "masked table"],
)
def test_a_kind_is_as_small_in_onnx_as_it_is_counted(make, operator, most, tmp_path):
    value = make()
    size, small, _, decoded = through(tmp_path, w=value)
    assert decoded == [] and operator in [node.op_type for node in small.graph.node]
    assert size < value.storage().size_bytes + 150 and small.ByteSize() < most + 700
    # The cost is exact but for the file around it, whatever else it holds.
    empty = graph(w=Plain(np.zeros((0, 512), np.float32)))
    del empty.graph.initializer[:]
    around = small.ByteSize() - value.cost("onnx")
    assert abs(around - empty.ByteSize()) <= 24 and value.cost("lil") == value.storage().size_bytes


def test_folded_products_are_decoded_to_the_bit(tmp_path):
    value = low_rank(64)
    writer = Operators(tiny=True)
    value.onnx(writer, "w")
    made = helper.make_graph(
        writer.nodes,
        "g",
        [],
        [helper.make_tensor_value_info("w", TensorProto.FLOAT, [512, 512])],
        list(writer.tensors.values()),
    )
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    assert np.array_equal(Session(proto).all({})[0], value.decode())


def test_a_shared_tensor_is_stored_once(tmp_path):
    value = Grid(np.random.default_rng(0).integers(-7, 8, (512, 512)), 4, half(np.full((1, 1), 0.01)))
    alone, one, _, _ = through(tmp_path, a=value, b=Plain(np.eye(512, dtype=np.float32)))
    twice, two, network, _ = through(tmp_path, a=value, b=Shared("a", value))
    assert twice < alone and two.ByteSize() < one.ByteSize() and twice < value.storage().size_bytes + 120
    assert [type(stored) for stored in network.stored().values()] == [Grid, Shared]
    # It may come first: what it refers to is then written before it.
    through(tmp_path, a=Shared("b", value), b=value)


def test_a_shared_tensor_needs_another_of_the_graph(tmp_path):
    value = Plain(normal(512, 512))
    for name in ("a", "nothing"):
        with pytest.raises(ExportError, match=f"refers to {name}"):
            pack.write(graph(a=value), {"a": Shared(name, value)}, tmp_path / "model.lil")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook": np.zeros((2, 2, 2), np.float32)}, "codebook must be"),
        ({"codebook": np.zeros(0, np.float32)}, "1 to 65,536"),
        ({"indices": np.zeros((2, 2), np.float32)}, "indices must be integers"),
        ({"indices": np.full((2, 2), 4)}, r"must lie in \[0, 4\)"),
    ],
)
def test_table_says_what_must_hold(change, message):
    good = {"indices": np.zeros((2, 2), int), "codebook": np.zeros(4, np.float32)}
    with pytest.raises(ValueError, match=message):
        Table(**{**good, **change})


@pytest.mark.parametrize("equation", ["ab,bc", "ab,bc->aa", "ab->ab", "ab,bc->ac,d"])
def test_einsum_says_what_must_hold(equation):
    with pytest.raises(ValueError, match="Einsum: "):
        Einsum((Plain(normal(4, 3)), Plain(normal(2, 6))), equation, (4, 6))


def test_einsum_multiplies_from_the_left_and_decodes_what_numpy_does():
    cores = [normal(3, 4), normal(4, 5, 6), normal(6, 2), normal(2, 2)]
    made = Einsum(tuple(map(Plain, cores)), "ar,rbs,sc,cd->abd", (3, 10))
    assert [equation for equation, _ in made.steps] == ["ar,rbs->abs", "abs,sc->abc", "abc,cd->abd"]
    wanted = np.einsum("ar,rbs,sc,cd->abd", *cores).reshape(3, 10)
    np.testing.assert_allclose(made.decode(), wanted, rtol=1e-4, atol=1e-5)


def test_a_mask_over_factors_keeps_them_or_the_values_whichever_is_smaller():
    few = np.arange(512 * 512).reshape(512, 512) % 4096 == 0
    assert Sparse(few, low_rank()).values == 64 and Sparse(~few, low_rank()).values == 8 * 1024
    assert np.array_equal(Sparse(few, low_rank()).decode(), np.where(few, low_rank().decode(), 0))
