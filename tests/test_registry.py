"""The registry: what is listed, from where, under which name, and at what price."""

import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lilliput import registry
from lilliput.registry import NOUNS, entries, entry, find, lookup, methods, register

SRC = Path(registry.__file__).parents[1]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A registry that reads anew, and afterwards forgets what the test has registered."""
    monkeypatch.setattr(registry, "live", live := dict(registry.live))
    monkeypatch.setattr(entry, "live", live)
    registry._declared.cache_clear()
    registry._table.cache_clear()
    yield
    registry._declared.cache_clear()
    registry._table.cache_clear()


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, files: dict[str, str], value: str = "") -> None:
    """Write a package with an entry point, as an installed one looks."""
    for path, text in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lilliput.methods]\n{name} = {value or name}\n")
    monkeypatch.syspath_prepend(str(folder))


def kinds(name: str) -> tuple[str, ...]:
    return next(method.kinds for method in methods() if method.name == name)


def test_bases_are_followed_through_files() -> None:
    assert kinds("RigL") == kinds("SET") == kinds("ACDC") == ("Rule",)
    assert kinds("Prune") == ("Stage", "Rule")
    assert [entry.name for entry in methods()].count("Prune") == 1
    assert {"Prune"} <= {e.name for e in entries("stage")} & {e.name for e in entries("rule")}


def test_what_is_listed_is_what_the_classes_are() -> None:
    """The source was read right: every class is imported and asked."""
    import lilliput

    nouns = {name: getattr(lilliput, name) for name in ("Stage", "Rule", "Code")}
    for method in methods():
        kinds = tuple(name for name, noun in nouns.items() if issubclass(method.load(), noun))
        assert kinds == tuple(kind for kind in method.kinds if kind in nouns), method.name


def test_private_and_abstract_classes_are_left_out() -> None:
    names = {entry.name for family in registry.FAMILIES for entry in entries(family)}
    assert not names & {*NOUNS, "Masking"}
    assert not any(name.startswith("_") for name in names)


def test_a_noun_is_one_class() -> None:
    """Bases are recognised by these names, so no other class may bear them (the engine has no methods)."""
    files = [file for file in SRC.rglob("*.py") if SRC / "engine" not in file.parents]
    defined = [line for file in files for line in file.read_text("utf-8").splitlines()]
    for noun in NOUNS:
        assert sum(line.startswith((f"class {noun}(", f"class {noun}:")) for line in defined) <= 1, noun


def test_unknown_names_have_near_misses() -> None:
    with pytest.raises(KeyError, match="Did you mean 'Prune'"):
        lookup("stage", "Prun")
    with pytest.raises(KeyError, match="Did you mean 'schedule'"):
        entries("schedules")
    with pytest.raises(KeyError, match="family must be"):
        register("scores")


def test_an_object_of_a_notebook_registers_at_run_time(fresh: None) -> None:
    @register("score")
    def made_here(weight: object) -> object:
        """A score of this test."""
        return weight

    assert lookup("score", "made_here") is made_here
    assert find("score", "made_here").summary == "A score of this test."
    again = register("score", name="made_here")
    assert again(made_here) is made_here

    def other(weight: object) -> object:
        return weight

    with pytest.raises(ValueError, match=r"'made_here' is in .*test_registry.py and in .*test_registry.py. Rename"):
        again(other)


def test_a_package_joins_by_its_entry_point(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "tall_package", {
        "tall_package/__init__.py": "raise ImportError('nothing is imported to list it')",
        "tall_package/base.py": """
            import lilliput
            from lilliput.registry import register as joins
            from lilliput import registry as reg

            class Middle(lilliput.Rule):
                def loss(self): ...

            class _Hidden(lilliput.Stage): ...

            class Rule:
                "No rule of lilliput's."

            class Unrelated(Rule): ...
        """,
        "tall_package/sub/__init__.py": "",
        "tall_package/sub/methods.py": '''
            from ..base import Middle as M
            from lilliput.registry import register
            from lilliput.schedule import Linear

            class Tall(M):
                """Tall.

                More.
                """

            class Bent(Linear): ...

            @register("score", name="tall score")
            @register("score")
            def tall(weight):
                """How tall."""

            @other.register("score")
            def foreign(weight): ...
        ''',
    })  # fmt: skip
    by_name = {e.name: e for family in registry.FAMILIES for e in entries(family) if e.package == "tall_package"}
    assert by_name.keys() == {"Middle", "Tall", "Bent", "tall", "tall score"}
    assert (by_name["Tall"].family, by_name["Tall"].has_loss, by_name["Tall"].summary) == ("rule", True, "Tall.")
    assert by_name["Bent"].family == "schedule"
    assert by_name["tall"].module == "tall_package.sub.methods" and by_name["tall"].room == "tall_package"
    assert "tall_package" not in sys.modules


def test_a_module_of_one_file_joins(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "from lilliput import Stage\nclass Alone(Stage):\n    'One file.'\n    __call__ = None\n"
    install(tmp_path, monkeypatch, "alone_module", {"alone_module.py": text})
    assert find("stage", "Alone").load().__module__ == "alone_module"


@pytest.mark.parametrize("value", ["absent_package", "json.absent"])
def test_an_entry_point_to_nothing_is_named(
    value: str, fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "stale", {}, value)
    with pytest.raises(ValueError, match=f"'{value}' of stale is not one. Install stale again"):
        methods()


def test_a_file_that_does_not_parse_is_named(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "broken", {"broken.py": "from lilliput import Stage\nclass X(Stage):\n  def\n"})
    with pytest.raises(ValueError, match=r"broken\.py must be Python, but line 3 is not"):
        methods()


def test_a_collision_names_both_files(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "from lilliput import Stage\nclass Prune(Stage): ...\n"
    install(tmp_path, monkeypatch, "second", {"second.py": text})
    with pytest.raises(ValueError, match=r"'Prune' is in .*prune/prune.py and in .*second.py. Rename one"):
        methods()


def test_one_name_in_two_families_is_asked_for_by_family(
    fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "from lilliput import Stage\nclass Linear(Stage): ...\n"
    install(tmp_path, monkeypatch, "twofold", {"twofold.py": text})
    assert find("stage", "Linear").module == "twofold" and find("schedule", "Linear").package == "lilliput"
    with pytest.raises(ValueError, match=r'a stage in .*twofold.py and a schedule in .*Write "module:Name", as in'):
        lookup(("stage", "schedule"), "Linear")


@pytest.mark.parametrize("mark", ["register(FAMILY)", 'register("scores")', 'register("score", name=NAME)'])
def test_a_family_that_cannot_be_read_is_refused(
    mark: str, fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"from lilliput.registry import register\n@{mark}\ndef f(weight): ...\n"
    install(tmp_path, monkeypatch, "unreadable", {"unreadable.py": text})
    with pytest.raises(ValueError, match=r"as a literal, .* in .*unreadable.py, line 2"):
        methods()


def test_listing_is_fast_and_imports_no_torch() -> None:
    program = (
        "import sys, lilliput\n"
        "assert 'ast' not in sys.modules and 'lilliput.registry' not in sys.modules\n"
        "from lilliput.registry import methods; methods(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": str(SRC.parent)})
    took = []
    for _ in range(3):
        registry._declared.cache_clear()
        registry._table.cache_clear()
        begin = time.process_time()
        methods()
        took.append(time.process_time() - begin)
    assert min(took) < 0.25, took
