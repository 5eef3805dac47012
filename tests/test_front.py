"""The search proposes only what lies on the front of the records."""

import json
from pathlib import Path

from lilliput import evidence
from lilliput.prune._masking import Masking
from lilliput.prune.prune import Prune
from lilliput.search.levels import SPARSE

RESULTS = Path(__file__).parents[1] / "results"


def test_the_search_makes_zeros_by_methods_on_the_measured_front() -> None:
    script = evidence.load("fine-tuning")
    record, overhead = (
        json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in ("fine-tuning.json", "bench/overhead.json")
    )
    points = script.standing(record, overhead)
    best = evidence.front(points)
    assert len(points) == len(script.METHODS) - 1
    assert set(SPARSE) <= set(best), f"on the front are {best}"
    assert list(SPARSE) == sorted(SPARSE, key=lambda name: -points[name][0]), "the most accurate comes first"


def test_what_the_search_uses_is_what_was_measured() -> None:
    methods = evidence.load("jaxpruner").METHODS
    for name, make in SPARSE.items():
        (measured,) = methods[name](0.9, 20, 0)[1]
        used = make(0.9)
        assert type(used) is type(measured)
        for field in ("allocation", "pattern", "score"):
            assert getattr(used, field, None) == getattr(measured, field, None), f"{name}: {field}"
        assert isinstance(used, Prune | Masking)


def test_the_front_keeps_equal_points_and_drops_what_is_beaten() -> None:
    assert evidence.front({"a": (0.9, 1.0), "b": (0.9, 1.0), "c": (0.9, 1.1), "d": (0.8, 0.9)}) == ["a", "b", "d"]
