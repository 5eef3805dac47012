"""What a code costs while training: steps with a mask or a quantizer against dense steps, interleaved, one thread.

python bench/overhead.py [rounds]                            writes results/bench/overhead.json
python bench/overhead.py --against COMMIT [--pairs 40]       writes results/bench/overhead-against.json

Every round takes a few steps of each variant in turn, so that a change of the machine's load meets all of them, and is
timed by the processor's clock; the ratio is the median over the rounds. What happens once in many steps is no part of a
median: `updates` is the mean time of all that a rule does between the backward pass and the next step, in dense steps.

With --against, the training loops of this working tree and of a commit take their steps in turn, each in a process of
its own: the median ratio of steps a second over the pairs says whether the loop became slower.
"""

import argparse
import io
import json
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lilliput import evidence
from lilliput.cost.measure import machine
from lilliput.nets.mnist1d import MLP
from lilliput.nets.resnet import ResNet
from lilliput.prune.prune import Prune
from lilliput.quant.quantize import Quantize
from lilliput.rule import Rule, start_anew
from lilliput.task import Batch

ROOT = Path(__file__).parents[1]
BATCH = 64
TRAINING = 240  # steps of a training whose masks move in three quarters of it


def stepper(model: nn.Module, x: torch.Tensor, y: torch.Tensor, rule: Rule | None = None) -> Callable[[int], float]:
    """A function that takes so many training steps, over and over the middle of one training, and gives the seconds of
    it that the rule took."""
    model.train()
    states = {} if rule is None else rule.begin(model, None, None, TRAINING)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    batch = Batch(x, y, torch.arange(len(x)), 0)
    done = TRAINING // 4

    def steps(count: int) -> float:
        nonlocal states, done
        spent = 0.0
        for _ in range(count):
            optimizer.zero_grad()
            output = model(x)
            loss = F.cross_entropy(output, y)
            if (
                rule is not None
                and (added := rule.loss(states, model, done, TRAINING, batch, output, None)) is not None
            ):
                loss = loss + added
            loss.backward()
            if rule is not None:
                start = time.process_time()
                states = rule.on_grad(states, model, done, TRAINING)
                spent += time.process_time() - start
            optimizer.step()
            if rule is not None:
                start = time.process_time()
                states = start_anew(rule.on_step(states, model, done, TRAINING), model, optimizer)
                spent += time.process_time() - start
            done = done + 1 if done < TRAINING * 5 // 8 else TRAINING // 4
        return spent

    return steps


def measure(
    make: Callable[[], nn.Module], shape: tuple[int, ...], count: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Processor milliseconds a step of every variant, and the ratio of each to dense."""
    x, y = torch.randn(BATCH, *shape), torch.randint(0, 10, (BATCH,))
    methods = evidence.load("jaxpruner").METHODS
    rules = {name: method(0.9, 20, 0)[1] for name, method in methods.items()}
    variants = {
        "dense": stepper(make(), x, y),
        "mask": stepper(Prune(0.9)(make(), None, None), x, y),
        **{name: stepper(make(), x, y, rule) for name, given in rules.items() for rule in given},
        "quantizer, 8 bits": stepper(Quantize(8, biases="float32")(make(), None, None), x, y),
        "quantizer, 4 bits, float16 biases": stepper(Quantize(4)(make(), None, None), x, y),
        "mask and quantizer": stepper(Quantize(4, biases="float32")(Prune(0.9)(make(), None, None), None, None), x, y),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    rules_ms = dict.fromkeys(variants, 0.0)
    for round_ in range(rounds + 1):
        for name, steps in variants.items():
            start = time.process_time()
            spent = steps(count)
            if round_:
                rules_ms[name] += spent / count / rounds * 1000
                times[name].append((time.process_time() - start) / count * 1000)
    rows: dict[str, dict[str, Any]] = {}
    for name, values in times.items():
        ratio = np.array(values) / np.array(times["dense"])
        low, middle, high = np.quantile(ratio, [0.25, 0.5, 0.75])
        rows[name] = {
            "ms_per_step": round(float(np.median(values)), 3),
            "ratio": round(float(middle), 4),
            "ratio_quartiles": [round(float(low), 4), round(float(high), 4)],
            "updates": round(rules_ms[name] / float(np.median(times["dense"])), 4),
        }
        print(
            f"{name:36s}{np.median(values):9.2f} ms{middle:8.3f} x dense [{low:.3f}, {high:.3f}], updates "
            f"{rows[name]['updates']:.2%}",
            flush=True,
        )
    return rows


class Worker:
    """A training in a process of its own, which takes steps when it is asked to."""

    def __init__(self, source: Path, network: str, variant: str) -> None:
        worker = Path(__file__).with_name("overhead_worker.py")
        command = [sys.executable, str(worker), str(source), network, variant]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds(self, steps: int) -> float:
        """The processor's seconds for so many steps."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(steps, file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())

    def close(self) -> None:
        """End the training."""
        self.process.communicate()


def against(commit: str, pairs: int) -> dict[str, dict[str, Any]]:
    """The ratio of steps a second, this working tree over a commit, for each network and variant."""
    archive = subprocess.run(["git", "archive", commit, "src"], cwd=ROOT, capture_output=True, check=True).stdout
    ratios_of: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        for network, count in (("MLP", 100), ("ResNet-20", 2)):
            for variant in ("dense", "mask", "gradual pruning", "distillation"):
                workers = [Worker(source / "src", network, variant) for source in (ROOT, Path(folder).resolve())]
                for worker in workers:  # what happens once is no part of a step
                    worker.seconds(count)
                ratios = []
                for pair in range(pairs):
                    order = workers if pair % 2 else workers[::-1]
                    times = {worker: worker.seconds(count) for worker in order}
                    ratios.append(times[workers[1]] / times[workers[0]])
                for worker in workers:
                    worker.close()
                low, middle, high = (round(float(q), 4) for q in np.quantile(ratios, [0.25, 0.5, 0.75]))
                ratios_of.setdefault(network, {})[variant] = {"ratio": middle, "ratio_quartiles": [low, high]}
                print(
                    f"{network:12s}{variant:18s}{middle:8.4f} x the steps a second [{low:.4f}, {high:.4f}]", flush=True
                )
    return ratios_of


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rounds", nargs="?", type=int, default=20)
    parser.add_argument("--against", metavar="COMMIT")
    parser.add_argument("--pairs", type=int, default=40)
    given = parser.parse_args()
    torch.set_num_threads(1)
    before = machine()
    if given.against:
        name, results = "overhead-against", against(given.against, given.pairs)
        what = f"steps a second over those of commit {given.against}, batch {BATCH}, one thread, {given.pairs} pairs"
        command = f"python bench/overhead.py --against {given.against} --pairs {given.pairs}"
    else:
        name, rounds = "overhead", given.rounds
        results = {"ResNet-20": measure(ResNet, (1, 28, 28), 1, rounds), "MLP": measure(MLP, (40,), 50, rounds)}
        what = f"processor milliseconds a training step at batch {BATCH}, one thread, {rounds} interleaved rounds"
        command = f"python bench/overhead.py {rounds}"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    record = {
        "what": what,
        "command": command,
        "results": results,
        "machine": before,
        "machine_after": machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "commit": commit.stdout.strip(),
    }
    path = ROOT / "results" / "bench" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
