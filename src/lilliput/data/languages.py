"""Identify the language of strings from Django's user interface."""

import gettext
import hashlib
import re
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.data import cache_folder, package_file, progress
from lilliput.files import write
from lilliput.nets.bag import Bag
from lilliput.task import Task, uniform

TASKS = {"languages": ("n-gram embeddings that tell 79 languages of user-interface strings", 33_600_000, "languages")}
FEWEST = 290  # strings that a language needs to take part: 79 of them have as many
MARKUP = re.compile(r"%(\(\w+\))?[\d.]*[a-z%]|\{[^}]*\}|<[^>]*>|&\w+;")
VERSION = 1  # rises when the trained weights change


@cache
def strings() -> tuple[list[str], list[str], list[str]]:
    """Read distinct translations inside Django, their message ids and their languages, without markup and placeholders.

    Regional variants (es_MX, zh_Hant) and strings that equal their English original are left out.
    """
    root = package_file("django", "conf", "locale", "__init__.py", install="lilliput[languages]").parents[2]
    by_language: dict[str, dict[str, str]] = {}
    for file in sorted(root.glob("**/locale/*/LC_MESSAGES/*.mo")):
        language = file.parts[-3]
        if "_" in language:
            continue
        with file.open("rb") as stream:
            catalog: dict[str | tuple[str, int], str] = vars(gettext.GNUTranslations(stream))["_catalog"]
        for key, value in catalog.items():
            source = (key if isinstance(key, str) else key[0]).split("\x04")[-1]  # msgctxt EOT msgid
            text = " ".join(MARKUP.sub("", value).split())
            if source and text != source and sum(map(str.isalpha, text)) >= 2:
                by_language.setdefault(language, {}).setdefault(text, source)
    rows = [
        (text, source, language)
        for language, texts in sorted(by_language.items())
        if len(texts) >= FEWEST
        for text, source in texts.items()
    ]
    texts, sources, languages = zip(*rows, strict=True)
    return list(texts), list(sources), list(languages)


def ngrams(texts: Sequence[str], buckets: int = 2**17, characters: int = 46) -> Tensor:
    """Hash the character n-grams (1 to 4) of the first characters of each text to bucket ids.

    A text is set in lower case between two spaces. An n-gram's bucket in [1, buckets) is a multiplicative hash of its
    code points; the ids come first and zeros fill the row.

    Args:
        texts: The texts.
        buckets: How many ids there are.
        characters: How many characters of a text count.

    Returns:
        Ids, int64 (n, 4 * characters + 2).
    """
    codes = np.zeros((len(texts), characters + 2), np.uint64)
    lengths = np.zeros((len(texts), 1), np.int64)
    for row, text in enumerate(texts):
        text = f" {text.lower()[:characters]} "[: characters + 2]
        lengths[row] = len(text)
        codes[row, : len(text)] = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    parts, state = [], np.zeros_like(codes)
    for n in range(1, 5):
        width = codes.shape[1] - n + 1
        state = (state[:, :width] + codes[:, n - 1 :]) * np.uint64(0x9E3779B97F4A7C15)
        state ^= state >> np.uint64(29)
        mixed = state * np.uint64(2 * n + 1) * np.uint64(0xBF58476D1CE4E5B9)
        bucket = (mixed >> np.uint64(40)) % np.uint64(buckets - 1) + np.uint64(1)
        parts.append(np.where(np.arange(width) < lengths - n + 1, bucket, 0).astype(np.int64))
    ids = np.concatenate(parts, 1)
    return torch.from_numpy(np.take_along_axis(ids, np.argsort(ids == 0, axis=1, kind="stable"), 1))


def forget(inputs: Tensor, seeds: Tensor) -> Tensor:
    """Replace half of the n-grams by padding: a function of the seeds."""
    return inputs * (uniform(seeds, inputs.shape[1]) >= 0.5)


def splits(buckets: int = 2**17) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    """Make ids and labels of train, val and test, eight tenths and a tenth each, and list the languages' names.

    A message id and all of its translations are in one split, so that a translation that several languages share, or
    nearly share, is never in two.
    """
    texts, sources, languages = strings()
    names = sorted(set(languages))
    labels = torch.tensor([names.index(language) for language in languages])
    digit = {source: hashlib.blake2b(source.encode(), digest_size=4).digest() for source in set(sources)}
    tenth = torch.tensor([int.from_bytes(digit[source], "little") % 10 for source in sources])
    ids = ngrams(texts, buckets)
    chosen = {"val": tenth == 0, "test": tenth == 1, "train": tenth >= 2}
    return {split: (ids[rows], labels[rows]) for split, rows in chosen.items()}, names


def train(ids: Tensor, labels: Tensor, width: int = 64, buckets: int = 2**17, epochs: int = 12, seed: int = 0) -> Bag:
    """Train a `Bag` from scratch, a function of the arguments; about ten seconds of one core for each twelve epochs.

    Adam with a rate that falls to zero; every step leaves out half of the n-grams of each text.
    """
    generator = torch.Generator().manual_seed(seed)
    classes, size = int(labels.max()) + 1, 1024
    model = Bag(buckets, width, classes)
    with torch.no_grad():
        model.table.weight.normal_(0, 0.1, generator=generator)[0] = 0
        model.linear.weight.normal_(0, width**-0.5, generator=generator)
        model.linear.bias.zero_()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    steps = epochs * (len(ids) // size)
    with progress() as bar:
        for step in bar.track(range(steps), description=f"training {buckets} x {width} embeddings (once)"):
            if step % (len(ids) // size) == 0:
                order = torch.randperm(len(ids), generator=generator)
            rows = order[step % (len(ids) // size) * size :][:size]
            batch = ids[rows]
            kept = (batch > 0) & (torch.rand(batch.shape, generator=generator) >= 0.5)
            weight = kept * kept.sum(1, keepdim=True).clamp_min(1).rsqrt()
            for group in optimizer.param_groups:
                group["lr"] = 0.02 * min(1, (step + 1) / 50) * (1 - step / steps)
            # The same sum as the model's forward, without keeping (n, length, width) values for the backward pass.
            pooled = F.embedding_bag(batch, model.table.weight, per_sample_weights=weight, mode="sum", padding_idx=0)
            loss = F.cross_entropy(model.linear(pooled), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def languages() -> tuple[nn.Module, Task]:
    """Load the trained `Bag` (2^17 x 64, 33.6 MB) and its task: strings in 79 languages, split by message id.

    The weights are trained on the first use and kept in the user's cache, under a name that depends on the data.

    Returns:
        The model in eval mode and the task.

    Source:
        A. Joulin et al. EACL 2017. arXiv:1607.01759.
    """
    parts, names = splits()
    task = Task(
        "languages",
        train=parts["train"],
        val=parts["val"],
        test=parts["test"],
        loss="cross_entropy",
        metric="accuracy",
        augment=forget,
        batch_size=256,
    )
    digest = hashlib.blake2b(digest_size=12)
    for value in (*parts["train"], torch.tensor(VERSION)):
        digest.update(value.numpy().tobytes())
    file = cache_folder() / f"languages-{digest.hexdigest()}.safetensors"
    if not file.exists():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        weights = train(*parts["train"]).state_dict()
        torch.set_num_threads(threads)
        write(file, lambda out: out.write(save(weights)))
    model = Bag(classes=len(names))
    model.load_state_dict(load_file(file))
    return model.eval(), task
