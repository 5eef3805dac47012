"""work: what a worker does for a search."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import lilliput.train
from lilliput.distill.logits import Distill
from lilliput.recipe import Recipe
from lilliput.schedule import Cosine
from lilliput.search import desk as desks
from lilliput.search import share
from lilliput.search.desk import Desk
from lilliput.search.work import Asked, Shared, lesson, teach, train
from lilliput.task import Task, predict
from lilliput.train import Train


@pytest.fixture
def shared(tmp_path: Path) -> Shared:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(160, 6, generator=generator)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    task = Task("corners", (x[:96], y[:96]), (x[96:], y[96:]), batch_size=16)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    return Shared(model, task, 0, "cpu", False, str(tmp_path / "records"))


@pytest.fixture
def desk(shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    desk = Desk(tmp_path / "pool", 0)
    share.dump(shared, desk.folder / "shared-1")
    monkeypatch.setattr(desks, "_board", desks.board(desk.folder, 1, "w+"), raising=False)
    desk.turn("shared-1")
    return desk


def asked(shared: Shared, **settings: object) -> Asked:
    training = Train(40, Cosine(1e-2), (Distill(),), batch_size=16)
    return replace(Asked(Recipe(), {}, training, shared.task.score(shared.model)), **settings)  # type: ignore[arg-type]


def test_trainings_that_follow_each_other_are_the_same_in_any_worker(shared: Shared, desk: Desk) -> None:
    first = train(desk, asked(shared))
    assert first.steps == 40 and first.result is not None and first.drop < 0
    again = Train(20, Cosine(5e-3), (Distill(),), batch_size=16)
    results = {0: first.result}
    second = train(desk, asked(shared, before=first.recipe, results=results, training=again))
    desk.kept.clear()  # another worker, which has done neither
    same = train(desk, asked(shared, before=first.recipe, results=results, training=again))
    assert second.result and same.result and second.result[1] and same.result[1]
    assert all(torch.equal(second.result[1][name], value) for name, value in same.result[1].items())
    assert second.drop == same.drop and second.recipe == same.recipe


def test_what_a_worker_is_given_of_the_dense_network_is_what_it_teaches(shared: Shared, desk: Desk) -> None:
    alone = train(desk, asked(shared))
    parts = [teach(desk, 0, first, first + 48) for first in (0, 48)]
    outputs = torch.cat(parts)
    assert torch.allclose(outputs, predict(shared.model, shared.task.probe("train").inputs), atol=1e-5)
    share.dump({"output": outputs * 0}, desk.folder / lesson("outputs-key-0"))
    desk.kept.clear()
    taught = train(desk, asked(shared))
    assert alone.result and taught.result and alone.result[1] and taught.result[1]
    assert not torch.equal(alone.result[1]["0.weight"], taught.result[1]["0.weight"])


def test_a_training_that_killed_its_worker_takes_half_the_batch(shared: Shared, desk: Desk) -> None:
    made = train(desk, asked(shared), smaller=1)
    training = made.recipe.stages[-1]
    assert isinstance(training, Train) and training.batch_size == 8


def test_a_long_training_goes_on_after_its_worker_died(
    shared: Shared, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(desk, asked(shared))
    monkeypatch.setattr(lilliput.train, "CHECKPOINT_SECONDS", -1.0)  # a checkpoint after every step
    desk.kept.clear()
    seen: list[float] = []

    class Dying(Desk):
        def report(self, steps: float) -> None:
            seen.append(steps)
            if len(seen) == 12:
                raise MemoryError

    dying = Dying(desk.folder, 0)
    dying.turn("shared-1")
    with pytest.raises(MemoryError):
        train(dying, asked(shared))
    dying.kept.clear()
    rest = train(dying, asked(shared))
    assert seen[12] == 12.0 and seen[-1] == 40  # the eleventh step's checkpoint was the last
    assert whole.result and rest.result and whole.result[1] and rest.result[1]
    assert all(torch.equal(whole.result[1][name], value) for name, value in rest.result[1].items())
    assert not list(Path(str(shared.records)).glob("*.ckpt"))


def test_what_codes_cost_is_found_once_for_all_levels_of_the_same_weights(shared: Shared, desk: Desk) -> None:
    first = train(desk, asked(shared))
    before = {"before": first.recipe, "results": {0: first.result}, "training": None}
    eight = train(desk, asked(shared, bits=8.0, **before))
    found = desk.kept["offers"]
    four = train(desk, asked(shared, bits=4.0, **before))
    assert desk.kept["offers"] is found and eight.steps == four.steps == 0 and four.recipe != eight.recipe
    train(desk, asked(shared, bits=4.0, training=None))
    assert desk.kept["offers"] is not found, "other weights"
