"""Outputs of modules on calibration inputs, from which ranges of activations are fitted."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.task import Task, call, length, on, take

SAMPLE = 65536  # values of a module, enough for a quantile of one in a thousand
BATCH = 64


@dataclass(frozen=True)
class Outputs:
    """What modules put out on calibration inputs.

    Attributes:
        values: up to `SAMPLE` values of each module whose output is a tensor of floats, evenly spread.
        into: the modules that each one's output goes straight into.
        last: the module whose output is the model's, or "".
    """

    values: dict[str, Tensor] = field(repr=False)
    into: dict[str, set[str]]
    last: str


@torch.no_grad()
def outputs(model: nn.Module, names: list[str], task: Task, examples: int = 256) -> Outputs:
    """Run calibration inputs and sample what the modules `names` put out; those that are not called are left out.

    Args:
        model: run in eval mode, and left in the mode that it was in.
        names: of modules.
        task: whose training inputs are used.
        examples: how many of them at most.

    Example:
        >>> x = torch.ones(4, 2)
        >>> net = nn.Sequential(nn.Identity(), nn.ReLU())
        >>> seen = outputs(net, ["0", "1"], Task("ones", train=x, val=x))
        >>> seen.values["0"].shape, seen.into, seen.last
        (torch.Size([8]), {'0': {'1'}}, '1')
    """
    seen: dict[str, list[Tensor]] = {}
    into: dict[str, set[str]] = {}
    # By identity, with the tensor held: the same number may name another tensor once this one is gone.
    put_out: dict[int, tuple[str, Tensor]] = {}
    inputs = task.calibration(examples)
    starts = range(0, length(inputs), BATCH)

    def listener(name: str) -> Any:
        def listen(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            if given and id(given[0]) in put_out:
                into.setdefault(put_out[id(given[0])][0], set()).add(name)
            if isinstance(output, Tensor) and output.is_floating_point():
                put_out[id(output)] = (name, output)
                flat = output.flatten()
                seen.setdefault(name, []).append(flat[:: max(1, len(flat) * len(starts) // SAMPLE)].clone())

        return listen

    hooks = [model.get_submodule(name).register_forward_hook(listener(name)) for name in names]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    last, training = "", model.training
    model.eval()
    for start in starts:
        output = call(model, on(take(inputs, slice(start, start + BATCH)), device))
        last = put_out[id(output)][0] if id(output) in put_out else last
        put_out.clear()
    for hook in hooks:
        hook.remove()
    model.train(training)
    return Outputs({name: torch.cat(values) for name, values in seen.items()}, into, last)
