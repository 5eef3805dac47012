"""The choice: cheap, within the floor, and corrected for having been chosen."""

import numpy as np
import pytest
import torch
from scipy.special import ndtri

from lilliput.search.ask import floor, seconds, size_bytes
from lilliput.search.ask import sure as probability
from lilliput.search.choose import choose, examples_to_promise, front, interval
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
    assert probability("95%") == probability(0.95) == probability("95") == 0.95
    for text in ("40%", "100%", "1", "sure", "-90%"):
        with pytest.raises(ValueError, match="write 90%"):
            probability(text)
    assert seconds("1.5h") == 5400 and size_bytes("64KiB") == 65536
    with pytest.raises(ValueError, match="budget must be a time"):
        seconds("soon")
    with pytest.raises(ValueError, match="max-bytes must be a size"):
        size_bytes("huge")


def paired(losses: int, gains: int, n: int = N, first: int = 0) -> tuple[Score, Score]:
    """A dense network and a point that differ on so many examples."""
    dense, point = np.ones(n), np.ones(n)
    dense[-gains or n :], point[first : first + losses] = 0, 0
    return tuple(Score(float(x.mean()), x, None) for x in (dense, point))  # type: ignore[return-value]


@pytest.mark.parametrize(("losses", "gains"), [(0, 0), (1, 0), (5, 3), (12, 40)])
@pytest.mark.parametrize("sure", [0.5, 0.9, 0.99])
def test_a_point_alone_has_the_quantile_of_two_gammas(losses: int, gains: int, sure: float) -> None:
    dense, point = paired(losses, gains, 1000)
    choice = choose(task(), dense, [point], [1.0], floor=0.01, sure=sure)
    draw = np.random.default_rng(0)
    drawn = draw.standard_gamma(losses + 0.5, 400_000) - draw.standard_gamma(gains + 0.5, 400_000)
    assert choice.bound[0] == pytest.approx(np.quantile(drawn, sure) / 1000, abs=2e-4 if gains == 40 else 6e-5)
    assert choice.corrected[0] == choice.drops[0], "nothing was chosen"


def test_identical_outcomes_cost_the_exact_bound_and_nothing_else() -> None:
    dense, same = paired(0, 0, 1000)
    draw = np.random.default_rng(1)
    lucky = [Score(float(x.mean()), x, None) for x in (draw.random((30, 1000)) < 0.985).astype(float)]
    for sure, most in ((0.5, 1e-6), (0.9, 1.04e-3), (0.99, 3e-3)):
        choice = choose(task(), dense, [same, *lucky], [50.0, *range(60, 90)], floor=0.005, sure=sure)
        assert choice.winner == 0 and -1e-6 <= choice.bound[0] <= most
    few = choose(task(), *(s if i == 0 else [s] for i, s in enumerate(paired(0, 0, 20))), [1.0], floor=0.01)
    assert few.winner is None and 0.04 < few.bound[0] < 0.06, "twenty examples cannot show a point of one percent"


def test_the_dense_network_loses_nothing_and_can_always_be_promised() -> None:
    dense, bad = paired(10, 0, 20)
    choice = choose(task(), dense, [dense, bad], [100.0, 1.0], floor=0.0)
    assert choice.winner == 0 and choice.bound[0] == 0 and choice.interval[0].tolist() == [0, 0]
    assert choice.near == (1,) and choice.safest == 0


def test_the_nearest_misses_say_what_more_may_be_lost_buys() -> None:
    dense = score(np.ones(N, bool))
    rates = [1.0, 0.995, 0.97, 0.98, 0.9]
    points = [score(np.arange(N) < rate * N) for rate in rates]
    choice = choose(task(), dense, points, [90, 80, 30, 70, 10], floor=0.004)
    assert choice.winner == 0 and choice.near == (1, 3, 2, 4)
    for near, place in enumerate(choice.near):
        again = choose(task(), dense, points, [90, 80, 30, 70, 10], floor=float(choice.bound[place]) + 1e-9)
        assert again.winner == place and again.near == choice.near[near + 1 :]
    assert examples_to_promise(choice, 4, 0.004, N) is None, "it is expected to lose more"
    needed = examples_to_promise(again, 0, 0.001, N)
    assert needed is not None and N < needed < 10 * N


def test_a_dear_point_is_never_chosen_where_a_cheap_one_can_be_promised() -> None:
    draw = np.random.default_rng(2)
    dense = some(0.97, 0)
    assert dense.outcomes is not None
    for trial in range(20):
        flips = draw.random((12, N)) < draw.random(12)[:, None] * 0.05
        points = [score(np.where(flip, 1 - dense.outcomes, dense.outcomes) > 0) for flip in flips]
        price = draw.permutation(12).astype(float)
        choice = choose(task(), dense, points, price, floor=0.02, sure=0.8, seed=trial)
        if choice.winner is not None:
            assert price[choice.winner] == price[choice.eligible].min()


class Odd:
    """A metric that has no value on some draws, in each of the ways in which that happens."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> float:
        positive = outputs[targets == 1, 0]
        if len(positive) < 2:
            if self.how == "raises":
                raise KeyError("no positive example")
            return float("nan") if self.how == "nan" else float(positive.mean() / 0)
        return float((positive > 0).float().mean())


@pytest.mark.parametrize("how", ["raises", "nan", "divides"])
@pytest.mark.parametrize("positives", [2, 3, 60])
def test_a_metric_without_a_value_on_a_draw_never_ends_a_choice(how: str, positives: int) -> None:
    x = torch.zeros(60, 1)
    y = (torch.arange(60) < positives).long()
    odd = Task("odd", (x, y), (x, y), loss="bce", metric=Odd(how))
    outputs = torch.ones(60, 1)
    dense = odd.rate(outputs, "val")
    rivals = [odd.rate(outputs * sign, "val") for sign in (1.0, -1.0)]
    choice = choose(odd, dense, [dense, *rivals], [9.0, 2.0, 1.0], floor=0.1)
    assert choice.winner in (0, 1) and not choice.eligible[2]
    assert np.isfinite(choice.drops).all() and not np.isnan(choice.bound).any()
    found = interval(odd, dense, rivals[0])
    assert found is None or found[0] < 0 < found[1]


def test_a_metric_with_no_value_on_any_draw_promises_nothing_but_the_dense_network() -> None:
    def no(index):
        raise ZeroDivisionError

    dense, other = (Score(0.9, None, None, no, 50) for _ in range(2))
    choice = choose(task(), dense, [dense, other], [2.0, 1.0], floor=0.5)
    assert choice.winner == 0 and choice.bound[1] == np.inf and choice.near == ()
    assert interval(task(), dense, other) is None


def test_intervals_of_one_point_are_never_without_width_where_nothing_differs() -> None:
    dense, same = paired(0, 0, 20)
    found = interval(task(), dense, same)
    assert found is not None and found[0] == pytest.approx(-found[1], abs=1e-4) and 0.05 < found[1] < 0.2
    dense, other = paired(3, 1, 20)
    found = interval(task(), dense, other)
    assert found is not None and found[0] < 0.1 < found[1]


def test_errors_of_any_size_are_judged_by_their_spread() -> None:
    x = torch.zeros(N, 1)
    mse = Task("mse", (x, x), (x, x), loss="mse", metric="mse")
    draw = np.random.default_rng(0)
    errors = draw.gamma(1.0, 1e-3, N)
    for shift, spread in ((2e-4, 1e-3), (2e-4, 0.0), (-1e-4, 1e-4)):
        worse = errors + shift + spread * draw.standard_normal(N)
        pair = [Score(float(e.mean()), e, None) for e in (errors, worse)]
        choice = choose(mse, pair[0], pair[1:], [1.0], floor=1e-3)
        normal = (worse - errors).mean() + 1.2816 * (worse - errors).std() / N**0.5
        assert choice.bound[0] == pytest.approx(normal, abs=0.06 * max(spread, shift) + 1e-9)
        scaled = [Score(float(e.mean()) * 1e6, e * 1e6, None) for e in (errors, worse)]
        again = choose(mse, scaled[0], scaled[1:], [1.0], floor=1e3)
        assert again.bound[0] == pytest.approx(1e6 * choice.bound[0], rel=1e-6), "in any unit"


def crowd(draw: np.random.Generator, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(true drops, prices, differences of 600 examples) of 16 points that err together, with a floor of one point."""
    n, points, wrong = 600, 16, 0.1
    price = draw.permutation(points).astype(float)
    noise = 0.006 * draw.standard_normal(points)
    true = {"around": 0.01 + noise, "cheap is worse": 0.03 - 0.0025 * price + noise, "all worse": noise * 0 + 0.014}
    drop = np.clip(true[kind], -0.03, 0.2)
    differ = np.abs(drop) + 0.03
    shared, own = draw.standard_normal((n, 1)), draw.standard_normal((n, points))
    fragile, dense = np.sqrt(0.5) * shared + np.sqrt(0.5) * own, draw.random(n) >= wrong
    lost = fragile > ndtri(1 - (differ + drop) / 2 / (1 - wrong))
    gained = fragile > ndtri(1 - (differ - drop) / 2 / wrong)
    return drop, price, np.where(dense[:, None], lost, -gained.astype(float))


@pytest.mark.parametrize("kind", ["around", "cheap is worse", "all worse"])
def test_the_chosen_point_keeps_the_floor_as_often_as_was_asked(kind: str) -> None:
    """The share of choices that lose more in truth; the plain choice, which takes what seems to meet it, fails."""
    draw, trials, floor = np.random.default_rng(5), 60, 0.01
    broken, taken, plain = dict.fromkeys((0.5, 0.8, 0.9, 0.95), 0), 0, 0
    for _ in range(trials):
        drop, price, differences = crowd(draw, kind)
        dense = Score(1.0, np.ones(len(differences)), None)
        points = [Score(1 - d.mean(), 1 - d, None) for d in differences.T]
        for sure in broken:
            winner = choose(task(), dense, points, price, floor=floor, sure=sure).winner
            broken[sure] += winner is not None and drop[winner] > floor
            taken += sure == 0.5 and winner is not None
        lucky = np.flatnonzero(differences.mean(0) <= floor)
        plain += len(lucky) > 0 and drop[lucky[np.argmin(price[lucky])]] > floor
    for sure, count in broken.items():
        assert count / trials <= 1 - sure + 0.08, (sure, count, trials)
    assert plain / trials > 0.58 or kind == "around"
    assert taken / trials > 0.9 or kind == "all worse", "half sure is no reason to refuse what is there"


def test_a_metric_that_is_no_mean_is_measured_once_for_all_choices() -> None:
    asked = {"dense": 0, "point": 0}

    def measured(who: str, value: float) -> Score:
        outcomes = np.random.default_rng(len(who)).random(80) < value

        def again(index: np.ndarray) -> float:
            asked[who] += 1
            return float(outcomes[index].mean())

        return Score(float(outcomes.mean()), None, None, again, 80)

    dense, point = measured("dense", 0.9), measured("point", 0.85)
    first, second = (choose(task(), dense, [point], [1.0], floor=floor, draws=50) for floor in (0.1, 0.2))
    assert asked == {"dense": 50, "point": 50} and first.bound == second.bound
    outcomes = [[score.again(np.array([i])) for i in range(80)] for score in (dense, point)]  # type: ignore[misc]
    exact = Score(dense.value, np.array(outcomes[0]), None), Score(point.value, np.array(outcomes[1]), None)
    known = choose(task(), exact[0], [exact[1]], [1.0], floor=0.1)
    assert first.bound[0] == pytest.approx(known.bound[0], abs=0.02), "as where the outcomes are known"
