"""The plain route to a small `languages`: fewer buckets, fewer columns, int8, each trained from scratch.

python bench/languages.py [BUCKETSxWIDTH ...]    writes results/bench/languages.json

The bytes are those of the int8 table and head, one float16 scale for each column and class, and the float32 biases: a
file without any header. A configuration is chosen on val (the smallest within one point of dense); test is for reading.
"""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from lilliput.data.languages import languages, splits, train
from lilliput.nets.bag import Bag

ROOT = Path(__file__).parent.parent
CONFIGURATIONS = (
    "65536x64", "65536x32", "65536x16", "32768x64", "32768x32", "32768x24", "32768x16", "16384x64", "16384x48",
    "16384x32", "16384x24", "8192x64", "40960x20", "32768x28", "24576x40", "24576x32", "20480x40",
)  # fmt: skip


def int8(weight: Tensor, dim: int) -> Tensor:
    """`weight` on a symmetric grid of 255 values, one float16 scale for each slice along `dim`."""
    scale = (weight.abs().amax(dim, keepdim=True) / 127).half().float().clamp_min(1e-7)
    return (weight / scale).round().clamp(-127, 127) * scale


def rounded(model: Bag) -> tuple[Bag, int]:
    """The model with its table and head on int8 grids, in place, and how many bytes that takes."""
    table, head = model.table.weight.data, model.linear.weight.data
    table.copy_(int8(table, 0))
    head.copy_(int8(head, 1))
    return model, table.numel() + head.numel() + 2 * (table.shape[1] + head.shape[0]) + 4 * head.shape[0]


def accuracy(model: Bag, ids: Tensor, labels: Tensor) -> float:
    """The share of right answers, to four places."""
    with torch.no_grad():
        return round((torch.cat([model(part) for part in ids.split(512)]).argmax(1) == labels).float().mean().item(), 4)


def main() -> None:
    """Train, round and score each configuration, and write the record."""
    torch.set_num_threads(1)
    before = os.getloadavg()[0]
    dense, task = languages()
    found = {split: round(task.score(dense, split).value, 4) for split in ("val", "test")}
    points: list[dict[str, int | float]] = []
    for name in sys.argv[1:] or CONFIGURATIONS:
        buckets, width = map(int, name.split("x"))
        parts, _ = splits(buckets)
        began = time.process_time()
        model, size = rounded(train(*parts["train"], width, buckets))
        scores = {split: accuracy(model, *parts[split]) for split in ("val", "test")}
        points.append({"buckets": buckets, "width": width, "size_bytes": size, **scores,
                       "cpu_s": round(time.process_time() - began, 1)})  # fmt: skip
        print(points[-1], flush=True)
    within = [point for point in points if point["val"] >= found["val"] - 0.01]
    record = {
        "what": "fewer buckets x fewer columns x int8, trained from scratch; best = the smallest within 0.01 on val",
        "command": " ".join(["python bench/languages.py", *sys.argv[1:]]),
        "dense": {**found, "size_bytes": 4 * sum(part.numel() for part in dense.parameters())},
        "best": min(within, key=lambda point: point["size_bytes"], default=None),
        "points": points,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "os": platform.system(),
                    "load_before": before, "load_after": os.getloadavg()[0]},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "django": version("django")},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
    }  # fmt: skip
    file = ROOT / "results" / "bench" / "languages.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"best: {record['best']}; written: {file}")


if __name__ == "__main__":
    main()
