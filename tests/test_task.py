"""Tasks: any kind of data in one line, batches and augmentations as pure functions, metrics that say what is wrong."""

import copy
import pickle
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lilliput
from lilliput.onnx.session import Session
from lilliput.onnx.trace import trace
from lilliput.task import Arrays, Batch, Meaning, Score, Task, joined, leaves, length, mapped, predict, take, uniform
from lilliput.task.metrics import auc, f1, perplexity
from lilliput.task.nested import Named, output_names, structured

X, Y = torch.arange(40.0).reshape(20, 2), torch.arange(20) % 2


class Stream(IterableDataset):
    """A stream of unknown length."""

    def __iter__(self):
        return iter(zip(X, Y, strict=True))


@pytest.mark.parametrize(
    "data",
    [
        (X.numpy().astype("float64"), Y.numpy()),
        (X, Y),
        TensorDataset(X, Y),
        DataLoader(TensorDataset(X, Y), 7),
        DataLoader(Stream(), 7),
        [(X[:3], Y[:3]), [X[3:], Y[3:]]],
    ],
    ids=["arrays", "tensors", "dataset", "loader", "stream", "list"],
)
def test_any_kind_of_data(data) -> None:
    task = Task("any", train=data, val=data)
    inputs, targets = task.split("train")
    assert torch.equal(inputs, X) and torch.equal(targets, Y) and inputs.dtype == torch.float32
    assert task.examples == 20 and not task.has("test") and task.example.shape == (1, 2)


UNLABELLED = [
    ("cosine", "cosine"),
    ("mse", "mse"),
    ("cross_entropy", "accuracy"),
    ("cross_entropy", "f1"),
    ("cross_entropy", "perplexity"),
    ("bce", "accuracy"),
    (nn.CrossEntropyLoss(), "accuracy"),
    ("mse", lambda outputs, targets: -(outputs - targets).square().mean(1)),
    ("mse", "r2"),
]


@pytest.mark.parametrize(("loss", "metric"), UNLABELLED)
def test_without_labels_the_dense_network_is_what_a_score_compares_with(loss, metric) -> None:
    torch.manual_seed(0)
    x = torch.randn(60, 6)
    dense, random = nn.Linear(6, 4), nn.Linear(6, 4)
    task = Task("bare", x, x, x, loss=loss, metric=metric)
    with pytest.raises(ValueError, match=r"Say which network is to be preserved: task.against\(dense\)"):
        task.score(dense)
    bound = task.against(dense)
    for split in ("val", "test"):
        best, worse = bound.score(dense, split), bound.score(random, split)
        assert task.loss_of(best.value, worse.value) > 0.2, "a random network never scores as the dense one does"
    batch = Batch(x, bound.imitated(dense(x)).detach())
    assert bound.loss(dense(x), batch) < bound.loss(random(x), batch)
    before = bound.score(random).value
    with torch.no_grad():
        dense.weight.zero_()  # the targets are those of the network as it was given
    assert bound.score(random).value == before and bound.score(dense).value != best.value
    assert task.against(random).fingerprint != bound.fingerprint


def test_each_split_without_labels_is_judged_by_the_dense_network() -> None:
    dense = nn.Linear(2, 2)
    task = Task("val", (X, Y), X, (X, Y), loss="cross_entropy", metric="accuracy").against(dense)
    assert task.score(dense).value == 1 and task.score(dense, "test").value == (dense(X).argmax(1) == Y).float().mean()
    whole = Task("all", (X, Y), (X, Y))
    assert whole.against(dense) is whole


def test_a_training_without_labels_imitates_the_dense_network() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 3) @ torch.randn(3, 6)  # correlated, so that what is left can stand in for what was pruned
    dense = nn.Linear(6, 4)
    task = Task("bare", x, x, loss="mse", metric="mse", batch_size=32)
    stages = [lilliput.Prune(0.5), lilliput.Train(200, lr=0.01)]
    bound = task.against(dense)
    pruned, trained = (lilliput.run(dense, task, stages[:count]) for count in (1, 2))
    assert bound.score(trained).value < 0.8 * bound.score(pruned).value


def test_a_search_without_labels_reports_what_is_really_lost(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(96, 8)
    dense = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 6)).eval()
    task = Task("bare", x[:64], x[64:], loss="cosine", metric="cosine")
    result = lilliput.shrink(dense, task, floor=0.5, trials=1, out=tmp_path / "out")
    assert result.summary["dense"]["val"] == pytest.approx(1, abs=1e-5)
    assert result.chosen is not None and result.chosen["val"] < 1 - 1e-6
    with torch.no_grad():
        said = torch.from_numpy(Session(result.folder / "model.onnx").outputs(x[64:]))
        kept = nn.functional.cosine_similarity(said, dense(x[64:])).mean()
    assert result.chosen["val"] == pytest.approx(float(kept), abs=1e-5)


def test_dictionary_tuple_and_unlabelled_inputs() -> None:
    class Named(nn.Module):
        def forward(self, a, b):
            return a + 2 * b

    for inputs in ({"a": X, "b": X}, (X, X)):
        task = Task("named", (inputs, Y), (inputs, None), loss="mse", metric="mse", unlabelled=inputs)
        assert torch.equal(predict(Named(), task.split("val")[0], batch_size=7), 3 * X)
        assert task.examples == 40
        batch = task.batch(torch.tensor([30, 2, 39, 7]), 0)
        assert len(batch.targets) == 2 and batch.index.tolist() == [2, 7, 30, 39], "labelled ones come first"
        assert task.loss(torch.zeros(4, 2), task.batch(torch.tensor([30, 39]), 0)) == 0


def test_batches_are_a_pure_function_of_seed_and_step() -> None:
    task = Task("pure", (X, Y), (X, Y), batch_size=6)
    whole = [batch.index for batch in task.batches(8, seed=3)]
    later = [batch.index for batch in task.batches(8, seed=3, first=5)]
    assert all(torch.equal(a, b) for a, b in zip(whole[5:], later, strict=True))
    assert len(set(torch.cat(whole[:3]).tolist())) == 18, "no example twice in an epoch"
    assert not torch.equal(whole[0], next(iter(task.batches(1, seed=4))).index)


def test_augmentation_is_a_pure_function_of_example_and_draw() -> None:
    task = Task("noisy", (X, Y), (X, Y), augment=lambda x, seeds: x + uniform(seeds, 2), draws=3)
    index = torch.tensor([4, 9])
    assert torch.equal(task.inputs(index, 1), task.inputs(index, 4)), "draws repeat"
    assert torch.equal(task.inputs(index, 1)[1:], task.inputs(index[1:], 1)), "whatever else is in the batch"
    assert not torch.equal(task.inputs(index, 0), task.inputs(index, 1))
    numbers = uniform(torch.arange(4000), 2)
    assert numbers.min() >= 0 and numbers.max() < 1 and abs(float(numbers.mean()) - 0.5) < 0.01
    assert abs(float(np.corrcoef(numbers.T.numpy())[0, 1])) < 0.05


def test_metrics_have_the_values_of_their_definitions() -> None:
    scores, targets = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1])
    assert float(auc(scores, targets)) == pytest.approx(0.75)
    assert float(auc(torch.zeros(4), targets)) == pytest.approx(0.5), "ties count half"
    logits = Meaning("logits", labels=())
    assert float(f1(torch.eye(2)[[0, 1, 1, 1]], targets, meaning=logits)) == pytest.approx((2 / 3 + 4 / 5) / 2)
    tokens = Meaning("logits", labels=(3,))
    assert float(perplexity(torch.zeros(2, 3, 5), torch.zeros(2, 3).long(), meaning=tokens)) == pytest.approx(5.0)


def test_what_was_lost_points_the_same_way_for_every_metric() -> None:
    up, down = Task("up", (X, Y), (X, Y)), Task("down", (X, X), (X, X), None, "mse", "mse")
    assert up.loss_of(0.9, 0.8) == pytest.approx(0.1) and down.loss_of(0.1, 0.3) == pytest.approx(0.2)
    custom = Task("own", (X, Y), (X, Y), metric=lambda out, y: (out - y[:, None]).abs().mean(), higher_is_better=False)
    assert custom.score(lambda x: x * 0).outcomes is None and custom.loss_of(0.1, 0.3) > 0


def test_divergence_is_zero_at_the_dense_outputs_and_grows() -> None:
    outputs = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    for loss in ("cross_entropy", "bce", "cosine", "mse"):
        task = Task(loss, (X, X), (X, X), loss=loss, metric="mse")
        near, far = (task.divergence(outputs + noise, outputs).mean() for noise in (0.01, torch.tensor([1.0, 0, -1])))
        assert task.divergence(outputs, outputs).abs().max() < 1e-5 and near < far, loss


def test_wrong_data_says_what_must_hold() -> None:
    for data, text in (
        ((X, Y[:3]), r"one length above zero, got lengths \[3, 20\]"),
        (([], []), "length above zero"),
        (DataLoader(TensorDataset(X[:0], Y[:0])), "must hold at least one batch"),
    ):
        with pytest.raises(ValueError, match=f"Task wrong: train .*{text}"):
            Task("wrong", train=data, val=(X, Y))
    for data in (3, "mse"):
        with pytest.raises(TypeError, match=f"got {type(data).__name__}"):
            Task("wrong", train=data, val=(X, Y))
    with pytest.raises(ValueError, match="Did you mean 'cross_entropy'"):
        Task("wrong", (X, Y), (X, Y), loss="crossentropy")
    with pytest.raises(ValueError, match="Did you mean 'accuracy'"):
        Task("wrong", (X, Y), (X, Y), metric="acc uracy")
    with pytest.raises(KeyError, match="split must be one of"):
        Task("wrong", (X, Y), (X, Y)).split("test")
    with pytest.raises(ValueError, match="must be a finite number, got nan on val"):
        Task("wrong", (X, Y), (X, Y), metric=lambda out, y: out.sum() * float("nan")).score(lambda x: x)


def test_fingerprints_see_arrays_loss_metric_and_augmentation() -> None:
    made = [
        Task("a", (X, Y), (X, Y)),
        Task("a", (X + 1, Y), (X, Y)),
        Task("a", (X, 1 - Y), (X, Y)),
        Task("a", (X, Y), (X, Y), loss=lambda o, t: o.sum()),
        Task("a", (X, Y), (X, Y), metric="f1"),
        Task("a", (X, Y), (X, Y), augment=lambda x, seeds: x),
        Task("a", (X, Y), (X, Y), batch_size=3),
    ]
    assert len({task.fingerprint for task in made}) == len(made)
    assert made[0].fingerprint == Task("b", (X.numpy(), Y.numpy()), (X, Y)).fingerprint


def test_evaluation_restores_the_mode() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    assert torch.equal(predict(net, X), predict(net, X)) and net.training


# --------------------------------------------------------------------------------------------------------- the protocol


class Bare(Task):
    """A task with nothing but what must be defined."""

    name, metric_name = "bare", "share"

    splits = property(lambda self: ("train", "val"))
    fingerprint = property(lambda self: "bare")

    def probe(self, split):
        return Batch(X, Y)

    def batches(self, steps, seed, batch_size=None, first=0):
        for step in range(first, steps):
            some = [(5 * step + seed + place) % 20 for place in range(4)]
            yield Batch(X[some], Y[some])

    def loss(self, output, batch):
        return nn.functional.cross_entropy(output, batch.targets)

    def score(self, model, split="val"):
        right = (predict(model, X).argmax(1) == Y).double().numpy()
        return Score(float(right.mean()), right)


def test_task_is_a_protocol_and_makes_arrays_when_called() -> None:
    task = Task("a", (X, Y), (X, Y))
    assert type(task) is Arrays and isinstance(Bare(), Task) and issubclass(Arrays, Task)
    assert type(copy.deepcopy(task)) is Arrays and type(pickle.loads(pickle.dumps(task))) is Arrays
    bare = Bare()
    assert bare.examples == bare.size("val") == 20 and bare.draws == 0 and bare.with_draws(3) is bare
    assert torch.equal(bare.example, X[:1]) and torch.equal(bare.calibration(2), X[[0, 19]])
    assert repr(bare) == "Bare('bare': 20 train, 20 val; share)"
    assert bare.divergence(X, X + 1).shape == (20,) and bare.class_axis(X) is None

    class Half(Task):
        def probe(self, split):
            return Batch(X, Y)

    with pytest.raises(TypeError, match="Half: a task must define splits, batches, loss, score, fingerprint"):
        Half()


def test_a_task_without_arrays_is_trained_exported_and_shrunk(tmp_path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
    result = lilliput.shrink(net, Bare(), floor=0.5, budget=None, trials=1, out=tmp_path / "out")
    done = [point["name"] for point in result.summary["points"] if point["status"] == "done"]
    assert result.met and any("width" in name for name in done)


@dataclass
class Seen:
    """Outputs as a dataclass."""

    logits: torch.Tensor
    hidden: tuple | None = None


class Pair(NamedTuple):
    """Outputs as a named tuple."""

    a: torch.Tensor
    b: torch.Tensor


def test_structures_of_any_kind_are_mapped_named_and_put_together() -> None:
    x = torch.arange(6.0).reshape(3, 2)
    structure = {"a": [x, (x + 1, None)], "b": Seen(x + 2), "c": Pair(x, x), "d": None}
    assert length(structure) == 3 and len(leaves(structure)) == 5
    first = take(structure, slice(0, 1))
    assert isinstance(first["b"], Seen) and isinstance(first["c"], Pair) and first["a"][0].shape == (1, 2)
    assert torch.equal(joined([first, take(structure, slice(1, 3))])["b"].logits, x + 2)
    names = ["output/a/0", "output/a/1/0", "output/b/logits", "output/c/0", "output/c/1"]
    assert output_names(structure) == names
    back = structured(names, leaves(structure))
    assert torch.equal(back.b.logits, x + 2) and isinstance(back["c"], tuple) and isinstance(back.a, tuple)
    assert output_names((x, x)) == ["output_0", "output_1"] and output_names(x) == ["output"]
    for whole in (x, (x, x), (x,), {"one": x}, (x, {"y": x})):
        again = structured(output_names(whole), leaves(whole))
        assert output_names(again) == output_names(whole) and type(again) in (type(whole), Named)
    assert structured(["logits", "797"], [1, 2]) == (1, 2), "the outputs of somebody else's file are a tuple"
    with pytest.raises(ValueError, match=r"same parts, got \{a: \(3, 2\)\} and \{b: \(3, 2\)\}"):
        mapped(torch.add, {"a": x}, {"b": x})
    with pytest.raises(AttributeError, match="'other' must be one of a, b"):
        _ = Named(a=1, b=2).other


def test_outputs_of_hugging_face_keep_their_names_through_a_file() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")

    class Classifier(nn.Linear):
        def forward(self, input_ids, attention_mask):
            h = input_ids * attention_mask
            return outputs.SequenceClassifierOutput(logits=super().forward(h), hidden_states=(h, 2 * h))

    net = Classifier(2, 3)
    inputs = {"input_ids": X, "attention_mask": torch.ones(20, 2)}
    task = Task(
        "hf",
        (inputs, Y),
        (inputs, Y),
        loss=lambda out, y: nn.functional.cross_entropy(out.logits, y),
        metric=lambda out, y: (out["logits"].argmax(1) == y).float(),
    )
    session = Session(trace(net, task.example).proto)
    assert session.output_names == ["output/logits", "output/hidden_states/0", "output/hidden_states/1"]
    assert task.score(session).value == task.score(net).value
    assert torch.allclose(predict(session, inputs).hidden_states[1], 2 * X)
    assert torch.isfinite(task.loss(predict(net, inputs), task.probe("val")))


def test_every_augmentation_is_made_once_where_whole_epochs_are_asked_for() -> None:
    made = []

    def shift(x: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        made.append(len(x))
        return x + (seeds % 5)[:, None].float()

    x, y = torch.randn(24, 3), torch.zeros(24, dtype=torch.long)
    task = Task("shifted", (x, y), (x, y), augment=shift, draws=2, batch_size=8)
    batches = [batch.inputs for batch in task.batches(4 * 3 + 1, seed=0)]
    assert sum(made) == 2 * 24, "five epochs begin, under two augmentations"
    fresh = Task("shifted", (x, y), (x, y), augment=shift, draws=2, batch_size=8)
    alone = [next(iter(fresh.batches(step + 1, 0, first=step))).inputs for step in range(13)]
    assert all(torch.equal(a, b) for a, b in zip(batches, alone, strict=True)), "the same as made batch by batch"
