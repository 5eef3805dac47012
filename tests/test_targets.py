"""Targets by name: a table, a folder of Hugging Face, a network of timm, each opened as the command line opens it."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from lilliput.cli import app
from lilliput.targets import Given, found_again, opened
from lilliput.targets.rows import columns
from lilliput.task import Batch, take


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))


def table(path: Path, rows: int = 600, words: bool = True) -> Path:
    """Who buys, by a number and a category, with some values missing."""
    draw = random.Random(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["age", "town", "noise", "buys"])
        for _ in range(rows):
            age, town = draw.uniform(20, 60), draw.choice(["Ulm", "Bern", "Graz"])
            buys = (age > 40) != (town == "Ulm")
            price = 3 * age + 40 * (town == "Bern")
            writer.writerow(
                ["" if draw.random() < 0.02 else round(age, 2), town, draw.random(), buys if words else price]
            )
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("words", "metric", "least"), [(True, "accuracy", 0.9), (False, "r2", 0.9)])
def test_a_table_is_learned_and_found_again(tmp_path: Path, words: bool, metric: str, least: float) -> None:
    file = table(tmp_path / "sales.csv", words=words)
    model, task = opened(Given(str(file)))
    assert task.name == "sales" and task.metric_name == metric
    assert task.score(model, "test").value > least
    assert sum(task.size(split) for split in ("train", "val", "test")) == 600
    again, _ = found_again({"target": "sales.csv", "cwd": str(tmp_path)})
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize("words", [True, False])
def test_rows_without_a_value_to_predict_are_left_out(
    tmp_path: Path, words: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = table(tmp_path / "sales.csv", 200, words)
    monkeypatch.setattr("lilliput.targets.table.STEPS", (5, 5))
    with file.open("a") as rows:
        rows.write("30,Ulm,0.5,\nNA,Bern,0.1,NA\n")
    _, task = opened(Given(str(file)))
    assert task.metric_name == ("accuracy" if words else "r2")
    assert sum(task.size(split) for split in ("train", "val", "test")) == 200
    assert set(task.split("train")[0]) == {"numbers", "categories"}
    assert task.split("train")[0]["numbers"].shape[1] == 2, "a missing number makes no category"


@pytest.mark.slow
def test_a_table_is_shrunk_from_the_command_line(tmp_path: Path) -> None:
    file = table(tmp_path / "sales.csv")
    done = CliRunner().invoke(
        app,
        ["shrink", str(file), "--floor", "5%", "--no-train", "--trials", "1", "--out", str(tmp_path / "o"), "--json"],
    )
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["chosen"]["packed_bytes"] < summary["dense"]["packed_bytes"] / 3


def test_tables_are_read_with_any_separator_and_refused_with_the_row(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text('a;b\n1,5;"x;y"\n', encoding="utf-8-sig")
    assert columns(file) == {"a": ["1,5"], "b": ["x;y"]}
    file.write_text("a,b\n1,2\n3\n")
    with pytest.raises(ValueError, match="2 values, but row 3 has 1"):
        columns(file)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Given("sales.csv", label="bys"), "Did you mean 'buys'"),
        (Given("sales.csv", weights="x.pt"), "--weights must come with timm:"),
        (Given("none.csv"), "the table must exist"),
        (Given("digits", data="x"), "--data must come with"),
        (Given("hf:."), "must be a folder with config.json"),
        (Given("nothing"), "TARGET must be an embedded name"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    given: Given, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "sales.csv", 50)
    with pytest.raises(ValueError, match=said):
        opened(given)


def test_a_text_classifier_of_hugging_face(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "very"]
    folder = tmp_path / "reviews"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1},
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    file = tmp_path / "texts.csv"
    lines = [f"{i},{'very ' * (i % 30)}{'good' if i % 2 else 'bad'} film,{'yes' if i % 2 else 'no'}" for i in range(60)]
    file.write_text("\n".join(["id,text,label", *lines]))
    model, task = opened(Given(f"hf:{folder}", data=str(file)))
    inputs, targets = task.split("val")
    assert set(inputs) >= {"input_ids", "attention_mask"} and inputs["input_ids"].shape[1] == 16
    assert sorted(targets.unique().tolist()) == [0, 1]
    assert model(**take(inputs, slice(0, 3))).shape == (3, 2)
    assert isinstance(task.probe("val"), Batch) and 0 <= task.score(model, "val").value <= 1
    file.write_text("\n".join(["text,label", *["film,maybe"] * 50]))
    with pytest.raises(ValueError, match=r"must be one of .*'no', 'yes'"):
        opened(Given(f"hf:{folder}", data=str(file)))


def pictures(folder: Path, each: int = 24) -> Path:
    """Dark and bright pictures, wider than high."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for label, low in (("bright", 150), ("dark", 0)):
        (folder / label).mkdir(parents=True)
        for i in range(each):
            values = draw.integers(low, low + 100, (40, 60, 3)).astype("uint8")
            Image.fromarray(values).save(folder / label / f"{i}.png")
    return folder


def test_a_network_of_timm_gets_its_own_preprocessing(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    folder = pictures(tmp_path / "pictures")
    net: nn.Module = timm.create_model("test_resnet.r160_in1k", num_classes=2)
    torch.save({"state_dict": {f"module.{name}": value for name, value in net.state_dict().items()}}, tmp_path / "x.pt")
    given = Given("timm:test_resnet.r160_in1k", data=str(folder), weights=str(tmp_path / "x.pt"))
    model, task = opened(given)
    inputs, targets = task.split("train")
    assert inputs.shape[1:] == (3, 160, 160) and targets.unique().tolist() == [0, 1]
    assert inputs[targets == 0].mean() > inputs[targets == 1].mean() + 1  # bright comes first
    assert torch.equal(model.state_dict()["fc.weight"], net.state_dict()["fc.weight"])
    (folder / "extra").mkdir()
    pictures(folder / "more")
    with pytest.raises(ValueError, match="--weights must hold the tensors"):
        opened(given)
