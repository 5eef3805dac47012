"""Parts: the classes and groups of the examples, what each loses, and which answers changed.

A small network may keep its accuracy on average and lose it where examples are few: small classes pay first (Hooker et
al., What do compressed deep neural networks forget?, 2019, arXiv:1911.05248).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lilliput.search.margin import Floats, Mask, Pairs
from lilliput.task import Score, Task, length

LISTED = 100  # changed answers that a summary names

Plain = dict[str, Any]


def bounds(task: Task, dense: Score, scores: Sequence[Score], sure: float) -> Floats:
    """What the part of val that may lose most may lose, of each score, judged alone and in points of the metric.

    Args:
        task: names the parts.
        dense: the dense network's score on val.
        scores: of the others, on the same examples.
        sure: the confidence that each part's bound holds with.

    Returns:
        (scores,), 0 where a score is the dense one or there are no parts.
    """
    found = np.zeros(len(scores))
    places = [i for i, score in enumerate(scores) if score is not dense]
    differences = _differences(task, dense, [scores[i] for i in places])
    if differences is not None:
        for mask in _parts(task, "val", len(differences)).values():
            found[places] = np.maximum(found[places], Pairs.of(differences[mask]).bound(sure))
    return found


def rows(task: Task, split: str, dense: Score, chosen: Score, sure: float) -> list[Plain]:
    """What each part scores with the dense network and with another, the part that loses most first.

    Args:
        task: names the parts.
        split: whose examples were scored.
        dense: the dense network's score on it.
        chosen: the other's.
        sure: the confidence of `bound`, the most that the part loses.
    """
    differences = _differences(task, dense, [chosen])
    if differences is None or dense.outcomes is None or chosen.outcomes is None:
        return []
    listed = []
    for name, mask in _parts(task, split, len(differences)).items():
        pairs = Pairs.of(differences[mask])
        row = {
            "part": name,
            "split": split,
            "examples": int(mask.sum()),
            "dense": float(dense.outcomes[mask].mean()),
            "chosen": float(chosen.outcomes[mask].mean()),
            "drop": float(pairs.drops[0]),
            "bound": float(pairs.bound(sure)[0]),
        }
        listed.append({key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()})
    return sorted(listed, key=lambda row: (-float(row["drop"]), -float(row["bound"])))


def changed(task: Task, split: str, dense: Score, chosen: Score) -> Plain | None:
    """The examples whose answer is another than the dense network's; None where outputs are no classes.

    Args:
        task: says which answer outputs stand for.
        split: whose examples were scored.
        dense: the dense network's score, with its outputs.
        chosen: the other's.
    """
    answers = [_answers(task, score.outputs) for score in (dense, chosen)]
    if any(answer is None for answer in answers):
        return None
    before, after = (np.asarray(answer) for answer in answers)
    places = np.flatnonzero(before != after)
    return {
        "split": split,
        "of": len(before),
        "count": len(places),
        "examples": [{"example": int(i), "dense": int(before[i]), "chosen": int(after[i])} for i in places[:LISTED]],
    }


def _parts(task: Task, split: str, outcomes: int) -> dict[str, Mask]:
    """The parts of which there are outcomes: none where some examples have no outcome, so that places do not agree."""
    return {name: mask for name, mask in task.parts(split).items() if len(mask) == outcomes and mask.any()}


def _answers(task: Task, outputs: Any) -> Tensor | None:
    if not isinstance(outputs, Tensor) or task.meaning.kind not in ("logits", "probabilities", "bits"):
        return None
    answers = task.meaning.predictions(torch.as_tensor(outputs))
    return answers.reshape(-1) if answers.numel() == length(outputs) else None


def _differences(task: Task, dense: Score, scores: Sequence[Score]) -> Floats | None:
    """How much worse each score's outcome of each example is, (examples, scores); None where there are no outcomes."""
    known = [score.outcomes for score in scores if score.outcomes is not None]
    if dense.outcomes is None or len(known) < len(scores) or not known:
        return None
    if {len(outcomes) for outcomes in known} != {len(dense.outcomes)}:
        return None
    sign = 1 if task.higher_is_better else -1
    return sign * (dense.outcomes[:, None] - np.stack(known, 1))
