"""The engine as a user meets it: a folder with C, a library that agrees with ONNX Runtime, clear errors."""

import json
import re
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import lilliput
from lilliput.cli import app
from lilliput.engine.compile import compile as compile_model
from lilliput.engine.compile import write
from lilliput.engine.target import WARNINGS, target
from lilliput.errors import NotSupported
from lilliput.export.onnx import Session, trace
from lilliput.nets.mnist1d import CNN, MLP
from lilliput.nets.resnet import ResNet

pytestmark = pytest.mark.slow  # whole networks are compiled

DRAW = np.random.default_rng(0)


def network(batch: int | str = 1, name: str = "x", zeros: float = 0.0) -> onnx.ModelProto:
    """Convolution, activation, pooling, product: with names as given and some weights zero."""

    def weight(label: str, *shape: int) -> Any:
        w = DRAW.standard_normal(shape).astype(np.float32) / np.sqrt(np.prod(shape[1:]))
        return numpy_helper.from_array(np.where(DRAW.random(shape) < zeros, 0, w).astype(np.float32), label)

    nodes = [
        helper.make_node("Conv", [name, "w1", "b1"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c"], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["e"]),
        helper.make_node("Gemm", ["e", "w3", "b3"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 3, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 5])],
        [weight("w1", 8, 3, 3, 3), weight("b1", 8), weight("w2", 16, 8, 3, 3), weight("w3", 5, 16), weight("b3", 5)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def close(a: Any, b: Any) -> bool:
    """Whether every output is what the other runtime gives, within 1e-4 of the largest."""
    return bool(np.abs(a - b).max() <= 1e-4 * np.abs(b).max() + 1e-12)


def images(*shape: int) -> Any:
    """Random inputs."""
    return DRAW.standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled network."""
    return write(network(zeros=0.8), tmp_path_factory.mktemp("engine") / "net", target(), tune=False)


@pytest.mark.parametrize("tune", [False, True])
def test_it_computes_what_onnx_runtime_computes(tune: bool, tmp_path: Path) -> None:
    proto = network(zeros=0.7)
    engine = lilliput.compile(proto, tmp_path / "net", tune=tune)
    x = images(1, 3, 12, 12)
    assert close(engine(x), Session(proto).outputs(x))


@pytest.mark.parametrize("model, shape", [(MLP(), (1, 40)), (CNN(), (1, 40)), (ResNet(), (1, 1, 28, 28))])
def test_the_projects_networks_agree(model: Any, shape: tuple[int, ...]) -> None:
    x = images(*shape)
    proto = trace(model.eval(), torch.from_numpy(x)).proto
    engine = lilliput.compile(proto, tune=False)
    assert close(engine(x), Session(proto).outputs(x))


def test_a_free_batch_runs_any_smaller_one() -> None:
    proto = network("batch")
    engine = lilliput.compile(proto, tune=False, shapes={"x": (6, 3, 12, 12)})
    session = Session(proto)
    for batch in (6, 1, 4):
        x = images(batch, 3, 12, 12)
        assert engine(x).shape == (batch, 5) and close(engine(x), session.outputs(x))
    with pytest.raises(ValueError, match="from 1 to 6, got 7"):
        engine(images(7, 3, 12, 12))


def test_outputs_are_fresh_unless_an_array_is_given(folder: Path) -> None:
    engine, x = lilliput.Engine(folder), images(1, 3, 12, 12)
    first = engine(x)
    kept = first.copy()
    engine(images(1, 3, 12, 12))
    assert np.array_equal(first, kept)
    out = np.empty((1, 5), np.float32)
    assert engine(x, out=out) is out and np.array_equal(out, kept)
    with pytest.raises(ValueError, match=r"out must be a contiguous float32 array of shape \(1, 5\)"):
        engine(x, out=np.empty((5,), np.float32))


def test_inputs_go_in_by_name_or_in_order_in_the_right_type(folder: Path) -> None:
    engine, x = lilliput.Engine(folder), images(1, 3, 12, 12)
    assert np.array_equal(engine(x=x), engine(x)) and np.array_equal(engine({"x": x}), engine(x))
    assert np.array_equal(engine(x.astype(np.float64)), engine(x))
    assert np.array_equal(engine(np.asfortranarray(x)), engine(x))
    for given, message in ((images(1, 3, 12, 13), "must have shape"), (images(3, 12, 12), "must have 4 dimensions")):
        with pytest.raises(ValueError, match=message):
            engine(given)
    with pytest.raises(ValueError, match="inputs must be x"):
        engine(z=x)
    with pytest.raises(ValueError, match="every input must be given, x is missing"):
        engine()


def test_threads_run_at_once_and_give_the_same_bytes(folder: Path) -> None:
    engine, inputs = lilliput.Engine(folder), [images(1, 3, 12, 12) for _ in range(40)]
    alone = [engine(x) for x in inputs]
    found: dict[int, list[Any]] = {}

    def work(number: int) -> None:
        found[number] = [engine(x) for x in inputs]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(a, b) for i in range(4) for a, b in zip(found[i], alone, strict=True))


def test_the_c_is_clean_stable_and_keeps_nothing(folder: Path, tmp_path: Path) -> None:
    compiler = target()
    command = [
        *compiler.cc,
        *compiler.flags,
        *WARNINGS,
        "-Werror",
        "-c",
        str(folder / "model.c"),
        "-o",
        str(tmp_path / "model.o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    symbols = subprocess.run(["nm", str(tmp_path / "model.o")], capture_output=True, text=True).stdout
    kinds = {line.split()[-2] for line in symbols.splitlines() if line.split()}
    assert not kinds & set("BbDdCcSsGg"), "no globals that can change"
    assert not re.search(r"malloc|calloc|free|alloca", symbols)


def test_the_same_file_gives_the_same_text(tmp_path: Path) -> None:
    proto = network(zeros=0.5)
    texts = [(write(proto, tmp_path / str(i), target(), tune=False) / "model.c").read_text() for i in range(2)]
    assert texts[0] == texts[1]


def test_the_example_runs(folder: Path, tmp_path: Path) -> None:
    text = (folder / "example.c").read_text()
    assert len(text.splitlines()) <= 30
    command = text.splitlines()[0].removeprefix("/* ").removesuffix(" */").split()
    command[-1] = str(tmp_path / "example")
    assert subprocess.run(command, cwd=folder).returncode == 0
    printed = subprocess.run([str(tmp_path / "example")], cwd=folder, capture_output=True, text=True).stdout
    expected = lilliput.Engine(folder)(np.zeros((1, 3, 12, 12), np.float32))[0]
    assert np.allclose([float(line.split("=")[1]) for line in printed.splitlines()], expected, rtol=1e-4)


def test_compiling_again_into_the_same_folder_loads_the_new_one(tmp_path: Path) -> None:
    x = images(1, 3, 12, 12)
    for zeros in (0.0, 0.5):
        proto = network(zeros=zeros)
        assert close(compile_model(proto, tmp_path / "net", tune=False)(x), Session(proto).outputs(x))


def test_what_is_not_supported_is_named_all_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    proto = network()
    proto.graph.node.append(helper.make_node("NonMaxSuppression", ["y", "y"], ["z"], name="boxes"))
    proto.graph.node.append(helper.make_node("StringNormalizer", ["q"], ["r"], name="words"))
    with pytest.raises(NotSupported, match=r"boxes \(NonMaxSuppression\).*words \(StringNormalizer\)"):
        write(proto, tmp_path / "net", target())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name", ["*/ int main; /*", 'a"b', "line\nbreak", "back\\slash", "??/", "int", "Ω", "x" * 5000]
)
def test_a_name_cannot_become_code(name: str, tmp_path: Path) -> None:
    proto, x = network(name=name), images(1, 3, 12, 12)
    proto.graph.node[0].name = name
    engine = lilliput.compile(proto, tmp_path / "net", tune=False)
    assert close(engine(x), Session(proto).outputs(x))


def test_external_tensors_must_lie_beside_the_model(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(4 * 8 * 27))
    inner = tmp_path / "inner"
    inner.mkdir()
    for where in ("../secret.bin", str(tmp_path / "secret.bin")):
        proto = network()
        tensor = proto.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=where)
        (inner / "model.onnx").write_bytes(proto.SerializeToString())
        with pytest.raises(ValueError, match="must lie in files beside it"):
            lilliput.compile(inner / "model.onnx")


def test_a_profile_names_every_layer(folder: Path) -> None:
    engine = lilliput.Engine(folder)
    layers = engine.profile(images(1, 3, 12, 12), runs=3)
    assert [layer["name"] for layer in layers] == [layer["name"] for layer in engine.manifest["layers"]]
    assert all(layer["ms"] >= 0 for layer in layers) and sum(layer["ms"] for layer in layers) > 0


def test_the_arena_is_little_more_than_what_lives_at_once(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["arena_bytes"] <= 1.3 * manifest["live_bytes"]


def test_the_command_compiles_and_says_what_it_made(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(network(zeros=0.5).SerializeToString())
    done = CliRunner().invoke(
        app, ["compile", str(path), "-o", str(tmp_path / "out"), "--no-tune"], env={"COLUMNS": "200"}
    )
    assert done.exit_code == 0, done.output
    for name in ("model.c", "model.h", "manifest.json", "libmodel.so", "example.c"):
        assert name in done.output.replace("\n", "") and (tmp_path / "out" / name).is_file()
    for wrong, message in (
        (["compile", "nowhere.onnx"], "must be an ONNX file that exists"),
        (["compile", str(path), "--for", "toaster"], "must be one of native"),
        (["compile", str(path), "--cc", "no-such-compiler"], "must be a command that can be run"),
        (["compile", str(path), "--shape", "x=1x3x9x9"], "The file fixes it"),
    ):
        failed = CliRunner().invoke(app, wrong, env={"COLUMNS": "400"})
        assert failed.exit_code == 2 and message in " ".join(failed.output.split())


def test_bench_compares_runtimes_in_one_run(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(network().SerializeToString())
    done = CliRunner().invoke(
        app, ["bench", str(path), "--seconds", "0.1", "--out", str(tmp_path / "record.json")], env={"COLUMNS": "200"}
    )
    assert done.exit_code == 0 and "engine" in done.output and "onnxruntime" in done.output
    rows = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert [row["runtime"].split()[0] for row in rows] == ["onnxruntime", "lilliput"] and rows[0]["times_faster"] == 1
    failed = CliRunner().invoke(app, ["bench", str(path), "--runtimes", "engine,abacus"])
    assert failed.exit_code == 2 and "abacus" in failed.output
