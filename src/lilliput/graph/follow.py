"""Follow a network with Torch-Pruning's dependency graph: which channels its operations join."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.graph import recurrent
from lilliput.graph.group import Group, Part
from lilliput.graph.trace import copied, evaluating, replace_, tensors
from lilliput.task import call


def dependencies(model: nn.Module, example: Any) -> list[Group]:
    """Groups as Torch-Pruning sees them, in plain data; static reasons that need its graph are set."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_pruning as tp

    work = copied(model, "groups")
    for p in work.parameters():
        p.requires_grad_(p.is_floating_point())
    standing: dict[str, str] = {}
    for name, module in list(work.named_modules()):
        if isinstance(module, nn.RNNBase) and not module.proj_size:
            replace_(work, module, recurrent.StandIn(module))
            standing[f"{name}.linear" if name else "linear"] = name
    ends: set[Any] = set()

    def forward(net: nn.Module, inputs: Any) -> list[Tensor]:
        outputs = [t for t in tensors(call(net, inputs)) if t.grad_fn is not None]
        ends.update(t.grad_fn for t in outputs)
        return outputs

    tables = {nn.EmbeddingBag: tp.pruner.function.EmbeddingPruner()}
    roots = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding, nn.EmbeddingBag)
    groups: list[Group] = []
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    with warnings.catch_warnings(), torch.enable_grad(), evaluating(work):
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(
            work, example, forward_fn=forward, customized_pruners=tables, verbose=False
        )
        names = {module: standing.get(name, name) for name, module in work.named_modules()}
        visits = _Visits(work)
        for node in graph.module2node.values():
            node.dependencies = _Watched(node.dependencies, visits)
        for group in graph.get_all_groups(root_module_types=roots):
            plain = _plain(group, graph, names, order, ends)
            groups.append(replace(plain, reason="they go round without end") if visits.endless else plain)
            visits.endless = False
            visits.of.clear()
    return sorted(groups, key=lambda g: order.get(g.name, len(order)))


class _Visits:
    """How often the walk that makes one group has come to each node. Slices and concatenations on a cycle (a rotary
    embedding) give it new positions every time round, and it would go on for ever.
    """

    most = 100

    def __init__(self, model: nn.Module) -> None:
        self.positions = 16 * max((size for p in model.parameters() for size in p.shape), default=1)
        self.of: dict[int, int] = {}
        self.endless = False


class _Watched(list[Any]):
    """The ways on from a node: none any more once a node of this walk was visited too often."""

    def __init__(self, ways: Iterable[Any], visits: _Visits) -> None:
        super().__init__(ways)
        self.visits = visits

    def __iter__(self) -> Iterator[Any]:
        count = self.visits.of[id(self)] = self.visits.of.get(id(self), 0) + 1
        self.visits.endless |= count > self.visits.most
        for way in () if self.visits.endless else super().__iter__():
            way.index_mapping = [_Bounded.of(mapping, self.visits) for mapping in way.index_mapping]
            yield way


class _Bounded:
    """What turns positions before an operation into those behind it. On a cycle through a flattening their number grows
    by a factor every time round: a walk with many more of them than the widest layer has is endless too.
    """

    def __init__(self, mapping: Callable[[Any], Any], visits: _Visits) -> None:
        self.mapping, self.visits = mapping, visits

    @classmethod
    def of(cls, mapping: Any, visits: _Visits) -> Any:
        return mapping if mapping is None or isinstance(mapping, cls) else cls(mapping, visits)

    def __call__(self, positions: Any) -> Any:
        if self.visits.endless or len(positions) > self.visits.positions:
            self.visits.endless = True
            return []
        return self.mapping(positions)


def _plain(group: Any, graph: Any, names: dict[nn.Module, str], order: dict[str, int], ends: set[Any]) -> Group:
    sides: dict[tuple[str, str], dict[int, int]] = {}
    size, why = len(group[0].idxs), ""
    for item in group:
        target = item.dep.target
        if target.module in names:
            side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            positions = sides.setdefault((names[target.module], side), {})
            for position, root in zip(item.idxs, item.root_idxs, strict=True):
                if root is None or positions.setdefault(int(position), int(root)) != int(root):
                    why = why or "one of its positions mixes two channels"
        elif isinstance(target.module, nn.Parameter):
            owner = graph._param_to_name.get(target.module, "a module")
            why = why or f"they meet the parameter {owner} of a custom module"
        makes = target.module not in names or side == "out"
        if target.grad_fn in ends and makes:
            why = why or "they are the output"
    parts = [
        Part(layer, side, tuple(sorted(positions)), tuple(positions[i] for i in sorted(positions)))
        for (layer, side), positions in sides.items()
    ]
    parts.sort(key=lambda p: (order.get(p.layer, len(order)), p.side))
    makers = [p.layer for p in parts if p.side == "out"]
    return Group(makers[0], size, tuple(parts), (0,) * size, why)
