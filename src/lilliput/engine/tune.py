"""Choose kernels by measuring the candidates of each layer on this machine, or by their own estimates."""

from __future__ import annotations

import ctypes
import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from lilliput.engine.arena import ALIGN
from lilliput.engine.build import library
from lilliput.engine.constants import Constants
from lilliput.engine.graph import Buffer, Graph, Node, Value
from lilliput.engine.kernel import Kernel, Want, candidates, constant
from lilliput.engine.plan import Ranked
from lilliput.engine.target import Target
from lilliput.engine.write import APART, arguments, function

KEPT = 6  # candidates that are measured, the ones that promise most


def estimated(target: Target) -> Ranked:
    """Candidates by their own estimates."""
    known: dict[Node, list[Kernel]] = {}

    def ranked(node: Node) -> list[Kernel]:
        if node not in known:
            known[node] = candidates(node, target)
        return known[node]

    return ranked


def measured(graph: Graph, target: Target) -> Ranked:
    """Candidates by their time on this machine, each measured alone with the layouts that it asks for."""
    guess = estimated(target)
    groups: dict[str, list[tuple[Node, list[Kernel]]]] = {}
    for node in graph.nodes:
        if node.op == "View":
            continue
        kernels = guess(node)[:KEPT]
        if len(kernels) > 1:
            groups.setdefault(signature(node, kernels), []).append((node, kernels))
    times: dict[Node, list[float]] = {}
    if groups:
        heads = [members[0] for members in groups.values()]
        spent = _measure(heads, sorted(graph.sizes), graph.sizes, target)
        for members, ns in zip(groups.values(), spent, strict=True):
            for node, _ in members:
                times[node] = ns
    known: dict[Node, list[Kernel]] = {}

    def ranked(node: Node) -> list[Kernel]:
        if node not in known:
            kernels = guess(node)
            if node in times:
                timed = [replace(k, cost_ns=t) for k, t in zip(kernels[:KEPT], times[node], strict=True)]
                kernels = sorted(timed, key=lambda k: k.cost_ns)
            known[node] = kernels
        return known[node]

    return ranked


def signature(node: Node, kernels: list[Kernel]) -> str:
    """Layers with the same signature take the same time: operator, shapes, how many non-zeros (roughly), candidates."""
    parts: list[object] = [node.op, sorted((k, repr(v)) for k, v in node.attrs.items()), [k.name for k in kernels]]
    for value in (*node.inputs, *node.outputs):
        if value is None:
            parts.append(None)
            continue
        filled = None
        if value.data is not None and value.data.size > 64:
            filled = round(40 * float(np.count_nonzero(value.data)) / value.data.size)
        parts.append((value.shape, value.dtype.name, filled, value.narrow.bits if value.narrow else 0))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _measure(
    heads: list[tuple[Node, list[Kernel]]], sizes: list[str], most: dict[str, int], target: Target
) -> list[list[float]]:
    """ns of every candidate of every head, from one generated C file."""
    constants = Constants(inside=False)
    helpers: dict[str, None] = {}
    functions: list[str] = []
    cases: list[str] = []
    arena_bytes = 0
    for node, kernels in heads:
        for kernel in kernels:
            alone, end = _alone(node, kernel)
            arena_bytes = max(arena_bytes, end)
            for text in kernel.heads(alone):
                helpers[text] = None
            text = function(alone, kernel, sizes)
            name = f"f{len(functions)}"
            functions.append(text.replace("%s(", f"{name}(", 1))
            passed = ", ".join(arguments(alone, kernel, sizes, constants, name, text))
            cases.append(f"    case {len(cases)}: {'(void)' if kernel.fails else ''}{name}({passed}); break;")
    harness = "\n".join(
        [
            *(f"#include <{name}.h>" for name in ("math", "stddef", "stdint", "string", "time")),
            "",
            APART,
            *helpers,
            *functions,
            "",
            HARNESS.replace(
                "SIZES", "\n".join(f"    const int64_t {s} = {most[s]};\n    (void){s};" for s in sizes)
            ).replace("CASES", "\n".join(cases)),
        ]
    )
    weights = np.frombuffer(constants.data() + bytes(2 * ALIGN), np.uint8)
    weights = _aligned(weights)
    arena = _aligned(np.zeros(arena_bytes + 4096, np.uint8))
    floats = np.random.default_rng(0).standard_normal(len(arena) // 4, np.float32)
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "tune.c", Path(folder) / "tune.so"
        source.write_text(harness, encoding="utf-8")
        library(source, made, target)
        loaded = ctypes.CDLL(str(made))
        loaded.measure.restype = ctypes.c_double
        loaded.measure.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_double]
        spent: list[list[float]] = []
        number = 0
        integers = {"int8", "uint8", "int32", "int64", "bool"}
        share = np.random.default_rng(1).random(len(floats), np.float32)
        for node, kernels in heads:
            whole = any(v is not None and v.dtype.name in integers and not v.constant for v in node.inputs)
            held = floats if "active" not in node.attrs else floats * (share < node.attrs["active"])
            row = []
            for _ in kernels:
                if whole:
                    arena[:] = 0
                else:
                    arena[: 4 * len(floats)].view(np.float32)[:] = held
                row.append(loaded.measure(number, arena.ctypes.data, weights.ctypes.data, 2e6))
                number += 1
            spent.append(row)
    return spent


def _aligned(data: np.ndarray) -> np.ndarray:
    held = np.zeros(len(data) + ALIGN, np.uint8)
    start = -held.ctypes.data % ALIGN
    aligned = held[start : start + len(data)]
    aligned[:] = data
    return aligned


def _alone(node: Node, kernel: Kernel) -> tuple[Node, int]:
    """A copy of a node whose values lie as the kernel asks, one behind the other in an arena; where they end."""
    end = 0

    def put(buffer: Buffer) -> None:
        nonlocal end
        buffer.at = end
        end += -(-(buffer.size_bytes + 256) // ALIGN) * ALIGN

    copies: dict[Value, Value] = {}

    def clone(value: Value | None, want: Want | None) -> Value | None:
        if value is None:
            return None
        if value in copies:
            return copies[value]
        copy = replace(value, buffer=None, border=(), tag="")
        if copy.constant and want is None:
            constant(copy)
        else:
            (want or Want()).place(copy)
            assert copy.buffer is not None
            put(copy.buffer)
        copies[value] = copy
        return copy

    inputs = [clone(v, None if i in kernel.skips else kernel.want(i)) for i, v in enumerate(node.inputs)]
    gives = kernel.gives if isinstance(kernel.gives, tuple) else [kernel.gives] * len(node.outputs)
    outputs = [clone(v, gives[i]) for i, v in enumerate(node.outputs)]
    outputs = [clone(Value("unused", node.y.dtype, (1,)), None) if v is None else v for v in outputs]
    alone = Node(node.op, inputs, outputs, dict(node.attrs), node.name, node.opset, kernel)
    if kernel.scratch:
        scratch = Buffer(np.dtype(np.uint8), kernel.scratch)
        put(scratch)
        alone.attrs["scratch"] = scratch
    return alone, end


HARNESS = """
static void once(int number, unsigned char *arena, const unsigned char *weights)
{
    (void)arena;
    (void)weights;
SIZES
    switch (number) {
CASES
    }
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

/* The least time of a call in ns, over repetitions that take about `budget` ns in all. */
__attribute__((visibility("default"))) double measure(int number, unsigned char *arena, const unsigned char *weights,
                                                      double budget)
{
    once(number, arena, weights);
    const double first = now();
    once(number, arena, weights);
    const double each = now() - first + 30;
    int inner = each < 20000 ? (int)(20000 / each) + 1 : 1;
    int rounds = (int)(budget / (each * inner));
    rounds = rounds < 3 ? 3 : rounds > 40 ? 40 : rounds;
    double best = 1e18;
    for (int round = 0; round < rounds; round++) {
        const double start = now();
        for (int i = 0; i < inner; i++) once(number, arena, weights);
        const double spent = (now() - start) / inner;
        best = spent < best ? spent : best;
    }
    return best;
}
"""
