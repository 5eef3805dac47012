"""JaxPruner (2023): one small API holds the field's pruning methods, at little cost over dense training.

Every method that trains is given the same steps from the same random weights on the two MNIST-1D networks (60 epochs of
35 steps of 100 signals) and on ResNet-20 with digits of 8x8 (2 epochs of 50 steps of 60): AdamW at 5e-3 on one cycle
with 15% warm-up, weight decay 5e-4, no augmentation, no distillation; masks move every 35 steps (3 for digits) from
10% to 75% of the training, and only weight matrices are pruned. Judged on 10,000 signals (1,000 digits) that nothing
was tuned on; five seeds where JaxPruner's numbers are known and for the best methods, three elsewhere. Trainings are
kept in the cache, so that a run that was cut off goes on.

Source: J. H. Lee, W. Park, N. Mitchell, J. Pilault, J. Obando-Ceron, H.-B. Kim, N. Lee, E. Frantar, Y. Long,
A. Yazdanbakhsh, S. Agrawal, S. Subramanian, X. Wang, S.-C. Kao, X. Zhang, T. Gale, A. Bik, W. Han, M. Ferev, Z. Han,
H.-S. Kim, Y. Dauphin, G. K. Dziugaite, P. S. Castro and U. Evci, JaxPruner, 2023, arXiv:2304.14082, table 1.
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput.data import cache_folder, digits, mnist1d, stratified
from lilliput.evidence import each, interval
from lilliput.nets.mnist1d import CNN, MLP
from lilliput.nets.resnet import ResNet
from lilliput.prune.acdc import ACDC
from lilliput.prune.growing import Growing
from lilliput.prune.l0 import L0
from lilliput.prune.movement import Movement
from lilliput.prune.rigl import RigL
from lilliput.prune.rounds import Rounds
from lilliput.prune.soft_threshold import STR
from lilliput.prune.sparse import SET, StaticSparse
from lilliput.prune.ste import STE
from lilliput.prune.topkast import TopKAST
from lilliput.schedule import Cosine, Cubic, Schedule
from lilliput.stage import Stage

SPARSITIES = (0.8, 0.9, 0.95, 0.98)
FIVE = ("dense", "global magnitude", "RigL", "STE", "Taylor", "movement")  # of five seeds, the others of three

# What JaxPruner itself reached: (network, method) -> accuracy at 90, 95 and 98% zeros, one run each; the dense runs.
THEIRS = {
    ("MLP", "global magnitude"): (0.667, 0.657, 0.549),
    ("MLP", "RigL"): (0.648, 0.589, 0.504),
    ("CNN", "global magnitude"): (0.724, 0.489, 0.255),
    ("CNN", "RigL"): (0.494, 0.467, 0.406),
}
DENSE = {"MLP": 0.672, "CNN": 0.877}


# -------------------------------------------------------------------------------------------------------------- methods

Parts = tuple[tuple[Stage, ...], tuple[lilliput.Rule, ...]]  # before the training, and in it
Method = Callable[[float, int, int], Parts]  # of sparsity, steps between masks, seed


def gradual(score: str = "magnitude", allocation: str = "erk") -> Method:
    """Masks by a score, more zeros by the cubic schedule."""
    return lambda sparsity, every, seed: (
        (),
        (lilliput.Prune(rising(sparsity), score, allocation=allocation, every=every, seed=seed),),
    )


def rising(sparsity: float) -> Schedule:
    """The schedule of all that do not bring their own."""
    return Cubic(sparsity, begin=0.1)


def rule(make: Callable[[float, int, int], lilliput.Rule]) -> Method:
    """A rule alone."""
    return lambda sparsity, every, seed: ((), (make(sparsity, every, seed),))


def at_first(stage: Callable[[float, int], Stage]) -> Method:
    """Pruned before the training, whose masks then stay."""
    return lambda sparsity, every, seed: ((stage(sparsity, seed),), ())


METHODS: dict[str, Method] = {
    "dense": lambda sparsity, every, seed: ((), ()),
    # JaxPruner's nine; its global pruners divide each tensor's scores by their norm
    "magnitude": gradual(),
    "random": gradual("random"),
    "saliency": gradual("saliency"),
    "global magnitude": gradual(allocation="normalized"),
    "global saliency": gradual("saliency", "normalized"),
    "static": rule(lambda s, every, seed: StaticSparse(s, seed=seed)),
    # sixty updates and no more: half of the weights move at first, which did better on the validation split than 0.3
    "SET": rule(lambda s, every, seed: SET(s, fraction=0.5, every=every, seed=seed)),
    "RigL": rule(lambda s, every, seed: RigL(s, fraction=0.5, every=every, seed=seed)),
    "STE": rule(lambda s, every, seed: STE(rising(s), every=every, allocation="normalized")),
    # the others
    "LAMP": gradual("lamp", "global"),
    "Taylor": gradual("taylor", "normalized"),
    "movement": rule(lambda s, every, seed: Movement(rising(s), every=every, allocation="normalized")),
    "AC/DC": rule(lambda s, every, seed: ACDC(s, allocation="normalized")),
    "Top-KAST": rule(lambda s, every, seed: TopKAST(s, every=every, allocation="erk")),
    "STR": rule(lambda s, every, seed: STR(rising(s), every=every)),
    "L0": rule(lambda s, every, seed: L0(rising(s), seed=seed)),
    "growing L2": rule(lambda s, every, seed: Growing(rising(s), every=every, allocation="normalized")),
    "SNIP": at_first(lambda s, seed: lilliput.Prune(s, "snip", seed=seed)),
    "GraSP": at_first(lambda s, seed: lilliput.Prune(s, "grasp", seed=seed)),
    "SynFlow": at_first(lambda s, seed: Rounds(s, rounds=30)),
}


# ------------------------------------------------------------------------------------------------------------- networks


def network(name: str, seed: int) -> nn.Module:
    """A network with random weights; on MNIST-1D of LeCun's variance, 1 / fan_in, as in Flax, and PyTorch's biases."""
    torch.manual_seed(seed)
    net: nn.Module = {"MLP": MLP, "CNN": CNN, "ResNet-20": ResNet}[name]()
    for weight in () if name == "ResNet-20" else (p for p in net.parameters() if p.dim() > 1):
        nn.init.trunc_normal_(weight, std=weight[0].numel() ** -0.5)
    return net


@cache
def work(name: str, quick: bool = False) -> tuple[lilliput.Task, Tensor, Tensor, int, int]:
    """The task, the held-out examples and their labels, the steps of a training and those between two masks."""
    if name == "ResNet-20":
        x, y = digits.images()
        x = F.avg_pool2d(x, 4)  # 8x8, a sixteenth of the time
        train, val, test = stratified(y, (3000, 1000, 1000), seed=0)
        task = lilliput.Task("digits", (x[train], y[train]), (x[val], y[val]), batch_size=60)
        return task, x[test], y[test], 100, 3
    x, y = mnist1d.signals()[:2]
    task = lilliput.Task("mnist1d", (x[:3500], y[:3500]), (x[3500:], y[3500:]), batch_size=100)
    return task, *(mnist1d.signals()[2:] if quick else mnist1d.fresh()), 2100, 35


def trained(name: str, method: str, sparsity: float, seed: int, folder: Path, steps: int = 0) -> dict[str, Any]:
    """One training: its accuracy on held-out examples and how many weights it keeps."""
    torch.set_num_threads(1)
    task, x, y, whole, every = work(name, bool(steps))
    stages, rules = METHODS[method](sparsity, every, seed)
    training = lilliput.Train(
        steps or whole, Cosine(5e-3, warmup=0.15), rules, batch_size=task.batch_size, weight_decay=5e-4, seed=seed
    )
    net = lilliput.realize(lilliput.run(network(name, seed), task, [*stages, training], folder, seed=seed)).eval()
    with torch.no_grad():
        right = torch.cat([net(part).argmax(1) for part in x.split(500)]) == y
    matrices = [p for p in net.parameters() if p.dim() > 1]
    return {
        "network": name,
        "method": method,
        "sparsity": sparsity,
        "seed": seed,
        "accuracy": float(right.double().mean()),
        "weights": sum(p.numel() for p in matrices),
        "kept": sum(int((p != 0).sum()) for p in matrices),
    }


def jobs(quick: bool) -> Iterator[tuple[str, str, float, int]]:
    """Every training, the cheap networks first."""
    if quick:
        yield from (("CNN", method, 0.9, 0) for method in ("dense", "global magnitude", "RigL", "static"))
        return
    for name in ("MLP", "CNN", "ResNet-20"):
        for method in METHODS:
            for sparsity in (0.0,) if method == "dense" else SPARSITIES:
                for seed in range(5 if name != "ResNet-20" and method in FIVE else 3):
                    yield name, method, sparsity, seed


def one(job: tuple[tuple[str, str, float, int], Path, int]) -> dict[str, Any]:
    """`trained` with one argument, for a pool."""
    return trained(*job[0], *job[1:])


# -------------------------------------------------------------------------------------------------------------- summary


def rows(runs_of: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row a network and method: the mean at every sparsity, its interval, and JaxPruner's where it is known."""
    for name in dict.fromkeys(run["network"] for run in runs_of):
        for method in dict.fromkeys(run["method"] for run in runs_of):
            row: dict[str, Any] = {"network": name, "method": method}
            for sparsity in (0.0, *SPARSITIES):
                runs = [
                    run["accuracy"]
                    for run in runs_of
                    if (run["network"], run["method"], run["sparsity"]) == (name, method, sparsity)
                ]
                if runs:
                    column = "dense" if not sparsity else f"{sparsity:.0%}"
                    row |= {
                        column: round(float(np.mean(runs)), 4),
                        f"{column} interval": interval(runs),
                        "seeds": len(runs),
                    }
            if method == "dense" and name in DENSE:
                row["JaxPruner, dense"] = DENSE[name]
            for sparsity, theirs in zip(SPARSITIES[1:], THEIRS.get((name, method), ()), strict=False):
                row[f"JaxPruner, {sparsity:.0%}"] = theirs
            if len(row) > 2:
                yield row


def measure(quick: bool) -> dict[str, Any]:
    """Train everything, two at a time."""
    folder = Path(tempfile.mkdtemp()) if quick else cache_folder() / "evidence" / "jaxpruner"
    given = [(job, folder, 3 if quick else 0) for job in jobs(quick)]
    if quick:
        runs = [one(job) for job in given]
    else:
        runs = each(one, given)
    for run in runs:
        most = round((1 - run["sparsity"]) * run["weights"]) + 30  # each tensor rounds to whole weights
        if not quick and run["kept"] > most:
            raise ValueError(
                f"jaxpruner: {run['method']} at {run['sparsity']:.0%} must keep at most {most} weights of "
                f"{run['network']}, kept {run['kept']}."
            )
    return {
        "claim": "one small API holds the field's methods, at a few percent over dense training: on MNIST-1D gradual "
        "magnitude pruning and RigL are far above random and static masks; in the 100 steps of ResNet-20 "
        "static masks do as well",
        "baseline": "the same training without zeros, random masks, and what JaxPruner reached with this protocol",
        "rows": list(rows(runs)),
        "runs": [
            [run["network"], run["method"], run["sparsity"], run["seed"], round(run["accuracy"], 4), run["kept"]]
            for run in runs
        ],
    }
