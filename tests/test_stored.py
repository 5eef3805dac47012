"""A stored tensor decodes to what its numbers say, and its size is a formula that needs no file."""

import hashlib
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lilliput.stored import ans
from lilliput.stored.base import limits
from lilliput.stored.einsum import product
from lilliput.stored.entropy import coded_bits, decode, encode, frequencies, levels
from lilliput.stored.grid import Grid, half
from lilliput.stored.plain import Plain
from lilliput.stored.positions import position_bits
from lilliput.stored.sparse import Sparse

draw = np.random.default_rng(0)


def grid(shape=(8, 12), bits=4, per="channel", affine=False, seed=0):
    draw = np.random.default_rng(seed)
    low, high = limits(bits, affine)
    codes = draw.integers(low, high + 1, shape)
    group = per if isinstance(per, int) else None
    scale_shape = {"tensor": (1,) * len(shape), "channel": (shape[0],) + (1,) * (len(shape) - 1)}.get(
        per, (shape[0], codes.size // shape[0] // (group or 1), 1)
    )
    scale = half(draw.random(scale_shape) + 0.01)
    zero = draw.integers(low, high + 1, scale_shape) if affine else None
    return Grid(codes, bits, scale, zero, group)


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("per", ["tensor", "channel", 4])
def test_grid_decodes_codes_minus_zero_times_scale(bits, per):
    g = grid(bits=bits, per=per, affine=True)
    scale, zero = (np.broadcast_to(x, g.grouped).reshape(g.shape) for x in (g.scale, g.zero_point))
    assert np.array_equal(g.decode(), (g.codes - zero).astype(np.float32) * scale)
    assert g.decode().dtype == np.float32


def test_grid_bits_are_codes_scales_and_zero_points():
    assert grid((8, 12), 3, "channel").storage().bits == 96 * 3 + 8 * 16
    assert grid((8, 12), 3, 4, affine=True).storage().bits == 96 * 3 + 24 * (16 + 3)
    assert grid((8, 12), 3).storage().size_bytes == -(-(96 * 3 + 128) // 8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 1}, "bits must be"),
        ({"codes": np.full((2, 4), 9)}, "must lie in"),
        ({"codes": np.ones((2, 4))}, "must be integers"),
        ({"scale": np.array(0.1)}, "exact in float16"),
        ({"scale": half(np.ones((3, 1)))}, "must broadcast"),
        ({"group": 3}, "must divide"),
        ({"zero_point": np.array(9)}, "zero_point must be"),
    ],
)
def test_grid_says_what_must_hold(change, message):
    good = {"codes": np.ones((2, 4), np.int64), "bits": 4, "scale": half(1.0)}
    if "zero_point" in change:
        change = {**change, "bits": 3}
    with pytest.raises(ValueError, match=message):
        Grid(**{**good, **change})


def test_half_never_rounds_a_scale_to_zero_or_infinity():
    scale = half([1e-30, 0.0, 1e30, 0.1])
    assert scale[0] > 0 and scale[1] == 0 and np.isfinite(scale).all()
    assert (scale == scale.astype(np.float16)).all()


def test_plain_integers_take_the_bits_of_their_range():
    assert Plain(np.arange(100, 116)).storage().bits == 16 * 4
    assert Plain(np.array([True, False])).storage().bits == 2
    assert Plain(np.full(1000, 7)).storage().bits == 0


def test_sparse_places_kept_entries_in_c_order():
    mask = draw.random((5, 6)) < 0.3
    kept = draw.standard_normal(mask.sum()).astype(np.float32)
    whole = np.zeros(mask.shape, np.float32)
    whole[mask] = kept
    assert np.array_equal(Sparse(mask, Plain(kept)).decode(), whole)
    # The same from a tensor of full shape, whose entries outside of the mask are not stored.
    full = np.where(mask, whole, np.float32(9))
    sparse = Sparse(mask, Plain(full))
    assert np.array_equal(sparse.decode(), whole)
    assert dict((n, c * b) for n, c, b in sparse.storage().parts)["values"] == 32 * kept.size


@pytest.mark.parametrize("sparsity, way", [(0.5, "bitmap"), (0.995, "gaps")])
def test_positions_take_the_cheapest_way(sparsity, way):
    mask = np.random.default_rng(1).random(400) >= sparsity
    mask[-1] = True
    way_taken, bits = position_bits(mask)
    assert way_taken.startswith(way) and bits <= 400


def test_two_of_four_costs_three_bits_a_group():
    rng = np.random.default_rng(0)
    mask = np.concatenate([rng.permutation([True, True, False, False]) for _ in range(60)])
    assert position_bits(mask) == ("2:4", 180)


def test_blocks_cost_one_position_each():
    kept = np.random.default_rng(0).random((4, 4)) < 0.5
    mask = np.repeat(np.repeat(kept, 4, 0), 2, 1)
    values = Plain(np.ones(int(mask.sum()), np.float32))
    positions = {n: b for n, _, b in Sparse(mask, values, (4, 2)).storage().parts}["positions"]
    assert positions <= 16
    with pytest.raises(ValueError, match="constant over blocks"):
        Sparse(np.eye(4, dtype=bool), Plain(np.ones(4, np.float32)), (2, 2))


def test_product_is_the_matrix_product_of_its_factors():
    u, v = draw.standard_normal((6, 2)).astype(np.float32), draw.standard_normal((2, 12)).astype(np.float32)
    made = product((Plain(u), Plain(v)), (6, 3, 4))
    assert np.allclose(made.decode(), (u @ v).reshape(6, 3, 4), atol=1e-6)
    assert made.storage().bits == 36 * 32
    with pytest.raises(ValueError, match="must multiply"):
        product((Plain(u), Plain(u)), (6, 3, 4))


@pytest.mark.parametrize("count", [1, 300, 40_000])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_entropy_coder_is_exact_and_as_long_as_its_formula(count, bits):
    symbols = np.clip(np.random.default_rng(count).normal(2 ** (bits - 1), 2**bits / 8, count), 0, 2**bits - 1)
    symbols = symbols.astype(np.uint16)
    stream = encode(symbols, bits)
    assert stream.size == coded_bits(symbols, bits)
    assert np.array_equal(decode(stream, count, bits), symbols)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    st.integers(1, 8).flatmap(
        lambda b: st.tuples(
            st.just(b), st.lists(st.tuples(st.integers(0, 2**b - 1), st.integers(1, 2000)), min_size=1, max_size=12)
        )
    )
)
def test_entropy_coder_never_needs_more_than_its_formula(case):
    bits, runs = case
    symbols = np.repeat(*np.array(runs).T).astype(np.uint16)
    stream = encode(symbols, bits)
    assert stream.size == coded_bits(symbols, bits)
    assert np.array_equal(decode(stream, symbols.size, bits), symbols)
    frequency = frequencies(levels(np.bincount(symbols, minlength=1 << bits)))
    words = ans.push(symbols, frequency)
    assert np.array_equal(words, ans.write(symbols, frequency)), "Python writes what the library writes"
    again, empty = ans.pull(words, frequency, symbols.size)
    assert empty and np.array_equal(again, symbols)


def test_entropy_coder_costs_a_table_and_four_bytes_for_equal_symbols():
    assert coded_bits(np.full(100, 3, np.uint16), 2) <= 5 * 4 + 26
    assert coded_bits(np.zeros(0, np.uint16), 4) > 0 and coded_bits(np.zeros(100, np.uint16), 9) > 900


@pytest.mark.parametrize("library", [True, False])
def test_a_stream_means_the_same_with_every_version_of_the_library_and_without_it(library, monkeypatch):
    if not library:
        monkeypatch.setitem(sys.modules, "constriction", None)
    digest = hashlib.sha256()
    for bits in range(1, 9):
        symbols = np.arange(3000) ** 2 // 7 % 2**bits // (1 + bits % 2)
        stream = encode(symbols, bits)
        digest.update(stream.tobytes())
        assert np.array_equal(decode(stream, 3000, bits), symbols)
    assert digest.hexdigest()[:16] == "a7595a7eb8078aae"


def test_entropy_coder_comes_close_to_the_entropy():
    symbols = np.random.default_rng(0).binomial(1, 0.1, 20_000).astype(np.uint16)
    p = symbols.mean()
    entropy = -symbols.size * (p * np.log2(p) + (1 - p) * np.log2(1 - p))
    assert entropy <= coded_bits(symbols, 1) < 1.02 * entropy


@pytest.mark.parametrize("library", [True, False])
def test_entropy_coder_refuses_a_changed_stream(library, monkeypatch):
    if not library:
        monkeypatch.setitem(sys.modules, "constriction", None)
    symbols = np.random.default_rng(0).integers(0, 4, 500).astype(np.uint16)
    stream = encode(symbols, 3)
    for at in range(40, stream.size, 97):
        broken = stream.copy()
        broken[at] ^= 1
        try:
            assert not np.array_equal(decode(broken, 500, 3), symbols)
        except ValueError as error:
            assert "damaged" in str(error)


@pytest.mark.parametrize("library", [True, False])
def test_entropy_coder_refuses_or_decodes_whatever_it_is_given(library, monkeypatch):
    if not library:
        monkeypatch.setitem(sys.modules, "constriction", None)
    rng = np.random.default_rng(0)
    for count in range(400):
        bits, stream = int(rng.integers(0, 20)), rng.integers(0, 2, int(rng.integers(0, 200))).astype(np.uint8)
        try:
            symbols = decode(stream * (count % 5 > 0), count, bits)
        except ValueError as error:
            assert "damaged" in str(error)
        else:
            assert symbols.size == count and (symbols >> bits == 0).all()
