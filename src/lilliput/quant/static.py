"""Static int8 quantization of an ONNX network, after training: convolutions and products on levels, range by range.

An operator y = W x + b becomes y = s_x t_j (C (q - z) + d): q the 8-bit levels of x, whose step s_x and zero point z
calibration fixed, C the 8-bit levels of W with one step t_j for each output, d the bias in 32-bit integers. The file
says so with QuantizeLinear and DequantizeLinear around the operators, which runtimes turn into integer arithmetic.

1. **Weights cannot saturate** where a CPU adds two products in 16 bits (AVX2 without VNNI): steps are taken so that no
   pair of neighbours is too large together (`ranges.pairs`), in the order in which a runtime multiplies them, channels
   last. So the file computes the same on every CPU. Depthwise convolutions are not computed that way and keep all
   levels.
2. **Activations are rounding**: where a Relu or Clip follows, the levels cover its range and the node goes.
3. **Residual sums, pools and concatenations** between such operators stay on levels too.
4. **Biases repair means**: each output's mean error, from the rounding of its weights and the mean of its inputs, is
   taken off its bias.

Sources: B. Jacob et al. Quantization and training of neural networks for efficient integer-arithmetic-only inference.
CVPR 2018. arXiv:1712.05877. M. Nagel et al. Data-free quantization through weight equalization and bias correction.
ICCV 2019. arXiv:1906.04721, section 4.2 (means, here of calibration inputs). The pair rule is ours.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.version_converter
import torch
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from lilliput.errors import NotSupported
from lilliput.onnx.session import Session
from lilliput.quant.grids import Levels
from lilliput.quant.int8 import INT8
from lilliput.quant.products import Array, Floats
from lilliput.quant.ranges import fit, minmax, pairs
from lilliput.quant.rewrite import Writer, folded, opset
from lilliput.quant.roundings import nearest
from lilliput.quant.sites import KEEPS, Graph, Site, data, graph, rows, unrows

SAMPLE = 16384  # values of an activation, enough for a quantile of one in a thousand
UINT8 = Levels(0, 255, symmetric=False, step=torch.float32)
LARGEST = 2.0**30  # of a bias in integers


@dataclass
class Seen:
    """What calibration saw of one activation: a sample, its extremes, and the mean of each channel."""

    sample: list[Floats] = field(default_factory=list, repr=False)
    low: float = 0.0
    high: float = 0.0
    total: Floats | None = field(default=None, repr=False)
    runs: int = 0

    def add(self, x: Floats, share: int, axis: int) -> None:
        """Take in the values of one run, `share` of them at most into the sample."""
        flat = x.ravel()
        self.sample.append(flat[:: max(1, -(-flat.size // share))].copy())
        self.low, self.high = min(self.low, float(flat.min())), max(self.high, float(flat.max()))
        mean = x.mean(tuple(a for a in range(x.ndim) if a != axis % x.ndim))
        self.total = mean if self.total is None else self.total + mean
        self.runs += 1

    def levels(self, rule: str) -> tuple[np.float32, np.uint8]:
        """The step and the zero point of its levels, by a rule of `ranges`."""
        ends = np.array([self.low, self.high], np.float32)
        values = ends if rule == "minmax" else np.concatenate([*self.sample, ends])
        scale, zero = fit(torch.from_numpy(values)[None], UINT8, rule, "static")
        return np.float32(max(float(scale[0, 0]), 1e-7)), np.uint8(zero[0, 0])


@dataclass(frozen=True)
class Observed:
    """A network and what calibration saw of it: everything that a choice of operators is written from.

    Args:
        proto: float32, constants folded, names unique.
        graph: its nodes.
        seen: of each activation.
        outputs: of each run.
    """

    proto: ModelProto
    graph: Graph
    seen: Mapping[str, Seen] = field(repr=False)
    outputs: Sequence[Sequence[Array]] = field(repr=False)
    _weights: dict[str, tuple[Array, Floats]] = field(default_factory=dict, repr=False)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The operators that may be chosen, in the order of the graph."""
        return self.graph.sites

    def weights(self, site: Site) -> tuple[Array, Floats]:
        """The 8-bit levels of a site's weights, as they are stored, and the steps of its outputs."""
        if site.name not in self._weights:
            held = next(t for t in self.proto.graph.initializer if t.name == site.weight)
            weight = numpy_helper.to_array(held)
            by_output = torch.from_numpy(rows(weight, site.axis, site.conv))
            depthwise = site.conv and weight.shape[1] == 1
            scale, zero = (minmax if depthwise else pairs)(by_output, INT8)
            levels = nearest(by_output, scale, zero, INT8).to(torch.int8).numpy()
            self._weights[site.name] = unrows(levels, weight.shape, site.axis, site.conv), scale[:, 0].numpy()
        return self._weights[site.name]


def observe(proto: ModelProto, calibration: Sequence[Mapping[str, Array]]) -> Observed:
    """Run a float32 network on calibration inputs and keep what levels are fitted to.

    Args:
        proto: any opset; one below 13 is raised to it.
        calibration: inputs by name, one run each; larger batches are faster, and take more memory.

    Raises:
        NotSupported: without a convolution or product with stored weights, or for an opset that cannot be raised.
        ValueError: without calibration inputs.
    """
    if not calibration:
        raise ValueError("static: calibration must have at least one run, got none. Give inputs by name.")
    known = folded(_raised(proto), "static")
    nodes = graph(known)
    if not nodes.sites:
        raise NotSupported("static: the network must have a convolution or product with stored weights, and has none.")
    outputs = [value.name for value in proto.graph.output]
    inputs = [value.name for value in proto.graph.input]
    wanted = dict.fromkeys(name for site in nodes.sites for name in (site.x, site.y))
    for name, (out, _) in nodes.joins.items():
        wanted |= dict.fromkeys([out, *data(nodes.nodes[name])])
    kinds = _floats(known, [name for name in wanted if name not in {*inputs, *outputs}])
    wide = ModelProto()
    wide.CopyFrom(known)
    wide.graph.output.extend(onnx.ValueInfoProto(name=name) for name in kinds)
    session = Session(wide)
    seen = {name: Seen() for name in wanted}
    axes = {site.x: 1 if site.conv else -1 for site in nodes.sites}
    dense = []
    for run in calibration:
        values = session.all(dict(run))
        dense.append(values[: len(outputs)])
        for name, x in (dict(run) | dict(zip([*outputs, *kinds], values, strict=True))).items():
            if name in seen and x.dtype == np.float32 and x.size and x.ndim:
                seen[name].add(x, SAMPLE // len(calibration) + 1, axes.get(name, 0))
    return Observed(known, nodes, {name: kept for name, kept in seen.items() if kept.runs}, dense)


def _raised(proto: ModelProto) -> ModelProto:
    """The network in opset 13, in which steps may differ by output, or in its own where that is newer."""
    if opset(proto) >= 13:
        return proto
    try:
        return onnx.version_converter.convert_version(proto, 13)
    except Exception as error:  # a library in C++ that raises what it likes
        raise NotSupported(f"static: the opset must be at least 13, got {opset(proto)}: {str(error)[:200]}") from error


def _floats(proto: ModelProto, names: list[str]) -> list[str]:
    """Those of the values that are float32 for sure, and so may become outputs."""
    inferred = onnx.shape_inference.infer_shapes(proto)
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    return [name for name in names if kinds.get(name, TensorProto.FLOAT) == TensorProto.FLOAT]


def static(
    proto: ModelProto,
    calibration: Sequence[Mapping[str, Array]],
    *,
    rule: str = "mse",
    only: Collection[str] | None = None,
) -> ModelProto:
    """The network with its convolutions and products in 8-bit integers whose ranges calibration fixed.

    Args:
        proto: float32, any opset; one below 13 is raised to it.
        calibration: inputs by name, one run each.
        rule: how ranges are fitted: "mse", "minmax" or "percentile" (`lilliput.quant.ranges`).
        only: names of sites (`observe(...).sites`) that are quantized; all of them otherwise.

    Raises:
        NotSupported, ValueError: as `observe`.

    Example:
        >>> from onnx import helper
        >>> w = numpy_helper.from_array(np.eye(64, dtype=np.float32), "w")
        >>> x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 64]) for n in "xy")
        >>> graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [w])
        >>> net = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        >>> small = static(net, [{"x": np.ones((1, 64), np.float32)}])
        >>> [node.op_type for node in small.graph.node]
        ['QuantizeLinear', 'DequantizeLinear', 'DequantizeLinear', 'MatMul']
    """
    seen = observe(proto, calibration)
    return written(seen, [site.name for site in seen.sites] if only is None else only, rule)


def written(seen: Observed, names: Collection[str], rule: str = "mse") -> ModelProto:
    """The network with these sites in 8-bit integers, and what lies between them where that stays on levels."""
    chosen = {site.name: site for site in seen.sites if site.name in names and {site.x, site.y} <= set(seen.seen)}
    held, joined = _held(seen, chosen)
    writer = _Quantizer(seen, rule, held, Writer(opset(seen.proto)))
    made_on_levels = {chosen[name].y for name in chosen if chosen[name].y in held}
    made_on_levels |= {seen.graph.joins[name][0] for name in joined}
    dropped = {name for site in chosen.values() if site.y in held for name in site.over}
    dropped |= {name for join in joined for name in seen.graph.joins[join][1]}
    for value in seen.proto.graph.input:
        writer.quantize(value.name, made=False)
    for node in seen.proto.graph.node:
        if node.name in dropped:
            continue
        if node.name in chosen:
            writer.site(node, chosen[node.name])
            out = chosen[node.name].y if chosen[node.name].y in held else node.output[0]
        elif node.name in joined:
            writer.join(node, seen.graph.joins[node.name][0])
            out = seen.graph.joins[node.name][0]
        else:
            writer.writer.nodes.append(node)
            out = ""
        for name in [out] if out else node.output:
            writer.quantize(name, made=name in made_on_levels)
    return writer.writer.model(seen.proto)


def _held(seen: Observed, chosen: Mapping[str, Site]) -> tuple[dict[str, str], set[str]]:
    """The activations kept as levels, each with the one that its levels are fitted to; the joins among them."""
    nodes, joins = seen.graph.nodes, seen.graph.joins
    held = {site.x for site in chosen.values()} | {site.y for site in chosen.values() if site.conv}
    possible = held | {site.y for site in chosen.values()}
    for name in nodes:
        if name in joins and all(x in possible and x in seen.seen for x in data(nodes[name])):
            possible.add(joins[name][0])
    joined: set[str] = set()
    for name in reversed(list(nodes)):
        if name not in joins or joins[name][0] not in held or joins[name][0] not in seen.seen:
            continue
        inputs = data(nodes[name])
        if all(x in possible and x in seen.seen for x in inputs):
            joined.add(name)
            held |= set(inputs)
    source = {name: name for name in held}
    for name in nodes:  # in order, so that a chain of them goes back to its first
        if name in joined and nodes[name].op_type in KEEPS:
            (x,), out = data(nodes[name]), joins[name][0]
            source[out] = source[x]
    return source, joined


@dataclass
class _Quantizer:
    """Writes quantized operators. `held` maps the values that are kept as levels to those that these are fitted to."""

    seen: Observed
    rule: str
    held: Mapping[str, str]
    writer: Writer
    _fitted: dict[str, tuple[np.float32, np.uint8]] = field(default_factory=dict)
    _numbers: dict[str, str] = field(default_factory=dict)

    def levels(self, name: str) -> tuple[np.float32, np.uint8]:
        """Step and zero point of a value that is kept as levels."""
        source = self.held[name]
        if source not in self._fitted:
            self._fitted[source] = self.seen.seen[source].levels(self.rule)
        return self._fitted[source]

    def quantize(self, name: str, made: bool) -> None:
        """Write the pair of operators behind a value. `made`: by an operator on levels, so that all read the levels."""
        if name not in self.held:
            return
        scale, zero = self.levels(name)
        grid = [
            self.writer.constant(f"{self.held[name]}/step", np.asarray(scale)),
            self.writer.constant(f"{self.held[name]}/zero", np.asarray(zero)),
        ]
        levels = self.writer.node("QuantizeLinear", [f"{name}/float" if made else name, *grid], f"{name}/levels")
        self._numbers[name] = self.writer.node("DequantizeLinear", [levels, *grid], name if made else f"{name}/numbers")

    def site(self, node: NodeProto, site: Site) -> None:
        """An operator with stored weights."""
        levels, step = self.seen.weights(site)
        scale = self.levels(site.x)[0]
        arrays = {t.name: t for t in self.seen.proto.graph.initializer}
        inputs = [self._numbers[site.x]]
        bias = None
        repaired = self._bias(site, arrays, levels, step)
        if repaired is not None:
            # Integers hold the bias in steps of both: larger steps of the weights where it would not fit.
            step = np.maximum(step, np.abs(repaired) / (scale * LARGEST)).astype(np.float32)
            bias = np.rint(repaired / (scale * step)).astype(np.int32)
        stored = self.writer.constant(f"{site.weight}/levels", levels)
        steps = self.writer.constant(f"{site.weight}/step", step)
        zeros = self.writer.constant(f"{site.weight}/zero", np.zeros(len(step), np.int8))
        inputs.append(
            self.writer.node("DequantizeLinear", [stored, steps, zeros], f"{node.name}/weight", axis=site.axis)
        )
        if bias is not None:
            both = self.writer.constant(f"{node.name}/bias_step", scale * step)
            whole = self.writer.constant(f"{node.name}/bias_levels", bias)
            inputs.append(self.writer.node("DequantizeLinear", [whole, both], f"{node.name}/bias", axis=0))
        out = f"{site.y}/float" if site.y in self.held else node.output[0]
        self._copied(node, inputs, out)

    def join(self, node: NodeProto, out: str) -> None:
        """An operator between them."""
        count = len(data(node))
        self._copied(node, [*(self._numbers[name] for name in data(node)), *node.input[count:]], f"{out}/float")

    def _copied(self, node: NodeProto, inputs: Sequence[str], output: str) -> None:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.input[:], copy.output[:] = inputs, [output]
        self.writer.nodes.append(copy)

    def _bias(self, site: Site, arrays: Mapping[str, TensorProto], levels: Array, step: Floats) -> Floats | None:
        """The bias with each output's mean error taken off; None where there is none and none can be given."""
        given = numpy_helper.to_array(arrays[site.bias]).astype(np.float32) if site.bias else None
        seen = self.seen.seen[site.x]
        node = self.seen.graph.nodes[site.name]
        if seen.total is None or node.op_type == "MatMul":
            return given
        weight = numpy_helper.to_array(arrays[site.weight])
        turned = [-1 if axis == site.axis else 1 for axis in range(weight.ndim)]
        apart = levels.astype(np.float32) * step.reshape(turned) - weight
        mean = seen.total / seen.runs
        if site.conv:
            groups = len(mean) // weight.shape[1]
            summed = apart.reshape(len(apart), weight.shape[1], -1).sum(2)  # (out, in of its group)
            parts = summed.reshape(groups, -1, weight.shape[1])
            drift = np.einsum("goi,gi->go", parts, mean.reshape(groups, -1)).ravel()
        else:
            drift = (apart if site.axis == 0 else apart.T) @ mean
        if given is None:
            given = np.zeros(len(drift), np.float32)
        return np.asarray(given - drift, np.float32)
