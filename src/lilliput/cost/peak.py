"""Peak memory of a network in ONNX Runtime, measured in a process of its own, which holds nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, helper

from lilliput.errors import ExportError
from lilliput.onnx.session import Inputs, Session

_PROGRAM = """
import os, sys
import numpy, onnxruntime, psutil

folder, me = sys.argv[1], psutil.Process()
with numpy.load(os.path.join(folder, "feed.npz"), allow_pickle=False) as data:
    feed = dict(data)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
options.log_severity_level = 4
empty = onnxruntime.InferenceSession(os.path.join(folder, "empty.onnx"), options, ["CPUExecutionProvider"])
empty.run(None, {"x": numpy.zeros(1, "float32")})  # the runtime's own memory comes before
try:
    open("/proc/self/clear_refs", "w").write("5")  # the highest mark begins here
except OSError:
    pass
before, peaks = me.memory_info().rss, []
session = onnxruntime.InferenceSession(os.path.join(folder, "model.onnx"), options, ["CPUExecutionProvider"])
peaks.append(me.memory_info().rss)
for _ in range(3):
    session.run(None, feed)
    peaks.append(me.memory_info().rss)
try:
    lines = open("/proc/self/status").read().splitlines()
    peaks += [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
except OSError:
    pass
print(max(1, max(peaks) - before))
"""


def peak_bytes(model: ModelProto, example: Inputs, seconds: float = 60.0) -> int:
    """Measure by how much loading a network and running it on one example raises a process's memory at most.

    It is what a deployed program feels: the file, the runtime's copy of the weights, its arena. What the runtime needs
    for a network that does nothing is not in it, and pages are counted whole.

    Args:
        model: The network.
        example: Inputs, of which the first example is run.
        seconds: After as long the process is ended.

    Returns:
        Bytes.

    Raises:
        ExportError: If the process fails or does not end.

    Example:
        >>> import torch; from lilliput.onnx.trace import trace
        >>> x = torch.rand(1, 4)
        >>> peak_bytes(trace(torch.nn.Linear(4, 2), x).proto, x) > 0
        True
    """
    feed = {name: x[:1] for name, x in Session(model).feed(example).items()}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.onnx").write_bytes(model.SerializeToString())
        Path(folder, "empty.onnx").write_bytes(_nothing().SerializeToString())
        np.savez(Path(folder, "feed.npz"), **feed)  # type: ignore[arg-type]
        try:
            done = subprocess.run(
                [sys.executable, "-c", _PROGRAM, folder], capture_output=True, text=True, timeout=seconds, check=True
            )
            return int(json.loads(done.stdout))
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            reason = (getattr(error, "stderr", "") or str(error)).strip().rpartition("\n")[2]
            raise ExportError(f"peak_bytes: the network must run in a process of its own, got: {reason}") from error


def _nothing() -> ModelProto:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "nothing", value[:1], value[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
