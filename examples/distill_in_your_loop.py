"""Distil in a plain PyTorch loop: one more line than pruning, since this rule has a loss."""

import torch
from torch import nn

import lilliput

torch.manual_seed(0)
x = torch.randn(1200, 2)
y = (x.norm(dim=1) * 2).long().clamp(max=3)
task = lilliput.Task("rings", train=(x[:800], y[:800]), val=(x[800:], y[800:]), batch_size=100)

teacher = nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))
teacher = lilliput.Train(400, lr=lilliput.Cosine(1e-2))(teacher, task, lilliput.Reference(teacher, task))
reference = lilliput.Reference(teacher, task)  # computes the dense outputs once for each example

student = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 4))
optimizer = torch.optim.AdamW(student.parameters(), lr=2e-2)
with lilliput.Distill(temperature=2.0).attached(student, optimizer, steps=800, reference=reference) as rule:
    for batch in task.batches(800, seed=0):
        output = student(batch.inputs)
        loss = task.loss(output, batch) + rule.loss(batch, output)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

dense, small = task.score(teacher).value, task.score(student).value
values = [sum(p.numel() for p in model.parameters()) for model in (teacher, student)]
print(f"teacher {dense:.3f} with {values[0]:,} values, student {small:.3f} with {values[1]:,}")
assert small > dense - 0.05
