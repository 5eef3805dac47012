"""Stages that change a network's graph: make a student that is narrower and shallower, fold batch norms."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from lilliput.graph.fold import fold_batchnorm
from lilliput.graph.students import student
from lilliput.stage import Reference, Stage
from lilliput.task import Task


@dataclass(frozen=True)
class FoldBatchNorm(Stage):
    """Fold every batch norm into the layer before it; the function stays the same.

    Example:
        >>> import torch
        >>> net, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).eval(), torch.rand(1, 1, 8, 8)
        >>> FoldBatchNorm()(net, Task("images", train=x, val=x), None)[1]
        Identity()

    Source:
        Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only inference, CVPR
        2018, arXiv:1712.05877, section 3.2.
    """

    structural: ClassVar[bool] = True

    def __call__(self, model: nn.Module, task: Task, reference: Reference) -> nn.Module:
        return fold_batchnorm(model, task.example)


@dataclass(frozen=True)
class Student(Stage):
    """Make a narrower and shallower copy that inherits the dense network's weights where it can.

    Args:
        remove: Paths of whole blocks that go.
        stride: Layers that take a stride of two.
        pool: Layers that read an input averaged two by two.
        width: The fraction of channels of every coupled group that stays, those of the largest norm.
        target: Instead of `width`, the fraction of values or MACs that stays, spread over the groups by how much their
            channels weigh.
        of: What `target` counts, "values" or "macs".
        multiple: Counts of channels are multiples of this.
        init: "dense" inherits the weights, "random" draws them anew.
        seed: The seed of drawn weights.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)); x = torch.rand(1, 4)
        >>> Student(width=0.5)(net, Task("some", train=x, val=x), None)[2]
        Linear(in_features=8, out_features=2, bias=True)

    Source:
        Li et al., Pruning filters for efficient ConvNets, ICLR 2017, arXiv:1608.08710 (norms); Fang et al., DepGraph,
        CVPR 2023, arXiv:2301.12900 (coupled groups).
    """

    remove: tuple[str, ...] = ()
    stride: tuple[str, ...] = ()
    pool: tuple[str, ...] = ()
    width: float = 1.0
    target: float = 1.0
    of: Literal["values", "macs"] = "values"
    multiple: int = 1
    init: str = "dense"
    seed: int = 0

    structural: ClassVar[bool] = True

    def __call__(self, model: nn.Module, task: Task, reference: Reference) -> nn.Module:
        return student(
            model,
            task.example,
            remove=self.remove,
            stride=self.stride,
            pool=self.pool,
            width=self.width,
            target=self.target,
            of=self.of,
            multiple=self.multiple,
            init=self.init,
            seed=self.seed,
        )
