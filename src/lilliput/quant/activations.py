"""Quantize activations: round the outputs of modules to a grid of few bits."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lilliput.code.base import copy_model
from lilliput.errors import near
from lilliput.quant.grids import uniform
from lilliput.quant.ranges import fit
from lilliput.registry import find
from lilliput.stage import Reference, Stage
from lilliput.statistics.outputs import outputs
from lilliput.task import Task

CHILD = "output_code"
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
    QuantizeLinear and DequantizeLinear, which runtimes turn into integer arithmetic. The step and the zero point are
    buffers, set by calibration.

    Args:
        bits: 2 to 8.

    Source:
        Jacob et al., CVPR 2018, arXiv:1712.05877, equation 12.

    Example:
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
        scale, zero = fit(values.reshape(1, -1), uniform(self.bits, symmetric=False), rule, "Activation")
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

    Modules whose output is no tensor, and those that the calibration never calls, are left alone.

    Args:
        bits: 2 to 8.
        where: glob patterns on module names. "*" takes every linear, convolutional, embedding, normalisation and
            activation module, except one whose output goes straight into a batch normalisation or activation that is
            taken as well (one rounding is enough), and the last (its output is the answer: rounding it saves no
            arithmetic).
        range: "mse", "minmax" or "percentile", a rule of `lilliput.quant.ranges`.
        examples: how many inputs are used.

    Raises:
        KeyError: for an unknown range.
        ValueError: for settings out of range, without a task, and when nothing is left to quantize.

    Example:
        >>> x = torch.linspace(0, 1, 32).reshape(16, 2)
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).eval()
        >>> small = QuantizeActivations(4, range="minmax")(net, Task("lines", train=x, val=x), None)
        >>> bool(small[:2](x).unique().numel() <= 16)
        True

    Source:
        Jacob et al., CVPR 2018, arXiv:1712.05877, section 3.
    """

    bits: int = 8
    where: str = "*"
    range: str = "mse"
    examples: int = 256

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        Activation(self.bits)
        find("range", self.range, "QuantizeActivations")
        if self.examples < 1:
            raise ValueError(f"QuantizeActivations: examples must be at least 1, got {self.examples}.")

    def __call__(self, model: nn.Module, task: Task | None, reference: Reference | None) -> nn.Module:
        if task is None:
            raise ValueError("QuantizeActivations: a task must be given to calibrate on, got None.")
        model = copy_model(model)
        measured = outputs(model, self._chosen(model), task, self.examples)
        # One rounding is enough: an output that goes straight into an activation is rounded behind that.
        fused = {name for name, readers in measured.into.items() if any(_absorbs(model, reader) for reader in readers)}
        seen = {name: values for name, values in measured.values.items() if name not in fused}
        if self.where == "*":
            seen.pop(measured.last, None)
        if not seen:
            raise ValueError(f"QuantizeActivations: some module must put out a tensor, got none of {self.where!r}.")
        for name, values in seen.items():
            code = Activation(self.bits).to(values.device)
            code.calibrate(values, self.range)
            put(model.get_submodule(name), code)
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


def put(module: nn.Module, code: Activation) -> None:
    """Round what a module puts out from now on."""
    module.add_module(CHILD, code)
    module.register_forward_hook(_apply)


def activations(model: nn.Module) -> dict[str, int]:
    """The bits of each module's outputs that are rounded."""
    return {
        name.removesuffix(CHILD).rstrip("."): module.bits
        for name, module in model.named_modules()
        if isinstance(module, Activation)
    }


def _apply(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    coded: Tensor = getattr(module, CHILD)(output)
    return coded


def _absorbs(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), (*ACTIVATES, nn.modules.batchnorm._BatchNorm))
