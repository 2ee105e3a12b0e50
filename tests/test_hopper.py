"""The kernel for Hopper GPUs, run on the CPU with the chip's machinery emulated; with `-m gpu` on the chip itself."""

import itertools
import re
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import test_cuda
from emulate import EmulatedDevice
from nvrtc_versions import complaints
from oracle import case
from test_cuda import check_equal_keys, run

from ringmpi import BackendError, device
from ringmpi.backends.cuda import hopper
from ringmpi.backends.cuda.backend import CudaBackend
from ringmpi.backends.cuda.instances import dkdv_kernels, dq_kernels, forward_kernels
from ringmpi.backends.cuda.sources import compiler_options, kernels_folder
from ringmpi.dtypes import DTYPES
from ringmpi.score import Score

BOTH = ["bfloat16", "float16"]


class HopperBackend(CudaBackend):
    """The backend, which must choose that kernel."""

    def __init__(self, threads, gpu):
        super().__init__(threads, gpu)
        self.hopper = True

    def _choose(self, q, k, v, score, intervals):
        kernel = super()._choose(q, k, v, score, intervals)
        assert kernel.file == hopper.FILE
        return kernel


@pytest.fixture(scope="module", params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(request):
    """The backend on an emulated GPU; with `-m gpu` on a real one, which must be a Hopper."""
    gpu = EmulatedDevice() if request.param == "emulated" else device.open_device(0)
    if gpu.capability != (9, 0):
        pytest.skip(f"expected a GPU of compute capability 9.0, got {gpu.name} with {gpu.capability}")
    return HopperBackend(1, gpu)


def check(backend, q, k, v, begin, end, scale=0.2, blocks=1):
    dtype = next(name for name, kind in DTYPES.items() if kind == q.dtype)
    return test_cuda.check(backend, q, k, v, begin, end, dtype, scale, blocks)


def intervals(kind, n_q, n_k, group=1):
    i = np.arange(n_q)
    first = i * group % 128 < 64                   # of two warpgroups
    return {"full": (0 * i, 0 * i + n_k), "causal": (0 * i, np.clip(i + 1 + n_k - n_q, 0, n_k)), "none": (0 * i, 0 * i),
            "window": (np.clip(i - 9, 0, n_k), np.clip(i + 90, 0, n_k)), "one key": (i % n_k, i % n_k + 1),
            "half": (0 * i, np.where(i < n_q // 2, n_k, 0)), "late": (0 * i + n_k - 1, 0 * i + n_k),
            "first more": (0 * i, np.where(first, n_k, 300)), "first less": (0 * i, np.where(first, 300, n_k)),
            "first later": (np.where(first, 260, 0), 0 * i + n_k - 20),
            "apart": (np.where(i < n_q // 2, 0, n_k - 3), np.where(i < n_q // 2, 3, n_k))}[kind]


@pytest.mark.parametrize(("dtype", "dim", "dim_v"), [
    *itertools.product(["bfloat16"], [64, 40, 128], [64, 128]), ("bfloat16", 72, 104), ("bfloat16", 128, 8),
    ("float16", 64, 64), ("float16", 72, 104)])
def test_every_width(backend, dtype, dim, dim_v):
    q, k, v, begin, end = case(0, 131, 401, 2, 1, dim, dim_v, dtype)
    check(backend, q, k, v, begin, end, blocks=2)
    check(backend, q, k, v, *intervals("full", 131, 401))


@pytest.mark.parametrize("heads", [(1, 1), (8, 2)])
@pytest.mark.parametrize("kind", ["full", "causal", "none", "window", "one key", "half", "late", "apart",
                                  "first more", "first less", "first later"])
def test_what_is_seen(backend, heads, kind):
    """Whole tiles, cut ones, and tiles that only some of the warpgroups see."""
    n_q = 197 // (heads[0] // heads[1])
    q, k, v, _, _ = case(1, n_q, 600, *heads, 128, 64, "bfloat16")
    check(backend, q, k, v, *intervals(kind, n_q, 600, heads[0] // heads[1]))


@pytest.mark.parametrize("n_k", [1, 127, 128, 129, 256, 1025])
def test_ends_around_tiles(backend, n_k):
    q, k, v, begin, end = case(2, 150, n_k, 1, 1, 64, 64, "float16")
    check(backend, q, k, v, begin, end)
    check(backend, q, k, v, *intervals("full", 150, n_k), blocks=3)


def test_few_rows_split_the_keys(backend):
    q, k, v, begin, end = case(3, 65, 2200, 1, 1, 64, 64, "bfloat16")
    check(backend, q, k, v, begin, end)
    check(backend, q, k, v, *intervals("full", 65, 2200), blocks=2)
    if isinstance(backend.device, EmulatedDevice):
        assert max(grid[2] for name, grid, _, _ in backend.device.launched if name.startswith("accumulate")) > 1


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_and_infinity_reach_the_rows_that_see_them_and_no_others(backend, dtype, bad, where):
    q, k, v, _, _ = case(4, 140, 300, 1, 1, 72, 72, dtype)
    begin, end = intervals("causal", 140, 300)
    begin = begin + np.arange(140) % 3 * 80
    arrays = {"q": q, "k": k, "v": v}
    arrays[where][{"q": 20}.get(where, 220), 0, 3] = bad
    if where == "v":
        v[100, 0, 71], v[101, 0, 70], v[290, 0, 70] = bad, -bad, bad
    out = check(backend, q, k, v, begin, end)
    touched = ~np.isfinite(out.astype(float)).all(axis=(1, 2))
    see = (begin <= 220) & (end > 220) if where != "q" else np.arange(140) == 20
    if where != "v":
        assert not touched[~see].any()
    else:
        assert 0 < touched.sum() < 140


@pytest.mark.parametrize("dtype", BOTH)
def test_whole_columns_of_infinity(backend, dtype):
    """As many as a tile has keys: more than codes of them can be added up."""
    q, k, v, _, _ = case(9, 70, 300, 1, 1, 72, 72, dtype)
    v[:, 0, 1], v[:, 0, 2], v[:, 0, 3], v[::2, 0, 3] = np.inf, -np.inf, np.nan, np.inf
    check(backend, q, k, v, *intervals("causal", 70, 300))
    check(backend, q, k, v, *intervals("window", 70, 300))
    check(backend, q, k, v, np.zeros(70, int), np.where(np.arange(70) == 3, 2, 300))


@pytest.mark.parametrize("size", [1e4, -1e4, 1e30])
def test_large_scores_do_not_overflow(backend, size):
    q, k, v, _, _ = case(5, 70, 300, 1, 1, 16, 16, "bfloat16")
    q = (q.astype(np.float64) * size).astype(q.dtype)
    out, lse = run(backend, q, k, v, *intervals("full", 70, 300), 0.3, 3)
    want, want_lse = oracle.attend(q, k, v, np.ones((70, 300), bool), 0.3)
    assert oracle.error(out, want) <= 3e-2
    assert oracle.error(lse, want_lse) <= 1e-6


def test_scores_of_minus_infinity(backend):
    q, k, v, begin, end = case(6, 100, 300, 1, 1, 64, 64, "bfloat16")
    check(backend, q, k, v, begin, end, scale=-0.4)
    q[...] = 1
    k[:200] = -np.inf
    out, lse = run(backend, q, k, v, np.zeros(100, int), np.full(100, 300), 0.3, 1)
    assert np.isfinite(out.astype(float)).all()
    assert np.isfinite(lse).all()
    out, lse = run(backend, q, k, v, np.zeros(100, int), np.full(100, 200), 0.3, 1)
    assert np.isnan(out.astype(float)).all()
    assert (lse == -np.inf).all()


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_a_scale_that_is_not_positive(backend, scale):
    q, k, v, _, _ = case(10, 140, 300, 1, 1, 72, 64, "bfloat16")
    begin, end = intervals("causal", 140, 300)
    begin = begin + np.arange(140) % 3 * 80
    check(backend, q, k, v, begin, end, scale=scale, blocks=2)
    q[5, 0, 3], q[6, 0, 3], k[40, 0, 2], k[220, 0, 71] = np.inf, np.nan, -np.inf, np.nan
    with np.errstate(invalid="ignore"):
        check(backend, q, k, v, begin, end, scale=scale)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("size", [2e3, 6e4, 1e25])
def test_equal_keys_with_large_scores_share_the_weight(backend, dtype, size):
    """Beside rows whose scores are small."""
    check_equal_keys(backend, case(11, 70, 600, 1, 1, 64, 64, dtype)[:3], dtype, size, blocks=2, large=slice(35))


@pytest.mark.parametrize("dims", [(64, 64), (128, 128)])
def test_the_result_does_not_depend_on_the_order_of_threads_and_arrivals(dims):
    q, k, v, begin, end = case(7, 140, 700, 1, 1, *dims, "bfloat16")
    begin //= 4
    first, *others = (run(HopperBackend(1, EmulatedDevice(seed)), q, k, v, begin, end, 0.2, 1) for seed in range(4))
    for other in others:
        assert all((a == b).all() for a, b in zip(first, other, strict=True))


def test_it_is_proven_where_there_is_a_hopper_unless_a_variable_turns_it_off(monkeypatch):
    monkeypatch.setenv("RINGMPI_HOPPER", "0")
    assert not CudaBackend(1, EmulatedDevice()).hopper
    monkeypatch.delenv("RINGMPI_HOPPER")
    assert not CudaBackend(1, EmulatedDevice(capability=(8, 0))).hopper
    backend = CudaBackend(1, EmulatedDevice())
    backend.prepare(DTYPES["bfloat16"], np.dtype("f4"), 64, 64)
    rows = [grid[0] for name, grid, *_ in backend.device.launched if name in {k[1] for k in hopper_kernels(backend)}]
    assert rows == [1, 2]                      # blocks of 192 rows


def test_an_error_of_it_says_how_to_do_without(monkeypatch):
    monkeypatch.setenv("RINGMPI_HOPPER", "1")
    gpu = EmulatedDevice()

    def unknown(*_):
        raise BackendError("the driver is from before")
    gpu.tensor_map = unknown
    with pytest.raises(BackendError, match="fails; please report it, and set RINGMPI_HOPPER=0 meanwhile: the"):
        CudaBackend(1, gpu).prepare(DTYPES["bfloat16"], np.dtype("f4"), 64, 64)
    monkeypatch.setenv("RINGMPI_HOPPER", "0")
    CudaBackend(1, gpu).prepare(DTYPES["bfloat16"], np.dtype("f4"), 64, 64)


def hopper_kernels(backend):
    return [key for key in backend.device.cache if key[0] == hopper.FILE]


def test_what_it_takes():
    gpu = EmulatedDevice()

    def takes(n_q, dim, dim_v, dtype="bfloat16", heads=1):
        q, k, v, _, _ = case(8, n_q, 10, heads, 1, dim, dim_v, dtype)
        return hopper.takes(gpu, gpu.array(q), gpu.array(k), gpu.array(v), Score(1.0))

    assert takes(65, 64, 128)
    assert takes(17, 128, 8, "float16", heads=4)
    assert not takes(64, 64, 64)
    assert not takes(500, 64, 136)
    assert not takes(500, 60, 64)
    assert not takes(500, 64, 64, "float32")
    gpu.capability = (10, 0)
    assert not takes(500, 64, 64)
    gpu.capability = (9, 0)


@pytest.mark.parametrize(("dim", "dim_v"), [*itertools.product((64, 128), (64, 128))])
def test_every_instance_fits_a_block(dim, dim_v):
    for dtype in BOTH:
        made = hopper.instance(DTYPES[dtype], dim, dim_v)
        assert made.shared_bytes + 2048 <= 227 * 1024


def test_a_binary_is_whole_and_compiled_once(tmp_path, monkeypatch):
    """What CuPy is given to load, without a GPU to load it."""
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy brings the interface to NVRTC")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    loaded = []

    def module(path):
        loaded.append(Path(path))
        return SimpleNamespace(get_function=lambda name: name)

    gpu = device.Device.__new__(device.Device)
    gpu._cupy = SimpleNamespace(cuda=SimpleNamespace(nvrtc=nvrtc), RawModule=module)
    source = tmp_path / "double.cu"
    source.write_text("template <class T> __global__ void twice(T* x) { *x += *x; }")
    names = [gpu.compile_for("sm_90a", source, name, ()) for name in ("twice<int>", "twice<float>", "twice<int>")]
    assert names[0] == names[2] != names[1]
    assert loaded[0] == loaded[2] != loaded[1]
    elf = loaded[0].read_bytes()
    for offset, size in ((32, 54), (40, 58)):      # program headers, section headers: where, and how large and many
        start, (each, count) = struct.unpack_from("<Q", elf, offset)[0], struct.unpack_from("<2H", elf, size)
        assert start + each * count <= len(elf)
    assert len(list(loaded[0].parent.iterdir())) == 4
    with pytest.raises(BackendError, match="no_such"):
        gpu.compile_for("sm_90a", source, "no_such<int>", ())
    for suffix in (".cubin", ".name"):              # what is damaged is made anew, and never loaded
        file = loaded[0].with_suffix(suffix)
        file.write_bytes(file.read_bytes()[:-2] + b"\xff\0")
        with pytest.warns(RuntimeWarning, match=r"damaged, a kernel is compiled anew: .*cubin was removed"):
            assert gpu.compile_for("sm_90a", source, "twice<int>", ()) == names[0]
        assert loaded[-1].read_bytes() == elf
    loaded[0].unlink()
    loaded[0].mkdir()
    with pytest.raises(BackendError, match=r"cache .* can't be used: .*directory.*CUPY_CACHE_DIR"):
        gpu.compile_for("sm_90a", source, "twice<int>", ())


def test_every_source_compiles_for_an_architecture_by_name(tmp_path, monkeypatch):
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy brings the interface to NVRTC")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    gpu = device.Device.__new__(device.Device)
    gpu._cupy = SimpleNamespace(cuda=SimpleNamespace(nvrtc=nvrtc),
                                RawModule=lambda path: SimpleNamespace(get_function=lambda name: name))
    made = {"state.cu": "reset<float>", hopper.FILE: hopper.instance(DTYPES["bfloat16"], 64, 64).name}
    for dtype, dim in (("float32", 16), ("bfloat16", 16), ("float64", 128)):
        kind = DTYPES[dtype], dim, dim
        for kernel in (forward_kernels(*kind, 1, 16)[0], dq_kernels(*kind, 1, 16)[0], dkdv_kernels(*kind, 16)[0][0]):
            made[kernel.file] = kernel.name
    assert set(made) == {path.name for path in kernels_folder().glob("*.cu")}
    for file, name in made.items():
        assert gpu.compile_for(hopper.ARCHITECTURE, kernels_folder() / file, name, compiler_options())


@pytest.mark.parametrize(("dtype", "dim", "dim_v"), [("bfloat16", 64, 64), ("bfloat16", 64, 128), ("bfloat16", 128, 64),
                                                     ("bfloat16", 128, 128), ("float16", 128, 128)])
def test_nvrtc_gives_an_instance_the_registers_it_has(dtype, dim, dim_v):
    """Compiled for the chip, without a GPU: no spills, and nothing that the assembler warns of."""
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy brings the interface to NVRTC")
    made = hopper.instance(DTYPES[dtype], dim, dim_v)
    program = nvrtc.createProgram((kernels_folder() / hopper.FILE).read_text(), hopper.FILE, (), ())
    nvrtc.addNameExpression(program, made.name)
    nvrtc.compileProgram(program, (f"-arch={hopper.ARCHITECTURE}", "--std=c++17", "--ptxas-options=-v", *device.OPTIONS,
                                   f"-I{kernels_folder()}"))
    log = nvrtc.getProgramLog(program)
    assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", log), log
    assert not complaints(log), log
    assert f"Used {65536 // made.threads // 8 * 8} registers" in log, log
