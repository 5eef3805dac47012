"""What a search expects of its next training: laws that are learned, and a choice that follows from them."""

import heapq
import itertools
import math
import random

import pytest

from lilliput import Distill, Recipe, Train
from lilliput.search.arms import Action, Arm, Prospect
from lilliput.search.levels import STORED, Level
from lilliput.search.outlook import Law, Option, Outlook, better, cheaper, choose

PLAN = Recipe((Train(1, rules=(Distill(),)),))


def test_a_law_comes_to_what_is_seen_and_an_outlier_counts_for_little() -> None:
    law = Law(0.5, 0.35)
    for _ in range(50):
        law.learn(0.1)
    assert law.mean == pytest.approx(0.1, abs=0.03) and law.spread < 0.2
    other = Law(0.5, 0.35)
    other.learn(100.0)
    assert other.mean <= 0.5 + 3 * 0.35


def test_a_smaller_promised_network_is_worth_more_the_sooner_and_the_surer_it_is() -> None:
    worth = cheaper(0.1)
    sure, unsure = Option("a", 10, 0.05, 0.3, 0.3), Option("b", 10, 0.05, 3.0, 0.3)
    assert sure.promised() > 0.99 and unsure.promised() < 0.01 and worth(sure) > worth(unsure)
    soon, late = Option("a", 5, 0.05, 0.5, 0.3), Option("b", 50, 0.05, 0.5, 0.3)
    assert choose([late, soon], worth, 100) is soon
    assert choose([late], worth, 20) is None  # it does not fit
    assert choose([Option("c", 1, 0.2, 0.1, 0.3)], worth, 100) is None  # it is no smaller than what there is


def test_what_the_choice_will_add_makes_an_option_less_sure() -> None:
    option = Option("a", 10, 0.05, 0.8, 0.3)
    assert option.promised(0.3) < 0.5 < option.promised()
    assert cheaper(0.1, luck=0.3)(option) < cheaper(0.1)(option)


def test_what_may_be_taken_back_makes_a_safer_and_dearer_copy_worth_something() -> None:
    safer, dearer = Option("a", 1, 0.02, 0.5, 0.15), Option("b", 1, 0.3, 0.5, 0.15)
    close, far = cheaper(0.2, [(0.01, 0.95)]), cheaper(0.2, [(0.01, 0.3)])
    assert close(safer) > 0.2 > 0.01 > far(safer) and close(dearer) == 0
    assert close(Option("c", 1, 0.005, 0.5, 0.15)) > far(Option("c", 1, 0.005, 0.5, 0.15)) > 0.5
    both = cheaper(0.2, [(0.01, 0.95), (0.02, 0.5)])
    assert both(safer) < 0.01 and cheaper(0.1)(safer) == pytest.approx(math.log(5), rel=1e-3)


def test_a_training_of_half_the_length_is_offered_where_the_whole_does_not_fit() -> None:
    prospect, arm = Prospect(STORED["lil"]), Arm("a", PLAN, {}, 0.02, 0.0, 20.0, 0.05, 0.16)
    found = choose(prospect.options([arm]), cheaper(0.25), 15.0)
    assert found is not None and found.what.kind == "begin" and found.what.amount == 10.0
    arm.bound, arm.spent = 1.6, 20.0
    arm.tried = set(STORED["lil"])
    found = choose(prospect.options([arm]), cheaper(0.25), 15.0)
    assert found is not None and found.what.kind == "longer" and found.what.amount == 10.0


def test_where_a_price_must_hold_the_best_that_fits_is_worth_most() -> None:
    worth = better(2.0, most=0.1)
    assert worth(Option("fits", 1, 0.09, 1.0, 0.3)) > 0 == worth(Option("too large", 1, 0.2, 0.1, 0.3))


def test_the_regression_of_first_bounds_follows_what_was_begun() -> None:
    outlook = Outlook()
    for price in (0.1, 0.05, 0.02, 0.01):
        outlook.begin(price, 0.2 / price)
    assert outlook.fresh(0.03)[0] == pytest.approx(0.2 / 0.03, rel=0.35)
    assert outlook.fresh(0.005)[0] > outlook.fresh(0.05)[0]


def test_two_structures_are_enough_to_see_a_cliff() -> None:
    outlook = Outlook()
    outlook.begin(0.005, 1.1)
    outlook.begin(0.003, 5.0)
    assert outlook.fresh(0.001)[0] > 10 and outlook.fresh(0.005)[0] < 2.5


def test_what_is_trained_longer_is_expected_to_lose_less_and_each_doubling_brings_less() -> None:
    outlook = Outlook()
    bounds = [outlook.trained(4.0, k)[0] for k in range(5)]
    ratios = [a / b for a, b in itertools.pairwise(bounds)]
    assert bounds == sorted(bounds, reverse=True) and ratios == sorted(ratios, reverse=True)


def test_a_coded_copy_is_not_made_twice_of_the_same_weights() -> None:
    prospect = Prospect(STORED["lil"])
    arm = Arm("a", PLAN, {}, 0.05, 0.0, 1.0)
    arm.bound, arm.spent = 0.8, 4.0
    levels = {option.what.level for option in prospect.options([arm]) if option.what.kind == "code"}
    assert levels == set(STORED["lil"])
    arm.tried = set(STORED["lil"][:2])
    left = {option.what.level for option in prospect.options([arm]) if option.what.kind == "code"}
    assert left == set(STORED["lil"][2:])
    arm.busy = True
    assert not prospect.options([arm])


class World:
    """Networks whose bound falls with training and rises as they get smaller, seen through noise."""

    def __init__(self, seed: int, speed: float = 50.0) -> None:
        self.noise, self.speed = random.Random(seed), speed

    def bound(self, weights: float, steps: float, level: Level | None) -> float:
        lost = 0.25 + 0.0035 / weights + 12 * (0.02 / weights) ** 0.3 * (max(steps, 1) / 100) ** -0.9
        if level is not None:
            lost *= {8: 1.0, 4: 1.05, 3: 1.3, 2.5: 1.9, 2: 3.0}[level.bits]
        return lost * math.exp(self.noise.gauss(0, 0.15))

    def steps(self, weights: float, seconds: float) -> float:
        return self.speed * seconds / (0.4 + 20 * weights)


def searched(seconds: float, seed: int, speed: float = 50.0, workers: int = 2) -> float:
    """The price that the scheduler reaches in a simulated world, in prices of the dense network."""
    world, prospect = World(seed, speed), Prospect(STORED["lil"])
    sizes = [0.2 * 0.6**k for k in range(12)]
    first = max(1.0, seconds / 8)
    arms = [Arm(str(w), PLAN, {str(w): 1}, w, 0.0, first, 1 / world.steps(w, 1.0), 8 * w) for w in sizes]
    steps: dict[Arm, float] = {}
    reached, now, running, count = 0.25, 0.0, list[tuple[float, int, Action]](), 0
    while True:
        while len(running) < workers:
            option = choose(prospect.options(arms), cheaper(reached), seconds - now)
            if option is None:
                break
            option.what.arm.busy, count = True, count + 1
            heapq.heappush(running, (now + option.what.amount + 0.5, count, option.what))
        if not running:
            return reached
        now, _, action = heapq.heappop(running)
        arm, before = action.arm, action.arm.bound
        arm.busy, done = False, world.steps(arm.weights, action.amount)
        if action.level is not None:
            arm.tried.add(action.level)
            weights = arm.weights * action.level.factor
            coded = Arm(f"{arm.name} coded", PLAN, arm.axes, weights, 0.0, 0.0, arm.pace, arm.share, action.level)
            coded.closed = "" if action.level.trained else "untrained"
            steps[coded], arms = steps[arm], [*arms, coded]
            source, arm = arm, coded
        else:
            source, arm.tried = arm, set()
        steps[arm] = steps.get(arm, 0.0) + done
        after = world.bound(source.weights if action.level else arm.weights, steps[arm], arm.level)
        prospect.learn(action, before, after)
        arm.bound, arm.spent = after, arm.spent + action.amount
        if arm.level is not None and after <= 1:
            reached = min(reached, arm.price)


def test_more_time_finds_smaller_networks_and_a_slow_machine_finds_some() -> None:
    reached = {seconds: sorted(searched(seconds, seed) for seed in range(5))[2] for seconds in (80, 160, 640)}
    assert reached[640] < reached[160] <= reached[80] < 0.25
    slow = sorted(searched(640, seed, speed=12.5) for seed in range(5))[2]
    assert slow < 1.5 * reached[160]  # a quarter of the speed is as good as a quarter of the time: no cliff
