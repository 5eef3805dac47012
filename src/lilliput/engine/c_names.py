"""Make safe C identifiers and comments from the names of values in a model file."""

from __future__ import annotations

import re

# C's keywords, and what generated functions call their own.
C_WORDS = frozenset(
    {"auto", "break", "case", "char", "const", "continue", "default", "do", "double", "else", "enum", "extern", "float",
     "for", "goto", "if", "inline", "int", "long", "register", "restrict", "return", "short", "signed", "sizeof",
     "static", "struct", "switch", "typedef", "union", "unsigned", "void", "volatile", "while",
     "arena", "weights", "main"}
)  # fmt: skip


def identifier(name: str, taken: set[str] | None = None) -> str:
    """A C identifier like a name, different from those in `taken`, which it joins.

    Example:
        >>> identifier("layer1.0/conv weight")
        'layer1_0_conv_weight'
    """
    text = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")[-48:].strip("_") or "v"
    text = text if re.match(r"[A-Za-z]", text) and text not in C_WORDS else f"n_{text}"
    if taken is None:
        return text
    number, free = 2, text
    while free in taken:
        free, number = f"{text}_{number}", number + 1
    taken.add(free)
    return free


def comment(text: str) -> str:
    """A text that can stand in a C comment, whatever a file put into its names."""
    plain = re.sub(r"[^\w.,:;=+()\[\] %/*<>-]", "?", text, flags=re.ASCII)[:200]
    return plain.replace("*/", "* /").replace("/*", "/ *")
