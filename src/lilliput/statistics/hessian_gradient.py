"""The product of the loss's Hessian with its gradient."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lilliput.registry import register
from lilliput.statistics.gradient import mean_gradient
from lilliput.statistics.sources import Labelled, Parameters, gradients


@register("statistic")
def hessian_gradient(examples: Labelled, parameters: Parameters) -> Parameters:
    """H g: half the gradient of ||g||^2, with g and H the first and second derivative of the mean loss in all of these
    parameters together.

    Two passes: H is the sum over batches, so H g is, once g is known.

    Source: Wang, Zhang and Grosse, Picking winning tickets before training by preserving gradient flow, ICLR 2020,
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
