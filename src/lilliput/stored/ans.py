"""Asymmetric numeral systems: symbols become 32-bit words and come back, the last one first.

The library constriction does it. Where it has no wheel (Linux on ARM), `push` and `pull` compute the same words in
Python, which takes longer.

A state x of 64 bits holds what no word holds yet, and is 0 at the beginning. A symbol that has the share p of 2^24,
from its left edge l on, makes it 2^24 (x div p) + l + (x mod p); where that would not fit, the lower half of x leaves
as a word first.

Source: J. Duda, Asymmetric numeral systems, 2013, arXiv:1311.2540, section 3; R. Bamler, Understanding entropy coding
with asymmetric numeral systems, 2022, arXiv:2201.01741.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np
from numpy.typing import NDArray

MODEL_BITS = 24  # the library's own precision
WORD_BITS, STATE_BITS = 32, 64
WORD, MODEL = (1 << WORD_BITS) - 1, (1 << MODEL_BITS) - 1

Integers = NDArray[Any]


def edges(frequency: Integers) -> Integers:
    """The right edge of each symbol's share of 2^24, as the library rounds frequencies; no share is empty.

    Args:
        frequency: (symbols,) integers whose sum is a power of two, so that the library's division is exact.

    Returns:
        (symbols,) increasing integers, the last of them 2^24.

    Example:
        >>> edges(np.array([3, 1])).tolist()
        [12582911, 16777216]
    """
    n = frequency.size
    return np.cumsum(frequency) * ((1 << MODEL_BITS) - n) // int(frequency.sum()) + np.arange(1, n + 1)


def write(symbols: Integers, frequency: Integers) -> Integers:
    """The words that hold the symbols.

    Args:
        symbols: (count,) places in `frequency`.
        frequency: how often each symbol occurs, as `edges` takes it.

    Returns:
        (words,) uint32.
    """
    try:
        from constriction import stream  # here, so that sizes can be counted without it
    except ModuleNotFoundError:
        return push(symbols, frequency)
    coder = stream.stack.AnsCoder()
    coder.encode_reverse(symbols.astype(np.int32), _model(stream, frequency))
    words: Integers = coder.get_compressed()
    return words


def read(words: Integers, frequency: Integers, count: int) -> Integers:
    """The symbols that the words hold.

    Args:
        words: (words,) uint32, as `write` returned them.
        frequency: as it was given to `write`.
        count: how many symbols there are.

    Returns:
        (count,) integers.

    Raises:
        ValueError: where the words do not end with the last symbol.
    """
    try:
        from constriction import stream
    except ModuleNotFoundError:
        symbols, empty = pull(words, frequency, count)
    else:
        coder = stream.stack.AnsCoder(words)
        symbols, empty = coder.decode(_model(stream, frequency), count), coder.is_empty()
    if not empty:
        raise ValueError("decode: a coded stream must end where it began, and this one does not. It is damaged.")
    return symbols


def _model(stream: Any, frequency: Integers) -> Any:
    return stream.model.Categorical(frequency / int(frequency.sum()), perfect=False)


def push(symbols: Integers, frequency: Integers) -> Integers:
    """`write` in Python."""
    right = edges(frequency)
    share = np.diff(right, prepend=0).tolist()
    left = [0, *right.tolist()]
    state, words = 0, []
    for symbol in reversed(symbols.tolist()):
        p = share[symbol]
        if state >> (STATE_BITS - MODEL_BITS) >= p:
            words.append(state & WORD)
            state >>= WORD_BITS
        state = (state // p << MODEL_BITS) + left[symbol] + state % p
    while state:
        words.append(state & WORD)
        state >>= WORD_BITS
    return np.array(words, np.uint32)


def pull(words: Integers, frequency: Integers, count: int) -> tuple[Integers, bool]:
    """`read` in Python: the symbols, and whether nothing is left."""
    right = edges(frequency).tolist()
    left = [0, *right]
    kept, state = words.tolist(), 0
    symbols = []

    def fill(state: int) -> int:
        while state >> WORD_BITS == 0 and kept:
            state = state << WORD_BITS | kept.pop()
        return state

    state = fill(state)
    for _ in range(count):
        place = state & MODEL
        symbol = bisect_right(right, place)
        symbols.append(symbol)
        state = fill((state >> MODEL_BITS) * (right[symbol] - left[symbol]) + place - left[symbol])
    return np.array(symbols, np.int32), state == 0 and not kept
