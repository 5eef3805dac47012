"""Predict: run a written network on arrays in files."""

from pathlib import Path

import numpy as np

from lilliput.errors import near
from lilliput.export.pack import load
from lilliput.files import write
from lilliput.onnx.session import Session
from lilliput.stored.bits import Array


def predict(model: str | Path, data: str | Path, out: str | Path, batch: int = 64) -> dict[str, tuple[int, ...]]:
    """Run a network on the examples of a file and write its outputs.

    Args:
        model: a folder that `lilliput shrink` or `lilliput.save` wrote, a `.lil` file or an ONNX file.
        data: an .npz file with the inputs by name, or an .npy file with the only one; (n, ...) each.
        out: the .npz file to write, with the outputs by name.
        batch: examples in each call.

    Returns:
        The shape of each output.

    Raises:
        ValueError: where inputs are missing or unknown, or of different lengths.
        FileNotFoundError: where the network is missing.
        StoreError: where a file is damaged or cannot be written.

    Example:
        >>> import lilliput, tempfile, torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> sizes = lilliput.save(torch.nn.Linear(4, 2), torch.zeros(1, 4), folder)
        >>> np.save(folder / "x.npy", np.zeros((5, 4), np.float32))
        >>> predict(folder, folder / "x.npy", folder / "y.npz")
        {'output': (5, 2)}
    """
    path = Path(model)
    session = Session(path) if path.suffix == ".onnx" else load(path).session
    inputs = _inputs(Path(data), session)
    outputs = dict(zip(session.output_names, session.batched(inputs, max(1, batch)), strict=True))
    write(Path(out), lambda file: np.savez(file, **outputs))
    return {name: array.shape for name, array in outputs.items()}


def _inputs(data: Path, session: Session) -> dict[str, Array]:
    """The arrays of a file by the names of the network's inputs."""
    if not data.is_file():
        raise ValueError(f"predict: the inputs must be in a file that exists, got {data}.")
    try:
        read = np.load(data, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"predict: {data} must be a file of numpy's (.npy or .npz): {error}.") from error
    names = session.input_names
    given = {names[0]: read} if isinstance(read, np.ndarray) else dict(read)
    if len(given) == len(names) == 1:  # there is no doubt
        given = {names[0]: next(iter(given.values()))}
    for name in names:
        if name not in given:
            raise ValueError(f"predict: {data} must hold the input {name!r}, got {sorted(given)}. {near(name, given)}")
    if extra := sorted(given.keys() - set(names)):
        raise ValueError(f"predict: {data} must hold inputs of the network ({', '.join(names)}), got {extra}.")
    lengths = {name: len(array) for name, array in given.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"predict: inputs must have one length, got {lengths}.")
    return given
