"""Metrics and losses against scikit-learn and torchmetrics, over the shapes that outputs and labels come in."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from sklearn import metrics as sk
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional import classification as tm

from lilliput.task import Task

N, C, T, H, W = 60, 4, 5, 3, 6
DRAW = torch.Generator().manual_seed(0)


def task(outputs: Tensor, targets: Tensor, **settings: Any) -> Task:
    """A task whose model is the identity: its inputs are the outputs."""
    return Task("grid", train=(outputs, targets), val=(outputs, targets), **settings)


def value(outputs: Tensor, targets: Tensor, **settings: Any) -> float:
    return float(task(outputs, targets, **settings).score(lambda x: x).value)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAW)


def labels(*shape: int, classes: int = C) -> Tensor:
    return torch.randint(classes, shape, generator=DRAW)


def padded(targets: Tensor) -> Tensor:
    """Some labels, and one whole example, without a label."""
    targets = targets.clone()
    targets[torch.rand(targets.shape, generator=DRAW) < 0.3] = -100
    targets[1] = -100
    return targets


# outputs, labels as they are given, labels (n, ...) as integers, outputs with the classes on the last axis
CLASSES: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}


def classes(name: str, outputs: Tensor, given: Tensor, axis: int, known: Tensor | None = None) -> None:
    CLASSES[name] = outputs, given, given if known is None else known, outputs.movedim(axis, -1)


classes("(N, C)", drawn(N, C), labels(N), 1)
classes("(N, C), N == C", drawn(C, C), torch.arange(C), 1)
classes("(N, C) and (N, 1)", drawn(N, C), (y := labels(N))[:, None], 1, y)
classes("(N, C) and int32", drawn(N, C), (y := labels(N)).int(), 1, y)
classes("(N, C) and one-hot integers", drawn(N, C), F.one_hot(y := labels(N), C), 1, y)
classes("(N, C) and one-hot floats", drawn(N, C), F.one_hot(y := labels(N), C).float(), 1, y)
classes("(N, 2) and yes or no", drawn(N, 2), (y := labels(N, classes=2)).bool(), 1, y)
classes("(N, C), padded", drawn(N, C), padded(labels(N)), 1)
classes("(N, T, C)", drawn(N, T, C), labels(N, T), 2)
classes("(N, T, C), padded", drawn(N, T, C), padded(labels(N, T)), 2)
classes("(N, C, T)", drawn(N, C, T), labels(N, T), 1)
classes("(N, C, T), padded", drawn(N, C, T), padded(labels(N, T)), 1)
classes("(N, 1, C)", drawn(N, 1, C), labels(N, 1), 2)
classes("(N, C, H, W)", drawn(N, C, H, W), labels(N, H, W), 1)
classes("(N, C, H, W), padded", drawn(N, C, H, W), padded(labels(N, H, W)), 1)
classes("(N, C, H, W) and (N, 1, H, W)", drawn(N, C, H, W), (y := labels(N, H, W))[:, None], 1, y)
classes("(N, H, W, C)", drawn(N, H, W, C), labels(N, H, W), 3)
classes("(N, C, H, W), C == H", drawn(N, H, H, W), labels(N, H, W, classes=H), 1)

GRID = pytest.mark.parametrize("name", CLASSES)


def flat(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, predictions and log probabilities of all places that have a label."""
    _, _, known, last = CLASSES[name]
    kept = known != -100
    return known[kept].numpy(), last.argmax(-1)[kept].numpy(), last[kept].log_softmax(-1).numpy()


def measured(name: str, metric: Any, **settings: Any) -> float:
    outputs, given, *_ = CLASSES[name]
    axis = 1 if "C == H" in name else None  # nothing but a person knows which it is
    return value(outputs, given, metric=metric, class_axis=axis, **settings)


@GRID
def test_accuracy_is_the_mean_over_examples_of_what_scikit_learn_gives(name: str) -> None:
    _, _, known, last = CLASSES[name]
    each = [
        sk.accuracy_score(y[y != -100].reshape(-1), p[y != -100].reshape(-1))
        for y, p in zip(known, last.argmax(-1), strict=True)
        if bool((y != -100).any())
    ]
    assert measured(name, "accuracy") == pytest.approx(np.mean(each), abs=1e-6)


@GRID
def test_f1_and_iou_are_those_of_scikit_learn(name: str) -> None:
    known, predicted, _ = flat(name)
    assert measured(name, "f1") == pytest.approx(sk.f1_score(known, predicted, average="macro"), abs=1e-6)
    assert measured(name, "iou") == pytest.approx(sk.jaccard_score(known, predicted, average="macro"), abs=1e-6)


@GRID
def test_cross_entropy_and_perplexity_are_those_of_scikit_learn(name: str) -> None:
    known, _, logs = flat(name)
    expected = -logs[np.arange(len(known)), known].mean()
    outputs, given, *_ = CLASSES[name]
    made = task(outputs, given, class_axis=1 if "C == H" in name else None)
    assert float(made.loss(outputs, made.probe("train"))) == pytest.approx(expected, abs=1e-5)
    assert measured(name, "perplexity") == pytest.approx(np.exp(expected), rel=1e-4)


@GRID
def test_top_5_is_that_of_torchmetrics(name: str) -> None:
    _, _, known, last = CLASSES[name]
    outputs = torch.cat([last, drawn(*last.shape[:-1], 5)], -1)  # more than five classes
    kept = [y != -100 for y in known]
    count = outputs.shape[-1]
    each = [
        float(tm.multiclass_accuracy(o[k], y[k], num_classes=count, top_k=5, average="micro"))
        for o, y, k in zip(outputs, known, kept, strict=True)
        if bool(k.any())
    ]
    assert value(outputs, known, metric="top 5", class_axis=-1) == pytest.approx(np.mean(each), abs=1e-6)


@GRID
@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (sk.balanced_accuracy_score, lambda y, p, z: sk.balanced_accuracy_score(y, p)),
        (sk.matthews_corrcoef, lambda y, p, z: sk.matthews_corrcoef(y, p)),
        (
            functools.partial(sk.precision_score, average="macro", zero_division=0),
            lambda y, p, z: sk.precision_score(y, p, average="macro", zero_division=0),
        ),
        (sk.make_scorer(sk.f1_score, average="micro"), lambda y, p, z: sk.f1_score(y, p, average="micro")),
    ],
    ids=["balanced accuracy", "correlation", "precision", "scorer"],
)
def test_metrics_of_scikit_learn_are_given_as_they_are(name: str, metric: Any, expected: Callable[..., float]) -> None:
    assert measured(name, metric) == pytest.approx(expected(*flat(name)), abs=1e-6)


@GRID
def test_metrics_of_torchmetrics_are_given_as_they_are(name: str) -> None:
    known, predicted, _ = flat(name)
    count = CLASSES[name][3].shape[-1]
    metric = torchmetrics.classification.MulticlassF1Score(num_classes=count, average="micro")
    expected = sk.f1_score(known, predicted, average="micro")
    assert measured(name, metric) == pytest.approx(expected, abs=1e-6)
    assert measured(name, metric) == pytest.approx(expected, abs=1e-6)  # nothing is kept from the first call
    function = functools.partial(tm.multiclass_jaccard_index, num_classes=count, average="micro")
    assert measured(name, function) == pytest.approx(sk.jaccard_score(known, predicted, average="micro"), abs=1e-6)


def test_probabilities_and_scores_of_scikit_learn() -> None:
    outputs, targets = drawn(N, C), labels(N)
    chances = outputs.double().softmax(1).numpy()
    assert value(outputs, targets, metric=sk.log_loss) == pytest.approx(sk.log_loss(targets, chances), rel=1e-5)
    area = functools.partial(sk.roc_auc_score, multi_class="ovr")
    assert value(outputs, targets, metric=area) == pytest.approx(sk.roc_auc_score(targets, chances, multi_class="ovr"))
    two, yes = drawn(N, 2), labels(N, classes=2)
    area = sk.roc_auc_score(yes, (two[:, 1] - two[:, 0]).numpy())
    assert value(two, yes, metric=sk.roc_auc_score) == pytest.approx(area, abs=1e-6)
    assert value(two, yes, metric="auc") == pytest.approx(area, abs=1e-6)


BITS = {"(N,)": (N,), "(N, 1)": (N, 1)}


@pytest.mark.parametrize("outer", BITS)
@pytest.mark.parametrize("inner", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_yes_no_logits_of_any_shape(outer: str, inner: str, dtype: torch.dtype) -> None:
    outputs, targets = drawn(N), labels(N, classes=2)
    y, p, chance = targets.numpy(), (outputs > 0).numpy(), torch.sigmoid(outputs).numpy()
    outputs, targets = outputs.reshape(BITS[outer]), targets.reshape(BITS[inner]).to(dtype)
    expected = {
        "accuracy": sk.accuracy_score(y, p),
        "f1": sk.f1_score(y, p, average="macro"),
        "auc": sk.roc_auc_score(y, chance),
        "iou": sk.jaccard_score(y, p, average="macro"),
        sk.average_precision_score: sk.average_precision_score(y, chance),
        sk.recall_score: sk.recall_score(y, p),
        torchmetrics.classification.BinaryAUROC(): sk.roc_auc_score(y, chance),
    }
    for metric, wanted in expected.items():
        assert value(outputs, targets, loss="bce", metric=metric) == pytest.approx(wanted, abs=1e-6), metric
    made = task(outputs, targets, loss="bce")
    assert float(made.loss(outputs, made.probe("train"))) == pytest.approx(sk.log_loss(y, chance), rel=1e-5)


def test_several_yes_no_labels_an_example() -> None:
    outputs, targets = drawn(N, 3), labels(N, 3, classes=2)
    y, p, chance = targets.numpy(), (outputs > 0).numpy().astype(int), torch.sigmoid(outputs).numpy()
    for given in (targets, targets.float()):
        assert value(outputs, given, loss="bce", metric="accuracy") == pytest.approx(
            1 - sk.hamming_loss(y, p), abs=1e-6
        )
        jaccard = sk.jaccard_score(y, p, average="macro")
        assert value(outputs, given, loss="bce", metric="iou") == pytest.approx(jaccard)
        assert value(outputs, given, loss="bce", metric="f1") == pytest.approx(sk.f1_score(y, p, average="macro"))
        made = task(outputs, given, loss="bce")
        expected = -(y * np.log(chance) + (1 - y) * np.log(1 - chance)).mean()
        assert float(made.loss(outputs, made.probe("train"))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("outer", [(N,), (N, 1), (N, 3), (N, 3, 2)])
def test_numbers_of_any_shape(outer: tuple[int, ...]) -> None:
    outputs, targets = drawn(*outer), drawn(*outer)
    rows, known = outputs.reshape(N, -1).numpy(), targets.reshape(N, -1).numpy()
    expected = {
        "mse": sk.mean_squared_error(known, rows),
        "mae": sk.mean_absolute_error(known, rows),
        "rmse": sk.mean_squared_error(known, rows) ** 0.5,
        "r2": sk.r2_score(known, rows),
        torchmetrics.MeanAbsoluteError(): sk.mean_absolute_error(known, rows),
    }
    if len(outer) < 3:
        expected |= {sk.r2_score: sk.r2_score(known, rows), sk.max_error: None}
    for metric, wanted in expected.items():
        if wanted is not None:
            for given in {targets.shape, targets.squeeze().shape}:
                found = value(outputs, targets.reshape(given), loss="mse", metric=metric)
                assert found == pytest.approx(wanted, rel=1e-5), metric
    for loss, wanted in (("mse", expected["mse"]), ("l1", expected["mae"])):
        made = task(outputs, targets, loss=loss, metric="mse")
        assert float(made.loss(outputs, made.probe("train"))) == pytest.approx(wanted, rel=1e-5)


def test_which_way_a_metric_of_another_library_runs() -> None:
    outputs, targets = drawn(N), drawn(N)
    for metric, higher in (
        (sk.mean_squared_error, False),
        (sk.r2_score, True),
        (sk.make_scorer(sk.mean_absolute_error, greater_is_better=False), False),
        (functools.partial(sk.mean_pinball_loss, alpha=0.1), False),
        (torchmetrics.MeanSquaredError(), False),
        (torchmetrics.PearsonCorrCoef(), True),
        (torchmetrics.functional.mean_absolute_error, False),
    ):
        made = task(outputs, targets, loss="mse", metric=metric)
        assert made.higher_is_better is higher and "partial" not in made.metric_name
        assert np.isfinite(made.score(lambda x: x).value)


WRONG = [
    ("mse", "mse", (N, 3), (3, N)),
    ("mse", "mse", (N, 3), (N,)),
    ("bce", "accuracy", (6, 2), (6, 4)),
    ("bce", "auc", (N, 3), (N,)),
    ("cosine", "cosine", (N, 3), (N, 2, 3)),
    ("cross_entropy", "accuracy", (N, C, T), (N, T + 1)),
]


@pytest.mark.parametrize(("loss", "metric", "outer", "inner"), WRONG)
def test_shapes_that_do_not_fit_are_refused_with_both(loss: str, metric: str, outer: Any, inner: Any) -> None:
    outputs, targets = drawn(*outer), labels(*inner, classes=2)
    if outer[0] != inner[0]:
        with pytest.raises(ValueError, match="one length"):
            task(outputs, targets, loss=loss, metric=metric)
        return
    given = targets if loss == "cross_entropy" else targets.float()
    made = task(outputs, given, loss=loss, metric=metric)
    for call in (lambda: made.score(lambda x: x), lambda: made.loss(outputs, made.probe("train"))):
        with pytest.raises(ValueError, match=r"\(.*\)"):
            call()
