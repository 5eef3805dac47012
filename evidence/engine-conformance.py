"""What the engine computes of ONNX: the backend node tests that come inside onnx, each compiled to C and run.

Of the operators that the engine promises, every node test (not its expansion into other operators) whose tensors are
float32, int8, uint8, int32, int64 or bool. Inputs that decide a shape, and weights, are bound to the test's values when
compiling; all others come when the model runs. Outputs are compared as ONNX's own runner does. Tests of other types
must be refused by name.

Source: ONNX, onnx.backend.test (https://github.com/onnx/onnx/blob/main/docs/OnnxBackendTest.md).
"""

import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from lilliput.engine.compile import write
from lilliput.engine.lower import lowered, supported
from lilliput.engine.read import read
from lilliput.engine.run import Engine
from lilliput.engine.target import target
from lilliput.errors import NotSupported

Array = np.ndarray[Any, Any]
GOAL = 560
TYPES = ("float32", "int8", "uint8", "int32", "int64", "bool")

# The operators that the engine promises, by family.
OPERATORS = {
    "products": "Conv ConvTranspose Gemm MatMul Einsum Attention",
    "arithmetic": """Relu Clip LeakyRelu PRelu Sigmoid HardSigmoid HardSwish Tanh Erf Gelu Softmax LogSoftmax Exp Log
        Sqrt Pow Abs Neg Reciprocal Floor Ceil Round Sign Softplus Elu Selu Celu Mish Swish Where Equal Greater
        GreaterOrEqual Less LessOrEqual And Or Not Min Max Mean Sum Cast Add Sub Mul Div""",
    "normalisations": """BatchNormalization LayerNormalization InstanceNormalization GroupNormalization
        RMSNormalization""",
    "pooling": "AveragePool MaxPool GlobalAveragePool GlobalMaxPool LpPool",
    "reductions": """ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
        ReduceSumSquare ArgMax ArgMin TopK CumSum""",
    "shapes": """Reshape Transpose Concat Split Slice Gather Pad Expand Squeeze Unsqueeze Flatten Resize Upsample Tile
        DepthToSpace SpaceToDepth Shape Size Identity Range ConstantOfShape OneHot GatherND GatherElements ScatterND
        ScatterElements Scatter Trilu EyeLike ReverseSequence CenterCropPad Constant Dropout""",
    "recurrent": "LSTM GRU RNN",
    "quantized": """QuantizeLinear DequantizeLinear DynamicQuantizeLinear MatMulInteger ConvInteger QLinearConv
        QLinearMatMul""",
}
FAMILY = {op: family for family, ops in OPERATORS.items() for op in ops.split()}

# Inputs that decide a shape or an axis, and weights: they are known when compiling.
BOUND = {
    "Conv": (1, 2), "ConvTranspose": (1, 2), "PRelu": (1,), "BatchNormalization": (1, 2, 3, 4),
    "LayerNormalization": (1, 2), "InstanceNormalization": (1, 2), "GroupNormalization": (1, 2),
    "RMSNormalization": (1,), "LSTM": (1, 2, 3, 7), "GRU": (1, 2, 3), "RNN": (1, 2, 3),
    "ConvInteger": (1, 3), "QLinearConv": (1, 2, 3, 4, 5, 6, 7, 8), "TopK": (1,), "CumSum": (1,),
    "Reshape": (1,), "Split": (1,), "Slice": (1, 2, 3, 4), "Pad": (1, 3), "Expand": (1,), "Squeeze": (1,),
    "Unsqueeze": (1,), "Resize": (1, 2, 3), "Upsample": (1,), "Tile": (1,), "Range": (0, 1, 2),
    "ConstantOfShape": (0,), "OneHot": (1,), "CenterCropPad": (1,), "Dropout": (1, 2),
    **{op: (1,) for op in FAMILY if op.startswith("Reduce")},
}  # fmt: skip


@dataclass
class Test:
    """One node test: its model and, for each data set, what goes in and what must come out."""

    name: str
    op: str
    model: onnx.ModelProto
    data: list[tuple[list[Any], list[Any]]]
    rtol: float
    atol: float

    @property
    def types(self) -> set[str]:
        """The types of its inputs and outputs."""
        types = set()
        for value in (*self.model.graph.input, *self.model.graph.output):
            kind = value.type.tensor_type.elem_type if value.type.HasField("tensor_type") else 0
            types.add(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)).name if kind else "no tensor")
        return types


def tests() -> Iterator[Test]:
    """The node tests of the operators that are promised, without expansions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.loader import load_model_tests

        cases = load_model_tests(kind="node")
    for case in cases:
        if "_expanded" in case.name or case.model is None or not case.data_sets:
            continue
        ops = {node.op_type for node in case.model.graph.node if node.domain in ("", "ai.onnx")}
        if len(ops) == 1 and len(case.model.graph.node) == 1 and ops <= set(FAMILY):
            data = [([_plain(x) for x in given], [_plain(x) for x in made]) for given, made in case.data_sets]
            yield Test(case.name, ops.pop(), case.model, data, case.rtol, case.atol)


def _plain(x: Any) -> Any:
    return numpy_helper.to_array(x) if isinstance(x, onnx.TensorProto) else x


def checked(test: Test) -> str:
    """Compile and run one test; "" where every output agrees, else what is wrong. Raises what compiling raises."""
    names = [value.name for value in test.model.graph.input]
    places = {name: i for i, name in enumerate(test.model.graph.node[0].input) if name}
    fast = replace(target("native"), flags=tuple("-O1" if f == "-O3" else f for f in target("native").flags))
    for given, wanted in test.data:
        bound = {name: x for name, x in zip(names, given, strict=True) if places.get(name) in BOUND.get(test.op, ())}
        import shutil

        shapes = {
            v.name: x.shape
            for v, x in zip(test.model.graph.input, given, strict=True)
            if v.name not in bound and any(not d.HasField("dim_value") for d in v.type.tensor_type.shape.dim)
        }
        folder = write(test.model.SerializeToString(), None, fast, tune=False, shapes=shapes, constants=bound)
        try:
            engine = Engine(folder)
            outputs = engine(*(x for name, x in zip(names, given, strict=True) if name not in bound))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if wrong := different(outputs, wanted, test.rtol, test.atol):
            return wrong
    return ""


def different(outputs: Any, wanted: Any, rtol: float, atol: float) -> str:
    """The first difference between what was computed and what must be, as ONNX's runner sees it; "" for none."""
    if len(outputs) != len(wanted):
        return f"{len(outputs)} outputs where {len(wanted)} must be"
    for i, (a, b) in enumerate(zip(outputs, wanted, strict=True)):
        a, b = np.asarray(a), np.asarray(b)
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {i} is {a.dtype}{list(a.shape)}, must be {b.dtype}{list(b.shape)}"
        if not np.allclose(a, b, rtol, atol, equal_nan=True):
            with np.errstate(all="ignore"):
                far = np.abs(a.astype(float) - b.astype(float))
            wrong = int(np.sum(~(far <= atol + rtol * abs(b))))
            return f"output {i} differs by {np.nanmax(far):.3g} in {wrong} of {b.size}"
    return ""


def alone(job: Callable[[], str], limit_s: float = 120) -> str:
    """What a job returns, done in a process of its own: a crash is one failure, not the end."""
    import multiprocessing

    there, here = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=_answer, args=(job, here))
    process.start()
    os.close(here)
    process.join(limit_s)
    if process.is_alive():
        process.kill()
        process.join()
        os.close(there)
        return f"took more than {limit_s:.0f} s"
    with os.fdopen(there, "rb") as pipe:
        data = pipe.read()
    return pickle.loads(data) if data else f"ended the process (exit code {process.exitcode})"


def _answer(job: Callable[[], str], pipe: int) -> None:
    with os.fdopen(pipe, "wb") as file:
        file.write(pickle.dumps(job()))


def judged(test: Test) -> str:
    """ "" where a test of our types passes, or one of other types is refused by name; else the reason in a line."""
    ours = test.types <= set(TYPES)
    try:
        if not ours:
            lowered(read(test.model.SerializeToString(), supported=supported))
            return "must raise NotSupported"
        return checked(test)
    except NotSupported as error:
        return "" if not ours else f"NotSupported: {_line(error)}"
    except Exception as error:
        return f"{type(error).__name__}: {_line(error)}"


def _line(error: Exception) -> str:
    text = re.sub(r"^compile: the compiler failed \(.*?\):\n", "the compiler failed: ", str(error), flags=re.DOTALL)
    wrong = re.search(r"error: .*", text)
    return re.sub(r"\s+", " ", wrong.group() if wrong else text)[:240]


def measure(quick: bool) -> dict[str, Any]:
    """Every test, or each tenth where quick."""
    chosen = list(tests())[:: 10 if quick else 1]
    rows: dict[str, dict[str, Any]] = {}
    failures = []
    for test in chosen:
        ours = test.types <= set(TYPES)
        row = rows.setdefault(
            test.op,
            {
                "operator": test.op,
                "family": FAMILY[test.op],
                "passed": 0,
                "failed": 0,
                "not_supported": 0,
                "other_types_refused": 0,
                "other_types_not_refused": 0,
            },
        )
        reason = alone(lambda test=test: judged(test))  # type: ignore[misc]
        if not ours:
            row["other_types_not_refused" if reason else "other_types_refused"] += 1
        else:
            row["passed" if not reason else "not_supported" if reason.startswith("NotSupported") else "failed"] += 1
        if reason:
            failures.append({"test": test.name, "operator": test.op, "reason": reason})
    total = {
        key: sum(row[key] for row in rows.values())
        for key in ("passed", "failed", "not_supported", "other_types_refused", "other_types_not_refused")
    }
    return {
        "claim": f"of ONNX's node tests of the operators that the engine promises, at least {GOAL} pass, and every "
                 "test of a type that it does not know is refused by name",
        "baseline": f"onnx {onnx.__version__}, onnx.backend.test, compared as its runner does",
        "rows": [rows[op] for op in sorted(rows)], "total": total, "tests": total["passed"] + total["failed"] +
        total["not_supported"], "failures": failures, "passed": quick or total["passed"] >= GOAL,
    }  # fmt: skip
