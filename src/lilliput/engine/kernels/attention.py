"""Compute attention, softmax(f(Q K)) V, one block of queries at a time: all its scores stay in the L1 cache.

Scores are held with the queries of a block side by side, so that every step (the product, f, the largest score and the
sum of exponentials of each query, the product with V) is a loop over vectors of queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lilliput.engine import loops
from lilliput.engine.expr import needs, statements
from lilliput.engine.graph import Node
from lilliput.engine.helpers import texts
from lilliput.engine.kernel import Kernel, Want, kernel
from lilliput.engine.kernels.product import at, at_value, inside, size_type, times, vector, vector_types
from lilliput.engine.kernels.tiles import macs_ns, tiles
from lilliput.engine.size import c, fixed, product
from lilliput.engine.target import Target


@kernel("Attend")
def attention(node: Node, target: Target) -> Iterator[Kernel]:
    """Queries that lie side by side are read in place, others are copied block by block."""
    q, k, y = node.input(0), node.input(1), node.y
    count, keys, depth, width = (int(n) for n in (q.shape[-2], k.shape[-1], q.shape[-1], y.shape[-1]))
    lanes = target.lanes
    while lanes > 4 and lanes >= 2 * count:
        lanes //= 2
    lanes = 1 if lanes < 4 else lanes
    head = range(y.rank - 2)
    # The order that a transpose of heads and positions and a reshape make of (features, batch, positions).
    order = (*tuple(head)[1:], y.rank - 1, *tuple(head)[:1], y.rank - 2)
    work = macs_ns(target, int(product(y.shape[:-2])) * count * keys * (depth + width)) * (1 if lanes > 1 else 8)
    soft = int(product(y.shape[:-2])) * count * keys * (2.0 + 0.5 * node.attrs["expr"].count()) / target.lanes
    for rows, vectors in tiles(target, lanes, 0, max(-(-count // lanes), 1))[:2]:
        for packed in (False, True):
            wants: list[Want | None] = [None] * len(node.inputs)
            if not packed:
                wants[0] = Want(order=(*range(q.rank - 2), q.rank - 1, q.rank - 2))
            for i in range(3, len(node.inputs)):
                value = node.input(i)
                if value.rank >= 2 and value.shape[-2] != 1 and value.shape[-1] != 1:
                    wants[i] = Want(order=(*range(value.rank - 2), value.rank - 1, value.rank - 2))
            wide = lanes * vectors
            partial = packed or not fixed(q.shape[-2]) or count % lanes != 0
            floats = wide * (keys + 2 + (depth if partial else 0))
            yield Kernel(
                f"attention, {wide} queries at once{', copied' if packed else ''}",
                lambda n, r=rows, v=vectors, p=packed: _body(n, lanes, r, v, p),  # type: ignore[misc]
                tuple(wants), Want(order=order), scratch=4 * floats,
                cost_ns=(work + soft) * 1.1 + (count * depth * 0.5 * int(product(y.shape[:-2])) if packed else 0) + 100,
                helpers=(*([vector_types(lanes)] if lanes > 1 else []), *texts("exp", *needs([node.attrs["expr"]]))),
            )  # fmt: skip


def _body(node: Node, lanes: int, rows: int, vectors: int, packed: bool) -> str:
    q, k, v, y = node.input(0), node.input(1), node.input(2), node.y
    extras = list(range(3, len(node.inputs)))
    keys = k.shape[-1]
    scores = (*y.shape[:-1], keys)  # batch..., queries, keys
    lead = y.shape[:-2]
    values = [y, q, k, v]
    strides = [loops.strides_of(value, (*lead, *value.shape[-2:]))[: len(lead)] for value in values]
    strides += [loops.strides_of(node.input(i), scores)[: len(lead)] for i in extras]
    sizes, steps = loops.collapsed(lead, strides) if lead else ([], [[] for _ in strides])
    counters = [f"b{i}" for i in range(len(sizes))]
    wide = lanes * vectors
    text = [
        "float *const scores = (float *)scratch;",
        f"float *const top = scores + {int(keys) * wide};",
        f"float *const total = top + {wide};",
    ]
    count = q.shape[-2]
    if packed or not fixed(count) or int(count) % lanes:
        text.append(f"float *const block = total + {wide};")
    for name, size in zip(counters, sizes, strict=True):
        text.append(f"for ({size_type(size)} {name} = 0; {name} < {c(size)}; {name}++) {{")
    pointers = [
        ("float *const y", "y0"),
        ("const float *const q", "x0"),
        ("const float *const k", "x1"),
        ("const float *const v", "x2"),
        *((f"const {node.input(i).c_type} *const e{i}", f"x{i}") for i in extras),
    ]
    for (declared, base), step in zip(pointers, steps, strict=True):
        place = loops.index(counters, step)
        text.append(f"{declared} = {base}{'' if place == '0' else ' + ' + place};")

    def block(some: int, width: int | str, copy: bool) -> list[str]:
        return _block(node, lanes, rows, some, width, copy)

    kind = size_type(count)
    if fixed(count):
        count = int(count)
        full, rest = count // wide, count % wide
        if full:
            text += [
                f"for ({kind} t = 0; t < {full * wide}; t += {wide}) {{",
                *inside(block(vectors, wide, packed)),
                "}",
            ]
        start = full * wide
        if rest >= lanes:
            some = rest // lanes
            text += at_value(kind, "t", start, block(some, some * lanes, packed))
            start, rest = start + some * lanes, rest % lanes
        if rest:
            text += at_value(kind, "t", start, block(1, rest, True))
    else:
        text += [
            f"{kind} t = 0;",
            f"for (; t + {wide} <= {c(count)}; t += {wide}) {{",
            *inside(block(vectors, wide, packed)),
            "}",
            f"for (; t < {c(count)}; t += {lanes}) {{",
            f"    const int width = {c(count)} - t < {lanes} ? (int)({c(count)} - t) : {lanes};",
            *inside(block(1, "width", True)),
            "}",
        ]
    return "\n".join([*text, *["}"] * len(sizes)])


def _block(node: Node, lanes: int, rows: int, vectors: int, width: int | str, copy: bool) -> list[str]:
    """The queries t .. t + width - 1 of one head."""
    q, k, v, y = node.input(0), node.input(1), node.input(2), node.y
    depth, keys, wide = q.shape[-1], k.shape[-1], lanes * vectors
    sq, sd = q.strides[-2:]
    sq = 0 if q.shape[-2] == 1 and fixed(q.shape[-2]) else sq
    text, kd, kk = [], size_type(depth), size_type(keys)
    if copy:
        line = f"block[d * {wide} + j] = *({at('q', ('t + j', sq), ('d', sd))});"
        each = [f"for (int j = 0; j < {width}; j++)", f"for ({kd} d = 0; d < {c(depth)}; d++)"]
        if int(sq) < int(sd):
            each.reverse()
        text += [each[0], f"    {each[1]} {line}"]
        if width != wide:
            text += [
                f"for ({kd} d = 0; d < {c(depth)}; d++)",
                f"    for (int j = {width}; j < {wide}; j++) block[d * {wide} + j] = 0;",
            ]
    # Scores: keys down, queries along.
    base, step = ("block", wide) if copy else (at("q", ("t", 1)), sd)
    text += _over(
        keys,
        rows,
        lambda high: _product(
            lanes,
            high,
            vectors,
            base,
            step,
            at("k", ("r", k.strides[-1])),
            k.strides[-1],
            k.strides[-2],
            depth,
            [f"scores + (r + {i}) * {wide}" if i else f"scores + r * {wide}" for i in range(high)],
            wide,
            "",
        ),
    )
    text += [
        f"for (int j = 0; j < {wide}; j++) {{",
        "    top[j] = -INFINITY;",
        "    total[j] = 0;",
        "}",
        f"for ({kk} r = 0; r < {c(keys)}; r++) {{",
        f"    float *const z = scores + r * {wide};",
    ]
    shape, places = (*y.shape[:-1], keys), ["z[j]"]
    for i in range(3, len(node.inputs)):
        along, down = loops.strides_of(node.input(i), shape)[-2:]
        text.append(f"    const {node.input(i).c_type} *const z{i} = {at(f'e{i}', ('t', along), ('r', down))};")
        places.append(f"z{i}[{times('j', along)}]")
    lines, (result,) = statements([node.attrs["expr"]], places)
    if lines or result != "z[j]":
        text += [
            f"    for (int j = 0; j < {width}; j++) {{",
            *inside(lines, "        "),
            f"        z[j] = {result};",
            "    }",
        ]
    text += [
        f"    for (int j = 0; j < {wide}; j++) top[j] = z[j] > top[j] ? z[j] : top[j];",
        "}",
        f"for ({kk} r = 0; r < {c(keys)}; r++) {{",
        f"    float *const z = scores + r * {wide};",
        f"    for (int j = 0; j < {wide}; j++) {{",
        "        z[j] = fast_exp(z[j] - top[j]);",
        "        total[j] += z[j];",
        "    }",
        "}",
        f"for (int j = 0; j < {wide}; j++) total[j] = 1.0f / total[j];",
    ]
    sy, su = y.strides[-2:]
    text += _over(
        y.shape[-1],
        rows,
        lambda high: _product(
            lanes,
            high,
            vectors,
            "scores",
            wide,
            at("v", ("r", v.strides[-1])),
            v.strides[-1],
            v.strides[-2],
            keys,
            [at("y", ("t", sy), (f"r + {i}" if i else "r", su)) for i in range(high)],
            width,
            "total",
            sy,
        ),
    )
    return text


def _over(count: int, rows: int, make: Callable[[int], list[str]]) -> list[str]:
    """Lines for `count` rows, `rows` at a time: make(how many) are those from r on."""
    kind = size_type(count)
    if fixed(count):
        count = int(count)
        rows = -(-count // -(-count // rows))
        full, rest = count // rows, count % rows
        text = [f"for ({kind} r = 0; r < {full * rows}; r += {rows}) {{", *inside(make(rows)), "}"]
        return text + (at_value(kind, "r", full * rows, make(rest)) if rest else [])
    return [
        "{",
        f"    {kind} r = 0;",
        f"    for (; r + {rows} <= {c(count)}; r += {rows}) {{",
        *inside(make(rows), "        "),
        "    }",
        f"    for (; r < {c(count)}; r++) {{",
        *inside(make(1), "        "),
        "    }",
        "}",
    ]


def _product(
    lanes: int,
    rows: int,
    vectors: int,
    base: str,
    step: int,
    scalars: str,
    across: int,
    down: int,
    depth: int,
    places: list[str],
    width: int | str,
    scale: str,
    along: int = 1,
) -> list[str]:
    """Sums over `depth` of vectors (at base, then every `step`) times scalars, `rows` of them `across` apart."""
    kind, unit, wide = vector(lanes), lanes == 1, lanes * vectors
    names = [[f"a{i}_{j}" for j in range(vectors)] for i in range(rows)]
    flat = [n for line in names for n in line]
    text = [
        f"const float *p = {base};",
        f"const float *w = {scalars};",
        f"{kind} {', '.join(f'{n} = 0' if unit else f'{n} = ({kind}){{}}' for n in flat)};",
        f"for ({size_type(depth)} n = 0; n < {c(depth)}; n++, p += {c(step)}, w += {c(down)}) {{",
    ]
    for j in range(vectors):
        text.append(f"    const {kind} v{j} = {f'p[{j}]' if unit else f'*(const {kind} *)(p + {j * lanes})'};")
    for i in range(rows):
        number = f"*({at('w', (str(i), across))})"
        if unit:
            text.append("    " + " ".join(f"{n} += {number} * v{j};" for j, n in enumerate(names[i])))
        else:
            text.append(
                f"    {{ const {kind} m = ({kind}){{}} + {number}; "
                + " ".join(f"{n} += m * v{j};" for j, n in enumerate(names[i]))
                + " }"
            )
    text.append("}")
    if scale:
        for j in range(vectors):
            held = f"{scale}[{j}]" if unit else f"*(const {kind} *)({scale} + {j * lanes})"
            text.append(f"const {kind} f{j} = {held};")
            text.append(" ".join(f"{names[i][j]} *= f{j};" for i in range(rows)))
    whole = width == wide and along == 1 and fixed(along)
    for i, place in enumerate(places):
        if unit:
            text.append(" ".join(f"*({at(place, (str(j), along))}) = {names[i][j]};" for j in range(vectors)))
        elif whole:
            text.append(" ".join(f"*({kind} *)({place} + {j * lanes}) = {names[i][j]};" for j in range(vectors)))
        else:
            left = width
            for j in range(vectors):
                some = min(lanes, int(left) - j * lanes) if isinstance(left, int) else left
                where = at(place, (f"j + {j * lanes}" if j else "j", along))
                text.append(f"for (int j = 0; j < {some}; j++) *({where}) = {names[i][j]}[j];")
    return text
