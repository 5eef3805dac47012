"""Reading: the data that people have becomes inputs and targets, or is refused with what to do."""

from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lilliput.task import Task, length, take
from lilliput.task.read import Reading, tensors

X, Z, Y = torch.arange(40.0).reshape(20, 2), torch.arange(20)[:, None], torch.arange(20) % 3
WORDS = [[5, 6], [7], [8, 9, 4]]


class Items(Dataset):
    """Examples by their place, each made by a function."""

    def __init__(self, make) -> None:
        self.make = make

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, place):
        return self.make(place)


class Stream(IterableDataset):
    """Examples one after the other."""

    def __iter__(self):
        return iter(zip(X, Y, strict=True))


def rows(**columns) -> datasets.Dataset:
    return datasets.Dataset.from_dict({name: np.asarray(column).tolist() for name, column in columns.items()})


ONE = {
    "pair": (X, Y),
    "numpy of other widths": (X.numpy().astype(np.float16), Y.numpy().astype(np.int32)),
    "bfloat16": (X.bfloat16(), Y),
    "lists": (X.tolist(), Y.tolist()),
    "pandas": (pd.DataFrame(X.numpy(), columns=["a", "b"]), pd.Series(Y.numpy())),
    "pandas of mixed columns": (pd.DataFrame({"a": X[:, 0].int().numpy(), "b": X[:, 1].numpy()}), Y),
    "data set": TensorDataset(X, Y),
    "data set of numpy and numbers": Items(lambda i: (X[i].numpy(), int(Y[i]))),
    "stream": Stream(),
    "list of examples": [(X[i], int(Y[i])) for i in range(20)],
    "loader": DataLoader(TensorDataset(X, Y), 7),
    "loader of a stream": DataLoader(Stream(), 7),
    "list of batches": [(X[:3], Y[:3]), [X[3:], Y[3:]]],
    "generator of batches": ((X[i : i + 5], Y[i : i + 5]) for i in range(0, 20, 5)),
}
TWO = {
    "three in a tuple": (X, Z, Y),
    "a tuple of inputs": ((X, Z), Y),
    "data set of three": TensorDataset(X, Z, Y),
    "data set of nested pairs": Items(lambda i: ((X[i], Z[i]), Y[i])),
    "loader of three": DataLoader(TensorDataset(X, Z, Y), 6),
}
NAMED = {
    "dictionary": {"x": X, "z": Z, "labels": Y},
    "data set of dictionaries": Items(lambda i: {"x": X[i], "z": Z[i], "label": Y[i]}),
    "loader of dictionaries": DataLoader(Items(lambda i: {"x": X[i], "z": Z[i], "labels": Y[i]}), 8),
    "Hugging Face": rows(x=X, z=Z, labels=Y),
    "Hugging Face with tensors": rows(x=X, z=Z, label=Y).with_format("torch"),
    "loader of Hugging Face": DataLoader(rows(x=X, z=Z, labels=Y).with_format("torch"), 8),
}


@pytest.mark.parametrize("data", ONE.values(), ids=ONE)
def test_one_input_and_labels(data) -> None:
    inputs, targets = Reading().read("train", data)
    assert torch.equal(inputs, X) and inputs.dtype == torch.float32
    assert torch.equal(targets, Y) and not targets.is_floating_point()


@pytest.mark.parametrize("data", TWO.values(), ids=TWO)
def test_the_last_of_several_is_the_targets(data) -> None:
    inputs, targets = Reading().read("train", data)
    assert isinstance(inputs, tuple) and torch.equal(inputs[0], X) and torch.equal(inputs[1], Z)
    assert torch.equal(targets, Y)


@pytest.mark.parametrize("data", NAMED.values(), ids=NAMED)
def test_a_dictionary_s_label_is_no_input(data) -> None:
    inputs, targets = Reading().read("train", data)
    assert list(inputs) == ["x", "z"] and torch.equal(inputs["x"], X) and torch.equal(inputs["z"], Z)
    assert torch.equal(targets, Y)


def test_the_column_of_the_targets_has_any_name() -> None:
    table = pd.DataFrame({"a": X[:, 0].numpy(), "price": Y.numpy(), "b": X[:, 1].numpy()})
    for data in (table, {"a": X[:, 0], "price": Y, "b": X[:, 1]}):
        inputs, targets = Reading(target="price").read("train", data)
        assert torch.equal(targets, Y)
        assert torch.equal(inputs if isinstance(inputs, torch.Tensor) else torch.stack([*inputs.values()], 1), X)
    with pytest.raises(ValueError, match="target must be one of a, b, got 'prize'"):
        Reading(target="prize").read("train", {"a": X, "b": X})


def test_data_without_labels() -> None:
    for data in (X, (X,), (X, None), [X], TensorDataset(X), DataLoader(TensorDataset(X), 6), {"x": X}):
        inputs, targets = Reading().read("train", data)
        assert torch.equal(inputs["x"] if isinstance(inputs, dict) else inputs, X) and targets is None


def test_shorter_examples_are_filled_up_behind() -> None:
    made = rows_of_words()
    inputs, labels = Reading(padding=0).read("train", made)
    assert inputs["ids"].tolist() == [[5, 6, 0], [7, 0, 0], [8, 9, 4]]
    assert labels.tolist() == [[1, 1, -100], [1, -100, -100], [1, 1, 1]]
    # With a mask nothing has to be said: what stands where it is zero does not count.
    masked = [{"ids": word, "attention_mask": [1] * len(word), "label": 1} for word in WORDS]
    assert Reading().read("train", masked)[0]["attention_mask"].sum(1).tolist() == [2, 1, 3]
    # Loaders fill up each batch for itself.
    batches = [(torch.ones(2, 3), torch.ones(2)), (torch.ones(1, 5), torch.ones(1))]
    assert Reading(padding=9).read("train", batches)[0][:, 4].tolist() == [9, 9, 1]
    with pytest.raises(ValueError, match=r"train must hold examples of one length, got lengths 1 to 3. .*padding=0"):
        Reading("Task words").read("train", made)


def rows_of_words() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"ids": WORDS, "labels": [[1] * len(word) for word in WORDS]})


def test_what_can_be_read_in_two_ways_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Task t: train must be a tuple, since a list is read as batches, got a list of 2"
    ):
        Task("t", train=[X, X], val=(X, X))


def test_text_is_refused_by_its_column() -> None:
    for data in (
        datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}),
        {"text": ["a", "b"], "label": [0, 1]},
    ):
        with pytest.raises(ValueError, match=r"Task t: train, text must hold numbers, got <U1. .*tokenizer"):
            Task("t", train=data, val=(X, Y))
    with pytest.raises(ValueError, match="must hold numbers, got object"):
        tensors(pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}))


def test_an_array_in_a_file_stays_there(tmp_path: Path) -> None:
    file = np.memmap(tmp_path / "x", np.float32, "w+", shape=(1000, 8))
    file[:] = 3
    file.flush()
    read = np.memmap(tmp_path / "x", np.float32, "r", shape=(1000, 8))
    task = Task("mapped", train=(read, np.zeros(1000, np.int64)), val=(read[:9], np.zeros(9, np.int64)))
    inputs = task.probe("train").inputs
    assert (
        inputs.data_ptr() == read.ctypes.data
        and length(inputs) == 1000
        and float(take(inputs, slice(5, 6)).sum()) == 24
    )
