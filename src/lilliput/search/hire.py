"""Hire: the workers of a search, processes of this machine or tasks of a Ray cluster."""

from torch import nn

from lilliput.search import ask
from lilliput.search.cores import beside, count_workers
from lilliput.search.pool import Pool


def hire(model: nn.Module, workers: int | str | None = None, device: str = "cpu") -> Pool:
    """Start the workers of a search; they are ready some seconds later.

    Those that leave this process no core of its own start when the pool is completed.

    Args:
        model: the largest network that is trained.
        workers: a number of processes, "ray://HOST", or None for as many as cores and memory allow.
        device: where they train.

    Raises:
        ModuleNotFoundError: for an address where Ray is not installed.
        ValueError: for another number or address, and for a cluster that does not answer.
    """
    workers = ask.workers(workers)
    if isinstance(workers, str):
        from lilliput.search.ray_pool import RayPool  # Ray is an extra

        return RayPool(workers)
    number = count_workers(model, workers, device)
    return Pool(workers=number, later=max(0, number - beside()))
