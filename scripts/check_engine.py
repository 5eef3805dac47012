"""The engine's slow check: other processors, sanitizers, threads, damaged files, DeepSparse.

    make check-engine [ARGS="cross sanitize threads fuzz deepsparse --seconds 60 --seed 1 --quick --all"]

cross      networks compiled for aarch64, riscv64 (with and without its vectors), Cortex-M and WebAssembly by the
           package ziglang, run under qemu and wasmtime, compared with ONNX Runtime
sanitize   the same and the large ones, and each tenth node test (--all: every one, half an hour), under
           AddressSanitizer and UBSan
threads    two threads with two arenas: the same bytes as one, clean under ThreadSanitizer
fuzz       damaged ONNX files through the reader, the planner and the writer, by atheris
deepsparse the rival's outputs and its time beside the engine's, in one interleaved run

What cannot be checked here is named at the end, with what it needs; on Debian that is
apt-get install qemu-user qemu-system-arm, the rest comes with `pip install lilliput[check]`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "scripts")]

import networks  # noqa: E402
from engine_program import BARE_LINK, BARE_START, outputs_of, program  # noqa: E402

from lilliput.engine.build import run as run_compiler  # noqa: E402
from lilliput.engine.compile import write  # noqa: E402
from lilliput.engine.target import Target, target, widths  # noqa: E402

SMALL = ("resnet20-90", "resnet20-dense", "gru-90", "transformer-80")
QUICK = ("resnet20-90", "gru-90", "transformer-80")
LARGE = ("effnet-90", "minilm-90", "resnet20-90-int8")
TOLERANCE = 1e-4  # of the largest value of an output
SANITIZED = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
ZIG = (sys.executable, "-m", "ziglang", "cc")


class Skipped(Exception):
    """What could not be checked, and what it needs."""


@dataclass(frozen=True)
class Platform:
    """A processor to compile for and how its programs are run here: `command` before the program's path."""

    name: str
    to: str
    cc: tuple[str, ...]
    command: tuple[str, ...] = ()
    link: tuple[str, ...] = ("-lm", "-s")
    bare: bool = False


RISCV_V = "generic_rv64+v+m+a+f+d+c"
PLATFORMS = (
    Platform("aarch64", "native", (*ZIG, "-target", "aarch64-linux-musl"), ("qemu-aarch64",)),
    Platform("riscv64", "native", (*ZIG, "-target", "riscv64-linux-musl"), ("qemu-riscv64",)),
    Platform("riscv64 with vectors", "native", (*ZIG, "-target", "riscv64-linux-musl", f"-mcpu={RISCV_V}"),
             ("qemu-riscv64", "-cpu", "rv64,v=true,vlen=128,vext_spec=v1.0")),
    Platform("cortex-m4", "cortex-m", (*ZIG, "-target", "thumb-linux-musleabihf", "-mcpu=cortex_m4+vfp4d16sp"),
             ("qemu-system-arm", "-M", "mps2-an386", "-display", "none", "-monitor", "none", "-serial",
              "none", "-chardev", "stdio,id=out", "-semihosting-config", "chardev=out", "-kernel"), bare=True),
    Platform("cortex-m7", "cortex-m", (*ZIG, "-target", "thumb-linux-musleabihf", "-mcpu=cortex_m7+fp_armv8d16sp"),
             ("qemu-system-arm", "-M", "mps2-an500", "-display", "none", "-monitor", "none", "-serial",
              "none", "-chardev", "stdio,id=out", "-semihosting-config", "chardev=out", "-kernel"), bare=True),
    Platform("wasm32", "wasm", ZIG, (sys.executable, str(ROOT / "scripts" / "run_wasm.py"))),
)  # fmt: skip


def has(module: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(module) is not None


def expected(path: Path) -> list[np.ndarray]:
    """What ONNX Runtime computes."""
    from lilliput.export.onnx import Session

    return [np.asarray(x) for x in Session(path).run(networks.feed_of(path))]


def differs(got: list[np.ndarray], wanted: list[np.ndarray], quantum: float = 0.0) -> str:
    """How outputs differ from what is wanted; nothing where they do not."""
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {i} is {a.dtype} {a.shape}, not {b.dtype} {b.shape}"
        gap, most = float(np.abs(a - b).max()), float(np.abs(b).max())
        if not gap <= max(TOLERANCE * most, quantum):
            return f"output {i} differs by {gap:.2e} of {most:.2e}"
    return ""


# ------------------------------------------------------------------------------------------------------------- cross


def built(
    model: Path,
    folder: Path,
    machine: Target,
    more: tuple[str, ...] = (),
    link: tuple[str, ...] = ("-lm",),
    bare: bool = False,
) -> tuple[Path, dict]:
    """A program that runs a model on the inputs beside it, made by the compiler of `machine`; the manifest."""
    write(model, folder, replace(machine, library=""), tune=False)
    facts = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    inside = bare or machine.name == "wasm"
    text = program(facts, networks.feed_of(model), folder if inside and facts["weight_bytes"] else None)
    (folder / "program.c").write_text(text, encoding="utf-8")
    out = folder / ("program.wasm" if machine.name == "wasm" else "program")
    compiler = [*machine.cc, *machine.flags, "-Wall", "-Wextra", *more]
    if bare:
        (folder / "start.c").write_text(BARE_START, encoding="utf-8")
        (folder / "bare.ld").write_text(BARE_LINK, encoding="utf-8")
        warned, objects = "", []
        for name in ("program", "model", "start"):
            objects.append(str(folder / f"{name}.o"))
            own = ["-DBARE", *(["-fno-builtin"] if name == "start" else []), "-g0", "-c", str(folder / f"{name}.c")]
            warned += run_compiler([*compiler, *own, "-o", objects[-1]])
        # The headers are those of a system, the program has none.
        linker = [word.replace("-linux-musl", "-freestanding-") for word in machine.cc]
        warned += run_compiler(
            [*linker, "-nostdlib", f"-Wl,-T,{folder / 'bare.ld'}", "-Wl,-e,reset", *objects, "-o", str(out)]
        )
    else:
        sources = [str(folder / "program.c"), str(folder / "model.c")]
        warned = run_compiler([*compiler, *sources, "-o", str(out), *link])
    if "warning:" in warned:
        raise ValueError("the compiler warns: " + next(line for line in warned.splitlines() if "warning:" in line))
    return out, facts


def run(
    command: list[str], facts: dict, folder: Path, timeout_s: float = 120, environment: dict[str, str] | None = None
) -> list[np.ndarray]:
    """What a program of `built` computes; ValueError where it fails or its second run differs."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout_s,
                          stdin=subprocess.DEVNULL, env={**os.environ, **(environment or {})})  # fmt: skip
    if done.returncode:
        raise ValueError(f"it ended with {done.returncode}: {(done.stderr + done.stdout[-300:]).strip()[:1500]}")
    return outputs_of(done.stdout, facts)


def cross(files: list[Path], work: Path) -> Iterator[str]:
    """Every file on every platform."""
    if not has("ziglang"):
        raise Skipped("cross: pip install ziglang")
    missing = {p.command[0]: p.name for p in PLATFORMS if not shutil.which(p.command[0])}
    for command, name in missing.items():
        package = "qemu-system-arm" if "system" in command else "qemu-user"
        yield f"? cross, running {name}: apt-get install {package}"
    if not has("wasmtime"):
        yield "? cross, running wasm32: pip install wasmtime"
    wanted = {path: expected(path) for path in files}

    def one(platform: Platform) -> list[str]:
        lines = []
        machine = target(platform.to, " ".join(platform.cc))
        for path in files:
            start, folder = time.monotonic(), work / platform.name.replace(" ", "-") / path.stem
            label = f"cross {platform.name} {path.stem}"
            try:
                out, facts = built(path, folder, machine, link=platform.link, bare=platform.bare)
                runs = shutil.which(platform.command[0]) and (platform.to != "wasm" or has("wasmtime"))
                if not runs:
                    lines.append(f"  {label}: compiled, not run")
                    continue
                weights = ["model.weights"] if facts["weight_bytes"] and not platform.bare else []
                wrong = differs(run([*platform.command, str(out), *weights], facts, folder), wanted[path])
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            lines.append(f"! {label}: {wrong}" if wrong else f"  {label}: ok, {time.monotonic() - start:.0f} s")
            print(lines[-1][:120], file=sys.stderr, flush=True)
        return lines

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for lines in pool.map(one, PLATFORMS):
            yield from lines


# ---------------------------------------------------------------------------------------------- sanitizers and threads


def variants() -> list[tuple[str, Target]]:
    """The targets of this machine's own compiler: every vector width, and scalar C99."""
    native = target("native")
    known = [(f"{8 * t.vector_bytes} bits", t) for t in widths(native)]
    narrow = replace(native, vector_bytes=16)
    return [*known, *([("128 bits", narrow)] if native.vector_bytes > 16 else []), ("portable", target("portable"))]


def sanitize(files: list[Path], work: Path, quick: bool = False, all: bool = False) -> Iterator[str]:
    """Every file in every variant under AddressSanitizer and UBSan; the arena is filled with NaN before."""
    for path in files:
        quantum = 0.05 if path.stem.endswith("int8") else 0.0
        wanted = expected(path)
        for name, found in variants() if path.stat().st_size < 10_000_000 and not quick else variants()[:1]:
            start, folder = time.monotonic(), work / "sanitize" / f"{path.stem}-{name.replace(' ', '-')}"
            label = f"sanitize {name} {path.stem}"
            try:
                # Layers with hundreds of thousands of statements take a sanitizer's optimizer ten minutes.
                level = ("-O0",) if path.stem in LARGE else ()
                out, facts = built(path, folder, found, (*SANITIZED, *level))
                weights = ["model.weights"] if facts["weight_bytes"] else []
                wrong = differs(run([str(out), *weights], facts, folder), wanted, quantum)
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"
            yield f"! {label}: {wrong}" if wrong else f"  {label}: ok, {time.monotonic() - start:.0f} s"
    yield from sanitized_nodes(all)


def sanitized_nodes(all: bool) -> Iterator[str]:
    """Node tests of onnx with libraries that check themselves: the sanitizer's runtime is loaded first."""
    script = ROOT / "evidence" / "engine-conformance.py"
    if not script.exists():
        raise Skipped("sanitize, node tests: evidence/engine-conformance.py is not there")
    cc = target("native").cc
    asan = subprocess.run([*cc, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(asan).is_absolute():
        raise Skipped(f"sanitize, node tests: {cc[0]} has no libasan.so")
    environment = {
        **os.environ,
        "LD_PRELOAD": asan,
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
        "CC": " ".join([*cc, *SANITIZED]),
    }
    start = time.monotonic()
    command = [sys.executable, "-m", "lilliput.cli", "evidence", "engine-conformance", *([] if all else ["--quick"])]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*command, "--out", folder], cwd=ROOT, env=environment, capture_output=True, text=True)
    said = f"{done.stdout}\n{done.stderr}"
    if done.returncode or "AddressSanitizer" in said or "runtime error:" in said:
        yield f"! sanitize, node tests: status {done.returncode}: {said.strip()[-1500:]}"
    else:
        yield f"  sanitize, node tests: ok, {time.monotonic() - start:.0f} s"
    if not all:
        yield "? sanitize, nine node tests of ten: --all"


def threads(files: list[Path], work: Path) -> Iterator[str]:
    """Two threads with two arenas under ThreadSanitizer: each prints what one alone prints."""
    machine = target("native")
    for path in files:
        folder = work / "threads" / path.stem
        try:
            more = ("-O1", "-g", "-fsanitize=thread", "-DTHREADS", "-pthread")
            out, facts = built(path, folder, machine, more)
            weights = ["model.weights"] if facts["weight_bytes"] else []
            run([str(out), *weights], facts, folder)
            wrong = ""
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        yield f"! threads {path.stem}: {wrong}" if wrong else f"  threads {path.stem}: ok"


# -------------------------------------------------------------------------------------------------------------- fuzz


def fuzz(work: Path, seconds: int, seed: int) -> Iterator[str]:
    """Damaged files for so long; what crashes, hangs or grows is kept. The same seed tries much the same files, so that
    a change is not blamed for what another seed would have found before it; 0 draws one."""
    if not has("atheris"):
        raise Skipped("fuzz: pip install atheris (wheels for Linux on x86-64)")
    folder = work / "fuzz"
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        str(ROOT / "scripts" / "fuzz_engine.py"),
        f"-max_total_time={seconds}",
        f"-seed={seed}",
        "-timeout=20",
        "-rss_limit_mb=3000",
        "-max_len=4096",
        "-print_final_stats=1",
        f"-artifact_prefix={folder}/",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 300, cwd=folder)
    runs = [line.split()[-1] for line in done.stderr.splitlines() if "number_of_executed_units" in line]
    if done.returncode:
        kept = ROOT / "build" / "fuzz"
        kept.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            shutil.copy(path, kept)
        said = done.stderr[max(0, done.stderr.find("=== Uncaught Python exception")) :].strip()
        yield f"! fuzz: a file in build/fuzz breaks it: {said[:2000]}\n{said[-500:]}"
    else:
        yield f"  fuzz: ok, {runs[0] if runs else 'no'} files in {seconds} s"


# -------------------------------------------------------------------------------------------------------- DeepSparse


def deepsparse(files: list[Path], work: Path, python: str | None) -> Iterator[str]:
    """The same outputs as DeepSparse, and the ratio of the times; a ratio is no failure, since machines differ."""
    from deepsparse_worker import Worker

    from lilliput.engine.compile import compile

    python = python or deepsparse_environment()
    worker = Worker(python)
    try:
        for path in files:
            try:
                own = worker.load(path)
            except RuntimeError as error:
                yield f"? deepsparse {path.stem}: {error}"
                continue
            engine = compile(path, work / "deepsparse" / path.stem)
            feed = networks.feed_of(path)
            wrong = differs([engine(**feed).ravel()], [np.array(worker.output(), np.float32)])
            times: list[list[float]] = [[], []]
            for _ in range(30):
                for _ in range(20):
                    start = time.perf_counter()
                    engine(**feed)
                    times[0].append(time.perf_counter() - start)
                times[1] += worker.run(20)
            mine, theirs = (float(np.median(t)) * 1e3 for t in times)
            yield f"! deepsparse {path.stem}: {wrong}" if wrong else (
                f"  deepsparse {path.stem}: {theirs:.3f} ms (own kernels: {own:.0%}), engine {mine:.3f} ms: "
                f"{theirs / mine:.2f} times")  # fmt: skip
    finally:
        worker.close()


def deepsparse_environment() -> str:
    """The Python of build/deepsparse, made where it is not there."""
    folder = ROOT / "build" / "deepsparse"
    python = folder / "bin" / "python"
    if (folder / "whole").exists():
        return str(python)
    base = sys.executable if sys.version_info[:2] == (3, 11) else shutil.which("python3.11")
    if not base:
        raise Skipped("deepsparse: it needs Python 3.11")
    wanted = ["deepsparse==1.8.0", "sparsezoo==1.8.1", "onnx==1.14.1", "numpy<2"]
    for command in ([base, "-m", "venv", str(folder)], [str(python), "-m", "pip", "install", "--quiet", *wanted]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Skipped(f"deepsparse: {' '.join(command)} fails: {done.stderr.strip()[-200:]}")
    (folder / "whole").touch()
    return str(python)


# -------------------------------------------------------------------------------------------------------------- main


def main() -> int:
    """Run the checks that were asked for; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("cross", "sanitize", "threads", "fuzz", "deepsparse")
    parser.add_argument("checks", nargs="*", default=names, metavar="CHECK")
    parser.add_argument("--seconds", type=int, default=60, help="of fuzzing")
    parser.add_argument("--seed", type=int, default=1, help="of fuzzing; 0 draws one")
    parser.add_argument("--quick", action="store_true", help="small networks and few variants")
    parser.add_argument("--all", action="store_true", help="every node test under the sanitizers")
    parser.add_argument("--networks", type=Path, default=ROOT / "build" / "networks", help="where ONNX files are kept")
    parser.add_argument("--deepsparse", help="a Python with DeepSparse; build/deepsparse is made where left out")
    given = parser.parse_args()
    if unknown := set(given.checks) - set(names):
        parser.error(f"there are {', '.join(names)}, got {', '.join(sorted(unknown))}")
    skipped, wrong = [], []
    files = [networks.make(name, given.networks) for name in (QUICK if given.quick else SMALL)]
    large = []
    for name in () if given.quick else LARGE:
        try:
            large.append(networks.make(name, given.networks))
        except ImportError as error:
            skipped.append(f"sanitize {name}: {error}")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        checks: dict[str, Callable[[], Iterator[str]]] = {
            "cross": lambda: cross(files, work),
            "sanitize": lambda: sanitize([*files, *large], work, given.quick, given.all),
            "threads": lambda: threads(files, work),
            "fuzz": lambda: fuzz(work, given.seconds, given.seed),
            "deepsparse": lambda: deepsparse(files[:1], work, given.deepsparse),
        }
        for name in names:
            if name not in given.checks:
                continue
            try:
                for line in checks[name]():
                    print(line, flush=True)
                    (wrong if line.startswith("!") else skipped if line.startswith("?") else []).append(line[2:])
            except Skipped as error:
                skipped.append(str(error))
    print(f"\n{len(wrong)} wrong" + "".join(f"\n  {line}" for line in wrong))
    print("skipped: " + ("".join(f"\n  {line}" for line in skipped) or "nothing"))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
