"""Every kernel for matrix products against ONNX Runtime, each forced in turn."""

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from lilliput.engine import compile as compiling
from lilliput.engine.kernel import candidates
from lilliput.engine.kernels.sparse_format import blocked, formatted
from lilliput.engine.lower import supported
from lilliput.engine.read import read

pytestmark = pytest.mark.slow  # hundreds of programs are compiled

N = helper.make_node
FLOAT, U8, I8 = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8
KINDS = {np.uint8: U8, np.int8: I8}


def proto(nodes, inputs, outputs, constants, domains=()) -> ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "products",
        [value(n, k, s) for n, k, s in inputs],
        [value(n, k, None) for n, k in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def reference(model: ModelProto, feeds: dict) -> list:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def each_kernel(monkeypatch, make, op, runs, tolerance=1e-5, shapes=None, to="native", known=None):
    """Compile `make(copies)`, a model that holds one product so many times, each with another of its kernels."""
    target = compiling.target(to)
    seen: list[str] = []

    def ranked_of(target):
        counted: dict = {}

        def ranked(node):
            found = candidates(node, target)
            if node.op != op:
                return found
            if node not in counted:
                counted[node] = len(counted)
            kernel = found[min(counted[node], len(found) - 1)]
            seen.append(kernel.name)
            return [kernel]

        return ranked

    graph = compiling.fused(compiling.lowered(read(make(1), shapes, None, supported)))
    node = next(n for n in graph.nodes if n.op == op)
    copies = len(candidates(node, target))
    monkeypatch.setattr(compiling.tuning, "estimated", ranked_of)
    engine = compiling.compile(make(copies), to=to, tune=False, shapes=shapes)
    for feeds in runs:
        wanted = (known or reference)(make(1), feeds)[0]
        found = engine(*feeds.values())
        for name, y in zip(seen, found if isinstance(found, tuple) else [found], strict=False):
            assert y.shape == wanted.shape and y.dtype == wanted.dtype, name
            off = np.abs(y.astype(np.float64) - wanted).max(initial=0)
            assert off <= tolerance * max(np.abs(wanted).max(initial=0), 1e-3), (name, off)
    return set(seen)


def pruned(rng, shape, zeros, block=1):
    weight = rng.standard_normal(shape).astype(np.float32)
    gone = np.repeat(rng.random((shape[0], -(-shape[1] // block))) < zeros, block, 1)[:, : shape[1]]
    weight[gone] = 0
    return weight


def linear(x_shape, weight, bias, after, wide_shape):
    """A function that makes a model of x W + bias and what follows."""

    def make(copies):
        nodes, outputs = [], []
        for i in range(copies):
            nodes += [N("MatMul", ["x", "w"], [f"m{i}"]), N("Add", [f"m{i}", "b"], [f"a{i}"])]
            if after == "relu":
                nodes.append(N("Relu", [f"a{i}"], [f"y{i}"]))
            elif after == "clip":
                nodes.append(N("Clip", [f"a{i}", "low", "high"], [f"y{i}"]))
            else:
                nodes += [N("Add", ["r", f"a{i}"], [f"s{i}"]), N("Sigmoid", [f"s{i}"], [f"y{i}"])]
            outputs.append((f"y{i}", FLOAT))
        inputs = [("x", FLOAT, x_shape)] + ([("r", FLOAT, wide_shape)] if after == "residual" else [])
        return proto(nodes, inputs, outputs, {"w": weight, "b": bias, "low": np.float32(-0.5), "high": np.float32(2)})

    return make


@pytest.mark.parametrize(("shape", "outs", "zeros", "block", "after"), [
    ((1, 37, 24), 50, 0.0, 1, "residual"),
    ((70, 410), 33, 0.9, 1, "residual"),
    ((2, 20, 24), 32, 0.8, 4, "clip"),
    ((1, 9), 40, 0.0, 1, "relu"),
    ((1, 45), 39, 0.8, 1, "residual"),
    ((100, 800), 9, 0.8, 1, "relu"),
])  # fmt: skip
def test_constant_weights(monkeypatch, shape, outs, zeros, block, after):
    rng = np.random.default_rng(0)
    weight = pruned(rng, (shape[-1], outs), zeros, block)
    bias = rng.standard_normal(outs).astype(np.float32)
    wide = (*shape[:-1], outs)
    feeds = {"x": rng.standard_normal(shape).astype(np.float32)}
    if after == "residual":
        feeds["r"] = rng.standard_normal(wide).astype(np.float32)
    names = each_kernel(monkeypatch, linear(shape, weight, bias, after, wide), "MatMul", [feeds])
    assert any(name.startswith("sparse") for name in names) == (zeros > 0)
    assert any(name.startswith("dense") for name in names)


@pytest.mark.parametrize(("zeros", "to"), [(0.0, "native"), (0.85, "native"), (0.85, "portable")])
def test_free_sizes(monkeypatch, zeros, to):
    rng = np.random.default_rng(1)
    weight, bias = pruned(rng, (24, 21), zeros), rng.standard_normal(21).astype(np.float32)
    make = linear(("batch", "tokens", 24), weight, bias, "residual", ("batch", "tokens", 21))
    runs = [
        {n: rng.standard_normal((b, t, size)).astype(np.float32) for n, size in (("x", 24), ("r", 21))}
        for b, t in ((3, 40), (1, 40), (2, 17), (3, 1))
    ]
    each_kernel(monkeypatch, make, "MatMul", runs, shapes={"x": (3, 40, 24), "r": (3, 40, 21)}, to=to)


@pytest.mark.parametrize(("bits", "scaled"), [(16, False), (8, True), (4, True)])
@pytest.mark.parametrize("zeros", [0.0, 0.8])
def test_narrow_weights(monkeypatch, bits, scaled, zeros):
    rng = np.random.default_rng(2)
    levels = rng.integers(-(2 ** (min(bits, 8) - 1)) + 1, 2 ** (min(bits, 8) - 1), (40, 26)).astype(np.int8)
    levels[rng.random(levels.shape) < zeros] = 0
    scale = (rng.random(26) / 50 + 0.01).astype(np.float32)
    stored = levels * scale if scaled else levels.astype(np.float32) / 7

    def make(copies):
        if bits == 16:
            head, constants = [N("Cast", ["h"], ["w"], to=FLOAT)], {"h": stored.astype(np.float16)}
        else:
            head, constants = [N("DequantizeLinear", ["q", "s"], ["w"], axis=1)], {"q": levels, "s": scale}
        nodes = [N("MatMul", ["x", "w"], [f"y{i}"]) for i in range(copies)]
        return proto([*head, *nodes], [("x", FLOAT, (35, 40))], [(f"y{i}", FLOAT) for i in range(copies)], constants)

    feeds = {"x": rng.standard_normal((35, 40)).astype(np.float32)}
    # ONNX Runtime rounds the activations of such products too.
    exact = stored.astype(np.float16 if bits == 16 else np.float32).astype(np.float64)
    each_kernel(monkeypatch, make, "MatMul", [feeds], known=lambda _, f: [(f["x"] @ exact).astype(np.float32)])


def test_weights_in_blocks_of_few_bits(monkeypatch):
    rng = np.random.default_rng(3)
    ins, outs, block = 64, 18, 32
    packed = rng.integers(0, 256, (outs, ins // block, block // 2)).astype(np.uint8)
    scale = (rng.random(outs * ins // block) / 20).astype(np.float32)
    zero = rng.integers(0, 256, outs * (ins // block // 2)).astype(np.uint8)

    def make(copies):
        nodes = [
            N(
                "MatMulNBits",
                ["x", "w", "s", "z"],
                [f"y{i}"],
                domain="com.microsoft",
                K=ins,
                N=outs,
                bits=4,
                block_size=block,
            )
            for i in range(copies)
        ]
        return proto(
            nodes,
            [("x", FLOAT, (1, 5, ins))],
            [(f"y{i}", FLOAT) for i in range(copies)],
            {"w": packed, "s": scale, "z": zero},
            ["com.microsoft"],
        )

    each_kernel(monkeypatch, make, "MatMul", [{"x": rng.standard_normal((1, 5, ins)).astype(np.float32)}])


@pytest.mark.parametrize(
    ("a", "b", "turned"),
    [((2, 3, 7, 5), (3, 5, 9), False), ((20, 32), (32, 20), True), ((4, 1, 33, 17), (1, 2, 17, 2), True)],
)
def test_computed_matrices(monkeypatch, a, b, turned):
    rng = np.random.default_rng(4)
    order = [*range(len(b) - 2), len(b) - 1, len(b) - 2]
    given = tuple(b[d] for d in order) if turned else b

    def make(copies):
        head = [N("Transpose", ["b"], ["c"], perm=order)] if turned else [N("Identity", ["b"], ["c"])]
        nodes = [N("MatMul", ["a", "c"], [f"m{i}"]) for i in range(copies)]
        nodes += [N("Relu", [f"m{i}"], [f"y{i}"]) for i in range(copies)]
        return proto(
            [*head, *nodes], [("a", FLOAT, a), ("b", FLOAT, given)], [(f"y{i}", FLOAT) for i in range(copies)], {}
        )

    feeds = {"a": rng.standard_normal(a).astype(np.float32), "b": rng.standard_normal(given).astype(np.float32)}
    names = each_kernel(monkeypatch, make, "MatMul", [feeds])
    assert any(name.startswith("dynamic") for name in names)


def attention(batch, tokens, keys, heads, width, masked, free=False):
    """Multi-head attention as exporters write it, so many times as is asked."""
    b, t, s = ("batch", "tokens", "tokens") if free else (batch, tokens, keys)

    def make(copies):
        nodes = []
        for name in "qkv":
            nodes += [
                N("Reshape", [name, "heads"], [name + "1"]),
                N("Transpose", [name + "1"], [name + "2"], perm=[0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]),
            ]
        for i in range(copies):
            nodes += [N("MatMul", ["q2", "k2"], [f"p{i}"]), N("Mul", [f"p{i}", "c"], [f"s{i}"])]
            nodes += [N("Add", [f"s{i}", "mask"], [f"m{i}"])] if masked else []
            nodes += [
                N("Softmax", [f"{'m' if masked else 's'}{i}"], [f"w{i}"], axis=-1),
                N("MatMul", [f"w{i}", "v2"], [f"o{i}"]),
                N("Transpose", [f"o{i}"], [f"t{i}"], perm=[0, 2, 1, 3]),
                N("Reshape", [f"t{i}", "flat"], [f"y{i}"]),
            ]
        inputs = [(n, FLOAT, (b, t if n == "q" else s, heads * width)) for n in "qkv"]
        if masked:
            inputs.append(("mask", FLOAT, (b, 1, t if masked == "all" else 1, s)))
        constants = {
            "heads": np.array([0, 0, heads, width]),
            "flat": np.array([0, 0, heads * width]),
            "c": np.float32(width**-0.5),
        }
        return proto(nodes, inputs, [(f"y{i}", FLOAT) for i in range(copies)], constants)

    def feeds(rng, batch, tokens, keys):
        found = {
            n: rng.standard_normal((batch, tokens if n == "q" else keys, heads * width)).astype(np.float32)
            for n in "qkv"
        }
        if masked:
            hidden = rng.random((batch, 1, tokens if masked == "all" else 1, keys)) < 0.3
            found["mask"] = np.where(hidden, np.float32(-1e9), np.float32(0))
        return found

    return make, feeds


@pytest.mark.parametrize(("batch", "tokens", "keys", "masked"), [(1, 33, 9, "all"), (2, 20, 20, "keys"), (3, 1, 6, "")])
def test_attention(monkeypatch, batch, tokens, keys, masked):
    make, feeds = attention(batch, tokens, keys, 3, 8, masked)
    names = each_kernel(monkeypatch, make, "Attend", [feeds(np.random.default_rng(5), batch, tokens, keys)])
    assert len(names) > 1


def test_attention_of_free_sizes(monkeypatch):
    make, feeds = attention(2, 24, 24, 2, 8, "keys", free=True)
    rng = np.random.default_rng(6)
    runs = [feeds(rng, b, t, t) for b, t in ((2, 24), (1, 24), (2, 19), (1, 3))]
    shapes = {n: (2, 24, 16) for n in "qkv"} | {"mask": (2, 1, 1, 24)}
    each_kernel(monkeypatch, make, "Attend", runs, shapes=shapes)


@pytest.mark.parametrize(
    ("a_kind", "b_kind", "zero"),
    [
        (np.uint8, np.int8, "one"),
        (np.int8, np.uint8, "columns"),
        (np.int8, np.int8, ""),
        (np.uint8, np.uint8, "columns"),
    ],
)
def test_integer_products(monkeypatch, a_kind, b_kind, zero):
    rng = np.random.default_rng(7)

    def levels(shape, kind):
        return rng.integers(np.iinfo(kind).min, np.iinfo(kind).max + 1, shape).astype(kind)

    constants = {"b": levels((35, 41), b_kind), "t": rng.random(41).astype(np.float32)}
    more = []
    if zero:
        constants["za"], more = a_kind(77), ["za"]
    if zero == "columns":
        constants["zb"], more = levels(41, b_kind), ["za", "zb"]

    def make(copies):
        nodes = []
        for i in range(copies):
            nodes += [
                N("MatMulInteger", ["a", "b", *more], [f"i{i}"]),
                N("Cast", [f"i{i}"], [f"f{i}"], to=FLOAT),
                N("Mul", [f"f{i}", "t"], [f"g{i}"]),
                N("Mul", [f"g{i}", "s"], [f"y{i}"]),
            ]
        return proto(
            nodes,
            [("a", KINDS[a_kind], (2, 9, 35)), ("s", FLOAT, (2, 9, 1))],
            [(f"y{i}", FLOAT) for i in range(copies)],
            constants,
        )

    def exactly(_, feeds):  # ONNX Runtime's pair sums saturate on CPUs with AVX2 and no VNNI
        a = feeds["a"].astype(np.int64) - int(constants.get("za", 0))
        b = constants["b"].astype(np.int64) - constants.get("zb", np.uint8(0)).astype(np.int64)
        return [(a @ b).astype(np.float32) * constants["t"] * feeds["s"]]

    feeds = {"a": levels((2, 9, 35), a_kind), "s": rng.random((2, 9, 1)).astype(np.float32)}
    names = each_kernel(monkeypatch, make, "MatMulInteger", [feeds], 1e-6, known=exactly)
    assert any(name.startswith("8-bit") for name in names)


def test_codes_of_products(monkeypatch):
    """Weights of seven bits, whose pair sums no CPU saturates."""
    rng = np.random.default_rng(8)
    constants = {
        "w": rng.integers(-64, 65, (30, 20)).astype(np.int8),
        "sa": np.float32(0.01),
        "za": np.uint8(120),
        "sb": (rng.random(20) / 100 + 0.001).astype(np.float32),
        "zb": np.zeros(20, np.int8),
        "sy": np.float32(0.03),
        "zy": np.uint8(100),
        "t": rng.random(20).astype(np.float32),
    }
    nodes = [
        N("DynamicQuantizeLinear", ["x"], ["levels", "step", "zero"]),
        N("MatMulInteger", ["levels", "w", "zero"], ["i"]),
        N("Cast", ["i"], ["f"], to=FLOAT),
        N("Mul", ["step", "t"], ["s"]),
        N("Mul", ["f", "s"], ["y"]),
        N("QLinearMatMul", ["levels", "sa", "za", "w", "sb", "zb", "sy", "zy"], ["z"]),
    ]
    outputs = [("y", FLOAT), ("z", U8), ("levels", U8), ("step", FLOAT)]
    model = proto(nodes, [("x", FLOAT, (1, 7, 30))], outputs, constants)
    x = rng.standard_normal((1, 7, 30)).astype(np.float32)
    y, z, levels, step = reference(model, {"x": x})
    mine = compiling.compile(model, tune=False)(x)
    np.testing.assert_allclose(mine[0], y, atol=1e-5 * np.abs(y).max())
    assert np.abs(mine[1].astype(int) - z).max() <= 1
    np.testing.assert_array_equal(mine[2], levels)
    np.testing.assert_array_equal(mine[3], step)


def test_formats_hold_every_nonzero_once():
    weight = pruned(np.random.default_rng(9), (12, 50), 0.7)
    form = formatted(weight, 4, 2, 24, 16, shared=False)
    assert sorted(form.places[form.places >= 0]) == np.flatnonzero(weight).tolist()
    steps, places, at = form.steps.astype(int), form.places.reshape(-1, 4), 0
    for group, count in enumerate(steps):
        rows = form.order[group * 4 : group * 4 + 4]
        held = places[at : at + 2 * count]
        for column, row in enumerate(rows):
            used = held[:, column]
            assert set(used[used >= 0] // 50) <= {row}
        at += 2 * count
    assert blocked(np.repeat(weight[:, :3] != 0, 4, 0) * np.float32(1), 4)
    assert not blocked(weight[:8], 4)
