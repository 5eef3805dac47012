"""Prune once for all (2021): a large encoder is pruned once on text without labels, and its zeros serve every task.

A sentence encoder of six layers loses 85% of the weights of its layers while it imitates the dense one's hidden states
on docstrings. It then learns two tasks with labels, its zeros locked, taught by the dense encoder that learnt the same;
the last steps train through the rounding to 8 bits. Beside it stand encoders with fewer layers and no zeros, which saw
the same texts for as many steps, learnt the tasks in the same way and end in 8 bits as well.

The tasks: which of six packages a docstring comes from, and which description belongs to which summary (recall at 1
among the held-out ones, both ways). The splits share no source file, and no text that is judged on was used before.

The full size trains for about twenty minutes of one core, once: trainings are kept in the cache.

Sources: O. Zafrir, A. Larey, G. Boudoukh, H. Shen and M. Wasserblat, Prune once for all: sparse pre-trained language
models, ENLSP workshop at NeurIPS 2021, arXiv:2111.05754; Intel and Neural Magic, BERT-Large: prune once for DistilBERT
inference performance, 2022 (large and sparse against small and dense); X. Jiao et al., TinyBERT, Findings of EMNLP
2020, arXiv:1909.10351 (hidden states); V. Sanh et al., DistilBERT, 2019, arXiv:1910.01108 (fewer layers, taken from the
teacher).
"""

import ast
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput.code.base import copy_model, pack
from lilliput.data import cache_folder, package_file
from lilliput.data.sentences import halves, network, tokenize
from lilliput.export import pack as packed
from lilliput.export.onnx import Session, Structure, trace
from lilliput.files import write
from lilliput.nets.bert import Classifier, SentenceBert, States
from lilliput.prune.masks import masks
from lilliput.prune.prune_once import PatternLock, transfer

PACKAGES = ("bokeh", "networkx", "numpy", "optuna", "sympy", "torch")
TOKENS, SPARSITY = 24, 0.85
RATES = {  # of the transfers, chosen on the validation split with the first seed: 2e-4 or about three times as much
    "package": {"dense": 1e-4, "sparse": 8e-4, "small": 2e-4}, "pairs": {"dense": 1e-4, "sparse": 2e-4, "small": 2e-4},
}  # fmt: skip
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t for a 95% interval of so many seeds


@dataclass(frozen=True)
class Size:
    """How much is done: texts without labels and steps over them (states, vectors), examples to judge on, steps of a
    transfer (in float32, in 8 bits), seeds.

    shallow: the layers (from 0) of each small encoder, and which of its own (from 1) imitate the dense one's `learnt`.
    """

    texts: int
    steps: tuple[int, int]
    judged: int
    transfer: tuple[int, int]
    seeds: tuple[int, ...]
    learnt: tuple[int, int]
    shallow: tuple[tuple[tuple[int, ...], tuple[int, int]], ...]
    rounds: int


FULL = Size(4800, (600, 300), 700, (60, 15), (0, 1, 2), (3, 6), (((0, 5), (1, 2)), ((0, 2, 5), (2, 3))), 60)
QUICK = Size(32, (2, 1), 48, (1, 1), (0,), (1, 1), (((0,), (1, 1)),), 3)  # one layer, so that one export serves all

# --------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Docstring:
    """What was read of one: its package and file, what it documents, its first paragraph and the prose behind it."""

    package: str
    file: str
    kind: str
    head: str
    rest: str

    @property
    def tenth(self) -> int:
        """A number from 0 to 9 that all docstrings of a file share."""
        return _hash(f"{self.package}/{self.file}") % 10


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little")


def _documented(node: ast.AST, inside: bool = False) -> Iterator[tuple[str, str]]:
    """(kind, docstring) of every class, method and function below a node."""
    for child in ast.iter_child_nodes(node):
        defined = isinstance(child, ast.FunctionDef | ast.ClassDef)
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(child)):
            yield "class" if isinstance(child, ast.ClassDef) else "method" if inside else "function", text
        yield from _documented(child, isinstance(child, ast.ClassDef) if defined else inside)


def _read(packages: tuple[str, ...], files: int) -> list[Docstring]:
    by_head: dict[str, Docstring] = {}
    for package in packages:
        root = package_file(package, "__init__.py", install="lilliput[sentences]").parent
        paths = [
            path
            for path in sorted(root.rglob("*.py"))
            if not any(folder.startswith("_") or "test" in folder for folder in path.relative_to(root).parts[:-1])
        ]
        for path in paths[:files]:
            for kind, text in _documented(ast.parse(path.read_bytes())):
                head, rest = halves(text)
                if 4 <= len(head.split()) <= 40:
                    by_head.setdefault(head, Docstring(package, str(path.relative_to(root)), kind, head, rest))
    return sorted(by_head.values(), key=lambda doc: _hash(doc.head))


def docstrings(quick: bool) -> list[Docstring]:
    """Every docstring whose first paragraph has 4 to 40 words, each such paragraph once; kept in the cache."""
    if quick:
        return _read(("networkx", "optuna"), 25)
    stamp = " ".join(f"{package} {version(package)}" for package in PACKAGES)
    file = cache_folder() / f"prune-once-{_hash(stamp):08x}.json"
    if not file.exists():
        texts = json.dumps([list(vars(doc).values()) for doc in _read(PACKAGES, 10**9)])
        write(file, lambda out: out.write(texts.encode()))
    return [Docstring(*values) for values in json.loads(file.read_text(encoding="utf-8"))]


def unlabelled(docs: list[Docstring], first: int, count: int, loss: str) -> lilliput.Task:
    """Texts without labels, from the files that no split of the labelled tasks is judged on."""
    texts = [text for doc in docs if doc.tenth >= 3 for text in (doc.head, doc.rest) if len(text.split()) >= 4]
    texts = sorted(set(texts), key=_hash)
    train, val = tokenize(texts[first : first + count], TOKENS), tokenize(texts[first + count :][:64], TOKENS)
    return lilliput.Task("docstrings", train=(train, None), val=(val, None), loss=loss, metric="mse", batch_size=16)


def matched(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy, both ways, of finding each text's partner among the batch: (n, 2, width) unit vectors."""
    alike, own = 20 * outputs[:, 0] @ outputs[:, 1].T, torch.arange(len(outputs))
    return (F.cross_entropy(alike, own) + F.cross_entropy(alike.T, own)) / 2


def recalled(outputs: Tensor, targets: Tensor) -> Tensor:
    """For each pair, how many of its two texts find their partner as the nearest of all: 0, 1/2 or 1."""
    alike, own = outputs[:, 0] @ outputs[:, 1].T, torch.arange(len(outputs))
    return ((alike.argmax(1) == own).float() + (alike.argmax(0) == own).float()) / 2


def labelled(docs: list[Docstring], judged: int) -> dict[str, lilliput.Task]:
    """Both tasks; a file's docstrings are all in one split."""
    splits = {"train": [doc for doc in docs if doc.tenth >= 3], "val": [doc for doc in docs if doc.tenth == 2],
              "test": [doc for doc in docs if doc.tenth < 2]}  # fmt: skip
    names = sorted({doc.package for doc in docs})

    def package(split: str) -> tuple[Any, Tensor]:
        chosen = splits[split][: None if split == "train" else judged]
        return tokenize([doc.head for doc in chosen], TOKENS), torch.tensor([names.index(d.package) for d in chosen])

    used = {doc.rest for doc in splits["train"]}

    def pairs(split: str) -> tuple[Any, Tensor]:
        described = {doc.rest: doc for doc in splits[split] if len(doc.rest.split()) >= 8}
        chosen = [doc for rest, doc in described.items() if split == "train" or rest not in used]
        chosen = chosen[: None if split == "train" else judged]
        coded = tokenize([text for doc in chosen for text in (doc.head, doc.rest)], TOKENS)
        return {name: value.view(-1, 2, TOKENS) for name, value in coded.items()}, torch.arange(len(chosen))

    return {
        "package": lilliput.Task("package", *map(package, splits), batch_size=16),
        "pairs": lilliput.Task("pairs", *map(pairs, splits), loss=matched, metric=recalled, higher_is_better=True,
                               batch_size=8),
    }  # fmt: skip


class Pair(nn.Module):
    """Vectors of pairs of texts: (n, 2, length) -> (n, 2, width)."""

    def __init__(self, encoder: SentenceBert) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        vectors: Tensor = self.encoder(input_ids.flatten(0, 1), attention_mask.flatten(0, 1))
        return vectors.view(len(input_ids), 2, -1)


# ----------------------------------------------------------------------------------------------------------- upstream


def without_embeddings(encoder: SentenceBert) -> SentenceBert:
    """The encoder, its two embeddings out of the optimizer's reach."""
    encoder.requires_grad_(True)
    for part in (encoder.word, encoder.position):
        part.requires_grad_(False)
    return encoder


def shallow(encoder: SentenceBert, layers: tuple[int, ...]) -> SentenceBert:
    """A copy with these layers only, counted from 0."""
    small = copy_model(encoder)
    small.layers = nn.ModuleList(small.layers[i] for i in layers)
    return small


def taught(
    encoder: SentenceBert,
    task: lilliput.Task,
    reference: lilliput.Reference,
    learnt: tuple[int, ...],
    steps: int,
    sparsity: float,
    store: Path | None,
) -> SentenceBert:
    """An encoder after so many steps of imitating the dense one's hidden states, its linear layers pruned meanwhile."""
    prune = lilliput.Prune(lilliput.Cubic(sparsity, end=0.6), allocation="uniform", where="encoder.layers.*")
    rules = (*((prune,) if sparsity else ()), lilliput.Distill())
    train = lilliput.Train(steps, lr=lilliput.Cosine(1.5e-3, warmup=0.1), rules=rules, supervised=0.0, clip=1.0)
    made = lilliput.run(States(without_embeddings(encoder), learnt), task, (train,), store, reference=reference)
    return lilliput.realize(made).encoder


def aligned(
    encoder: SentenceBert,
    task: lilliput.Task,
    reference: lilliput.Reference,
    steps: int,
    lock: bool,
    store: Path | None,
) -> SentenceBert:
    """The encoder after more steps, on other texts, of imitating the dense one's sentence vectors."""
    rules = (*((PatternLock(),) if lock else ()), lilliput.Distill())
    train = lilliput.Train(steps, lr=lilliput.Cosine(1.2e-3, warmup=0.05), rules=rules, supervised=0.0, clip=1.0)
    made = lilliput.run(without_embeddings(encoder), task, (train,), store, reference=reference)
    return lilliput.realize(made)


# ----------------------------------------------------------------------------------------------------------- transfer


def learner(encoder: SentenceBert, task: lilliput.Task, seed: int) -> nn.Module:
    """A copy of the encoder with what the task needs on top."""
    encoder = without_embeddings(copy_model(encoder))
    if task.name == "pairs":
        return Pair(encoder)
    torch.manual_seed(seed)
    return Classifier(encoder, len(task.split("train")[1].unique()))


def learnt(
    encoder: SentenceBert,
    task: lilliput.Task,
    teacher: lilliput.Reference | None,
    size: Size,
    eight: bool,
    lock: bool,
    seed: int,
    store: Path | None,
) -> nn.Module:
    """The encoder after it learnt a task, by labels and from its teacher."""
    weight = 1.0 if task.name == "package" else 1000.0  # of squared errors over the 384 values of unit vectors
    kind = "dense" if teacher is None else "sparse" if lock else "small"
    stages = transfer(size.transfer[0], size.transfer[1] if eight else 0, lr=RATES[task.name][kind], lock=lock,
                      where="encoder.layers.*,head", seed=seed,
                      distill=lilliput.Distill(weight, 2.0) if teacher else None)  # fmt: skip
    return lilliput.run(learner(encoder, task, seed), task, stages, store, seed=seed, reference=teacher)


# ------------------------------------------------------------------------------------------------------------ measure


def interval(values: list[float]) -> list[float]:
    """The 95% interval of a mean over seeds, by Student's t (of one seed: no width)."""
    half = T95[len(values)] * float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return [round(float(np.mean(values)) - half, 4), round(float(np.mean(values)) + half, 4)]


def between(a: list[np.ndarray], b: list[np.ndarray]) -> dict[str, Any]:
    """How much better a is than b, a mean over seeds, with a 95% interval over examples (drawn again, paired)."""
    gap = np.mean(a, 0) - np.mean(b, 0)
    drawn = np.random.default_rng(0).choice(gap, (2000, len(gap))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"mean": round(float(gap.mean()), 4), "interval": [round(float(low), 4), round(float(high), 4)]}


def comparison(
    rows: list[dict[str, Any]], outcomes: dict[tuple[str, str], Any], tasks: list[str]
) -> list[dict[str, Any]]:
    """The sparse encoder in 8 bits beside each small one in 8 bits: what it takes and how much better it is.

    Time is that of the faster of an encoder's two files. equal: "bytes" and "time" mark the nearest small encoder that
    takes as much of it or more (the largest, where none does).
    """
    by_name = {row["encoder"]: row for row in rows}

    def takes(name: str) -> dict[str, float]:
        return {"bytes": by_name[f"{name}, 8 bits"]["packed_bytes"],
                "time": min(by_name[f"{name}{end}"]["engine_ms"] for end in ("", ", 8 bits"))}  # fmt: skip

    own, small = takes("sparse"), [name for name in by_name if name.endswith("layers")]
    near = {key: min(small, key=lambda name: (takes(name)[key] < own[key], abs(takes(name)[key] - own[key])))
            for key in own}  # fmt: skip
    return [{"small": name, "equal": [key for key in own if near[key] == name],
             **{f"times_the_{key}": round(takes(name)[key] / own[key], 3) for key in own},
             **{task: between(outcomes[task, "sparse, 8 bits"], outcomes[task, f"{name}, 8 bits"]) for task in tasks}}
            for name in small]  # fmt: skip


def turns(runs: dict[str, Any], rounds: int) -> dict[str, np.ndarray]:
    """Processor milliseconds of each function in every round, all taking turns."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):
        for name, run in runs.items():
            began = time.process_time()
            run()
            spent[name].append(1e3 * (time.process_time() - began))
    return {name: np.array(found[2:]) for name, found in spent.items()}


def zeros(model: nn.Module) -> float:
    """The fraction of the layers' weights that is zero."""
    plain = lilliput.realize(model)
    weights = [w for name, w in plain.named_parameters() if ".layers." in name and w.dim() > 1]
    return 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def measure(quick: bool) -> dict[str, Any]:
    """A row for each encoder: both tasks, bytes of its file, and its time in two runtimes."""
    torch.set_num_threads(1)
    size = QUICK if quick else FULL
    store = None if quick else cache_folder() / "evidence"
    docs = docstrings(quick)
    torch.manual_seed(0)
    dense: Any = SentenceBert(width=32, layers=1, heads=2, hidden=64) if quick else network()
    text, more = unlabelled(docs, 0, size.texts, "mse"), unlabelled(docs, size.texts, size.texts, "cosine")
    reference = lilliput.Reference(States(copy_model(dense), size.learnt).requires_grad_(False), text)
    again = lilliput.Reference(copy_model(dense).requires_grad_(False), more)
    students = {"sparse": (copy_model(dense), size.learnt, SPARSITY)} | {
        f"{len(layers)} dense layers": (shallow(dense, layers), own, 0.0) for layers, own in size.shallow
    }
    encoders = {"dense": dense}
    for name, (student, own, sparsity) in students.items():
        encoder = taught(student, text, reference, own, size.steps[0], sparsity, store)
        encoders[name] = aligned(encoder, more, again, size.steps[1], sparsity > 0, store)
    del reference, again
    before = {name: m.mask for name, m in masks(locked(encoders["sparse"])).items()}

    tasks, outcomes, first, moved = labelled(docs, size.judged), {}, {}, 0
    for task in tasks.values():
        teachers = [learnt(dense, task, None, size, False, False, seed, store) for seed in size.seeds]
        outcomes[task.name, "dense"] = [task.score(model, "test").outcomes for model in teachers]
        first[task.name, "dense"] = teachers[0]
        teacher = lilliput.Reference(copy_model(teachers[0]).requires_grad_(False), task)
        for name, encoder in encoders.items():
            for eight in (False, True) if name != "dense" else ():
                row = f"{name}, 8 bits" if eight else name
                for seed in size.seeds:
                    model = learnt(encoder, task, teacher, size, eight, name == "sparse", seed, store)
                    outcomes.setdefault((task.name, row), []).append(task.score(model, "test").outcomes)
                    first.setdefault((task.name, row), model)
                    if name == "sparse":
                        after = {key.removeprefix("encoder."): m.mask for key, m in masks(model).items()}
                        moved += sum(int((mask ^ after[key]).sum()) for key, mask in before.items())

    rows, names = [], list(dict.fromkeys(name for _, name in outcomes))
    costs = pressed({name: first["package", name] for name in names}, tasks["package"], size, quick)
    for name in names:
        row = {"encoder": name}
        for task in tasks:
            scores = [float(found.mean()) for found in outcomes[task, name]]
            row |= {task: round(float(np.mean(scores)), 4), f"{task}_interval": interval(scores)}
        rows.append(row | {"zeros": round(zeros(first["package", name]), 4), **costs[name]})
    beside = comparison(rows, outcomes, list(tasks))
    return {
        "claim": "an encoder pruned once, without labels, learns several tasks with its zeros locked; large and "
                 "sparse beats small and dense at equal bytes and at equal time",
        "baseline": "dense encoders with fewer layers, of the same teacher, texts, steps and transfer, in 8 bits: for "
                    "bytes and for time the nearest one that has more of it than the sparse encoder in 8 bits. "
                    "Intervals of scores: over seeds; of differences: over held-out examples",
        "rows": rows, "large_sparse_over_small_dense": beside, "mask_entries_moved": moved,
        "seeds": len(size.seeds), "steps": list(size.steps), "transfer_steps": list(size.transfer), "tokens": TOKENS,
        "judged": {name: len(task.split("test")[1]) for name, task in tasks.items()},
    }  # fmt: skip


def locked(encoder: SentenceBert) -> nn.Module:
    """The sparse encoder with its zeros as masks, as every transfer begins."""
    copy = copy_model(encoder)
    PatternLock().begin(copy, None, None, 1)
    return copy


def pressed(models: dict[str, nn.Module], task: lilliput.Task, size: Size, quick: bool) -> dict[str, dict[str, Any]]:
    """Each network as a packed file and as an ONNX file in both runtimes, which take turns."""
    structures: dict[int, Structure] = {}
    example, measured, runs = task.example, {}, {}
    inputs = {name: value[:32] for name, value in task.split("val")[0].items()}
    count = len(inputs["input_ids"])
    with tempfile.TemporaryDirectory() as scratch:
        for name, model in models.items():
            if name.endswith("8 bits"):
                model = lilliput.Quantize(where="encoder.word,encoder.position")(model, task, None)
            plain = lilliput.realize(model)
            depth = len(plain.encoder.layers)
            if depth not in structures:
                structures[depth] = trace(plain, example)
            structure, stored = structures[depth], pack(model)
            file = packed.write(structure.fill(stored), stored, Path(scratch, "model.lil"))
            proto = structure.write(stored)
            engine = lilliput.compile(proto, Path(scratch, name), tune=not quick,
                                      shapes={key: (1, TOKENS) for key in example})  # fmt: skip
            session = Session(proto)
            feed = session.feed(example)
            runs[f"engine {name}"] = partial(engine, *(feed[value["name"]] for value in engine.inputs))
            runs[f"onnxruntime {name}"] = partial(session.run, feed)
            one = [[value[i : i + 1].numpy() for value in inputs.values()] for i in range(count)]
            mine = np.concatenate([engine(*text) for text in one])
            with torch.no_grad():
                ours = plain(**inputs).numpy()
            measured[name] = {
                "packed_bytes": file.size_bytes,
                "layer_bytes": sum(count for key, count in file.tensors.items() if ".layers." in key),
                "largest_difference": float(f"{np.abs(mine - ours).max():.2g}"),
            }  # fmt: skip
        spent = turns(runs, size.rounds)
    for name, row in measured.items():
        mine, theirs = spent[f"engine {name}"], spent[f"onnxruntime {name}"]
        row |= {
            "engine_ms": round(float(np.median(mine)), 3),
            "onnxruntime_ms": round(float(np.median(theirs)), 3),
            "engine_times_faster": round(float(np.median(spent["engine dense"] / mine)), 2),
            "onnxruntime_times_faster": round(float(np.median(spent["onnxruntime dense"] / theirs)), 2),
        }
    return measured
