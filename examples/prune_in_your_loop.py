"""Prune gradually in a plain PyTorch loop: two lines around the loop you have."""

import torch
from torch import nn
from torch.nn import functional as F

import lilliput

torch.manual_seed(0)
x = torch.randn(2000, 2)
y = (x.norm(dim=1) * 2).long().clamp(max=3)  # four rings

model = nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
steps = 800

# "block 4x1" would drop blocks, "2:4" two of every four; score="taylor" would weigh by the gradient.
with lilliput.Prune(0.9, pattern="elements").attached(model, optimizer, steps=steps):
    for _ in range(steps):
        batch = torch.randint(0, len(x), (128,))
        loss = F.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

accuracy = (model(x).argmax(1) == y).float().mean().item()
zeros = sum(int((layer.weight == 0).sum()) for layer in model if isinstance(layer, nn.Linear))
weights = sum(layer.weight.numel() for layer in model if isinstance(layer, nn.Linear))
packed = sum(part.size_bytes for part in lilliput.storage(model).values())
dense = sum(4 * p.numel() for p in lilliput.realize(model).parameters())
print(f"accuracy {accuracy:.3f} with {zeros / weights:.0%} zeros: {packed:,} bytes packed, {dense:,} dense")
assert accuracy > 0.85 and zeros == round(0.9 * weights) and packed * 4 < dense
