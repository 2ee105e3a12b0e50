"""The Numba kernels: every vector width, every way through a block, shapes around tiles and vectors, accuracy."""

import ast
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import oracle
import pytest

from ringmpi.backends import base, open_backend
from ringmpi.backends.numba_ import amx, vector
from ringmpi.backends.numba_ import backend as numba_
from ringmpi.backends.numba_.forward_tile import forward_tile_shape
from ringmpi.backends.numba_.product import ROWS, VECTORS
from ringmpi.dtypes import DTYPES, TOLERANCE, accumulator
from ringmpi.score import Score
from ringmpi.softmax import State, combine, finish

HERE = Path(__file__).parent
NARROW = {"AVX2": "haswell", "SSE": "x86-64"}
WITHOUT = {name: {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""} for name, cpu in NARROW.items()}
WITHOUT["no tiles"] = {"RINGMPI_CPU_TILES": "0"}


def attend(q, k, v, begin, end, scale, threads=2, blocks=1, products="auto"):
    backend = open_backend("numba", threads)
    backend.settle(products, [backend.ways])
    try:
        state = State.empty(len(q), q.shape[1], v.shape[2], accumulator(q.dtype))
        for a, b in zip(range(blocks), range(1, blocks + 1), strict=True):
            low, high = len(k) * a // blocks, len(k) * b // blocks
            pairs = sum(backend.accumulate(state, q, k[low:high], v[low:high], np.clip(begin, low, high) - low,
                                           np.clip(end, low, high) - low, Score(scale)))
            assert pairs == (np.clip(end, low, high) - np.clip(begin, low, high)).sum()
        out, lse = np.empty((*q.shape[:2], v.shape[2]), q.dtype), np.empty(q.shape[:2], state.acc.dtype)
        finish(state, end > begin, out, lse)
        return out, lse
    finally:
        backend.close()


def data(seed, n_q, n_k, heads, kv_heads, dim, dim_v, dtype):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in
            ((n_q, heads, dim), (n_k, kv_heads, dim), (n_k, kv_heads, dim_v))]


def check(q, k, v, begin, end, scale=0.2, **options):
    out, lse = attend(q, k, v, begin, end, scale, **options)
    j = np.arange(len(k))
    want, want_lse = oracle.attend(q, k, v, (j >= begin[:, None]) & (j < end[:, None]), scale)
    dtype = next(name for name, kind in DTYPES.items() if kind == q.dtype)
    assert oracle.error(out, want) <= TOLERANCE[dtype]
    assert oracle.error(lse, want_lse) <= (1e-13 if dtype == "float64" else 2e-6)


def ranges(kind, n_q, n_k, seed=0):
    """What the queries see: begin, end."""
    i, rng = np.arange(n_q), np.random.default_rng(seed)
    if kind == "causal":
        return np.zeros(n_q, int), np.clip(i + 1 + n_k - n_q, 0, n_k)
    if kind == "window":
        end = np.clip(i + 1 + n_k - n_q, 0, n_k)
        return np.maximum(end - n_k // 3, 0), end
    if kind == "documents":
        cuts = np.concatenate([[0], np.sort(rng.integers(0, n_k, 7)), [n_k]])
        mine = np.searchsorted(cuts, np.minimum(i, n_k - 1), side="right")
        return cuts[mine - 1], cuts[mine]
    begin = rng.integers(0, n_k + 1, n_q)
    return begin, np.maximum(begin, rng.integers(0, n_k + 1, n_q))


@pytest.mark.exhaustive
@pytest.mark.parametrize("width", WITHOUT)
def test_narrower_vectors_pass_the_same_tests(width):
    """The parity tests again, compiled for another CPU; its features alone, so that nothing wider slips in."""
    if os.uname().machine != "x86_64":
        pytest.skip("names of x86 CPUs")
    environment = os.environ | WITHOUT[width]
    tests = [str(HERE / "test_backends.py"), f"{HERE / 'test_kernels.py'}::test_shapes_around_tiles",
             f"{HERE / 'test_canonical.py'}::test_score_functions_and_sinks"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "not numpy", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, cwd=HERE.parent,
                         check=False)
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.parametrize(("name", "size"), [("haswell", 32), ("x86-64", 16), ("skylake-avx512", 64)])
def test_the_width_is_that_of_the_named_cpu(name, size):
    if os.uname().machine != "x86_64":
        pytest.skip("names of x86 CPUs")
    code = "from ringmpi.backends.numba_.vector import machine; print(machine())"
    said = subprocess.run([sys.executable, "-c", code], env=os.environ | {"NUMBA_CPU_NAME": name}, timeout=60,
                          capture_output=True, text=True, check=True).stdout
    assert f"vector_bytes={size}" in said
    assert f"registers={32 if size == 64 else 16}" in said


# bfloat16 in every way; the other tests take the first that the CPU has.
HAS = {"tiles": not amx.missing(), "widen": True, "pairs": vector.machine().pairs}
BFLOAT16_WAYS = [pytest.param(name, marks=pytest.mark.skipif(not there, reason=f"this CPU has no {name}"))
                 for name, there in HAS.items()]


@pytest.mark.parametrize("products", BFLOAT16_WAYS)
@pytest.mark.parametrize(("dim", "dim_v"), [(64, 64), (80, 33), (2, 24), (17, 16)])
def test_ways_of_bfloat16(products, dim, dim_v):
    for n_q in (5, 300):
        q, k, v = data(0, n_q, 700, 4, 2, dim, dim_v, "bfloat16")
        check(q, k, v, *ranges("random", n_q, 700), products=products)
        v[350, 1, 0] = np.nan
        check(q, k, v, *ranges("random", n_q, 700), products=products)


@pytest.mark.parametrize("n_q", [1, 2, 5, 6, 7, 13, 200, 389])
@pytest.mark.parametrize("kind", ["causal", "window", "documents", "random"])
def test_shapes_around_tiles(n_q, kind):
    """Few rows, many rows, groups that are not whole; keys that are no multiple of a tile."""
    for seed, (n_k, heads, kv_heads) in enumerate([(1, 2, 2), (129, 3, 1), (1000, 2, 1)]):
        for dtype in ("float32", "bfloat16"):
            q, k, v = data(seed, n_q, n_k, heads, kv_heads, 24, 20, dtype)
            check(q, k, v, *ranges(kind, n_q, n_k, seed), threads=1 + seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 15, 16, 17, 80, 100, 257, 512])
def test_any_dim(dtype, dim):
    for n_q in (3, 210):
        q, k, v = data(dim, n_q, 150, 2, 1, dim, 513 - dim, dtype)
        check(q, k, v, *ranges("causal", n_q, 150), scale=dim**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_have_the_same_bits_on_any_number_of_threads(dtype):
    for n_q, n_k, heads, kv_heads, dim in [(400, 700, 2, 2, 64), (1500, 2000, 1, 1, 24), (210, 900, 6, 2, 40)]:
        q, k, v = data(5, n_q, n_k, heads, kv_heads, dim, dim, dtype)
        results = [attend(q, k, v, *ranges("causal", n_q, n_k), 0.1, threads=threads) for threads in (1, 2, 3, 5)]
        for other in results[1:]:
            for x, y in zip(results[0], other, strict=True):
                assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("n_q", [1, 7])
def test_many_heads_of_few_rows(n_q):
    """More heads than the work space holds at a time."""
    q, k, v = data(3, n_q, 400, 80, 40, 8, 8, "float32")
    check(q, k, v, *ranges("random", n_q, 400))


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_of_a_head_together(dtype):
    """As many together as see the same; a value that is not finite is met by those alone that see it."""
    for n_q, group in [(1, 1), (1, 2), (1, 3), (1, 8), (1, 16), (1, 17), (2, 4), (3, 2), (5, 1), (7, 2)]:
        q, k, v = data(n_q, n_q, 300, 2 * group, 2, 40, 72, dtype)
        v[290, 1, 5] = np.nan
        for kind in ("causal", "random"):
            check(q, k, v, *ranges(kind, n_q, 300, group), threads=1)


def test_every_float16_is_widened():
    """A single key's weight is 1, so its value comes back: 65,536 numbers, subnormals and infinities too."""
    v = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(64, 1, 1024)
    begin = np.arange(64)
    for rows in (range(64), range(3, 5)):
        q, k = np.ones((len(rows), 1, 16), np.float16), np.ones((64, 1, 16), np.float16)
        out, _ = attend(q, k, v, begin[rows], begin[rows] + 1, 1.0)
        np.testing.assert_array_equal(out[:, 0], v[rows, 0])


@pytest.mark.parametrize("n_q", [2, 250])
@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.3])
def test_any_sign_of_the_scale(n_q, scale):
    for dtype in DTYPES:
        q, k, v = data(0, n_q, 300, 2, 2, 16, 16, dtype)
        check(q, k, v, *ranges("random", n_q, 300), scale=scale)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_a_few_tiles_at_a_time(dtype, monkeypatch):
    q, k, v = data(0, 300, 2000, 4, 2, 32, 32, dtype)
    begin, end = ranges("window", 300, 2000)
    whole, _ = attend(q, k, v, begin, end, 0.2)
    monkeypatch.setattr(numba_, "PACKED_BYTES", 1)
    monkeypatch.setattr(numba_, "STEP_FLOP", 1)
    monkeypatch.setattr(numba_, "STEP_BYTES", 1)
    pieces, _ = attend(q, k, v, begin, end, 0.2)
    assert oracle.error(pieces, whole) < TOLERANCE[dtype]
    check(q, k, v, begin, end)
    check(q[:3], k, v, begin[:3], end[:3])


def make_late(monkeypatch):
    """Let threads be late for their tasks, now more and now less."""
    from ringmpi.backends import team
    taken, rng = team._next, np.random.default_rng(0)

    def late(queue):
        time.sleep(rng.random() * 0.003)
        return taken(queue)

    monkeypatch.setattr(team, "_next", late)


@pytest.mark.parametrize("n_q", [1, 400])
def test_results_do_not_depend_on_timing(n_q, monkeypatch):
    q, k, v = data(0, n_q, 6000, 2, 2, 16, 16, "float32")
    begin, end = np.zeros(n_q, int), np.full(n_q, 6000)
    first = attend(q, k, v, begin, end, 0.2, threads=3)
    make_late(monkeypatch)
    for _ in range(5):
        again = attend(q, k, v, begin, end, 0.2, threads=3)
        assert all((a == b).all() for a, b in zip(first, again, strict=True))


def test_read_only_and_strided_arrays():
    q, k, v = data(0, 30, 200, 2, 2, 16, 16, "float32")
    begin, end = ranges("causal", 30, 200)
    want, _ = attend(q, k, v, begin, end, 0.2)
    for x in (q, k, v, begin, end):
        x.flags.writeable = False
    mirrored = np.ascontiguousarray(v[:, :, ::-1])[:, :, ::-1]
    assert not mirrored.flags.c_contiguous
    strided, _ = attend(q, np.asfortranarray(k), mirrored, begin, end, 0.2)
    assert (strided == want).all()


def test_a_block_makes_nothing_anew():
    """The buffers of one call serve the next: what Python allocates is small beside a block."""
    import tracemalloc
    q, k, v = data(0, 600, 4000, 2, 2, 64, 64, "float32")
    begin, end = np.zeros(600, int), np.full(600, 4000)
    backend, state = open_backend("numba", 2), State.empty(600, 2, 64, np.float32)
    sum(backend.accumulate(state, q, k, v, begin, end, Score(0.1)))
    tracemalloc.start()
    try:
        sum(backend.accumulate(state, q, k, v, begin, end, Score(0.1)))
        assert tracemalloc.get_traced_memory()[1] < k.nbytes / 10
    finally:
        tracemalloc.stop()
        backend.close()


@pytest.mark.parametrize("n_q", [1, 300])
def test_kernels_count_no_references(n_q):
    """What Python's objects hold is held for the call; counting in the loops takes more time than many a product."""
    from numba.core.runtime import _nrt_python, rtsys
    q, k, v = data(0, n_q, 500, 2, 2, 16, 16, "float32")
    attend(q, k, v, np.zeros(n_q, int), np.full(n_q, 500), 0.1, threads=1)
    _nrt_python.memsys_enable_stats()
    try:
        before = rtsys.get_allocation_stats()
        attend(q, k, v, np.zeros(n_q, int), np.full(n_q, 500), 0.1, threads=1)
        assert rtsys.get_allocation_stats() == before
    finally:
        _nrt_python.memsys_disable_stats()


BOUND = {"float32": 1e-6, "float64": 1e-14}      # largest absolute error


@pytest.fixture(params=["pieces", "fma"])
def way(request, monkeypatch):
    """How float32 is multiplied, where it matters in which way: else as the CPU can."""
    if request.param == "pieces" and amx.missing():
        pytest.skip(f"no tiles: {amx.missing()}")
    dtype = request.node.callspec.params.get("dtype", "float32")
    if request.param == "pieces" and (dtype != "float32" or request.node.callspec.params.get("n_q", 300) < 200):
        pytest.skip("not in pieces")
    monkeypatch.setattr(base, "choose_float32", lambda ways: request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n_q", [4, 300])
def test_accuracy(dtype, n_q):
    q, k, v = data(7, n_q, 8192, 1, 1, 128, 128, dtype)
    out, _ = attend(q, k, v, np.zeros(n_q, int), np.full(n_q, 8192), 128**-0.5)
    want, _ = oracle.attend(q, k, v, np.ones((n_q, 8192), bool), 128**-0.5)
    assert np.abs(out - want).max() < BOUND[dtype]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("n_q", [4, 300])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["huge key", "equal keys", "cancelling values", "large scores"])
def test_accuracy_of_odd_data(kind, dtype, n_q):
    """Within the bound, or where the scores themselves are not known as well, as good as NumPy in the same dtype."""
    q, k, v = data(8, n_q, 2048, 1, 1, 64, 64, dtype)
    bound = BOUND[dtype]
    if kind == "huge key":
        k[1000] *= 1e3
    elif kind == "equal keys":
        k[:] = k[0]
    elif kind == "cancelling values":
        v[1::2] = -v[::2]
        v *= 100
        bound *= 100
    else:
        q *= 1e4
    out, _ = attend(q, k, v, np.zeros(n_q, int), np.full(n_q, 2048), 64**-0.5)
    want, _ = oracle.attend(q, k, v, np.ones((n_q, 2048), bool), 64**-0.5)
    scores = q[:, 0] @ k[:, 0].T / np.sqrt(np.asarray(64, dtype))
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    plain = (weights @ v[:, 0] / weights.sum(axis=1, keepdims=True))[:, None]
    assert np.abs(out - want).max() < max(bound, 2 * np.abs(plain - want).max())


@pytest.mark.parametrize("products", BFLOAT16_WAYS)
def test_bfloat16_is_no_worse_than_torch(products):
    torch = pytest.importorskip("torch")
    q, k, v = data(9, 512, 8192, 1, 1, 128, 128, "bfloat16")
    out, _ = attend(q, k, v, np.zeros(512, int), np.full(512, 8192), 128**-0.5, products=products)
    a, b, c = (torch.from_numpy(x.astype("f4").transpose(1, 0, 2).copy()).bfloat16()[None] for x in (q, k, v))
    theirs = torch.nn.functional.scaled_dot_product_attention(a, b, c)[0].float().numpy().transpose(1, 0, 2)
    want, _ = oracle.attend(q, k, v, np.ones((512, 8192), bool), 128**-0.5)
    assert np.abs(out.astype("f8") - want).max() <= np.abs(theirs - want).max()


def rising(dtype, n_q, n_k):
    """Queries and keys whose largest scores come late for some rows, early for others, by little and by much."""
    q, k, v = data(12, n_q, n_k, 1, 1, 24, 20, dtype)
    q[:, :, 0] = np.linspace(-40, 40, n_q)[:, None]
    k[:, :, 0] = np.linspace(0, 1, n_k)[:, None]
    return q, k, v


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_q", [3, 150])
def test_scores_that_rise(dtype, n_q):
    """Rows whose maxima move often, seldom and never, side by side."""
    q, k, v = rising(dtype, n_q, 1100)
    for begin, end in (ranges("causal", n_q, 1100), (np.zeros(n_q, int), np.full(n_q, 1100))):
        check(q, k, v, begin, end, scale=0.2, blocks=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_score_far_above_those_before(dtype):
    """In a row of every other group: e^score would be infinite, and the other keys weigh nothing after it."""
    q, k, v = data(14, 150, 1100, 1, 1, 24, 20, dtype)
    k[:, :, 0] = 0
    k[700, :, 0] = 1
    q[::2 * ROWS, :, 0] = 5000
    check(q, k, v, np.zeros(150, int), np.full(150, 1100))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_whatever_its_neighbours_see(dtype):
    """The way of a group of rows through a tile depends on all of them, the bits of a row on none of the others."""
    q, k, v = rising(dtype, 150, 1100)
    begin, end = np.zeros(150, int), np.full(150, 1100)
    alone = attend(q, k, v, begin, end, 0.2)
    begin[::ROWS] = 1
    end[1::ROWS] = 1099
    q[2::2 * ROWS] *= np.asarray(30, q.dtype)           # these raise their maxima elsewhere
    among = attend(q, k, v, begin, end, 0.2)
    same = np.isin(np.arange(150) % ROWS, (3, 4, 5))
    for x, y in zip(alone, among, strict=True):
        assert x[same].tobytes() == y[same].tobytes()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_numbers_that_are_not_finite_among_many_keys(bad, where):
    """In the first tile or later, met by a whole group of rows, by some of it or by none."""
    for place in (0, 70, 700):
        arrays = dict(zip("qkv", data(13, 250, 1100, 1, 1, 24, 20, "float32"), strict=True))
        arrays[where][place % 250, 0, 3] = bad
        begin, end = np.zeros(250, int), np.full(250, 1100)
        begin[:50] = place + 1
        begin[50:100:5] = place + 1
        check(**arrays, begin=begin, end=end)


@pytest.mark.usefixtures("way")
def test_long_sums_keep_their_digits():
    """Values that do not cancel: a plain float32 sum over as many keys would lose two digits."""
    q, k, v = data(10, 3, 200_000, 1, 1, 8, 8, "float32")
    v += 10
    for n in (3, 250):
        rows = np.repeat(q, 100, axis=0)[:n]
        out, _ = attend(rows, k, v, np.zeros(n, int), np.full(n, len(k)), 0.1)
        want, _ = oracle.attend(q, k, v, np.ones((3, len(k)), bool), 0.1)
        assert oracle.error(out, np.repeat(want, 100, axis=0)[:n]) < 2e-6


def test_tile_shape_fits_the_cache():
    lanes = vector.machine().vector_bytes // 4
    for cache in (2**18, 2**20, 2**21):
        for width in (16, 128, 512):
            rows, keys = forward_tile_shape(width, width, 4, cache)
            assert rows % ROWS == 0
            assert keys % (VECTORS * lanes) == 0
            assert rows >= 8 * ROWS
            if rows > 8 * ROWS:
                assert 4 * (rows * (2 * width + keys) + 2 * keys * width) <= cache / 2
    assert forward_tile_shape(16, 16, 4, 2**21)[0] > 8 * ROWS


def test_merge_of_states():
    rng = np.random.default_rng(0)
    acc, row_max, row_sum = rng.standard_normal((4, 5, 2, 3)), rng.standard_normal((4, 5, 2)), rng.random((4, 5, 2))
    for unseeing in (np.s_[1:, 0], np.s_[:, 1]):                  # parts that saw nothing, a row where nobody did
        row_max[unseeing] = -np.inf
        row_sum[unseeing] = 0
        acc[unseeing] = 0
    state = State(acc[0].copy(), row_max[0].copy(), row_sum[0].copy())
    combine(state, State(acc[1:], row_max[1:], row_sum[1:]))
    weights = np.exp(row_max - np.where(state.row_max == -np.inf, 0, state.row_max))
    assert (state.row_max == row_max.max(axis=0)).all()
    assert np.allclose(state.row_sum, (weights * row_sum).sum(axis=0))
    assert np.allclose(state.acc, (weights[..., None] * acc).sum(axis=0))
    assert (state.acc[0] == acc[0, 0]).all()


def test_without_a_cache_folder_there_is_one_warning(tmp_path):
    """No locator finds a folder: kernels still compile, and only the launcher's rank 0 says so, once."""
    code = ("import numpy as np, ringmpi.backends as b\n"
            "x = b.open_backend('numba', 1); x.prepare(np.dtype('f4'), np.dtype('f4'), 8, 8); print('ready')")
    for rank, warnings in (("0", 1), ("1", 0)):
        environment = os.environ | {"NUMBA_CACHE_LOCATOR_CLASSES": "IPythonCacheLocator", "PMI_RANK": rank}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200,
                             check=True)
        assert run.stdout == "ready\n"
        assert run.stderr.count("RuntimeWarning") == warnings, run.stderr
        assert run.stderr.count("NUMBA_CACHE_DIR") == warnings


def test_nothing_is_compiled_at_import():
    code = ("from ringmpi.backends.numba_ import compiled; from ringmpi.backends import open_backend; "
            "open_backend('numba', 2); "
            "print(len(compiled.forward_keys.signatures) + len(compiled.pack_forward.signatures))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
                          ).stdout == "0\n"


def test_the_cache_knows_every_source(tmp_path, monkeypatch):
    """Numba's cache looks at the file of a function alone: all modules that `compiled` stands on must be in the key."""
    from ringmpi.backends.numba_ import compiled
    folder = Path(compiled.__file__).parent

    def imported(stem):
        for node in ast.walk(ast.parse((folder / f"{stem}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                yield from [node.module] if node.module else [alias.name for alias in node.names]

    below, new = set(), {"compiled"}
    while new:
        below |= new
        new = {name for stem in new for name in imported(stem)} - below
    assert {module.__name__.rsplit(".", 1)[1] for module in compiled.SOURCES} == below - {"compiled", "cache"}
    before = compiled._digest()
    copy = tmp_path / "forward_tile.py"
    copy.write_text("# changed")
    monkeypatch.setattr(compiled.forward_tile, "__file__", str(copy))
    assert compiled._digest() != before


@pytest.mark.parametrize(("dtype", "size"), [("float32", 1e9), ("float32", 1e30), ("float64", 1e18),
                                             ("bfloat16", 1e12)])
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("n_q", [3, 300])
def test_scores_beyond_any_exponent(dtype, size, n_q):
    """The largest score's weight is 1 however large it is, and lse is that score."""
    q, k, v = data(11, n_q, 500, 2, 1, 8, 8, dtype)
    q = (q.astype(float) * size).astype(q.dtype)
    out, lse = attend(q, k, v, *ranges("causal", n_q, 500), 1.0)
    j, (begin, end) = np.arange(500), ranges("causal", n_q, 500)
    _, want = oracle.attend(q, k, v, (j >= begin[:, None]) & (j < end[:, None]), 1.0)
    assert np.isfinite(out.astype(float)).all()
    assert oracle.error(lse, want) < 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_prepare_compiles_all_that_a_dtype_needs(dtype):
    """Nothing is compiled in the ring: whatever the dims, the number of rows and the arrays' flags."""
    only_prepared(dtype)


@pytest.mark.parametrize("products", BFLOAT16_WAYS)
def test_prepare_compiles_every_way_and_odd_dims(products):
    only_prepared("bfloat16", products)


def only_prepared(dtype, products="auto"):
    from ringmpi.backends.numba_ import compiled as kernels
    every = (kernels.combine_rows, kernels.finish_rows, kernels.forward_keys, kernels.pack_forward,
             kernels.forward_units, kernels.pack_units)
    backend, kind = open_backend("numba", 2), accumulator(DTYPES[dtype])
    backend.settle(products, [backend.ways])
    backend.prepare(DTYPES[dtype], kind, 8, 8)
    compiled = [len(f.signatures) for f in every]
    for n_q, dim, dim_v in [(2, 16, 16), (300, 16, 16), (2, 7, 3), (300, 7, 3)]:
        q, k, v = data(0, n_q, 50, 2, 1, dim, dim_v, dtype)
        q.flags.writeable = False
        state, whole = State.empty(n_q, 2, dim_v, kind), np.full(n_q, 50)
        sum(backend.accumulate(state, q, k, v, 0 * whole, whole, Score(0.1)))
        backend.combine(state, State(*(x[None].copy() for x in vars(state).values())))
        backend.finish(state, whole > 0, np.empty((n_q, 2, dim_v), q.dtype), np.empty((n_q, 2), kind))
    assert [len(f.signatures) for f in every] == compiled
    backend.close()


def test_a_cache_that_cannot_be_written_is_one_warning():
    """A full disk or a quota: the first call goes on without the cache."""
    code = ("import resource, numpy as np, ringmpi.backends as b; "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
            "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "x = b.open_backend('numba', 1); x.prepare(np.dtype('f4'), np.dtype('f4'), 8, 8); print('ready')")
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"NUMBA_CACHE_DIR": folder},
                             capture_output=True, text=True, timeout=200, check=True)
    assert run.stdout == "ready\n"
    assert run.stderr.count("NUMBA_CACHE_DIR") == 1, run.stderr


@pytest.mark.parametrize("damage", ["half", "empty", "flipped", "a folder"])
def test_a_damaged_cache_is_made_anew_with_one_warning(tmp_path, damage):
    """Whichever file it is: never an exception, and no damaged machine code is run; then it is whole again."""
    script, folder = tmp_path / "kernel.py", tmp_path / "cache"
    script.write_text("import numba; from ringmpi.backends.numba_ import cache, compiled\n"
                      "def add(x):\n    return x + 1\n"
                      "f = numba.njit(add)\nf._cache = cache.KernelCache(add)\ncompiled.compile_for(f, 1)\n"
                      "assert f(1) == 2\nprint(sum(f.stats.cache_hits.values()))\n"
                      "assert type(compiled.forward_keys._cache) is cache.KernelCache")

    def run():
        return subprocess.run([sys.executable, script], env=os.environ | {"NUMBA_CACHE_DIR": str(folder)},
                              capture_output=True, text=True, timeout=100, check=True)

    assert (run().stdout, run().stdout) == ("0\n", "1\n")
    files = sorted(folder.rglob("*.nb?"))
    assert len(files) == 2
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) * 2 // 3] ^= 4
        file.write_bytes({"half": content[:len(content) // 2], "empty": b""}.get(damage, content))
        if damage == "a folder":
            file.unlink()
            file.mkdir()
        done = run()
        assert done.stdout == "0\n"
        assert done.stderr.count("the kernel cache") == 1
        assert str(file) in done.stderr
        if damage == "a folder":
            assert "remove the file, or set NUMBA_CACHE_DIR" in done.stderr
            file.rmdir()
            run()
        again = run()
        assert (again.stdout, again.stderr) == ("1\n", "")


def test_a_cache_of_another_version_is_left_without_a_word(tmp_path):
    """What was saved names classes that are no longer there."""
    from ringmpi.backends.numba_ import cache
    file = tmp_path / "x.nbi"
    body = b"cno_such_module\nThing\n."
    file.write_bytes(hashlib.sha256(body).digest() + body)
    assert cache._read(file) is None
    assert not file.exists()
