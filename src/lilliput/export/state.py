"""model.safetensors: a model's state, and in its metadata which codes store which tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lilliput.code.base import uncoded
from lilliput.code.state import describe, reattach
from lilliput.errors import StoreError
from lilliput.quant.activations import CHILD, Activation, activations, put

KEY = "lilliput"
FORMAT = 1


def description(model: nn.Module) -> dict[str, Any]:
    """The codes of a model's tensors and outputs, as plain data."""
    return {"format": FORMAT, "codes": describe(model), "activations": activations(model)}


def rebuilt(model: nn.Module, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with the codes that were described and the state that it had with them. Nothing is encoded.

    Args:
        model: the plain network, or one with other codes, which go.
        described: what `description` said of the coded network.
        tensors: the coded network's state_dict.

    Returns:
        The coded network, in eval mode.

    Raises:
        KeyError: for a code that is not known.
        StoreError: where the model has other tensors than the state.
    """
    result = uncoded(model)
    paths = dict(result.named_modules())
    for path, bits in described["activations"].items():
        if path not in paths:
            raise StoreError(f"restore: the model must have the module {path!r}, whose output is rounded, and has not.")
        if not isinstance(getattr(paths[path], CHILD, None), Activation):
            put(paths[path], Activation(bits))
    reattach(result, described["codes"], tensors)
    present = result.state_dict()
    for name in tensors.keys() - present.keys():  # what a rule keeps in a module until the end of its training
        path, _, key = name.rpartition(".")
        if path in paths and "parametrizations" not in path and key not in paths[path]._parameters:
            paths[path].register_buffer(key, tensors[name].clone())
    held = {_place(present[name]): name for name in tensors if name in present}
    missing = present.keys() - tensors.keys()
    tied = {name: tensors[held[at]] for name in missing if (at := _place(present[name])) in held and at[0]}
    try:
        result.load_state_dict({**tensors, **tied})
    except RuntimeError as error:
        raise StoreError(f"restore: the model must have the tensors of the file, but: {error}") from error
    return result.eval()


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    """Where a tensor lies: the same for tensors that are tied."""
    return tensor.data_ptr(), tuple(tensor.shape)


def state_bytes(tensors: Mapping[str, Tensor], model: nn.Module | None = None) -> bytes:
    """The file: tensors by name, and the codes of the model that they belong to, where there is one."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = None if model is None else {KEY: json.dumps(description(model))}
    data: bytes = save(plain, metadata)
    return data


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and the description of its codes: of none where another library has written it.

    Raises:
        FileNotFoundError: if there is none.
        StoreError: if it is damaged, or of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"restore: {path} must be there. Give a folder that lilliput has written.")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 it is no dictionary
            text = (file.metadata() or {}).get(KEY)
    except (SafetensorError, OSError) as error:
        raise StoreError(f"restore: {path.name} is damaged or cut short ({error}). Copy it again.") from error
    if text is None:
        return tensors, {"format": FORMAT, "codes": {}, "activations": {}}
    data: dict[str, Any] = json.loads(text)
    if data.get("format") != FORMAT:
        got = data.get("format")
        raise StoreError(f"restore: {path.name} must be of format {FORMAT}, got {got!r}. Update lilliput.")
    return tensors, data
