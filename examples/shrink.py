"""Compress a trained network of your own: a model, a task, one call, and the files to deploy.

Worker processes import this file, so the work is under `if __name__ == "__main__"`.
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import lilliput


def rings(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in the plane, and in which of four rings each lies."""
    x = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    return x, (x.norm(dim=1) * 2).long().clamp(max=3)


def trained(task: lilliput.Task) -> nn.Module:
    """A network that is far larger than the task needs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))
    return lilliput.Train(400, lr=lilliput.Cosine(1e-2))(model, task, lilliput.Reference(model, task))


if __name__ == "__main__":
    task = lilliput.Task("rings", train=rings(2000, 0), val=rings(2000, 1), test=rings(2000, 2), batch_size=100)
    model = trained(task)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rings")
        result = lilliput.shrink(model, task, floor="2%", trials=2, out=out, workers=1)
        print(sorted(path.name for path in out.iterdir()))
        network = lilliput.load(out)
        x, y = rings(2000, 3)
        print(f"{result.summary['dense']['packed_bytes']:,} -> {(out / 'model.lil').stat().st_size:,} bytes")
        accuracy = float((network(x).argmax(1) == y).float().mean())
        print(f"{task.score(model).value:.3f} -> {accuracy:.3f} accuracy, on new data")
        assert (out / "model.lil").stat().st_size == result.chosen["packed_bytes"]
        assert result.met and accuracy > task.score(model).value - 0.04
