"""Quantize a trained network, then train on through the rounding; each tensor may have its own bits."""

import torch
from torch import nn

import lilliput

torch.manual_seed(0)
x = torch.randn(1200, 2)
y = (x.norm(dim=1) * 2).long().clamp(max=3)
task = lilliput.Task("rings", train=(x[:800], y[:800]), val=(x[800:], y[800:]), batch_size=100)

dense = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
dense = lilliput.Train(400, lr=lilliput.Cosine(1e-2))(dense, task, lilliput.Reference(dense, task))
reference = lilliput.Reference(dense, task)

after = lilliput.Quantize(2, allocation=(("0.weight", 6),))(dense, task, reference)
trained = lilliput.Train(200, lr=lilliput.Cosine(3e-3), rules=(lilliput.Distill(),))(after, task, reference)

for name, model in (("float32", dense), ("2 bits, at once", after), ("2 bits, trained through", trained)):
    size = sum(part.size_bytes for part in lilliput.storage(model).values())
    print(f"{name:24s} {task.score(model).value:.3f} {size:7,} bytes")
assert task.score(trained).value >= task.score(after).value and trained[2].weight[0].unique().numel() <= 3

activations = lilliput.QuantizeActivations(8)(dense, task, reference)  # QuantizeLinear, DequantizeLinear in ONNX
assert abs(task.score(activations).value - task.score(dense).value) < 0.02
