"""DeepSparse behind a pipe, for bench/engine.py: it needs an environment of its own, and turns with the others.

    python3.11 -m venv DIR
    DIR/bin/pip install deepsparse==1.8.0 sparsezoo==1.8.1 onnx==1.14.1 'numpy<2'
    python bench/engine.py --deepsparse DIR/bin/python

Started there by `Worker`, it answers one line of JSON to each line: {"load": model.onnx} with {"loaded": ..., "own":
the share of operators that its own kernels run}, {"run": n} with {"seconds": [...]}, {"output": 1} with the first
output. It imports nothing of lilliput.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path


class Worker:
    """DeepSparse with one thread in the environment of `python`; one model at a time.

    Raises RuntimeError, with what it wrote, where it cannot be started or refuses a model.
    """

    def __init__(self, python: str) -> None:
        environment = {**os.environ, "NM_DISABLE_ANALYTICS": "True", "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [python, __file__],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.version = self._answer()["version"]

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "it ended"}
        if "error" in answer:
            raise RuntimeError(f"DeepSparse: {answer['error']}. What it needs is in bench/deepsparse_worker.py.")
        return answer

    def _ask(self, **what: object) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def load(self, model: Path) -> float:
        """Read a model and the inputs beside it; the share of operators that run in its own kernels."""
        return float(self._ask(load=str(model))["own"])

    def run(self, count: int) -> list[float]:
        """Seconds of each of `count` runs."""
        return list(self._ask(run=count)["seconds"])

    def output(self) -> list:
        """The first output of the last run."""
        return list(self._ask(output=1)["output"])

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)


def serve() -> None:
    """Answer until the input ends. What the library prints goes to the error stream."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**what: object) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    try:
        import deepsparse
        import numpy as np
    except ImportError as error:
        return answer(error=str(error))
    answer(version=deepsparse.__version__)
    engine, inputs, outputs = None, [], []
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if "load" in asked:
                path = Path(asked["load"])
                engine = deepsparse.Engine(model=str(path), batch_size=1, num_cores=1, scheduler="single_stream")
                with np.load(path.with_suffix(".npz")) as arrays:
                    inputs = [np.ascontiguousarray(x) for x in arrays.values()]
                outputs = engine.run(inputs)
                answer(loaded=path.name, own=engine.fraction_of_supported_ops)
            elif "run" in asked:
                seconds = []
                for _ in range(asked["run"]):
                    start = time.perf_counter()
                    outputs = engine.run(inputs)
                    seconds.append(time.perf_counter() - start)
                answer(seconds=seconds)
            else:
                answer(output=np.asarray(outputs[0], float).ravel().tolist())
        except Exception as error:
            answer(error=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    serve()
