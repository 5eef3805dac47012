"""Entropy coding of small integers by asymmetric numeral systems (rANS), with a length that is known beforehand.

A symbol s of frequency f_s out of M = 2^12 costs `log2(M / f_s)` bits. The coder's state x starts at L = 2^22 and stays
in [L, 2^16 L): coding s multiplies it by at most `(M / f_s)(1 + 2^-10)`, and 16-bit words leave it whenever it would
grow too large. So n symbols, c_s of each, take at most

    16 ceil((sum_s c_s log2(M / f_s) + n log2(1 + 2^-10)) / 16) + 38 lanes     bits

besides the table of frequencies; the writer pads to exactly that, which makes the length a formula of the counts.
Frequencies are kept as 5-bit logarithms, which costs about 0.01 bits a symbol. Symbol i goes to lane i mod lanes, one
lane for each 2^14 symbols: short sequences lose nothing to it and long ones are decoded side by side in numpy.

Source: J. Duda, Asymmetric numeral systems, 2013, arXiv:1311.2540; F. Giesen, Interleaved entropy coders, 2014,
arXiv:1402.3392.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

PRECISION = 12
M = 1 << PRECISION
LOW = 1 << 22
STATE_BITS = 38
LANE = 1 << 14
LEVEL_BITS = 5
MAX_BITS = 8
# Logarithmic steps, written out: no machine's pow() may change what a file means.
WEIGHTS = (0, 1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 28, 37, 49, 64, 84, 111, 147, 194, 256,
           338, 446, 588, 776, 1024, 1351, 1783, 2353, 3104, 4096, 5405, 7132)  # fmt: skip

Integers = NDArray[Any]


def lanes(count: int) -> int:
    """How many lanes `count` symbols are dealt to."""
    return max(1, count // LANE)


def levels(counts: Integers) -> Integers:
    """The 5-bit logarithmic frequencies that fit `counts` best; 0 only for a symbol that does not occur."""
    weights = np.asarray(WEIGHTS[1:], np.float64)
    wanted = np.maximum(counts / max(int(counts.max()), 1) * weights[-1], 1)
    nearest = np.abs(np.log(wanted)[:, None] - np.log(weights)).argmin(1) + 1
    return np.where(counts > 0, nearest, 0)


def frequencies(level: Integers) -> Integers:
    """Integer frequencies that add up to M, from the levels alone; at least 1 for each symbol that occurs."""
    weights = np.asarray(WEIGHTS, np.int64)[level]
    used = weights > 0
    share = weights * (M - int(used.sum())) // max(int(weights.sum()), 1)
    frequency = np.where(used, 1 + share, 0)
    frequency[weights.argmax()] += M - int(frequency.sum())
    return frequency


def coded_bits(symbols: Integers, bits: int) -> int:
    """How many bits `encode(symbols, bits)` returns, by formula; where it cannot, more than plain writing takes.

    >>> coded_bits(np.zeros(4096, np.uint16), 4)  # 80 for the table, 38 for the state, 16 for 4096 equal symbols
    134
    """
    if bits > MAX_BITS or symbols.size == 0:
        return symbols.size * bits + 1
    counts = np.bincount(symbols.ravel(), minlength=1 << bits)
    return LEVEL_BITS * counts.size + body_bits(counts, frequencies(levels(counts)))


def body_bits(counts: Integers, frequency: Integers) -> int:
    """The bits of the states and the words, without the table."""
    count, seen = int(counts.sum()), counts > 0
    cost = math.fsum(counts[seen] * (PRECISION - np.log2(frequency[seen])))
    return 16 * math.ceil((cost + count * math.log2(1 + M / LOW)) / 16) + STATE_BITS * lanes(count)


def encode(symbols: Integers, bits: int) -> NDArray[np.uint8]:
    """The table, the states and the words as an array of zeros and ones (lowest bit first)."""
    symbols = symbols.ravel()
    counts = np.bincount(symbols, minlength=1 << bits)
    level = levels(counts)
    frequency = frequencies(level)
    start = np.cumsum(frequency) - frequency
    lane_count = lanes(symbols.size)
    states, words = [LOW] * lane_count, []
    chosen, first = frequency[symbols].tolist(), start[symbols].tolist()
    for i in range(symbols.size - 1, -1, -1):  # last in, first out
        x, f, lane = states[i % lane_count], chosen[i], i % lane_count
        if x >= f << (STATE_BITS - PRECISION):
            words.append(x & 0xFFFF)
            x >>= 16
        states[lane] = x // f * M + first[i] + x % f
    padded = np.zeros((body_bits(counts, frequency) - STATE_BITS * lane_count) // 16, np.int64)
    padded[: len(words)] = words[::-1]
    return np.concatenate(
        [to_bits(level, LEVEL_BITS), to_bits(np.asarray(states, np.int64), STATE_BITS), to_bits(padded, 16)]
    )


def decode(stream: NDArray[np.uint8], count: int, bits: int) -> Integers:
    """`count` symbols back from what `encode` returned.

    Raises:
        ValueError: if the stream is not one that `encode` writes.
    """
    lane_count, table = lanes(count), LEVEL_BITS << bits
    body = stream.size - table - STATE_BITS * lane_count
    if body < 0 or body % 16:
        raise ValueError(f"decode: a coded stream of {count} symbols cannot have {stream.size} bits. It is damaged.")
    level = from_bits(stream[:table], LEVEL_BITS)
    if not level.any():
        raise ValueError("decode: a coded stream needs a symbol with a frequency, got none. It is damaged.")
    frequency = frequencies(level)
    start = np.cumsum(frequency) - frequency
    symbol_at = np.repeat(np.arange(frequency.size), frequency)
    states = from_bits(stream[table : table + STATE_BITS * lane_count], STATE_BITS)
    # Zeros behind the last word: reading past the end is found by the check below, not at every step.
    words = np.concatenate([from_bits(stream[table + STATE_BITS * lane_count :], 16), np.zeros(lane_count, np.int64)])
    steps = _decode_numpy if lane_count >= 64 else _decode_python
    symbols, states, read = steps(count, states, words, symbol_at, frequency, start)
    if read > words.size - lane_count or (states != LOW).any() or words[read:].any():
        raise ValueError("decode: a coded stream must end where it began, and this one does not. It is damaged.")
    return symbols


def _decode_python(
    count: int, states: Integers, words: Integers, symbol_at: Integers, frequency: Integers, start: Integers
) -> tuple[Integers, Integers, int]:
    xs, queue, at, fs, cs = states.tolist(), words.tolist(), symbol_at.tolist(), frequency.tolist(), start.tolist()
    lane_count, read, last, symbols = len(xs), 0, words.size - 1, [0] * count
    for i in range(count):
        x = xs[i % lane_count]
        low = x & (M - 1)
        symbols[i] = s = at[low]
        x = fs[s] * (x >> PRECISION) + low - cs[s]
        if x < LOW:
            x = x << 16 | queue[min(read, last)]
            read += 1
        xs[i % lane_count] = x
    return np.asarray(symbols, np.int64), np.asarray(xs, np.int64), read


def _decode_numpy(
    count: int, states: Integers, words: Integers, symbol_at: Integers, frequency: Integers, start: Integers
) -> tuple[Integers, Integers, int]:
    lane_count, read = states.size, 0
    symbols = np.zeros(-(-count // lane_count) * lane_count, np.int64)
    for i in range(0, count, lane_count):
        x = states[: count - i]
        low = x & (M - 1)
        s = symbol_at[low]
        symbols[i : i + s.size] = s
        x = frequency[s] * (x >> PRECISION) + low - start[s]
        hungry = np.flatnonzero(x < LOW)
        x[hungry] = x[hungry] << 16 | words[np.minimum(read + np.arange(hungry.size), words.size - 1)]
        read += hungry.size
        states[: x.size] = x
    return symbols[:count], states, read


def to_bits(numbers: Integers, bits: int) -> NDArray[np.uint8]:
    """Non-negative integers as zeros and ones, `bits` each, lowest first.

    >>> to_bits(np.array([1, 6]), 3)
    array([1, 0, 0, 0, 1, 1], dtype=uint8)
    """
    numbers = np.asarray(numbers).ravel()
    out = np.empty((numbers.size, bits), np.uint8)
    for b in range(bits):
        out[:, b] = numbers >> b & 1
    return out.ravel()


def from_bits(stream: NDArray[np.uint8], bits: int) -> NDArray[np.int64]:
    """The integers that `to_bits` wrote.

    >>> from_bits(np.array([1, 0, 0, 0, 1, 1], np.uint8), 3)
    array([1, 6])
    """
    table = stream.reshape(-1, bits)
    numbers = np.zeros(len(table), np.int64)
    for b in range(bits):
        numbers |= table[:, b].astype(np.int64) << b
    return numbers
