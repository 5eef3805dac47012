"""A network of timm, with a folder of pictures: a folder for each class."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lilliput.extras import extra
from lilliput.targets import Given
from lilliput.targets.rows import splits
from lilliput.task import Task

ABOUT = "timm:NAME with --data FOLDER"
OPTIONS = ("data", "weights")
PREFIX = "timm:"
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
KEYS = ("state_dict", "model", "model_state_dict", "state_dict_ema")
"""Where checkpoints of trainers keep the weights."""


def reads(target: str) -> bool:
    """Names with the prefix timm:."""
    return target.startswith(PREFIX)


def read(given: Given) -> tuple[nn.Module, Task]:
    """The network and the task of telling the pictures' classes apart, with the preprocessing that it was trained with.

    FOLDER holds a folder of pictures for each class, or the folders train, val and test with these. The classes are
    numbered in the order of their names. Training pictures are flipped at random.

    Raises:
        ValueError: for a name that timm lacks, a folder without pictures, and weights of another network.
    """
    with extra("timm", "TARGET timm:"):
        import timm
        from timm.data import resolve_model_data_config
    name = given.target.removeprefix(PREFIX)
    if given.data is None:
        raise ValueError(f"TARGET: {given.target} must come with --data FOLDER, a folder of pictures for each class.")
    parts, classes = _listed(Path(given.data))
    try:
        model = timm.create_model(name, pretrained=given.weights is None, num_classes=len(classes))
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"TARGET: {name!r} must be a network of timm: {str(error).splitlines()[0]}.") from error
    if given.weights is not None:
        _load(model, Path(given.weights))
    config = resolve_model_data_config(model)
    ready = {
        split: (_pictures([path for path, _ in files], config), torch.tensor([label for _, label in files]))
        for split, files in parts.items()
    }
    return model.eval(), Task(name, **ready, augment=flipped, batch_size=32)


def flipped(inputs: Tensor, seeds: Tensor) -> Tensor:
    """Pictures of which half are mirrored."""
    return torch.where((seeds % 2 == 0)[:, None, None, None], inputs, inputs.flip(3))


def _listed(folder: Path) -> tuple[dict[str, list[tuple[Path, int]]], list[str]]:
    """(path, class) of the pictures of each split, and the names of the classes."""
    if not folder.is_dir():
        raise ValueError(f"shrink: --data must be a folder with a folder of pictures for each class, got {folder}.")
    given = {part: folder / part for part in ("train", "val", "test") if (folder / part).is_dir()}
    places = given if "train" in given and "val" in given else {"": folder}
    classes = sorted({child.name for place in places.values() for child in place.iterdir() if child.is_dir()})
    found = {
        part: [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted((place / name).rglob("*"))
            if path.suffix.lower() in ENDINGS
        ]
        for part, place in places.items()
    }
    if len(classes) < 2 or not all(found.values()):
        raise ValueError(
            f"shrink: --data must hold pictures of at least two classes, a folder each, got {len(classes)} folders "
            f"with {sum(map(len, found.values()))} pictures in {folder}. Pictures end in {', '.join(ENDINGS)}."
        )
    if places is given:
        return found, classes
    rows = splits(torch.tensor([label for _, label in found[""]]), folder)
    return {part: [found[""][i] for i in at.tolist()] for part, at in rows.items()}, classes


def _pictures(paths: list[Path], config: dict[str, Any]) -> Any:
    """Pictures as float32 (n, channels, height, width), in a file that is mapped, so that they may be many."""
    with extra("timm", "TARGET timm:"):
        from PIL import Image

    channels, height, width = config["input_size"]
    mean, spread = (np.array(config[key], np.float32)[:, None, None] for key in ("mean", "std"))
    how = Image.Resampling[str(config.get("interpolation", "bilinear")).upper()]
    shape = (len(paths), channels, height, width)
    with tempfile.TemporaryFile() as file:  # it is gone when nothing maps it any more
        array = np.memmap(file, np.float32, "w+", shape=shape)
    for place, path in enumerate(paths):
        with Image.open(path) as picture:
            # The shorter side is scaled so that the middle part, as large as the network wants, is cut out.
            image = picture.convert("RGB" if channels == 3 else "L")
            scale = max(height / image.height, width / image.width) / float(config.get("crop_pct", 1.0))
            size = max(width, round(scale * image.width)), max(height, round(scale * image.height))
            left, top = (size[0] - width) // 2, (size[1] - height) // 2
            image = image.resize(size, how).crop((left, top, left + width, top + height))
            values = np.asarray(image, np.float32).reshape(height, width, channels).transpose(2, 0, 1) / 255
        array[place] = (values - mean) / spread
    return array


def _load(model: nn.Module, path: Path) -> None:
    """Fill a network with the tensors of a file of torch or of safetensors."""
    if not path.is_file():
        raise ValueError(f"shrink: --weights must be a file, got {path}.")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors: Any = load_file(path)
    else:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    for key in KEYS:
        tensors = tensors.get(key, tensors) if isinstance(tensors, dict) else tensors
    try:
        model.load_state_dict({name.removeprefix("module."): value for name, value in dict(tensors).items()})
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"shrink: --weights must hold the tensors of this network with as many classes as --data has folders, got "
            f"{path}: {reason}"
        ) from error
