"""A C program that runs a compiled model on given inputs and prints its outputs, for any processor.

It gives the model exactly the room that it asks for, filled with NaN, so that a sanitizer sees every step beside it and
a value that was never written shows. It runs twice and prints both results. With -DTHREADS two threads do, each in its
own arena; with -DBARE there is no operating system, and a debugger's calls (semihosting) print.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

PROGRAM = r"""
#define _POSIX_C_SOURCE 200809L /* posix_memalign, which C99 hides */
#include "model.h"

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef BARE
void put(const char *text);
void leave(int status);
static uint64_t ram[(3 << 20) / 8];
static size_t taken;
static void *room(size_t bytes)
{
    unsigned char *found = (unsigned char *)ram + taken;
    found += (64 - (uintptr_t)found % 64) % 64;
    taken = (size_t)(found - (unsigned char *)ram) + bytes;
    if (taken > sizeof ram) leave(3);
    return memset(found, 0xff, bytes);
}
#else
#include <stdio.h>
#include <stdlib.h>
static void put(const char *text) { fputs(text, stdout); }
static void leave(int status) { exit(status); }
static void *room(size_t bytes)
{
    void *found = NULL;
    if (posix_memalign(&found, 64, bytes ? bytes : 1)) exit(3);
    return memset(found, 0xff, bytes);
}
#endif
#ifdef THREADS
#include <pthread.h>
#endif

@DATA@

static const void *weights;

static void show(const void *data, size_t bytes)
{
    const unsigned char *byte = data;
    char line[66];
    for (size_t i = 0; i < bytes;) {
        size_t n = 0;
        for (; n < 64 && i < bytes; i++) {
            line[n++] = "0123456789abcdef"[byte[i] >> 4];
            line[n++] = "0123456789abcdef"[byte[i] & 15];
        }
        line[n] = '\n';
        line[n + 1] = 0;
        put(line);
    }
}

static model_call made(void)
{
    model_call call;
    memset(&call, 0, sizeof call);
    call.arena = room(model_arena_bytes());
    call.weights = weights;
@CALL@
    return call;
}

#ifdef THREADS
static void *again(void *call)
{
    for (int i = 0; i < 20; i++)
        if (model_run(call)) return call;
    return NULL;
}
#endif

int main(int argc, char **argv)
{
    (void)argc;
    (void)argv;
@WEIGHTS@
    model_call calls[2];
    calls[0] = made();
#ifdef THREADS
    calls[1] = made();
    pthread_t thread[2];
    for (int i = 0; i < 2; i++)
        if (pthread_create(&thread[i], NULL, again, &calls[i])) leave(4);
    for (int i = 0; i < 2; i++) {
        void *failed;
        if (pthread_join(thread[i], &failed) || failed) leave(5);
    }
#endif
    for (int i = 0; i < 2; i++) {
#ifdef THREADS
        const model_call *call = &calls[i];
#else
        const model_call *call = &calls[0];
        if (model_run(call)) leave(5);
#endif
@SHOW@
        put("=\n");
    }
    leave(0);
    return 0;
}
"""

READ = """\
    if (argc != 2) leave(2);
    FILE *file = fopen(argv[1], "rb");
    unsigned char *bytes = room(@BYTES@);
    if (!file || fread(bytes, 1, @BYTES@, file) != @BYTES@) leave(2);
    fclose(file);
    weights = bytes;"""

BARE_START = r"""
#include <stddef.h>
#include <stdint.h>

extern uint32_t stack_top;
int main(int argc, char **argv);
void put(const char *text);
void leave(int status);
void reset(void);

void *memset(void *to, int byte, size_t bytes);
void *memset(void *to, int byte, size_t bytes)
{
    for (unsigned char *at = to; bytes--;) *at++ = (unsigned char)byte;
    return to;
}

void *memcpy(void *restrict to, const void *restrict from, size_t bytes);
void *memcpy(void *restrict to, const void *restrict from, size_t bytes)
{
    const unsigned char *read = from;
    for (unsigned char *at = to; bytes--;) *at++ = *read++;
    return to;
}

static int debugger(int what, const void *with)
{
    register int r0 __asm__("r0") = what;
    register const void *r1 __asm__("r1") = with;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

void put(const char *text) { debugger(4, text); }

void leave(int status)
{
    debugger(0x18, (const void *)(status ? 0x20023 : 0x20026));
    for (;;) { }
}

void reset(void)
{
    *(volatile uint32_t *)0xE000ED88 |= 0xF << 20; /* the FPU is off after a reset */
    __asm__ volatile("dsb\nisb" ::: "memory");
    leave(main(0, 0));
}

__attribute__((section(".vectors"), used)) static const void *const vectors[] = {&stack_top, (const void *)reset,
    (const void *)leave, (const void *)leave, (const void *)leave, (const void *)leave, (const void *)leave};
"""

BARE_LINK = """
MEMORY
{
    FLASH (rx) : ORIGIN = 0x0, LENGTH = 4M
    RAM (rwx) : ORIGIN = 0x20000000, LENGTH = 4M
}
SECTIONS
{
    .text : { KEEP(*(.vectors)) *(.text*) *(.rodata*) } > FLASH
    .ARM.exidx : { *(.ARM.exidx*) } > FLASH
    .data : { *(.data*) } > RAM
    .bss : { *(.bss*) *(COMMON) } > RAM
    stack_top = ORIGIN(RAM) + LENGTH(RAM);
}
"""


def _words(name: str, data: bytes) -> str:
    words = np.frombuffer(data + bytes(-len(data) % 8 or (0 if data else 8)), "<u8")
    lines = (", ".join(f"{word}u" for word in words[i : i + 5]) for i in range(0, len(words), 5))
    return (f"static const uint64_t {name}[{len(words)}] __attribute__((aligned(64))) = {{\n    "
            + ",\n    ".join(lines) + "};")  # fmt: skip


def sizes_of(facts: dict[str, Any], feed: dict[str, np.ndarray]) -> dict[str, int]:
    """The free sizes that these inputs have."""
    sizes = dict(facts["sizes"])
    for entry in facts["inputs"]:
        for said, size in zip(entry["shape"], feed[entry["name"]].shape, strict=True):
            if said in sizes:
                sizes[said] = size
    return sizes


def program(facts: dict[str, Any], feed: dict[str, np.ndarray], inside: Path | None = None) -> str:
    """The program's text for a manifest and inputs by name.

    inside: the compiled folder, where the weights are to stand in the program; else it reads the file that its
    argument names.
    """
    data, call, show = [], [], []
    sizes = sizes_of(facts, feed)
    for entry in facts["inputs"]:
        array = np.ascontiguousarray(feed[entry["name"]], entry["dtype"])
        data.append(_words(f"in_{entry['member']}", array.tobytes()))
        size = array.nbytes
        call.append(f"    call.{entry['member']} = memcpy(room({size}), in_{entry['member']}, {size});")
    for entry in facts["outputs"]:
        size = int(np.prod(shape_of(entry, sizes))) * np.dtype(entry["dtype"]).itemsize
        call.append(f"    call.{entry['member']} = room({size});")
        show.append(f'        show(call->{entry["member"]}, {size});\n        put("-\\n");')
    call += [f"    call.{name} = {size};" for name, size in sizes.items()]
    weights = ""
    if inside is not None:
        data.append(_words("kept", (inside / "model.weights").read_bytes()))
        weights = "    weights = kept;"
    elif facts["weight_bytes"]:
        weights = READ.replace("@BYTES@", str(facts["weight_bytes"]))
    text = PROGRAM.replace("@DATA@", "\n".join(data)).replace("@CALL@", "\n".join(call))
    return text.replace("@WEIGHTS@", weights).replace("@SHOW@", "\n".join(show)).lstrip("\n")


def shape_of(entry: dict[str, Any], sizes: dict[str, int]) -> tuple[int, ...]:
    """A shape of the manifest with its free sizes filled in."""
    from lilliput.engine.run import evaluate

    return tuple(size if isinstance(size, int) else evaluate(size, sizes) for size in entry["shape"])


def outputs_of(text: str, facts: dict[str, Any], sizes: dict[str, int] | None = None) -> list[np.ndarray]:
    """The outputs that a program printed; ValueError where its two results differ."""
    first, second, _ = text.split("=\n")
    if first != second:
        raise ValueError("the second run gives other bytes than the first")
    outputs = []
    for part, entry in zip(first.split("-\n"), facts["outputs"], strict=False):
        raw = bytes.fromhex(part.replace("\n", ""))
        outputs.append(np.frombuffer(raw, entry["dtype"]).reshape(shape_of(entry, sizes or facts["sizes"])))
    return outputs
