"""The rival: what a competent engineer makes of a network by a fixed recipe, in counted processor seconds.

python bench/rival.py TARGET --floor 1% --seconds 360 [--for latency] [--seed 0] [--folder DIR]

The recipe, the same for every job: fold rarely used rows of tables into one, or drop a table, without training; train
smaller networks of the same family from labels and from the dense network's outputs, all sizes together first, then one
size, one table, one layer at a time; train the nearest misses longer with int8 weights in the loop (torch's own fake
quantization); write the best by ordinary tools (float16, int8 weights, ONNX Runtime's dynamic and static int8, leaving
out the operators that it gets most wrong); take the cheapest file that stays within the floor on val, as it stands.
Nothing of lilliput is used but the task's data and score and the clock that files are timed with.
"""

import argparse
import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch are loaded

import held
import numpy as np
import rival_files
import torch
from onnx import ModelProto
from rival_family import Int8, Plan, Work, arguments, estimate, fold, rounded, scaled, tables
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lilliput import Task
from lilliput.cost.measure import latency, machine
from lilliput.export.onnx import Session
from lilliput.record import commit, versions
from lilliput.task import call, predict, take

LENGTHS = (1.0, 0.25)  # of a training, in slots: some data is learnt by heart in a long one
HIGH = 1e-2  # a learning rate that is tried beside the usual one
WIDTH = 4  # an argument with smaller values is no width that goes down with the others (spans of filters, layers)
RARE = 64  # rows that a table needs before some of them are looked at
LARGEST = 512  # of them kept, at most, where half of a table is not


# --------------------------------------------------------------------------------------------------------- the recipe


def _counted(into: Tensor, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    into += torch.bincount(inputs[0].flatten(), minlength=len(into))


def uses(work: Work) -> dict[str, Tensor]:
    """How often training reads each row of each table."""
    found = {name: torch.zeros(table.num_embeddings, dtype=torch.long) for name, table in tables(work.dense).items()}
    hooks = [
        table.register_forward_pre_hook(partial(_counted, found[name])) for name, table in tables(work.dense).items()
    ]
    if hooks:
        predict(work.dense, work.task.probe("train").inputs)
    for hook in hooks:
        hook.remove()
    return found


def knobs(work: Work, plan: Plan) -> list[tuple[str, int | None]]:
    """The arguments, and places in them, that may be smaller: the outputs keep their shape and no table loses rows."""
    example = take(work.task.probe("train").inputs, slice(0, 8))
    shape = call(work.dense, example).shape
    rows = [table.num_embeddings for table in tables(work.dense).values()]
    found: list[tuple[str, int | None]] = []
    for name, value in plan.settings:
        plural = isinstance(value, tuple) and all(type(v) is int for v in value)
        for place in range(len(value)) if plural else [None] if type(value) is int else []:
            try:
                model = type(work.dense)(**{**dict(plan.settings), name: scaled(value, 0.5, place)}).eval()
                same = [table.num_embeddings for table in tables(model).values()] == rows
                if same and call(model, example).shape == shape and estimate(model) < estimate(work.dense):
                    found.append((name, place))
            except Exception:  # a size that others depend on
                continue
    return found


def untrained(work: Work, plan: Plan) -> Plan:
    """The dense network with rarely used rows folded, as far as half of the floor goes, no training."""
    if not work.keep(plan, work.dense, "as it is"):
        return plan
    model = copy.deepcopy(work.dense)
    for name, table in sorted(tables(work.dense).items(), key=lambda item: -item[1].weight.numel()):
        order = work.use[name].argsort(descending=True, stable=True)
        levels = [2**i for i in range(16) if 2**i <= min(table.num_embeddings // 2, 64 * LARGEST)]
        for kept in [0, *levels] if table.num_embeddings >= RARE else []:
            trial = copy.deepcopy(model)
            fold(trial, name, order, kept, work.use[name])
            if work.drop(rounded(trial)) <= work.floor / 2:
                model, plan = trial, replace(plan, kept=tuple(sorted((*plan.kept, (name, kept)))))
                break
    work.keep(plan, model, "rare rows folded, not trained")
    return plan


def ladder(work: Work, plan: Plan, places: list[tuple[str, int | None]]) -> None:
    """All sizes smaller together, until two in a row miss; the first rung says what to train from, and how long."""
    missed, settings = 0, dict(plan.settings)
    places = [(name, place) for name, place in places if _least(settings[name]) >= WIDTH]
    for rung, factor in enumerate((0.5, 0.25, 0.125, 0.0625, 0.03, 0.015)):
        smaller = shrunk(plan, places, factor)
        if work.left < 0.4 * work.seconds or missed == 2 or any(smaller == item[2] for item in work.found):
            return
        if not rung:
            first(work, smaller)
            continue
        missed = 0 if work.attempt(smaller) else missed + 1


def first(work: Work, plan: Plan) -> None:
    """Each way of training on one plan; the best becomes the way of all later ones."""
    began = len(work.found)
    ways = [(distilled, length) for length in LENGTHS for distilled in (True, False)]
    ways = ways if work.task.labelled else [way for way in ways if way[0]]
    for work.distilled, work.length in ways:
        work.attempt(plan)
    drops = [item[1] for item in work.found[began:]]
    work.distilled, work.length = ways[int(np.argmin(drops))]
    usual, work.rate = work.rate, HIGH
    work.attempt(plan)
    if work.found[-1][1] > min(drops):
        work.rate = usual


def shrunk(plan: Plan, places: list[tuple[str, int | None]], factor: float) -> Plan:
    """Every size times a factor."""
    settings = dict(plan.settings)
    for name, place in places:
        settings[name] = scaled(settings[name], factor, place)
    return replace(plan, settings=tuple(settings.items()))


def moves(work: Work, plan: Plan, places: list[tuple[str, int | None]]) -> Iterator[Plan]:
    """What may be smaller about a plan, one thing each: a size, a layer less, a table's rows or the whole table."""
    settings = dict(plan.settings)
    for name in dict.fromkeys(name for name, _ in places):
        for place in [place for other, place in places if other == name and (place or 0) < _length(settings[name])]:
            yield replace(plan, settings=tuple({**settings, name: scaled(settings[name], 0.5, place)}.items()))
        if isinstance(settings[name], tuple) and len(settings[name]) > 1:
            fewer = replace(plan, settings=tuple({**settings, name: settings[name][:-1]}.items()))
            if _works(work, fewer):
                yield fewer
    kept = dict(plan.kept)
    for name, table in tables(work.dense).items():
        rows = kept.get(name, table.num_embeddings)
        for fewer_rows in dict.fromkeys((0, rows // 4)) if rows else ():
            if rows >= 8 or not fewer_rows:
                yield replace(plan, kept=tuple(sorted({**kept, name: fewer_rows}.items())))
    yield shrunk(plan, [p for p in places if (p[1] or 0) < _length(settings[p[0]])], 0.7)


def _least(value: Any) -> int:
    return min(value) if isinstance(value, tuple) else int(value)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, tuple) else 1


def _works(work: Work, plan: Plan) -> bool:
    try:
        call(work.build(plan).eval(), take(work.task.probe("train").inputs, slice(0, 2)))
        return True
    except Exception:  # layers that others depend on
        return False


def descend(work: Work, places: list[tuple[str, int | None]]) -> None:
    """One thing smaller at a time from the best so far, that which saves most first, until the time for it is over."""
    failed: set[Plan] = set()
    while work.left > 0.3 * work.seconds:
        here = work.best[2]
        known = {item[2] for item in work.found} | failed
        options = [plan for plan in moves(work, here, places) if plan not in known and plan != here]
        if not options:
            return
        plan = min(options, key=lambda plan: estimate(work.build(plan)))
        if not work.attempt(plan):
            failed.add(plan)


def longer(work: Work) -> None:
    """The nearest misses that would be cheaper go on for three slots, int8 weights in the loop."""
    tried: set[Plan] = set()
    while work.left > 0.15 * work.seconds:
        best = work.best[0]
        near = [item for item in work.found if item[0] < best and item[2] not in tried and item[1] <= 3 * work.floor]
        if not near:
            return
        _, _, plan, model = min(near, key=lambda item: item[1])
        tried.add(plan)
        model = copy.deepcopy(model)
        changed = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding)]
        for module in changed:
            parametrize.register_parametrization(module, "weight", Int8())
        work.train(model, min(3 * work.length * work.slot, work.left - 0.1 * work.seconds), work.distilled)
        for module in changed:
            parametrize.remove_parametrizations(module, "weight")
        work.keep(plan, model, "trained on with int8 weights")


# -------------------------------------------------------------------------------------------------------------- files


def candidates(work: Work) -> Iterator[tuple[str, Callable[[], ModelProto]]]:
    """Files of the three cheapest networks within the floor and of the dense one, the cheapest first."""
    example = take(work.task.probe("train").inputs, slice(0, 2))
    within = sorted((item for item in work.found if item[1] <= work.floor), key=lambda item: item[0])
    for _, _, plan, model in [*within[:3], work.found[0]]:
        proto = rival_files.exported(model, example)
        for name, make in rival_files.formats(proto):
            yield f"{name}; {plan.words()}", make
        prepared = rival_files.static(proto, rival_files.feeds(proto, work.task))
        for every in (False, True):
            yield (
                f"static int8{', every operator' if every else ''}; {plan.words()}",
                lambda p=prepared, e=every: p.quantized(every=e),  # type: ignore[misc]
            )
        if work.latency:
            yield from less(prepared, plan)


def less(prepared: rival_files.Static, plan: Plan) -> Iterator[tuple[str, Callable[[], ModelProto]]]:
    """Static int8 without the operators that it gets most wrong, more and more of them, with two kinds of ranges."""
    yield f"static int8, percentiles; {plan.words()}", lambda: prepared.quantized(method="Percentile")
    worst = prepared.worst()
    for share in (0.05, 0.1, 0.2, 0.4):
        out = tuple(worst[: max(1, round(share * len(worst)))])
        yield (
            f"static int8 without {len(out)} products; {plan.words()}",
            lambda out=out: prepared.quantized(out),  # type: ignore[misc]
        )


def finished(work: Work) -> tuple[dict[str, Any], ModelProto, ModelProto]:
    """The cheapest file within the floor on val, the dense one's file, and what is known about it."""
    dense = rival_files.exported(work.dense, take(work.task.probe("train").inputs, slice(0, 2)))
    base, rows = Session(dense), []
    chosen: tuple[float, str, ModelProto, float] = (math.inf, "", dense, 0.0)
    for name, make in candidates(work):
        if work.left < 0 and chosen[1]:
            break
        try:
            proto = make()
            session = Session(proto)
            drop = work.drop(session)
        except Exception as error:  # each tool fails in its own way; the next may not
            rows.append({"file": name, "failed": f"{type(error).__name__}: {str(error)[:120]}"})
            continue
        times = latency({"dense": base, "small": session}, work.task.example, seconds=0.6, clock=time.process_time)
        price = times["small"].median_ms / times["dense"].median_ms if work.latency else float(proto.ByteSize())
        rows.append(
            {"file": name, "bytes": proto.ByteSize(), "speedup": times["small"].ratio, "drop_val": round(drop, 6)}
        )
        if drop <= work.floor and price < chosen[0]:
            chosen = (price, name, proto, drop)
    return {"how": chosen[1], "drop_val": round(chosen[3], 6), "files": rows}, chosen[2], dense


def rival(
    model: nn.Module, task: Task, floor: float, seconds: float, latency_wanted: bool = False, seed: int = 0
) -> tuple[dict[str, Any], ModelProto, ModelProto]:
    """Run the recipe.

    Args:
        model: the dense network.
        task: what must be preserved.
        floor: what may be lost on val, in units of the metric.
        seconds: processor time.
        latency_wanted: whether the fastest file is asked for, not the smallest.
        seed: of initial weights and batches.

    Returns:
        The record, the chosen file, the dense network's file.
    """
    work = Work(model.eval(), task, floor, seconds, seed, latency_wanted)
    work.use = uses(work)
    plan = Plan(tuple(arguments(model).items()))
    plan = untrained(work, plan)
    places = knobs(work, plan)
    if places:
        ladder(work, plan, places)
        descend(work, places)
        longer(work)
    record, small, dense = finished(work)
    record |= {"floor": floor, "val": round(task.score(Session(small), "val").value, 6), "bytes": small.ByteSize(),
               "dense_bytes": dense.ByteSize(), "seconds": round(seconds - work.left, 1),
               "allowed_s": round(seconds, 1), "held_out": held.drop(task, Session(dense), Session(small), floor),
               "attempts": work.attempts}  # fmt: skip
    return record, small, dense


def main() -> None:
    """Read the command line and write the record and the files."""
    from lilliput.search import ask
    from lilliput.targets.function import resolve

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("target")
    parser.add_argument("--floor", default="1%")
    parser.add_argument("--seconds", type=float, default=360.0)
    parser.add_argument("--for", dest="objective", choices=("size", "latency"), default="size")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("build/rival"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model, task = resolve(asked.target)
    before = machine()
    floor = ask.floor(asked.floor).points(task.score(model, "val").value)
    record, small, dense = rival(model, task, floor, asked.seconds, asked.objective == "latency", asked.seed)
    times = latency({"dense": Session(dense), "small": Session(small)}, task.example, seconds=3.0,
                    clock=time.process_time)  # fmt: skip
    record |= {"speedup": times["small"].ratio, "dense_ms": times["dense"].median_ms, "ms": times["small"].median_ms}
    record |= {"command": " ".join(["python bench/rival.py", *sys.argv[1:]]), "machine": before,
               "load_after": machine()["load"], "versions": versions(), "commit": commit()}  # fmt: skip
    asked.folder.mkdir(parents=True, exist_ok=True)
    for name, proto in (("rival", small), ("dense", dense)):
        (asked.folder / f"{name}.onnx").write_bytes(proto.SerializeToString())
    (asked.folder / "rival.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(
        json.dumps(
            {key: record[key] for key in ("how", "bytes", "dense_bytes", "speedup", "val", "held_out", "seconds")}
        )
    )


if __name__ == "__main__":
    main()
