"""Squeeze: store a network's tensors on grids whose steps and zeros weigh the harm against the bits."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.code.base import attach, codes, copy_model, realize, reason
from lilliput.code.masked import Masked
from lilliput.code.names import originals, parameter_names
from lilliput.errors import NotSupported, near
from lilliput.quant.half import Half
from lilliput.quant.rounded import DAMP, MOST_BITS, Level, Rounded, rounded
from lilliput.quant.uniform import Uniform
from lilliput.stage import Reference, Stage
from lilliput.statistics.harm import Harm, Metric
from lilliput.statistics.hessian import damped
from lilliput.stored.sparse import Sparse
from lilliput.task import Task, call

SWEEPS = 3  # where the result is used, not only compared
SHRUNK = 0.5  # of the mean of the second moment's diagonal, times (d / n)^2

Allocation = tuple[tuple[str, str, Level], ...]
"""For each tensor: its name, "tensor" or "channel", and the bits of its grid or, as a float, its mean step."""


@dataclass(frozen=True)
class Squeeze(Stage):
    """Store tensors as integers whose zeros and magnitudes follow from what they cost and what they save.

    Layer after layer, in the order in which the network calls them: with x what the dense network gives a layer and x'
    what the layers before it, stored by then, give it, the weights become

        W' = argmin over grids of E |W x - W' x'|^2, each output weighted by what its error does to the network,
             plus lambda times the bits of an entropy coder,

    (see `lilliput.quant.descent`), and the bias takes up the mean of what is left. Tensors whose inputs cannot be seen,
    or whose layer is called several times, are rounded before, for themselves. Tensors of one dimension become float16.

    Args:
        allocation: (tensor, "tensor" or "channel", level) each: one step or one an output; level is the bits of a grid
            (2 to 8), on which every integer costs the same, or as a float the mean step of a grid that is
            entropy-coded. A larger step gives more zeros. `lilliput.search.rate` finds them for a total of bytes.
        examples: how many calibration inputs the moments are taken from.
        seed: of the places and directions that are looked at.

    Raises:
        ValueError: for settings out of range, a tensor that the model does not have, or without a task.
        NotSupported: for a tensor that is stored by a code already.

    Example:
        >>> net, x = nn.Linear(8, 4), torch.randn(64, 8)
        >>> task = Task("some", train=(x, None), val=(x, None), loss="mse", metric="mse")
        >>> small = Squeeze((("weight", "tensor", 0.1),))(net, task, None)
        >>> bool((small.weight / small.weight.abs()[small.weight != 0].min()).round(decimals=3).frac().any())
        False

    Source:
        Frantar, Singh and Alistarh, Optimal brain compression, NeurIPS 2022, arXiv:2208.11580, for the compensation;
        Behdin et al., QuantEase, 2023, arXiv:2309.01885, for coordinate descent; Chou, Lookabaugh and Gray,
        Entropy-constrained vector quantization, IEEE Trans. ASSP 37, 1989, for the bits in the choice.
    """

    allocation: Allocation
    examples: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, per, level in self.allocation:
            fits = 2 <= level <= MOST_BITS if isinstance(level, int) else level > 0
            if per not in ("tensor", "channel") or not fits:
                raise ValueError(
                    "Squeeze: allocation must hold (tensor, 'tensor' or 'channel', bits from 2 to 8 or a step), "
                    f"got {(name, per, level)!r}."
                )
        if not self.allocation or self.examples < 1:
            raise ValueError(f"Squeeze: a tensor and an example at least must be given, got {self}.")

    def __call__(self, model: nn.Module, task: Task | None, reference: Reference | None) -> nn.Module:
        if task is None:
            raise ValueError("Squeeze: a task must be given, whose inputs the layers are matched on. Pass task=.")
        self._check(model)
        return squeezed(model, Harm.of(model, task, examples=self.examples, seed=self.seed), self.allocation)

    def label(self) -> str:
        """The stage in a few words."""
        return f"{len(self.allocation)} tensors by rate and distortion"

    def _check(self, model: nn.Module) -> None:
        tensors, coded = parameter_names(model), codes(model)
        for name, _, _ in self.allocation:
            if name not in tensors:
                raise ValueError(
                    f"Squeeze: allocation must name tensors of the model, got {name!r}. {near(name, tensors)}"
                )
            if why := ("a code stores it already" if name in coded else reason(model, name)):
                raise NotSupported(f"Squeeze: {name} must be a plain tensor of its own, but {why}. Leave it out.")


@torch.no_grad()
def squeezed(model: nn.Module, harm: Harm, allocation: Allocation) -> nn.Module:
    """A copy of a model with tensors stored as an allocation says, once its metrics are known.

    Args:
        model: whose tensors in the allocation are plain.
        harm: measured on the model.
        allocation: as in `Squeeze`.
    """
    plain = realize(model).eval().float().requires_grad_(False)
    wanted = {name: (per, level) for name, per, level in allocation}
    done: dict[str, Rounded] = {}

    def store(name: str, weight: Tensor, metric: Metric) -> Tensor:
        per, level = wanted[name]
        done[name] = rounded(weight, metric, per, [level], SWEEPS)[0]
        return done[name].decode()

    once = [name for name, count in harm.rows.calls.items() if name in wanted and count == 1]
    for name in wanted:
        if name not in once and not _follows(name, once, plain):
            parameter = plain.get_parameter(name)
            parameter.copy_(store(name, parameter, harm.metrics[name]))

    def solve(name: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        layer: Any = module
        x, seen = harm.rows.given[name], harm.rows.of(name, module, given)
        means = (x.mean(1), seen.mean(1)) if layer.bias is not None else (torch.zeros(()), torch.zeros(()))
        target, moment = _matched(layer.weight, x, seen, means)
        new = store(name, target, replace(harm.metrics[name], moment=moment))
        if layer.bias is not None:
            layer.bias.add_(_through(layer.weight, means[0]) - _through(new, means[1]))
            bias = name.removesuffix("weight") + "bias"
            layer.bias.copy_(
                store(bias, layer.bias, harm.metrics[bias]) if bias in wanted else layer.bias.half().float()
            )
        layer.weight.copy_(new)

    hooks = [
        plain.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(
            lambda module, given, name=name: solve(name, module, given)
        )
        for name in once
    ]
    if once:
        call(plain, harm.inputs)
    for hook in hooks:
        hook.remove()
    return _stored(model, plain, done)


def _follows(name: str, once: list[str], plain: nn.Module) -> bool:
    """Whether a tensor is the bias of a layer that is solved while the inputs pass."""
    return name.endswith("bias") and name.removesuffix("bias") + "weight" in once


def _matched(weight: Tensor, x: Tensor, seen: Tensor, means: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(W', M) for inputs (groups, n, d): the weights with the least E |W x - W' x'|^2, and M = E[x' x'^T].

    W' = (W E[x x'^T] + delta W) (M + delta I)^-1, with a delta that grows with d / n, since few rows say little of
    many inputs; the means are taken off where a bias takes them up.
    """
    if not bool(seen.isfinite().all()):
        raise ValueError("Squeeze: what layers are given must be finite, got NaN or infinity. Check the model.")
    mean, mean_seen = (part.unsqueeze(-2) if part.dim() else part for part in means)
    centred, (_, n, d) = seen - mean_seen, seen.shape
    moment = centred.transpose(1, 2) @ centred / n
    cross = (x - mean).transpose(1, 2) @ centred / n
    shift = SHRUNK * (d / n) ** 2 * moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(d).to(moment)
    moment = moment + shift
    solid, _ = damped(moment, DAMP)
    cross = cross + shift + solid - moment
    flat = weight.float().reshape(len(moment), -1, d)
    target = torch.linalg.solve(solid.double(), (flat @ cross).double().transpose(1, 2)).transpose(1, 2)
    return target.float().reshape(weight.shape), moment


def _through(weight: Tensor, mean: Tensor) -> Tensor:
    """W x for the mean x of each group, (out,)."""
    return (weight.float().reshape(len(mean), -1, mean.shape[1]) @ mean[:, :, None]).flatten()


def _stored(model: nn.Module, plain: nn.Module, done: Mapping[str, Rounded]) -> nn.Module:
    """A copy of the model with the codes of what was rounded; what is left of one dimension becomes float16."""
    result = copy_model(model)
    for name, found in done.items():
        if isinstance(found.stored(), Sparse):
            attach(result, name, Masked(found.mask))
        attach(result, name, Uniform(found.bits, found.per))
        path, _, attribute = name.rpartition(".")
        theta, log_scale = originals(result.get_submodule(path), attribute)
        theta.copy_(found.decode())
        scale = found.scale if found.per == "channel" else found.scale[:1]
        log_scale.copy_(scale.log2())
    coded = codes(result)
    for name, tensor in parameter_names(result).items():
        if tensor.dim() == 1 and name not in coded and tensor.is_floating_point() and not reason(result, name):
            result.get_parameter(name).copy_(plain.get_parameter(name))
            attach(result, name, Half())
    return result
