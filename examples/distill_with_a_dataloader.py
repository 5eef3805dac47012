"""Distil with a DataLoader of your own: a teacher module is enough, and it may see every augmentation only once."""

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lilliput
from lilliput.data.mnist1d import jitter, mnist1d_mlp
from lilliput.nets.mnist1d import CNN

teacher, task = mnist1d_mlp()
epochs = 16
torch.manual_seed(0)
loader = DataLoader(TensorDataset(*task.split("train")), batch_size=100, shuffle=True, drop_last=True)

student = CNN(channels=16)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, total_steps=epochs * len(loader))

with lilliput.Distill(temperature=4.0).attached(student, optimizer, teacher=teacher) as rule:
    for _ in range(epochs):
        for x, y in loader:
            x = jitter(x, torch.randint(2**40, (len(x),)))  # never the same signal twice
            output = student(x)
            loss = 0.2 * F.cross_entropy(output, y) + rule.loss(x, output)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

x, y = task.split("test")
dense, small = ((model.eval()(x).argmax(1) == y).float().mean().item() for model in (teacher, student))
values = [sum(p.numel() for p in model.parameters()) for model in (teacher, student)]
print(f"teacher {dense:.3f} with {values[0]:,} values, student {small:.3f} with {values[1]:,}")
assert small > dense - 0.2 and values[1] * 30 < values[0]
