"""A griffe extension that reads the headings of lilliput's docstrings as the sections that griffe knows."""

import re
from typing import Any

from griffe import Extension, Object


class Sections(Extension):
    """Shows doctests as code, under `Example:` and in the middle of the prose, and links arXiv numbers.

    griffe's Google style has `Examples:` for doctests; it takes `Example:` for an admonition, in which Markdown reads
    the prompt `>>>` as a quotation.
    """

    def on_instance(self, *, obj: Object, **unused: Any) -> None:
        """Rewrite the docstring of an object that griffe has just read, before it is parsed.

        Args:
            obj: The module, class, function or attribute.
            unused: What else griffe says about it.
        """
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            text = re.sub(r"\barXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
            text = re.sub(r"(?:^(?=>>>)(?:.+\n?)+)", _fenced, text, flags=re.MULTILINE)
            obj.docstring.value = text


def _fenced(lines: re.Match[str]) -> str:
    return f"```pycon\n{lines[0].rstrip()}\n```\n"
