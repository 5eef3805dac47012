"""Calibration: the statistics of a model on its task that scores and ranges are computed from."""

import zlib
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.code.base import realize
from lilliput.errors import near
from lilliput.prune import curvature
from lilliput.task import Task, leaves

Statistics = dict[str, dict[str, Tensor]]

# What each is taken from. "inputs": no labels; of "flow", the shape of one input is enough.
TAKEN_FROM = {
    "noise": "none",
    "input_norm": "inputs",
    "input_second_moment": "inputs",
    "flow": "inputs",
    "curvature": "inputs",
    "gradient": "labels",
    "mean_gradient": "labels",
    "hessian_gradient": "labels",
    "inverse_fisher": "labels",
    "movement": "labels",
}
FROM_DATA = tuple(name for name, data in TAKEN_FROM.items() if data != "none" and name != "movement")
KNOWN = (*FROM_DATA, "noise")

# Statistics that a training can gather as it goes: (what is held, weight, gradient) -> what is held after a step.
RUNNING: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "gradient": lambda held, weight, gradient: (0.9 * held * held).addcmul_(gradient, gradient, value=0.1).sqrt_(),
    "mean_gradient": lambda held, weight, gradient: held.lerp(gradient, 0.1),
    "movement": lambda held, weight, gradient: held - weight * gradient,
}


def statistics(
    model: nn.Module,
    task: Task | None,
    names: Iterable[str],
    needs: Collection[str],
    *,
    examples: int = 256,
    batch_size: int = 64,
    seed: int = 0,
) -> Statistics:
    """The statistics `needs` of the tensors `names`, each broadcastable to its tensor, on `calibration(task)`.

    input_norm: the L2 norm of each input feature over all examples and places, for linear and convolutional weights.
    input_second_moment: the mean of its square. gradient: the root mean square, over batches, of the gradient of the
    task's loss; a task without labels is given ones drawn from the model's own outputs (the Fisher information's
    gradient: the divergence from the outputs themselves has none). mean_gradient: the gradient g of the mean loss, with
    its sign; of drawn labels it is mere noise around zero. hessian_gradient: H g, H the Hessian of that loss in all
    these tensors. curvature: the diagonal of the Gauss-Newton matrix (of the Fisher information, for a loss that is a
    likelihood), no labels needed. inverse_fisher: the diagonal of the inverse of the damped empirical Fisher
    information, by blocks. flow: what flows through a weight when all inputs are ones. See `lilliput.prune.curvature`
    for the last five. noise: uniform in [0, 1), a function of seed and name. A tensor whose inputs cannot be seen
    (attention projections, recurrent weights) lacks the input statistics.

    The model is left as it is: everything is measured on a plain copy in eval mode, in float32.

    Raises ValueError for an unknown statistic, one that needs a task where there is none, one that only a training can
    gather (movement), weights that are NaN, and a statistic that is not finite.

    >>> net = nn.Linear(2, 1); x = torch.tensor([[3.0, 0.0], [4.0, 1.0]])
    >>> task = Task("tiny", train=(x, torch.zeros(2, 1)), val=(x, torch.zeros(2, 1)), loss="mse", metric="mse")
    >>> statistics(net, task, ["weight"], ["input_norm"])["weight"]["input_norm"]
    tensor([[5., 1.]])
    """
    names = list(names)
    for need in needs:
        if need == "movement":
            raise ValueError(
                "statistics: movement must be gathered while training, but was asked for without one. "
                "Use the rule lilliput.prune.movement.Movement, or score='saliency'."
            )
        if need not in KNOWN:
            raise ValueError(f"statistics: needs must be known statistics, got {need!r}. {near(need, KNOWN)}")
        if need in FROM_DATA and task is None:
            raise ValueError(f"statistics: a task must be given for {need}, got None. Pass task=.")
    found: Statistics = {name: {} for name in names}
    plain = realize(model).eval()
    for name in names:
        if bool(plain.get_parameter(name).isnan().any()):
            raise ValueError(
                f"statistics: weights must be numbers, got NaN in {name}. Load a sound checkpoint, or "
                "leave it out with where=."
            )
    if "noise" in needs:
        for name in names:
            generator = torch.Generator().manual_seed(seed * 1000003 + zlib.crc32(name.encode()))
            found[name]["noise"] = torch.rand(plain.get_parameter(name).shape, generator=generator)
    if task is None or not set(needs) & set(FROM_DATA):
        return found
    plain = plain.float().requires_grad_(False)
    data = curvature.Examples.of(plain, task, examples, seed)
    if "input_norm" in needs or "input_second_moment" in needs:
        for name, known in _inputs(data, [name for name in names if sees_inputs(plain, name)], batch_size).items():
            found[name] |= {need: value for need, value in known.items() if need in needs}
    if "flow" in needs:
        _add(found, "flow", curvature.flow(plain, task.example, names))
    parameters = {name: plain.get_parameter(name).requires_grad_(True) for name in names}
    with torch.enable_grad():
        if "gradient" in needs:
            _add(found, "gradient", curvature.root_mean_square(data, parameters, batch_size))
        if "mean_gradient" in needs:
            _add(found, "mean_gradient", curvature.mean_gradient(data, parameters, batch_size))
        if "hessian_gradient" in needs:
            _add(found, "hessian_gradient", curvature.hessian_gradient(data, parameters, batch_size))
        if "curvature" in needs:
            _add(found, "curvature", curvature.curvature(data, parameters))
        if "inverse_fisher" in needs:
            _add(found, "inverse_fisher", curvature.inverse_fisher(data, parameters))
    return found


def _add(found: Statistics, need: str, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"statistics: {need} must be finite, got NaN or infinity for {name}. Check the model's "
                "other weights, its inputs and its loss for NaN."
            )
        found[name][need] = value


@torch.no_grad()
def _inputs(data: curvature.Examples, names: list[str], batch_size: int) -> Statistics:
    """The input statistics of modules that are called at least once."""
    listeners = {name: _Listener(data.model.get_submodule(name.rpartition(".")[0])) for name in names}
    hooks = [
        data.model.get_submodule(name.rpartition(".")[0]).register_forward_hook(listener)
        for name, listener in listeners.items()
    ]
    for _ in data.outputs(batch_size):
        pass
    for hook in hooks:
        hook.remove()
    return {
        name: {"input_norm": listener.energy.sqrt(), "input_second_moment": listener.energy / listener.count}
        for name, listener in listeners.items()
        if listener.count
    }


def sees_inputs(model: nn.Module, name: str) -> bool:
    """Whether the inputs that meet a tensor can be seen: those of a linear or convolutional module that is called."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    called = not (path and isinstance(model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention))
    return (
        attribute == "weight"
        and called
        and (
            isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
            or type(module).__name__ in ("Conv1D", "ParametrizedConv1D")
        )
    )


class _Listener:
    """Adds up the squares of a module's inputs, in the weight's shape."""

    def __init__(self, module: nn.Module) -> None:
        self.count = 0
        self.energy = torch.zeros(())
        self.shape: Callable[[Tensor], Tensor] = _rows
        weight: Tensor = module.weight  # type: ignore[assignment]
        self.dims = weight.dim()
        if self.dims > 2:
            groups: int = module.groups  # type: ignore[assignment]
            outputs, inputs = weight.shape[:2]
            tail = (1,) * (self.dims - 2)
            self.shape = lambda energy: (
                energy.reshape(groups, 1, inputs)
                .expand(groups, outputs // groups, inputs)
                .reshape(outputs, inputs, *tail)
            )
        elif type(module).__name__ == "Conv1D":
            self.shape = lambda energy: energy[:, None]

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        x = leaves(inputs)[0].detach().float()
        rows = x.reshape(-1, x.shape[-1])
        if self.dims > 2:
            channels = x if x.dim() == self.dims else x[None]
            rows = channels.transpose(0, 1).flatten(1).T
        self.count += len(rows)
        self.energy = self.energy + self.shape(rows.square().sum(0))


def _rows(energy: Tensor) -> Tensor:
    return energy[None]
