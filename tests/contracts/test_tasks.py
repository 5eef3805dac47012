"""Every loss, metric and task that is registered: what the search relies on."""

import copy
import functools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lilliput.onnx.session import Session
from lilliput.onnx.trace import trace
from lilliput.registry import entries
from lilliput.task import Arrays, Batch, Episodes, Generation, Score, Task, call, leaves, length, mapped, predict, take

LOSSES = [entry for entry in entries("loss") if entry.package == "lilliput"]
METRICS = [entry for entry in entries("metric") if entry.package == "lilliput"]
N = 40


def examples(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """(perfect outputs, outputs of chance, targets) of a kind."""
    draw = torch.Generator().manual_seed(3)
    labels = torch.arange(N) % 8
    values = torch.rand(N, 4, generator=draw)
    noise = torch.rand(N, 4, generator=draw)
    return {
        "logits": (8 * torch.eye(8)[labels], torch.randn(N, 8, generator=draw), labels),
        "bits": (8 * (labels.clamp_max(1) * 2 - 1.0), torch.randn(N, generator=draw), labels.clamp_max(1)),
        "directions": (2 * values, noise - 0.5, values),
        "values": (values, noise, values),
        "tokens": (labels.reshape(-1, 4), (labels.reshape(-1, 4) + 1) % 8, labels.reshape(-1, 4)),
    }[kind]


KINDS = {
    "accuracy": "logits",
    "f1": "logits",
    "iou": "logits",
    "top 5": "logits",
    "perplexity": "logits",
    "auc": "bits",
    "cosine": "directions",
    "exact match": "tokens",
    "edit distance": "tokens",
}
"""What a metric reads, where it is not values."""


def task_for(targets: Tensor, loss: str = "mse", metric: str = "mse", **settings) -> Arrays:
    inputs = torch.zeros(len(targets), 1)
    return Task("contract", (inputs, targets), (inputs, targets), loss=loss, metric=metric, **settings)


@pytest.mark.parametrize("entry", LOSSES, ids=lambda entry: entry.name)
def test_a_loss_is_finite_differentiable_and_least_where_outputs_are_right(entry) -> None:
    right, chance, targets = examples(entry.load().outputs)
    task = task_for(targets, entry.name)
    batch = next(task.batches(1, 0, N))
    order = batch.index
    outputs = chance[order].clone().requires_grad_()
    loss = task.loss(outputs, batch)
    loss.backward()
    assert loss.ndim == 0 and torch.isfinite(loss) and torch.isfinite(outputs.grad).all()
    assert outputs.grad.abs().sum() > 0
    assert task.loss(right[order], batch) < loss
    assert task.divergence(right, right).abs().max() < 1e-5
    assert task.divergence(chance, right).shape == (N,) and task.divergence(chance, right).mean() > 0
    assert task.meaning.kind == entry.load().outputs


@pytest.mark.parametrize("entry", METRICS, ids=lambda entry: entry.name)
def test_a_metric_runs_its_way_and_is_resampled(entry) -> None:
    kind = KINDS.get(entry.name, "values")
    right, chance, targets = examples(kind)
    task = task_for(targets, {"logits": "cross_entropy", "bits": "bce"}.get(kind, "mse"), entry.name)
    best, worse = task.rate(right, "val"), task.rate(chance, "val")
    assert task.loss_of(best.value, worse.value) > 0, "the better outputs have the better score"
    if task.higher_is_better and entry.name != "psnr":
        assert worse.value <= best.value <= 1 + 1e-6
    elif not task.higher_is_better:
        assert best.value >= 0
    everything = np.arange(worse.units)
    assert worse.resampled(everything) == pytest.approx(worse.value, rel=1e-5)
    assert worse.resampled(everything[::-1].copy()) == pytest.approx(worse.value, rel=1e-5), "order does not matter"
    assert np.isfinite(worse.resampled(everything[: len(everything) // 2]))


def test_metrics_agree_with_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    logits, labels = examples("logits")[1:]
    bits, positive = examples("bits")[1:]
    values, truth = examples("values")[1:]
    said = logits.argmax(1)

    def ours(metric: str, outputs: Tensor, targets: Tensor, loss: str = "mse") -> float:
        return task_for(targets, loss, metric).rate(outputs, "val").value

    assert ours("accuracy", logits, labels, "cross_entropy") == pytest.approx(sklearn.accuracy_score(labels, said))
    macro = sklearn.f1_score(labels, said, average="macro")
    assert ours("f1", logits, labels, "cross_entropy") == pytest.approx(macro)
    assert ours("auc", bits, positive, "bce") == pytest.approx(sklearn.roc_auc_score(positive, bits))
    for metric, theirs in (
        ("mae", sklearn.mean_absolute_error),
        ("mse", sklearn.mean_squared_error),
        ("r2", sklearn.r2_score),
    ):
        assert ours(metric, values, truth) == pytest.approx(theirs(truth, values), abs=1e-6)


def test_a_draw_on_which_a_metric_is_undefined_gives_nan() -> None:
    bits, positive = examples("bits")[1:]
    score = task_for(positive, "bce", "auc").rate(bits, "val")
    assert np.isnan(score.resampled(np.flatnonzero(positive.numpy()))), "there is no negative example"
    with pytest.raises(ValueError, match="Give outcomes or again"):
        Score(0.5, None, None, count=3).resampled(np.arange(3))


# --------------------------------------------------------------------------------------------------- where classes lie


@pytest.mark.parametrize("axis", [1, -1], ids=["(N, C, ...)", "(N, ..., C)"])
@pytest.mark.parametrize("places", [(), (5,), (4, 6)], ids=str)
def test_loss_metric_and_divergence_agree_on_the_class_axis_and_on_padding(places: tuple[int, ...], axis: int) -> None:
    draw = torch.Generator().manual_seed(0)
    last, dense = torch.randn(2, N, *places, 3, generator=draw)
    labels = torch.randint(3, (N, *places), generator=draw)
    labels[::7] = -100
    if places:
        labels[1, 0] = -100
    known = labels != -100
    task = task_for(labels, "cross_entropy", "accuracy", class_axis=axis)
    outputs, reference = last.movedim(-1, axis), dense.movedim(-1, axis)
    assert task.class_axis(outputs) == axis % outputs.ndim
    assert task_for(labels, "cross_entropy").class_axis(outputs) == axis % outputs.ndim, "found by shapes"
    batch = task.probe("val")
    wanted = nn.functional.cross_entropy(last[known], labels[known])
    assert task.loss(outputs, batch) == pytest.approx(float(wanted), abs=1e-6)
    right = (last.argmax(-1) == labels) & known
    shares = [float(r.sum() / k.sum()) for r, k in zip(right, known, strict=True) if k.any()]
    assert task.rate(outputs, "val").outcomes == pytest.approx(shares)
    p, q = dense.log_softmax(-1), last.log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).reshape(N, -1).mean(1)
    assert torch.allclose(task.divergence(outputs, reference), divergence, atol=1e-6)
    perplexity = task_for(labels, "cross_entropy", "perplexity", class_axis=axis).rate(outputs, "val").value
    assert perplexity == pytest.approx(float(wanted.exp()), abs=1e-5)
    nothing = torch.full_like(labels, -100)
    empty = Task("e", (batch.inputs, nothing), (batch.inputs, labels), class_axis=axis)
    assert empty.loss(outputs, next(empty.batches(1, 0, N))) == 0, "a batch without a label"


def test_probabilities_are_not_softened_twice_and_unclear_axes_are_refused() -> None:
    logits, labels = examples("logits")[1:]
    chances = logits.softmax(1)
    said = task_for(labels, "cross_entropy", outputs="probabilities")
    batch = said.probe("val")
    assert said.loss(chances, batch) == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), abs=1e-6)
    assert torch.allclose(
        said.divergence(chances, chances.roll(1, 0)),
        task_for(labels, "cross_entropy").divergence(logits, logits.roll(1, 0)),
        atol=1e-5,
    )
    with pytest.raises(ValueError, match=r"class_axis must be given .* axis 1 or 2"):
        task_for(torch.zeros(4, 3).long(), "cross_entropy").class_axis(torch.zeros(4, 3, 3))
    with pytest.raises(ValueError, match="class_axis must be an axis of outputs"):
        task_for(labels, "cross_entropy", class_axis=4).class_axis(logits)
    with pytest.raises(ValueError, match="outputs must be one of logits, probabilities"):
        task_for(labels, "cross_entropy", outputs="classes")
    weighted = nn.CrossEntropyLoss(weight=torch.ones(3))
    assert task_for(labels, weighted, "accuracy").meaning.kind == "logits", "torch's own losses say what they read"


@pytest.mark.parametrize("metric", ["mse", "mae", "r2", "accuracy", "auc"])
def test_an_axis_of_one_does_not_make_pairs_of_all_with_all(metric: str) -> None:
    x = torch.randn(N, generator=torch.Generator().manual_seed(0))
    y, loss = ((x > 0).float(), "bce") if metric in ("accuracy", "auc") else (2 * x, "mse")
    wanted = task_for(y, loss, metric).rate(x, "val").value
    for outputs, targets in ((x[:, None], y), (x, y[:, None]), (x[:, None], y[:, None])):
        task = task_for(targets, loss, metric)
        assert task.rate(outputs, "val").value == pytest.approx(wanted)
        assert torch.isfinite(task.loss(outputs, task.probe("val")))
    if loss == "mse":
        with pytest.raises(ValueError, match=r"got \(40, 2\) and \(40,\)"):
            task_for(y, loss, metric).rate(x[:, None].expand(-1, 2), "val")


# ---------------------------------------------------------------------------------------------------------------- tasks


class Walk:
    """A walk on a line; a step towards zero is rewarded."""

    def reset(self, seed: int):
        self.place, self.steps = float(np.random.default_rng(seed).normal()), 0
        return self._state(), {}

    def step(self, action: int):
        self.place += 0.2 if action else -0.2
        self.steps += 1
        return self._state(), -abs(self.place), self.steps == 5, False, {}

    def _state(self) -> np.ndarray:
        return np.array([self.place, 1.0])


class Nested(nn.Module):
    """Two inputs, outputs in a dictionary with a tuple inside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor, more: dict[str, Tensor]) -> dict[str, object]:
        h = self.b(more["y"])
        return {"kind": self.a(x), "rest": (h, h[:, 0] * 2)}


class Masked(nn.Module):
    """Inputs by name, with a padding mask; the mean over what is no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.say = nn.Embedding(6, 8), nn.Linear(8, 2)

    def forward(self, ids: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
        kept = mask.unsqueeze(-1).to(torch.float32)
        mean = (self.embed(ids) * kept).sum(1) / kept.sum(1)
        return self.say(mean.masked_fill(~mask[:, :1], 0.0)) * scale


class Writer(nn.Module):
    """Writes what it reads, by a table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.say = nn.Embedding(6, 8), nn.Linear(8, 6)

    def forward(self, source: Tensor, prefix: Tensor) -> Tensor:
        return self.say(self.embed(source) + self.embed(prefix))


class Continues(Writer):
    """The same with prompt and prefix in one tensor."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.say(self.embed(tokens))


def nested_loss(output, target):
    return nn.functional.cross_entropy(output["kind"], target[0]) + output["rest"][1].square().mean()


def nested_metric(output, target):
    return (output["kind"].argmax(1) == target[0]).float() + output["rest"][0].mean(1)


def made(kind: str, seed: int = 0, **settings) -> tuple[nn.Module, Task]:
    """A network and a task of a kind, whose data follow the seed."""
    torch.manual_seed(1)
    net: nn.Module
    draw = torch.Generator().manual_seed(seed)
    x, words = torch.randn(24, 3, generator=draw), torch.randint(3, 6, (24, 4), generator=draw)
    labels = torch.randint(2, (24,), generator=draw)
    if kind == "Arrays":
        net, data = nn.Linear(3, 2), (x, labels)
        return net, Task("arrays", data, data, data, **settings)
    if kind == "unlabelled":
        net = nn.Linear(3, 2)
        task = Task("bare", x, x, loss="cosine", metric="cosine", unlabelled=x + 1, **settings)
        return net, task.against(net)
    if kind == "tokens":
        tags = words % 3
        tags[:, 3] = -100
        net = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 3))
        return net, Task("tags", (words, tags), (words, tags), **settings)
    if kind == "images":
        image = torch.rand(24, 1, 6, 6, generator=draw)
        data = (image + 0.1, image)
        return nn.Conv2d(1, 1, 3, padding=1), Task("images", data, data, loss="mse", metric="psnr", **settings)
    if kind == "nested":
        nested = ((x, {"y": x[:, :2]}), (labels, x[:, 2]))
        return Nested(), Task("nested", nested, nested, loss=nested_loss, metric=nested_metric, **settings)
    if kind == "masked":
        mask = torch.arange(4) < torch.randint(1, 5, (24, 1), generator=draw)
        named = ({"ids": words, "mask": mask, "scale": x[:, :1].exp()}, labels)
        return Masked(), Task("masked", named, named, metric="f1", **settings)
    if kind in ("Generation", "joined"):
        tokens = torch.cat([words[:, :3], torch.full((24, 1), 2)], 1)
        joined = kind == "joined"
        data = (words, tokens)
        settings = {"start": 1, "end": 2, "joined": joined} | settings
        return (Continues() if joined else Writer()), Generation("copy", data, data, **settings)
    assert kind == "Episodes", f"{kind} needs an example here"
    net = nn.Linear(2, 2)
    return net, Episodes("walk", Walk, net, range(seed, seed + 4), range(10, 16), steps=settings.pop("steps", 5))


TASKS = [
    *(entry.name for entry in entries("task") if entry.package == "lilliput"),
    "unlabelled",
    "tokens",
    "images",
    "nested",
    "masked",
    "joined",
]
SETTINGS = {
    "Generation": {"end": 3},
    "joined": {"padding": 4},
    "Episodes": {"steps": 3},
    "tokens": {"ignore_index": 0},
    "nested": {"higher_is_better": False},
}
CACHED = functools.cache(made)


def same(a, b) -> bool:
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("kind", TASKS)
def test_batches_are_a_pure_function_of_seed_and_step(kind: str) -> None:
    net, task = CACHED(kind)
    whole = list(task.batches(6, seed=5, batch_size=4))
    assert len(whole) == 6
    later = list(task.batches(6, seed=5, batch_size=4, first=4))
    other = list(task.batches(6, seed=6, batch_size=4))
    for batch, again in zip(whole[4:], later, strict=True):
        assert same(batch.inputs, again.inputs) and same(batch.targets, again.targets)
        assert same(batch.index, again.index)
    assert not all(same(a.inputs, b.inputs) for a, b in zip(whole, other, strict=True))
    output = mapped(lambda leaf: leaf.detach().requires_grad_(), call(net, whole[0].inputs))
    loss = task.loss(output, whole[0])
    loss.backward()
    assert loss.ndim == 0 and torch.isfinite(loss)
    assert task.labelled == any(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in leaves(output))


@pytest.mark.parametrize("kind", TASKS)
def test_the_dense_model_scores_as_itself(kind: str) -> None:
    net, task = CACHED(kind)
    net.train()
    score, again = task.score(net), task.score(net, "val")
    assert net.training, "the mode is restored"
    assert score.value == again.value and task.loss_of(score.value, again.value) == 0
    assert score.units > 1
    assert score.resampled(np.arange(score.units)) == pytest.approx(score.value, abs=1e-6)
    if score.outcomes is not None:
        assert score.outcomes.mean() == pytest.approx(score.value)
    probe = task.probe("val")
    outputs = predict(net, probe.inputs)
    assert score.outputs is None or same(score.outputs, outputs)
    apart = task.divergence(outputs, outputs)
    assert apart.shape == (length(probe.inputs),) and apart.abs().max() < 1e-5
    assert torch.isfinite(task.loss(outputs, probe))


@pytest.mark.parametrize("kind", TASKS)
def test_another_network_never_scores_as_the_dense_one_does(kind: str) -> None:
    net, task = CACHED(kind)
    bound = task.against(net)
    assert bound.against(copy.deepcopy(net)) is bound, "what it is judged by never changes"
    other = copy.deepcopy(net)
    for parameter in other.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
    targets = mapped(Tensor.detach, bound.imitated(call(net, task.example)))
    assert length(targets) == 1
    if not task.labelled:
        assert bound.score(other).value != bound.score(net).value
        assert bound.loss(call(other, task.example), Batch(task.example, targets)) > 0


@pytest.mark.parametrize("kind", TASKS)
def test_an_exported_file_scores_as_the_network_does(kind: str) -> None:
    net, task = CACHED(kind)
    session = Session(trace(net, task.example).proto)
    inputs = task.probe("val").inputs
    dense, exported = predict(net, inputs), predict(session, inputs)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(leaves(dense), leaves(exported), strict=True))
    assert not isinstance(dense, Tensor) or isinstance(exported, Tensor)
    assert task.score(session).value == pytest.approx(task.score(net).value, abs=1e-4)


@pytest.mark.parametrize("kind", TASKS)
def test_examples_calibration_and_splits(kind: str) -> None:
    _, task = CACHED(kind)
    assert {"train", "val"} <= set(task.splits) and all(task.has(split) for split in task.splits)
    assert not task.has("other")
    for name in ("probe", "size"):
        with pytest.raises(KeyError, match="split must be one of"):
            getattr(task, name)("other")
    with pytest.raises(KeyError, match="split must be one of"):
        task.score(lambda *given, **named: 1 / 0, "other")
    assert length(task.example) == 1
    few = task.calibration(5)
    assert length(few) == 5 and same(take(few, slice(0, 1)), task.example)
    assert length(task.calibration(10**6)) == length(task.probe("train").inputs)
    assert task.examples >= length(few) and task.name in repr(task)


@pytest.mark.parametrize("kind", TASKS)
def test_a_fingerprint_follows_data_and_settings(kind: str) -> None:
    first, again = made(kind)[1], made(kind)[1]
    others = [made(kind, seed=1)[1], made(kind, **SETTINGS.get(kind, {"batch_size": 3}))[1]]
    assert first.fingerprint == again.fingerprint
    assert len({task.fingerprint for task in (first, *others)}) == 3
