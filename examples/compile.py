"""Zeros that make a network faster: prune a perceptron and compile it to C that skips them."""

import tempfile

import numpy as np
import torch
from torch import nn

import lilliput
from lilliput.cost.measure import latency
from lilliput.export.onnx import Session, trace
from lilliput.runtimes.engine import EngineSession

torch.manual_seed(0)
dense = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)).eval()
x = torch.randn(1, 256)
pruned = lilliput.realize(lilliput.Prune(0.9)(dense, None, None))

before, after = (trace(model, x).proto for model in (dense, pruned))
with tempfile.TemporaryDirectory() as folder:
    engine = EngineSession(after, out=folder)
    got, expected = engine.outputs(x), Session(after).outputs(x)
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
    times = latency(
        {
            "dense, ONNX Runtime": Session(before),
            "90% zeros, ONNX Runtime": Session(after),
            "90% zeros, engine": engine,
        },
        x,
        seconds=0.5,
    )
    for layer in engine.engine.manifest["layers"]:
        print(f"{layer['name']:24s}{layer['nonzeros'] or '':>8} non-zeros  {layer['kernel']}")
for name, found in times.items():
    print(f"{name:24s}{found.median_ms * 1e3:8.1f} us  {found.ratio:.1f}x")
