"""Growing bonsai networks (2023): a recurrent network trained with a penalty that saturates becomes a graph to read.

Three tasks on sequences of -1 and 1: the parity of all bits so far; whether the brackets so far are balanced (-1 opens,
1 closes; nested at most twice, and what closed too much or nested deeper never is again), and the input of three steps
ago. A cell of eight states learns each, first without the penalty and then with it; the weights nearest zero are cut
and the rest rounded as far as nothing changes on validation sequences; and the graph of what is left is checked, as a
program, on every sequence of up to twelve steps. Training sequences have eight steps.

Within a seed, initialisations are tried in turn until GROWN of them have learnt the task (at most INITS; how many were
needed is in the rows). These are grown and pruned, and of those that are exact on the validation sequences the one with
the fewest weights is the seed's.

Source: Casey Primozic, Growing bonsai networks with RNNs, 2023, cprimozic.net/blog (its brackets have no closing one
too many, and its deepest nesting is a setting).
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lilliput
from lilliput.code.base import copy_model
from lilliput.errors import NotSupported
from lilliput.evidence import folder
from lilliput.export.bonsai import Graph, difference, every, graph, python, svg
from lilliput.nets.bonsai import Bonsai
from lilliput.prune.bonsai import Clip, Saturating

INITS, GROWN, LONG, MARGIN = 24, 3, 64, 0.1


# --------------------------------------------------------------------------------------------------------------- tasks


def parity(x: Tensor) -> Tensor:
    """1 where the number of ones so far is odd: (n, T) -> (n, T), like all of these."""
    return (x > 0).long().cumsum(1) % 2 * 2.0 - 1


def delayed(x: Tensor, steps: int = 3) -> Tensor:
    """The input of so many steps ago, and -1 before there is one."""
    return torch.cat([-torch.ones(len(x), steps), x[:, :-steps]], 1)


def balanced(x: Tensor, deepest: int = 2) -> Tensor:
    """1 where every bracket so far is closed, none was closed before it opened, and none was nested deeper."""
    depth = (-x).cumsum(1)
    good = ((depth >= 0) & (depth <= deepest)).long().cummin(1).values.bool()
    return (good & (depth == 0)) * 2.0 - 1


def drawn(count: int, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (count, length), generator=generator) * 2.0 - 1


def nested(count: int, length: int, generator: torch.Generator, deepest: int = 2) -> Tensor:
    """Three quarters that never close too much nor nest too deep, which few do by chance; the rest drawn at random."""
    x = drawn(count, length, generator)
    depth, kept = torch.zeros(count), torch.arange(count) % 4 > 0
    for t in range(length):
        x[:, t] = torch.where(kept & (depth == 0), -1.0, torch.where(kept & (depth == deepest), 1.0, x[:, t]))
        depth -= x[:, t]
    return x


TASKS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[int, int, torch.Generator], Tensor]]] = {
    "parity": (parity, drawn), "brackets": (balanced, nested), "delay": (delayed, drawn)}  # fmt: skip


def right(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 for a sequence all of whose outputs have the right sign, and are at least MARGIN away from zero."""
    return (outputs * targets > MARGIN).flatten(1).all(1).float()


def task_of(name: str, seed: int, length: int, longest: int) -> lilliput.Task:
    """Random sequences to train on, longer ones to decide by, and the test: every sequence of the longest length.

    Every shorter sequence is the beginning of one of those, and its last output is among theirs. What is decided by
    sequences that are too short may hold a state that fades, which rounding brings about.
    """
    answer, draw = TASKS[name]
    generator = torch.Generator().manual_seed(seed)
    x, val = draw(4096, length, generator), draw(768, longest + 4, generator)
    pairs = [(part[..., None], answer(part)[..., None]) for part in (x, val, every(longest)[..., 0])]
    return lilliput.Task(f"bonsai-{name}", *pairs, loss="mse", metric=right, batch_size=64)


# ------------------------------------------------------------------------------------------------------------- training


def after(model: Bonsai, task: lilliput.Task, steps: int, seed: int, rules: tuple[lilliput.Rule, ...] = ()) -> Bonsai:
    train = lilliput.Train(steps, lr=lilliput.Cosine(1e-2), weight_decay=0.0, rules=rules, seed=seed)
    trained = train(model, task, lilliput.Reference(copy_model(model), task))
    assert isinstance(trained, Bonsai)
    return trained


def kept(model: Bonsai) -> tuple[int, int]:
    """How many weights are not zero, of how many (no biases, no first states)."""
    weights = [layer.weight for cell in model.cells for layer in (cell.output, cell.recurrent)]
    return sum(int(w.count_nonzero()) for w in weights), sum(w.numel() for w in weights)


def grown(
    task: lilliput.Task, states: int, learn: int, grow: int, seed: int, rule: Saturating, wanted: int
) -> tuple[Bonsai, Bonsai, int]:
    """(what had learnt the task, the same after growing and pruning, how many initialisations were tried)."""
    candidates: list[tuple[float, int, Bonsai, Bonsai]] = []
    for tried in range(INITS):
        torch.manual_seed(1000 * seed + tried)
        start = after(Bonsai(state=(states,)), task, learn, seed)
        if task.score(start).value < 0.8 and (candidates or tried < INITS - 1):
            continue
        for cell in start.cells:
            cell.noise = 0.2
        pruned = Clip()(after(start, task, grow, seed, (rule,)), task, None)
        assert isinstance(pruned, Bonsai)
        candidates.append((-task.score(pruned).value, kept(pruned)[0], start, pruned))
        if sum(value == -1 for value, *_ in candidates) == wanted:
            break
    _, _, start, pruned = min(candidates, key=lambda one: one[:2])
    return start, pruned, tried + 1


def row(
    name: str, seed: int, task: lilliput.Task, states: int, learn: int, grow: int, wanted: int = GROWN
) -> tuple[dict[str, Any], Graph]:
    began = time.process_time()
    start, pruned, tried = grown(task, states, learn, grow, seed, Saturating(0.2, 0.1, 5.0, 0.05), wanted)
    plain = after(start, task, grow, seed)
    few, all_ = kept(pruned)
    cut = lilliput.Prune(1 - few / all_)(plain, task, None)
    clipped = Clip()(plain, task, None)
    assert isinstance(cut, Bonsai) and isinstance(clipped, Bonsai)
    assert kept(cut)[0] == few
    drawing = graph(pruned)
    answer, _ = TASKS[name]
    x = drawn(512, LONG, torch.Generator().manual_seed(99))
    far = lilliput.task.predict(pruned, x[..., None])
    largest, differs = difference(pruned, task.split("test")[0].shape[1])
    return {
        "task": name, "seed": seed, "exact": task.score(pruned, "test").value,
        "exact_unpruned": task.score(start, "test").value, "kept": few, "weights": all_,
        "nodes": drawing.nodes, "edges": drawing.edges, "states": len(drawing.states),
        "program_differs": differs, "largest_difference": float(f"{largest:.2g}"),
        f"exact_{LONG}_steps": float(right(far, answer(x)[..., None]).mean()),
        "baseline_exact": task.score(cut, "test").value, "baseline_kept_to_stay_exact": kept(clipped)[0],
        "baseline_clipped_exact": task.score(clipped, "test").value,
        "initialisations": tried, "cpu_s": round(time.process_time() - began, 1),
    }, drawing  # fmt: skip


def measure(quick: bool) -> dict[str, Any]:
    """A row for each task and seed; in full size the smallest exact graph of each task is drawn for the docs."""
    torch.set_num_threads(1)
    names, seeds, sizes, length, longest = (
        (["parity"], 1, (5, 100, 60, 1), 5, 6) if quick else (list(TASKS), 3, (8, 300, 800, GROWN), 8, 12)
    )
    rows, smallest = [], {}
    for name in names:
        for seed in range(seeds):
            result, drawing = row(name, seed, task_of(name, seed, length, longest), *sizes)
            rows.append(result)
            if result["exact"] == 1 and (name not in smallest or drawing.edges < smallest[name].edges):
                smallest[name] = drawing
    for name, drawing in {} if quick else smallest.items():
        try:
            Path(folder().parent, "docs", "images", f"bonsai-{name}.svg").write_text(svg(drawing))
        except NotSupported as error:
            print(error)
    return {
        "claim": "a saturating penalty and pruning grow a recurrent network into a small graph that computes parity, "
                 "bracket balancing or a delay line exactly",
        "baseline": "the same network from the same start, trained for as many steps without the penalty: "
                    "baseline_exact is after magnitude pruning to the same number of weights, "
                    "baseline_kept_to_stay_exact what is left when its weights too are cut as far as validation allows",
        "sequences": 2**longest, "steps": longest, "trained_on_steps": length, "margin": MARGIN, "rows": rows,
        "programs": {name: python(drawing) for name, drawing in smallest.items()},
    }  # fmt: skip
