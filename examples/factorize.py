"""Replace layers by two thinner ones: the ranks follow from one budget over all layers."""

import torch
from torch import nn

import lilliput

torch.manual_seed(0)
x = torch.randn(1200, 2)
y = (x.norm(dim=1) * 2).long().clamp(max=3)
task = lilliput.Task("rings", train=(x[:800], y[:800]), val=(x[800:], y[800:]), batch_size=100)

dense = nn.Sequential(
    nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
)
dense = lilliput.Train(400, lr=lilliput.Cosine(1e-2))(dense, task, lilliput.Reference(dense, task))
reference = lilliput.Reference(dense, task)

stage = lilliput.Factorize(budget=0.4)
print("ranks:", stage.ranks(dense))
print("left alone:", stage.skipped(dense))
small = stage(dense, task, reference)
tuned = lilliput.Train(200, lr=lilliput.Cosine(3e-3), rules=(lilliput.Distill(),))(small, task, reference)

for name, model in (("dense", dense), ("factorised", small), ("fine-tuned", tuned)):
    print(f"{name:12s} {task.score(model).value:.3f} with {sum(p.numel() for p in model.parameters()):,} values")
assert task.score(tuned).value > task.score(dense).value - 0.03
