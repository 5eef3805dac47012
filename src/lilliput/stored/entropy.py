"""Entropy coding of small integers with a length that is known in advance.

Symbols are coded by the library constriction (asymmetric numeral systems), under a table of 5-bit logarithms of their
frequencies, which costs about 0.01 bits a symbol. The library rounds probabilities to multiples of 2^-24, so a symbol
of the rounded probability p_s takes log2(1 / p_s) bits. Its state x begins at 0; a step takes x + 2^24 to at most
(x + 2^24) / p_s, and where a 32-bit word leaves first, to at most 1 + 2^-7 times that. So c_s symbols of each s take at
most

    25 + H + W log2(1 + 2^-7),     H = sum_s c_s log2(1 / p_s),     W <= H / 31     bits

besides the table. The writer fills up to exactly that, which makes the length a formula of the counts.

Source: R. Bamler, Understanding entropy coding with asymmetric numeral systems, 2022, arXiv:2201.01741.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lilliput.errors import ExportError
from lilliput.stored import ans
from lilliput.stored.bits import Bits, from_bits, to_bits

M = 1 << 12  # what frequencies add up to: few enough bits that no float64 in the library is ever rounded
LEVEL_BITS = 5
MAX_BITS = 8
# Logarithmic steps, written out: no machine's pow() may change what a file means.
WEIGHTS = np.array([0, 1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 28, 37, 49, 64, 84, 111, 147, 194, 256,
                    338, 446, 588, 776, 1024, 1351, 1783, 2353, 3104, 4096, 5405, 7132])  # fmt: skip

Integers = NDArray[Any]


def levels(counts: Integers) -> Integers:
    """The 5-bit logarithmic frequencies that fit `counts` best; 0 only for a symbol that does not occur."""
    wanted = np.maximum(counts / max(int(counts.max()), 1) * WEIGHTS[-1], 1)
    return np.where(counts > 0, np.abs(np.log(wanted)[:, None] - np.log(WEIGHTS[1:])).argmin(1) + 1, 0)


def frequencies(level: Integers) -> Integers:
    """Integer frequencies that add up to M, from the levels alone; at least 1 for each symbol that occurs."""
    weights = WEIGHTS[level]
    share = weights * (M - np.count_nonzero(weights)) // max(int(weights.sum()), 1)
    frequency = np.where(weights > 0, 1 + share, 0)
    frequency[weights.argmax()] += M - int(frequency.sum())
    return frequency


def body_bits(counts: Integers, frequency: Integers) -> int:
    """The most bits that the library takes for `counts[s]` symbols s, without the table."""
    information = math.fsum(counts * (ans.MODEL_BITS - np.log2(np.diff(ans.edges(frequency), prepend=0))))
    return 25 + math.ceil(information * (1 + math.log2(1 + 2**-7) / 31))


def coded_bits(symbols: Integers, bits: int) -> int:
    """How many bits `encode(symbols, bits)` returns, by formula; where it cannot, more than plain writing takes.

    Example:
        >>> coded_bits(np.zeros(4096, np.uint16), 4)  # 80 for the table, 25 for the state, 1 for 4096 equal symbols
        106
    """
    if bits > MAX_BITS or symbols.size == 0:
        return symbols.size * bits + 1
    counts = np.bincount(symbols.ravel(), minlength=1 << bits)
    return LEVEL_BITS * counts.size + body_bits(counts, frequencies(levels(counts)))


def encode(symbols: Integers, bits: int) -> Bits:
    """The table and the coded symbols as an array of zeros and ones (lowest bit first).

    Raises:
        ExportError: if the library takes more than `coded_bits`; what it then wrote could not be read.
    """
    counts = np.bincount(symbols.ravel(), minlength=1 << bits)
    level = levels(counts)
    frequency = frequencies(level)
    body = np.unpackbits(ans.write(symbols.ravel(), frequency).astype("<u4").view(np.uint8), bitorder="little")
    room = body_bits(counts, frequency)
    if body[room:].any():
        raise ExportError(f"encode: constriction must stay within {room} bits, and did not. Use its version 0.5.0.")
    return np.concatenate([to_bits(level, LEVEL_BITS), np.pad(body[:room], (0, max(room - body.size, 0)))])


def decode(stream: Bits, count: int, bits: int) -> Integers:
    """`count` symbols back from what `encode` returned.

    Raises:
        ValueError: if the stream is not one that `encode` writes.
    """
    table = LEVEL_BITS << bits
    if not 1 <= bits <= MAX_BITS or stream.size <= table or not stream[:table].any():
        raise ValueError(f"decode: {stream.size} bits must hold a table for {bits}-bit symbols. They are damaged.")
    frequency = frequencies(from_bits(stream[:table], LEVEL_BITS))
    words = np.packbits(np.pad(stream[table:], (0, (table - stream.size) % 32)), bitorder="little").view("<u4")
    return ans.read(np.trim_zeros(words, "b").astype(np.uint32), frequency, count)
