"""Share: any Python object in a file that other processes of the same program open, its large arrays mapped.

Pickled by value where a fresh process could not import it (a notebook's cell, a script, a lambda), else by reference.
A storage is written once, whatever shares it, so tied parameters stay tied. Only folders that this program has made are
read: a pickle from elsewhere is never loaded.
"""

import functools
import io
import pickle
import site
import sys
import sysconfig
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import torch
from torch import nn
from torch.nn.utils import parametrize

from lilliput.registry import register
from lilliput.registry.entry import live

LARGE_BYTES = 2**16
"""From how many bytes on an array is a file of its own."""
THING = "thing.pickle"


def dump(thing: Any, folder: Path) -> None:
    """Write an object to a folder: every large tensor and array as .npy, the rest as one pickle.

    Args:
        thing: models, tasks, functions, plain data, nested in any way; coded and parametrized models too.
        folder: an empty or new folder.

    Raises:
        TypeError: where a part of it cannot be pickled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f".{THING}").write_bytes(_pickled(thing, folder))
    (folder / f".{THING}").replace(folder / THING)


def whole(folder: Path) -> bool:
    """Whether `dump` has finished in a folder."""
    return (folder / THING).is_file()


def load(folder: Path) -> Any:
    """Read what `dump` of this program wrote. Arrays are mapped: a page that is written to becomes private."""
    return _Unpickler(io.BytesIO((folder / THING).read_bytes()), folder).load()


def dumps(thing: Any) -> bytes:
    """An object as bytes, for another process of this program.

    Raises:
        TypeError: where a part of it cannot be pickled.

    Example:
        >>> double = loads(dumps(lambda x: 2 * x))
        >>> double(3)
        6
    """
    return _pickled(thing, None)


def loads(data: bytes) -> Any:
    """Read what `dumps` of this program made."""
    return _Unpickler(io.BytesIO(data), None).load()


def _pickled(thing: Any, folder: Path | None) -> bytes:
    _own_by_value()
    mine = {key: value for key, value in list(live.items()) if value.__module__ in _by_value()}
    file = io.BytesIO()
    try:
        _Pickler(file, folder).dump((mine, thing))
    except (pickle.PicklingError, TypeError, AttributeError, RuntimeError) as error:
        raise TypeError(
            f"search: what workers are given must be such as cloudpickle takes, but it raised {type(error).__name__}: "
            f"{error}. Open files, locks and connections where they are used, or search with one process."
        ) from error
    return file.getvalue()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Takes the bytes of storages and arrays out of the stream: to files, or to one place in it each."""

    def __init__(self, file: io.BytesIO, folder: Path | None) -> None:
        super().__init__(file)
        self.folder = folder
        self.names: dict[int, int] = {}
        self.held: list[Any] = []  # so that no other object gets the same id

    def persistent_id(self, part: Any) -> Any:
        if isinstance(part, torch.storage.TypedStorage) and part._untyped_storage.device.type == "cpu":
            bytes_ = part._untyped_storage
            flat = torch.empty(0, dtype=torch.uint8).set_(bytes_).numpy()
            return "storage", part.dtype, self._place(bytes_._cdata, bytes_, flat)
        if isinstance(part, np.ndarray) and part.nbytes >= LARGE_BYTES and not part.dtype.hasobject:
            return "array", None, self._place(id(part), part, np.asarray(part))
        return None

    def _place(self, identity: int, part: Any, values: np.ndarray[Any, Any]) -> tuple[int, Any]:
        """The number of a part, and its values, or None where they are in a file or came before."""
        if identity in self.names:
            return self.names[identity], None
        number = self.names[identity] = len(self.names)
        self.held.append(part)
        if self.folder is None or values.nbytes < LARGE_BYTES:
            return number, values.tobytes() if values.dtype == np.uint8 and values.ndim == 1 else _plain(values)
        np.save(self.folder / f"{number}.npy", values, allow_pickle=False)
        return number, None

    def reducer_override(self, part: Any) -> Any:
        if isinstance(part, nn.Module) and parametrize.is_parametrized(part):
            names = tuple(part.parametrizations)  # type: ignore[arg-type]
            return _parametrized, (type(part).__bases__[0], names), part.__dict__
        if isinstance(part, functools._lru_cache_wrapper) and part.__module__ in _by_value():
            return _cached, (part.cache_parameters(), part.__wrapped__)
        return super().reducer_override(part)


def _plain(values: np.ndarray[Any, Any]) -> Any:
    """An array that the pickler does not take out again."""
    return values.dtype, values.shape, values.tobytes()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, folder: Path | None) -> None:
        super().__init__(file)
        self.folder = folder
        self.parts: dict[int, Any] = {}

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, (number, values) = pid
        if number not in self.parts:
            self.parts[number] = self._part(kind, number, values)
        part = self.parts[number]
        if kind == "array":
            return part
        return torch.storage.TypedStorage(wrap_storage=part, dtype=dtype, _internal=True)

    def _part(self, kind: str, number: int, values: Any) -> Any:
        if values is None:
            assert self.folder is not None
            # "c": shared between processes until one writes; "r" would give torch an array that it warns about.
            array = np.load(self.folder / f"{number}.npy", mmap_mode="c", allow_pickle=False)
        elif isinstance(values, bytes):
            array = np.frombuffer(bytearray(values), np.uint8)
        else:
            array = np.frombuffer(bytearray(values[2]), values[0]).reshape(values[1])
        return array if kind == "array" else torch.from_numpy(array.view(np.ndarray)).untyped_storage()

    def load(self) -> Any:
        mine, thing = super().load()
        for (family, name), part in mine.items():
            register(family, name)(part)
        return thing


def _parametrized(kind: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """An empty module of the class that parametrizations of these tensors would give it."""
    module = kind.__new__(kind)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    return module


def _cached(settings: dict[str, Any], function: Any) -> Any:
    """A function with an empty cache of its own."""
    return functools.lru_cache(**settings)(function)


def _own_by_value() -> None:
    """Tell cloudpickle which loaded modules a fresh process lacks, or would run anew: files of the user's own."""
    installed = [*site.getsitepackages(), site.getusersitepackages(), str(Path(__file__).parents[2] / "lilliput")]
    installed += [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    homes = tuple(str(Path(home)) for home in installed if home)
    for name, module in sys.modules.copy().items():  # another thread may import
        file = getattr(module, "__file__", None)
        # Packages are imported: they may hold compiled parts. What was made by hand has neither file nor spec.
        alone = "." not in name and not hasattr(module, "__path__")
        mine = not file.startswith(homes) if file else getattr(module, "__spec__", None) is None
        if name != "__main__" and alone and mine:
            cloudpickle.register_pickle_by_value(module)


def _by_value() -> set[str]:
    return {"__main__", *cloudpickle.list_registry_pickle_by_value()}
