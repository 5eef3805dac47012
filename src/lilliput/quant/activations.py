"""Codes on activations: what a module puts out, on a grid of few bits."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lilliput.code.base import copy_model
from lilliput.errors import near
from lilliput.quant.ranges import RANGES, fit
from lilliput.stage import Reference, Stage, calibration, on
from lilliput.task import Task, call, length, take

CHILD = "output_code"
SAMPLE = 65536
COMPUTES = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
)
ACTIVATES = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.ELU, nn.Sigmoid, nn.Tanh)


class Activation(nn.Module):
    """y = s (clip(round(x / s) + z, 0, 2^b - 1) - z), one step s and zero point z for all of a tensor.

    The gradient passes the rounding straight through, and is zero where x is clipped. In an ONNX export it is a pair of
    QuantizeLinear and DequantizeLinear, which runtimes turn into integer arithmetic.

    bits: 2 to 8. scale, zero_point: buffers, set by calibration.

    Source: Jacob et al., CVPR 2018, arXiv:1712.05877, equation 12.

    >>> code = Activation(2); code.calibrate(torch.tensor([0.0, 3.0]), "minmax")
    >>> code(torch.tensor([-1.0, 1.2, 9.0]))
    tensor([0., 1., 3.])
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        if not 2 <= bits <= 8:
            raise ValueError(f"QuantizeActivations: bits must be from 2 to 8, got {bits}.")
        self.bits = bits
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.uint8))

    @torch.no_grad()
    def calibrate(self, values: Tensor, rule: str) -> None:
        """Fit the range to values that were seen, by a rule of `lilliput.quant.ranges`."""
        scale, zero = fit(values.reshape(1, -1), (0, 2**self.bits - 1), False, rule)
        self.scale.copy_(scale[0, 0])
        self.zero_point.copy_(zero[0, 0])

    def forward(self, x: Tensor) -> Tensor:
        top = 2**self.bits - 1
        if not torch.onnx.is_in_onnx_export():
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point.int(), 0, top)
        if self.bits < 8:
            x = torch.minimum(x, (top - self.zero_point.float()) * self.scale)
        grid = self.scale, self.zero_point
        q = torch.onnx.ops.symbolic("QuantizeLinear", (x, *grid), dtype=torch.uint8, shape=x.shape)
        return torch.onnx.ops.symbolic("DequantizeLinear", (q, *grid), dtype=torch.float32, shape=x.shape)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


@dataclass(frozen=True)
class QuantizeActivations(Stage):
    """Put an `Activation` code on the outputs of modules, its range calibrated on the task's training inputs.

    where: glob patterns on module names. "*" takes every linear, convolutional, embedding, normalisation and activation
    module, except one whose output goes straight into a normalisation or activation that is taken as well (one rounding
    is enough), and the last (its output is the answer: rounding it saves no arithmetic). range: "mse", "minmax" or
    "percentile". Modules whose output is no tensor, and those that the calibration never calls, are left alone.

    Raises ValueError for settings out of range, without a task, and when nothing is left to quantize.

    Source: Jacob et al., CVPR 2018, arXiv:1712.05877, section 3.
    """

    bits: int = 8
    where: str = "*"
    range: str = "mse"
    examples: int = 256

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        Activation(self.bits)
        if self.range not in RANGES:
            raise ValueError(
                f"QuantizeActivations: range must be a known rule, got {self.range!r}. {near(self.range, RANGES)}"
            )
        if self.examples < 1:
            raise ValueError(f"QuantizeActivations: examples must be at least 1, got {self.examples}.")

    def __call__(self, model: nn.Module, task: Task | None, reference: Reference | None) -> nn.Module:
        if task is None:
            raise ValueError("QuantizeActivations: a task must be given to calibrate on, got None.")
        model = copy_model(model)
        seen, last = _observe(model, self._chosen(model), task, self.examples)
        if self.where == "*":
            seen.pop(last, None)
        if not seen:
            raise ValueError(f"QuantizeActivations: some module must put out a tensor, got none of {self.where!r}.")
        for name, values in seen.items():
            code = Activation(self.bits).to(values.device)
            code.calibrate(values, self.range)
            module = model.get_submodule(name)
            module.add_module(CHILD, code)
            module.register_forward_hook(_apply)
        return model

    def _chosen(self, model: nn.Module) -> list[str]:
        patterns = [pattern.strip() for pattern in self.where.split(",")]
        known = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, COMPUTES + ACTIVATES) and not hasattr(module, CHILD)
        }
        chosen = [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns)]
        if not chosen:
            raise ValueError(
                f"QuantizeActivations: where must match a module that computes, got {self.where!r}. "
                f"{near(self.where, known)}"
            )
        return chosen


def _apply(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    coded: Tensor = getattr(module, CHILD)(output)
    return coded


@torch.no_grad()
def _observe(model: nn.Module, names: list[str], task: Task, examples: int) -> tuple[dict[str, Tensor], str]:
    """Up to SAMPLE values that each module puts out, evenly spread, without the modules that feed an activation; and
    the module that puts out what the model does."""
    seen: dict[str, list[Tensor]] = {}
    last: dict[int, tuple[str, Tensor]] = {}
    fused: set[str] = set()
    final, training = "", model.training
    handles = []

    def hook(name: str, absorbs: bool) -> Any:
        def listen(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if absorbs and inputs and id(inputs[0]) in last:
                fused.add(last[id(inputs[0])][0])
            if isinstance(output, Tensor) and output.is_floating_point():
                last[id(output)] = (name, output)
                flat = output.flatten()
                seen.setdefault(name, []).append(flat[:: max(1, len(flat) * parts // SAMPLE)].clone())

        return listen

    inputs = calibration(task, examples)
    starts = range(0, length(inputs), 64)
    parts = len(starts)
    for name in names:
        module = model.get_submodule(name)
        absorbs = isinstance(module, (*ACTIVATES, nn.modules.batchnorm._BatchNorm))
        handles.append(module.register_forward_hook(hook(name, absorbs)))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    model.eval()
    for start in starts:
        output = call(model, on(take(inputs, slice(start, start + 64)), device))
        final = last[id(output)][0] if id(output) in last else final
        last.clear()
    for handle in handles:
        handle.remove()
    model.train(training)
    return {name: torch.cat(values) for name, values in seen.items() if name not in fused}, final
