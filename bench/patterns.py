"""Which zeros the engine skips best: layers pruned in several patterns, all interleaved in one run, one thread.

python bench/patterns.py [--rounds 40] [--build DIR]

Weights are random, masks by magnitude. Each ratio is the time of the dense layer over the pruned one's in the engine,
the median over rounds in which each takes its turn. 2:4 stops at half, so it is measured there, beside single elements.
What is compiled is kept in DIR (build/patterns) and used again. Writes results/engine/patterns.json, which the table in
lilliput.prune.patterns is tested against.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from engine import Run, ms, turns
from torch import nn

import lilliput
from lilliput.cost.measure import machine
from lilliput.engine.run import Engine
from lilliput.export.onnx import Structure, trace
from lilliput.prune.patterns import parse
from lilliput.record import commit, versions
from lilliput.stored.plain import Plain

ROOT = Path(__file__).resolve().parents[1]
SPARSITIES = (0.8, 0.9, 0.95)
PATTERNS = (
    "elements",
    "block 4x1",
    "block 8x1",
    "block 16x1",
    "block 1x16",
    "block 4x4",
    "channel",
    "column",
    "kernel",
)


class Last(nn.Module):
    """A recurrent layer that gives its states alone."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(64, 128, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.gru(x)[0]
        return states


def layers() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """The layers, each with an input of one example."""
    torch.manual_seed(0)
    return {
        "recurrent": (Last(), torch.randn(1, 40, 64)),
        "linear, 1 row": (nn.Linear(1024, 1024), torch.randn(1, 1024)),
        "linear, 128 rows": (nn.Linear(512, 512), torch.randn(1, 128, 512)),
        "convolution 3x3": (nn.Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 14, 14)),
        "convolution 1x1": (nn.Conv2d(128, 128, 1), torch.randn(1, 128, 14, 14)),
    }


def variants(weights: dict[str, torch.Tensor]) -> dict[tuple[str, float], dict[str, Plain]]:
    """The weights under each pattern at each sparsity; the dense ones first."""
    weights_by_pattern = {("dense", 0.0): {name: Plain(w.numpy()) for name, w in weights.items()}}
    asked = [("elements", 0.5), ("2:4", 0.5), ("2:4 out", 0.5), *((p, s) for s in SPARSITIES for p in PATTERNS)]
    for text, sparsity in asked:
        pattern = parse(text)
        try:
            for w in weights.values():
                pattern.check(tuple(w.shape))
        except ValueError:
            continue
        weights_by_pattern[text, sparsity] = {
            name: Plain((w * pattern(w.abs(), sparsity)).numpy()) for name, w in weights.items()
        }
    return weights_by_pattern


def compiled(structure: Structure, stored: dict[str, Plain], folder: Path) -> Engine:
    """A layer with these weights, from the folder where it is there already."""
    if (folder / "manifest.json").is_file():
        return Engine(folder)
    return lilliput.compile(structure.write(dict(stored)), folder)


def traced(layer: nn.Module, x: torch.Tensor, path: Path) -> Structure:
    """A layer's graph, from the file where it is there already."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(trace(layer, x).proto.SerializeToString())
    return Structure(onnx.load(path))


def timed(engine: Engine, x: np.ndarray) -> Run:
    """Its runs, timed together by the processor's clock: what else the machine does is left out."""

    def run(count: int) -> list[float]:
        start = time.process_time()
        for _ in range(count):
            engine(x)
        return [(time.process_time() - start) / count]

    return run


def rows(name: str, layer: nn.Module, x: torch.Tensor, rounds: int, build: Path) -> list[dict[str, Any]]:
    """One layer in every pattern."""
    folder = build / name.replace(", ", "-").replace(" ", "-")
    structure = traced(layer, x, folder / "layer.onnx")
    weights = {key: w.detach() for key, w in layer.named_parameters() if w.dim() > 1}
    engines = {
        key: compiled(structure, stored, folder / f"{key[0]} {key[1]}".replace(" ", "-").replace(":", "of"))
        for key, stored in variants(weights).items()
    }
    times = turns({repr(key): timed(engine, x.numpy()) for key, engine in engines.items()}, rounds)
    base, rows = np.array(times[repr(("dense", 0.0))]), []
    for key, engine in engines.items():
        ratio = base / np.array(times[repr(key)])
        kernels = sorted({held["kernel"] for held in engine.manifest["layers"]})
        rows.append(
            {
                "layer": name,
                "shapes": [list(w.shape) for w in weights.values()],
                "pattern": key[0],
                "sparsity": key[1],
                "ms": ms(times[repr(key)]),
                "times_dense": round(float(np.median(ratio)), 3),
                "quartiles": [round(float(q), 3) for q in np.quantile(ratio, [0.25, 0.75])],
                "kernels": kernels,
            }
        )
        print(name, *(rows[-1][k] for k in ("pattern", "sparsity", "ms", "times_dense", "kernels")), flush=True)
    return rows


def main() -> None:
    """Every layer, then the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--layers", nargs="*", default=list(layers()))
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "patterns")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "engine" / "patterns.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    before = machine()
    found = [
        row
        for name, (layer, x) in layers().items()
        if name in given.layers
        for row in rows(name, layer.eval(), x, given.rounds, given.build)
    ]
    record = {
        "what": "Layers of random weights in the engine by pattern: float32, one thread, one example, by the "
        "processor's clock, one interleaved run a layer; times_dense is the time of the dense layer over "
        "the pruned one's",
        "command": "python bench/patterns.py",
        "rounds": given.rounds,
        "rows": found,
        "machine": before,
        "machine_after": machine(),
        "versions": versions(),
        "commit": commit(),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
