"""The engine's speed: networks with zeros in it and in other runtimes, one thread, all interleaved in one run.

python bench/engine.py [NETWORK ...] [--nets DIR] [--pruned DIR] [--deepsparse PYTHON] [--rounds 40]

Every ratio is the time of ONNX Runtime in float32 on the same file over the engine's, the median over rounds in which
each runtime takes its turn. Writes results/engine/speed.json. DIR of --pruned is what bench/pruned_digits.py
wrote; see bench/deepsparse_worker.py for --deepsparse.
"""

import argparse
import ctypes
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
from deepsparse_worker import Worker
from onnx import numpy_helper

import lilliput
from lilliput.cost.measure import machine
from lilliput.engine.build import library
from lilliput.engine.target import target
from lilliput.onnx.session import Session
from lilliput.record import commit, versions
from lilliput.runtimes.engine import EngineSession

ROOT = Path(__file__).resolve().parents[1]
Run = Callable[[int], list[float]]
LEAST_S = 2e-3  # of one runtime's turn


def turns(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of a run of each, one median a round, the runtimes taking turns."""
    counts = {name: max(1, int(LEAST_S / min(run(3)))) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(float(np.median(run(counts[name]))))
    return seconds


def timed(session: Any, feed: dict[str, Any]) -> Run:
    """A session's runs, each timed."""
    fed = session.feed(feed)

    def run(count: int) -> list[float]:
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            session.run(fed)
            seconds.append(time.perf_counter() - start)
        return seconds

    return run


def row(
    name: str, path: Path, feed: dict[str, Any], rivals: dict[str, Run], rounds: int, peak: float, folder: Path
) -> dict[str, Any]:
    """One network: its times, ratios, and what was compiled."""
    runtime = Session(path)
    began = time.perf_counter()
    engine = EngineSession(path, out=folder / name)
    compiled_s = time.perf_counter() - began
    a, b = engine.run(engine.feed(feed))[0], runtime.all(feed)[0]
    times = turns({"onnxruntime": timed(runtime, feed), "engine": timed(engine, feed), **rivals}, rounds)
    base = np.array(times["onnxruntime"])
    manifest = engine.engine.manifest
    row: dict[str, Any] = {
        "network": name,
        "onnxruntime_ms": ms(times["onnxruntime"]),
        "engine_ms": ms(times["engine"]),
        "ratio": round(float(np.median(base / times["engine"])), 3),
        "ratio_quartiles": [round(float(x), 3) for x in np.quantile(base / times["engine"], [0.25, 0.75])],
        "error": float(np.abs(a - b).max() / np.abs(b).max()),
    }
    for rival in rivals:
        row[f"{rival}_ms"] = ms(times[rival])
        row[f"times_{rival}"] = round(float(np.median(np.array(times[rival]) / times["engine"])), 3)
    macs = kept_macs(path, manifest)
    row |= {
        "share_of_peak": round(macs / (np.median(times["engine"]) * peak), 3) if macs else None,
        "library_bytes": manifest["library_bytes"],
        "weight_bytes": manifest["weight_bytes"],
        "arena_bytes": manifest["arena_bytes"],
        "arena_over_live": round(manifest["arena_bytes"] / max(manifest["live_bytes"], 1), 3),
        "compile_s": round(compiled_s, 2),
    }
    print(json.dumps(row), flush=True)
    return row


def ms(seconds: list[float]) -> float:
    """The median in milliseconds."""
    return round(float(np.median(seconds)) * 1e3, 5)


def kept_macs(path: Path, manifest: dict[str, Any]) -> float:
    """Multiply-adds with weights that are not zero, of convolutions and matrix products."""
    proto = onnx.shape_inference.infer_shapes(onnx.load(path))
    held = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    sizes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*proto.graph.value_info, *proto.graph.output)
    }
    total = 0.0
    for node in proto.graph.node:
        if node.op_type in ("Conv", "MatMul", "Gemm") and len(node.input) > 1 and node.input[1] in held:
            weight, out = held[node.input[1]], sizes.get(node.output[0], [])
            positions = np.prod(out[2:]) if node.op_type == "Conv" else np.prod(out[:-1])
            total += float(np.count_nonzero(weight)) * float(positions)
    return total


def peak_macs_per_s() -> float:
    """What a core can do: multiply-adds a second in registers alone."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "peak.c"
        source.write_text(PEAK)
        library(source, Path(folder) / "peak.so", target())
        loaded = ctypes.CDLL(str(Path(folder) / "peak.so"))
        loaded.peak.restype = ctypes.c_double
        return max(float(loaded.peak()) for _ in range(20))


PEAK = """
#include <stdint.h>
#include <time.h>
typedef float v __attribute__((vector_size(32)));
static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
__attribute__((visibility("default"))) double peak(void)
{
    v a[12], x, y;
    for (int i = 0; i < 12; i++) for (int j = 0; j < 8; j++) a[i][j] = (float)(i + j);
    for (int j = 0; j < 8; j++) x[j] = 0.999f, y[j] = 1e-3f;
    const double start = now();
    for (int n = 0; n < 200000; n++) {
        for (int i = 0; i < 12; i++) a[i] = a[i] * x + y;
        __asm__ volatile("" : "+m"(a));
    }
    const double spent = now() - start;
    return 200000.0 * 12 * 8 / spent;
}
""".replace('        __asm__ volatile("" : "+m"(a));\n', "").replace(
    "    const double spent", '    __asm__ volatile("" : : "m"(a));\n    const double spent'
)


def overhead_us() -> float:
    """A call from Python of a network that does nothing."""
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [info("x", 1, [1, 8])], [info("y", 1, [1, 8])]
    )
    engine = lilliput.compile(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]))
    x, best = np.ones((1, 8), np.float32), []
    for _ in range(200):
        start = time.perf_counter()
        for _ in range(200):
            engine(x)
        best.append((time.perf_counter() - start) / 200 * 1e6)
    return round(float(np.median(best)), 2)


def library_sizes(path: Path, folder: Path) -> dict[str, int]:
    """Bytes of the library of a network by how its weights are stored."""
    from lilliput.export.onnx import narrow
    from lilliput.search.onnx_codes import channels, grid
    from lilliput.stored.plain import Plain

    proto = onnx.load(path)
    weights = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer if len(t.dims) > 1}
    axes = {name: axis for name, axis in channels(proto).items() if name in weights}
    sizes = {}
    for kind, stored in {
        "float32": {},
        "float16": {name: Plain(w.astype(np.float16)) for name, w in weights.items()},
        "8 bits": {name: grid(w, axes[name], 8) for name, w in weights.items() if name in axes},
    }.items():
        engine = lilliput.compile(narrow(proto, stored) if stored else proto, folder / f"size-{kind}")
        sizes[kind] = engine.manifest["library_bytes"] + engine.manifest["weight_bytes"]
        print(kind, sizes[kind], flush=True)
    return sizes


def main() -> None:
    """Every network, then the record."""
    names = [name for name in networks.NAMES if not name.endswith("int8") and not name.startswith("transformer")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=names)
    parser.add_argument("--nets", type=Path, default=ROOT / "build" / "nets")
    parser.add_argument("--pruned", type=Path, default=ROOT / "build" / "pruned")
    parser.add_argument("--deepsparse")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "engine" / "speed.json")
    given = parser.parse_args()
    before, peak = machine(), peak_macs_per_s()
    worker = Worker(given.deepsparse) if given.deepsparse else None
    folder = Path(tempfile.mkdtemp())
    rows, sizes = [], {}
    try:
        for name in given.names:
            path = networks.make(name, given.nets)
            feed, rivals = networks.feed_of(path), {}
            if name == "resnet20-90":
                eight = Session(networks.make("resnet20-90-int8", given.nets))
                rivals["int8"] = timed(eight, feed)
            if worker and name.startswith("resnet20"):
                worker.load(path)
                rivals["deepsparse"] = worker.run
            rows.append(row(name, path, feed, rivals, given.rounds, peak, folder))
            if name == "resnet20-90":
                sizes = library_sizes(path, folder)
        for path in sorted(given.pruned.glob("digits-*.onnx")):
            feed = {"x": np.zeros((1, 1, 28, 28), np.float32)}
            feed = {Session(path).input_names[0]: next(iter(feed.values())) + np.float32(0.5)}
            rows.append(row(path.stem, path, feed, {}, given.rounds, peak, folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if worker:
            worker.close()
    record = {
        "what": "The engine beside ONNX Runtime: float32, one thread, batch 1, one interleaved run",
        "command": "python bench/engine.py" + (" --deepsparse PYTHON" if worker else ""),
        "rows": rows,
        "peak_gmacs_per_s": round(peak / 1e9, 2),
        "call_overhead_us": overhead_us(),
        "resnet20_90_bytes": sizes,
        "rounds": given.rounds,
        "deepsparse": worker.version if worker else None,
        "machine": before,
        "machine_after": machine(),
        "versions": versions(),
        "commit": commit(),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(given.out)


if __name__ == "__main__":
    main()
