"""On a real GPU: `python -m pytest -m gpu`. Larger cases than the emulator can do, other libraries' arrays, and ranks.

The tests of test_cuda.py and test_mpi_cuda.py run on it too.
"""

import launch
import numpy as np
import one_block
import oracle
import pytest
from oracle import functions
from test_cuda import run

from ringmpi import Mask, RingAttention
from ringmpi.backends import open_backend
from ringmpi.device import open_device
from ringmpi.dtypes import DTYPES, TENSOR_TOLERANCE

pytestmark = pytest.mark.gpu
N_Q, N_K = 1500, 4100


@pytest.fixture(scope="module")
def backends():
    opened = open_backend("cuda", 1), open_backend("numpy", 4)
    yield opened
    for backend in opened:
        backend.close()


MASKS = {"full": {}, "causal": {"causal": True}, "window": {"window": (700, 0)},
         "documents": {"documents": [0, 900, 901, 2500, N_K]},
         "all": {"causal": True, "window": (900, None), "documents": [0, 2000, N_K], "first": 5}}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 64), (8, 2, 128), (3, 1, 80), (2, 2, 256)])
def test_the_same_as_numpy(backends, dtype, mask, heads, kv_heads, dim):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, h, dim)).astype(DTYPES[dtype])
               for n, h in ((N_Q, heads), (N_K, kv_heads), (N_K, kv_heads)))
    bounds = Mask(**MASKS[mask]).bounds(np.arange(N_Q), N_Q, N_K)
    for begin, end in bounds:
        results = [run(backend, q, k, v, begin, end, scale=dim**-0.5, blocks=3) for backend in backends]
        (out, lse), (want, want_lse) = results
        assert oracle.error(out, want) <= 2 * TENSOR_TOLERANCE[dtype]
        assert oracle.error(lse, want_lse) <= (1e-13 if dtype == "float64" else 4e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 4, 16, 17])
def test_few_queries_and_many_keys(backends, dtype, queries):
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((n, h, 128)).astype(DTYPES[dtype])
               for n, h in ((queries, 8), (200_000, 2), (200_000, 2)))
    begin, end = np.arange(queries) * 3, 200_000 - np.arange(queries) * 5
    (out, lse), (want, want_lse) = [run(backend, q, k, v, begin, end, scale=0.09) for backend in backends]
    assert oracle.error(out, want) <= 2 * TENSOR_TOLERANCE[dtype]
    assert oracle.error(lse, want_lse) <= (1e-13 if dtype == "float64" else 4e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["full", "all"])
@pytest.mark.parametrize("kind", ["plain", "all"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 64), (4, 1, 128), (1, 1, 256)])
def test_gradients_are_the_same_as_numpys(backends, dtype, mask, kind, heads, kv_heads, dim):
    rng = np.random.default_rng(4)
    q, k, v, dout = (rng.standard_normal((n, h, dim)).astype(DTYPES[dtype])
                     for n, h in ((N_Q, heads), (N_K, kv_heads), (N_K, kv_heads), (N_Q, heads)))
    score, sinks = functions(kind, heads, np.arange(N_Q) + N_K - N_Q, np.arange(N_K))
    for begin, end in Mask(**MASKS[mask]).bounds(np.arange(N_Q), N_Q, N_K):
        got, want = (one_block.run(backend, q, k, v, begin, end, dim**-0.5, score, sinks, 3, dout)
                     for backend in backends)
        for name, x in got.items():
            bound = 2 * one_block.BOUND[dtype] if name[0] == "d" else 4 * TENSOR_TOLERANCE[dtype]
            assert oracle.error(x, want[name]) <= bound, name


def test_runs_are_the_same_bit_for_bit(backends):
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((3000, 4, 128)).astype(DTYPES["bfloat16"]) for _ in range(3))
    begin, end = np.zeros(3000, int), np.arange(1, 3001)
    outs = [run(backends[0], q, k, v, begin, end, blocks=2)[0] for _ in range(20)]
    assert all((out == outs[0]).all() for out in outs)
    gradients = [one_block.run(backends[0], q, k, v, begin, end, 0.09, {}, None, 2, v) for _ in range(10)]
    assert all((other[name] == x).all() for other in gradients for name, x in gradients[0].items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_arrays_on_torch_streams(dtype):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    from mpi4py import MPI

    import ringmpi.torch
    torch.manual_seed(0)
    with RingAttention(MPI.COMM_SELF, mask=Mask(causal=True), backend="auto") as attention:
        for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(20_000_000)          # what comes is late: it must be waited for
                q, k, v = (torch.randn(700, 4, 64, device="cuda", dtype=getattr(torch, dtype), requires_grad=True)
                           for _ in range(3))
                got = ringmpi.torch.ring_attention(q, k, v, attention=attention).detach()
                want = torch.nn.functional.scaled_dot_product_attention(
                    *(x.detach().double().transpose(0, 1)[None] for x in (q, k, v)), is_causal=True)[0].transpose(0, 1)
                error = float((got.double() - want).abs().max() / want.abs().max())
            assert error <= TENSOR_TOLERANCE[dtype]


def test_tensors_are_redistributed_and_their_gradients_come_back():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    from mpi4py import MPI

    import ringmpi.torch
    for dtype in (torch.bfloat16, torch.float32, torch.complex128):
        x = torch.randn(3, 500, device="cuda").to(dtype).T.requires_grad_()
        moved = ringmpi.torch.redistribute(x, comm=MPI.COMM_SELF)
        moved.abs().square().sum().backward()
        assert (moved == x).all()
        assert moved.data_ptr() != x.data_ptr()
        assert torch.allclose(x.grad, 2 * x.detach())


def test_jax_arrays():
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("this JAX has no GPU")
    from mpi4py import MPI
    q, k, v = (jax.random.normal(jax.random.key(i), (200, 2, 32)) for i in range(3))
    with RingAttention(MPI.COMM_SELF) as attention:
        out = attention(q, k, v).get()
    want, _ = oracle.attend(*(np.asarray(x) for x in (q, k, v)), np.ones((200, 200), bool), 32**-0.5)
    assert oracle.error(out, want) <= TENSOR_TOLERANCE["float32"]


def test_copies_at_speed():
    gpu = open_device(0)
    x = np.random.default_rng(3).standard_normal((50_000_000,))
    assert (gpu.host(gpu.array(x)) == x).all()


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_the_gpu(ranks, tmp_path):
    result = launch.launch(ranks, ["-m", "pytest", "--with-mpi", "-q", "-p", "no:cacheprovider", "-x", "-m", "gpu",
                                   launch.HERE / "test_mpi_cuda.py"], folder=tmp_path, timeout=400)
    assert result.code == 0, result.text
    assert len(result.ranks) == ranks, result.text


