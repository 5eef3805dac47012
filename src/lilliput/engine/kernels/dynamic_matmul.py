"""Multiply two computed matrices, or stacks of them, vectorized over the columns of the result or over its rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lilliput.engine import loops
from lilliput.engine.graph import Node, Value
from lilliput.engine.kernel import Kernel, Want, kernel
from lilliput.engine.kernels.product import Tail, at, at_value, clamped, inside, size_type, tail_of, times, vector
from lilliput.engine.kernels.tiles import macs_ns, tail_helpers, tiles
from lilliput.engine.size import c, fixed, product
from lilliput.engine.target import Target


@dataclass(frozen=True)
class Roles:
    """Which operand is read as vectors and which is broadcast, and the dimensions of each.

    v and r are the dimensions of the result along vectors, and across.

    Args:
        along: The operand that is read as vectors (0 or 1).
    """

    node: Node
    along: int

    @property
    def vectors(self) -> Value:
        return self.node.input(self.along)

    @property
    def scalars(self) -> Value:
        return self.node.input(1 - self.along)

    def dims(self) -> tuple[int, int, int, int]:
        """(v and k of the vectors' operand, r and k of the other), as dimensions."""
        x, s = self.vectors.rank, self.scalars.rank
        return (x - 1, x - 2, s - 2, s - 1) if self.along == 1 else (x - 2, x - 1, s - 1, s - 2)

    @property
    def v(self) -> int:
        return self.node.y.rank - (1 if self.along == 1 else 2)

    @property
    def r(self) -> int:
        return self.node.y.rank - (2 if self.along == 1 else 1)

    @property
    def depth(self) -> int:
        return self.node.x.shape[-1]


@kernel("MatMul")
def stacks(node: Node, target: Target) -> Iterator[Kernel]:
    """Any strides; where the operand that is read as vectors does not lie so, blocks of it are copied."""
    a, b, y = node.input(0), node.input(1), node.y
    if a.dtype.name != "float32" or b.dtype.name != "float32" or min(a.rank, b.rank) < 2 or y.size == 0:
        return
    if (a.data is not None) != (b.data is not None) and min(a.rank, b.rank) == 2:
        return  # constant weights have kernels of their own
    for along in (1, 0):
        roles = Roles(node, along)
        count = int(y.shape[roles.v])
        lanes = target.lanes
        while lanes > 4 and lanes >= 2 * count:
            lanes //= 2
        lanes = 1 if lanes < 4 or count < 3 else lanes
        for rows, vectors in tiles(target, lanes, 0, max(-(-count // lanes), 1))[:2]:
            for packed in (False, True):
                yield _kernel(roles, target, lanes, min(rows, int(y.shape[roles.r])), vectors, packed)


def _kernel(roles: Roles, target: Target, lanes: int, rows: int, vectors: int, packed: bool) -> Kernel:
    node, y = roles.node, roles.node.y
    tail = tail_of(node, -1)
    wide, depth = lanes * vectors, int(roles.depth)
    wants: list[Want | None] = [None, None, None, None]
    rank = roles.vectors.rank
    if not packed:
        last = (rank - 2, rank - 1) if roles.along == 1 else (rank - 1, rank - 2)
        wants[roles.along] = Want(order=(*range(rank - 2), *last))
    head = tuple(range(y.rank - 2))
    gives = Want(order=(*head, y.rank - 2, y.rank - 1) if roles.along == 1 else (*head, y.rank - 1, y.rank - 2))
    count = int(y.shape[roles.v])
    padded = -(-count // lanes) * lanes / max(count, 1)
    work = macs_ns(target, int(product(y.shape)) * depth * padded) * (1 if lanes > 1 else 8)
    copied = int(product(y.shape)) // max(int(y.shape[roles.r]), 1) * depth * 0.6 if packed else 0.0
    partial = not fixed(y.shape[roles.v]) or count % lanes != 0
    return Kernel(
        f"dynamic, {rows} {'rows' if roles.along == 1 else 'columns'} x {wide} "
        f"{'columns' if roles.along == 1 else 'rows'}{', copied' if packed else ''}",
        lambda n: _body(Roles(n, roles.along), tail, lanes, rows, vectors, packed), tuple(wants), gives,
        scratch=4 * depth * wide if packed or partial else 0, cost_ns=work * 1.05 + copied + 30,
        helpers=tail_helpers(tail, lanes),
    )  # fmt: skip


def _body(roles: Roles, tail: Tail, lanes: int, rows: int, vectors: int, packed: bool) -> str:
    node, y = roles.node, roles.node.y
    u, s = roles.vectors, roles.scalars
    lead = y.shape[:-2]
    strides = [loops.strides_of(v, (*lead, *v.shape[-2:]))[: len(lead)] for v in (y, u, s)]
    strides += [loops.strides_of(node.input(i), y.shape)[: len(lead)] for i in tail.extras]
    sizes, steps = loops.collapsed(lead, strides) if lead else ([], [[] for _ in strides])
    counters = [f"b{i}" for i in range(len(sizes))]
    text = ["float *const buffer = (float *)scratch;"] if packed or _partial(roles, lanes) else []
    for name, size in zip(counters, sizes, strict=True):
        text.append(f"for ({size_type(size)} {name} = 0; {name} < {c(size)}; {name}++) {{")
    pointers = [
        ("float *const y", "y0"),
        ("const float *const u", f"x{roles.along}"),
        ("const float *const s", f"x{1 - roles.along}"),
        *((f"const float *const e{i}", f"x{i}") for i in tail.extras),
    ]
    for (declared, base), step in zip(pointers, steps, strict=True):
        place = loops.index(counters, step)
        text.append(f"{declared} = {base}{'' if place == '0' else ' + ' + place};")
    text += _all(roles, tail, lanes, rows, vectors, packed)
    return "\n".join([*text, *["}"] * len(sizes)])


def _partial(roles: Roles, lanes: int) -> bool:
    count = roles.node.y.shape[roles.v]
    return not fixed(count) or int(count) % lanes != 0


def _all(roles: Roles, tail: Tail, lanes: int, rows: int, vectors: int, packed: bool) -> list[str]:
    """One matrix."""
    count = roles.node.y.shape[roles.v]
    kind, wide = size_type(count), lanes * vectors
    if fixed(count):
        count = int(count)
        full, rest = count // wide, count % wide
        text = []
        if full:
            text += [
                f"for ({kind} t = 0; t < {full * wide}; t += {wide}) {{",
                *inside(_columns(roles, tail, lanes, rows, vectors, wide, packed)),
                "}",
            ]
        start = full * wide
        if rest >= lanes:
            some = rest // lanes
            text += at_value(kind, "t", start, _columns(roles, tail, lanes, rows, some, some * lanes, packed))
            start, rest = start + some * lanes, rest % lanes
        if rest:
            text += at_value(kind, "t", start, _columns(roles, tail, lanes, rows, 1, rest, True))
        return text
    return [
        f"{kind} t = 0;",
        f"for (; t + {wide} <= {c(count)}; t += {wide}) {{",
        *inside(_columns(roles, tail, lanes, rows, vectors, wide, packed)),
        "}",
        f"for (; t < {c(count)}; t += {lanes}) {{",
        f"    const int width = {c(count)} - t < {lanes} ? (int)({c(count)} - t) : {lanes};",
        *inside(_columns(roles, tail, lanes, rows, 1, "width", True)),
        "}",
    ]


def _columns(
    roles: Roles, tail: Tail, lanes: int, rows: int, vectors: int, width: int | str, packed: bool
) -> list[str]:
    """The result's `width` places along vectors, from t on."""
    u, depth, count = roles.vectors, roles.depth, roles.node.y.shape[roles.r]
    uv, uk, _, _ = roles.dims()
    sv, sk = u.strides[uv] if u.shape[uv] != 1 else 0, u.strides[uk]
    wide = lanes * vectors
    text = []
    if packed:
        kind = size_type(depth)
        place = at("u", ("t + j", sv), ("k", sk))
        copy = f"buffer[k * {wide} + j] = *({place});"
        if int(sk) < int(sv) and sv != 0:
            text += [f"for (int j = 0; j < {width}; j++)", f"    for ({kind} k = 0; k < {c(depth)}; k++) {copy}"]
        else:
            text += [f"for ({kind} k = 0; k < {c(depth)}; k++)", f"    for (int j = 0; j < {width}; j++) {copy}"]
        if width != wide:
            text += [
                f"for ({kind} k = 0; k < {c(depth)}; k++)",
                f"    for (int j = {width}; j < {wide}; j++) buffer[k * {wide} + j] = 0;",
            ]

    def tile(high: int) -> list[str]:
        return _tile(roles, tail, lanes, high, vectors, width, packed)

    kind = size_type(count)
    if fixed(count):
        count = int(count)
        rows = -(-count // -(-count // rows))
        full, rest = count // rows, count % rows
        if full > 1:
            text += [f"for ({kind} r = 0; r < {full * rows}; r += {rows}) {{", *inside(tile(rows)), "}"]
        else:
            text += at_value(kind, "r", 0, tile(rows))
        if rest:
            text += at_value(kind, "r", full * rows, tile(rest))
        return text
    text += [f"{kind} r = 0;", f"for (; r + {rows} <= {c(count)}; r += {rows}) {{", *inside(tile(rows)), "}"]
    if rows > 1:
        text += [f"for (; r < {c(count)}; r++) {{", *inside(tile(1)), "}"]
    return text


def _tile(roles: Roles, tail: Tail, lanes: int, rows: int, vectors: int, width: int | str, packed: bool) -> list[str]:
    node, y, u, s = roles.node, roles.node.y, roles.vectors, roles.scalars
    _, uk, sr, sk = roles.dims()
    wide, kind, unit = lanes * vectors, vector(lanes), lanes == 1
    names = [[f"a{i}" if vectors == 1 else f"a{i}_{j}" for j in range(vectors)] for i in range(rows)]
    flat = [n for line in names for n in line]
    yr = y.strides[roles.r]
    step = c(wide) if packed else c(u.strides[uk])
    text = [
        f"const float *p = {'buffer' if packed else at('u', ('t', 1))};",
        f"const float *w = {at('s', ('r', s.strides[sr]))};",
        f"float *const q = {at('y', ('r', yr), ('t', 1))};",
        f"{kind} {', '.join(f'{n} = 0' if unit else f'{n} = ({kind}){{}}' for n in flat)};",
    ]
    count = size_type(roles.depth)
    text.append(f"for ({count} k = 0; k < {c(roles.depth)}; k++, p += {step}, w += {c(s.strides[sk])}) {{")
    for j in range(vectors):
        load = f"p[{j * lanes}]" if unit else f"*(const {kind} *)(p + {j * lanes})" if j else f"*(const {kind} *)p"
        text.append(f"    const {kind} v{j} = {load};")
    for i in range(rows):
        number = f"*({at('w', (str(i), s.strides[sr]))})" if i else "*w"
        if unit:
            text.append("    " + " ".join(f"{n} += {number} * v{j};" for j, n in enumerate(names[i])))
        else:
            text.append(
                f"    {{ const {kind} m = ({kind}){{}} + {number}; "
                + " ".join(f"{n} += m * v{j};" for j, n in enumerate(names[i]))
                + " }"
            )
    text.append("}")
    if tail.clamp is not None:
        text += [" ".join(clamped(n, lanes, tail.clamp)) for n in flat]
    whole = width == wide
    full = vectors if whole else int(width) // lanes if isinstance(width, int) else 0
    for i in range(rows):
        place = at("q", (str(i), yr))
        if unit:
            text.append(" ".join(f"*({place} + {j}) = {names[i][j]};" for j in range(full)))
            continue
        if full:
            text.append(" ".join(f"*({kind} *)({place} + {j * lanes}) = {names[i][j]};" for j in range(full)))
        if not whole:
            left = int(width) - full * lanes if isinstance(width, int) else width
            text.append(f"for (int j = 0; j < {left}; j++) ({place})[{full * lanes} + j] = {names[i][full]}[j];")
    if tail.expr is not None:
        text += [f"for (int i = 0; i < {rows}; i++) {{", f"    float *const z = {at('q', ('i', yr))};"]
        places = []
        for e in tail.extras:
            steps = loops.strides_of(node.input(e), y.shape)
            down, stride = steps[roles.r], steps[roles.v]
            text.append(f"    const float *const z{e} = {at(f'e{e}', ('r + i', down), ('t', stride))};")
            places.append(f"z{e}[{times('j', stride)}]")
        text += [
            f"    for (int j = 0; j < {width}; j++) {{",
            *inside(tail.text("z[j]", places), "        "),
            "    }",
            "}",
        ]
    return text
