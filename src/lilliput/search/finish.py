"""The end of a search: the survivors measured side by side, the choice, the test split read once, the files."""

import json
import math
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from lilliput.cost.measure import latency, machine, profile
from lilliput.errors import StoreError
from lilliput.export import pack as pack_format
from lilliput.export.guard import flags
from lilliput.onnx.session import Session
from lilliput.recipe import Recipe
from lilliput.search import engine, post_onnx
from lilliput.search.choose import Choice, choose, examples_for, front
from lilliput.search.onnx_target import OnnxModel
from lilliput.search.points import Point
from lilliput.store import write
from lilliput.task import Task, length

if TYPE_CHECKING:
    from lilliput.search.shrink import Search

MEASURED = 14
SECONDS_EACH = 0.5


@dataclass(frozen=True)
class Result:
    """What a search found. `met`: whether the floor was met. `front`: what no other point beats, as plain data."""

    met: bool
    folder: Path
    summary: dict[str, Any]
    model: nn.Module | None

    @property
    def front(self) -> list[dict[str, Any]]:
        """The Pareto front of (validation score, bytes, latency)."""
        found: list[dict[str, Any]] = self.summary["front"]
        return found

    @property
    def chosen(self) -> dict[str, Any] | None:
        """The chosen point, or None where nothing meets the question."""
        found: dict[str, Any] | None = self.summary["chosen"]
        return found


def conclude(search: "Search") -> Result:
    """Measure, choose, read test, write DIR."""
    task, dense = search.task, search.dense
    search.show.phase("measuring the survivors side by side", 3)
    load_before = machine()["load"]
    best = _front(search)
    with search.clock.on("measure"):
        sessions: dict[str, Any] = {str(i): Session(point.proto) for i, point in enumerate(best)}
        search.clock.reserved_s = 0.0
        compiled = engine.sessions(search, best, search.clock.left(0.97) - 6) if search.for_latency else {}
        sessions |= {f"engine {i}": session for i, session in compiled.items()}
        seconds = max(2 * SECONDS_EACH, min(12.0, SECONDS_EACH * len(sessions), search.clock.left(0.97)))
        times = latency(sessions, task.example, seconds=seconds)
    for i, point in enumerate(best):
        point.latency, point.engine = times[str(i)], times.get(f"engine {i}")
        point.flags += flags(point.proto, dense.proto, point.latency, dense.latency or times["0"])
    search.show.advance()
    choice, rivals = _choose(search, best)
    winner = None if choice.winner is None else rivals[choice.winner]
    search.show.advance()
    with search.clock.on("measure"):
        tests = _test(search, winner)
    summary = _summary(search, best, rivals, choice, winner, tests, load_before)
    written = winner or dense
    if written in best and best.index(written) in compiled:
        summary["chosen" if winner else "dense"]["engine"] = engine.keep(
            search, written, compiled[best.index(written)], search.folder / "engine"
        )
    _write(search, winner, summary)
    search.show.advance()
    return Result(winner is not None, search.folder, summary, None if winner is None else winner.model)


def _front(search: "Search") -> list[Point]:
    """The dense point, then at most MEASURED others: fronts of (loss, packed, ONNX bytes, MACs) peeled in turn."""
    task, dense = search.task, search.dense
    rest = [point for point in search.points if point is not dense]
    unique: dict[tuple[int, int, float], Point] = {}
    for point in rest:
        unique.setdefault((point.packed_bytes, point.onnx_bytes, point.distance), point)
    rest, chosen = list(unique.values()), list[Point]()
    while rest and len(chosen) < MEASURED:
        costs = [(task.loss_of(dense.score.value, p.score.value), p.packed_bytes, p.onnx_bytes, p.macs) for p in rest]
        layer = [rest[i] for i in front(costs)]
        layer.sort(key=lambda point: task.loss_of(dense.score.value, point.score.value))
        chosen += layer
        rest = [point for point in rest if point not in layer]
    return [dense, *chosen[:MEASURED]]


def _price(search: "Search", point: Point) -> float:
    objective = search.question.objective
    if objective == "latency":  # what is as fast within the noise of a measurement is chosen by its size
        step = round(math.log(point.fastest_ms, 1.05))
        return step + min(point.packed_bytes / (search.dense.packed_bytes + 1.0), 0.999)
    return float(point.macs if objective == "macs" else point.packed_bytes)


def _choose(search: "Search", best: list[Point]) -> tuple[Choice, list[Point]]:
    question, task, dense = search.question, search.task, search.dense
    limit = None if question.floor is None else question.floor.points(dense.score.value)
    rivals = best[1:] or best
    fits = [
        (question.max_bytes is None or point.onnx_bytes <= question.max_bytes)
        and (question.max_latency_ms is None or point.fastest_ms <= question.max_latency_ms)
        for point in rivals
    ]
    choice = choose(
        task,
        dense.score,
        [point.score for point in rivals],
        [_price(search, point) for point in rivals],
        floor=limit,
        fits=fits,
        distance=[point.distance for point in rivals],
        seed=search.seed,
    )
    return choice, rivals


def _test(search: "Search", winner: Point | None) -> dict[str, Any]:
    """The test split, read once, after the choice: both scores, the drop and its bootstrap interval."""
    task = search.task
    if not task.has("test") or winner is None:
        return {}
    inputs, _ = task.split("test")
    dense, chosen = (
        task.rate(torch.from_numpy(np.array(Session(point.proto).outputs(inputs))), "test")
        for point in (search.dense, winner)
    )
    found: dict[str, Any] = {"dense": dense.value, "chosen": chosen.value}
    if dense.outcomes is not None and chosen.outcomes is not None:
        gap = (dense.outcomes - chosen.outcomes) * (1 if task.higher_is_better else -1)
        draws = np.random.default_rng(search.seed).integers(0, len(gap), (1000, len(gap)))
        found["interval"] = [_round(x) for x in np.quantile(gap[draws].mean(1), [0.025, 0.975])]
    return found


def layers(point: Point, example: Any) -> list[dict[str, Any]]:
    """Each stored tensor of two and more dimensions: what it is, what it keeps, how wide, its share of the time."""
    shares = profile(point.structure.fill(point.stored), example)
    rows = []
    for name, stored in point.stored.items():
        if len(stored.shape) < 2:
            continue
        rows.append(
            {
                "name": name,
                **stored.facts(),
                "shape": list(stored.shape),
                "values": stored.values,
                "bits": round(stored.bits, 2),
                "share_of_time": shares.get(name),
            }
        )
    return rows


def _summary(
    search: "Search",
    best: list[Point],
    rivals: list[Point],
    choice: Choice,
    winner: Point | None,
    tests: dict[str, float],
    load_before: Any,
) -> dict[str, Any]:
    task, dense, clock = search.task, search.dense, search.clock

    def row(point: Point) -> dict[str, Any]:
        found = point.row(task)
        if point in rivals:
            i = rivals.index(point)
            found |= {
                "drop_val": _round(choice.drops[i]),
                "drop_corrected": _round(choice.corrected[i]),
                "drop_corrected_interval": [_round(x) for x in choice.interval[i]],
                "eligible": bool(choice.eligible[i]),
            }
        return found

    costs = [
        (task.loss_of(dense.score.value, p.score.value), p.onnx_bytes, p.packed_bytes, p.latency.median_ms)
        for p in best
    ]
    shown = [best[i] for i in front(costs)]
    nearest = (
        winner if winner is not None else (rivals[int(np.argmin(choice.corrected))] if len(choice.corrected) else dense)
    )
    i = rivals.index(nearest) if nearest in rivals else None
    here = machine()
    chosen = None if winner is None else row(winner) | {"layers": layers(winner, task.example)}
    first = row(dense) | {"layers": layers(dense, task.example)}
    if tests:
        first["test"] = _round(tests["dense"])
        assert chosen is not None
        chosen["test"] = _round(tests["chosen"])
    floor = search.question.floor
    summary: dict[str, Any] = {
        "format": 2,
        "task": task.name,
        "metric": task.metric_name,
        "higher_is_better": task.higher_is_better,
        "seed": search.seed,
        "floor": None if floor is None else floor.points(dense.score.value),
        "objective": search.question.objective,
        "max_bytes": search.question.max_bytes,
        "max_latency_ms": search.question.max_latency_ms,
        "budget_s": clock.budget_s,
        "trials": search.trials,
        "met": winner is not None,
        "machine": {**here, "load_before": load_before, "load_after": here["load"]},
        "versions": versions(),
        "commit": commit(),
        "command": search.command or _command(search),
        "dense": first,
        "chosen": chosen,
        "front": [row(point) for point in shown],
        "nearest": None if winner is not None else row(nearest),
        "drop_val": None if i is None else _round(choice.drops[i]),
        "drop_corrected": None if i is None else _round(choice.corrected[i]),
        "drop_corrected_interval": None if i is None else [_round(x) for x in choice.interval[i]],
        "optimism": _round(choice.optimism),
        "drop_test": _round(task.loss_of(tests["dense"], tests["chosen"])) if tests else None,
        "drop_test_interval": tests.get("interval"),
        "examples": _examples(task),
        "draws": choice.draws,
        "augmentations": task.draws,
        "examples_for_half_interval": None
        if i is None
        else examples_for(task, dense.score, nearest.score, choice.interval[i]),
        "left_alone": [{"name": name, "reason": reason} for name, reason in search.left],
        "sensitivity": search.table,
        "points": search.tried,
        "damaged": search.store.damaged,
        "steps_per_s": round(search.train_steps_per_s, 2),
    }
    summary["wall_s"] = round(clock.now, 2)
    summary["shares"] = clock.shares()
    return summary


def _examples(task: Task) -> dict[str, int]:
    """How many examples each split holds, and how many training ones calibrate."""
    found = {split: length(task.split(split)[0]) for split in ("train", "val", "test") if task.has(split)}
    return found | {"calibration": min(256, found["train"])}


def _round(value: Any) -> float:
    return round(float(value), 6)


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("lilliput", "torch", "onnx", "onnxruntime", "onnxscript", "optuna", "torch-pruning", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the checkout that lilliput runs from, with "+" when it is changed; None when it is installed."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
        if found.returncode or not (here / "../../../pyproject.toml").resolve().exists():
            return None
        changed = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _command(search: "Search") -> str:
    """The call that repeats a search that was started from Python."""
    argv = [Path(sys.argv[0]).name, *sys.argv[1:]] if sys.argv and sys.argv[0] else ["python"]
    return shlex.join(argv)


def _write(search: "Search", winner: Point | None, summary: dict[str, Any]) -> None:
    """Every file of DIR, each whole or not at all; the dense model's where nothing met the floor."""
    point, folder = winner or search.dense, search.folder
    pack_format.write(point.structure.fill(point.stored), point.stored, folder / "model.lil")
    data = point.proto.SerializeToString()
    write(folder / "model.onnx", lambda file: file.write(data))
    model = point.model if point.model is not None else search.model
    state = post_onnx.tensors(point) if isinstance(model, OnnxModel) else model.state_dict()
    held = save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()})
    write(folder / "model.safetensors", lambda file: file.write(held))
    text = (
        Recipe.parse(point.recipe).toml()
        if point.model is not None or point is search.dense
        else ("# Made from the exported file: there are no stages that could be applied or trained again.\n")
    )
    write(folder / "recipe.toml", lambda file: file.write(text.encode()))
    sizes = {
        name: (folder / name).stat().st_size for name in ("model.onnx", "model.lil", "model.safetensors", "recipe.toml")
    }
    if sizes["model.onnx"] != point.onnx_bytes or sizes["model.lil"] != point.packed_bytes:
        raise StoreError(
            f"shrink: the files must have the sizes that were counted ({point.onnx_bytes} and "
            f"{point.packed_bytes} bytes), got {sizes['model.onnx']} and {sizes['model.lil']}."
        )
    for name in ("engine/model.c", "engine/libmodel.so"):
        if "engine" in (summary["chosen"] or summary["dense"]) and (folder / name).is_file():
            sizes[name] = (folder / name).stat().st_size
    summary["files"] = sizes
    encoded = json.dumps(summary, indent=1, allow_nan=False).encode()
    write(folder / "summary.json", lambda file: file.write(encoded))
    from lilliput.report.page import write as write_page

    write_page(folder)
