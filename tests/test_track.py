"""Callbacks: what a search tells, and what the trackers of others keep of it."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lilliput
from lilliput import track

X = torch.randn(240, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] + X[:, 1] > 0).long()


def task() -> lilliput.Task:
    return lilliput.Task("sums", train=(X[:80], Y[:80]), val=(X[80:160], Y[80:160]), test=(X[160:], Y[160:]))


def net() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 2))
    with torch.no_grad():  # it is right by construction
        for parameter in model.parameters():
            parameter.normal_(0, 0.01, generator=torch.Generator().manual_seed(0))
        model[0].weight[:2] = torch.tensor([[1.0, 1, 0, 0, 0, 0], [-1.0, -1, 0, 0, 0, 0]])
        model[2].weight[:, :2] = torch.tensor([[0.0, 1], [1, 0]])
    return model


def shrunk(out: Path, callback: track.Callback) -> Any:
    return lilliput.shrink(net(), task(), "5%", trials=1, train=False, out=out, callback=callback, workers=1)


def test_a_callback_is_told_what_the_summary_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    told: list[dict[str, Any]] = []
    caplog.set_level(logging.INFO, "lilliput")
    result = shrunk(tmp_path / "o", told.append)
    summary = result.summary
    tried = [event for event in told if event["event"] == "tried"]
    assert [event["name"] for event in tried] == [point["name"] for point in summary["points"]]
    assert [event["name"] for event in told if event["event"] == "best"] == [row["name"] for row in summary["history"]]
    assert told[-1]["event"] == "end" and told[-1]["chosen"] == summary["chosen"]
    json.dumps(told)
    assert "measuring the dense network" in caplog.text and "best so far" in caplog.text


def test_a_callback_that_raises_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def raises(event: dict[str, Any]) -> None:
        calls.append(event)
        raise KeyError("mine")

    caplog.set_level(logging.INFO, "lilliput")
    assert shrunk(tmp_path / "o", raises).met
    assert len(calls) == 1 and "the callback raised KeyError: 'mine'" in caplog.text


def test_tensorboard_keeps_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = shrunk(tmp_path / "o", track.tensorboard(tmp_path / "runs"))
    kept = EventAccumulator(str(tmp_path / "runs")).Reload()
    prices = [point.value for point in kept.Scalars("best/price")]
    assert prices == pytest.approx([row["price"] for row in result.summary["history"]])
    assert kept.Scalars("end/packed_bytes")[0].value == result.chosen["packed_bytes"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_mlflow_keeps_the_numbers_and_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "store").as_uri())
    result = shrunk(tmp_path / "o", track.mlflow("smaller"))
    assert mlflow.active_run() is None
    (run,) = mlflow.MlflowClient().search_runs([mlflow.get_experiment_by_name("smaller").experiment_id])
    assert run.data.metrics["end.packed_bytes"] == result.chosen["packed_bytes"]
    assert run.data.params["task"] == "sums"
    names = {file.path for file in mlflow.MlflowClient().list_artifacts(run.info.run_id)}
    assert {"model.lil", "model.onnx", "summary.json"} <= names


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_weights_and_biases_keeps_a_run_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    result = shrunk(tmp_path / "o", track.wandb(project="smaller", mode="offline"))
    assert wandb.run is None
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert str(result.chosen["name"]).encode() in file.read_bytes()
