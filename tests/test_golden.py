"""Files that earlier versions wrote can still be opened, and mean the same."""

import hashlib
import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lilliput
from lilliput import Recipe, Store
from lilliput.export import pack
from lilliput.export.onnx import Session
from lilliput.recipe import plain

GOLDEN = Path(__file__).parent / "golden"
FACTS = {
    f"{folder}/{name}": facts
    for folder in ("lil", "lil2")
    for name, facts in json.loads((GOLDEN / folder / "facts.json").read_text()).items()
}
KEYS = {
    "task", "metric", "higher_is_better", "seed", "floor", "objective", "max_bytes", "max_latency_ms", "budget_s",
    "trials", "met", "machine", "versions", "commit", "command", "dense", "chosen", "front", "nearest", "drop_val",
    "drop_corrected", "drop_corrected_interval", "optimism", "drop_test", "drop_test_interval", "examples", "draws",
    "augmentations", "examples_for_half_interval", "left_alone", "sensitivity", "points", "damaged", "steps_per_s",
    "wall_s", "shares", "files"}  # fmt: skip
POINT = {
    "name", "recipe", "key", "val", "distance", "onnx_bytes", "packed_bytes", "values", "macs", "agreement", "flags",
    "runtime", "threads"}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FACTS))
def test_a_packed_file_of_each_format_decodes_to_the_same_bits(name: str) -> None:
    path = GOLDEN / name
    assert path.stat().st_size == FACTS[name]["bytes"]
    tensors = pack.read(path).tensors().values()
    digests = [hashlib.sha256(np.ascontiguousarray(tensor).tobytes()).hexdigest() for tensor in tensors]
    assert digests == FACTS[name]["tensors"]


@pytest.mark.parametrize("folder", ["whole", "recipe"])
def test_a_folder_can_be_opened_and_its_files_agree(folder: str) -> None:
    network = lilliput.load(GOLDEN / folder)
    x = torch.linspace(-2, 2, 40).reshape(5, 8)
    packed = network(x)
    assert torch.is_tensor(packed)
    np.testing.assert_allclose(packed, Session(GOLDEN / folder / "model.onnx").outputs(x), rtol=0, atol=1e-5)
    summary = json.loads((GOLDEN / folder / "summary.json").read_text())
    recipe = Recipe.read(GOLDEN / folder / "recipe.toml")
    assert len(recipe) == len(summary["recipe"] if folder == "recipe" else summary["chosen"]["recipe"])
    assert load_file(GOLDEN / folder / "model.safetensors")


@pytest.mark.parametrize("name", ["methods.toml", "recipe.toml"])
def test_every_setting_of_every_method_reads_back(name: str) -> None:
    data = tomllib.loads((GOLDEN / name).read_text())["stages"]
    recipe = Recipe.read(GOLDEN / name)
    assert [plain(stage) for stage in recipe.stages] == data
    assert Recipe.parse(recipe.data()) == recipe


def summary_of(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return data


@pytest.mark.slow
def test_a_search_that_an_earlier_version_left_goes_on_and_says_what_it_could_not_use(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "toy.py", tmp_path)
    shutil.copytree(GOLDEN / "killed", tmp_path / "out")
    words = ["shrink", "toy.py:make", "--floor", "50%", "--trials", "3", "--out", "out", "--resume"]
    done = subprocess.run(
        [sys.executable, "-m", "lilliput.cli", *words], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    summary = summary_of(tmp_path / "out")
    assert summary["format"] == 2 and summary["met"]
    old = summary_of(GOLDEN / "whole")
    assert old.keys() == KEYS and old.keys() <= summary.keys()
    assert (
        summary["dense"].keys() >= POINT and summary["chosen"].keys() >= POINT and summary["front"][0].keys() >= POINT
    )
    lilliput.load(tmp_path / "out")


def test_records_of_an_earlier_store_are_read() -> None:
    records = dict(Store(GOLDEN / "killed" / "records").records())
    assert {"train", "point", "rung"} <= {record["kind"] for record in records.values()}
    for key, record in records.items():
        if record["kind"] == "train":
            assert Store(GOLDEN / "killed" / "records").tensors(key)
