"""Two processes that train on different shards reach the same masks and weights, bit by bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from lilliput.prune.masks import masks
from lilliput.prune.prune import Prune
from lilliput.prune.rigl import RigL
from lilliput.prune.ste import STE

rank, folder, steps = int(sys.argv[1]), sys.argv[2], 12
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
for name, rule in {"rigl": RigL(0.75, every=3), "prune": Prune(0.75, every=2), "ste": STE(0.75, every=1),
                   "taylor": Prune(0.5, score="taylor", every=2)}.items():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    torch.manual_seed(rank)
    before = torch.rand(())
    with rule.attached(net, optimizer, steps=steps):
        parallel = DistributedDataParallel(net)
        for _ in range(steps):
            x = torch.randn(16, 6)
            optimizer.zero_grad()
            cross_entropy(parallel(x), (x[:, 0] > 0).long() + (x[:, 1] > 0).long()).backward()
            optimizer.step()
    moments = {f"moment {i}": state["exp_avg"] for i, state in enumerate(optimizer.state.values())}
    kept = {f"mask {key}": code.mask for key, code in masks(net).items()}
    torch.save({"shard": before, **net.state_dict(), **moments, **kept}, f"{folder}/{name}-{rank}.pt")
dist.barrier()  # whoever leaves first would close the other's connections
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_reach_the_same_masks_and_weights(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    local = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else None
    workers = [
        subprocess.Popen(
            [sys.executable, "worker.py", str(rank), str(tmp_path)],
            cwd=tmp_path,
            env=local,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for worker in workers:
            output, _ = worker.communicate(timeout=300)
            assert worker.returncode == 0, output
    finally:
        for worker in workers:
            worker.kill()
    for name, share in (("rigl", 0.75), ("prune", 0.75), ("ste", 0.75), ("taylor", 0.5)):
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in range(2))
        assert first.pop("shard") != second.pop("shard"), "each process has examples of its own"
        assert first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())
        masks = [value for key, value in first.items() if key.startswith("mask ")]
        assert len(masks) == 2
        assert sum(int((~mask).sum()) for mask in masks) == pytest.approx(share * (6 * 24 + 24 * 3), abs=2)
