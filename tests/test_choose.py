"""The choice: cheap, within the floor, and corrected for having been chosen."""

import numpy as np
import pytest
import torch

from lilliput.search.ask import floor, seconds, size_bytes
from lilliput.search.choose import choose, front
from lilliput.task import Score, Task

N = 400


def task() -> Task:
    x = torch.zeros(N, 1)
    return Task("toy", (x, torch.zeros(N).long()), (x, torch.zeros(N).long()))


def score(right: np.ndarray) -> Score:
    outcomes = right.astype(float)
    return Score(float(outcomes.mean()), outcomes, torch.zeros(N, 2))


def some(rate: float, seed: int) -> Score:
    return score(np.random.default_rng(seed).random(N) < rate)


def test_the_cheapest_eligible_point_wins() -> None:
    dense = score(np.ones(N, bool))
    points = [some(0.995, 1), some(0.99, 2), some(0.5, 3)]
    choice = choose(task(), dense, points, [100, 50, 1], floor=0.05)
    assert choice.winner == 1 and not choice.eligible[2]


def test_nothing_is_chosen_where_nothing_meets_the_floor() -> None:
    dense = score(np.ones(N, bool))
    assert choose(task(), dense, [some(0.8, 1)], [1], floor=0.01).winner is None
    assert choose(task(), dense, [], [], floor=0.01).winner is None


def test_choosing_among_many_equal_points_is_corrected() -> None:
    """Thirty points that all lose 2% in truth: the luckiest seems to lose less, and the correction takes that back."""
    truth, n, corrected, naive = 0.02, 30, [], []
    for trial in range(12):
        dense = some(0.95, 1000 + trial)
        points = [some(0.95 - truth, 100 * trial + i) for i in range(n)]
        choice = choose(task(), dense, points, [float(i) for i in range(n)], floor=0.01, draws=200, seed=trial)
        best = int(np.argmin(choice.drops))
        naive.append(choice.drops[best])
        corrected.append(choice.corrected[best])
    assert np.mean(naive) < truth / 2
    assert np.mean(naive) < np.mean(corrected)
    assert choice.optimism > 0


def test_without_a_floor_the_least_distance_that_fits_wins() -> None:
    dense = score(np.ones(N, bool))
    points = [some(0.9, 1), some(0.99, 2), some(0.95, 3)]
    choice = choose(task(), dense, points, [3, 9, 2], floor=None, fits=[True, False, True], divergence=[0.3, 0.0, 0.1])
    assert choice.winner == 2


def test_a_metric_that_is_no_mean_is_bootstrapped_over_examples() -> None:
    generator = torch.Generator().manual_seed(0)
    y = (torch.rand(200, generator=generator) < 0.5).long()
    x = torch.zeros(200, 1)
    f1 = Task("f1", (x, y), (x, y), metric="f1")
    right = torch.nn.functional.one_hot(y, 2).float()
    wrong = right.clone()
    wrong[:20] = 1 - wrong[:20]
    dense, other = f1.rate(right, "val"), f1.rate(wrong, "val")
    assert dense.outcomes is None and dense.value == 1
    choice = choose(f1, dense, [other], [1.0], floor=0.2, draws=50)
    assert choice.winner == 0 and choice.interval[0, 0] < choice.drops[0] < choice.interval[0, 1]


def test_lower_is_better_metrics_lose_upwards() -> None:
    x = torch.arange(10.0)[:, None]
    mse = Task("mse", (x, x), (x, x), loss="mse", metric="mse")
    dense, worse = mse.rate(x, "val"), mse.rate(x + 1, "val")
    assert mse.loss_of(dense.value, worse.value) == 1
    assert choose(mse, dense, [worse], [1.0], floor=0.5).winner is None


def test_the_front_keeps_what_nothing_beats() -> None:
    assert front([(1, 3), (2, 2), (3, 1), (3, 3), (2, 2)]) == [0, 1, 2]


@pytest.mark.parametrize("text", ["150%", "-1%", "1.0", "abc", "", "nan", "1..2"])
def test_floors_out_of_range_say_what_to_write(text: str) -> None:
    with pytest.raises(ValueError, match="For one point of accuracy write 1%"):
        floor(text)


def test_units_read_what_people_write() -> None:
    assert floor("0.5%").points(0.9) == 0.005 and floor("0.5r").points(0.8) == pytest.approx(0.004)
    assert seconds("1.5h") == 5400 and size_bytes("64KiB") == 65536
    with pytest.raises(ValueError, match="budget must be a time"):
        seconds("soon")
    with pytest.raises(ValueError, match="max-bytes must be a size"):
        size_bytes("huge")
