"""The product of the loss's Hessian with its gradient."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lilliput.registry import register
from lilliput.statistics.gradient import mean_gradient
from lilliput.statistics.sources import Labelled, Parameters, gradients


@register("statistic")
def hessian_gradient(examples: Labelled, parameters: Parameters) -> Parameters:
    """Measure H g: half the gradient of ||g||^2.

    g and H are the first and second derivative of the mean loss in all of these parameters together. Two passes: H is
    the sum over batches, so H g is, once g is known.

    Args:
        examples: Calibration inputs with the task's loss.
        parameters: The tensors to measure.

    Returns:
        The product, of each tensor's shape.

    Example:
        >>> from lilliput import Task
        >>> net, x = torch.nn.Linear(1, 1, bias=False), torch.ones(4, 1)
        >>> task = Task("one", train=(x, net(x).detach() + 1), val=(x, x), loss="mse", metric="mse")
        >>> hessian_gradient(Labelled.of(net, task, 4), {"weight": net.weight})["weight"]
        tensor([[-4.]])

    Source:
        Wang, Zhang and Grosse, Picking winning tickets before training by preserving gradient flow, ICLR 2020,
        arXiv:2002.07376, equation 8.
    """
    g = mean_gradient(examples, parameters)
    product = {name: torch.zeros_like(p) for name, p in parameters.items()}
    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        for loss, share in examples.losses():
            first = gradients(loss, parameters, again=True)
            along = torch.stack([(a * b).sum() for a, b in zip(first, g.values(), strict=True)]).sum()
            if along.requires_grad:
                for held, second in zip(product.values(), gradients(along, parameters), strict=True):
                    held += second * share
    return product
