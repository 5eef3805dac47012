"""Rate and distortion: for every tensor what each code would cost and harm, and the best codes for a total of bytes.

Costs are those of the asked file, exact, entropy coding included. Harms are predicted (`lilliput.statistics.harm`) from
one pass with activations and one with gradients: no candidate is run. Grids with a step size, on which the weights make
up for one another, are offered for every tensor, and whatever the registered codes propose for it. Networks that were
composed and run tell how far the predictions of each family of codes are off.
"""

import math
import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from lilliput.code.base import Code, attach, pack, reason
from lilliput.code.names import find, parameter_names
from lilliput.encode import Encode
from lilliput.errors import NotSupported
from lilliput.quant.allocate import allocate
from lilliput.quant.rounded import Level, rounded
from lilliput.quant.squeeze import Squeeze, squeezed
from lilliput.quant.uniform import Uniform
from lilliput.search.codes import Measured, proposed
from lilliput.statistics.harm import Harm, Metric
from lilliput.stored.base import Stored
from lilliput.stored.plain import Plain
from lilliput.task import Task

Cost = Callable[[Stored], float]
GRID = "grid"  # the family of what Squeeze stores
FINEST, STEPS = 0.11, 14  # the steps that are tried, of a tensor's spread, each the root of two times the one before
NEGLIGIBLE = 32  # values of one dimension that are left in float16
SWEEPS = {True: 0, False: 2}  # over the integers of each grid, by whether time is short: the order of the harms is much
# the same without them
BRIEF = 3.0  # times what measuring took, below which the time that is left is short


@dataclass(frozen=True)
class Option:
    """One way to store one tensor.

    Args:
        cost: what it costs.
        harm: the divergence that it is predicted to cause.
        family: GRID, or the class of a code.
        level: of a grid: what `Squeeze` takes for the tensor, or None where it stays float16.
        code: of another family.
    """

    cost: float
    harm: float
    family: str = GRID
    level: tuple[str, Level] | None = None
    code: Code | None = None


@dataclass
class Offers:
    """What each tensor of a model may be stored as.

    Args:
        model: plain and folded.
        harm: its metrics.
        options: tensor -> label -> option.
        values: of all these tensors.
        examples: how many calibration inputs the metrics were measured on.
        fitted: family -> measured by predicted harm.
    """

    model: nn.Module
    harm: Harm
    options: dict[str, dict[Hashable, Option]] = field(default_factory=dict)
    values: int = 0
    examples: int = 256
    fitted: dict[str, float] = field(default_factory=dict)

    def chosen(self, total: float) -> dict[str, Option]:
        """The option of each tensor for a total cost, the least where that is more."""
        rows = {
            name: {label: (o.cost, o.harm * self.fitted.get(o.family, 1.0)) for label, o in options.items()}
            for name, options in self.options.items()
        }
        least = sum(min(cost for cost, _ in row.values()) for row in rows.values())
        picked = allocate(rows, max(total, least)) if rows else {}
        return {name: self.options[name][label] for name, label in picked.items()}

    def fit(self, runs: Iterable[tuple[dict[str, Option], float]]) -> None:
        """Fit measured / predicted harm of each family to networks that were run.

        Args:
            runs: what was chosen, and the mean divergence from the dense outputs that was measured.
        """
        known = [(_by_family(picked), measured) for picked, measured in runs if measured > 0]
        families = sorted({family for row, _ in known for family in row})
        if len(families) < 2:  # one factor changes no choice
            return
        predicted = torch.tensor([[row.get(f, 0.0) / m for f in families] for row, m in known], dtype=torch.float64)
        factors = torch.ones(len(families), dtype=torch.float64)
        for _ in range(50):  # least squares of measured / fitted, with factors that stay positive (Lee and Seung)
            factors *= predicted.sum(0) / (predicted.T @ (predicted @ factors)).clamp_min(1e-30)
        self.fitted = {f: float(k) for f, k in zip(families, factors.clamp(0.05, 20.0), strict=True)}


def _by_family(picked: dict[str, Option]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for option in picked.values():
        sums[option.family] = sums.get(option.family, 0.0) + option.harm
    return sums


@torch.no_grad()
def offers(
    model: nn.Module,
    task: Task,
    *,
    file: str = "lil",
    cost: Cost | None = None,
    seconds: float = math.inf,
    examples: int = 256,
    seed: int = 0,
) -> Offers:
    """Price every tensor of a model with every code that may store it.

    Args:
        model: plain and folded; it stays as it is.
        task: whose calibration inputs and divergence are used.
        file: "lil" or "onnx": where costs are bytes.
        cost: what a stored tensor costs instead, such as milliseconds.
        seconds: within which it should be done: with less time fewer steps are tried.
        examples: how many calibration inputs the harms are measured on.
        seed: of what is drawn for the metrics.
    """
    priced: Cost = cost or (lambda stored: stored.cost("onnx" if file == "onnx" else "lil"))
    began = time.monotonic()
    listed = Offers(model, Harm.of(model, task, examples=examples, seed=seed), examples=examples)
    took = time.monotonic() - began
    tensors = {n: t for n, t in parameter_names(model).items() if t.is_floating_point() and not reason(model, n)}
    weights = [name for name in find(model, who="rate") if name in tensors]
    measured = Measured(model, task, weights)
    left = sum(tensors[name].numel() for name in weights)
    pace = 0.0  # seconds a value and level
    for name in sorted(weights, key=lambda name: -tensors[name].numel()):
        tensor = tensors[name].detach().float()
        first, remaining = time.monotonic(), seconds - (time.monotonic() - began)
        share = remaining / max(1e-9, pace * left * 2 * (STEPS + 5) if pace else BRIEF * took)
        codes = proposed(tensor, measured.of(name)) if share > 0.2 else []
        found = _grids(tensor, listed.harm.metrics[name], codes, share, priced)
        tried = len(found)
        for code in codes:
            if _grid_bits(code) is None and (option := _other(tensor, code, listed.harm.metrics[name], priced)):
                found[code.label()] = option
        listed.options[name], listed.values = found, listed.values + tensor.numel()
        pace = (time.monotonic() - first) / (tensor.numel() * max(1, tried))
        left -= tensor.numel()
    for name, tensor in tensors.items():
        if tensor.dim() == 1 and tensor.numel() >= NEGLIGIBLE and name in listed.harm.metrics:
            metric = listed.harm.metrics[name]
            half = Option(priced(Plain(tensor.detach().half().numpy())), 0.0)
            found = _rounded(tensor.detach().float(), metric, [("tensor", 8), ("tensor", 6)], priced)
            listed.options[name] = {None: half} | found
            listed.values += tensor.numel()
    return listed


def _grids(tensor: Tensor, metric: Metric, codes: list[Code], share: float, cost: Cost) -> dict[Hashable, Option]:
    """What Squeeze offers: entropy-coded grids from fine to coarse, and the widths that are proposed."""
    widths = sorted({bits for code in codes if (bits := _grid_bits(code)) is not None} or {8})
    per = "tensor" if len(tensor) > 4096 else "channel"
    thin = 1 if share > 0.8 else min(4, math.ceil(1 / max(share, 0.25)))  # every how many steps
    spread = float(tensor.std(correction=0))
    steps = [spread * FINEST * math.sqrt(2) ** k for k in range(0, STEPS, thin)] if spread > 0 else []
    levels: list[tuple[str, Level]] = [("tensor", step) for step in steps] + [(per, width) for width in widths]
    if per == "channel" and thin == 1:
        levels += [(per, step) for step in steps]
    return _rounded(tensor, metric, levels, cost, SWEEPS[thin > 1])


def _rounded(
    tensor: Tensor, metric: Metric, levels: list[tuple[str, Level]], cost: Cost, sweeps: int = SWEEPS[False]
) -> dict[Hashable, Option]:
    """Grids with one step for the tensor or one for each channel, all of them side by side."""
    found: dict[str, dict[Hashable, tuple[Option, float]]] = {}
    every = rounded(tensor, metric, [per for per, _ in levels], [level for _, level in levels], sweeps)
    for (per, level), result in zip(levels, every, strict=True):
        change = result.decode() - tensor
        form, harm = metric.form(change), metric.harm(change)
        found.setdefault(per, {})[per, level] = Option(cost(result.stored()), form, level=(per, level)), harm
    return {label: option for kind in found.values() for label, option in _smoothed(kind).items()}


def _smoothed(found: dict[Hashable, tuple[Option, float]]) -> dict[Hashable, Option]:
    """Options whose harm is that of the quadratic form, times a power of it which the gradients tell.

    The gradients know how the errors of many places act together, but they are few: of one change they say little, of
    the changes of many steps much.
    """
    pairs = [(math.log(option.harm), math.log(harm)) for option, harm in found.values() if option.harm > 0 and harm > 0]
    if not pairs:
        return {label: option for label, (option, _) in found.items()}
    forms, harms = (torch.tensor(values, dtype=torch.float64) for values in zip(*pairs, strict=True))
    spread = (forms - forms.mean()).square().sum()
    power = float(((forms - forms.mean()) * (harms - forms)).sum() / (spread + len(pairs)))
    shift = float((harms - forms).mean())

    def smooth(form: float) -> float:
        return form * math.exp(shift + power * (math.log(form) - float(forms.mean()))) if form > 0 else 0.0

    return {label: replace(option, harm=smooth(option.harm)) for label, (option, _) in found.items()}


def _grid_bits(code: Code) -> int | None:
    """The bits of a code that is a grid which Squeeze offers, where the weights make up for one another."""
    plain = isinstance(code, Uniform) and code.symmetric and code.grid == "uniform" and not isinstance(code.per, int)
    return code.bits if plain and isinstance(code, Uniform) and code.bits <= 8 else None


def _other(tensor: Tensor, code: Code, metric: Metric, cost: Cost) -> Option | None:
    """A tensor under any code, by itself; None where the code refuses it."""
    holder = nn.Module()
    holder.register_parameter("weight", nn.Parameter(tensor.clone()))
    try:
        attach(holder, "weight", code)
        stored = pack(holder)["weight"]
    except (NotSupported, ValueError, RuntimeError):
        return None
    change = torch.from_numpy(stored.decode()) - tensor
    return Option(cost(stored), metric.harm(change), type(code).__name__, code=code)


def composed(known: Offers, picked: dict[str, Option]) -> tuple[nn.Module, list[Squeeze | Encode]]:
    """The network in which every tensor is stored by its option, and the stages that make it from `known.model`."""
    listed, model = _stages(picked, known.examples), known.model
    for stage in listed:  # what the tensors harm is known already: Squeeze would find it again
        if isinstance(stage, Squeeze):
            model = squeezed(model, known.harm, stage.allocation)
        else:
            model = stage(model, None, None)
    return model, listed


def stages(known: Offers, mean_bits: float) -> list[Squeeze | Encode]:
    """The stages that store a model's tensors in so many bytes: `mean_bits` a value, everything counted.

    Args:
        known: what the model's tensors may be stored as, priced in bytes.
        mean_bits: bits a value, positions of zeros and step sizes included.
    """
    return _stages(known.chosen(mean_bits * known.values / 8), known.examples)


def _stages(picked: dict[str, Option], examples: int) -> list[Squeeze | Encode]:
    allocation = tuple((name, *option.level) for name, option in picked.items() if option.level is not None)
    others = [Encode(option.code, where=name) for name, option in picked.items() if option.code is not None]
    return [*([Squeeze(allocation, examples)] if allocation else []), *others]
