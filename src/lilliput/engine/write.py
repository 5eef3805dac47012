"""Write model.c and model.h from a plan, with the constants in them or in a file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lilliput.engine import loops
from lilliput.engine.arena import ALIGN
from lilliput.engine.c_names import C_WORDS, comment, identifier
from lilliput.engine.constants import Constants
from lilliput.engine.graph import C_TYPES, Node, Value
from lilliput.engine.kernel import Kernel
from lilliput.engine.plan import Plan
from lilliput.engine.size import c, shown

INSIDE_BYTES = 512 * 1024  # up to which constants stand in model.c; more are a file that is mapped


@dataclass
class Source:
    """What was written: the texts, the constants' bytes (empty when they are in the C) and how many they are wherever
    they stand, and each layer's facts."""

    c: str
    h: str
    weights: bytes
    constant_bytes: int
    layers: list[dict[str, Any]]
    inputs: list[str]
    outputs: list[str]
    sizes: list[str]
    errors: list[str]


# ---------------------------------------------------------------------------------------------------------- functions


def parameters(node: Node, kernel: Kernel, sizes: Sequence[str], body: str | None = None) -> list[tuple[str, str]]:
    """(C declaration, what is passed: "x0", "y0", a constant's key, "scratch" or a size) of a layer's function.

    Args:
        body: Its statements; what they do not name is left out. Only what shares memory with an output is not
            restrict.
    """

    words = None if body is None else set(re.findall(r"\w+", body))

    def named(key: str) -> bool:
        return words is None or key in words

    outputs = [(f"y{i}", v) for i, v in enumerate(node.outputs) if v is not None and named(f"y{i}")]
    inputs = [
        (f"x{i}", v) for i, v in enumerate(node.inputs) if v is not None and i not in kernel.skips and named(f"x{i}")
    ]
    met = {id(v.buffer) for _, v in outputs} & {id(v.buffer) for _, v in inputs}
    parameters = [
        (f"{value.c_type} *{'' if id(value.buffer) in met else 'restrict '}{key}", key) for key, value in outputs
    ]
    parameters += [
        (f"const {value.c_type} *{'' if id(value.buffer) in met else 'restrict '}{key}", key) for key, value in inputs
    ]
    parameters += [
        (f"const {C_TYPES[np.asarray(data).dtype.name]} *restrict {key}", key)
        for key, data in kernel.constants.items()
        if named(key)
    ]
    if kernel.scratch and named("scratch"):
        parameters.append(("unsigned char *restrict scratch", "scratch"))
    return parameters + [(f"int64_t {name}", name) for name in sizes if named(name)]


# A compiler that inlines the layers into one function runs out of registers in it (measured: 40% slower).
APART = """\
#if defined(__clang__)
#define LAYER_FUNCTION static __attribute__((noinline))
#elif defined(__GNUC__)
#define LAYER_FUNCTION static __attribute__((noipa)) /* nor made again for each call, with its constants unfolded */
#else
#define LAYER_FUNCTION static
#endif
"""


def function(node: Node, kernel: Kernel, sizes: Sequence[str], name: str = "%s") -> str:
    """The text of a layer's function; %s stands for its name."""
    body = kernel.body(node)
    used = parameters(node, kernel, sizes, body)
    lines = "\n".join(f"    {line}" if line and not line.startswith("#") else line for line in body.splitlines())
    kind = "int" if kernel.fails else "void"
    declared = ", ".join(text for text, _ in used) or "void"
    return f"LAYER_FUNCTION {kind} {name}({declared})\n{{\n{lines}\n}}\n"


def arguments(
    node: Node, kernel: Kernel, sizes: Sequence[str], constants: Constants, label: str, text: str
) -> list[str]:
    """The C expressions that a layer's function is called with."""
    arguments = []
    head = set(re.findall(r"\w+(?=[,)])", text.split("\n{\n", 1)[0]))
    for _, key in parameters(node, kernel, sizes):
        if key not in head:
            continue
        if key in sizes:
            arguments.append(key)
        elif key == "scratch":
            arguments.append(f"arena + {node.attrs['scratch'].at}")
        elif key in kernel.constants:
            arguments.append(constants.add(np.asarray(kernel.constants[key]), f"{label}_{key}"))
        else:
            value = (node.outputs if key[0] == "y" else node.inputs)[int(key[1:])]
            assert value is not None
            arguments.append(pointer(value, constants))
    return arguments


def pointer(value: Value, constants: Constants) -> str:
    """The C expression of a pointer to a value's first element."""
    buffer = value.buffer
    assert buffer is not None
    if buffer.place == "constant":
        assert buffer.data is not None
        base = constants.add(buffer.data, buffer.name)
    elif buffer.place == "arena":
        base = f"({value.c_type} *)(arena + {buffer.at})"
    else:
        base = f"call->{buffer.name}"
    return base if value.offset == 0 else f"{base} + {c(value.offset)}"


# --------------------------------------------------------------------------------------------------------------- file


HEADER = """\
/* Made by lilliput from {name}.
 *
 * Fill a model_call and run it. Nothing is allocated and nothing is kept between calls: threads run at once, each with
 * an arena of its own. */
#ifndef MODEL_H
#define MODEL_H

#include <stddef.h>
#include <stdint.h>

typedef struct {{
    void *arena;            /* model_arena_bytes() bytes, aligned to 64 */
    const void *weights;    /* {weights} */
{members}}} model_call;

#define MODEL_ARENA_BYTES {arena}

#if defined(__GNUC__)
#define MODEL_API __attribute__((visibility("default")))
#else
#define MODEL_API
#endif

/* Bytes of the arena. */
MODEL_API size_t model_arena_bytes(void);

/* Compute the outputs. Returns 0, {errors}. */
MODEL_API int model_run(const model_call *call);
{profile}
#endif
"""


@dataclass
class _Text:
    """What is gathered while layers are written."""

    sizes: list[str]
    constants: Constants
    functions: dict[str, str] = field(default_factory=dict)  # text -> name: equal layers share one
    helpers: dict[str, None] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def layer(self, number: int, node: Node) -> None:
        """A node's function, its call and its facts."""
        kernel: Kernel = node.kernel
        label = identifier(node.name)
        self.helpers |= dict.fromkeys(kernel.heads(node))
        text = function(node, kernel, self.sizes)
        name = self.functions.setdefault(text, "") or identifier(f"{label}_{identifier(node.op)}".lower(), self.names)
        self.functions[text] = name
        call = f"{name}({', '.join(arguments(node, kernel, self.sizes, self.constants, label, text))})"
        self.calls.append(f"    /* {comment(describe(node, kernel))} */")
        if kernel.fails:
            self.errors.append(f"{node.name}: {kernel.fails}")
            call = f"if ({call}) return {len(self.errors)}"
        self.calls.append(f"    LAYER({number}, {call})")
        for value in node.outputs:
            if value is not None and value.border:
                self.border(number, value)
        self.layers.append(
            {
                "name": node.name,
                "op": node.op,
                "kernel": kernel.name,
                "output": shown(node.y.shape),
                "values": kernel.values,
                "nonzeros": kernel.nonzeros,
                "function": name,
                "ns": round(kernel.cost_ns),
                "bytes": sum(np.asarray(a).nbytes for a in kernel.constants.values()),
                **({} if kernel.active is None else {"active": round(kernel.active, 4)}),
            }
        )

    def border(self, number: int, value: Value) -> None:
        """The zeros around a value."""
        lines = loops.zero_border(value)
        used = [s for s in self.sizes if re.search(rf"\b{s}\b", lines)]
        body = "\n".join(f"    {line}" for line in lines.splitlines())
        text = (
            f"static void %s({', '.join([f'{value.c_type} *restrict y', *(f'int64_t {s}' for s in used)])})\n"
            f"{{\n{body}\n}}\n"
        )
        name = self.functions.setdefault(text, "") or identifier("zero_border", self.names)
        self.functions[text] = name
        self.calls.append(f"    LAYER({number}, {name}({', '.join([pointer(value, self.constants), *used])}))")


HELPER = re.compile(r"^static inline [^\n;{}]*?\b(\w+)\([^;{}]*\)\s*\{(?:[^\n]*\}$|.*?^\}$)\n?", re.M | re.S)


def needed(helpers: Iterable[str], bodies: Iterable[str]) -> list[str]:
    """The helpers without the functions that nothing calls, of which some compilers warn."""
    kept, last = list(helpers), [""]
    while kept != last:
        used = set(re.findall(r"\w+(?=\()", "\n".join(bodies)))
        for text in kept:  # what a helper's own definition calls, its own name apart
            used |= set(re.findall(r"\w+(?=\()", re.sub(r"^static inline [^\n;{}]*?\w+\(", "", text, flags=re.M)))
        last, kept = kept, [_without(text, used) for text in kept]
    return kept


def _without(text: str, used: set[str]) -> str:
    return HELPER.sub(lambda m: m[0] if m[1] in used else "", text)


def written(plan: Plan, name: str = "model.onnx") -> Source:
    """The C of a plan."""
    graph = plan.graph
    sizes = sorted(graph.sizes)
    taken = {"arena", "weights", *sizes}
    inputs = [_member(value, taken) for value in graph.inputs]
    outputs = [_member(value, taken) for value in graph.outputs]
    constants = Constants(_constant_bytes(plan) <= INSIDE_BYTES, {*C_WORDS, *taken})
    text = _Text(sizes, constants)
    for i, node in enumerate(graph.nodes):
        text.layer(i, node)
    bounds = " || ".join(
        [*(f"{s} < 1 || {s} > {graph.sizes[s]}" for s in sizes), *(f"{c(s)} < 0" for s in graph.needs)]
    )
    source = "\n".join(
        [
            '#include "model.h"',
            "",
            "#include <math.h>",
            "#include <string.h>",
            "",
            APART,
            *needed(text.helpers, text.functions),
            constants.text(),
            "",
            *(body.replace("%s(", f"{f}(", 1) for body, f in text.functions.items()),
            PROFILE,
            "size_t model_arena_bytes(void) { return MODEL_ARENA_BYTES; }",
            "",
            "#ifdef MODEL_PROFILE",
            "int model_profile(const model_call *call, double *seconds)",
            "#else",
            "int model_run(const model_call *call)",
            "#endif",
            "{",
            "    unsigned char *arena = (unsigned char *)call->arena;",
            *([] if constants.inside else ["    const unsigned char *weights = (const unsigned char *)call->weights;"]),
            *(f"    const int64_t {s} = call->{s};" for s in sizes),
            *([f"    if ({bounds}) return -1;"] if sizes else []),
            "    (void)arena;",
            *text.calls,
            "    return 0;",
            "}",
            "",
        ]
    )
    members = [
        f"    {'const ' if m in inputs else ''}{v.c_type} *{m};    /* {comment(shown(v.shape))} */\n"
        for v, m in zip((*graph.inputs, *graph.outputs), (*inputs, *outputs), strict=True)
    ]
    members += [f"    int64_t {s};    /* 1 to {graph.sizes[s]} */\n" for s in sizes]
    codes = [
        *(["-1 where a size is out of range"] if sizes else []),
        *(f"{number}: {comment(error)}" for number, error in enumerate(text.errors, 1)),
    ]
    header = HEADER.format(
        name=comment(name),
        weights="not read: they are in model.c" if constants.inside else "the bytes of model.weights, aligned to 64",
        members="".join(members),
        arena=plan.arena_bytes + ALIGN,
        errors="; ".join(codes) or "there is no other result",
        profile=PROFILE_H,
    )
    return Source(source, header, constants.data(), constants.end, text.layers, inputs, outputs, sizes, text.errors)


PROFILE = """
#ifdef MODEL_PROFILE
#include <time.h>
static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
#define LAYER(i, f) do { const double start = now(); f; seconds[i] += now() - start; } while (0);
#else
#define LAYER(i, f) f;
#endif
"""
PROFILE_H = """
#ifdef MODEL_PROFILE
/* The same, adding to seconds[i] what layer i took. */
MODEL_API int model_profile(const model_call *call, double *seconds);
#endif
"""


def _member(value: Value, taken: set[str]) -> str:
    assert value.buffer is not None
    value.buffer.name = identifier(value.name.removesuffix(".out"), taken)
    return value.buffer.name


def _constant_bytes(plan: Plan) -> int:
    total = 0
    for node in plan.graph.nodes:
        total += sum(np.asarray(a).nbytes for a in node.kernel.constants.values())
        total += sum(
            v.data.nbytes
            for i, v in enumerate(node.inputs)
            if v is not None and v.data is not None and i not in node.kernel.skips
        )
    return total


def describe(node: Node, kernel: Kernel) -> str:
    """One line on a layer for people: what, from which shape to which, how much of it is not zero, by which kernel."""
    shapes = " ".join(shown(v.shape) for v in node.inputs[:1] if v is not None)
    kept = f", {kernel.nonzeros} of {kernel.values} non-zero" if kernel.nonzeros is not None else ""
    active = f", {kernel.active:.0%} of the inputs active" if kernel.active is not None else ""
    return f"{node.name}: {node.op} {shapes} -> {shown(node.y.shape)}{kept}{active}, {kernel.name}"


def manifest(plan: Plan, source: Source, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What manifest.json says."""
    graph = plan.graph

    def entry(value: Value, member: str) -> dict[str, Any]:
        return {
            "name": value.name.removesuffix(".out"),
            "member": member,
            "dtype": value.dtype.name,
            "shape": [c(s) if not isinstance(s, int) or type(s) is not int else s for s in value.shape],
        }

    return {
        **facts,
        "inputs": [entry(v, m) for v, m in zip(graph.inputs, source.inputs, strict=True)],
        "outputs": [entry(v, m) for v, m in zip(graph.outputs, source.outputs, strict=True)],
        "sizes": {name: int(most) for name, most in graph.sizes.items()},
        "arena_bytes": plan.arena_bytes,
        "live_bytes": plan.live_bytes,
        "weight_bytes": len(source.weights),
        "constant_bytes": source.constant_bytes,
        "layers": source.layers,
    }
