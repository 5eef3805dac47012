"""Learn2Compress (2018): one dense model in, a family of models at several sizes out, the user picks.

Source: S. Ravi, Custom on-device ML models with Learn2Compress, Google AI blog, May 2018.
"""

import tempfile
from pathlib import Path
from typing import Any

from lilliput.cli import resolve
from lilliput.shrinking import shrink

JOBS = {
    "digits": ("5m", "0.5%"),
    "mnist1d-cnn": ("2m", "1%"),
    "mnist1d-mlp": ("2m", "1%"),
    "mnist1d-gru": ("2m", "1%"),
    "languages": ("4m", "1%"),
    "sentences": ("20m", "1%"),
}
KEPT = ("name", "val", "test", "onnx_bytes", "packed_bytes", "values", "macs", "latency_ms", "drop_corrected")


def measure(quick: bool) -> dict[str, Any]:
    """A row for every model of each family: dense, the front, the chosen one."""
    rows = []
    for name, (budget, floor) in ({"mnist1d-cnn": ("4s", "5%")} if quick else JOBS).items():
        with tempfile.TemporaryDirectory() as folder:
            model, task = resolve(name)
            summary = shrink(model, task, floor, budget=budget, out=Path(folder) / name).summary
        for role, points in (
            ("dense", [summary["dense"]]),
            ("front", summary["front"]),
            ("chosen", [summary["chosen"]] if summary["chosen"] else []),
        ):
            rows += [{"task": name, "role": role, **{key: point.get(key) for key in KEPT}} for point in points]
    return {
        "claim": "one dense model in, a family of models at several sizes out, with little loss",
        "baseline": "the dense model as given",
        "rows": rows,
    }
