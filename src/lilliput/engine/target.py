"""Compilation targets: vector width, compiler flags, and how a compiler is found."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

NAMES = ("native", "portable", "cortex-m", "wasm")
WARNINGS = ("-Wall", "-Wextra")
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=fast")
SHARED = ("-shared", "-fPIC", "-fvisibility=hidden", "-lm")
SMALL = ("-Wl,--build-id=none", "-Wl,-z,noseparate-code", "-s")  # what a linker may take to make a library smaller
EXPORTS = ("model_run", "model_arena_bytes", "malloc", "free")  # of a WebAssembly module: what its caller needs
HOSTS = {"x86_64": "x86_64", "AMD64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64", "riscv64": "riscv"}
CORTEX_M4 = {  # with its FPU, which clang leaves out unless it is asked for
    "zig": ("-target", "thumb-linux-musleabihf", "-mcpu=cortex_m4+vfp4d16sp"),
    "": ("-mthumb", "-mcpu=cortex-m4", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard"),
}
WASM = ("-target", "wasm32-wasi")

Command = tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """A machine to compile for.

    Args:
        vector_bytes: Of the widest vector that generated code uses; 0 is scalar C99.
        flags: The compiler's, without the files.
        cc: The compiler.
        features: What it may use, by its macros without underscores.
        library: The file that is made from the C and goes with it; "" for the C alone.
        link: The flags that make it.
        here: Whether this machine can load that file.
    """

    name: str = "native"
    vector_bytes: int = 32
    flags: Command = FLAGS
    cc: Command = ("cc",)
    features: frozenset[str] = frozenset()
    library: str = "libmodel.so"
    link: Command = SHARED
    here: bool = True

    @property
    def lanes(self) -> int:
        """float32 values in a vector; 1 in scalar C."""
        return max(self.vector_bytes // 4, 1)


def target(name: str = "native", cc: str | None = None) -> Target:
    """The target of a name, with the compiler that makes it.

    "native" is the machine that the compiler makes code for: this one, unless `cc` is a cross-compiler, which makes an
    object file. "portable" is scalar C99 for the same. "cortex-m" is scalar C99 and an object file for a Cortex-M4 with
    its FPU (`cc` may name another), "wasm" a WebAssembly module for WASI with 128-bit vectors; where no compiler for
    these two is found, the C is made alone.

    Raises:
        ValueError: For an unknown name.
        OSError: Where there is no compiler for a library that must be made.
    """
    if name not in NAMES:
        raise ValueError(f"compile: the target must be one of {', '.join(NAMES)}, got {name!r}.")
    if name == "cortex-m":
        flags: Command = ("-std=c99", *FLAGS)
        command = _given(cc) or _first("arm-none-eabi-gcc") or _ziglang()
        if not command:
            return Target(name, 0, flags, ("cc",), library="", here=False)
        kind = "zig" if _is_zig(command) else ""
        flags += CORTEX_M4[kind] if not any(word.startswith("-mcpu") for word in command) else ()
        return Target(name, 0, flags, command, _features(command, flags), "model.o", ("-c",), here=False)
    if name == "wasm":
        flags = ("-std=gnu99", *FLAGS, "-msimd128")
        command = _given(cc) or _ziglang()
        if not command:
            return Target(name, 16, flags, ("cc",), frozenset({"wasm_simd128"}), "", here=False)
        flags += WASM if _is_zig(command) and not {"-target", "--target"} & set(command) else ()
        link = ("-mexec-model=reactor", *(f"-Wl,--export={name}" for name in EXPORTS), "-s", "-lm")
        return Target(name, 16, flags, command, _features(command, flags), "model.wasm", link, here=False)
    command = _given(cc) or _first("cc", "gcc", "clang") or _ziglang()
    if not command:
        raise OSError("compile: a C compiler must be found, got none of cc, gcc and clang. Install one, or `pip "
                      'install ziglang` and pass --cc "python -m ziglang cc".')  # fmt: skip
    flags = ("-std=c99", *FLAGS) if name == "portable" else ("-std=gnu99", *FLAGS, *_native(command))
    features = _features(command, flags)
    width = 0 if name == "portable" else vector_bytes(features)
    here = HOSTS.get(platform.machine(), platform.machine()) in features | {""} and (
        ("linux" in features) == (sys.platform == "linux")
    )
    if not here:
        return Target(name, width, flags, command, features, "model.o", ("-c",), here=False)
    return Target(name, width, flags, command, features, link=(*SHARED, *_small(command)))


def vector_bytes(features: frozenset[str]) -> int:
    """The widest vector that a machine with these features computes with; 0 where it has none."""
    if "AVX512F" in features:
        return 64
    if "AVX2" in features:
        return 32
    return 16 if features & {"SSE2", "ARM_NEON", "riscv_v", "wasm_simd128", "VSX"} else 0


def widths(own: Target) -> list[Target]:
    """The target with each vector width that is worth measuring on it, its own first."""
    others = [32] if own.vector_bytes == 64 else []
    return [own, *(replace(own, vector_bytes=width) for width in others)]


# ---------------------------------------------------------------------------------------------------------- compilers


def _given(cc: str | None) -> Command:
    """The compiler that was asked for: an argument, else the environment variable CC."""
    asked = cc or os.environ.get("CC")
    if not asked:
        return ()
    words = tuple(shlex.split(asked))
    if not words or not shutil.which(words[0]):
        raise OSError(f"compile: the compiler must be a command that can be run, got {asked!r}. Install it, or `pip "
                      'install ziglang` and pass --cc "python -m ziglang cc".')  # fmt: skip
    return words


def _first(*names: str) -> Command:
    return next(((name,) for name in names if shutil.which(name)), ())


def _ziglang() -> Command:
    """The compiler of the package ziglang where this Python has it, which compiles for every target."""
    return (sys.executable, "-m", "ziglang", "cc") if find_spec("ziglang") else ()


def _is_zig(cc: Command) -> bool:
    return any(Path(word).stem in ("zig", "ziglang") for word in cc)


def _asked(command: Command) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)


@cache
def _native(cc: Command) -> Command:
    """The flags for all that this machine can do; none for a cross-compiler, whose command says what it is for."""
    if any(word.startswith(("-mcpu", "-march")) for word in cc):
        return ()
    for flags in (("-march=native",), ("-mcpu=native",)):
        if _asked((*cc, *flags, "-E", "-x", "c", os.devnull)).returncode == 0:
            return flags
    return ()


@cache
def _features(cc: Command, flags: Command) -> frozenset[str]:
    """What the compiler may use with these flags, by its macros without underscores.

    Raises:
        OSError: Where it refuses the flags.
    """
    asked = _asked((*cc, *flags, "-dM", "-E", "-x", "c", os.devnull))
    if asked.returncode:
        raise OSError(f"compile: {shlex.join(cc)} must be a C compiler that takes {shlex.join(flags)}, and says: "
                      f"{asked.stderr.strip()[:300]}")  # fmt: skip
    lines = (line.split() for line in asked.stdout.splitlines())
    return frozenset(words[1].strip("_") for words in lines if len(words) > 1)


@cache
def _small(cc: Command) -> Command:
    """Those of SMALL that the linker takes."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.c")
        source.write_text("int nothing(void);\nint nothing(void) { return 0; }\n")

        def takes(*flags: str) -> bool:
            return _asked((*cc, str(source), "-o", str(source.with_suffix(".so")), *SHARED, *flags)).returncode == 0

        return SMALL if takes(*SMALL) else tuple(flag for flag in SMALL if takes(flag))
