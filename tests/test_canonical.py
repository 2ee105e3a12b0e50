"""Canonical order: the same bits on any number of ranks, for any layout and any number of threads; without MPI.

Ranks are simulated by dealt_out.py.
"""

import dealt_out
import numpy as np
import oracle
import pytest
from cases import covering
from dealt_out import NAMES, Problem, assert_same

from ringmpi import BackendError, OptionError
from ringmpi.backends import HOST_NAMES, open_backend
from ringmpi.backends.numba_ import amx, tile_workspace, workspace
from ringmpi.backends.numba_ import backend as numba_
from ringmpi.backends.numba_.vector import machine
from ringmpi.dtypes import DTYPES, TOLERANCE
from ringmpi.score import Score
from ringmpi.softmax import Gradient

SIZES = 1, 2, 3, 4, 5, 7, 8, 16
LAYOUTS = "striped", "uneven", "empty", "custom", "zigzag", "contiguous"
MASKS = "full", "causal", "window", "documents", "first", "all", "grid"
N_Q, N_K = 900, 1300                 # of a Problem: 7 tiles of keys, the last one not whole; of 8 ranks some have none
needs_tiles = pytest.mark.skipif(bool(amx.missing()), reason=f"no tiles: {amx.missing()}")


def compute(problem, size, kind, threads, canonical=True, products="auto"):
    """Give out, lse, dq, dk and dv as `size` ranks would compute them."""
    backend = open_backend("numba", threads, canonical=canonical)
    backend.settle(products, [backend.ways])
    try:
        return dealt_out.compute(backend, problem, size, kind)
    finally:
        backend.close()


def check_sizes(problem, kinds, sizes=SIZES, **options):
    """Compare all sizes with one rank: out, lse, dq, dk and dv, bit by bit."""
    want = compute(problem, 1, "contiguous", 1, **options)
    for number, size in enumerate(sizes):
        for kind in kinds(number):
            assert_same(compute(problem, size, kind, 1 + number % 3, **options), want)
    return want


def one_of(number):
    return [LAYOUTS[number % len(LAYOUTS)]]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_same_bits_on_any_number_of_ranks(dtype, mask):
    check_sizes(Problem(dtype, mask, seed=MASKS.index(mask)), one_of, products="widen")


@needs_tiles
@pytest.mark.parametrize("mask", MASKS)
def test_same_bits_on_tiles(mask):
    check_sizes(Problem("bfloat16", mask, seed=MASKS.index(mask)), one_of, products="tiles")


@needs_tiles
@pytest.mark.parametrize("mask", MASKS)
def test_same_bits_in_pieces(mask):
    """float32, with numbers that do not go in pieces, in queries, keys and values, among many that do."""
    problem = Problem("float32", mask, seed=MASKS.index(mask))
    problem.q[[3, 500]] *= np.float32(1e20)
    problem.k[[100, 1290], 1] *= np.float32(-1e20)
    problem.v[[5, 700], 0] *= np.float32(1e-25)
    problem.v[333, 1, 3] = np.inf
    check_sizes(problem, one_of, (2, 3, 7), products="auto")


@needs_tiles
@pytest.mark.parametrize("case", [{"lengths": (5, 3000)}, {"lengths": (700, 1)}, {"dims": (70, 33)}, {"heads": (7, 7)}],
                         ids=str)
def test_tiles(case):
    """Few rows, which canonical order puts on tiles too; dims that are not whole tiles; capped scores."""
    problem = Problem("bfloat16", "full" if "lengths" in case else "window", **case)
    problem.score = Score(0.25, softcap=2.0)
    check_sizes(problem, one_of, (2, 5), products="tiles")


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", covering({
    "dtype": list(DTYPES), "mask": MASKS, "heads": [(4, 4), (8, 2), (3, 1)], "dims": [(64, 64), (17, 33)],
    "scored": [False, True]}), ids=lambda case: "-".join(map(str, case.values())))
def test_same_bits_however_dealt_out(case):
    check_sizes(Problem(**case), lambda _: LAYOUTS[:3])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [(3, 1), (7, 7)])
def test_score_functions_and_sinks(heads, dtype):
    check_sizes(Problem(dtype, "first", heads, (17, 9), scored=True), one_of, (2, 5, 16))


@needs_tiles
def test_softcap_and_dims_on_tiles():
    """Where queries and keys share key heads unequally, and numbers fill no tile."""
    problem = Problem("bfloat16", "first", (3, 1), (33, 65))
    problem.score = Score(0.25, 3.0)
    check_sizes(problem, one_of, (2, 5, 16), products="tiles")


@pytest.mark.skipif(not machine().pairs, reason="no AVX512_BF16")
def test_pairs_of_bfloat16():
    check_sizes(Problem("bfloat16", "causal"), one_of, (2, 5), products="pairs")


@pytest.mark.parametrize("products", ["widen", *["pairs"] * machine().pairs, *["tiles"] * (not amx.missing())])
@pytest.mark.parametrize("mask", ["full", "window"])
def test_numbers_that_are_not_finite(mask, products):
    """Rows that see a NaN go another way than rows that don't, whichever rows stand beside them."""
    problem = Problem("bfloat16", mask)
    problem.v[[5, 700]] = np.nan
    problem.v[333, 0, 3] = np.inf
    problem.k[[900, 1290], 1] = -np.inf
    problem.q[7] = np.nan
    want = check_sizes(problem, one_of, (2, 3, 7), products=products)
    assert np.isnan(want["out"].astype(float)).any()
    assert mask == "full" or np.isfinite(want["out"].astype(float)).any()


def test_few_queries_and_keys():
    """One query, or one key; no thread splits them."""
    for lengths in ((1, 3000), (7, 3000), (3000, 1), (200, 5)):
        check_sizes(Problem("float32", "full", lengths=lengths), one_of, (2, 3, 16))


def test_numbers_that_vanish():
    """Products below the smallest number leave 0 of either sign: it must not tell what was seen beside them."""
    for dtype in ("float32", "bfloat16"):
        problem = Problem(dtype, "window")
        problem.v[:] = (problem.v.astype(float) * 1e-42).astype(problem.v.dtype)
        problem.v[::3] = -1e-45 if dtype == "float32" else -9.2e-41
        check_sizes(problem, one_of, (2, 3, 7))


@needs_tiles
def test_numbers_that_vanish_on_tiles():
    """The same where products of numbers that do not vanish do."""
    problem = Problem("bfloat16", "window")
    for x, size in ((problem.q, 1e-25), (problem.k, 1e-25), (problem.v, 1e-10), (problem.dout, 1e-10),
                    (problem.dlse, 1e-20)):
        x *= x.dtype.type(size)
    check_sizes(problem, one_of, (2, 3, 7), products="tiles")


@pytest.mark.parametrize("tiles", [False, pytest.param(True, marks=needs_tiles)])
def test_cuts_of_the_work_do_not_matter(tiles, monkeypatch):
    """Neither the size of the cache nor that of buffers, pieces and steps shows in the result."""
    problem = Problem("bfloat16" if tiles else "float32", "first", scored=not tiles)
    products = "tiles" if tiles else "auto"
    want = compute(problem, 1, "contiguous", 1, products=products)
    for module in (workspace, tile_workspace):
        monkeypatch.setattr(module, "cache_bytes", lambda level: 2**18)
    monkeypatch.setattr(numba_, "PACKED_BYTES", 1)
    monkeypatch.setattr(numba_, "STEP_FLOP", 1)
    assert_same(compute(problem, 3, "uneven", 2, products=products), want)


def test_right_too():
    """The results are those of the normal order, up to rounding, and out is that of a dense softmax."""
    problem = Problem("float32", "causal")
    got, normal = (compute(problem, 3, "striped", 2, canonical) for canonical in (True, False))
    want, _ = oracle.attend(problem.q, problem.k, problem.v, oracle.visible(N_Q, N_K, causal=True), 0.25)
    assert oracle.error(got["out"], want) <= TOLERANCE["float32"]
    for name in NAMES:
        assert oracle.error(got[name], normal[name]) < 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_other_bits_without_it(name):
    """The normal order has other bits on other numbers of ranks: this test file can see that."""
    problem = Problem("float32", "causal")
    one, three = (compute(problem, size, "striped", 1, canonical=False)[name] for size in (1, 3))
    assert not np.array_equal(one, three)


@pytest.mark.parametrize("name", [name for name in HOST_NAMES if name != "numba"])
def test_backends_without_it(name):
    with pytest.raises(OptionError, match=r"canonical order: .* numba or cuda, got "):
        open_backend(name, 1, canonical=True)


@pytest.mark.parametrize("canonical", [False, True])
def test_gradients_asked_for_together(canonical):
    """Canonical order makes dq, or dk and dv; the normal one all three, or dq. What can't be had is an error."""
    q, k, v = oracle.random_qkv(0, 9, 9, 1, 1, 8, 8, "float32")
    numbers = np.zeros((9, 1), np.float32)
    backend = open_backend("numba", 1, canonical=canonical)
    for dq, dk, dv in ([(q, k, v), (None, None, None)] if canonical else [(None, None, None), (None, k, v)]):
        with pytest.raises(BackendError, match="expected arrays for dq"):
            next(backend.backward(Gradient(q, numbers, numbers, dq), q, k, v, dk, dv, np.zeros(9, int), np.full(9, 9),
                                  Score(1.0)))
    backend.close()
