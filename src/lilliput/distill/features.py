"""Distillation of features: the student's hidden activations follow the dense network's, path by path."""

import zlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.reference import Reference, asked, watched
from lilliput.rule import Rule, State, nothing
from lilliput.schedule import Schedule, at
from lilliput.task import Batch, Task, call, leaves, on


@dataclass(frozen=True)
class Features(Rule):
    """Match hidden features (hints): weight * mean over the paths of || normalise(r(h_s)) - normalise(h_t) ||^2.

    r is the identity where the widths of student and dense network agree, else a linear regressor from the student's
    width to the dense network's, which is trained with the student and left behind with the training. It begins as an
    orthonormal map. Feature maps (n, channels, height, width) are compared by their means over the places.

    Args:
        paths: module paths that exist in both networks, such as ("layers.2", "layers.8").
        weight: of this loss, a number or a schedule of the step; at 0 nothing is computed.

    Raises:
        ValueError: for a path that either network lacks, without a reference, and where features differ in more than
            their width.

    Example:
        >>> dense = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> student = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> reference = Reference(dense, example=torch.zeros(1, 4))
        >>> Features(("0",)).begin(student, None, reference, 1)
        {'regressor 0': Linear(in_features=3, out_features=8, bias=False)}

    Source:
        Romero, Ballas, Kahou, Chassang, Gatta and Bengio, FitNets: hints for thin deep nets, ICLR 2015,
        arXiv:1412.6550, equation 3.
    """

    version: ClassVar[int] = 2

    paths: tuple[str, ...]
    weight: float | Schedule = 1.0

    def begin(self, model: nn.Module, task: Task | None, reference: Reference | None, steps: int) -> State:
        reference = asked(reference, "Features")
        for who, network in (("model", model), ("dense model", reference.model)):
            known = dict(network.named_modules())
            for path in self.paths:
                if path not in known:
                    raise ValueError(
                        f"Features: every path must name a module of the {who}, got {path!r}. "
                        f"It has {', '.join(list(known)[1:9])}, ..."
                    )
        inputs = reference.sample()
        with watched(model, self.paths) as seen:
            _look(model, inputs)
        dense = reference.features(Batch(inputs, None, None, 0), self.paths, pooled)
        state: State = {}
        for path in self.paths:
            mine, theirs = pooled(seen[path]), dense[path]
            if mine.shape[:-1] != theirs.shape[:-1]:
                raise ValueError(
                    f"Features: features of {path!r} must differ in nothing but their width, got {tuple(mine.shape)} "
                    f"and, dense, {tuple(theirs.shape)}. Choose other paths."
                )
            if mine.shape[-1] != theirs.shape[-1]:
                state[f"regressor {path}"] = _regressor(path, mine.shape[-1], theirs.shape[-1])
        self._listen(model)
        return state

    def _listen(self, model: nn.Module) -> None:
        for path in self.paths:
            module = model.get_submodule(path)
            if not any(isinstance(hook, _Keep) for hook in module._forward_hooks.values()):
                module.register_forward_hook(_Keep())

    def loss(
        self,
        state: State,
        model: nn.Module,
        step: int,
        steps: int,
        batch: Batch,
        output: Any,
        reference: Reference | None,
    ) -> Tensor | None:
        reference, weight = asked(reference, "Features"), at(self.weight, step, steps)
        if weight == 0:
            return None
        dense = reference.features(batch, self.paths, pooled)
        total = nothing(output)
        for path in self.paths:
            mine = pooled(_kept(model, path))
            if f"regressor {path}" in state:
                mine = state[f"regressor {path}"](mine)
            total = total + F.mse_loss(F.normalize(mine, dim=-1), F.normalize(dense[path], dim=-1))
        return weight * total / len(self.paths)

    def end(self, state: State, model: nn.Module) -> State:
        for path in self.paths:
            hooks = model.get_submodule(path)._forward_hooks
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Keep)]:
                del hooks[key]
        return state


class _Keep:
    """A forward hook that keeps a module's last output."""

    value: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Keep":
        return _Keep()  # what it kept belongs to the graph of the last forward pass

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.value = leaves(output)[0]


def _kept(model: nn.Module, path: str) -> Tensor:
    return next(hook.value for hook in model.get_submodule(path)._forward_hooks.values() if isinstance(hook, _Keep))


@torch.no_grad()
def _look(model: nn.Module, inputs: Any) -> None:
    """One forward pass that changes nothing: no statistics of batch norms, no random numbers of dropout."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = {module: module.training for module in model.modules()}
    call(model.eval(), on(inputs, device))
    for module, training in modes.items():
        module.training = training


def pooled(h: Tensor) -> Tensor:
    """Feature maps (n, c, ...) with places averaged to (n, c); sequences (n, length, c) stay."""
    return h.flatten(2).mean(2) if h.dim() > 3 else h


def _regressor(path: str, width: int, dense: int) -> nn.Linear:
    """An orthonormal map, the same one for the same path and widths."""
    regressor: nn.Linear = nn.utils.skip_init(nn.Linear, width, dense, bias=False)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{path} {width} {dense}".encode()))
    q, _ = torch.linalg.qr(torch.randn(max(width, dense), min(width, dense), generator=generator))
    with torch.no_grad():
        regressor.weight.copy_(q if dense > width else q.T)
    return regressor
