"""The CUDA kernels and the backend that launches them, on a lazy device that runs the kernels on the CPU."""

import itertools
import subprocess

import numpy as np
import oracle
import pytest
from emulate import STRUCTS, EmulatedDevice, compile_layout
from oracle import case

from ringmpi import BackendError, device
from ringmpi.backends.cuda import backend as cuda
from ringmpi.backends.cuda.arguments import from_number
from ringmpi.backends.cuda.backend import CudaBackend
from ringmpi.backends.cuda.instances import best, forward_kernels
from ringmpi.backends.cuda.sources import Kind
from ringmpi.device import choose_index
from ringmpi.dtypes import DTYPES, TENSOR_TOLERANCE, accumulator
from ringmpi.schedules.device_links import DeviceLink
from ringmpi.score import Score

# Shared memory of a block, of a multiprocessor: compute capability 9.0, 8.0, 8.6.
HOPPER, AMPERE, SMALL = (227 * 1024, 228 * 1024), (163 * 1024, 164 * 1024), (99 * 1024, 100 * 1024)


@pytest.fixture(scope="module", params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(request):
    """The backend on an emulated GPU; with `-m gpu` on a real one."""
    if request.param == "emulated":
        return CudaBackend(1, EmulatedDevice())
    return CudaBackend(1, device.open_device(0))


def run(backend, q, k, v, begin, end, scale=0.3, blocks=1, kind=None):
    """Fold k and v in several blocks; rows see begin..end of the whole."""
    state = backend.new_state(len(q), q.shape[1], v.shape[2], accumulator(q.dtype, kind))
    pairs = 0
    placed = backend.to_device(q)
    for a, b in itertools.pairwise(np.linspace(0, len(k), blocks + 1).astype(int)):
        pairs += sum(backend.accumulate(state, placed, backend.to_device(k[a:b]), backend.to_device(v[a:b]),
                                        np.clip(begin, a, b) - a, np.clip(end, a, b) - a, Score(scale)))
    assert pairs == (end - begin).sum()
    out, lse = backend.empty((*q.shape[:2], v.shape[2]), q.dtype), backend.empty(q.shape[:2], state.acc.dtype)
    backend.finish(state, backend.to_device(end > begin), out, lse)
    return backend.to_numpy(out), backend.to_numpy(lse)


def check(backend, q, k, v, begin, end, dtype, scale=0.3, blocks=1):
    out, lse = run(backend, q, k, v, begin, end, scale, blocks)
    j = np.arange(len(k))
    want, want_lse = oracle.attend(q, k, v, (j >= begin[:, None]) & (j < end[:, None]), scale)
    assert oracle.error(out, want) <= TENSOR_TOLERANCE[dtype]
    assert oracle.error(lse, want_lse) <= (1e-13 if dtype == "float64" else 2e-6)
    assert (out[end <= begin] == 0).all()
    assert (lse[end <= begin] == -np.inf).all()
    return out


def check_equal_keys(backend, arrays, dtype, size, blocks, large=slice(None), halves=()):
    """Every 20th key is one key, with large scores for some rows; with the larger maximum first or last."""
    if dtype == "float16" and size > 6e4:
        pytest.skip("beyond float16")
    q, k, v = arrays
    q[...], k[...] = 0, 0
    q[:, 0, 0], k[3::20, 0, 0], k[list(halves), 0, 0] = 1, 1, 0.5
    q[large, 0, 0] = size
    want, want_lse = oracle.attend(q, k, v, np.ones((len(q), len(k)), bool), 0.7)
    begin, end = np.zeros(len(q), int), np.full(len(q), len(k))
    for mirrored in (1, -1):
        out, lse = run(backend, q, k[::mirrored], v[::mirrored], begin, end, 0.7, blocks)
        assert oracle.error(out, want) <= TENSOR_TOLERANCE[dtype]
        assert oracle.error(lse, want_lse) <= 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (3, 1)])
def test_dense_softmax(backend, dtype, heads, kv_heads):
    check(backend, *case(0, 75, 303, heads, kv_heads, 24, 40, dtype), dtype, blocks=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "dim_v"), [(7, 9), (64, 64), (128, 72), (256, 256)])
@pytest.mark.parametrize("n_q", [3, 70])
def test_dims_and_both_kinds_of_tile(backend, dtype, dim, dim_v, n_q):
    check(backend, *case(1, n_q, 150, 2, 1, dim, dim_v, dtype), dtype, scale=dim**-0.5, blocks=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_queries_split_the_keys(backend, dtype):
    q, k, v, begin, end = case(2, 2, 1500, 4, 2, 16, 16, dtype)
    begin[:], end[:] = (3, 0), (1500, 700)
    check(backend, q, k, v, begin, end, dtype, blocks=2)
    if isinstance(backend.device, EmulatedDevice):
        parts = [grid[2] for name, grid, _, _ in backend.device.launched if name.startswith("accumulate")]
        assert max(parts) > 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("intervals", oracle.INTERVALS)
@pytest.mark.parametrize("n_k", [1, 31, 63, 64, 129])     # one less than a tile of each kernel, and around it
def test_intervals(backend, dtype, intervals, n_k):
    q, k, v, _, _ = case(3, 70, n_k, 1, 1, 16, 16, dtype)
    check(backend, q, k, v, *oracle.intervals(intervals, 70, n_k), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_and_infinity_reach_the_rows_that_see_them_and_no_others(backend, dtype, bad, where):
    q, k, v, begin, end = case(4, 40, 100, 4, 2, 16, 16, dtype)
    begin //= 3
    arrays = {"q": q, "k": k, "v": v}
    arrays[where][20, 1, 3] = bad
    out = check(backend, q, k, v, begin, end, dtype, blocks=2)
    see = (begin <= 20) & (end > 20) if where != "q" else np.arange(40) == 20
    touched = ~np.isfinite(out.astype(float)).all(axis=(1, 2))
    assert not touched[~see].any()
    assert touched.any() or bad == -np.inf or where == "q"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_accumulator_on_request(backend, dtype):
    q, k, v, begin, end = case(5, 30, 200, 2, 1, 16, 16, dtype)
    j = np.arange(200)
    want, want_lse = oracle.attend(q, k, v, (j >= begin[:, None]) & (j < end[:, None]), 0.3)
    out, lse = run(backend, q, k, v, begin, end, kind="float64")
    assert oracle.error(out, want) <= {"float32": 1e-7, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
    assert oracle.error(lse, want_lse) < 1e-13


@pytest.mark.parametrize("scores", [1e4, -1e4, 1e30])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_large_scores_do_not_overflow(backend, dtype, scores):
    q, k, v, _, _ = case(6, 20, 200, 1, 1, 16, 16, dtype)
    q = (q.astype(np.float64) * scores).astype(q.dtype)
    out, lse = run(backend, q, k, v, np.zeros(20, int), np.full(20, 200), blocks=3)
    want, want_lse = oracle.attend(q, k, v, np.ones((20, 200), bool), 0.3)
    assert oracle.error(out, want) <= (1e-8 if dtype == "float64" else 3e-2)
    assert oracle.error(lse, want_lse) <= 1e-6


def test_negative_scale_and_all_scores_minus_infinity(backend):
    q, k, v, begin, end = case(7, 33, 90, 2, 1, 16, 16, "float32")
    check(backend, q, k, v, begin, end, "float32", scale=-0.4)
    q[...], k[...] = 1, -np.inf
    begin[:], end[:] = 0, 90
    out, lse = run(backend, q, k, v, begin, end, blocks=2)
    assert np.isnan(out).all()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-0.4, 0.0, -1e-300])
def test_a_scale_that_is_not_positive(backend, dtype, scale):
    q, k, v, begin, end = case(15, 70, 90, 2, 1, 16, 16, dtype)
    begin //= 2
    check(backend, q, k, v, begin, end, dtype, scale=scale, blocks=2)
    check(backend, q[:2], k, v, 0 * begin[:2], end[-2:], dtype, scale=scale)
    q[5, 0, 3], q[6, 0, 3], k[40, 0, 2], k[70, 0, 2] = np.inf, np.nan, -np.inf, np.nan
    out, lse = run(backend, q, k, v, begin, end, scale)
    j = np.arange(90)
    see = (j >= begin[:, None]) & (j < end[:, None])
    with np.errstate(invalid="ignore"):
        want, want_lse = oracle.attend(q, k, v, see, scale if dtype == "float64" or scale == -0.4 else 0.0)
    assert oracle.error(out, want) <= TENSOR_TOLERANCE[dtype]
    assert oracle.error(lse, want_lse) <= 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2e3, 6e4, 1e25])
def test_equal_keys_with_large_scores_share_the_weight(backend, dtype, size):
    check_equal_keys(backend, case(16, 20, 200, 1, 1, 16, 16, dtype)[:3], dtype, size, blocks=3, halves=[11, 150])


def test_float64_has_two_warps_to_a_scheduler_where_they_fit():
    kind = DTYPES["float64"]
    for shared, dim, warps in ((HOPPER, 128, 8), (HOPPER, 64, 8), (HOPPER, 256, 2), (AMPERE, 128, 4), (AMPERE, 64, 8),
                               (SMALL, 64, 4)):
        for plain in (True, False):
            kernel = best(forward_kernels(kind, dim, dim, 1000, 16, Kind(plain)), *shared)
            assert kernel.threads == 32 * warps, (shared, dim, plain)
    assert best(forward_kernels(kind, 128, 128, 1000, 16), *HOPPER).shared_bytes == 202240
    assert best(forward_kernels(kind, 128, 128, 64, 16), *HOPPER).threads == 128     # no more than the rows need


def test_the_result_does_not_depend_on_the_order_of_threads():
    outs = []
    for seed in range(3):
        backend = CudaBackend(1, EmulatedDevice(seed))
        outs.append(run(backend, *case(8, 45, 140, 4, 2, 16, 16, "bfloat16"), blocks=2)[0])
    assert all((out == outs[0]).all() for out in outs)


@pytest.mark.parametrize(("n_q", "n_k"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_do(backend, n_q, n_k):
    q, k, v, begin, end = case(9, n_q, n_k, 2, 1, 16, 16, "float32")
    out, lse = run(backend, q, k, v, 0 * begin, 0 * end)
    assert (out == 0).all()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("shared", [HOPPER, AMPERE, SMALL])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dim_has_a_kernel_that_fits(dtype, shared):
    for dim, dim_v, rows in itertools.product((1, 16, 64, 96, 128, 192, 256), (8, 64, 128, 256), (1, 9, 17, 65, 5000)):
        kernel = best(forward_kernels(DTYPES[dtype], dim, dim_v, rows, 16), *shared)
        assert kernel.shared_bytes + 2048 <= shared[0]
        assert kernel.threads <= 1024
        assert kernel.keys % 16 == 0


def test_kernels_of_smaller_gpus_compute_the_same():
    backend = CudaBackend(1, EmulatedDevice(1, (8, 0), *AMPERE))
    for dtype in DTYPES:
        check(backend, *case(10, 70, 150, 2, 1, 128, 128, dtype), dtype, scale=0.1)
    backend = CudaBackend(1, EmulatedDevice(1, (8, 6), *SMALL))
    check(backend, *case(10, 40, 60, 2, 1, 240, 16, "float64"), "float64", scale=0.1)


def test_a_gpu_that_is_too_small_or_too_old_says_so():
    with pytest.raises(BackendError, match=r"expected a GPU of compute capability 8\.0 or later, got fake with 7\.5"):
        CudaBackend(1, EmulatedDevice(0, (7, 5)))
    with pytest.raises(BackendError, match="bytes of shared memory, this GPU gives 10000"):
        best(forward_kernels(DTYPES["float64"], 256, 256, 100, 16), 10000, 20000)


def test_prepare_proves_the_kernels_and_refuses_what_there_are_none_for(backend):
    backend.prepare(DTYPES["float16"], np.dtype("f4"), 16, 16)
    with pytest.raises(BackendError, match="expected dim and dim_v up to 256, got 16 and 272"):
        backend.prepare(DTYPES["float16"], np.dtype("f4"), 16, 272)


def test_copies_in_pieces(monkeypatch):
    monkeypatch.setattr(device, "PIECE_BYTES", 1000)
    gpu = EmulatedDevice(3)
    rng = np.random.default_rng(0)
    for shape in ((), (0,), (7,), (400,), (123, 5), (3, 40, 2, 8), (2, 0, 4)):
        x = rng.standard_normal(shape)
        there = gpu.array(x)
        assert (gpu.host(there) == x).all()
    x = np.arange(9000.0).reshape(900, 10)[::3, ::2]          # a strided view
    assert (gpu.host(gpu.array(x)) == x).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_prepare_compiles_all_that_is_used_later(dtype):
    backend = CudaBackend(1, EmulatedDevice(2))
    kind = accumulator(DTYPES[dtype])
    backend.prepare(DTYPES[dtype], kind, 16, 16)
    known = set(backend.device.cache)
    for n_q in (1, 2, 3, 7, 16, 17, 64, 65, 140):
        q, k, v = (backend.to_device(x) for x in case(12, n_q, 70, 1, 1, 16, 16, dtype)[:3])
        state = backend.new_state(n_q, 1, 16, kind)
        whole = np.full(n_q, 70)
        assert sum(backend.accumulate(state, q, k, v, 0 * whole, whole, Score(1.0))) == 70 * n_q
    assert set(backend.device.cache) == known


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_that_begin_askew(backend, dtype):
    q, k, v, _, _ = case(13, 20, 50, 1, 1, 16, 16, dtype)
    askew = []
    for x in (q, k, v):
        room = backend.device.array(np.concatenate([x.reshape(-1)[:1], x.reshape(-1)]))
        askew.append(room[1:].reshape(x.shape))
    placed = [backend.to_device(x) for x in askew]
    assert all(x.data.ptr % 16 == 0 for x in placed)
    assert all((backend.to_numpy(x) == y).all() for x, y in zip(placed, (q, k, v), strict=True))


def test_a_block_is_done_when_its_loop_ends():
    backend = CudaBackend(1, EmulatedDevice(3))
    q, k, v, begin, end = case(14, 40, 90, 2, 1, 16, 16, "float32")
    state = backend.new_state(40, 2, 16, np.float32)
    for _ in backend.accumulate(state, *(backend.to_device(x) for x in (q, k, v)), begin, end, Score(1.0)):
        pass
    assert not backend.device.caller_stream().queue


def test_a_loop_that_is_left_early_can_be_followed_by_another(backend):
    q, k, v, begin, end = case(11, 40, 300, 2, 1, 16, 16, "float32")
    state = backend.new_state(40, 2, 16, np.float32)
    loop = backend.accumulate(state, *(backend.to_device(x) for x in (q, k, v)), begin, end, Score(0.3))
    next(loop)
    loop.close()
    check(backend, q, k, v, begin, end, "float32")


def test_structs_lie_as_the_kernels_have_them(monkeypatch):
    compile_layout()
    wrong = np.dtype([(name, np.uint64) for name in STRUCTS["StateArrays<float>"].names])
    monkeypatch.setitem(STRUCTS, "StateArrays<float>", wrong)
    with pytest.raises(subprocess.CalledProcessError):
        compile_layout()


def test_a_struct_has_all_its_fields_and_keeps_its_arrays():
    gpu = EmulatedDevice()
    x = gpu.empty((3,), np.float32)
    made = device.Struct(np.dtype([("x", np.uint64), ("n", np.int32)], align=True), x=x, n=3)
    assert made.value["x"] == x.data.ptr
    assert made.value["n"] == 3
    assert made.value.nbytes == 16
    assert made.arrays == [x]
    with pytest.raises(TypeError, match=r"expected the fields \('x', 'n'\), got \('x',\)"):
        device.Struct(made.value.dtype, x=x)


def test_the_gpu_of_a_rank():
    assert [choose_index(r, 4, False) for r in range(4)] == [0, 1, 2, 3]
    assert [choose_index(r, 1, False) for r in range(3)] == [0, 0, 0]
    assert [choose_index(r, 2, True) for r in range(4)] == [0, 1, 0, 1]
    with pytest.raises(BackendError, match="expected a GPU for each rank of the node, got 2 GPUs for local rank 2"):
        choose_index(2, 2, False)


def test_views_of_real_cupy_arrays():
    """CuPy's arrays, over host memory: what needs no driver works as the fake's do."""
    cupy = pytest.importorskip("cupy")
    room = np.zeros(512, np.uint8)
    memory = cupy.cuda.UnownedMemory(room.ctypes.data, room.nbytes, room, 0)
    blocks = DeviceLink(None)
    blocks._slots = [cupy.ndarray((512,), np.uint8, cupy.cuda.MemoryPointer(memory, 0))] * 2
    k, v = blocks.views(1, [(1, 4, 2, 8), (1, 4, 2, 4)], [DTYPES["bfloat16"]] * 2)
    assert (k.shape, v.shape, v.dtype) == ((1, 4, 2, 8), (1, 4, 2, 4), DTYPES["bfloat16"])
    assert v.data.ptr - k.data.ptr == k.nbytes == 128
    one, = v
    assert one[1:3].data.ptr == v.data.ptr + 16
    assert one[1:3].flags.c_contiguous
    assert from_number(one, 5).data.ptr == v.data.ptr + 10
    assert cuda._alignment(one) == 8
    assert device.view(v) is v
    assert device._bytes(v).shape == (64,)
    assert v[:, :0].nbytes == 0
