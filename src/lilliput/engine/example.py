"""Write example.c, the shortest program that runs a compiled model."""

from __future__ import annotations

from collections.abc import Sequence

from lilliput.engine.graph import Value
from lilliput.engine.target import Target

MAPPED = """\
    const int file = open("model.weights", O_RDONLY);
    const void *weights = mmap(NULL, {size}, PROT_READ, MAP_PRIVATE, file, 0);
    if (weights == MAP_FAILED) return 1;
"""


def example(
    target: Target,
    inputs: Sequence[tuple[str, Value]],
    outputs: Sequence[tuple[str, Value]],
    sizes: dict[str, int],
    weight_bytes: int,
) -> str:
    """A C program that runs the model on zeros and prints the first numbers of each output."""
    flags = " ".join(flag for flag in target.flags if not flag.startswith("-std"))
    lines = [
        f"/* {' '.join(target.cc)} -std=gnu11 {flags} example.c model.c -lm -o example */",
        *(["#include <fcntl.h>"] if weight_bytes else []),
        "#include <stdio.h>",
        "#include <stdlib.h>",
        *(["#include <sys/mman.h>"] if weight_bytes else []),
        "",
        '#include "model.h"',
        "",
        "static unsigned char arena[MODEL_ARENA_BYTES + 64];",
    ]
    for name, value in (*inputs, *outputs):
        lines.append(f"static {value.c_type} {name}[{max(int(value.size), 1)}];")
    lines += ["", "int main(void)", "{"]
    if weight_bytes:
        lines += MAPPED.format(size=weight_bytes).rstrip("\n").split("\n")
    fields = [
        ".arena = arena + (64 - (uintptr_t)arena % 64)",
        *([".weights = weights"] if weight_bytes else []),
        *(f".{name} = {name}" for name, _ in (*inputs, *outputs)),
        *(f".{name} = {most}" for name, most in sizes.items()),
    ]
    lines += [
        f"    const model_call call = {{{', '.join(fields)}}};",
        "    const int status = model_run(&call);",
        "    if (status) return status;",
    ]
    for name, value in outputs:
        kind, cast = ("%g", "(double)") if value.dtype.kind == "f" else ("%lld", "(long long)")
        count = min(int(value.size), 10)
        lines.append(f'    for (int i = 0; i < {count}; i++) printf("{name}[%d] = {kind}\\n", i, {cast}{name}[i]);')
    return "\n".join([*lines, "    return 0;", "}", ""])
