"""C helper functions that generated code calls: each is written once into a file that needs it.

The functions of an element are polynomials (or their quotients) fitted for the least largest relative error. They have
no branch and call nothing, so that the loop which calls them becomes vector instructions; where float32 ends they are
what the C library's are (infinities, NaN), except that exp is 0 where the result would be below the normal numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

HELPERS: dict[str, str] = {}
CALLS: dict[str, tuple[str, ...]] = {}


def helper(name: str, text: str, calls: Sequence[str] = ()) -> str:
    """Register the C text of a helper under a name that expressions and kernels ask for it by.

    Args:
        calls: The helpers that it calls itself.
    """
    HELPERS[name] = text.strip("\n") + "\n"
    CALLS[name] = tuple(calls)
    return HELPERS[name]


def with_needed(name: str) -> list[str]:
    """The names of a helper and of those that it calls, in the order in which C must see them."""
    needed = [inner for called in CALLS.get(name, ()) for inner in with_needed(called)]
    return [*dict.fromkeys(needed), name]


def texts(*names: str) -> tuple[str, ...]:
    """The C texts of helpers and of those that they call."""
    return tuple(HELPERS[inner] for inner in dict.fromkeys(i for name in names for i in with_needed(name)))


helper(
    "div",
    """
/* Integer division as ONNX has it: towards zero, and defined where C leaves it open. */
static inline int64_t div_int64(int64_t a, int64_t b)
{
    return b == 0 ? 0 : b == -1 ? (int64_t)(0u - (uint64_t)a) : a / b;
}
static inline int32_t div_int32(int32_t a, int32_t b) { return (int32_t)div_int64(a, b); }
static inline int8_t div_int8(int8_t a, int8_t b) { return (int8_t)div_int64(a, b); }
static inline uint8_t div_uint8(uint8_t a, uint8_t b) { return b == 0 ? 0 : (uint8_t)(a / b); }
""",
)
helper(
    "mod",
    """
/* Remainders: with the sign of a, or of b; 0 where b is 0. */
static inline int64_t fmod_int64(int64_t a, int64_t b) { return b == 0 || b == -1 ? 0 : a % b; }
static inline int64_t mod_int64(int64_t a, int64_t b)
{
    const int64_t r = fmod_int64(a, b);
    return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}
static inline float mod_float(float a, float b)
{
    const float r = fmodf(a, b);
    return r != 0.0f && (r < 0.0f) != (b < 0.0f) ? r + b : r;
}
""",
)
helper(
    "power",
    """
/* a to the power b, wrapping; 0 where it would be a fraction. */
static inline int64_t power_int64(int64_t a, int64_t b)
{
    uint64_t result = 1, factor = (uint64_t)a;
    if (b < 0) return a == 1 ? 1 : a == -1 ? (b % 2 ? -1 : 1) : 0;
    for (; b; b >>= 1) {
        if (b & 1) result *= factor;
        factor *= factor;
    }
    return (int64_t)result;
}
""",
)
helper(
    "to_int",
    """
/* Towards zero; what does not fit becomes the nearest that does, NaN the least. */
static inline int32_t to_int32(float x)
{
    x = x > -2147483648.0f ? x : -2147483648.0f;
    return (int32_t)(x < 2147483520.0f ? x : 2147483520.0f);
}
static inline int64_t to_int64(float x)
{
    x = x > -9223372036854775808.0f ? x : -9223372036854775808.0f;
    return (int64_t)(x < 9223371487098961920.0f ? x : 9223371487098961920.0f);
}
""",
)
helper(
    "bits",
    """
/* A float's bits, and back. */
static inline float from_bits(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
""",
)
helper(
    "exp",
    """
/* e^x = 2^n e^r with n whole and |r| <= ln(2) / 2; adding 1.5 * 2^23 rounds to n and leaves it in the low bits. */
static inline float fast_exp(float x)
{
    x = x < -87.5f ? -87.5f : x;
    x = x > 89.0f ? 89.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const float p = 1.0f + (r + r * r * (0.499992281f + r * (0.166671172f + r * (0.041890651f + r * 0.00831246749f))));
    return p * from_bits((bits_of(shifted) << 23) + (126u << 23)) * 2.0f;
}
""",
    ["bits"],
)
helper(
    "exp_falling",
    """
/* e^x in the same way, for x that is not above 0. */
static inline float fast_exp_falling(float x)
{
    x = x < -88.0f ? -88.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const float p = 1.0f + (r + r * r * (0.499992281f + r * (0.166671172f + r * (0.041890651f + r * 0.00831246749f))));
    return p * from_bits((bits_of(shifted) << 23) + (127u << 23));
}
""",
    ["bits"],
)
helper(
    "log_series",
    """
/* ln(1 + f) with 1 + f between sqrt(1/2) and sqrt(2). */
static inline float log_series(float f)
{
    const float p = 0.333333313f + f * (-0.250008196f + f * (0.200012267f + f * (-0.166233569f
        + f * (0.142017588f + f * (-0.13160184f + f * (0.12761572f + f * -0.0763448551f))))));
    return f + f * f * (f * p - 0.5f);
}
""",
)
helper(
    "log",
    """
/* ln(2^e (1 + f)). */
static inline float fast_log(float x)
{
    const int small = x < 1.17549435e-38f;
    const uint32_t bits = bits_of(small ? x * 8388608.0f : x) - 0x3f3504f3u;
    const float e = (float)((int32_t)bits >> 23) - (small ? 23.0f : 0.0f);
    const float f = from_bits((bits & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
    const float y = e * 0.693359375f + (log_series(f) - e * 2.12194440e-4f);
    return x > 3.4028235e38f ? x : x > 0.0f ? y : x == 0.0f ? -INFINITY : NAN;
}
""",
    ["bits", "log_series"],
)
helper(
    "tanh",
    """
/* x P(x^2) / Q(x^2); it is 1 from 9.08 on. */
static inline float fast_tanh(float x)
{
    x = x < -9.08f ? -9.08f : x;
    x = x > 9.08f ? 9.08f : x;
    const float t = x * x;
    return x * (1.0f + t * (0.133744717f + t * (0.00348780747f + t * (2.04811331e-05f + t * 1.31774591e-08f))))
        / (1.0f + t * (0.467077851f + t * (0.0258473754f + t * (0.000327291462f + t * 7.70401812e-07f))));
}
""",
)
helper(
    "erf",
    """
/* x P(x^2) / Q(x^2); it is 1 from 3.93 on. */
static inline float fast_erf(float x)
{
    x = x < -3.93f ? -3.93f : x;
    x = x > 3.93f ? 3.93f : x;
    const float t = x * x;
    return x * (1.12837911f + t * (0.202585012f + t * (0.0509235412f + t * (0.00380793423f
        + t * (0.000143811747f + t * (-1.95091434e-06f + t * 1.9603835e-08f))))))
        / (1.0f + t * (0.512867808f + t * (0.116095386f + t * (0.0145759312f + t * 0.000979869743f))));
}
""",
)
helper(
    "sigmoid",
    """
static inline float fast_sigmoid(float x) { return 1.0f / (1.0f + fast_exp(-x)); }
""",
    ["exp"],
)
helper(
    "softplus",
    """
/* ln(1 + e^x) = max(x, 0) + ln(1 + e) with e = e^-|x|, halved where 1 + e is above sqrt(2). */
static inline float fast_softplus(float x)
{
    const float e = fast_exp_falling(-fabsf(x));
    const int large = e > 0.41421356f;
    return (x < 0.0f ? 0.0f : x) + (log_series(large ? 0.5f * e - 0.5f : e) + (large ? 0.693147181f : 0.0f));
}
""",
    ["exp_falling", "log_series"],
)
