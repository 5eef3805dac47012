"""FromScratch: a student's weights drawn anew, where inheriting them would hold it back."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lilliput.graph.students import reset
from lilliput.proposal import Known, Proposals, Refusal
from lilliput.stage import Reference, Stage
from lilliput.task import Task


@dataclass(frozen=True)
class FromScratch(Stage):
    """Draw all weights anew, by each module's own `reset_parameters`: what is left of the network is its structure.

    Args:
        seed: of the drawn weights.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> fresh = FromScratch()(net, None, None)
        >>> bool((fresh[0].weight == net[0].weight).any())
        False

    Source:
        Liu, Sun, Zhou, Huang and Darrell, Rethinking the value of network pruning, ICLR 2019, arXiv:1810.05270.
    """

    seed: int = 0

    structural: ClassVar[bool] = True
    same_graph: ClassVar[bool] = True
    last: ClassVar[bool] = True
    moment: ClassVar[str] = "structure"

    def __call__(self, model: nn.Module, task: Task | None, reference: Reference | None) -> nn.Module:
        return reset(model, self.seed)

    def label(self) -> str:
        return "from scratch"

    @classmethod
    def proposals(cls, model: nn.Module, task: Task, known: Known) -> Proposals | Refusal:
        """Offer it where every parameter that is trained belongs to a module that can draw it anew."""
        for path, module in model.named_modules():
            held = [name for name, p in module.named_parameters(recurse=False) if p.requires_grad]
            if held and not callable(getattr(module, "reset_parameters", None)):
                return Refusal(f"{type(module).__name__} at '{path}' cannot draw {held[0]} anew")
        return Proposals((cls(),))
