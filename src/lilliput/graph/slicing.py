"""Slicing of one layer: which of its tensors shrink along which dimension when it has fewer channels."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from lilliput.graph import recurrent

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
MAPS = (nn.Linear, *CONVS, *TRANSPOSED, nn.RNNBase)  # what mixes channels: an `in` and an `out` side
TABLES = (nn.Embedding, nn.EmbeddingBag)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
KNOWN = (*MAPS, *TABLES, *BATCH_NORMS, *INSTANCE_NORMS, nn.LayerNorm, nn.GroupNorm, nn.PReLU)


def depthwise(layer: nn.Module) -> bool:
    """Tell whether each channel is convolved by itself (one `out` side, no `in` side)."""
    return isinstance(layer, (*CONVS, *TRANSPOSED)) and 1 < layer.groups == layer.in_channels == layer.out_channels


def reason(layer: nn.Module) -> str:
    """Say why this layer cannot lose channels whatever surrounds it; empty when it can."""
    if isinstance(layer, nn.MultiheadAttention):
        return "the heads of a MultiheadAttention share its embed_dim"
    if not isinstance(layer, KNOWN):
        return f"a {type(layer).__name__} has parameters of its own"
    extra = set(layer._parameters) - set(_names(layer))
    if extra:
        return f"its {type(layer).__name__} has the extra parameter {sorted(extra)[0]}"
    if any(name not in layer._parameters for name in _names(layer)):
        return "its weight is computed from other tensors"
    if isinstance(layer, nn.RNNBase):
        return recurrent.reason(layer)
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) > 1:
        return "a LayerNorm over several dimensions mixes channels with positions"
    if isinstance(layer, (*CONVS, *TRANSPOSED)) and layer.groups > 1 and not depthwise(layer):
        per = (layer.in_channels // layer.groups, layer.out_channels // layer.groups)
        return "its groups are too narrow to lose channels evenly" if 1 in per or isinstance(layer, TRANSPOSED) else ""
    return ""


def _names(layer: nn.Module) -> tuple[str, ...]:
    if isinstance(layer, nn.RNNBase):
        return tuple(n for group in layer._all_weights for n in group)
    return ("weight",) if isinstance(layer, (*TABLES, nn.PReLU)) else ("weight", "bias")


def width(layer: nn.Module, side: str) -> int:
    """Return how many channels the layer has on its `out` or `in` side."""
    m = cast(Any, layer)
    if isinstance(layer, nn.RNNBase):
        return int(layer.hidden_size if side == "out" else layer.input_size)
    if isinstance(layer, nn.Linear):
        return layer.out_features if side == "out" else layer.in_features
    if isinstance(layer, (*CONVS, *TRANSPOSED)):
        return int(layer.out_channels if side == "out" else layer.in_channels)
    if isinstance(layer, TABLES):
        return layer.embedding_dim
    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[0]
    for attribute in ("num_features", "num_channels", "num_parameters"):
        if hasattr(m, attribute):
            return int(getattr(m, attribute))
    raise TypeError(f"width: must be a layer with channels, got {type(layer).__name__}.")


def partitions(layer: nn.Module) -> int:
    """Return into how many equal runs the layer divides its channels; each run must keep as many as the others."""
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups
    if isinstance(layer, (*CONVS, *TRANSPOSED)) and not depthwise(layer):
        return int(layer.groups)
    return 1


def channels(layer: nn.Module, side: str, tensor: str) -> int | None:
    """Return along which dimension of its parameter `tensor` the channels of one side lie; None where they do not."""
    if isinstance(layer, TABLES):
        return 1
    if side == "out":
        return 1 if isinstance(layer, TRANSPOSED) and tensor == "weight" and not depthwise(layer) else 0
    if tensor != "weight":
        return None
    return 0 if isinstance(layer, TRANSPOSED) else 1


def narrow_(layer: nn.Module, out: Tensor | None, inputs: Tensor | None) -> None:
    """Keep the channels `out` of the layer's output and `inputs` of its input (sorted indices; None keeps all)."""
    m = cast(Any, layer)
    out, inputs = _beside(layer, out), _beside(layer, inputs)
    if isinstance(layer, nn.RNNBase):
        recurrent.narrow_(layer, out, inputs)
        return
    if inputs is not None:
        if isinstance(layer, CONVS) and layer.groups > 1:
            _parameter_(m, "weight", _grouped(layer.weight.detach(), inputs, layer.groups, layer.in_channels))
        else:
            _parameter_(m, "weight", m.weight.detach().index_select(cast(int, channels(layer, "in", "weight")), inputs))
        setattr(m, "in_features" if isinstance(layer, nn.Linear) else "in_channels", len(inputs))
    if out is None or (isinstance(layer, nn.PReLU) and layer.num_parameters == 1):
        return
    for name, p in list(layer._parameters.items()):
        if p is not None:
            _parameter_(m, name, p.detach().index_select(cast(int, channels(layer, "out", name)), out))
    for name, buffer in list(layer._buffers.items()):
        if buffer is not None and buffer.ndim:
            m._buffers[name] = buffer[out].clone()
    _resize_(m, len(out))


def _beside(layer: nn.Module, index: Tensor | None) -> Tensor | None:
    """The index on the device of the layer's tensors."""
    held = next((t for t in (*layer.parameters(), *layer.buffers())), None)
    return index if index is None or held is None else index.to(held.device)


def _resize_(m: Any, size: int) -> None:
    if depthwise(m):
        m.in_channels = m.out_channels = m.groups = size
    elif isinstance(m, (*CONVS, *TRANSPOSED)):
        m.out_channels = size
    elif isinstance(m, nn.Linear):
        m.out_features = size
    elif isinstance(m, TABLES):
        m.embedding_dim = size
    elif isinstance(m, nn.LayerNorm):
        m.normalized_shape = (size,)
    elif isinstance(m, nn.GroupNorm):
        m.num_channels = size
    elif isinstance(m, nn.PReLU):
        m.num_parameters = size
    else:
        m.num_features = size


def _parameter_(layer: nn.Module, name: str, value: Tensor) -> None:
    old = cast(Tensor, getattr(layer, name))
    setattr(layer, name, nn.Parameter(value.clone(), requires_grad=old.requires_grad))


def _grouped(weight: Tensor, inputs: Tensor, groups: int, size: int) -> Tensor:
    """Columns of a grouped convolution (out, in / groups, ...): each group keeps its own."""
    kept = inputs.view(groups, -1) - torch.arange(groups, device=inputs.device)[:, None] * (size // groups)
    rows = weight.unflatten(0, (groups, -1))
    return torch.cat([rows[g][:, kept[g]] for g in range(groups)])


def silence_(layer: nn.Module, inputs: Tensor) -> None:
    """Zero what reads the input channels `inputs`: the same function as removing them, at the old size."""
    inputs = cast(Tensor, _beside(layer, inputs))
    if isinstance(layer, nn.RNNBase):
        for name in [n for n in _names(layer) if n.startswith("weight_ih_l0")]:
            _parameter_(layer, name, cast(Tensor, getattr(layer, name)).detach().index_fill(1, inputs, 0))
        return
    weight = cast(Tensor, layer.weight).detach().clone()
    if isinstance(layer, CONVS) and layer.groups > 1:
        per = layer.in_channels // layer.groups
        rows = weight.unflatten(0, (layer.groups, -1))
        for i in inputs.tolist():
            rows[i // per, :, i % per] = 0
    else:
        weight.index_fill_(cast(int, channels(layer, "in", "weight")), inputs, 0)
    _parameter_(layer, "weight", weight)


def mute_(layer: nn.Module, outputs: Tensor) -> None:
    """Zero every parameter that makes the output channels `outputs`."""
    outputs = cast(Tensor, _beside(layer, outputs))
    for name, p in list(layer._parameters.items()):
        if p is None:
            continue
        rows, dim = outputs, cast(int, channels(layer, "out", name))
        if isinstance(layer, nn.RNNBase):  # unit i has a row in each gate
            rows = torch.cat([outputs + gate for gate in range(0, len(p), layer.hidden_size)])
        _parameter_(layer, name, p.detach().index_fill(dim, rows, 0))


def per_channel(layer: nn.Module, side: str, tensor: str, values: Tensor) -> Tensor | None:
    """Sum `values`, one a number of the parameter `tensor`, over each channel of a side; None where it has none."""
    if isinstance(layer, nn.RNNBase):
        return _per_unit(layer, side, tensor, values)
    dim = channels(layer, side, tensor)
    if dim is None:
        return None
    if side == "in" and isinstance(layer, CONVS) and layer.groups > 1:
        columns: Tensor = values.unflatten(0, (layer.groups, -1)).transpose(1, 2)
        return columns.flatten(2).sum(-1).flatten()
    return values.transpose(0, dim).flatten(1).sum(-1) if values.ndim > 1 else values


def _per_unit(layer: nn.RNNBase, side: str, tensor: str, values: Tensor) -> Tensor | None:
    if side == "in":
        return values.sum(0) if tensor.startswith("weight_ih_l0") else None
    rows: Tensor = values.reshape(-1, layer.hidden_size, *values.shape[1:]).transpose(0, 1).flatten(1).sum(-1)
    return rows + values.sum(0) if tensor.startswith("weight_hh") else rows
