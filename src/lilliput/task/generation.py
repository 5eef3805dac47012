"""Generation: sequences that a network writes token by token, trained by teacher forcing, scored on what it decodes."""

import hashlib
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lilliput.task.arrays import Arrays, Function
from lilliput.task.nested import Model, call, length, take
from lilliput.task.protocol import Score
from lilliput.task.read import Reading

FOREIGN = -100  # no token has this number: it marks what is no label


class Generation(Arrays):
    """Write sequences token by token: the loss reads the next token, the metric what the network writes by itself.

    Training is teacher forcing: the network sees the right tokens up to a place and is to say the next one. The score
    is that of greedy decoding: the network is called again and again, with what it has written so far. All prefixes
    have the same length, padded behind, so that exported files decode too; the network must be causal: a place sees
    only the places before it.

    A split is `(source, tokens)`. tokens: int64 (n, T), each with its end token, then `padding`. source is what the
    sequence is written from: a tensor or a tuple, given to the model before the prefix (n, T); a dictionary, to which
    the prefix is added under the name `prefix`. A network that only continues text (a decoder) takes `joined=True`:
    source is then a prompt (n, P) of tokens, and the model is called with prompt and prefix in one tensor
    (n, P + T - 1). The model returns logits for each place, (n, places, tokens).

    Args:
        name: what the task is called in files and reports.
        train: what is trained on.
        val: what decisions read.
        test: what is read once, at the end; it may be left out.
        end: the token that ends a sequence.
        start: the token that every prefix begins with, where source and prefix are apart.
        padding: the token behind the end.
        metric: a registered name ("exact match", "edit distance") or a function (decoded, tokens) -> outcomes (n,), or
            one number; both are int64 (n, T), with -100 behind their end.
        joined: whether the model takes prompt and prefix in one tensor.
        prefix: the name of the prefix where the source is a dictionary.
        higher_is_better: which way a metric of your own runs.
        batch_size: examples in a training batch.

    Raises:
        ValueError: for lengths that differ, an unknown metric, or a source that cannot be joined.
        TypeError: for data of another kind.

    Example:
        >>> tokens = torch.tensor([[5, 6, 2], [5, 2, 0]])  # 2 ends a sequence, 0 is padding
        >>> copied = Generation("copy", train=(tokens, tokens), val=(tokens, tokens), end=2, start=1)
        >>> copied.score(lambda source, prefix: torch.eye(7)[source]).value
        1.0
    """

    def __init__(
        self,
        name: str,
        train: Any,
        val: Any,
        test: Any = None,
        *,
        end: int,
        start: int = 0,
        padding: int = 0,
        metric: str | Function = "exact match",
        joined: bool = False,
        prefix: str = "decoder_input_ids",
        higher_is_better: bool | None = None,
        batch_size: int = 64,
    ) -> None:
        self.end, self.start, self.padding, self.joined, self.prefix = end, start, padding, joined, prefix
        given = {"train": train, "val": val} | ({} if test is None else {"test": test})
        self._tokens: dict[str, Tensor] = {}
        self._sources: dict[str, Any] = {}
        splits = {}
        for split, data in given.items():
            source, tokens = Reading(f"Task {name}").read(split, data)
            if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
                raise ValueError(f"Generation {name}: {split} must be (source, tokens) with integer tokens (n, T).")
            if joined and (not isinstance(source, Tensor) or source.ndim != 2):
                raise ValueError(f"Generation {name}: joined=True needs a source of tokens (n, P), got another kind.")
            self._sources[split], self._tokens[split] = source, tokens
            splits[split] = self._forced(source, tokens)
        super().__init__(
            name,
            splits["train"],
            splits["val"],
            splits.get("test"),
            metric=metric,
            higher_is_better=higher_is_better,
            batch_size=batch_size,
            class_axis=-1,
            ignore_index=FOREIGN,
        )

    def _forced(self, source: Any, tokens: Tensor) -> tuple[Any, Tensor]:
        """(what the model is called with, the next token at each place) when the right tokens are known."""
        labels = tokens.masked_fill(self._behind(tokens), FOREIGN)
        if self.joined:
            labels = torch.cat([torch.full_like(source[:, 1:], FOREIGN), labels], 1)
        return self._inputs(source, tokens[:, :-1]), labels

    def _inputs(self, source: Any, written: Tensor) -> Any:
        written = written.masked_fill(written < 0, self.start)  # padding must be a token where a model reads it
        if self.joined:
            return torch.cat([source, written], 1)
        prefix = torch.cat([torch.full_like(written[:, :1], self.start), written], 1)
        if isinstance(source, dict):
            return source | {self.prefix: prefix}
        return (*source, prefix) if isinstance(source, tuple) else (source, prefix)

    def _behind(self, tokens: Tensor) -> Tensor:
        """Where a sequence is over: the places behind its end token, and its padding."""
        over = (tokens == self.end).cumsum(1).roll(1, 1).bool()
        over[:, 0] = False
        return over | ((tokens == self.padding) & (tokens != self.end))

    @torch.no_grad()
    def decode(self, model: Model, source: Any, most: int) -> Tensor:
        """The tokens that a model writes: at each place the likeliest one, up to the end token.

        Args:
            model: a module in eval mode, a session, or any function.
            source: what is written from, (n, ...).
            most: T, the length to stop at.

        Returns:
            int64 (n, T), padded behind the end.
        """
        count, first = length(source), source.shape[1] - 1 if self.joined else 0
        written = torch.full((count, most), self.padding)
        over = torch.zeros(count, dtype=torch.bool)
        for place in range(most):
            logits = call(model, self._inputs(source, written[:, :-1]))
            said = logits[:, first + place].argmax(-1).cpu()
            written[:, place] = torch.where(over, self.padding, said)
            over |= said == self.end
            if bool(over.all()):
                break
        return written

    def score(self, model: Model, split: str = "val") -> Score:
        self.split(split)
        source, tokens = self._sources[split], self._tokens[split]
        training = isinstance(model, torch.nn.Module) and model.training
        if isinstance(model, torch.nn.Module):
            model.eval()
        parts = [slice(first, first + 64) for first in range(0, len(tokens), 64)]
        decoded = torch.cat([self.decode(model, take(source, part), tokens.shape[1]) for part in parts])
        if training and isinstance(model, torch.nn.Module):
            model.train()
        behind = (self._behind(sequence) for sequence in (decoded, tokens))
        decoded, right = (x.masked_fill(over, FOREIGN) for x, over in zip((decoded, tokens), behind, strict=True))
        return self._measured(decoded, right, split, kept=False)

    @cached_property
    def fingerprint(self) -> str:
        text = f"{super().fingerprint} {self.end} {self.start} {self.padding} {self.joined} {self.prefix}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
