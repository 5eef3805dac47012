"""Store: a folder of tensors and records that loses no finished point when a process is killed.

KEY's tensors are written first, its JSON record last, each by atomic rename: the JSON is the commit mark.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from lilliput.errors import StoreError
from lilliput.files import write


class Store:
    """Keep records and tensors by key in a folder.

    A corrupt file is set aside as NAME.corrupt and named in `damaged`; the rest is used.

    Args:
        folder: The folder; it is made where there is none.

    Raises:
        StoreError: When the folder cannot be written.

    Example:
        >>> import tempfile
        >>> store = Store(tempfile.mkdtemp())
        >>> store.put("key", {"score": 0.9}, {"weight": torch.zeros(2)})
        >>> store.record("key"), list(store.tensors("key"))
        ({'score': 0.9}, ['weight'])
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.damaged: list[str] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"Store: {folder} must be a folder that can be written, got: {error.strerror}. "
                "Choose another with --out."
            ) from error

    def record(self, key: str) -> dict[str, Any] | None:
        """Return the record of a key, or None."""
        path = self.folder / f"{key}.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, dict):
                raise ValueError("not an object")
            return data
        except FileNotFoundError:
            return None
        except (ValueError, UnicodeDecodeError):
            self._set_aside(path)
            return None

    def tensors(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors of a key, or None."""
        path = self.folder / f"{key}.safetensors"
        try:
            tensors: dict[str, Tensor] = load_file(path)
            return tensors
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError):
            self._set_aside(path)
            return None

    def put(self, key: str, record: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        """Keep tensors, then the record that makes them count."""
        if tensors is not None:
            plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
            data = save(plain)
            write(self.folder / f"{key}.safetensors", lambda file: file.write(data))
        text = json.dumps(record, indent=1, allow_nan=False, default=_number).encode()
        write(self.folder / f"{key}.json", lambda file: file.write(text))

    def checkpoint(self, key: str) -> dict[str, Any] | None:
        """Return the checkpoint of an unfinished training, or None.

        It is read with weights_only, so nothing in it is executed.
        """
        path = self.folder / f"{key}.ckpt"
        try:
            loaded: dict[str, Any] = torch.load(path, weights_only=True)
            return loaded
        except FileNotFoundError:
            return None
        except Exception:  # a truncated file raises any of a dozen types; all mean: start again
            self._set_aside(path)
            return None

    def keep_checkpoint(self, key: str, checkpoint: dict[str, Any]) -> None:
        """Replace the checkpoint of a training."""
        write(self.folder / f"{key}.ckpt", lambda file: torch.save(checkpoint, file))

    def drop_checkpoint(self, key: str) -> None:
        """Remove the checkpoint of a training that is finished."""
        with contextlib.suppress(OSError):
            (self.folder / f"{key}.ckpt").unlink()

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield every readable record with its key."""
        for path in sorted(self.folder.glob("*.json")):
            record = self.record(path.stem)
            if record is not None:
                yield path.stem, record

    def _set_aside(self, path: Path) -> None:
        self.damaged.append(path.name)
        with contextlib.suppress(OSError):
            path.replace(path.with_name(path.name + ".corrupt"))


def _number(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"Store: a record must hold plain data, got {type(value).__name__}.")
