"""Distillation of features: the student's hidden activations follow the dense network's, path by path."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.rule import Rule, State
from lilliput.schedule import Schedule, at
from lilliput.stage import Reference
from lilliput.task import Batch, Task, call


@dataclass(frozen=True)
class Features(Rule):
    """Hints: weight * mean over the paths of || normalise(h_s) - normalise(P h_t) ||^2, P a fixed random projection
    of the teacher's channels where the widths differ (an orthonormal map keeps distances, and needs no training).

    paths: module paths that exist in both networks, such as ("layers.2", "layers.8").

    Source: Romero et al., FitNets, ICLR 2015, arXiv:1412.6550, equation 3 (with a learnt regressor in place of P).

    Raises ValueError for a path that either network lacks.
    """

    paths: tuple[str, ...]
    weight: float | Schedule = 1.0

    def begin(self, model: nn.Module, task: Task | None, reference: Reference | None, steps: int) -> State:
        if reference is None:
            raise ValueError("Features: a reference must be given (the dense model), got None.")
        for who, network in (("model", model), ("dense model", reference.model)):
            known = dict(network.named_modules())
            for path in self.paths:
                if path not in known:
                    raise ValueError(
                        f"Features: every path must name a module of the {who}, got {path!r}. "
                        f"It has {', '.join(list(known)[1:9])}, ..."
                    )
        self._listen(model)
        state: State = {}
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
        assert reference is not None
        self._listen(reference.model)
        with torch.no_grad():
            call(reference.model, batch.inputs)
        dense = {path: _kept(reference.model, path) for path in self.paths}
        self._stop(reference.model)
        total: Tensor = output.sum() * 0
        for path in self.paths:
            mine, theirs = _kept(model, path), dense[path]
            total = total + F.mse_loss(
                F.normalize(_pooled(mine), dim=-1),
                F.normalize(_project(_pooled(theirs), _pooled(mine).shape[-1]), dim=-1),
            )
        return total * (at(self.weight, step, steps) / len(self.paths))

    def end(self, state: State, model: nn.Module) -> State:
        self._stop(model)
        return state

    def _stop(self, model: nn.Module) -> None:
        for path in self.paths:
            hooks = model.get_submodule(path)._forward_hooks
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Keep)]:
                del hooks[key]


class _Keep:
    """A forward hook that keeps a module's last output."""

    value: Tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Keep":
        return _Keep()  # what it kept belongs to the graph of the last forward pass

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.value = output[0] if isinstance(output, tuple) else output


def _kept(model: nn.Module, path: str) -> Tensor:
    return next(hook.value for hook in model.get_submodule(path)._forward_hooks.values() if isinstance(hook, _Keep))


def _pooled(h: Tensor) -> Tensor:
    """(n, c, ...) with places averaged to (n, c); sequences (n, length, c) stay."""
    return h.flatten(2).mean(2) if h.dim() > 3 else h


def _project(h: Tensor, width: int) -> Tensor:
    if h.shape[-1] == width:
        return h
    generator = torch.Generator().manual_seed(h.shape[-1] * 65537 + width)
    q, _ = torch.linalg.qr(torch.randn(h.shape[-1], width, generator=generator))
    projected: Tensor = h @ q.to(h)
    return projected
