"""Elementwise work over operands in different orders: transpose square tiles first, then loop over all alike."""

from __future__ import annotations

from collections.abc import Sequence

from lilliput.engine.kernels.planes import shuffle
from lilliput.engine.kernels.product import vector_types
from lilliput.engine.size import fixed
from lilliput.engine.target import Target

TILE = 16

TURN = """
/* to[j, i] = from[i, j] for i below rows and j below columns; both lie with j, or i, innermost. */
static inline void turn(float *restrict to, int64_t to_stride, const float *restrict from, int64_t from_stride,
                        int rows, int columns)
{
%s    for (int i = 0; i < rows; i++)
        for (int j = i < whole ? columns / 4 * 4 : 0; j < columns; j++)
            to[j * to_stride + i] = from[i * from_stride + j];
}
"""
BLOCKS = """\
    const int whole = rows / 4 * 4;
    for (int j = 0; j + 4 <= columns; j += 4) {
        for (int i = 0; i + 4 <= rows; i += 4) {
            const float *in = from + i * from_stride + j;
            const f32x4 a = *(const f32x4 *)in, b = *(const f32x4 *)(in + from_stride);
            const f32x4 c = *(const f32x4 *)(in + 2 * from_stride), d = *(const f32x4 *)(in + 3 * from_stride);
            const f32x4 p = shuffle_f32x4(a, b, 0, 4, 1, 5), q = shuffle_f32x4(c, d, 0, 4, 1, 5);
            const f32x4 r = shuffle_f32x4(a, b, 2, 6, 3, 7), s = shuffle_f32x4(c, d, 2, 6, 3, 7);
            float *out = to + j * to_stride + i;
            *(f32x4 *)out = shuffle_f32x4(p, q, 0, 1, 4, 5);
            *(f32x4 *)(out + to_stride) = shuffle_f32x4(p, q, 2, 3, 6, 7);
            *(f32x4 *)(out + 2 * to_stride) = shuffle_f32x4(r, s, 0, 1, 4, 5);
            *(f32x4 *)(out + 3 * to_stride) = shuffle_f32x4(r, s, 2, 3, 6, 7);
        }
    }
"""


def helpers(target: Target) -> tuple[str, ...]:
    """The C text of `turn`."""
    if target.vector_bytes < 16:
        return (TURN.lstrip() % "    const int whole = 0;\n",)
    return vector_types(4), shuffle(4), TURN.lstrip() % BLOCKS


def turned(sizes: Sequence[int], strides: Sequence[Sequence[int]], outputs: int) -> tuple[int, list[int]] | None:
    """(the loop that they run along, the operands) of inputs that lie across the innermost loop; None for none.

    Args:
        strides: Of each operand along the loops, the outputs' first.
    """
    if len(sizes) < 2 or any(s[-1] != 1 for s in strides[:outputs]) or sizes[-1] < 4:
        return None
    across = [i for i, s in enumerate(strides) if i >= outputs and not (fixed(s[-1]) and s[-1] in (0, 1))]
    loops = {next((d for d, step in enumerate(strides[i][:-1]) if step == 1 and fixed(step)), -1) for i in across}
    if len(loops) != 1 or min(loops) < 0:
        return None
    loop = loops.pop()
    return (loop, across) if sizes[loop] >= 4 else None
