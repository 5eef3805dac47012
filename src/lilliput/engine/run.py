"""Run a compiled model from Python: load the library, and give each thread an arena of its own."""

from __future__ import annotations

import ctypes
import json
import mmap
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from lilliput.engine.build import profiling
from lilliput.engine.graph import Array
from lilliput.errors import near


class Engine:
    """Run a model that was compiled by `lilliput.compile`.

    `engine(x)` gives the output (a tuple where there are several), `engine(x, out=y)` writes into an existing array;
    inputs are given in order or by name. `engine.manifest` describes each layer, `engine.profile(x)` measures each.
    Calls on several threads run at once, each with an arena of its own.

    Args:
        folder: What `compile` wrote.

    Raises:
        OSError: Where the folder has no library.
        ValueError: For inputs that do not fit.

    Example:
        >>> import torch; from lilliput.engine.compile import compile; from lilliput.onnx.trace import trace
        >>> x = torch.rand(1, 4)
        >>> engine = compile(trace(torch.nn.Linear(4, 2), x).proto, tune=False)
        >>> engine(x.numpy()).shape, len(engine.manifest["layers"])
        ((1, 2), 1)
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        self.manifest: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        path = self.folder / self.manifest["library"]
        if not path.is_file():
            raise OSError(f"Engine: {self.folder} must hold a compiled library, got none. Compile for native.")
        self._library = loaded(path)
        self._run = self._library.model_run
        self._sizes: dict[str, int] = self.manifest["sizes"]
        self.inputs, self.outputs = self.manifest["inputs"], self.manifest["outputs"]
        pointers = [(v["member"], ctypes.c_void_p) for v in (*self.inputs, *self.outputs)]
        fields = [
            ("arena", ctypes.c_void_p),
            ("weights", ctypes.c_void_p),
            *pointers,
            *((name, ctypes.c_int64) for name in sorted(self._sizes)),
        ]
        self._call = type("model_call", (ctypes.Structure,), {"_fields_": fields})
        self._run.argtypes, self._run.restype = [ctypes.c_void_p], ctypes.c_int
        self._weights = self._mapped()
        self._kinds = [(v["name"], np.dtype(v["dtype"]), tuple(v["shape"])) for v in self.inputs]
        self._made = [(np.dtype(v["dtype"]), tuple(v["shape"])) for v in self.outputs]
        self._local = threading.local()

    def _mapped(self) -> Array | None:
        if not self.manifest["weight_bytes"]:
            return None
        with (self.folder / "model.weights").open("rb") as file:
            held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(held, np.uint8)

    def _mine(self) -> Any:
        """This thread's call, with an arena of its own."""
        call = self._call()
        arena = np.zeros(self.manifest["arena_bytes"] + 128, np.uint8)
        call.arena = arena.ctypes.data + -arena.ctypes.data % 64
        if self._weights is not None:
            call.weights = self._weights.ctypes.data
        self._local.held = (call, ctypes.addressof(call), arena)
        return self._local.held

    def __call__(self, *inputs: Any, out: Any = None, **named: Any) -> Any:
        """Compute the outputs.

        Args:
            inputs: Arrays in the order of `engine.inputs`, or one dictionary of arrays by name.
            out: A contiguous array for the output, or several where there are several.
            named: Inputs by name.

        Returns:
            The output, or a tuple where there are several; `out` where that is given.

        Raises:
            ValueError: For missing or unknown inputs, and shapes, types or free sizes that do not fit.
        """
        call, at, _ = getattr(self._local, "held", None) or self._mine()
        plain = not named and len(inputs) == len(self._kinds) and not (inputs and type(inputs[0]) is dict)
        given = inputs if plain else self._given(inputs, named)
        kept, shapes = [], []
        for value, (name, dtype, shape), entry in zip(given, self._kinds, self.inputs, strict=True):
            array = value if type(value) is np.ndarray else np.asarray(value)
            if array.dtype != dtype:
                array = self._cast(array, dtype, name)
            if array.shape != shape:
                shapes.append((array.shape, shape, name))
            if not array.flags.c_contiguous:
                array = np.ascontiguousarray(array)
            kept.append(array)
            setattr(call, entry["member"], address(array))
        sizes = self._fit(shapes, call) if self._sizes or shapes else {}
        outputs = self._outputs(out, sizes)
        for array, entry in zip(outputs, self.outputs, strict=True):
            setattr(call, entry["member"], address(array))
        status = self._run(at)
        if status:
            raise ValueError(self._wrong(status))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _given(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> list[Any]:
        names = [name for name, _, _ in self._kinds]
        if len(inputs) == 1 and isinstance(inputs[0], dict):
            named, inputs = {**inputs[0], **named}, ()
        given = dict(zip(names, inputs, strict=False)) | named
        unknown = set(given) - set(names)
        if unknown or len(inputs) > len(names):
            raise ValueError(
                f"Engine: inputs must be {', '.join(names)}, got {len(inputs)} and "
                f"{', '.join(sorted(unknown)) or 'no names'}. {near(next(iter(unknown), ''), names)}"
            )
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"Engine: every input must be given, {', '.join(missing)} is missing.")
        return [given[name] for name in names]

    def _cast(self, array: Array, dtype: np.dtype[Any], name: str) -> Array:
        if not np.can_cast(array.dtype, dtype, "same_kind") and not (array.dtype.kind in "iu" and dtype.kind in "iu"):
            raise ValueError(f"Engine: {name} must be {dtype.name}, got {array.dtype.name}.")
        return array.astype(dtype)

    def _fit(self, shapes: list[tuple[Any, Any, str]], call: Any) -> dict[str, int]:
        """The free sizes that these shapes say."""
        sizes: dict[str, int] = {}
        for shape, wanted, name in shapes:
            if len(shape) != len(wanted):
                raise ValueError(f"Engine: {name} must have {len(wanted)} dimensions, got shape {shape}.")
            for size, want in zip(shape, wanted, strict=True):
                if isinstance(want, str) and want in self._sizes:
                    if sizes.setdefault(want, size) != size or not 1 <= size <= self._sizes[want]:
                        raise ValueError(
                            f"Engine: {want} of {name} must be one size from 1 to {self._sizes[want]}, "
                            f"got {size}. Compile with a larger --shape."
                        )
                elif size != want:
                    raise ValueError(f"Engine: {name} must have shape {wanted}, got {shape}.")
        for key, most in self._sizes.items():
            setattr(call, key, sizes.setdefault(key, most))
        return sizes

    def _outputs(self, out: Any, sizes: dict[str, int]) -> list[Array]:
        shapes = [
            shape if not sizes else tuple(s if isinstance(s, int) else evaluate(s, sizes) for s in shape)
            for _, shape in self._made
        ]
        if out is None:
            return [np.empty(shape, dtype) for shape, (dtype, _) in zip(shapes, self._made, strict=True)]
        given = list(out) if isinstance(out, tuple | list) else [out]
        for array, shape, (dtype, _) in zip(given, shapes, self._made, strict=True):
            if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
                raise ValueError(
                    f"Engine: out must be a contiguous {dtype.name} array of shape {shape}, got "
                    f"{array.dtype} {array.shape}."
                )
        return given

    def _wrong(self, status: int) -> str:
        errors = self.manifest.get("errors", [])
        return (
            f"Engine: {errors[status - 1]}"
            if 0 < status <= len(errors)
            else (f"Engine: free sizes must be from 1 to {self._sizes}.")
        )

    def profile(self, *inputs: Any, runs: int = 30, **named: Any) -> list[dict[str, Any]]:
        """Measure each layer.

        Args:
            inputs: As in a call.
            named: As in a call.
            runs: How many runs the mean is taken over.

        Returns:
            The manifest's layers, each with its mean time "ms".
        """
        library = loaded(profiling(self.folder))
        run = library.model_profile
        run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        layers = self.manifest["layers"]
        seconds = np.zeros(len(layers))
        self(*inputs, **named)
        given = self._given(inputs, named)
        call, address, _ = self._local.held
        kept = [np.ascontiguousarray(np.asarray(v), dtype) for v, (_, dtype, _) in zip(given, self._kinds, strict=True)]
        made = self._outputs(None, {name: getattr(call, name) for name in self._sizes})
        for array, entry in zip([*kept, *made], [*self.inputs, *self.outputs], strict=True):
            setattr(call, entry["member"], array.ctypes.data)
        for i in range(runs + 2):
            if i == 2:
                seconds[:] = 0
            run(address, seconds.ctypes.data)
        return [{**layer, "ms": float(s) / runs * 1e3} for layer, s in zip(layers, seconds, strict=True)]


def address(array: Array) -> int:
    """Where a contiguous array lies."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array.data))  # a third of the time of array.ctypes.data
    except (TypeError, ValueError):  # read-only or empty
        return int(array.ctypes.data)


def loaded(path: Path) -> ctypes.CDLL:
    """A library, loaded anew: the loader knows libraries by their path, and would give back what was there before."""
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / path.name
        link.symlink_to(path)
        return ctypes.CDLL(str(link))


def evaluate(text: str, sizes: dict[str, int]) -> int:
    """The number that a size such as (1 + 12*seq) is."""
    total = 0
    for term in text.strip("()").split(" + "):
        value = 1
        for factor in term.split("*"):
            value *= sizes[factor] if factor in sizes else int(factor)
        total += value
    return total
