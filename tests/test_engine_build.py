"""From C to what runs: targets, compilers, programs of their own under sanitizers, damaged files.

They need a C compiler; what needs another processor's is `make check-engine`.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lilliput
from lilliput.engine import target as targets
from lilliput.engine.compile import write
from lilliput.engine.target import SMALL, Target, target, vector_bytes, widths
from lilliput.export.onnx import Session

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from engine_program import outputs_of, program  # noqa: E402
from fuzz_engine import check, one, seeds  # noqa: E402

pytestmark = pytest.mark.slow  # programs of every width are compiled

DRAW = np.random.default_rng(0)


def sparse(*shape: int) -> Any:
    """Weights, seven tenths zero."""
    w = DRAW.standard_normal(shape).astype(np.float32) / np.sqrt(np.prod(shape[1:]))
    return np.where(DRAW.random(shape) < 0.7, 0, w).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Convolutions with zeros and a shortcut, a depthwise one, a mean, a product, a softmax; its inputs beside it."""
    n = helper.make_node
    nodes = [n("Conv", ["x", "w1", "b1"], ["a"], pads=[1, 1, 1, 1]), n("Relu", ["a"], ["b"]),
             n("Conv", ["b", "w2"], ["c"], pads=[1, 1, 1, 1]), n("Add", ["c", "b"], ["d"]), n("Relu", ["d"], ["e"]),
             n("Conv", ["e", "w3"], ["f"], pads=[1, 1, 1, 1], strides=[2, 2], group=8), n("Sigmoid", ["f"], ["g"]),
             n("GlobalAveragePool", ["g"], ["h"]), n("Flatten", ["h"], ["i"]), n("Gemm", ["i", "w4"], ["j"], transB=1),
             n("Softmax", ["j"], ["y"])]  # fmt: skip
    held = {
        "w1": sparse(8, 3, 3, 3),
        "b1": sparse(8),
        "w2": sparse(8, 8, 3, 3),
        "w3": sparse(8, 1, 3, 3),
        "w4": sparse(5, 8),
    }
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 13, 11])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(w, name) for name, w in held.items()],
    )
    path = tmp_path_factory.mktemp("model") / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    np.savez(path.with_suffix(".npz"), x=DRAW.standard_normal((1, 3, 13, 11)).astype(np.float32))
    return path


def feed_of(path: Path) -> dict[str, Any]:
    """The inputs beside a model."""
    with np.load(path.with_suffix(".npz")) as arrays:
        return dict(arrays)


def build(path: Path, folder: Path, machine: Target, *flags: str) -> tuple[Path, dict[str, Any]]:
    """A program that runs the model, made without a warning, and the manifest."""
    write(path, folder, replace(machine, library=""), tune=False)
    facts = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "program.c").write_text(program(facts, feed_of(path)), encoding="utf-8")
    command = [
        *machine.cc,
        *machine.flags,
        "-Wall",
        "-Wextra",
        "-Werror",
        *flags,
        "program.c",
        "model.c",
        "-lm",
        "-o",
        "program",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "program", facts


def run(made: tuple[Path, dict[str, Any]]) -> Any:
    """The first output of a program."""
    done = subprocess.run([str(made[0])], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return outputs_of(done.stdout, made[1])[0]


def links(*flags: str) -> bool:
    """Whether this machine's compiler has the libraries of these flags."""
    words = [*target("native").cc, *flags, "-x", "c", "-", "-o", os.devnull]
    return subprocess.run(words, input="int main(void) { return 0; }", capture_output=True, text=True).returncode == 0


# ----------------------------------------------------------------------------------------------------------- programs

NATIVE = target("native")
VARIANTS = {
    f"{8 * width} bits": replace(NATIVE, vector_bytes=width) for width in (64, 32, 16) if width <= NATIVE.vector_bytes
} | {"portable": target("portable")}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_program_agrees_in_every_width_and_stays_in_its_room(name: str, model: Path, tmp_path: Path) -> None:
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    flags = ("-O1", "-g", *sanitizers) if links(*sanitizers) else ()
    got, wanted = run(build(model, tmp_path / "made", VARIANTS[name], *flags)), Session(model).run(feed_of(model))[0]
    assert got.shape == wanted.shape and np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_portable_c_is_scalar_c99(model: Path, tmp_path: Path) -> None:
    machine = target("portable")
    write(model, tmp_path / "made", replace(machine, library=""), tune=False)
    text = (tmp_path / "made" / "model.c").read_text(encoding="utf-8")
    assert "vector_size" not in text
    command = [*machine.cc, "-std=c99", "-pedantic-errors", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "model.c"]
    done = subprocess.run(command, cwd=tmp_path / "made", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_two_threads_with_two_arenas_give_the_bytes_of_one(model: Path, tmp_path: Path) -> None:
    flags = ("-pthread", *(("-O1", "-g", "-fsanitize=thread") if links("-fsanitize=thread") else ()))
    alone = run(build(model, tmp_path / "alone", NATIVE))
    folder = tmp_path / "two"
    together = run(build(model, folder, NATIVE, *flags, "-DTHREADS"))  # it fails where the two differ
    assert np.allclose(alone, together, rtol=1e-5)


def test_a_small_model_for_a_microcontroller_names_no_system_call(model: Path, tmp_path: Path) -> None:
    machine = target("cortex-m")
    write(model, tmp_path, replace(machine, library=""))
    text = (tmp_path / "model.c").read_text(encoding="utf-8")
    heads = {line.split()[1] for line in text.split("#ifdef MODEL_PROFILE")[0].splitlines() if line.startswith("#inc")}
    assert heads <= {'"model.h"', "<math.h>", "<string.h>"}
    assert "malloc" not in text and "stdio" not in text


# ------------------------------------------------------------------------------------------------------------ targets


def test_an_unknown_target_is_named_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"must be one of native, portable, cortex-m, wasm, got 'gpu'"):
        target("gpu")


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(targets, "find_spec", lambda name: None)
    for name in ("native", "portable"):
        with pytest.raises(OSError, match=r'pip install ziglang` and pass --cc "python -m ziglang cc"'):
            target(name)
    for name, width in (("cortex-m", 0), ("wasm", 16)):  # of these the C can be had without a compiler
        machine = target(name)
        assert machine.library == "" and not machine.here and machine.vector_bytes == width


def test_a_compiler_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(OSError, match="got 'no-such-compiler -O2'"):
        target("native", "no-such-compiler -O2")
    with pytest.raises(OSError, match="must be a C compiler that takes"):
        target("native", shlex.quote(shutil.which("false") or "false"))


def test_the_package_ziglang_is_found_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(targets, "find_spec", lambda name: object())
    asked: list[tuple[str, ...]] = []

    def answer(command: tuple[str, ...]) -> Any:
        asked.append(tuple(command))
        return subprocess.CompletedProcess(command, 0, "#define __AVX2__ 1\n#define __x86_64__ 1\n", "")

    monkeypatch.setattr(targets, "_asked", answer)
    for cached in (targets._native, targets._features, targets._small):
        cached.cache_clear()
    try:
        zig = (sys.executable, "-m", "ziglang", "cc")
        assert target("native").cc == zig
        cortex, wasm = target("cortex-m"), target("wasm")
        assert "-mcpu=cortex_m4+vfp4d16sp" in cortex.flags and cortex.library == "model.o" and cortex.link == ("-c",)
        assert wasm.flags[-2:] == ("-target", "wasm32-wasi") and wasm.library == "model.wasm" and not wasm.here
        assert "-mcpu=cortex_m4+vfp4d16sp" not in target("cortex-m", shlex.join((*zig, "-mcpu=cortex_m7"))).flags
        assert all(command[:4] == zig for command in asked)
    finally:
        for cached in (targets._native, targets._features, targets._small):
            cached.cache_clear()


def test_vectors_are_as_wide_as_the_machine_computes() -> None:
    assert vector_bytes(frozenset({"AVX512F", "AVX2", "SSE2"})) == 64
    assert vector_bytes(frozenset({"AVX2", "SSE2"})) == 32
    assert all(vector_bytes(frozenset({name})) == 16 for name in ("SSE2", "ARM_NEON", "riscv_v", "wasm_simd128"))
    assert vector_bytes(frozenset({"thumb"})) == 0
    assert [t.vector_bytes for t in widths(Target(vector_bytes=64))] == [64, 32]
    assert [t.lanes for t in (Target(vector_bytes=0), Target(vector_bytes=16))] == [1, 4]


def test_a_linker_gets_only_flags_that_it_takes() -> None:
    assert set(target("native").link) - {"-shared", "-fPIC", "-fvisibility=hidden", "-lm"} <= set(SMALL)


def test_a_library_of_another_machine_is_an_object(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(targets.HOSTS, targets.platform.machine(), "a machine of another kind")
    machine = target("native")
    assert not machine.here and machine.library == "model.o"
    write(model, tmp_path / "made", machine)
    manifest = json.loads((tmp_path / "made" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["library"] == "model.o" and (tmp_path / "made" / "model.o").stat().st_size > 0


def test_a_named_compiler_is_used(model: Path, tmp_path: Path) -> None:
    cc = shlex.join([*NATIVE.cc, "-DMARK=1"])
    engine = lilliput.compile(model, tmp_path / "made", cc=cc, tune=False)
    assert engine.manifest["cc"][-1] == "-DMARK=1"
    feed = feed_of(model)
    assert np.allclose(engine(feed["x"]), Session(model).run(feed)[0], atol=1e-6)


# ------------------------------------------------------------------------------------------------------ damaged files


def test_sound_models_of_the_fuzzer_become_c() -> None:
    assert all(check(model.SerializeToString()) for model in seeds())


@pytest.mark.parametrize("seed", range(4))
def test_damaged_models_are_refused_or_become_c(seed: int) -> None:
    draw, models = np.random.default_rng(seed), seeds()
    for _ in range(150):
        one(draw.integers(0, 256, int(draw.integers(2, 40))).astype(np.uint8).tobytes(), models)


@pytest.mark.parametrize("data", ["4000", "0a", "", "08041208"])
def test_bytes_that_are_no_model_are_refused(data: str) -> None:
    with pytest.raises(ValueError, match="must be an ONNX model"):
        lilliput.compile(bytes.fromhex(data))


KEPT = [  # each broke the reader once
    "40ffe9c64ad49442c7269433126e7283013115c7", "93bb962fdc7c01bfe763f1cdce",
    "20e31df22a2e48d583dc09f2b8a65b5e6d96c328d7ffadb8d25659eb1eb6cd555aed3153b651",
    "09524828b0714fca894c6cdbefa5814fe7f2b755ad348b9df3dec0940638d9211808a0", "203b40542d7bf0bfadfbe8531e8030",
    "377262d240b3fc3514d3577b70fc3174bc5889506dc412e021a7f8c843e193c361ce9573bbb7",
    "2a95959595959a9595"]  # fmt: skip


@pytest.mark.parametrize("data", KEPT)
def test_what_broke_the_reader_once_does_not_again(data: str) -> None:
    one(bytes.fromhex(data))
