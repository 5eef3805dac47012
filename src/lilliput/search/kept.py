"""Kept: the points of a search whose files are still there, and the files of another one than the chosen."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lilliput.errors import near
from lilliput.export.save import NAMES
from lilliput.files import write_set
from lilliput.store import Store


@dataclass(frozen=True)
class Kept:
    """A point whose four files a search has kept.

    Args:
        key: under which.
        row: what summary.json says of it: its name, score on val, and costs.
        folder: where its files are.
    """

    key: str
    row: dict[str, Any]
    folder: Path


def points(folder: str | Path) -> list[Kept]:
    """The points of a search whose files are there, from the largest to the smallest.

    Args:
        folder: what `lilliput shrink` wrote.

    Raises:
        ValueError: where the folder holds no search.
    """
    records = Path(folder) / "records"
    if not records.is_dir():
        raise ValueError(f"pick: {folder} must be a folder that `lilliput shrink` wrote, got none. Check its name.")
    store, found = Store(records), {}
    for _, row in store.records():
        place = store.folder / "files" / str(row.get("key"))
        if row.get("kind") == "point" and all((place / name).is_file() for name in NAMES):
            found[str(row["key"])] = Kept(str(row["key"]), row, place)
    return sorted(found.values(), key=lambda point: (-int(point.row["packed_bytes"]), str(point.row["name"])))


def pick(folder: str | Path, point: str, out: str | Path) -> Kept:
    """Copy the files of a point that was not chosen: model.onnx, model.lil, model.safetensors and recipe.toml.

    Args:
        folder: what `lilliput shrink` wrote.
        point: its name, its key, or the beginning of one of them that no other has.
        out: the folder to write.

    Returns:
        The point.

    Raises:
        ValueError: for a name that none or several have.
        StoreError: where the files cannot be written.

    Example:
        >>> import lilliput
        >>> lilliput.pick("lilliput-digits", "7 blocks fewer, width 0.5, 4 bits", "wider")  # doctest: +SKIP
    """
    known = points(folder)
    found = [kept for kept in known if point in (kept.key, kept.row["name"])]
    found = found or [kept for kept in known if kept.key.startswith(point) or str(kept.row["name"]).startswith(point)]
    if len(found) != 1:
        names = [str(kept.row["name"]) for kept in found or known]
        what = f"{len(found)} points begin with it: {'; '.join(names)}" if found else near(point, names)
        raise ValueError(
            f"pick: point must name one of the {len(known)} points whose files were kept, got {point!r}. {what} "
            "`lilliput pick DIR` lists them."
        )
    target = Path(out)
    if target.resolve() == Path(folder).resolve():
        raise ValueError(f"pick: out must be another folder than {folder}, which holds the chosen point.")
    write_set(target, {name: found[0].folder / name for name in NAMES}, last=NAMES[-1])
    return found[0]
