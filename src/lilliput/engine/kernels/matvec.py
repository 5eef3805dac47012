"""Multiply a constant matrix by a vector, y = W x, the inner loop of recurrent networks: several ways to store W.

Outputs are the lanes of a vector, so that nothing is summed across lanes. A dense matrix is read once for each
product, and what limits it is how fast the second-level cache gives it out; so one way keeps it as floats of 24 bits.
Zeros are skipped by elements, or by blocks of neighbouring outputs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lilliput.engine.graph import Array, Narrow
from lilliput.engine.kernels.matvec_dense import dense
from lilliput.engine.kernels.matvec_sparse import sparse
from lilliput.engine.kernels.matvec_way import MatVec
from lilliput.engine.target import Target


def ways(weight: Array, narrow: Narrow | None, target: Target) -> Iterator[MatVec]:
    """The ways for a matrix (out, in)."""
    weight = np.ascontiguousarray(weight, np.float32)
    yield from dense(weight, narrow, target)
    yield from sparse(weight, np.count_nonzero(weight) / max(weight.size, 1), target)
