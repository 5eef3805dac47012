"""Write the files of tests/golden with the lilliput that is installed: `python tests/golden/make.py`.

They were written once, at commit 89f5eb2 (format 1 of model.lil; `lil2` holds format 2), and are kept: later versions
must open them. Run this only to add a folder for a new format, never to replace what is here.
"""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
TARGET = """
import torch
from torch import nn
from lilliput import Task


def make():
    torch.manual_seed(0)
    x = torch.randn(160, 8)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        y = (model(x) + 0.1 * torch.randn(160, 3)).argmax(1)
    return model, Task("toy", (x[:96], y[:96]), (x[96:128], y[96:128]), (x[128:], y[128:]))
"""
RECIPE = """[[stages]]
stage = "Train"
steps = 12
lr = { stage = "Cosine", peak = 0.01 }
rules = [{ stage = "Prune", sparsity = { stage = "Cubic", last = 0.5 } }, { stage = "Distill" }]

[[stages]]
stage = "Factorize"
rank = 4
where = "0"

[[stages]]
stage = "Quantize"
bits = 4
where = "2,4"
"""


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "lilliput.cli", *words]


def main(folder: Path) -> None:
    sys.path.insert(0, str(HERE.parent))
    import test_pack

    from lilliput.export import pack

    (folder / "lil").mkdir(parents=True)
    facts: dict[str, Any] = {}
    for name, make in test_pack.KINDS.items():
        path = folder / "lil" / (name.replace(" ", "-").replace(":", "-").replace("%", "") + ".lil")
        stored = make()
        pack.write(test_pack.model(stored.decode()), {"w": stored}, path)
        tensors = pack.read(path).tensors().values()
        digests = [hashlib.sha256(np.ascontiguousarray(t).tobytes()).hexdigest() for t in tensors]
        facts[path.name] = {"bytes": path.stat().st_size, "tensors": digests}
    (folder / "lil" / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    work = folder / "work"
    work.mkdir()
    (work / "toy.py").write_text(TARGET)
    (work / "recipe.toml").write_text(RECIPE)
    search = ("shrink", "toy.py:make", "--floor", "50%", "--trials", "3")
    subprocess.run(command(*search, "--out", "whole"), cwd=work, check=True)
    process = subprocess.Popen(command(*search, "--out", "killed"), cwd=work)
    while process.poll() is None and len(list((work / "killed" / "records").glob("*.json"))) < 8:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(command("run", "recipe.toml", "toy.py:make", "--out", "recipe"), cwd=work, check=True)
    for name in ("whole", "killed", "recipe"):
        shutil.copytree(
            work / name,
            folder / name,
            ignore=shutil.ignore_patterns("report.html", ".*", "engine", *(["records"] if name != "killed" else [])),
        )
    for name in ("toy.py", "recipe.toml"):
        shutil.copy(work / name, folder / name)
    shutil.rmtree(work)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
