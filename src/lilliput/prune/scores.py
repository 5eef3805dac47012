"""Scores: how much each weight matters. One plain function a paper, from a weight to a score >= 0 of its shape.

Keyword-only arguments name the statistics that a score needs; `lilliput.statistics.calibrate.statistics` supplies them,
each broadcastable to the weight. `data_needed` says whether that takes labels, inputs alone, or no data.

Notation: w a weight, g the gradient of the mean loss in it, H the Hessian of that loss.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lilliput import registry
from lilliput.registry import register
from lilliput.statistics.calibrate import needs as needs
from lilliput.statistics.calibrate import taken_from

Score = Callable[..., Tensor]


@register("score")
def magnitude(weight: Tensor) -> Tensor:
    """Score a weight by its magnitude, |w|. Needs no data.

    Args:
        weight: The weights, of any shape.

    Returns:
        Scores of the shape of the weights.

    Example:
        >>> magnitude(torch.tensor([1.0, -2.0]))
        tensor([1., 2.])

    Source:
        Han, Pool, Tran and Dally, Learning both weights and connections for efficient neural networks, NIPS 2015,
        arXiv:1506.02626, section 3.1.
    """
    return weight.abs()


@register("score")
def lamp(weight: Tensor) -> Tensor:
    """Score a weight by its share of the squares of its tensor's weights that are not smaller (LAMP). Needs no data.

    The score of weight u is w_u^2 / sum of w_v^2 over the weights v of the same tensor that are not smaller, u itself
    included. The largest weight of each tensor scores 1, so one threshold over all tensors (allocation="global") prunes
    each as far as it can bear. Of equal weights the first in C order scores lowest.

    Args:
        weight: The weights, of any shape.

    Returns:
        Scores in [0, 1] of the shape of the weights.

    Example:
        >>> lamp(torch.tensor([1.0, 2.0, 0.0, -3.0]))
        tensor([0.0714, 0.3077, 0.0000, 1.0000])

    Source:
        Lee, Park, Mo, Ahn and Shin, Layer-adaptive sparsity for the magnitude-based pruning, ICLR 2021,
        arXiv:2010.07611, the definition of the LAMP score in section 2.
    """
    squares, order = weight.flatten().double().square().sort(stable=True)
    tail = squares.flip(0).cumsum(0).flip(0)
    ranked = torch.where(squares > 0, squares / tail, 0.0)
    return torch.empty_like(ranked).scatter_(0, order, ranked).view_as(weight).to(weight.dtype)


@register("score")
def random(weight: Tensor, *, noise: Tensor) -> Tensor:
    """Score weights at random: the baseline that every other score has to beat. Needs no data.

    Args:
        weight: The weights, of any shape.
        noise: Uniform numbers in [0, 1), broadcastable to the weights.

    Returns:
        The noise, of the shape of the weights.

    Example:
        >>> random(torch.ones(2), noise=torch.tensor([0.25, 0.75]))
        tensor([0.2500, 0.7500])

    Source:
        No paper: a baseline.
    """
    return noise.expand_as(weight)


@register("score")
def taylor(weight: Tensor, *, gradient: Tensor) -> Tensor:
    """Score a weight by the first-order change of the loss when it becomes zero, |g w|.

    Needs labels; without them, some are drawn from the model's outputs.

    Args:
        weight: The weights, of any shape.
        gradient: g, the root mean square over batches of the gradient of the loss in w, broadcastable to the weights.

    Returns:
        Scores of the shape of the weights, in units of the loss.

    Example:
        >>> taylor(torch.tensor([1.0, -2.0]), gradient=torch.tensor([0.5, 0.5]))
        tensor([0.5000, 1.0000])

    Source:
        Molchanov, Mallya, Tyree, Frosio and Kautz, Importance estimation for neural network pruning, CVPR 2019,
        arXiv:1906.10771, equation 8 (its square root).
    """
    return (gradient * weight).abs()


@register("score")
def taylor2(weight: Tensor, *, mean_gradient: Tensor, curvature: Tensor) -> Tensor:
    """Score a weight by the second-order change of the loss when it becomes zero, |g w - h w^2 / 2|. Needs labels.

    The paper writes the whole row of H times all weights; setting one weight to zero moves along the diagonal alone.

    Args:
        weight: The weights, of any shape.
        mean_gradient: g, the mean gradient of the loss in w.
        curvature: h, the diagonal of H in its Gauss-Newton approximation.

    Returns:
        Scores of the shape of the weights, in units of the loss.

    Example:
        >>> taylor2(torch.tensor([2.0]), mean_gradient=torch.tensor([1.0]), curvature=torch.tensor([0.5]))
        tensor([1.])

    Source:
        Molchanov, Mallya, Tyree, Frosio and Kautz, Importance estimation for neural network pruning, CVPR 2019,
        arXiv:1906.10771, section 3 (second-order expansion, its square root).
    """
    return (mean_gradient * weight - curvature * weight.square() / 2).abs()


@register("score")
def saliency(weight: Tensor, *, mean_gradient: Tensor) -> Tensor:
    """Score a weight by |w g| with the mean gradient g. Needs labels.

    As `taylor`, but gradients of unlike examples cancel, as they do in the step that training would take.

    Args:
        weight: The weights, of any shape.
        mean_gradient: g, the mean gradient of the loss in w.

    Returns:
        Scores of the shape of the weights, in units of the loss.

    Example:
        >>> saliency(torch.tensor([1.0, -2.0]), mean_gradient=torch.tensor([0.5, 0.5]))
        tensor([0.5000, 1.0000])

    Source:
        Lee et al., JaxPruner: a concise library for sparsity research, 2023, arXiv:2304.14082 (saliency pruning).
    """
    return (weight * mean_gradient).abs()


@register("score")
def snip(weight: Tensor, *, mean_gradient: Tensor) -> Tensor:
    """Score a connection by the sensitivity of the loss to it, |dL/dc| at c = 1 with c w in the place of w (SNIP).

    That is |w g|, the formula of `saliency`. The paper takes it once, before any training, and divides by the sum over
    all weights, which changes no order. Needs labels.

    Args:
        weight: The weights, of any shape.
        mean_gradient: g, the mean gradient of the loss in w.

    Returns:
        Scores of the shape of the weights, in units of the loss.

    Example:
        >>> snip(torch.tensor([1.0, -2.0]), mean_gradient=torch.tensor([0.5, 0.5]))
        tensor([0.5000, 1.0000])

    Source:
        Lee, Ajanthan and Torr, SNIP: single-shot network pruning based on connection sensitivity, ICLR 2019,
        arXiv:1810.02340, equations 4 and 5.
    """
    return (weight * mean_gradient).abs()


@register("score")
def grasp(weight: Tensor, *, hessian_gradient: Tensor) -> Tensor:
    """Score a weight by how much its removal reduces the norm of the gradient (GraSP). Needs labels.

    w (H g) is half of what ||g||^2 loses, to first order, when w becomes zero. The paper's score is S = -w (H g), of
    which the highest are removed; here the highest w (H g) stay. Signed, and made positive by `rising`.

    Args:
        weight: The weights, of any shape.
        hessian_gradient: H g, the product of the Hessian and the gradient of the loss.

    Returns:
        Positive scores of the shape of the weights, float64.

    Example:
        >>> grasp(torch.tensor([1.0, 1.0]), hessian_gradient=torch.tensor([-1.0, 3.0])).tolist()
        [1e-40, 3.0]

    Source:
        Wang, Zhang and Grosse, Picking winning tickets before training by preserving gradient flow, ICLR 2020,
        arXiv:2002.07376, equation 8.
    """
    return rising(weight * hessian_gradient)


@register("score")
def synflow(weight: Tensor, *, flow: Tensor) -> Tensor:
    """Score a weight by the share of the network's flow that passes through it, |w| dR/d|w| (SynFlow).

    The flow R is the sum of the outputs when every input is one and every weight counts by its magnitude. Layers
    conserve it: it sums to the same in each. Meant for many rounds, each on what the last one left: see
    `lilliput.prune.rounds.Rounds`. Needs one input, of which only the shape counts.

    Args:
        weight: The weights, of any shape.
        flow: dR/d|w|.

    Returns:
        Scores of the shape of the weights.

    Example:
        >>> synflow(torch.tensor([-2.0]), flow=torch.tensor([0.5]))
        tensor([1.])

    Source:
        Tanaka, Kunin, Yamins and Ganguli, Pruning neural networks without any data by iteratively conserving synaptic
        flow, NeurIPS 2020, arXiv:2006.05467, section 6, theorems 1 and 2.
    """
    return weight.abs() * flow


@register("score")
def obd(weight: Tensor, *, curvature: Tensor) -> Tensor:
    """Score a weight by the loss it costs when it becomes zero at a minimum, h w^2 / 2 (optimal brain damage).

    The other weights are held. h is the diagonal of H in the Gauss-Newton approximation, as in the paper: the Fisher
    information of labels drawn from the model. Needs inputs.

    Args:
        weight: The weights, of any shape.
        curvature: h, the diagonal of H.

    Returns:
        Scores of the shape of the weights, in units of the loss.

    Example:
        >>> obd(torch.tensor([2.0]), curvature=torch.tensor([0.5]))
        tensor([1.])

    Source:
        LeCun, Denker and Solla, Optimal brain damage, NIPS 1989, section 2.2.
    """
    return curvature * weight.square() / 2


@register("score")
def woodfisher(weight: Tensor, *, inverse_fisher: Tensor) -> Tensor:
    """Score a weight by the loss it costs when the others of its block make up for it, w^2 / (2 [F^-1]_ww).

    This is the score of the optimal brain surgeon. F is the damped empirical Fisher information, in blocks of 32
    weights. Needs labels.

    Args:
        weight: The weights, of any shape.
        inverse_fisher: [F^-1]_ww, the diagonal of the inverse, of the shape of the weights.

    Returns:
        Scores of the shape of the weights, in units of the loss.

    Example:
        >>> woodfisher(torch.tensor([2.0]), inverse_fisher=torch.tensor([0.5]))
        tensor([4.])

    Source:
        Singh and Alistarh, WoodFisher: efficient second-order approximation for neural network compression, NeurIPS
        2020, arXiv:2004.14340, section 4, equations 2 and 3; Hassibi and Stork, Optimal brain surgeon, NIPS 1992.
    """
    return weight.square() / (2 * inverse_fisher)


@register("score")
def movement(weight: Tensor, *, movement: Tensor) -> Tensor:
    """Score a weight by how far a training moves it away from zero: -sum of w g over the steps.

    High where weights move away from zero, whatever their size. Signed, and made positive by `rising`. Gathered while
    training, as the rule `lilliput.prune.movement.Movement` does; needs labels.

    Args:
        weight: The weights, of any shape.
        movement: -sum of w g over the steps of a training.

    Returns:
        Positive scores of the shape of the weights, float64.

    Example:
        >>> movement(torch.ones(2), movement=torch.tensor([-1.0, 3.0])).tolist()
        [1e-40, 3.0]

    Source:
        Sanh, Wolf and Rush, Movement pruning: adaptive sparsity by fine-tuning, NeurIPS 2020, arXiv:2005.07683,
        section 4.
    """
    return rising(movement).expand_as(weight)


def rising(signed: Tensor, least: float = 1e-40) -> Tensor:
    """Map signed scores to positive ones of the same order, in float64: s > 0 stays s, s < 0 becomes least / |s|.

        f(s) = (s + (s^2 + 4 least)^(1/2)) / 2

    Where scores are pooled over a block, negative ones count as nothing.

    Args:
        signed: Scores of either sign, of any shape.
        least: The product of a negative score's magnitude and its image.

    Returns:
        Positive scores, float64.

    Example:
        >>> rising(torch.tensor([-2.0, -1.0, 3.0])).tolist()
        [5e-41, 1e-40, 3.0]
    """
    s = signed.double()
    root = (s.square() + 4 * least).sqrt()
    return torch.where(s > 0, (s + root) / 2, 2 * least / (root - s))


def data_needed(score: str | Score) -> str:
    """Return what a score's statistics are taken from: "none", "inputs", or "labels" (which imply inputs).

    Args:
        score: A score or its name.

    Returns:
        The most that any of its statistics needs.

    Raises:
        KeyError: For an unknown name.

    Example:
        >>> data_needed("magnitude"), data_needed("wanda"), data_needed(snip)
        ('none', 'inputs', 'labels')
    """
    function = lookup(score) if isinstance(score, str) else score
    return max((taken_from(need) for need in needs(function)), key=("none", "inputs", "labels").index, default="none")


def lookup(name: str, who: str = "Prune") -> Score:
    """The score of that name; raises KeyError with near misses."""
    function: Score = registry.lookup("score", name, who)
    return function
