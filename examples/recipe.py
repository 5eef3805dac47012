"""A recipe is plain data: write it as TOML, read it back, run it over a store, and nothing is trained twice."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import lilliput

torch.manual_seed(0)
x = torch.randn(1200, 2)
y = (x.norm(dim=1) * 2).long().clamp(max=3)
task = lilliput.Task("rings", train=(x[:800], y[:800]), val=(x[800:], y[800:]), batch_size=100)
dense = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
dense = lilliput.Train(400, lr=lilliput.Cosine(1e-2))(dense, task, lilliput.Reference(dense, task))

recipe = lilliput.Recipe(
    (
        lilliput.Train(300, lr=lilliput.Cosine(5e-3), rules=(lilliput.Prune(0.8, every=10), lilliput.Distill())),
        lilliput.Quantize(6),
        lilliput.Train(100, lr=lilliput.Cosine(1e-3), rules=(lilliput.Distill(),)),
    )
)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "recipe.toml"
    path.write_text(recipe.toml())
    print(path.read_text())
    assert lilliput.Recipe.read(path) == recipe
    store = Path(folder) / "store"
    first = lilliput.run(dense, task, recipe, store)
    again = lilliput.run(dense, task, recipe, store)  # at once: every training is found in the store

size = sum(part.size_bytes for part in lilliput.storage(first).values())
print(f"{task.score(dense).value:.3f} -> {task.score(first).value:.3f} in {size:,} bytes")
assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
assert task.score(first).value > task.score(dense).value - 0.05
