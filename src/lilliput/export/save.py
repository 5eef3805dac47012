"""save: a model as it is deployed, in files that are each whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto
from torch import nn

from lilliput.code.base import codes, pack, realize
from lilliput.code.deploy import build
from lilliput.export import pack as pack_format
from lilliput.export.guard import compare
from lilliput.export.state import state_bytes
from lilliput.files import write
from lilliput.graph.fold import fold_batchnorm
from lilliput.onnx.names import signed, stripped
from lilliput.onnx.session import Session
from lilliput.onnx.trace import trace
from lilliput.recipe import Recipe
from lilliput.stored.base import Stored
from lilliput.task import call, leaves

NAMES = ("model.onnx", "model.lil", "model.safetensors", "recipe.toml")


def save(
    model: nn.Module, example: Any, folder: str | Path, recipe: Recipe | None = None, strip: bool = False
) -> dict[str, int]:
    """Write model.onnx, model.lil, model.safetensors and recipe.toml, the counterpart of `lilliput.load(folder)`.

    Coded layers are built where that saves values, so a low-rank layer is two products in every runtime; other coded
    tensors are stored as their codes say, in model.lil and in model.onnx. Nothing is written unless model.onnx computes
    in ONNX Runtime what the model computes.

    Args:
        model: a module of any kind, its coded tensors included; it stays as it is.
        example: one batch of inputs: a tensor, a tuple of them, or a dict by argument name.
        folder: where the files go; it is made where it is not there.
        recipe: what recipe.toml says; an empty recipe without one, as after a training loop of your own.
        strip: whether model.onnx has no names but those of inputs and outputs, which saves bytes.

    Returns:
        The bytes of each file.

    Raises:
        ExportError: if torch cannot export the model, or the file computes something else.
        StoreError: if a file cannot be written; what was there before is still there.

    Example:
        >>> import tempfile, lilliput
        >>> net = nn.Sequential(nn.Linear(64, 64))
        >>> lilliput.attach(net, "0.weight", lilliput.LowRank(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sizes = save(net, torch.zeros(1, 64), folder)
        ...     same = torch.allclose(lilliput.load(folder)(torch.ones(1, 64)), net(torch.ones(1, 64)), atol=1e-5)
        >>> sizes["model.lil"] < 2000, same
        (True, True)
    """
    training = model.training
    plain, stored = prepared(model, example)
    structure = trace(plain, example)
    proto = (stripped if strip else signed)(structure.write(stored))
    with torch.no_grad():
        expected = leaves(call(plain, example))
    compare(Session(proto).all(example), expected, exact=all(s.plain for s in stored.values()), who="save")
    filled = structure.fill(stored)
    pack_format.size(filled, stored)  # what the format cannot hold is said before anything is written
    model.train(training)
    state = state_bytes(model.state_dict(), model)
    return write_files(Path(folder), filled, stored, proto, state, (recipe or Recipe()).toml())


def write_files(
    folder: Path, filled: ModelProto, stored: dict[str, Stored], proto: ModelProto, state: bytes, recipe: str
) -> dict[str, int]:
    """Write the four files of a deployed model, each whole or not at all: a search, a run and `save` all end here.

    Args:
        folder: where the files go; it is made where it is not there.
        filled: the float32 graph, from which model.lil is written.
        stored: how each of its tensors is stored.
        proto: the graph of model.onnx.
        state: what model.safetensors holds.
        recipe: what recipe.toml says.

    Returns:
        The bytes of each file.

    Raises:
        StoreError: if a file cannot be written; what was there before is still there.
    """
    contents = {"model.onnx": proto.SerializeToString(), "model.safetensors": state, "recipe.toml": recipe.encode()}
    pack_format.write(filled, stored, folder / "model.lil")
    for name, data in contents.items():
        write_bytes(folder / name, data)
    return {name: (folder / name).stat().st_size for name in NAMES}


def write_bytes(path: Path, data: bytes) -> None:
    """One file, whole or not at all."""
    write(path, lambda file: file.write(data))


def prepared(model: nn.Module, example: Any) -> tuple[nn.Module, dict[str, Stored]]:
    """The model as it is exported, and how each of its tensors is stored.

    Coded layers are built where that saves values; batch norms are folded where that changes no coded tensor.

    Args:
        model: with or without codes; it stays as it is.
        example: one batch of inputs.

    Returns:
        Plain tensors on the CPU in eval mode; and `Stored` by the names that they have there.
    """
    built = build(model, only_smaller=True)
    plain, stored = realize(built).cpu().eval(), pack(built)
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in plain.modules()):
        folded = fold_batchnorm(plain, example)
        before, after, coded = plain.state_dict(), folded.state_dict(), codes(built)
        if all(name in after and torch.equal(before[name], after[name]) for name in coded):
            plain, stored = folded, pack(folded) | {name: stored[name] for name in coded}
    return plain, stored
