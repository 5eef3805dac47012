"""Cores: how many trainings this machine holds side by side."""

from pathlib import Path

import psutil
from loky import cpu_count
from torch import nn

PROCESS_BYTES = 224e6
"""What a process that has imported torch holds before it has a model."""
COPIES = 5
"""The model, its gradients, two momenta and activations, in sizes of the model."""
USED = 0.7
"""The fraction of the free memory that workers may take."""
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def count_workers(model: nn.Module, asked: int | None = None, device: str = "cpu") -> int:
    """How many processes train side by side: as asked, or as many as cores and memory allow.

    Args:
        model: the largest network that is trained.
        asked: the number that a person wants.
        device: where they train; a graphics card is shared by two.

    Returns:
        At least 1. Cores are those that this process may use (affinity, quotas of a container).

    Raises:
        ValueError: where fewer than one is asked for.

    Example:
        >>> count_workers(nn.Linear(2, 2), 3)
        3
    """
    if asked is not None:
        if asked < 1:
            raise ValueError(f"shrink: workers must be at least 1, got {asked}.")
        return asked
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    cores = int(cpu_count()) if device == "cpu" else min(2, int(cpu_count()))
    return max(1, min(cores, int(USED * available_bytes() / (PROCESS_BYTES + COPIES * size))))


def beside() -> int:
    """How many workers compute while this process has a core to itself: one at least."""
    return max(1, int(cpu_count()) - 1)


def available_bytes() -> float:
    """Memory that new processes may take, under the limit of a container too."""
    free = float(psutil.virtual_memory().available)
    for limit, used, details in CGROUPS:
        try:
            most, now = float(Path(limit).read_text()), float(Path(used).read_text())
            rows = dict(line.split() for line in Path(details).read_text().splitlines())
        except (OSError, ValueError):  # no such kind of group, or no limit ("max")
            continue
        cache = float(rows.get("inactive_file", 0))  # given back when memory is short
        free = min(free, max(0.0, most - now + cache))
    return free
