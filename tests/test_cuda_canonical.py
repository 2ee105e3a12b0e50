"""Canonical order on the CUDA backend: the same bits on any number of ranks, which dealt_out.py simulates.

On devices that run the kernels on the CPU, each with another order of threads; `-m gpu`: on a GPU.
"""

import itertools

import dealt_out
import numpy as np
import oracle
import pytest
from cases import covering, make_mask
from dealt_out import NAMES, Problem, assert_same
from emulate import EmulatedDevice

from ringmpi import BackendError, device
from ringmpi.backends.cuda import hopper
from ringmpi.backends.cuda.backend import CudaBackend
from ringmpi.backends.cuda.instances import CANONICAL_TILE, dkdv_kernels, dq_kernels, forward_kernels
from ringmpi.backends.cuda.sources import Kind
from ringmpi.dtypes import DTYPES, TENSOR_TOLERANCE
from ringmpi.score import Score
from ringmpi.softmax import Gradient

LAYOUTS = "striped", "uneven", "custom", "empty", "zigzag"
SHORT = {"heads": (2, 1), "dims": (16, 16), "lengths": (250, 400)}       # two tiles of queries, three of keys
CASES = [
    ((2, 3, 5), {"dtype": "float32", "mask": "window"}),
    ((3, 2), {"dtype": "bfloat16", "mask": "all", "scored": True, "scale": -0.25}),
    ((5,), {"dtype": "float64", "mask": "causal", "heads": (3, 1), "lengths": (130, 420)}),
    ((2,), {"dtype": "bfloat16", "mask": "grid", "lengths": (200, 230)}),
    ((3,), {"dtype": "float64", "mask": "window", "dims": (96, 96), "scored": True}),         # by pairs of warps
]


@pytest.fixture(scope="module", params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def gpu(request):
    """Opens a device, by a number."""
    return EmulatedDevice if request.param == "emulated" else lambda _: device.open_device(0)


def opened(gpu, canonical=True):
    backend = CudaBackend(1, gpu)
    backend.canonical = canonical
    backend.settle("auto", [backend.ways])
    return backend


def compute(gpu, problem, size, kind, canonical=True):
    """Give out, lse, dq, dk and dv as `size` ranks would compute them."""
    backend = opened(gpu(size), canonical)
    try:
        return dealt_out.compute(backend, problem, size, kind)
    finally:
        backend.close()


def check_sizes(gpu, problem, sizes, first=0):
    """Compare some numbers of ranks with one: out, lse, dq, dk and dv, bit by bit."""
    want = compute(gpu, problem, 1, "contiguous")
    for number, size in enumerate(sizes, first):
        assert_same(compute(gpu, problem, size, LAYOUTS[number % len(LAYOUTS)]), want)
    return want


@pytest.mark.parametrize("number", range(len(CASES)))
def test_same_bits_on_any_number_of_ranks(gpu, number):
    sizes, options = CASES[number]
    check_sizes(gpu, Problem(**{**SHORT, **options}, seed=number), sizes, number)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", covering({
    "dtype": list(DTYPES), "mask": ["full", "causal", "window", "documents", "first", "all", "grid"],
    "heads": [(2, 2), (4, 1), (3, 1)], "dims": [(64, 64), (17, 33), (128, 128), (16, 144)], "scored": [False, True],
    "kind": [None, "float64"], "scale": [0.25, -0.25]}), ids=lambda case: "-".join(map(str, case.values())))
def test_same_bits_however_dealt_out(gpu, case):
    check_sizes(gpu, Problem(**case, lengths=(210, 600)), (2, 4, 7))


def test_columns_of_v_in_several_launches(gpu):
    """In float64 a launch has 128 of them: each takes the maximum and the sum up that the launch before began with."""
    check_sizes(gpu, Problem("float64", "full", (2, 1), (16, 144), lengths=(5, 400)), (3,))


@pytest.mark.parametrize(("dtype", "mask"), [("bfloat16", "window"), ("float32", "full")])
def test_numbers_that_are_not_finite(gpu, dtype, mask):
    """Rows that see a NaN go another way than rows that don't, whichever rows stand beside them."""
    problem = Problem(dtype, mask, **SHORT)
    problem.v[[5, 250]] = np.nan
    problem.v[120, 0, 3] = np.inf
    problem.k[[300, 390], 0] = -np.inf
    problem.q[7] = np.nan
    want = check_sizes(gpu, problem, (3,))
    assert np.isnan(want["out"].astype(float)).any()
    assert mask == "full" or np.isfinite(want["out"].astype(float)).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_numbers_that_vanish(gpu, dtype):
    """Products below the smallest number leave 0 of either sign: it must not tell what was seen beside them."""
    problem = Problem(dtype, "window", **SHORT, scale=3.0)
    problem.v[...] = (problem.v * 1e-40).astype(problem.v.dtype)
    problem.v[::3] = -1e-45 if dtype == "float32" else -1e-40
    want = check_sizes(gpu, problem, (3,))
    assert (want["out"] == 0).any()


def test_scores_of_all_sizes_side_by_side(gpu):
    """The fast kernels round scores where one of two rows has huge ones."""
    problem = Problem("bfloat16", "causal", **SHORT)
    problem.q[::5] = (problem.q[::5] * 2.0**17).astype(problem.q.dtype)
    problem.q[3::7] *= 0
    check_sizes(gpu, problem, (3,))


def test_right_too_and_other_bits_without_it(gpu):
    """The normal order has other bits on other numbers of ranks, which this file can see; they differ by rounding."""
    problem = Problem("float32", "window", **SHORT)
    got = compute(gpu, problem, 2, "striped")
    one, three = (compute(gpu, problem, size, "striped", canonical=False) for size in (1, 3))
    assert not any(dealt_out.same(three, one).values())
    want, _ = oracle.attend(problem.q, problem.k, problem.v, oracle.visible(250, 400, **make_mask("window", 400)), 0.25)
    assert oracle.error(got["out"], want) <= TENSOR_TOLERANCE["float32"]
    for name in NAMES:
        assert oracle.error(got[name], one[name]) < 2e-6


def test_one_instance_whatever_the_rows_and_where_arrays_begin(monkeypatch):
    """None of them that for Hopper, and none that combines states."""
    monkeypatch.setenv("RINGMPI_HOPPER", "1")
    backend = opened(EmulatedDevice())
    for_hopper = False
    for n_q, n_k, skipped in ((1, 10, 0), (17, 400, 0), (100, 300, 0), (7, 210, 4)):
        q, k, v = (_at(backend, x, skipped) for x in oracle.random_qkv(0, n_q, n_k, 2, 1, 16, 16, "bfloat16"))
        lse, none = (backend.to_device(np.zeros((n_q, 2), np.float32)) for _ in range(2))
        for_hopper |= hopper.takes(backend.device, q, k, v, Score(0.25))
        state = backend.new_state(n_q, 2, 16, np.dtype("f4"))
        columns = np.zeros(n_q, int), np.full(n_q, n_k)
        sum(backend.accumulate(state, q, k, v, *columns, Score(0.25)))
        dq, dk, dv = (backend.empty(x.shape, np.float32) for x in (q, k, v))
        sum(backend.backward(Gradient(q, lse, none, dq), q, k, v, None, None, *columns, Score(0.25)))
        sum(backend.backward(Gradient(q, lse, none, None), q, k, v, dk, dv, *columns, Score(0.25)))
    assert for_hopper
    names = {name for name, *_ in backend.device.launched}
    for kernel in ("accumulate<", "gradient_dq<", "gradient_dkdv<"):
        assert len([name for name in names if name.startswith(kernel)]) == 1, names
    assert not any(name.startswith("combine") for name in names)
    assert max(grid[2] for name, grid, *_ in backend.device.launched if name.startswith("accumulate")) == 1


def _at(backend, x, skipped):
    """Place an array so many numbers behind an address of whole rows."""
    memory = backend.to_device(np.concatenate([np.zeros(skipped, x.dtype), x.reshape(-1)]))
    return memory[skipped:].reshape(x.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_begin_at_whole_tiles_of_every_kernel(dtype):
    kind = DTYPES[dtype]
    for dim, dim_v, plain in itertools.product((1, 64, 96, 128, 192, 256), (8, 64, 128, 256), (True, False)):
        canonical = Kind(plain, canonical=True)
        for kernels in (forward_kernels, dq_kernels):
            assert all(CANONICAL_TILE % kernel.keys == 0 for kernel in kernels(kind, dim, dim_v, 1, 16, canonical))
        for kernel in itertools.chain(*dkdv_kernels(kind, dim, dim_v, 16, canonical)):
            assert CANONICAL_TILE % kernel.rows == 0


@pytest.mark.parametrize("backward", [False, True])
def test_prepare_tests_what_is_used_later(backward):
    backend = opened(EmulatedDevice(2))
    backend.prepare(DTYPES["bfloat16"], np.dtype("f4"), 16, 16, backward=backward)
    tested = {name for name, *_ in backend.device.launched if name.startswith(("accumulate", "gradient"))}
    assert {name.split("<")[0] for name in tested} == ({"gradient_dq", "gradient_dkdv"} if backward else {"accumulate"})
    assert all(name.endswith("true>") for name in tested)
    plain = CudaBackend(1, backend.device)
    backend.device.launched.clear()
    plain.prepare(DTYPES["bfloat16"], np.dtype("f4"), 16, 16, backward=backward)
    assert backend.device.launched                          # kernels of its own, not yet tested


@pytest.mark.parametrize("canonical", [False, True])
def test_gradients_asked_for_together(canonical):
    """What can't be had is an error, not left out."""
    backend = opened(EmulatedDevice(), canonical)
    x, numbers = (backend.to_device(np.zeros((9, 1, *more), np.float32)) for more in ((8,), ()))
    for dq, dk, dv in ([(x, x, x), (None, None, None)] if canonical else [(x, None, None), (None, x, x)]):
        with pytest.raises(BackendError, match="backend cuda: expected arrays for dq"):
            next(backend.backward(Gradient(x, numbers, numbers, dq), x, x, x, dk, dv, np.zeros(9, int), np.full(9, 9),
                                  Score(1.0)))
