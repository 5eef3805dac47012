"""What a code costs while training: steps with a mask or a quantizer against dense steps, interleaved, one thread.

python bench/overhead.py [rounds]    writes results/bench/overhead.json

Every round takes a few steps of each variant in turn, so that a change of the machine's load meets all of them, and is
timed by the processor's clock; the figure is the median over the rounds of the ratio to dense.
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lilliput.cost.measure import machine
from lilliput.nets.mnist1d import MLP
from lilliput.nets.resnet import ResNet
from lilliput.prune.acdc import ACDC
from lilliput.prune.growing import Growing
from lilliput.prune.l0 import L0
from lilliput.prune.movement import Movement
from lilliput.prune.prune import Prune
from lilliput.prune.rigl import RigL
from lilliput.prune.soft_threshold import STR
from lilliput.prune.sparse import SET, StaticSparse
from lilliput.prune.ste import STE
from lilliput.prune.topkast import TopKAST
from lilliput.quant.quantize import Quantize
from lilliput.rule import Rule, start_anew
from lilliput.task import Batch

ROOT = Path(__file__).parents[1]
BATCH = 64
TRAINING = 240  # steps of a training whose masks move in three quarters of it


def stepper(model: nn.Module, x: torch.Tensor, y: torch.Tensor, rule: Rule | None = None) -> Callable[[int], None]:
    """A function that takes so many training steps, over and over the middle of one training."""
    model.train()
    states = {} if rule is None else rule.begin(model, None, None, TRAINING)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    batch = Batch(x, y, torch.arange(len(x)), 0)
    done = TRAINING // 4

    def steps(count: int) -> None:
        nonlocal states, done
        for _ in range(count):
            optimizer.zero_grad()
            output = model(x)
            loss = F.cross_entropy(output, y)
            if rule is not None and (added := rule.penalty(states, model, batch, output, None)) is not None:
                loss = loss + added
            loss.backward()
            if rule is not None:
                states = rule.on_grad(states, model, done, TRAINING)
            optimizer.step()
            if rule is not None:
                states = start_anew(rule.on_step(states, model, done, TRAINING), model, optimizer)
            done = done + 1 if done < TRAINING * 5 // 8 else TRAINING // 4

    return steps


def measure(make: Callable[[], nn.Module], shape: tuple[int, ...], count: int, rounds: int) -> dict[str, object]:
    """Processor milliseconds a step of every variant, and the ratio of each to dense."""
    x, y = torch.randn(BATCH, *shape), torch.randint(0, 10, (BATCH,))
    variants = {
        "dense": stepper(make(), x, y),
        "mask": stepper(Prune(0.9)(make(), None, None), x, y),
        "mask, gradual": stepper(make(), x, y, Prune(0.9)),
        **{type(rule).__name__: stepper(make(), x, y, rule) for rule in (
            StaticSparse(0.9), SET(0.9, every=20), RigL(0.9, every=20), STE(0.9), ACDC(0.9), TopKAST(0.9),
            Movement(0.9), Growing(0.9), STR(0.9), L0(0.9))},
        "quantizer, 8 bits": stepper(Quantize(8, biases="float32")(make(), None, None), x, y),
        "quantizer, 4 bits, float16 biases": stepper(Quantize(4)(make(), None, None), x, y),
        "mask and quantizer": stepper(Quantize(4, biases="float32")(Prune(0.9)(make(), None, None), None, None), x, y),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds + 1):
        for name, steps in variants.items():
            start = time.process_time()
            steps(count)
            if round_:
                times[name].append((time.process_time() - start) / count * 1000)
    found: dict[str, object] = {}
    for name, values in times.items():
        ratio = np.array(values) / np.array(times["dense"])
        low, middle, high = np.quantile(ratio, [0.25, 0.5, 0.75])
        found[name] = {"ms_per_step": round(float(np.median(values)), 3), "ratio": round(float(middle), 4),
                       "ratio_quartiles": [round(float(low), 4), round(float(high), 4)]}
        print(f"{name:36s}{np.median(values):9.2f} ms{middle:8.3f} x dense [{low:.3f}, {high:.3f}]", flush=True)
    return found


def main() -> None:
    """Measure both networks and write the record."""
    torch.set_num_threads(1)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    before = machine()
    results = {"ResNet-20": measure(ResNet, (1, 28, 28), 1, rounds), "MLP": measure(MLP, (40,), 50, rounds)}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    record = {
        "what": f"processor milliseconds a training step at batch {BATCH}, one thread, {rounds} interleaved rounds",
        "command": f"python bench/overhead.py {rounds}", "results": results, "machine": before,
        "machine_after": machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}, "commit": commit.stdout.strip(),
    }
    path = ROOT / "results" / "bench" / "overhead.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
