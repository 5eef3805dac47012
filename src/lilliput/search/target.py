"""Target: what kind of network a search is given, and what the search asks of each kind."""

from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor, nn

from lilliput.search.job import Job
from lilliput.search.points import Point
from lilliput.task import Task


class Target(ABC):
    """A kind of network that can be shrunk: a torch network (network.py) or an ONNX file (onnx_file.py)."""

    @abstractmethod
    def dense(self, job: Job) -> Point:
        """The network as given, exported, scored and weighed."""

    @abstractmethod
    def look(self, job: Job) -> None:
        """Find what can be varied, and how much each technique hurts each tensor alone."""

    @abstractmethod
    def untrained(self, job: Job) -> list[Point]:
        """Points that need no training."""

    @abstractmethod
    def trained(self, job: Job, pool: ThreadPoolExecutor) -> None:
        """Add the points that are trained, where training is possible and the budget allows it."""

    @abstractmethod
    def tensors(self, job: Job, point: Point) -> dict[str, Tensor]:
        """What model.safetensors holds for a point."""

    @abstractmethod
    def recipe(self, job: Job, point: Point) -> str:
        """What recipe.toml says of a point."""

    @abstractmethod
    def plan(self, model: nn.Module, task: Task) -> dict[str, Any]:
        """What would be tried, for --dry-run: `values`, `tried` by method, and `left_alone`."""
