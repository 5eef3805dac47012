"""Use of lookup tables: how often the training data reads each row."""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.graph.lookup import Fewer, Nothing
from lilliput.graph.slicing import TABLES
from lilliput.graph.trace import evaluating, frozen, tied
from lilliput.task import Task, call, length, take

MOST = 1 << 16
"""Training examples that are read at most, evenly spread: a row that none of them reads is rare."""
CHUNK = 1024
FIRST = 64  # examples whose ids tell whether two networks read their tables alike
_known: OrderedDict[tuple[str, str], dict[str, Tensor]] = OrderedDict()


def placed(model: nn.Module, path: str, who: str) -> str:
    """Where the table that was at `path` lies by now; empty where it was dropped.

    Raises:
        KeyError: where none was there.
    """
    modules, known = dict(model.named_modules()), replaceable(model)
    if path in known:
        return path
    if isinstance(modules.get(path), Fewer):
        return f"{path}.table"
    if isinstance(modules.get(path), Nothing):
        return ""
    raise KeyError(f"{who}: '{path}' must be a lookup table of its own, got {', '.join(known) or 'none'}.")


class _Read(Exception):
    """All tables have been read: the rest of the network need not run."""


def replaceable(model: nn.Module) -> dict[str, nn.Embedding | nn.EmbeddingBag]:
    """The lookup tables that may be replaced: nobody else's, no rows that are rescaled when they are read."""
    fixed = tied(model) | frozen(model)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, TABLES) and name and name not in fixed and module.max_norm is None
    }


def use(model: nn.Module, task: Task) -> dict[str, Tensor]:
    """Count how often each row of each lookup table is read over the training inputs.

    The network runs only as far as its last table. The counts are kept for networks that read their tables alike.

    Args:
        model: A network.
        task: Gives the inputs.

    Returns:
        Counts (rows,) as float64, by the path of each table that is called.

    Example:
        >>> net, x = nn.Sequential(nn.Embedding(4, 2), nn.Flatten()), torch.tensor([[0, 2], [2, 2]])
        >>> use(net, Task("ids", train=x, val=x))["0"].tolist()
        [1.0, 0.0, 3.0, 0.0]
    """
    found = replaceable(model)
    if not found:
        return {}
    first: list[Tensor] = []
    calls = _reads(model, found, task.calibration(FIRST), first.append)
    marks = "".join(f"{name} {found[name].num_embeddings} {count};" for name, count in calls.items())
    key = task.fingerprint, marks + str(hash(tuple(int(x) for ids in first for x in (ids.sum(), ids.numel(), ids[0]))))
    if key in _known:
        _known.move_to_end(key)
        return dict(_known[key])
    counts = {name: torch.zeros(found[name].num_embeddings, dtype=torch.float64) for name in calls}
    inputs = task.calibration(MOST)
    order = [name for name, count in calls.items() for _ in range(count)]
    for rows in torch.arange(length(inputs)).split(CHUNK):
        for name, ids in _ids(model, {name: found[name] for name in calls}, take(inputs, rows), len(order)):
            counts[name] += torch.bincount(ids, minlength=len(counts[name])).to(torch.float64)
    _known[key] = counts
    while len(_known) > 8:
        _known.popitem(last=False)
    return dict(counts)


def _reads(model: nn.Module, found: dict[str, Any], inputs: Any, each: Any) -> dict[str, int]:
    """How often each table is called, in the order of first calls."""
    calls: dict[str, int] = {}
    for name, ids in _ids(model, found, inputs, None):
        calls[name] = calls.get(name, 0) + 1
        if len(ids):
            each(ids)
    return calls


def _ids(model: nn.Module, found: dict[str, Any], inputs: Any, stop: int | None) -> list[tuple[str, Tensor]]:
    """The ids that each call of a table reads, until `stop` calls."""
    seen: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Any:
        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            ids = args[0] if args else kwargs["input"]
            seen.append((name, ids.detach().flatten().long().cpu()))
            if len(seen) == stop:
                raise _Read

        return read

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in found.items()]
    try:
        with evaluating(model), torch.no_grad():
            call(model, inputs)
    except _Read:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen
