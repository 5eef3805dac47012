"""Export once, write the packed file, and load it back: its length is known before it is written."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import lilliput
from lilliput.code.base import pack
from lilliput.export.onnx import trace
from lilliput.export.pack import write

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(40, 256), nn.ReLU(), nn.Linear(256, 10)).eval()
model = lilliput.Quantize(4)(lilliput.Prune(0.8)(model, None, None), None, None)
example = torch.randn(5, 40)

structure = trace(lilliput.realize(model), example)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.lil"
    write(structure, pack(model), path)
    network = lilliput.load(path)
    difference = float((network(example) - model(example)).detach().abs().max())
    for name, part in lilliput.storage(model).items():
        print(f"{name:10s} {part.size_bytes:6,} bytes: " + ", ".join(f"{n} {what}" for what, n, _ in part.parts))
    print(f"{path.stat().st_size:,} bytes in the file, largest difference {difference:.1e}")
    assert difference < 1e-5 and path.stat().st_size < 0.1 * 4 * 12810
