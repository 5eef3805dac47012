"""Chains of convolutions some rows at a time: a 1x1, a depthwise and another 1x1 convolution as one layer.

What lies between them never leaves the cache: for a stripe of output rows the first convolution computes the rows that
the depthwise one reads (those at a stripe's edge twice), the last multiplies them at once. The planes in between, the
largest of networks of inverted bottlenecks, need no memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from lilliput.engine.graph import Array, Buffer, Graph, Node, Value
from lilliput.engine.kernel import Kernel, Want, kernel
from lilliput.engine.kernels import depthwise, pixels
from lilliput.engine.kernels.planes import After, Window, around, heads, plus, registers, runs
from lilliput.engine.size import c, fixed
from lilliput.engine.target import Target

LEAST_BYTES = 3 * 512 * 1024  # between two convolutions, from which on they are one
CACHE_BYTES = (200 * 1024, 560 * 1024)  # what a stripe may need, as alternatives
HEAD = 64  # elements before the first of a plane that may be read


@dataclass(frozen=True, repr=False)
class Chain:
    """The convolutions of a chain: before the depthwise one (or None), itself, after it (or None)."""

    first: Node | None
    middle: Node
    last: Node | None

    @property
    def nodes(self) -> list[Node]:
        """Those that are there."""
        return [node for node in (self.first, self.middle, self.last) if node is not None]

    def __repr__(self) -> str:
        kept = [(n.attrs, n.y.shape, int(np.count_nonzero(n.known(1)))) for n in self.nodes]  # type: ignore[arg-type]
        return f"Chain{kept}"


def striped(graph: Graph) -> Graph:
    """The graph with chains of convolutions, between which much memory would lie, as one node each."""
    uses, makers = graph.uses(), graph.makers()
    gone: set[Node] = set()
    made: dict[Node, Node] = {}

    def alone(value: Value) -> bool:
        return len(uses[value]) == 1 and value not in graph.outputs

    for node in graph.nodes:
        if node.op != "Conv" or node in gone or node.x.rank != 4:
            continue
        suited = depthwise.suits(node)
        if suited is None or suited[2].residual is not None or suited[0].outs != 1 or not fixed(*node.x.shape):
            continue
        first, last = makers.get(node.x), next(iter(uses.get(node.y, [])), None)
        if first is None or first in gone or first.maybe(3) is not None or not _one_pixel(first) or not alone(node.x):
            first = None
        if last is None or last.maybe(3) is node.y or not _one_pixel(last) or last.x is not node.y or not alone(node.y):
            last = None
        between = (4 * int(node.x.size) if first else 0) + (4 * int(node.y.size) if last else 0)
        if between < LEAST_BYTES * int(node.x.shape[0]):
            continue
        chain = Chain(first, node, last)
        end = chain.nodes[-1]
        made[end] = Node(
            "Stripes",
            [chain.nodes[0].x, end.maybe(3) if last else None],
            [end.y],
            {"chain": chain},
            end.name,
            end.opset,
        )
        gone.update(chain.nodes)
    graph.nodes = [made.get(node, node) for node in graph.nodes if node in made or node not in gone]
    return graph


def _one_pixel(node: Node) -> bool:
    return node.op == "Conv" and pixels.suits(node) is not None


# ------------------------------------------------------------------------------------------------------------ kernel


@kernel("Stripes")
def stripes(node: Node, target: Target) -> Iterator[Kernel]:
    """1x1 parts are sparse where zeros make it pay, else dense."""
    chain: Chain = node.attrs["chain"]
    suited = depthwise.suits(chain.middle)
    assert suited is not None
    taps = suited[0]
    heights = list(dict.fromkeys(_height(chain, taps, most) for most in CACHE_BYTES))
    for tall in heights:
        for most in pixels.wide(target):
            parts = _Parts(chain, target, most)
            if not parts.sparse and most != pixels.wide(target)[0]:
                continue
            plan = _Plan(chain, taps, tall, target)
            again = sum((s.high - s.low) * s.times for s in plan.stripes) / taps.size[0]
            yield Kernel(
                f"stripes of {tall}, {parts.name}",
                partial(plan.body, parts=parts),
                wants=(
                    Want(plane=target.lanes, slack=depthwise.reach(taps, target.lanes)),
                    Want(plane=target.lanes) if parts.residual else None,
                ),
                constants=parts.constants,
                scratch=plan.scratch,
                cost_ns=parts.cost_ns * (1 + 0.3 * again) + tall,
                helpers=parts.helpers,
                nonzeros=parts.nonzeros if parts.sparse else None,
                values=parts.values if parts.sparse else None,
            )


class _Parts:
    """The 1x1 convolutions of a chain: their constants and how their lines are written."""

    def __init__(self, chain: Chain, target: Target, most: int) -> None:
        self.chain, self.target, self.most = chain, target, most
        self.constants: dict[str, Array] = {}
        self.nonzeros = self.values = 0
        self.sparse = self.residual = False
        self.helpers = heads(target.lanes)
        self.cost_ns = 100.0
        self.written: dict[Node, tuple[After, tuple[int, ...], int, str]] = {}
        rows = 8 if registers(target) == 32 else 4
        for node, key in ((chain.first, "1"), (chain.middle, "2"), (chain.last, "3")):
            if node is None:
                continue
            if node is chain.middle:
                taps, weight, what = depthwise.suits(node)  # type: ignore[misc]
                self.constants[f"w{key}"] = weight
                self.cost_ns += depthwise.estimate(taps, target.lanes) * int(node.x.shape[0])
            else:
                weight, what = pixels.suits(node)  # type: ignore[misc]
                kept, count = int(np.count_nonzero(weight)), int(node.y.size) // len(weight)
                self.nonzeros, self.values = self.nonzeros + kept, self.values + weight.size
                chunk = pixels.chunked(weight.shape[1], most * target.lanes)
                each = 0.3 * count / max(min(target.lanes, 16), 4 if target.lanes > 1 else 1)
                if kept <= pixels.WORTH * weight.size:
                    values, indices, counts = pixels.nonzeros(weight, chunk)
                    self.constants |= {f"w{key}": values, f"indices{key}": indices, f"counts{key}": counts}
                    self.sparse = True
                    self.written[node] = (what, weight.shape, chunk, key)
                    self.cost_ns += 1.6 * each * kept
                else:
                    self.constants[f"w{key}"] = pixels.packed(weight, rows)
                    self.written[node] = (what, weight.shape, 0, key)
                    self.cost_ns += each * weight.size
                self.residual = what.residual is not None
            bias = what.bias if what.bias is not None else np.zeros(node.y.shape[1], np.float32)
            self.constants[f"bias{key}"] = bias
            self.helpers = (*self.helpers, *what.helpers)
        self.rows = rows
        self.name = f"sparse {most * target.lanes}" if self.sparse else f"dense {rows}x3"

    def lines(self, node: Node, y: Value, x: Value, residual: Value | None, names: tuple[str, str, str]) -> list[str]:
        """C lines of a 1x1 convolution between values whose first elements these C expressions point to."""
        what, shape, chunk, key = self.written[node]
        spans = runs([y, x, *([residual] if residual is not None else [])])
        pointers = [("float *y", names[0]), ("const float *x", names[1]), ("const float *r", names[2])]
        head = [f"const float *w = w{key}, *bias = bias{key};"]
        if chunk:
            kinds = [
                "uint8_t" if a.dtype == np.uint8 else "uint16_t" if a.dtype == np.uint16 else "uint32_t"
                for a in (self.constants[f"indices{key}"], self.constants[f"counts{key}"])
            ]
            head += [f"const {kinds[0]} *indices = indices{key};", f"const {kinds[1]} *counts = counts{key};"]
            run = pixels.sparse_run(spans, what, shape, self.most, chunk, (kinds[0], kinds[1]), self.target)
        else:
            run = pixels.dense_run(spans, what, shape, self.rows, self.target)
        return ["{", *(f"    {line}" for line in (*head, *spans.inside(pointers[: len(spans.channel)], run))), "}"]


@dataclass(frozen=True)
class Stripe:
    """`times` stripes of `rows` output rows, the first from `start` on, which read input rows `low` up to `high`."""

    start: int
    times: int
    rows: int
    low: int
    high: int
    before: int  # input rows above `low` that the first output row would read


class _Plan:
    """The stripes of a chain and the memory that they share."""

    def __init__(self, chain: Chain, taps: Window, tall: int, target: Target) -> None:
        self.chain, self.taps, self.lanes, self.target = chain, taps, target.lanes, target
        self.stripes = _stripes(taps, tall)
        rows = max(s.high - s.low for s in self.stripes)
        behind = depthwise.reach(taps, target.lanes)
        self.pitch_in, self.pitch_out = (
            -(-n // target.lanes) * target.lanes for n in (rows * taps.size[1], tall * taps.out[1])
        )
        whole = taps.groups
        self.count_in = HEAD + whole * self.pitch_in + behind if chain.first else 0
        self.count_in = -(-self.count_in // HEAD) * HEAD
        self.count_out = whole * self.pitch_out + target.lanes if chain.last else 0
        self.scratch = 4 * (self.count_in + self.count_out)

    def body(self, node: Node, parts: _Parts) -> str:
        """The C of the kernel."""
        chain, taps, x, y = self.chain, self.taps, node.x, node.y
        residual = node.maybe(1)
        masks: depthwise.Masks = {}
        lines: list[str] = []
        for s in self.stripes:
            lines += around(s.times, "t", self._stripe(s, x, y, residual, parts, masks))
        head = depthwise.declared(masks, depthwise.narrowest(taps.out[1], self.lanes))
        if chain.first is not None:
            head.append(f"float *u = (float *)scratch + {HEAD};")
        if chain.last is not None:
            head.append(f"float *m = {plus('(float *)scratch', self.count_in)};")
        return "\n".join(
            [*head, f"for (int n = 0; n < {c(x.shape[0])}; n++) {{", *(f"    {line}" for line in lines), "}"]
        )

    def _stripe(
        self, s: Stripe, x: Value, y: Value, residual: Value | None, parts: _Parts, masks: depthwise.Masks
    ) -> list[str]:
        chain, taps = self.chain, self.taps
        step = s.rows * taps.stride[0]
        rows = s.high - s.low
        many = int(s.times > 1)
        wide, out = taps.size[1], taps.out[1]

        def moved(name: str, value: Value, start: int, step: int) -> str:
            pitch = value.strides[2]
            return plus(name, ("n", value.strides[0]), ("t", many * step * pitch), start * pitch)

        lines = [f"const float *xs = {moved('x0', x, s.low, step)};", f"float *ys = {moved('y0', y, s.start, s.rows)};"]
        if residual is not None:
            lines.append(f"const float *rs = {moved('x1', residual, s.start, s.rows)};")
        final = s.times - 1
        xs = _rows(x, rows, s.low + final * step)
        ys = _rows(y, s.rows, s.start + final * s.rows)
        ends = s.start + s.times * s.rows == taps.out[0]
        over = -(-s.rows * out // self.lanes) * self.lanes
        if ends and (taps.out[0] - s.rows) * int(y.strides[2]) + over > int(y.strides[1]):
            # The next plane begins behind these rows, which is not to be written again.
            ys = replace(ys, border=ys.border or ((0, 0),) * 3 + ((0, 1),))
        u, name = _rows(x, rows, s.low), "xs"
        if chain.first is not None:
            u = Value(
                "u",
                y.dtype,
                (1, taps.groups, rows, wide),
                offset=HEAD,
                buffer=Buffer(y.dtype, self.count_in),
                strides=(taps.groups * self.pitch_in, self.pitch_in, wide, 1),
            )
            lines += parts.lines(chain.first, u, xs, None, ("u", "xs", ""))
            name = "u"
        m, to = ys, "ys"
        if chain.last is not None:
            m = Value(
                "m",
                y.dtype,
                (1, taps.groups, s.rows, out),
                buffer=Buffer(y.dtype, self.count_out),
                strides=(taps.groups * self.pitch_out, self.pitch_out, out, 1),
            )
            to = "m"
        elif ends:
            m = replace(ys, border=ys.border or ((0, 0),) * 3 + ((0, 1),))
        window = replace(taps, size=(rows, wide), out=(s.rows, out), before=(s.before, taps.before[1]))
        suited = depthwise.suits(chain.middle)
        assert suited is not None
        lanes = depthwise.narrowest(out, self.lanes)
        middle = depthwise.channels(
            u,
            m,
            None,
            suited[2],
            window,
            lanes,
            depthwise.height(window, registers(self.target)),
            masks,
            (name, to, ""),
        )
        lines += ["{", "    const float *w = w2, *bias = bias2;", *(f"    {line}" for line in middle), "}"]
        if chain.last is not None:
            rs = None if residual is None else _rows(residual, s.rows, s.start + final * s.rows)
            lines += parts.lines(chain.last, ys, m, rs, ("ys", "m", "rs"))
        return lines


def _rows(value: Value, rows: int, start: int) -> Value:
    """Some rows of every plane of one image."""
    return Value(
        value.name,
        value.dtype,
        (1, value.shape[1], rows, value.shape[3]),
        buffer=value.buffer,
        offset=value.offset + start * value.strides[2],
        strides=value.strides,
        border=value.border,
    )


def _height(chain: Chain, taps: Window, most: int) -> int:
    """Output rows of a stripe that needs at most so many bytes, where it can be a divisor of all of them."""

    def needed(rows: int) -> int:
        read = min(taps.size[0], (rows - 1) * taps.stride[0] + (taps.kernel[0] - 1) * taps.dilation[0] + 1)
        between = (read * taps.size[1] if chain.first else 0) + (rows * taps.out[1] if chain.last else 0)
        return 4 * taps.groups * between

    fits = [rows for rows in range(1, taps.out[0] + 1) if needed(rows) <= most] or [1]
    even = [rows for rows in fits if taps.out[0] % rows == 0]
    return even[-1] if 2 * even[-1] > fits[-1] else fits[-1]


def _stripes(taps: Window, tall: int) -> list[Stripe]:
    """The stripes of `tall` output rows, those that are alike together."""
    stripes: list[Stripe] = []
    for start in range(0, taps.out[0], tall):
        rows = min(tall, taps.out[0] - start)
        top = start * taps.stride[0] - taps.before[0]
        bottom = top + (rows - 1) * taps.stride[0] + (taps.kernel[0] - 1) * taps.dilation[0] + 1
        low = min(max(top, 0), taps.size[0] - 1)
        stripe = Stripe(start, 1, rows, low, max(min(bottom, taps.size[0]), low + 1), low - top)
        last = stripes[-1] if stripes else None
        if (
            last
            and (last.rows, last.high - last.low, last.before) == (rows, stripe.high - low, stripe.before)
            and (low == last.low + last.times * rows * taps.stride[0])
        ):
            stripes[-1] = replace(last, times=last.times + 1)
            continue
        stripes.append(stripe)
    return stripes
