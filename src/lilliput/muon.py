"""Muon: momentum whose matrices are made orthogonal before the step; AdamW for vectors and tables."""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

ROUNDS = 5  # of the iteration; more change nothing that a training notices
QUINTIC = 3.4445, -4.7750, 2.0315  # of Jordan et al.: singular values end between 0.7 and 1.2, as fast as can be
MATCHED = 0.2  # the root mean square of AdamW's updates: one learning rate serves both


class Muon(torch.optim.Optimizer):
    """Step along the orthogonal matrix that is nearest to the momentum, for the matrices of hidden layers.

    All directions of a matrix are learned at the same pace, the rare ones too, which takes about half the steps of
    AdamW. torch.optim.Muon takes matrices alone and computes in bfloat16, which most processors emulate: this one also
    takes convolutions, as matrices of (outputs, the rest), and treats all matrices of one shape in one product.

    Args:
        params: parameters or groups. A group with `orthogonal=True` is stepped by Muon, any other by AdamW.
        lr: the learning rate, as of AdamW: matrix updates are scaled to its size.
        momentum: of the gradients of matrices (Nesterov).
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: decoupled, for both.
        orthogonal: of groups that do not say.

    Example:
        >>> w = torch.zeros(4, 4, requires_grad=True)
        >>> w.grad = torch.diag(torch.tensor([100.0, 1.0, 1.0, 1.0]))
        >>> Muon([w], lr=1.0, orthogonal=True).step()
        >>> steps = -w.detach().diag()
        >>> bool(steps.max() / steps.min() < 2)
        True

    Source:
        Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024, kellerjordan.github.io/posts/muon;
        the scale: Liu et al., Muon is scalable for LLM training, 2025, arXiv:2502.16982, equation 4.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        orthogonal: bool = False,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "orthogonal": orthogonal})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step; `closure`, where given, computes the loss anew and is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            (self._orthogonal if group["orthogonal"] else self._adamw)(params, group)
        return loss

    def _orthogonal(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {"momentum": torch.zeros_like(p)}
        grads = [p.grad for p in params if p.grad is not None]
        momenta = [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        ahead = list(torch._foreach_lerp(grads, momenta, group["momentum"]))
        alike: dict[torch.Size, list[int]] = defaultdict(list)
        for place, p in enumerate(params):
            alike[p.shape].append(place)
        for shape, places in alike.items():
            matrices = torch.stack([ahead[place] for place in places]).flatten(2)
            scale = group["lr"] * MATCHED * math.sqrt(max(matrices.shape[1:]))
            for place, update in zip(places, orthogonal(matrices).mul_(scale), strict=True):
                ahead[place] = update.view(shape)
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(params, ahead)

    def _adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in params]
        adamw(
            params=params,
            grads=[p.grad for p in params if p.grad is not None],
            exp_avgs=[state["exp_avg"] for state in states],
            exp_avg_sqs=[state["exp_avg_sq"] for state in states],
            max_exp_avg_sqs=[],
            state_steps=[state["step"] for state in states],
            foreach=not any(p.is_complex() for p in params),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonal(matrices: Tensor) -> Tensor:
    """Orthogonal matrices near the polar factors U V^T of matrices U S V^T, by a Newton-Schulz iteration.

    Args:
        matrices: (count, rows, columns).

    Returns:
        Their singular values lie between about 0.7 and 1.2, but for those that were next to zero.
    """
    a, b, c = QUINTIC
    x: Tensor = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-12)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
