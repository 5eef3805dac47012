"""The stages that change a network's graph: a student that is a narrower, shallower copy, and folded batch norm."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from lilliput.graph.fold import fold_batchnorm
from lilliput.graph.students import student
from lilliput.stage import Reference, Stage
from lilliput.task import Task


@dataclass(frozen=True)
class FoldBatchNorm(Stage):
    """Every batch norm folded into the layer before it; the function stays the same.

    Source: Jacob et al., CVPR 2018, arXiv:1712.05877, section 3.2.
    """

    structural: ClassVar[bool] = True

    def __call__(self, model: nn.Module, task: Task, reference: Reference) -> nn.Module:
        return fold_batchnorm(model, task.example)


@dataclass(frozen=True)
class Student(Stage):
    """A narrower and shallower copy that inherits the dense network's weights where it can.

    remove: paths of whole blocks that go. stride: layers that take a stride of two; pool: layers that read an input
    averaged two by two. width: the fraction of channels of every coupled group that stays, those of the largest norm.
    target: instead, the fraction of values (of="values") or MACs (of="macs") that stays, spread over the groups by how
    much their channels weigh. Counts are multiples of `multiple`. init: "dense" or "random".

    Sources: Li et al., Pruning filters for efficient ConvNets, ICLR 2017, arXiv:1608.08710 (norms); Fang et al.,
    DepGraph, CVPR 2023, arXiv:2301.12900 (coupled groups).
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
