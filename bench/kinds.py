"""Forty small networks of other people's kinds: how many each tool refuses or gets wrong: results/kinds.json.

    python bench/kinds.py [KIND ...] [--tools lilliput NNCF ...] [--peers-python PATH] [--trials N] [--again]

Each tool takes its documented default route: `lilliput.shrink`, Torch-Pruning's magnitude pruner with half of the
channels and 100 steps of fine-tuning, NNCF's `compress_weights`, torchao's `quantize_` with int8 weights. Each network
and tool has a process of its own with a time limit. A result is right if it runs on batches of other sizes, loses at
most the floor on data kept back (bench/held.py), and is at most 0.8 of the float32 bytes. A run that is on record for
this commit (lilliput) or version (peers) is not repeated. The peers need an environment that has them beside lilliput:

    python -m venv peers && peers/bin/pip install -e . nncf torchao transformers
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import held
import kinds_images
import kinds_sequences
import kinds_tables
import torch
from kinds_tables import Kind, runner
from torch import Tensor, nn

import lilliput
from lilliput import Task
from lilliput.cost.measure import machine
from lilliput.export.onnx import Session
from lilliput.files import write
from lilliput.record import commit, versions
from lilliput.task import call, leaves, mapped, outline, take

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "results" / "kinds.json"
KINDS: dict[str, Kind] = {**kinds_tables.KINDS, **kinds_images.KINDS, **kinds_sequences.KINDS}
FLOOR, SMALLER = 0.04, 0.8
SECONDS = 10  # of a search
LIMIT = 600  # seconds until a tool counts as one that does not end
FINE_TUNING, CALIBRATION = 100, 64
SAME = 1e-3  # between the two files of lilliput
RIGHT, REFUSED, LARGE, WRONG, ENDLESS = "right", "refused", "nothing smaller", "wrong", "no end"
Smaller = tuple[Callable[..., Any], int]
"""What computes, and its bytes."""


# -------------------------------------------------------------------------------------------------------------- tools


def by_lilliput(model: nn.Module, task: Task, _: Kind, trials: int | None) -> Smaller:
    """A search; what model.onnx computes in ONNX Runtime, which must be what model.lil does, whose bytes count."""
    folder = Path(tempfile.mkdtemp()) / "out"
    budget = {"budget": SECONDS} if trials is None else {"budget": None, "trials": trials}
    result = lilliput.shrink(model, task, floor=FLOOR, out=folder, **budget)
    session, packed = Session(result.folder / "model.onnx"), lilliput.load(result.folder)

    def both(*args: Any, **named: Any) -> Any:
        outputs = session(*args, **named)
        for one, other in zip(leaves(outputs), leaves(packed(*args, **named)), strict=True):
            torch.testing.assert_close(one, other, atol=SAME, rtol=SAME)
        return outputs

    return both, (result.folder / "model.lil").stat().st_size


def by_torch_pruning(model: nn.Module, task: Task, kind: Kind, _: int | None) -> Smaller:
    """Half of the channels by magnitude, all layers but the last, then the fine-tuning."""
    import torch_pruning

    example = cast(model, task.example)
    pruner = torch_pruning.pruner.BasePruner(
        model,
        (example,) if isinstance(example, Tensor) else example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[model.get_submodule(name) for name in kind.last],
        num_heads={model.get_submodule(name): heads for name, heads in kind.heads.items()},
        output_transform=leaves,
    )
    pruner.step()
    kind.train(model, task, FINE_TUNING)
    return runner(model), bytes_of(model)


def by_nncf(model: nn.Module, task: Task, _: Kind, __: int | None) -> Smaller:
    """Weights in 8 bits, with calibration data."""
    import nncf

    inputs = cast(model, task.calibration(CALIBRATION))
    small = nncf.compress_weights(
        model, dataset=nncf.Dataset([take(inputs, slice(i, i + 1)) for i in range(CALIBRATION)])
    )
    return runner(small), bytes_of(small)


def by_torchao(model: nn.Module, _: Task, __: Kind, ___: int | None) -> Smaller:
    """Weights in 8 bits."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return runner(model), bytes_of(model)


TOOLS: dict[str, tuple[str, Callable[[nn.Module, Task, Kind, int | None], Smaller]]] = {
    "lilliput": ("lilliput", by_lilliput),
    "Torch-Pruning": ("torch-pruning", by_torch_pruning),
    "NNCF": ("nncf", by_nncf),
    "torchao": ("torchao", by_torchao),
}
"""Each tool's package and its route."""


def cast(model: nn.Module, inputs: Any) -> Any:
    """Inputs whose numbers are as wide as a network's."""
    wide = next(each.dtype for each in model.parameters() if each.is_floating_point())
    return mapped(lambda leaf: leaf.to(wide) if leaf.is_floating_point() else leaf, inputs)


def bytes_of(model: nn.Module, widest: int | None = None) -> int:
    """The bytes of a state: each storage once, what a tensor subclass holds, floats no wider than asked for."""
    sizes: dict[int, int] = {}
    waiting = [value for value in model.state_dict().values() if isinstance(value, Tensor)]
    while waiting:
        tensor = waiting.pop()
        if hasattr(tensor, "__tensor_flatten__"):
            waiting += [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
            continue
        width = tensor.element_size()
        if widest is not None and tensor.is_floating_point():
            width = min(width, widest)
        place = tensor.data_ptr() or id(tensor)
        sizes[place] = max(sizes.get(place, 0), tensor.numel() * width)
    return sum(sizes.values())


# ------------------------------------------------------------------------------------------------------------ verdict


@dataclass(frozen=True)
class Verdict:
    """What became of a network: a word, why, what it lost, and its bytes over those in float32."""

    what: str
    why: str = ""
    drop: float | None = None
    of_float32: float | None = None


def attempt(name: str, tool: str, trials: int | None = None) -> Verdict:
    """Let a tool make a network smaller, and judge what it gives."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kind = KINDS[name]
    dense, _, judged = kind.job()
    model, given, _ = kind.job()
    try:
        small, size = TOOLS[tool][1](model, given, kind, trials)
    except Exception as error:
        return Verdict(REFUSED, f"{type(error).__name__}: {error}".strip().split("\n")[0][:300])
    try:
        return judge(small, size, dense, judged)
    except Exception as error:
        return Verdict(WRONG, f"{type(error).__name__}: {error}".strip().split("\n")[0][:300])


def judge(small: Callable[..., Any], size: int, dense: nn.Module, task: Task) -> Verdict:
    """The verdict on a smaller network, which has only been seen to be made."""
    ratio = round(size / bytes_of(dense, widest=4), 3)
    for count in (1, 5):
        inputs = take(task.split("test")[0], slice(0, count))
        with torch.no_grad():
            said, right = leaves(call(small, inputs)), leaves(call(runner(dense), inputs))
        if outline(said) != outline(right):
            return Verdict(WRONG, f"outputs of {count} are {outline(said)} in place of {outline(right)}", None, ratio)
    lost = held.drop(task, runner(dense), small, FLOOR)
    assert lost is not None
    if not lost["held"]:
        return Verdict(WRONG, f"{lost['dense']:.3f} became {lost['score']:.3f}", lost["drop"], ratio)
    return Verdict(RIGHT if ratio <= SMALLER else LARGE, "", lost["drop"], ratio)


# ------------------------------------------------------------------------------------------------------------- record


def process(name: str, tool: str, trials: int | None) -> dict[str, Any]:
    """One attempt in a process of its own, which ends with all that it started, and the load it ran beside."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kinds", TOOLS[tool][0].replace("-", "_")])
    before, start = machine()["load"], time.monotonic()
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        child = context.Process(target=answer, args=(sender, folder, name, tool, trials))
        child.start()
        sender.close()
        try:
            done = receiver.poll(LIMIT)
            verdict = receiver.recv() if done else {"what": ENDLESS, "why": f"not done after {LIMIT} s"}
        except EOFError:
            verdict = {"what": REFUSED, "why": "the process crashed"}
        with contextlib.suppress(ProcessLookupError):  # of a session of its own, unless it has not come to that yet
            os.killpg(child.pid or 0, signal.SIGKILL)
        child.kill()
        child.join()
    return verdict | {"seconds": round(time.monotonic() - start, 1), "load": [before, machine()["load"]]}


def answer(sender: Connection, folder: str, name: str, tool: str, trials: int | None) -> None:
    """Attempt, quietly and with a folder of its own for files, and send the verdict."""
    os.setsid()
    os.environ |= {"TMPDIR": folder, "HF_HUB_OFFLINE": "1"}
    tempfile.tempdir = folder
    with open(os.devnull, "w") as nowhere:
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
    sender.send(vars(attempt(name, tool, trials)))
    sender.close()
    signal.pause()  # until the parent ends it together with its workers


def read() -> dict[str, Any]:
    """The record, or an empty one."""
    record: dict[str, Any] = {}
    if RECORD.exists():
        record = json.loads(RECORD.read_text(encoding="utf-8"))
    return {
        "what": "Small networks of other people's kinds: what each tool makes of them by its default route",
        "command": "python bench/kinds.py --peers-python peers/bin/python",
        "floor": FLOOR,
        "results": [],
        "runs": record.get("runs", {}),
    }


def kept(record: dict[str, Any]) -> None:
    """Count the runs of a record again, and write it."""
    runs = record["runs"]
    tools = [tool for tool in TOOLS if tool in runs]
    rows = [{"network": name} | {tool: shown(runs[tool].get(name)) for tool in tools} for name in KINDS]
    counts = {tool: Counter(run["what"] for run in runs[tool].values()) for tool in tools}
    for word in (RIGHT, REFUSED, LARGE, WRONG, ENDLESS):
        rows.append({"network": f"of {len(KINDS)}: {word}"} | {tool: counts[tool][word] for tool in tools})
    record |= {"results": rows, "counts": {tool: dict(counts[tool]) for tool in tools}}
    record |= {"machine": machine(), "versions": versions(), "commit": commit()}
    data = (json.dumps(record, indent=1) + "\n").encode()
    write(RECORD, lambda file: file.write(data))


def shown(run: dict[str, Any] | None) -> str:
    """A cell of the table."""
    if run is None:
        return "not run"
    return f"{run['of_float32']:.2f}" if run["what"] == RIGHT else run["what"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for and not on record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="all without any")
    parser.add_argument("--tools", nargs="*", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--peers-python", help="the Python that has the peers; this one without it")
    parser.add_argument("--trials", type=int, help="of lilliput's searches, in place of their seconds")
    parser.add_argument("--again", action="store_true", help="also what is on record")
    asked = parser.parse_args(arguments)
    if unknown := sorted(set(asked.kinds) - set(KINDS)):
        parser.error(f"no network {', '.join(unknown)}; there are {', '.join(KINDS)}")
    for tool in asked.tools:
        if tool != "lilliput" and asked.peers_python:
            command = [
                asked.peers_python,
                __file__,
                *asked.kinds,
                "--tools",
                tool,
                *(["--again"] if asked.again else []),
            ]
            subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, check=True)
            continue
        # The record is a tracked file, so that a "+" says nothing.
        of = (commit() or "").rstrip("+") if tool == "lilliput" else version(TOOLS[tool][0])
        trials = asked.trials if tool == "lilliput" else None
        for name in asked.kinds or KINDS:
            record = read()
            runs = {key: run for key, run in record["runs"].get(tool, {}).items() if run["of"] == of}
            if name in runs and not asked.again:
                continue
            runs[name] = process(name, tool, trials) | {"of": of} | ({"trials": trials} if trials else {})
            record["runs"][tool] = {key: runs[key] for key in KINDS if key in runs}
            kept(record)
            print(f"{tool:14s} {name:34s} {runs[name]}", flush=True)


if __name__ == "__main__":
    main()
