"""restore: the coded network of a folder, to train on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.code.base import codes, copy_model, realize
from lilliput.errors import StoreError
from lilliput.export.state import read_state, rebuilt
from lilliput.files import recover
from lilliput.graph.heads import resized
from lilliput.onnx.load import load_onnx
from lilliput.onnx.session import Session
from lilliput.recipe import Recipe
from lilliput.task import Task

TYPES = {"tensor(float)": torch.float32, "tensor(int64)": torch.int64, "tensor(int32)": torch.int32}


def restore(folder: str | Path, model: nn.Module, task: Task | None = None) -> nn.Module:
    """Give the coded network of a folder back, on top of the plain model that it was made from.

    The structural stages of recipe.toml are applied to the model again, without training; layers that are narrower in
    the file become so, and attention that has fewer heads. Then its codes are attached and its tensors loaded: nothing
    is encoded or calibrated again. A folder that `save_pretrained` of Hugging Face wrote from a narrower model serves
    too: its file describes no codes, and leaves out tensors that are tied to others.

    Args:
        folder: what `lilliput.save`, `lilliput shrink` or `lilliput run` wrote, or `save_pretrained`.
        model: the network that was given to them; it stays as it is.
        task: what structural stages need that look at data; without one they see an input of zeros.

    Returns:
        The network in eval mode, its codes in place. `lilliput.save` writes the same files from it.

    Raises:
        FileNotFoundError: if there is no model.safetensors.
        KeyError: for a code or a stage that is not known, with what to install.
        StoreError: if a file is damaged, or the model cannot be made to fit it.

    Example:
        >>> import lilliput, tempfile
        >>> net, folder = nn.Sequential(nn.Linear(64, 64)), tempfile.mkdtemp()
        >>> lilliput.attach(net, "0.weight", lilliput.LowRank(2))
        >>> sizes = lilliput.save(net, torch.zeros(1, 64), folder)
        >>> again = restore(folder, nn.Sequential(nn.Linear(64, 64)))
        >>> torch.equal(again(torch.ones(1, 64)), net(torch.ones(1, 64)))
        True
    """
    folder = Path(folder)
    recover(folder)
    tensors, described = read_state(folder / "model.safetensors")
    result = realize(model) if codes(model) else copy_model(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shapes |= {name: tuple(node["shape"]) for name, node in described["codes"].items()}
    reasons = []
    recipe = Recipe.read(folder / "recipe.toml") if (folder / "recipe.toml").is_file() else Recipe()
    for stage in recipe.stages:
        if stage.structural and not _fits(result, shapes):
            try:
                task = task or _stand_in(folder)
                result = stage(result, task, None)  # type: ignore[arg-type]  # no stage of structure looks at it
            except Exception as error:  # whatever a stage raises: the file may fit the model without it
                reasons.append(f"{type(stage).__name__} could not be applied again: {str(error)[:200]}")
    with resized(result, shapes):
        _resize(result, shapes)
    try:
        return rebuilt(result, described, tensors)
    except StoreError as error:
        said = " ".join(reasons)
        raise StoreError(f"{error} {said} Give the model that was shrunk, or its task.".replace("  ", " ")) from error


def _fits(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a model has the tensors of the file already."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return all(shapes.get(name) == shape for name, shape in own.items())


def _stand_in(folder: Path) -> Task:
    """A task whose one example is zeros, as the inputs of model.onnx are."""
    session = Session(load_onnx(folder / "model.onnx"))
    inputs = tuple(
        torch.zeros([n if isinstance(n, int) else 1 for n in value.shape], dtype=TYPES.get(value.type, torch.float32))
        for value in session.inputs
    )
    example: Any = inputs[0] if len(inputs) == 1 else inputs
    return Task("restore", train=example, val=example)


def _resize(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Give layers the sizes that the file has, in place, where only the number of channels or features differs."""
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        changed = False
        for name, old in (*module._parameters.items(), *module._buffers.items()):
            shape = shapes.get(prefix + name)
            if old is None or shape is None or shape == tuple(old.shape) or len(shape) != old.dim():
                continue
            empty: Tensor = torch.zeros(shape, dtype=old.dtype, device=old.device)
            if name in module._parameters:
                setattr(module, name, nn.Parameter(empty, requires_grad=old.requires_grad))
            else:
                module._buffers[name] = empty
            changed = True
        if changed:
            _sizes_follow(module)


def _sizes_follow(module: nn.Module) -> None:
    """What a layer says of its size, from its tensors."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if module.groups == module.in_channels > 1:  # depthwise: each channel its own group
            module.groups = len(module.weight) // (module.out_channels // module.in_channels)
        module.out_channels, module.in_channels = len(module.weight), module.weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = len(next(t for t in (module.running_mean, module.weight) if t is not None))
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
