"""Calibration: the statistics of a model on its task that scores and ranges are computed from."""

import zlib
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.code.base import realize
from lilliput.errors import near
from lilliput.stage import calibration, on
from lilliput.task import Task, call, leaves, length, take

Statistics = dict[str, dict[str, Tensor]]

FROM_DATA = ("input_norm", "input_second_moment", "gradient")
KNOWN = (*FROM_DATA, "noise")


def statistics(model: nn.Module, task: Task | None, names: Iterable[str], needs: Collection[str], *,
               examples: int = 256, batch_size: int = 64, seed: int = 0) -> Statistics:
    """The statistics `needs` of the tensors `names`, each broadcastable to its tensor, on `calibration(task)`.

    input_norm: the L2 norm of each input feature over all examples and places, for linear and convolutional weights.
    input_second_moment: the mean of its square. gradient: the root mean square, over batches, of the gradient of the
    task's loss; a task without labels is given ones drawn from the model's own outputs (the Fisher information's
    gradient: the divergence from the outputs themselves has none). noise: uniform in [0, 1), a function of seed and
    name. A tensor whose inputs cannot be seen (attention projections, recurrent weights) lacks the input statistics.

    The model is left as it is: everything is measured on a plain copy in eval mode.

    Raises ValueError for an unknown statistic, or one that needs a task where there is none.

    >>> net = nn.Linear(2, 1); x = torch.tensor([[3.0, 0.0], [4.0, 1.0]])
    >>> task = Task("tiny", train=(x, torch.zeros(2, 1)), val=(x, torch.zeros(2, 1)), loss="mse", metric="mse")
    >>> statistics(net, task, ["weight"], ["input_norm"])["weight"]["input_norm"]
    tensor([[5., 1.]])
    """
    names = list(names)
    for need in needs:
        if need not in KNOWN:
            raise ValueError(f"statistics: needs must be known statistics, got {need!r}. {near(need, KNOWN)}")
        if need in FROM_DATA and task is None:
            raise ValueError(f"statistics: a task must be given for {need}, got None. Pass task=.")
    found: Statistics = {name: {} for name in names}
    plain = realize(model).eval()
    if "noise" in needs:
        for name in names:
            generator = torch.Generator().manual_seed(seed * 1000003 + zlib.crc32(name.encode()))
            found[name]["noise"] = torch.rand(plain.get_parameter(name).shape, generator=generator)
    if task is None or not set(needs) & set(FROM_DATA):
        return found
    listeners = {}
    if "input_norm" in needs or "input_second_moment" in needs:
        listeners = {name: _listen(plain, name) for name in names if sees_inputs(plain, name)}
    squares = _run(plain, task, names if "gradient" in needs else [], examples, batch_size, seed)
    for name, square in squares.items():
        found[name]["gradient"] = square.sqrt()
    for name, listener in listeners.items():
        if listener.count:
            energy = listener.energy
            known = {"input_norm": energy.sqrt(), "input_second_moment": energy / listener.count}
            found[name] |= {need: value for need, value in known.items() if need in needs}
    return found


def _run(plain: nn.Module, task: Task, names: list[str], examples: int, batch_size: int, seed: int
         ) -> dict[str, Tensor]:
    """Forward over the calibration examples, and the mean square of the gradients of `names`."""
    inputs = calibration(task, examples)
    _, labels = task.split("train")
    count = length(inputs)
    index = torch.linspace(0, (0 if labels is None else len(labels)) - 1, count).long()
    parameters = {name: plain.get_parameter(name) for name in names}
    plain.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    squares = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(seed)
    device = next(plain.parameters()).device
    batches = range(0, count, batch_size)
    with torch.set_grad_enabled(bool(names)):
        for first in batches:
            part = slice(first, first + batch_size)
            output = call(plain, on(take(inputs, part), device))
            if not names:
                continue
            target = _drawn(task, output, generator) if labels is None else labels[index[part]].to(device)
            loss = (output * target).sum() / len(output) if target.shape == output.shape and labels is None else (
                task.loss(output, target))
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for square, gradient in zip(squares.values(), gradients, strict=True):
                if gradient is not None:
                    square += gradient.square() / len(batches)
    return squares


def _drawn(task: Task, output: Tensor, generator: torch.Generator) -> Tensor:
    """Classes drawn from the model's own outputs; for a task that is no classification, random signs to project on."""
    if task.loss_name == "cross_entropy":
        return torch.multinomial(output.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(output.device)
    signs = torch.randint(0, 2, tuple(output.shape), generator=generator) * 2 - 1
    return signs.to(output)


def sees_inputs(model: nn.Module, name: str) -> bool:
    """Whether the inputs that meet a tensor can be seen: those of a linear or convolutional module that is called."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    called = not (path and isinstance(model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention))
    return attribute == "weight" and called and (isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
                                                 or type(module).__name__ in ("Conv1D", "ParametrizedConv1D"))


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
            self.shape = lambda energy: energy.reshape(groups, 1, inputs).expand(
                groups, outputs // groups, inputs).reshape(outputs, inputs, *tail)
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


def _listen(model: nn.Module, name: str) -> _Listener:
    module = model.get_submodule(name.rpartition(".")[0])
    listener = _Listener(module)
    module.register_forward_hook(listener)
    return listener
