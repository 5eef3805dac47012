"""Write the output folder of a search or of `lilliput run`, each file atomically."""

import json
from dataclasses import replace

from lilliput.errors import StoreError
from lilliput.export.save import write_bytes, write_files
from lilliput.export.state import state_bytes
from lilliput.search.job import Job
from lilliput.search.points import Point
from lilliput.search.summary import Summary


def write_folder(job: Job, winner: Point | None, summary: Summary) -> Summary:
    """Write model.lil, model.onnx, model.safetensors, recipe.toml, summary.json and report.html.

    Args:
        winner: the chosen point; the dense network's files are written where there is none.

    Returns:
        The summary with the files' sizes.

    Raises:
        StoreError: where a file cannot be written, or has another size than was counted.
    """
    point, folder = winner or job.dense, job.folder
    state = state_bytes(job.target.tensors(job, point), job.model if point.model is None else point.model)
    filled = point.structure.fill(point.stored)
    sizes = write_files(folder, filled, point.stored, point.proto, state, job.target.recipe(job, point))
    if sizes["model.onnx"] != point.onnx_bytes or sizes["model.lil"] != point.packed_bytes:
        raise StoreError(
            f"shrink: the files must have the sizes that were counted ({point.onnx_bytes} and {point.packed_bytes} "
            f"bytes), got {sizes['model.onnx']} and {sizes['model.lil']}."
        )
    if "engine" in (summary.chosen or summary.dense):
        for name in ("engine/model.c", "engine/libmodel.so"):
            if (folder / name).is_file():
                sizes[name] = (folder / name).stat().st_size
    summary = replace(summary, files=sizes)
    write_bytes(folder / "summary.json", json.dumps(summary.data(), indent=1, allow_nan=False).encode())
    return summary
