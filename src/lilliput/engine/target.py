"""What is compiled for: the width of a vector, the compiler's flags, and how a compiler is found."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from dataclasses import dataclass, replace
from functools import cache

NAMES = ("native", "portable", "cortex-m", "wasm")
WARNINGS = ("-Wall", "-Wextra")
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=fast")


@dataclass(frozen=True)
class Target:
    """A machine to compile for.

    vector_bytes: of the widest vector that generated code uses; 0 is scalar C99. flags: the compiler's, without the files.
    """

    name: str = "native"
    vector_bytes: int = 32
    flags: tuple[str, ...] = FLAGS
    cc: tuple[str, ...] = ("cc",)
    features: frozenset[str] = frozenset()

    @property
    def lanes(self) -> int:
        """float32 values in a vector; 1 in scalar C."""
        return max(self.vector_bytes // 4, 1)


def target(name: str = "native", cc: str | None = None) -> Target:
    """The target of a name, with the compiler that makes it.

    Raises ValueError for an unknown name, and OSError where there is no compiler.
    """
    if name not in NAMES:
        raise ValueError(f"compile: the target must be one of {', '.join(NAMES)}, got {name!r}.")
    compiler = _compiler(cc)
    if name in ("portable", "cortex-m"):
        return Target(name, 0, ("-std=c99", *FLAGS), compiler)
    if name == "wasm":
        return Target(name, 16, ("-std=gnu99", *FLAGS, "-msimd128"), compiler, frozenset({"simd128"}))
    features = _features(compiler)
    width = 64 if "AVX512F" in features else 32 if "AVX2" in features else 16
    return Target(name, width, ("-std=gnu99", *FLAGS, *_native(compiler)), compiler, features)


def widths(found: Target) -> list[Target]:
    """The target with each vector width that is worth measuring on it, its own first."""
    others = [32] if found.vector_bytes == 64 else []
    return [found, *(replace(found, vector_bytes=width) for width in others)]


def _compiler(cc: str | None) -> tuple[str, ...]:
    asked = cc or os.environ.get("CC")
    if asked:
        words = tuple(shlex.split(asked))
        if not words or not shutil.which(words[0]):
            raise OSError(f"compile: the compiler must be a command that can be run, got {asked!r}.")
        return words
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return (name,)
    raise OSError('compile: a C compiler must be found, got none of cc, gcc and clang. Install one, or `pip install '
                  'ziglang` and pass --cc "python -m ziglang cc".')


@cache
def _native(compiler: tuple[str, ...]) -> tuple[str, ...]:
    for flags in (("-march=native",), ("-mcpu=native",)):
        if subprocess.run([*compiler, *flags, "-E", "-x", "c", os.devnull], capture_output=True).returncode == 0:
            return flags
    return ()


@cache
def _features(compiler: tuple[str, ...]) -> frozenset[str]:
    """The instruction sets that the compiler uses on this machine, by their macros without underscores."""
    asked = subprocess.run([*compiler, *_native(compiler), "-dM", "-E", "-x", "c", os.devnull], capture_output=True,
                           text=True)
    names = {line.split()[1].strip("_") for line in asked.stdout.splitlines() if line.startswith("#define __")}
    return frozenset(names | {platform.machine()})
