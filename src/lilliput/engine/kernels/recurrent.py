"""Recurrent layers: for each step multiply the state by the recurrent weights, then apply the gates.

The state and the sums lie in scratch memory; gates are loops over the hidden units that become vector instructions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lilliput.engine.expr import Expr, arg, needs, statements
from lilliput.engine.graph import Array, Node
from lilliput.engine.helpers import texts
from lilliput.engine.kernel import ROWS, Kernel, Want, kernel
from lilliput.engine.kernels.map import work
from lilliput.engine.kernels.matvec import ways
from lilliput.engine.kernels.matvec_way import MatVec
from lilliput.engine.size import c, fixed
from lilliput.engine.target import Target

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
Cell = list[tuple[str, Expr]]  # what is written where, in this order


@kernel("Recurrence")
def recurrence(node: Node, target: Target) -> Iterator[Kernel]:
    """Every way of the matrix product that all matrices of the layer have."""
    weight, narrow = node.input(1).data, node.input(1).narrow
    assert weight is not None
    hidden, parts = node.attrs["hidden"], _parts(node)
    offered: list[list[MatVec]] = []
    for d in range(len(weight)):
        for start, end in parts:
            piece = None if narrow is None else narrow.moved(_rows(d, start, end))
            offered.append(list(ways(weight[d, start:end], piece, target)))
    steps = int(node.x.shape[0]) * int(node.x.shape[1])
    for name in dict.fromkeys(way.name for way in offered[0]):
        chosen = [next((w for w in options if w.name == name), None) for options in offered]
        if any(w is None for w in chosen):
            continue
        ways_ = [w for w in chosen if w is not None]
        constants: dict[str, Array] = {}
        for i, way in enumerate(ways_):
            constants.update({f"{key}{i}": data for key, data in way.constants.items()})
        for key, place in (("bias", 2), ("peepholes", 6)):
            value = node.maybe(place)
            if value is not None and value.data is not None:
                constants[key] = value.data
        every = [e for d in range(len(weight)) for stage in _stages(node, d) for _, e in stage]
        gates_ns = hidden * (work(tuple(every)) + 4) / target.lanes * 0.3
        yield Kernel(
            name,
            _writer(ways_),
            _wants(node),
            ROWS,
            constants,
            (1, 2, 6),
            4 * sum(_floats(node, ways_).values()),
            steps * (sum(w.ns for w in ways_) + gates_ns) + 50,
            (*dict.fromkeys(h for w in ways_ for h in w.helpers), *texts(*needs(every))),
            nonzeros=sum(w.nonzeros for w in ways_),
            values=sum(w.values for w in ways_),
        )


def _rows(d: int, start: int, end: int) -> Callable[[Array], Array]:
    return lambda array: array[d, start:end]


def _writer(ways_: Sequence[MatVec]) -> Callable[[Node], str]:
    return lambda node: _body(node, ways_)


def _wants(node: Node) -> tuple[Want | None, ...]:
    return tuple(None if value is None else Want() for value in node.inputs)


def _parts(node: Node) -> list[tuple[int, int]]:
    """The rows of R multiplied at once: a GRU that resets the state first needs a second product for its last."""
    hidden, gates = node.attrs["hidden"], GATES[node.attrs["kind"]]
    if node.attrs["kind"] == "GRU" and not node.attrs["inside"]:
        return [(0, 2 * hidden), (2 * hidden, 3 * hidden)]
    return [(0, gates * hidden)]


def _floats(node: Node, ways_: Sequence[MatVec]) -> dict[str, int]:
    """Pieces of scratch memory, in floats, each a multiple of 16: the state, the sums, the reset state, the cell."""
    hidden, gates = node.attrs["hidden"], GATES[node.attrs["kind"]]
    ins, outs = max(w.ins for w in ways_), max(w.outs for w in ways_)
    sizes = {"h": max(ins, hidden), "s": (gates - 1) * hidden + outs if len(_parts(node)) > 1 else outs}
    if len(_parts(node)) > 1:
        sizes["r"] = max(ins, hidden)
    if node.attrs["kind"] == "LSTM":
        sizes["c"] = hidden
    return {key: -(-size // 16) * 16 for key, size in sizes.items()}


# ------------------------------------------------------------------------------------------------------------- cells


def _stages(node: Node, d: int) -> list[Cell]:
    """What is computed for a hidden unit after each product. Arguments: see `_places`."""
    hidden, kind = node.attrs["hidden"], node.attrs["kind"]
    acts: tuple[Expr, ...] = node.attrs["acts"][d]
    clip = node.attrs["clip"]
    del hidden

    def f(i: int, x: Expr) -> Expr:
        x = x if clip is None else x.max(-clip).min(clip)
        return acts[i].substitute([x])

    a = [arg(i, np.float32) for i in range(16)]
    if kind == "RNN":
        return [[("h", f(0, a[0] + a[4]))]]
    if kind == "GRU":
        before, state = a[9], a[8]
        z, r = f(0, a[0] + a[4]), f(0, a[1] + a[5])
        if node.attrs["inside"]:
            n = f(1, a[2] + r * (a[6] + before if node.maybe(2) is not None else a[6]))
            return [[("h", (state - n) * z + n)]]
        z, n = f(0, a[0] + a[4]), f(1, a[2] + a[6])
        return [[("r", r * state)], [("h", (state - n) * z + n)]]
    cell, peep = a[10], node.maybe(6) is not None
    sums = [a[i] + a[4 + i] for i in range(4)]  # i, o, f, c
    i = f(0, sums[0] + a[11] * cell if peep else sums[0])
    forget = 1 - i if node.attrs["input_forget"] else f(0, sums[2] + a[13] * cell if peep else sums[2])
    new = forget * cell + i * f(1, sums[3])
    o = f(0, sums[1] + a[12] * new if peep else sums[1])
    return [[("c", new), ("h", o * acts[2].substitute([new]))]]


def _places(node: Node, d: int) -> list[str]:
    """Arguments of the cells in C: 0..3 from the input, 4..7 the sums, 8 the state, 9 the bias inside, 10 the cell,
    11..13 the peepholes (input, output, forget)."""
    hidden = node.attrs["hidden"]

    def at(name: str, number: int) -> str:
        return f"{name}[{number} + j]" if number else f"{name}[j]"

    return [
        *(at("g", i * hidden) for i in range(4)),
        *(at("s", i * hidden) for i in range(4)),
        "h[j]",
        at("bias", d * hidden),
        "c[j]",
        *(at("peepholes", (3 * d + i) * hidden) for i in range(3)),
    ]


def _body(node: Node, ways_: Sequence[MatVec]) -> str:
    hidden, reverse, roles = node.attrs["hidden"], node.attrs["reverse"], node.attrs["roles"]
    gates, parts = GATES[node.attrs["kind"]], _parts(node)
    steps, batch = node.x.shape[:2]
    lines, place = [], 0
    for key, size in _floats(node, ways_).items():
        lines.append(f"float *const {key} = (float *)scratch{f' + {place}' if place else ''};")
        place += size
    for d, back in enumerate(reverse):
        mine = ways_[d * len(parts) : (d + 1) * len(parts)]
        lines += _direction(node, d, back, mine, steps, batch, hidden, gates, parts, roles)
    return "\n".join(lines)


def _direction(
    node: Node,
    d: int,
    back: bool,
    mine: Sequence[MatVec],
    steps: int,
    batch: int,
    hidden: int,
    gates: int,
    parts: list[tuple[int, int]],
    roles: tuple[str, ...],
) -> list[str]:
    before, cell_before, lengths = node.maybe(3), node.maybe(4), node.maybe(5)
    outputs = {role: (f"y{i}", node.outputs[i]) for i, role in enumerate(roles)}
    long = "int64_t" if not fixed(steps) or lengths is not None else "int"
    loop = "int64_t" if not fixed(batch) else "int"
    n = "n" if lengths is not None else c(steps)
    head = [f"/* {'backwards' if back else 'forwards'} */", f"for ({loop} b = 0; b < {c(batch)}; b++) {{"]
    body = []
    if lengths is not None:
        body += [
            f"int64_t n = x5[{_times('b', lengths.strides[0])}];",
            f"n = n < 0 ? 0 : n > {c(steps)} ? {c(steps)} : n;",
        ]
    body.append(f"memset(h, 0, {4 * -(-max(hidden, *(w.ins for w in mine)) // 16) * 16});")
    for key, value, i in (("h", before, 3), ("c", cell_before, 4)):
        if value is not None:
            at = f"x{i} + {c(value.strides[0] * d)} + {_times('b', value.strides[1])}"
            body.append(f"memcpy({key}, {at}, {4 * hidden});")
        elif key == "c" and node.attrs["kind"] == "LSTM":
            body.append(f"memset(c, 0, {4 * hidden});")
    body.append(f"for ({long} t = 0; t < {n}; t++) {{")
    x, inner = node.x, []
    moment = f"({n} - 1 - t)" if back else "t"
    offset = [f"{_times(moment, x.strides[0])}", _times("b", x.strides[1]), str(d * gates * hidden)]
    inner.append(f"const float *const g = x0 + {' + '.join(p for p in offset if p != '0') or '0'};")
    places = _places(node, d)
    for k, ((start, _), way, cell) in enumerate(zip(parts, mine, _stages(node, d), strict=True)):
        number = d * len(parts) + k
        to = f"s + {start}" if start else "s"
        call = way.call.format(y=to, x="h" if k == 0 else "r", **{key: f"{key}{number}" for key in way.constants})
        if before is None:
            inner += [f"if (t) {call}", f"else memset({to}, 0, {4 * (parts[k][1] - start)});"]
        else:
            inner.append(call)
        texts_, results = statements([e for _, e in cell], places)
        # Short inner loops are written out by the compiler, so that the gates of many units are under way at once.
        inner += (
            [f"for (int i = 0; i < {hidden}; i += 16)", "for (int j = i; j < i + 16; j++) {"]
            if hidden % 16 == 0
            else [f"for (int j = 0; j < {hidden}; j++) {{"]
        )
        inner += [f"    {line}" for line in texts_]
        inner += [f"    {key}[j] = {result};" for (key, _), result in zip(cell, results, strict=True)]
        inner.append("}")
    if "h" in outputs:
        name, value = outputs["h"]
        assert value is not None
        at = " + ".join(
            p
            for p in (_times(moment, value.strides[0]), c(value.strides[1] * d), _times("b", value.strides[2]))
            if p != "0"
        )
        inner.append(f"memcpy({name}{f' + {at}' if at else ''}, h, {4 * hidden});")
    body += [*(f"    {line}" for line in inner), "}"]
    for role, key in (("n", "h"), ("c", "c")):
        if role in outputs:
            name, value = outputs[role]
            assert value is not None
            at = " + ".join(p for p in (c(value.strides[0] * d), _times("b", value.strides[1])) if p != "0")
            body.append(f"memcpy({name}{f' + {at}' if at else ''}, {key}, {4 * hidden});")
    if lengths is not None and "h" in outputs:
        name, value = outputs["h"]
        assert value is not None
        at = " + ".join(
            p
            for p in (_times("t", value.strides[0]), c(value.strides[1] * d), _times("b", value.strides[2]))
            if p != "0"
        )
        body += [f"for (int64_t t = n; t < {c(steps)}; t++)", f"    memset({name} + {at}, 0, {4 * hidden});"]
    return [*head, *(f"    {line}" for line in body), "}"]


def _times(name: str, stride: int) -> str:
    if fixed(stride) and stride == 0:
        return "0"
    return name if fixed(stride) and stride == 1 else f"{name} * {c(stride)}"
