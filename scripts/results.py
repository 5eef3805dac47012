"""RESULTS.md from the records in results/: what each job reached, each system's evidence, each timed comparison.

python scripts/results.py
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lilliput.report.tables import markdown, reached, results, rivals

ROOT = Path(__file__).resolve().parents[1]
Record = Mapping[str, Any]
KINDS = ("jobs", "anytime", "evidence", "comparisons")


def read(folder: Path) -> dict[str, dict[str, Record]]:
    """Every record by kind and path; quick ones prove that a script runs, and are no result."""
    records: dict[str, dict[str, Record]] = {kind: {} for kind in KINDS}
    for path in sorted(folder.rglob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("size") != "quick":
            kind = "jobs" if "front" in record else "evidence" if "system" in record else "comparisons"
            kind = "anytime" if path.name == "anytime.json" else kind
            records[kind][path.relative_to(folder).as_posix()] = record
    return records


def render(folder: Path) -> str:
    """The whole page."""
    records = read(folder)
    blocks = [
        "# Results",
        "Made by `make readme` from the records in [results/](results/); nothing here is typed in. A ratio compares "
        "two measurements of one interleaved run. Sizes are lengths of files. A loss is on data that was not tuned "
        "on, in points of the metric, and its interval is the central 95%.",
    ]
    if records["jobs"]:
        blocks += ["## Jobs", results(records["jobs"].values())]
        blocks.append("\n".join(f"- [{path}](results/{path}): `{job.get('command')}`{stamp(job)}"
                                for path, job in records["jobs"].items()))  # fmt: skip
    if beside := rivals(records["jobs"].values()):
        blocks += [
            "## Beside an engineer by hand",
            "The rival is the fixed recipe of bench/rival.py (smaller networks of the family, tables cut, ordinary "
            "quantizers) with the same floor and as many processor seconds. Speed is in ONNX Runtime, times dense, all "
            "three in one interleaved run; the loss is on a split that neither has seen, in units of the metric, with "
            "its standard error.",
            beside,
        ]
    for path, record in records["anytime"].items():
        blocks += [f"## {record['what']}", reached(record), f"`{record['command']}`, [{path}](results/{path})"]
    for path, record in records["evidence"].items():
        blocks += [
            f"## Evidence: {record['system']}",
            f"Claim: {record['claim']}. Baseline: {record['baseline']}.",
            table(record["rows"]),
            f"[{path}](results/{path}){stamp(record)}",
        ]
    for path, record in records["comparisons"].items():
        blocks += [
            f"## {record.get('what', Path(path).stem)}",
            table(list(rows(record.get("results", record.get("rows", {}))))),
            f"`{record.get('command')}`, [{path}](results/{path}){stamp(record)}",
        ]
    return "\n\n".join(blocks) + "\n"


def rows(value: Any, where: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """A list of rows as it is; nested dictionaries as a row for each innermost one, with the keys that lead to it."""
    if isinstance(value, list):
        yield from value
    elif any(isinstance(item, Mapping) for item in value.values()):
        for name, item in value.items():
            if isinstance(item, Mapping):
                yield from rows(item, (*where, name))
    elif value:
        yield {**dict(zip(("", " ", "  "), where, strict=False)), **value}


def table(records: list[dict[str, Any]]) -> str:
    """One column for each key, in the order in which they first appear."""
    names = list(dict.fromkeys(name for record in records for name in record))
    columns = {name.replace("_", " "): (lambda record, name=name: shown(record.get(name))) for name in names}
    return markdown(records, columns) if names else "No rows."


def shown(value: Any) -> Any:
    """A cell: lists are joined, everything else is left to the table."""
    if isinstance(value, list | tuple):
        return " to ".join(str(item) for item in value) if len(value) == 2 else ", ".join(map(str, value))
    return json.dumps(value) if isinstance(value, Mapping) else value


def stamp(record: Record) -> str:
    """Where and from what a record was made."""
    machine, versions = record.get("machine") or {}, record.get("versions") or {}
    torch = record.get("torch") or versions.get("torch")
    if not isinstance(machine, Mapping):
        machine = {"cpu": str(machine)}
    load = [machine[key] for key in ("load_before", "load_after", "load") if machine.get(key) is not None]
    known = {
        "": machine.get("cpu"),
        "cores ": machine.get("cores"),
        "load ": " to ".join(str(value) for value in load[:2]),
        "torch ": torch,
        "commit ": str(record.get("commit") or "")[:10],
    }
    return "".join(f"; {name}{value}" for name, value in known.items() if value)


if __name__ == "__main__":
    (ROOT / "RESULTS.md").write_text(render(ROOT / "results"), encoding="utf-8")
