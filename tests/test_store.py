"""The store: what was finished survives, what is damaged is set aside, what cannot be written is said."""

import os
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from lilliput.errors import StoreError
from lilliput.files import write
from lilliput.store import Store


def test_a_record_and_its_tensors_come_back(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("a", {"score": 0.5}, {"w": torch.arange(3.0)})
    assert store.record("a") == {"score": 0.5}
    tensors = store.tensors("a")
    assert tensors is not None and torch.equal(tensors["w"], torch.arange(3.0))
    assert store.record("b") is None and store.tensors("b") is None


def test_tensors_without_a_record_do_not_count(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("a", {"x": 1}, {"w": torch.ones(2)})
    (tmp_path / "a.json").unlink()
    assert store.record("a") is None


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[1]", b'{"x": 1'])
def test_a_corrupt_record_is_set_aside_and_the_rest_is_used(tmp_path: Path, damage: bytes) -> None:
    store = Store(tmp_path)
    store.put("good", {"x": 1})
    store.put("bad", {"x": 2})
    (tmp_path / "bad.json").write_bytes(damage)
    assert dict(store.records()) == {"good": {"x": 1}}
    assert store.damaged == ["bad.json"] and (tmp_path / "bad.json.corrupt").exists()


def test_a_truncated_tensor_file_is_set_aside(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put("a", {"x": 1}, {"w": torch.ones(100)})
    path = tmp_path / "a.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    assert store.tensors("a") is None
    assert store.damaged == ["a.safetensors"]


def test_a_checkpoint_is_read_without_executing_anything(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.keep_checkpoint("a", {"step": 3, "model": {"w": torch.ones(2)}})
    state = store.checkpoint("a")
    assert state is not None and state["step"] == 3
    import pickle

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'sprung'}",)

    (tmp_path / "b.ckpt").write_bytes(pickle.dumps(Trap()))
    assert store.checkpoint("b") is None
    assert not (tmp_path / "sprung").exists() and "b.ckpt" in store.damaged


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, lambda file: file.write(b"old"))

    def full(file: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match="No space left on device"):
        write(path, full)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_a_store_error_and_the_store_stays_readable(tmp_path: Path) -> None:
    code = f"""
import resource, signal, torch
from lilliput.store import Store
from lilliput.errors import StoreError
store = Store({str(tmp_path)!r})
store.put("a", {{"x": 1}}, {{"w": torch.ones(4)}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    store.put("b", {{"x": 2}}, {{"w": torch.ones(100000)}})
except StoreError as error:
    print("refused:", error)
print(store.record("a"), store.record("b"), len(store.tensors("a")["w"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "refused: Store: " in done.stdout and "{'x': 1} None 4" in done.stdout


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="must be a folder that can be written"):
        Store(tmp_path / "file" / "below")


def test_no_number_that_json_lacks_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        Store(tmp_path).put("a", {"x": float("nan")})
    assert not list(tmp_path.glob("a*"))


def test_writing_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    def stop(file: BinaryIO) -> None:
        file.write(b"half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write(tmp_path / "new" / "file", stop)
    assert list((tmp_path / "new").iterdir()) == []
    write(tmp_path / "new" / "file", lambda file: file.write(b"whole"))
    assert (tmp_path / "new" / "file").read_bytes() == b"whole"
