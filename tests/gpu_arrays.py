"""Two ranks that share the GPU, and arrays of other libraries: parts of `gpu_first.py`."""

import itertools

import numpy as np
import oracle
from gpu_answers import EMULATED, arrays, attempt, errors_of, exact, intervals
from mpi4py import MPI

from ringmpi import DtypeError, Mask, RingAttention, device, layout, redistribute
from ringmpi.dtypes import TENSOR_TOLERANCE
from ringmpi.schedules.gpu_transport import cuda_awareness

TOKENS, MANY_TOKENS = (60, 80) if EMULATED else (600, 4000)
DIM = 16 if EMULATED else 64
DTYPES = ("bfloat16",) if EMULATED else ("bfloat16", "float16", "float32", "float64")
MOST = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2.0**-5, "float16": 2.0**-8}      # of gradients' errors
SECONDS = 40.0                # to wait for the other rank


def ranks():
    """Result and gradients of each rank, twice in the same buffers, by each way that MPI has."""
    comm = MPI.COMM_WORLD
    awareness = cuda_awareness()
    if comm.rank == 0:
        attempt("ranks", "transport", lambda: {"ok": True, "CUDA-aware": awareness,
                                               "library": MPI.Get_library_version().split("\n")[0].strip("\0 ")})
    ways = ("staged", "direct") if comm.allreduce(awareness[0], MPI.MIN) else ("staged",)
    cases = [(dtype, name, way, TOKENS, "ring")
             for dtype, name, way in itertools.product(DTYPES, ("striped", "zigzag"), ways)]
    cases += [("bfloat16", name, "staged", MANY_TOKENS, schedule)          # blocks for the library
              for name, schedule in (("striped", "ring"), ("zigzag", "ring"), ("contiguous", "heads"))]
    for case in cases:
        attempt("ranks", f"rank {comm.rank} of {comm.size}: {' '.join(map(str, case))}",
                lambda case=case: ring_of(comm, *case))
    for dtype, way in itertools.product(DTYPES, ways):
        attempt("ranks", f"rank {comm.rank} of {comm.size}: redistribute {dtype} {way}",
                lambda dtype=dtype, way=way: dealt_anew(comm, dtype, way))
    for dtype in DTYPES:
        attempt("canonical", f"rank {comm.rank} of {comm.size}: {dtype}", lambda dtype=dtype: canonical_of(comm, dtype))


def dealt_anew(comm, dtype, way):
    """An array on the GPU from one layout to another and back, bit for bit."""
    gpu = device.open_device(0)
    x, = arrays(5, dtype, (TOKENS, 3, 5))
    mine, there = (x[layout.make(name, TOKENS, comm.size).positions(comm.rank)] for name in ("contiguous", "striped"))
    moved = redistribute(gpu.array(mine), comm=comm, source="contiguous", target="striped", gpu_transport=way)
    back = redistribute(moved, comm=comm, source="striped", target="contiguous", gpu_transport=way)
    return {"ok": moved.get().tobytes() == there.tobytes() and back.get().tobytes() == mine.tobytes()}


def canonical_of(comm, dtype):
    """The bits of all ranks in canonical order are those of one rank; and they are right."""
    gpu = device.open_device(0)
    q, k, v, dout = arrays(6, dtype, *((TOKENS, heads, DIM) for heads in (4, 2, 2, 4)))
    found = []
    for some, name in ((MPI.COMM_SELF, "contiguous"), (comm, "zigzag")):
        mine = layout.make(name, TOKENS, some.size).positions(some.rank)
        with RingAttention(some, mask=Mask(causal=True), layout=name, timeout=SECONDS, gpu_transport="staged",
                           allow_gpu_sharing=True, order="canonical") as attention:
            out = attention(*(gpu.array(x[mine]) for x in (q, k, v)))
            found.append([x.get() for x in (out, *attention.backward(gpu.array(dout[mine]))[:3])])
    alone, together = found
    errors = errors_of(dict(zip(("out", "dq", "dk", "dv"), together, strict=True)),
                       exact(q, k, v, *intervals("causal", TOKENS, TOKENS), DIM**-0.5, dout), mine)
    right = all(error <= (2 * TENSOR_TOLERANCE[dtype] if name == "out" else MOST[dtype])
                for name, error in errors.items())
    same = all(x[mine].tobytes() == y.tobytes() for x, y in zip(alone, together, strict=True))
    return {"ok": same and right, "errors": errors, "the bits of one rank": same}


def ring_of(comm, dtype, name, way, tokens, schedule):
    """One case on this rank."""
    gpu = device.open_device(0)
    q, k, v, dout = arrays(4, dtype, *((tokens, heads, DIM) for heads in (4, 2, 2, 4)))
    mine = layout.make(name, tokens, comm.size).positions(comm.rank)
    with RingAttention(comm, mask=Mask(causal=True), layout=name, timeout=SECONDS, gpu_transport=way,
                       allow_gpu_sharing=True, schedule=schedule) as attention:
        for _ in range(2):
            out = attention(*(gpu.array(x[mine]) for x in (q, k, v)))
            grads = attention.backward(gpu.array(dout[mine]))
        used = attention.transport.name
        kernels = attention.trace.kernels
    got = {name: x.get() for name, x in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=False)}
    errors = errors_of(got, exact(q, k, v, *intervals("causal", tokens, tokens), DIM**-0.5, dout), mine)
    right = {name: error <= (2 * TENSOR_TOLERANCE[dtype] if name == "out" else MOST[dtype])
             for name, error in errors.items()}
    return {"ok": all(right.values()) and used == way, "errors": errors, "transport": used, "kernels": kernels}


def dlpack():
    """Arrays of torch, on torch's streams, and of JAX."""
    for dtype, side in [("bfloat16", False), ("float32", True), ("float16", True), ("float64", False)]:
        attempt("dlpack", f"torch {dtype}{', a stream of its own' if side else ''}",
                lambda dtype=dtype, side=side: torch_arrays(dtype, side))
    attempt("dlpack", "torch bfloat16, requires_grad, is refused", refused)
    attempt("dlpack", "ringmpi.torch float64", torch_gradients)
    for dtype in ("float32", "bfloat16"):
        attempt("dlpack", f"jax {dtype}", lambda dtype=dtype: jax_arrays(dtype))


def refused():
    """A tensor that requires a gradient, which nobody would follow, is an error that says what to do."""
    try:
        torch_arrays("bfloat16", False, grad=True)
    except DtypeError as error:
        return {"ok": "detach()" in str(error), "said": str(error)}
    return {"ok": False}


def torch_arrays(dtype, side, grad=False):
    """What torch has not computed yet when the call begins must be waited for."""
    import torch
    stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
    with RingAttention(MPI.COMM_SELF, mask=Mask(causal=True)) as attention, torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        q, k, v = (torch.randn(700, 4, 64, device="cuda", dtype=getattr(torch, dtype), requires_grad=grad)
                   for _ in range(3))
        got = torch.from_dlpack(attention(q, k, v))
        want = torch_attention(*(x.detach().double() for x in (q, k, v)))
        error = float((got.double() - want).abs().max() / want.abs().max())
    return {"ok": error <= 2 * TENSOR_TOLERANCE[dtype], "errors": {"out": error}}


def torch_attention(q, k, v):
    """Causal attention by torch, of arrays as ours."""
    import torch
    return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)),
                                                            is_causal=True)[0].transpose(0, 1)


def torch_gradients():
    """Through autograd, on the GPU."""
    import torch

    import ringmpi.torch
    q, k, v = (torch.randn(300, 2, 64, device="cuda", dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = ringmpi.torch.ring_attention(q, k, v, comm=MPI.COMM_SELF, mask=Mask(causal=True))
    got = torch.autograd.grad(out.square().sum(), (q, k, v))
    want = torch.autograd.grad(torch_attention(q, k, v).square().sum(), (q, k, v))
    errors = {name: float((a - b).abs().max() / b.abs().max())
              for name, a, b in zip(("dq", "dk", "dv"), got, want, strict=True)}
    return {"ok": max(errors.values()) < 1e-11, "errors": errors}


def jax_arrays(dtype):
    """There and back by DLPack."""
    import jax
    q, k, v = (jax.random.normal(jax.random.key(i), (200, 2, 32)).astype(dtype) for i in range(3))
    with RingAttention(MPI.COMM_SELF) as attention:
        out = np.asarray(jax.dlpack.from_dlpack(attention(q, k, v))).astype(np.float64)
    want = oracle.dense(*(np.asarray(x) for x in (q, k, v)), np.ones((200, 200), bool), 32**-0.5)
    error = oracle.error(out, want["out"])
    return {"ok": error <= 2 * TENSOR_TOLERANCE[dtype], "errors": {"out": error}, "platform": jax.default_backend()}
