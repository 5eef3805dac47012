"""Second moments of what the weights of an ONNX network multiply, which roundings weigh errors by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, helper
from torch import Tensor
from torch.nn import functional as F

from lilliput.onnx.session import Session
from lilliput.quant.products import Array
from lilliput.quant.rewrite import folded
from lilliput.quant.sites import Site, graph

ROWS = 4096  # of a layer, over all runs
WIDEST = 2048  # values of one output; solving for more takes longer than it is worth


def moments(proto: ModelProto, calibration: Sequence[Mapping[str, Array]]) -> dict[str, Tensor]:
    """E[x x^T] for each stored weight of a convolution or product, x the values that one output of it multiplies.

    Args:
        proto: float32, any opset.
        calibration: inputs by name, one run each.

    Returns:
        By the name of the weight: float32 (groups, d, d). A weight that several operators read gets their mean; one
        with more than 2,048 values for an output is left out.

    Example:
        >>> from onnx import numpy_helper
        >>> w = numpy_helper.from_array(np.ones((2, 3), np.float32), "w")
        >>> x, y = (helper.make_tensor_value_info(n, 1, None) for n in "xy")
        >>> net = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [w])
        >>> net = helper.make_model(net, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        >>> moments(net, [{"x": np.array([[1, 2]], np.float32)}])["w"].tolist()
        [[[1.0, 2.0], [2.0, 4.0]]]
    """
    known = folded(proto, "moments", least=1)
    nodes = graph(known)
    shapes = {t.name: tuple(t.dims) for t in known.graph.initializer}
    sites = [site for site in nodes.sites if _width(site, shapes[site.weight]) <= WIDEST]
    inside = {*(value.name for value in proto.graph.input), *(value.name for value in proto.graph.output)}
    names = list(dict.fromkeys(site.x for site in sites if site.x not in inside))
    wide = ModelProto()
    wide.CopyFrom(known)
    wide.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = Session(wide)
    outputs = [value.name for value in proto.graph.output]
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for run in calibration:
        values = dict(run) | dict(zip([*outputs, *names], session.all(dict(run)), strict=True))
        for site in sites:
            x = torch.from_numpy(np.array(values[site.x], np.float32))
            rows = _rows(x, site, nodes.nodes[site.name], shapes[site.weight], -(-ROWS // len(calibration)))
            moment = rows.transpose(1, 2) @ rows
            sums[site.weight] = sums[site.weight] + moment if site.weight in sums else moment
            counts[site.weight] = counts.get(site.weight, 0) + rows.shape[1]
    return {name: total / max(1, counts[name]) for name, total in sums.items()}


def _width(site: Site, shape: tuple[int, ...]) -> int:
    """How many values one output multiplies."""
    return int(np.prod(shape[1:])) if site.conv else shape[1 - site.axis]


def _rows(x: Tensor, site: Site, node: NodeProto, shape: tuple[int, ...], most: int) -> Tensor:
    """What the weights multiply in one run, (groups, n, d), at most about `most` rows of it."""
    if not site.conv:
        flat = x.reshape(-1, x.shape[-1])
        return flat[:: -(-len(flat) // most)][None]
    settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    groups, axes = int(settings.get("group", 1)), len(shape) - 2
    if axes > 2:
        return torch.zeros(groups, 0, int(np.prod(shape[1:])))
    x = x.reshape(len(x), x.shape[1], *(1,) * (2 - axes), *x.shape[2:])
    pads = [int(p) for p in settings.get("pads", [0] * 2 * axes)]
    sides = [side for axis in reversed(range(axes)) for side in (pads[axis], pads[axis + axes])]
    kernel, stride, dilation = (
        (1,) * (2 - axes) + tuple(int(v) for v in values)
        for values in (shape[2:], settings.get("strides", [1] * axes), settings.get("dilations", [1] * axes))
    )
    parts, each = [], -(-most // len(x))
    for image in F.pad(x, sides).split(1):
        patches = F.unfold(image, kernel, dilation, 0, stride)[0]  # (channels * kernel, places)
        patches = patches[:, :: -(-patches.shape[1] // each)]
        parts.append(patches.reshape(groups, -1, patches.shape[1]).transpose(1, 2))
    return torch.cat(parts, 1)
