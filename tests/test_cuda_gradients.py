"""Score functions and gradients of the CUDA kernels, on a lazy device that runs them on the CPU; `-m gpu`: on a GPU."""

import itertools

import numpy as np
import oracle
import pytest
import test_gradients
from emulate import EmulatedDevice
from one_block import BOUND, run
from oracle import BIASES, DISTANCES, FUNCTIONS, case, dense, functions
from test_cuda import AMPERE, HOPPER, SMALL
from test_gradients import check, check_float64_accumulator

from ringmpi import BackendError, Grid, InternalError, Mask, device
from ringmpi.backends.cuda import backend as cuda
from ringmpi.backends.cuda import hopper
from ringmpi.backends.cuda.arguments import rows_of
from ringmpi.backends.cuda.backend import CudaBackend
from ringmpi.backends.cuda.instances import best, dkdv_kernels, dq_kernels, forward_kernels
from ringmpi.backends.cuda.sources import Kind
from ringmpi.dtypes import DTYPES, TENSOR_TOLERANCE, accumulator
from ringmpi.score import Score

KINDS = ("float64", "float32", "bfloat16")         # each has kernels of its own; float16 has those of bfloat16
WAYS = [*((dtype, 16) for dtype in DTYPES), ("float64", 96)]         # dtypes and dims; the last by pairs of warps


@pytest.fixture(scope="module", params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(request):
    """The backend on an emulated GPU; with `-m gpu` on a real one."""
    return CudaBackend(1, EmulatedDevice() if request.param == "emulated" else device.open_device(0))


@pytest.fixture(autouse=True)
def tensor_tolerance(monkeypatch):
    """Weights are rounded to 16 bits here."""
    monkeypatch.setattr(test_gradients, "TOLERANCE", TENSOR_TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "heads", "kv_heads"), [
    *((kind, 4, 2) for kind in FUNCTIONS), ("plain", 3, 3), ("plain", 3, 1), ("all", 3, 3), ("all", 3, 1)])
def test_dense_softmax(backend, dtype, kind, heads, kv_heads):
    check(backend, *case(0, 50, 101, heads, kv_heads, 16, 16, dtype), dtype, kind, blocks=2)


@pytest.mark.parametrize(("dtype", "dim", "heads", "kv_heads"), [
    *((dtype, 16, 6, 2) for dtype in DTYPES), ("float64", 96, 2, 2), ("bfloat16", 128, 3, 1)])
@pytest.mark.parametrize("kind", BIASES)
def test_a_bias_of_the_keys(backend, dtype, dim, heads, kv_heads, kind):
    got = check(backend, *case(0, 50, 101, heads, kv_heads, dim, dim, dtype), dtype, kind, blocks=2)
    left_out = np.isneginf(functions(kind, heads, [], np.arange(101))[0]["key_bias"])
    assert got["dkey_bias"].shape == left_out.shape
    assert (got["dkey_bias"][left_out] == 0).all()
    assert (got["dk"][left_out.all(axis=1)] == 0).all()


@pytest.mark.parametrize("dtype", KINDS)
def test_a_bias_with_few_queries_and_many(backend, dtype):
    """Where the keys are split into parts, and beyond the tiles of a kernel, which no row sees in part."""
    q, k, v, begin, end = case(2, 2, 1500, 4, 2, 16, 16, dtype)
    begin[:], end[:] = (3, 0), (1500, 700)
    check(backend, q, k, v, begin, end, dtype, "left out by head", blocks=2)
    q, k, v, begin, end = case(3, 150, 300, 2, 1, 16, 24, dtype)
    check(backend, q, k, v, 0 * begin, 0 * end + 300, dtype, "left out")


@pytest.mark.parametrize(("dtype", "dim"), WAYS)
def test_queries_that_see_only_keys_that_are_left_out(backend, dtype, dim):
    """Beside those whose products are -inf, each with its own bias."""
    q, k, v = (np.ones((n, 1, dim), DTYPES[dtype]) for n in (3, 30, 30))
    k[10:20] = -np.inf
    begin, end = np.array([0, 10, 20]), np.array([10, 20, 30])
    bias = np.linspace(-1, 1, 30)[:, None]
    bias[:10] = -np.inf
    got = run(backend, q, k, v, begin, end, 0.3, {"key_bias": bias}, dout=q)
    assert (got["out"][0] == 0).all()
    assert np.isfinite(got["out"][2].astype(float)).all()
    assert got["lse"][:2, 0].tolist() == [-np.inf] * 2
    assert (got["dq"][0] == 0).all()
    assert np.isnan(got["dq"][1]).all()
    assert np.isfinite(got["dq"][2]).all()
    assert (got["dkey_bias"][:10] == 0).all()
    assert np.isfinite(got["dkey_bias"][20:]).all()


@pytest.mark.parametrize(("dtype", "dim", "dim_v"), [
    *((dtype, *dims) for dtype in KINDS for dims in [(7, 9), (64, 64), (128, 72), (256, 256)]), ("float16", 64, 64)])
def test_dims(backend, dtype, dim, dim_v):
    check(backend, *case(1, 36, 70, 2, 1, dim, dim_v, dtype), dtype, scale=dim**-0.5)


@pytest.mark.parametrize(("dtype", "dim", "kind"), [
    *((*way, "plain") for way in WAYS if way[0] != "float16"), ("bfloat16", 16, "left out by head and relative"),
    ("float32", 16, "all")])
def test_many_intervals(backend, dtype, dim, kind):
    q, k, v, *_ = case(3, 70, 201, 4, 2, dim, dim, dtype)
    check(backend, q, k, v, *oracle.many_intervals(4, 70, 201, 6), dtype, kind, blocks=2)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("n_q", [1, 3, 150])
def test_many_intervals_of_few_queries_and_many(backend, dtype, n_q):
    """Keys are split into parts for few queries; tiles that all rows see in full, others that some see, and none."""
    begin = np.array([[0], [300], [500], [900]]) + np.zeros((1, n_q), int)
    end = np.array([[200], [300], [700], [1100]]) + np.arange(n_q) // 9
    begin[2, ::7], end[2, ::7] = 0, 0                  # an empty interval may lie anywhere
    q, k, v, *_ = case(4, n_q, 1200, 4, 2, 16, 24, dtype)
    check(backend, q, k, v, begin, end, dtype, blocks=1)


@pytest.mark.parametrize("mask", [
    Grid((5, 6, 7), (1, 2, 1), (False, True, True)),
    Mask(documents=(0, 40, 90, 150, 210), parents=(-1, 0, 1, 0), causal=True),
    Mask(documents=(0, 40, 90, 150, 210), prompts=((-1, -1), (0, 30), (5, 40), (0, 40)), spans=((100, 130),)),
    Mask(document_ids=np.arange(210) * 7 // 4 % 5)], ids=["grid", "tree", "prompts", "ids"])
@pytest.mark.parametrize("dtype", KINDS)
def test_a_mask_is_one_launch_whatever_its_intervals(dtype, mask):
    backend = CudaBackend(1, EmulatedDevice())
    backend.hopper = False
    bounds = mask.bounds(np.arange(210), 210, 210)
    begin, end = (np.array([interval[i] for interval in bounds]) for i in range(2))
    assert ((end > begin).sum(axis=0) > 1).any()
    check(backend, *case(5, 210, 210, 2, 1, 16, 16, dtype)[:3], begin, end, dtype)
    names = [name.split("<")[0] for name, *_ in backend.device.launched]
    for kernel in ("accumulate", "gradient_dq", "gradient_dkdv"):
        assert names.count(kernel) == 1, names
    assert len(names) < 12


def test_few_intervals_are_launches_of_the_kernel_for_hopper():
    backend = CudaBackend(1, EmulatedDevice())
    backend.hopper = True
    for count, launches in ((1, 1), (3, 3), (6, 1)):
        backend.device.launched.clear()
        q, k, v, *_ = case(6, 70, 150, 1, 1, 16, 16, "bfloat16")
        begin, end = oracle.many_intervals(count, 70, 150, count)
        got = run(backend, q, k, v, begin, end, 0.3, {})
        want = dense(q, k, v, oracle.sees(begin, end, 150), 0.3)
        assert oracle.error(got["out"], want["out"]) <= TENSOR_TOLERANCE["bfloat16"]
        names = [name for name, *_ in backend.device.launched if name.startswith("accumulate<")]
        assert len(names) == launches
        assert {name.endswith("false>") for name in names} == {count == 6}           # the other has no such arguments


@pytest.mark.parametrize(("dtype", "dim", "kind"), [
    *(("bfloat16", 16, kind) for kind in DISTANCES), *((*way, "relative") for way in WAYS if way[0] != "bfloat16"),
    ("float32", 16, "all and relative"), ("float64", 16, "axes and relative")])
def test_a_bias_by_distance(backend, dtype, dim, kind):
    check(backend, *case(0, 50, 101, 4, 2, dim, dim, dtype), dtype, kind, blocks=2)


@pytest.mark.parametrize("dtype", KINDS)
def test_a_bias_by_distance_of_many_keys_and_few_queries(backend, dtype):
    q, k, v, begin, end = case(2, 2, 1500, 3, 3, 16, 24, dtype)
    begin[:], end[:] = (3, 0), (1500, 700)
    check(backend, q, k, v, begin, end, dtype, "relative", blocks=2)


def test_few_sums_by_distance_go_through_many_tiles_of_keys(backend, monkeypatch):
    """With the same bits in each run, whatever the order of threads."""
    monkeypatch.setattr(cuda, "MOST_SUMS", 1)
    other = CudaBackend(1, EmulatedDevice(7)) if isinstance(backend.device, EmulatedDevice) else backend
    for dtype in ("float32", "bfloat16"):
        one, again = (check(each, *case(2, 40, 300, 2, 1, 16, 16, dtype), dtype, "relative of neighbours")
                      for each in (backend, other))
        assert all((x == again[name]).all() for name, x in one.items())



def test_slices_of_columns_keep_to_the_columns_there_are():
    backend = CudaBackend(1, EmulatedDevice())
    for dim, dim_v, slices in ((40, 256, [1, 1, 2]), (144, 16, [2, 2, 1]), (64, 64, [1, 1]), (80, 80, [1, 1, 1]),
                               (176, 172, [2, 2])):
        backend.device.launched.clear()
        check(backend, *case(17, 9, 20, 1, 1, dim, dim_v, "float64"), "float64", scale=0.1)
        assert [grid[2] for name, grid, *_ in backend.device.launched if name.startswith("gradient")] == slices
    for wide in range(16, 257, 16):
        for dim_v in (wide, 256):
            for kernel in (dq_kernels(DTYPES["float64"], wide, dim_v, 99, 16)[0],
                           dkdv_kernels(DTYPES["float64"], wide, dim_v, 16)[0][0]):
                assert 0 <= -(-wide // kernel.columns) * kernel.columns - wide <= 16


@pytest.mark.parametrize(("dim", "dim_v", "kind"), [(128, 128, "plain"), (113, 128, "all"), (256, 250, "softcap")])
def test_pairs_of_warps(backend, dim, dim_v, kind):
    check(backend, *case(20, 70, 90, 2, 1, dim, dim_v, "float64"), "float64", kind, scale=0.1, blocks=2)


def test_pairs_of_warps_have_float64_where_dims_are_alike():
    for dim, dim_v, paired in ((64, 64, False), (80, 80, False), (96, 96, True), (128, 120, True), (128, 64, False),
                               (192, 192, True), (192, 128, False), (224, 224, False), (256, 256, True)):
        for kind in itertools.starmap(Kind, itertools.product((True, False), repeat=2)):
            launches = dkdv_kernels(DTYPES["float64"], dim, dim_v, 16, kind)
            found = dq_kernels(DTYPES["float64"], dim, dim_v, 99, 16, kind), *launches
            assert {kernel.file == "gradient_paired.cu" for kernel in itertools.chain(*found)} == {paired}, (dim, dim_v)
            assert len(launches) == (1 if paired or dim + dim_v <= 128 else 2)


@pytest.mark.parametrize("dtype", KINDS)
def test_wide_heads_with_score_functions(backend, dtype):
    check(backend, *case(1, 20, 40, 2, 1, 128, 72, dtype), dtype, "all", scale=0.1)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("kind", ["plain", "sinks", "softcap", "alibi", "all"])
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_is_not_positive(backend, dtype, kind, scale):
    check(backend, *case(18, 50, 101, 4, 2, 16, 16, dtype), dtype, kind, scale=scale, blocks=2)


@pytest.mark.parametrize(("dtype", "dim"), WAYS)
@pytest.mark.parametrize("intervals", [*oracle.INTERVALS, "two ends"])
@pytest.mark.parametrize("n_k", [1, 63, 65, 129])          # around a tile of each kernel
def test_intervals(backend, dtype, dim, intervals, n_k):
    q, k, v, _, _ = case(3, 66, n_k, 1, 1, dim, dim, dtype)
    check(backend, q, k, v, *oracle.intervals(intervals, 66, n_k), dtype)


@pytest.mark.parametrize(("dtype", "dim"), WAYS)
def test_many_tiles_of_rows_that_see_nothing_of_a_key(backend, dtype, dim):
    """The search for the next tile of rows goes beyond what one warp looks at."""
    n_q = 2300
    q, k, v, _, _ = case(15, n_q, 130, 1, 1, dim, dim, dtype)
    begin, end = np.zeros(n_q, int), np.zeros(n_q, int)
    for row in (0, 1100, n_q - 1):
        begin[row], end[row] = row % 128, 130
    check(backend, q, k, v, begin, end, dtype)


@pytest.mark.parametrize(("dtype", "dim"), WAYS)
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_reaches_the_pairs_that_see_it_and_no_others(backend, dtype, dim, where, bad):
    q, k, v, begin, end = case(2, 50, 100, 4, 2, dim, dim, dtype)
    dout = np.random.default_rng(0).standard_normal((50, 4, dim)).astype(q.dtype)
    at = 20
    begin[at], end[at] = 10, 60
    see = (np.arange(100) >= begin[:, None]) & (np.arange(100) < end[:, None])
    {"q": q, "k": k, "v": v, "dout": dout}[where][at, 1, 3] = bad
    got = run(backend, q, k, v, begin, end, 0.3, {}, dout=dout, blocks=2)
    touched = {name: ~np.isfinite(got[name]).all(axis=2) for name in ("dq", "dk", "dv")}
    if where in ("q", "dout"):                     # a row of head 1, whose keys are those of key head 0
        rows, keys = np.zeros((50, 4), bool), np.zeros((100, 2), bool)
        rows[at, 1] = True
        keys[see[at], 0] = True
    else:                                          # a key of key head 1, which heads 2 and 3 have
        rows = np.repeat([[False, False, True, True]], 50, axis=0) & see[:, at, None]
        keys = np.zeros((100, 2), bool)
        keys[see[see[:, at]].any(axis=0), 1] = True
    for name, most in (("dq", rows), ("dk", keys), ("dv", keys)):
        assert not (touched[name] & ~most).any(), name
        if np.isnan(bad):
            assert (touched[name] == most).all(), name
    assert touched["dq"].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_accumulator_on_request(backend, dtype):
    check_float64_accumulator(backend, dtype, 40, 90)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_positions_far_apart(backend, dtype):
    """A distance may take 32 bits without a sign; dropout counts positions modulo 2^32."""
    q, k, v, _, _ = case(16, 20, 40, 1, 1, 8, 8, dtype)
    begin, end = np.zeros(20, int), np.full(20, 40)
    score = {"slopes": np.array([2.0**-31]), "dropout": 0.25, "dropout_keys": np.array([2**32 - 1], np.uint32),
             "queries": 2**31 - 1 - np.arange(20), "keys": np.arange(40) * 13 - 2**31}
    dout = np.random.default_rng(0).standard_normal((20, 1, 8)).astype(q.dtype)
    got = run(backend, q, k, v, begin, end, 0.3, score, dout=dout)
    want = dense(q, k, v, np.ones((20, 40), bool), 0.3, dout=dout, **score)
    for name, x in got.items():
        assert oracle.error(x, want[name]) <= BOUND[dtype], name


@pytest.mark.parametrize("n", [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_nothing_or_little_to_do(backend, n):
    check(backend, *case(9, *n, 2, 1, 16, 16, "float32"), "float32", "all")


@pytest.mark.parametrize(("dtype", "dim"), [("bfloat16", 16), ("float64", 96)])
def test_the_result_does_not_depend_on_the_order_of_threads(dtype, dim):
    q, k, v, begin, end = case(8, 45, 140, 4, 2, dim, dim, dtype)
    runs = [check(CudaBackend(1, EmulatedDevice(seed)), q, k, v, begin, end, dtype, "all", blocks=2)
            for seed in range(3)]
    assert all((other[name] == x).all() for other in runs for name, x in runs[0].items())


def test_the_little_kernels(backend):
    rng = np.random.default_rng(0)
    for kind in (np.float32, np.float64):
        x, y = (rng.standard_normal((37, 3, 5)).astype(kind) for _ in range(2))
        x_, y_ = backend.to_device(x), backend.to_device(y)
        backend.add(x_, y_)
        assert (backend.to_numpy(x_) == x + y).all()
        for dtype in DTYPES.values():
            if dtype.itemsize <= x.itemsize:
                rounded = backend.astype(x_, dtype)
                assert rounded.dtype == dtype
                want = (x + y).astype(np.float32).astype(dtype) if dtype.itemsize == 2 else (x + y).astype(dtype)
                assert (backend.to_numpy(rounded) == want).all()
                assert (backend.to_numpy(x_) == x + y).all()
        assert backend.astype(x_, np.dtype(kind)) is x_
        backend.clear(x_)
        assert (backend.to_numpy(x_) == 0).all()


@pytest.mark.parametrize("kind", ["f4", "f8"])
def test_some_heads_are_added_where_they_are(backend, kind):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 7, 5, 3)).astype(kind), rng.standard_normal((2, 7, 4, 3)).astype(kind)
    x_ = backend.to_device(x)
    for to, of in ((slice(1, 3), slice(2, 4)), (slice(4, 5), slice(0, 1)), (slice(0, 4), slice(None)),
                   (slice(2, 2), slice(1, 1))):
        x[:, :, to] += y[:, :, of]
        backend.add(x_[:, :, to], backend.to_device(y)[:, :, of])
        assert (backend.to_numpy(x_) == x).all()
    whole = backend.to_device(y)
    backend.add(x_[:, :, :4], whole)
    assert (backend.to_numpy(x_)[:, :, :4] == x[:, :, :4] + y).all()
    with pytest.raises(InternalError, match="rows at equal distances"):
        rows_of(y[:, ::2, ::2])


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("kind", "backward"), [("all", False), ("plain", True), ("all", True), ("bias", False),
                                                ("bias by head", True), ("relative", True), ("several", True)])
def test_prepare_compiles_all_that_is_used_later(dtype, kind, backward):
    backend = CudaBackend(1, EmulatedDevice(2))
    backend.prepare(DTYPES[dtype], accumulator(DTYPES[dtype]), 16, 16, plain=kind != "all", biased=kind in BIASES,
                    relative="relative" in kind, several=kind == "several", backward=backward)
    known = set(backend.device.cache)
    forward = {("state.cu", f"{name}<") for name in ("reset", "finish", "combine")}
    for n_q in (1, 2, 3, 7, 16, 17, 65, 140):
        q, k, v, begin, end = case(12, n_q, 70, 1, 1, 16, 16, dtype)
        if kind == "several":
            run(backend, q, k, v, *oracle.many_intervals(2, n_q, 70, 3), 1.0, {}, dout=q if backward else None)
        score, sinks = functions(kind, 1, np.arange(n_q), np.arange(70))
        run(backend, q, k, v, begin, end, 1.0, score, sinks, dout=q if backward else None)
    new = set(backend.device.cache) - known
    if backward:              # the forward pass of the run was not prepared for
        new = {(file, name) for file, name in new if not file.startswith("accumulate")
               and not any(name.startswith(start) for _, start in forward)}
    assert not new


def test_prepare_finds_a_wrong_gradient(monkeypatch):
    backend = CudaBackend(1, EmulatedDevice(2))
    right = backend.new_gradient
    monkeypatch.setattr(backend, "new_gradient", lambda dout, out, lse, dlse, dq: right(dout, dout, lse, dlse, dq))
    with pytest.raises(BackendError, match="the backward kernel for float32, dim 16, dim_v 16 gives a wrong result"):
        backend.prepare(DTYPES["float32"], np.dtype("f4"), 16, 16, backward=True)


def test_prepare_gives_up_on_a_kernel_that_does_not_end(monkeypatch):
    backend = CudaBackend(1, EmulatedDevice(2))
    monkeypatch.setattr(cuda.SelfTest, "_finish", lambda *_: (_ for _ in ()).throw(TimeoutError))
    with pytest.raises(BackendError, match="float32, dim 16, dim_v 16, with score functions, does not end"):
        backend.prepare(DTYPES["float32"], np.dtype("f4"), 16, 16, plain=False)


def test_hopper_leaves_score_functions_to_others():
    gpu = EmulatedDevice()
    q, k, v = (gpu.empty((200, 1, 64), DTYPES["bfloat16"]) for _ in range(3))
    assert hopper.takes(gpu, q, k, v, Score(1.0))
    assert not hopper.takes(gpu, q, k, v, Score(1.0, softcap=3.0))
    assert not hopper.takes(gpu, q, k, v, Score(1.0, key_bias=gpu.empty((200, 1), np.float32)))


@pytest.mark.parametrize("shared", [HOPPER, AMPERE, SMALL])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plain", [True, False])
def test_every_dim_has_kernels_that_fit(dtype, shared, plain):
    kind = DTYPES[dtype]
    for dim, dim_v, rows in itertools.product((1, 16, 64, 96, 128, 192, 256), (8, 64, 128, 256), (1, 9, 17, 5000)):
        if dtype == "float64" and shared == SMALL and dim + dim_v > 350:
            continue          # Q, dout, K and V of 16 rows each are too much
        for candidates in (forward_kernels(kind, dim, dim_v, rows, 16, Kind(plain)),
                           dq_kernels(kind, dim, dim_v, rows, 16, Kind(plain)),
                           *dkdv_kernels(kind, dim, dim_v, 16, Kind(plain))):
            kernel = best(candidates, *shared)
            assert kernel.shared_bytes + 2048 <= shared[0]
            assert kernel.threads <= 1024


@pytest.mark.parametrize(("dtype", "dim", "shared", "forward", "of_dq", "of_dkdv"), [
    ("float32", 128, HOPPER, (128, 80), (128, 32), (32, 128)),
    ("float32", 128, AMPERE, (128, 32), (64, 32), (32, 64)),
    ("bfloat16", 128, HOPPER, (128, 48), (128, 32), (64, 64)),
    ("bfloat16", 128, AMPERE, (128, 32), (64, 32), (32, 64)),
    ("bfloat16", 64, AMPERE, (128, 96), (128, 64), (32, 128)),
    ("bfloat16", 64, SMALL, (128, 32), (128, 64), (32, 128))])
def test_plain_kernels_have_the_largest_tiles_that_fit(dtype, dim, shared, forward, of_dq, of_dkdv):
    """As measured; kernels with score functions, or in canonical order, have tiles of their own."""
    kind = DTYPES[dtype], dim, dim
    assert _tile(best(forward_kernels(*kind, 1000, 16), *shared)) == forward
    assert _tile(best(dq_kernels(*kind, 1000, 16), *shared)) == of_dq
    assert [_tile(best(kernels, *shared)) for kernels in dkdv_kernels(*kind, 16)] == [of_dkdv]


def _tile(kernel):
    return kernel.rows, kernel.keys


@pytest.mark.parametrize(("dtype", "dim"), [("float32", 80), ("bfloat16", 128), ("bfloat16", 64)])
def test_the_largest_tiles(backend, dtype, dim):
    """More rows and keys than a tile of any kernel has."""
    check(backend, *case(19, 70, 150, 2, 1, dim, dim, dtype), dtype, scale=dim**-0.5)


def test_kernels_of_smaller_gpus_compute_the_same():
    for capability, shared, dtype, dim in (((8, 0), AMPERE, "float64", 128), ((8, 6), SMALL, "float32", 256),
                                           ((8, 6), SMALL, "bfloat16", 256)):
        backend = CudaBackend(1, EmulatedDevice(1, capability, *shared))
        check(backend, *case(10, 20, 40, 1, 1, dim, dim, dtype), dtype, scale=0.05)
