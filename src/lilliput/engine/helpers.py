"""C helpers that generated code calls: each text stands once in a file that needs it."""

from __future__ import annotations

HELPERS: dict[str, str] = {}


def helper(name: str, text: str) -> str:
    """Register the C text of a helper under a name that expressions and kernels ask for it by."""
    HELPERS[name] = text.strip("\n") + "\n"
    return HELPERS[name]


helper("div", """
/* Integer division as ONNX has it: towards zero, and defined where C leaves it open. */
static inline int64_t div_int64(int64_t a, int64_t b) { return b == 0 ? 0 : b == -1 ? (int64_t)(0u - (uint64_t)a) : a / b; }
static inline int32_t div_int32(int32_t a, int32_t b) { return (int32_t)div_int64(a, b); }
static inline int8_t div_int8(int8_t a, int8_t b) { return (int8_t)div_int64(a, b); }
static inline uint8_t div_uint8(uint8_t a, uint8_t b) { return b == 0 ? 0 : (uint8_t)(a / b); }
""")
