"""Load and check an ONNX file that may come from a stranger.

Nothing outside its folder is read, and no size that it names is trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

MOST_ELEMENTS = 2**31 - 1  # of one tensor
ONNX_DOMAINS = ("", "ai.onnx")


def op_name(node: NodeProto) -> str:
    """The operator's type, with its domain where that is not ONNX's own."""
    return node.op_type if node.domain in ONNX_DOMAINS else f"{node.domain}.{node.op_type}"


def load(model: str | Path | bytes | ModelProto, who: str = "compile") -> ModelProto:
    """A checked ONNX model with its external tensors, which must be plain files in its own folder.

    Args:
        model: a path, the file's bytes, or a ModelProto (which is checked, and gets its tensors from nowhere else).
        who: what error messages begin with.

    Returns:
        The model, with every tensor inside.

    Raises:
        ValueError: for a file that is not there, damaged, of an opset that the onnx package does not know, or whose
            tensors lie elsewhere than beside it.
    """
    folder, name = None, "the model"
    if isinstance(model, ModelProto):
        proto = model
    else:
        if isinstance(model, str | Path):
            path = Path(model)
            if not path.is_file():
                raise ValueError(f"{who}: the model must be an ONNX file that exists, got {path}.")
            folder, name, data = path.resolve().parent, path.name, path.read_bytes()
        else:
            data = bytes(model)
        proto = ModelProto()
        try:
            proto.ParseFromString(data)
        except Exception as error:
            raise ValueError(f"{who}: {name} must be an ONNX model, and is damaged ({str(error)[:80]}).") from error
    if not proto.graph.node and not proto.graph.output:
        raise ValueError(f"{who}: {name} must be an ONNX model with nodes, got none. Export it again.")
    _judge(proto, name, who)
    for tensor in _tensors(proto):
        if tensor.data_location == TensorProto.EXTERNAL:
            _bring(tensor, folder, name, who)
    return proto


def _judge(proto: ModelProto, name: str, who: str) -> None:
    """Raise ValueError where a name is no text, or a version none that the package onnx knows."""
    newest = onnx.defs.onnx_opset_version()
    for entry in proto.opset_import:
        if not 1 <= entry.version <= (newest if entry.domain in ONNX_DOMAINS else 2**31 - 1):
            raise ValueError(
                f"{who}: {name} must be of opset 1 to {newest}, got {entry.version} of "
                f"{entry.domain!r}. A newer opset needs a newer onnx package."
            )
    texts: list[Any] = [entry.domain for entry in proto.opset_import]
    for holder in (proto.graph, *proto.functions):
        for node in holder.node:
            texts += [node.name, node.op_type, node.domain, *node.input, *node.output]
            texts += [attribute.name for attribute in node.attribute]
    for function in proto.functions:
        texts += [function.name, function.domain, *function.input, *function.output, *function.attribute]
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        texts += [value.name, *(dim.dim_param for dim in value.type.tensor_type.shape.dim)]
    texts += [tensor.name for tensor in _tensors(proto)]
    if wrong := next((text for text in texts if not isinstance(text, str)), None):
        raise ValueError(f"{who}: the names of {name} must be UTF-8, got {wrong!r:.80}. The file is damaged.")


def _tensors(proto: ModelProto) -> list[TensorProto]:
    """Every tensor of the model and its functions, those in attributes too."""
    tensors = list(proto.graph.initializer)
    for holder in (proto.graph, *proto.functions):
        for node in holder.node:
            for attribute in node.attribute:
                tensors += [attribute.t] if attribute.HasField("t") else []
                tensors += list(attribute.tensors)
    return tensors


def _bring(tensor: TensorProto, folder: Path | None, name: str, who: str) -> None:
    """Read an external tensor into the model."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    text = where.get("location", "")
    if folder is None:
        raise ValueError(
            f"{who}: {name} must hold its tensors, but {tensor.name!r} is in the file {text!r}. Give "
            "the path of the model."
        )
    path = folder / text
    inside = text and not Path(text).is_absolute() and ".." not in Path(text).parts and not path.is_symlink()
    if not inside or not path.resolve().is_relative_to(folder) or not path.is_file():
        raise ValueError(
            f"{who}: the tensors of {name} must lie in files beside it, got {text!r} for "
            f"{tensor.name!r}. Save the model as one file."
        )
    try:
        start, length = int(where.get("offset", 0)), where.get("length")
        wanted = elements(tensor.dims, who) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        size = int(length) if length is not None else wanted
        if start < 0 or size < 0 or start + size > path.stat().st_size:
            raise ValueError(f"{size} bytes at {start} are not in {text!r}")
        with path.open("rb") as file:
            file.seek(start)
            tensor.raw_data = file.read(size)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{who}: tensor {tensor.name!r} of {name} must be whole, got {error}.") from error
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def elements(dims: Sequence[int], who: str = "compile") -> int:
    """How many elements a tensor has.

    Raises:
        ValueError: For sizes that no tensor has, or more elements than MOST_ELEMENTS.
    """
    count = 1
    for size in dims:
        if size < 0:
            raise ValueError(f"{who}: sizes must not be negative, got {list(dims)}.")
        count *= size or 1  # a tensor without elements must not have huge sizes either
    if count > MOST_ELEMENTS:
        raise ValueError(f"{who}: a tensor must have at most {MOST_ELEMENTS} elements, got {list(dims)}.")
    return 0 if 0 in dims else count


def array_of(tensor: TensorProto, who: str = "compile") -> NDArray[Any]:
    """A tensor's numbers.

    Raises:
        ValueError: Where they are not as many as its sizes say.
    """
    elements(tensor.dims, who)
    try:
        return np.array(numpy_helper.to_array(tensor))
    except Exception as error:
        raise ValueError(f"{who}: tensor {tensor.name!r} must be whole, got {str(error)[:120]}.") from error
