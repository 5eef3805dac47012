"""ResNet-20 on the bench-work digits, really pruned: global gradual magnitude pruning with distillation, 8 epochs.

python bench/pruned_digits.py [--sparsity 0.9 0.95] [--seed 0] [--epochs 8] [--models build/pruned]

Reads the files in the folder LILLIPUT_BENCH_WORK and nothing else. Writes one ONNX file a sparsity, plain float32 with
the zeros in place and batch norm folded, which is what `lilliput bench` and bench/engine.py are given; and
results/engine/pruned-digits.json with what each one scores on the 1,000 validation digits, in ONNX Runtime. There is
no test split in the folder, and nothing was chosen by looking at val.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import work
from onnx import numpy_helper

import lilliput
from lilliput.cost.measure import machine
from lilliput.export.onnx import Session, trace
from lilliput.record import commit, versions

ROOT = Path(__file__).parents[1]


def recipe(sparsity: float, steps: int, seed: int) -> lilliput.Recipe:
    """Zeros grow by the cubic schedule over the first three quarters, then the rest recovers; the norms go last."""
    rules = (lilliput.Prune(sparsity, allocation="global"), lilliput.Distill())
    return lilliput.Recipe((lilliput.Train(steps, rules=rules, seed=seed), lilliput.FoldBatchNorm()))


def zeros(proto: onnx.ModelProto) -> dict[str, Any]:
    """How many values the matrices and filters of a file have, how many of them are zero, and the same for each."""
    weights = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer if len(t.dims) > 1}
    count, zero = sum(w.size for w in weights.values()), sum(int((w == 0).sum()) for w in weights.values())
    return {
        "weights": count,
        "nonzero": count - zero,
        "sparsity": round(zero / count, 6),
        "layers": {name: round(float((w == 0).mean()), 4) for name, w in weights.items()},
    }


def measure(name: str, model: torch.nn.Module, task: lilliput.Task, path: Path) -> dict[str, Any]:
    """Write a network as ONNX and read its accuracy from the file."""
    proto = trace(lilliput.realize(model), task.example).proto
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(proto.SerializeToString())
    right = task.score(Session(path)).outcomes
    assert right is not None
    digest = hashlib.blake2b(path.read_bytes(), digest_size=12).hexdigest()
    row = {
        "network": name,
        "val": round(float(np.mean(right)), 4),
        "right": int(right.sum()),
        "of": len(right),
        **zeros(proto),
        "onnx_bytes": path.stat().st_size,
        "file": path.name,
        "blake2b": digest,
    }
    print(f"{name:16s} val {row['val']:.4f}   {row['nonzero']:7,} of {row['weights']:,} weights   {path}", flush=True)
    return row


def main() -> None:
    """Train, write the files and the record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sparsity", nargs="*", type=float, default=[0.9, 0.95])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--models", type=Path, default=ROOT / "build" / "pruned")
    given = parser.parse_args()
    torch.set_num_threads(1)
    before, stamp = machine(), commit()
    dense, task = work.digits()
    steps = given.epochs * (task.examples // task.batch_size)
    folded = lilliput.run(dense, task, lilliput.Recipe((lilliput.FoldBatchNorm(),)))
    rows = [measure("dense", folded, task, given.models / "digits-dense.onnx")]
    for sparsity in given.sparsity:
        plan = recipe(sparsity, steps, given.seed)
        pruned = lilliput.run(dense, task, plan, given.models / "store", seed=given.seed)
        percent = f"{sparsity * 100:g}"
        row = measure(f"{percent}% zeros", pruned, task, given.models / f"digits-pruned-{percent}.onnx")
        rows.append({**row, "steps": steps, "recipe": plan.data()})
    layers = {row["network"]: row.pop("layers") for row in rows}
    recipes = {row["network"]: row.pop("recipe") for row in rows if "recipe" in row}
    record = {
        "what": f"ResNet-20 on the bench-work digits, really pruned and distilled, {given.epochs} epochs, one seed; "
        "accuracy in ONNX Runtime on the 1,000 validation digits",
        "command": "python bench/pruned_digits.py",
        "seed": given.seed,
        "epochs": given.epochs,
        "rows": rows,
        "recipes": recipes,
        "zeros_by_layer": layers,
        "machine": before,
        "versions": versions(),
        "commit": stamp,
    }
    path = ROOT / "results" / "engine" / "pruned-digits.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
