"""What ordinary tools make of a trained network: one ONNX file each, by the names of the tools.

float32 is torch's exporter and ONNX Runtime's basic clean-up; float16 and dynamic and static int8 are ONNX Runtime's
own converters; "int8 weights" keeps the arithmetic and stores matrices and tables as int8, a scale for each slice.
"""

import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from lilliput import Task
from lilliput.export.onnx import quiet
from lilliput.task import leaves

FEWEST = 128  # values that a tensor needs before its int8 form and its DequantizeLinear are smaller
KINDS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
Inputs = Any


def exported(model: nn.Module, example: Inputs) -> ModelProto:
    """The float32 file: the smaller one of torch's two exporters, cleaned by ONNX Runtime at its basic level.

    Args:
        model: in eval mode.
        example: a batch of at least two examples.

    Raises:
        RuntimeError: where neither exporter takes the model.
    """
    args = tuple(example.values()) if isinstance(example, dict) else example
    args = args if isinstance(args, tuple) else (args,)
    names = [f"x{i}" for i in range(len(leaves(args)))]
    found, failed = [], []
    for dynamo in (False, True):
        buffer = io.BytesIO()
        axes: dict[str, Any] = (
            {"dynamic_shapes": tuple({0: torch.export.Dim("n")} for _ in args)}
            if dynamo
            else {"dynamic_axes": {name: {0: "n"} for name in (*names, "y")}}
        )
        try:
            with quiet(), torch.no_grad():
                torch.onnx.export(model, args, buffer, dynamo=dynamo, opset_version=18 if dynamo else 17,
                                  input_names=names, output_names=["y"], **axes)  # fmt: skip
            found.append(cleaned(onnx.load_from_string(buffer.getvalue())))
        except Exception as error:  # each exporter fails in many ways, and the other may not
            failed.append(f"{type(error).__name__}: {str(error)[:200]}")
    if not found:
        raise RuntimeError(f"rival: torch.onnx.export must take the model, but {'; '.join(failed)}")
    return min(found, key=ModelProto.ByteSize)


def cleaned(proto: ModelProto) -> ModelProto:
    """Without notes, and as ONNX Runtime rewrites it at its basic level where that is smaller."""
    stripped = _stripped(proto)
    with tempfile.TemporaryDirectory() as folder, quiet():
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(folder, "m.onnx"))
        options.log_severity_level = 4
        onnxruntime.InferenceSession(stripped.SerializeToString(), options, providers=["CPUExecutionProvider"])
        basic = _stripped(onnx.load(options.optimized_model_filepath))
    return min(stripped, basic, key=ModelProto.ByteSize)


def _stripped(proto: ModelProto) -> ModelProto:
    del proto.metadata_props[:]
    proto.ClearField("doc_string")
    del proto.graph.value_info[:]
    for item in (*proto.graph.node, *proto.graph.input, *proto.graph.output, proto.graph):
        item.ClearField("doc_string")
        if hasattr(item, "metadata_props"):
            del item.metadata_props[:]
    for i, node in enumerate(proto.graph.node):
        node.name = f"n{i}"
    return proto


def half(proto: ModelProto) -> ModelProto:
    """float16 by ONNX Runtime's converter; inputs and outputs stay float32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with quiet():
        return _stripped(convert_float_to_float16(_copy(proto), keep_io_types=True))


def int8_weights(proto: ModelProto) -> ModelProto:
    """Each matrix, filter and table as int8 and a DequantizeLinear, with a scale for each slice of its best axis."""
    made = _copy(proto)
    graph, before = made.graph, []
    held = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) > 1}
    for name, tensor in held.items():
        weight = numpy_helper.to_array(tensor)
        if weight.size < FEWEST:
            continue
        scale, axis = _scales(weight)
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        grid = np.rint(weight / scale.reshape(shape)).clip(-127, 127).astype(np.int8)
        tensor.CopyFrom(numpy_helper.from_array(grid, f"{name}8"))
        single = scale.reshape(()) if len(scale) == 1 else scale
        graph.initializer.append(numpy_helper.from_array(single, f"{name}s"))
        given = {} if len(scale) == 1 else {"axis": axis}
        before.append(helper.make_node("DequantizeLinear", [f"{name}8", f"{name}s"], [name], **given))
    nodes = [*before, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return made


def _scales(weight: np.ndarray) -> tuple[np.ndarray, int]:
    """Scales along the axis with the least error among those whose scales cost little; one scale where none does."""
    best: tuple[float, np.ndarray, int] | None = None
    for axis in [i for i in range(weight.ndim) if weight.shape[i] * 16 <= weight.size] or [-1]:
        rest = tuple(i for i in range(weight.ndim) if i != axis)
        top = np.abs(weight).max(axis=rest) if axis >= 0 else np.abs(weight).max(keepdims=True).reshape(1)
        scale = (np.maximum(top, 1e-12) / 127).astype(np.float32)
        wide = scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
        error = float(np.square(np.rint(weight / wide) * wide - weight).sum())
        if best is None or error < best[0]:
            best = (error, scale, axis)
    assert best is not None
    return best[1], best[2]


def dynamic(proto: ModelProto) -> ModelProto:
    """ONNX Runtime's quantize_dynamic: int8 weights by channel, activations on the run, tables and recurrences too."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, quiet():
        source, target = Path(folder, "a.onnx"), Path(folder, "b.onnx")
        onnx.save(proto, source)
        quantize_dynamic(source, target, op_types_to_quantize=["Gather", "Gemm", "LSTM", "MatMul"], per_channel=True,
                         weight_type=QuantType.QInt8, extra_options={"MatMulConstBOnly": True})  # fmt: skip
        return _stripped(onnx.load(target))


class _Reader:
    """Calibration examples, one batch a run, as onnxruntime.quantization reads them."""

    def __init__(self, feeds: list[dict[str, np.ndarray]]) -> None:
        self.feeds, self.left = feeds, iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.left, None)

    def rewind(self) -> None:
        self.left = iter(self.feeds)


def static(proto: ModelProto, feeds: list[dict[str, np.ndarray]]) -> "Static":
    """ONNX Runtime's quantize_static on these feeds, prepared once."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, quiet():
        source, target = Path(folder, "a.onnx"), Path(folder, "b.onnx")
        onnx.save(proto, source)
        try:
            quant_pre_process(str(source), str(target), skip_symbolic_shape=True)
            return Static(onnx.load(target), feeds)
        except Exception:  # it is an optimisation, and refuses graphs that the quantizer takes
            return Static(proto, feeds)


class Static:
    """A float32 graph with calibration data: int8 files with what hurts left out.

    Args:
        proto: the graph.
        feeds: inputs by name, one dictionary a run.
    """

    def __init__(self, proto: ModelProto, feeds: list[dict[str, np.ndarray]]) -> None:
        self.proto, self.feeds = proto, feeds

    def quantized(self, excluded: tuple[str, ...] = (), every: bool = False, method: str = "MinMax") -> ModelProto:
        """QDQ, weights by channel, unsigned activations.

        Args:
            excluded: nodes that stay in float32.
            every: whether additions, poolings and such are quantized too, not products alone.
            method: how ranges are found.
        """
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

        with tempfile.TemporaryDirectory() as folder, quiet():
            source, target = Path(folder, "a.onnx"), Path(folder, "b.onnx")
            onnx.save(self.proto, source)
            reader = _Reader(self.feeds)
            quantize_static(source, target, reader, quant_format=QuantFormat.QDQ, per_channel=True,
                            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                            nodes_to_exclude=list(excluded), op_types_to_quantize=None if every else list(KINDS),
                            calibrate_method=CalibrationMethod[method])  # fmt: skip
            return onnx.load(target)

    def worst(self) -> list[str]:
        """The products, those first whose output the quantized graph gets most wrong (signal to noise, decibels)."""
        from onnxruntime.quantization import qdq_loss_debug as debug

        nodes = {node.output[0]: node.name for node in self.proto.graph.node if node.op_type in KINDS}
        with tempfile.TemporaryDirectory() as folder, quiet():
            paths = [Path(folder, f"{name}.onnx") for name in "abcd"]
            onnx.save(self.proto, paths[0])
            onnx.save(self.quantized(), paths[1])
            debug.modify_model_output_intermediate_tensors(str(paths[0]), str(paths[2]))
            debug.modify_model_output_intermediate_tensors(str(paths[1]), str(paths[3]))
            before, after = (debug.collect_activations(str(p), _Reader(self.feeds[:2])) for p in paths[2:])
            errors = debug.compute_activation_error(debug.create_activation_matching(after, before))
        noise = {name: error["xmodel_err"] for name, error in errors.items() if name in nodes}
        return [nodes[name] for name in sorted(noise, key=lambda name: noise[name])]


def feeds(proto: ModelProto, task: Task, examples: int = 128, batch: int = 16) -> list[dict[str, np.ndarray]]:
    """Calibration inputs by the names of a file."""
    parts = [x.numpy() for x in leaves(task.calibration(examples)) if isinstance(x, Tensor)]
    names = [value.name for value in proto.graph.input]
    return [
        {name: part[i : i + batch] for name, part in zip(names, parts, strict=True)}
        for i in range(0, len(parts[0]), batch)
    ]


def _copy(proto: ModelProto) -> ModelProto:
    made = ModelProto()
    made.CopyFrom(proto)
    return made


def formats(proto: ModelProto) -> Iterator[tuple[str, Callable[[], ModelProto]]]:
    """What needs no calibration, by name; what is most often smallest comes first, should time be short."""
    yield "int8 weights", lambda: int8_weights(proto)
    yield "dynamic int8", lambda: dynamic(proto)
    yield "float16", lambda: half(proto)
    yield "float32", lambda: proto
