"""Torch's kernels in the place of ours for gradients: what they are given, and what happens where they are wrong."""

import argparse
import re
from functools import partial

import numpy as np
import oracle
import pytest
from emulate import EmulatedDevice
from one_block import BOUND, run
from oracle import case, dense

from ringmpi import BackendError, OptionError, device
from ringmpi.backends import check_gpu_kernels, open_backend
from ringmpi.backends.base import GPU_KERNELS
from ringmpi.backends.cuda import library
from ringmpi.backends.cuda.backend import LIBRARY_TEST
from ringmpi.commands import bench, options
from ringmpi.dtypes import DTYPES


def staircase(n_q, first, top):
    return np.zeros(n_q, int) + first, top + np.arange(n_q)


SHAPES = {
    "full": (np.zeros(40, int), np.full(40, 60)),
    "causal square": staircase(40, 0, 1),
    "strictly causal": staircase(40, 0, 0),
    "rectangle and square": staircase(40, 5, 20),
    "a middle": (np.full(40, 7), np.full(40, 50)),
    "some rows": (np.zeros(40, int), np.where(np.arange(40) < 13, 0, 60)),
    "ragged ends": (np.arange(40) % 3, 60 - np.arange(40) % 5),
    "slow stairs": (np.zeros(40, int), 40 + np.arange(40) // 2),
    "a window": (np.maximum(0, np.arange(40) - 9), 1 + np.arange(40)),
    "a gap": (np.zeros(40, int), np.where(np.arange(40) % 7 == 3, 0, 60)),
    "one row": (np.zeros(1, int), np.full(1, 60)),
    "nothing": (np.full(40, 9), np.full(40, 9)),
}
BY_TORCH = {"full", "causal square", "strictly causal", "rectangle and square", "a middle", "some rows", "ragged ends",
            "slow stairs", "one row"}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks of tests are small."""
    monkeypatch.setattr(library, "FEWEST_PAIRS", 1)
    monkeypatch.setattr(library, "LEAST", 1)


@pytest.mark.parametrize("name", SHAPES)
def test_pieces_and_the_rest_are_the_block(name):
    """Each pair once, and none besides."""
    begin, end = SHAPES[name]
    met = np.zeros((len(begin), 120), int)
    pieces, rest = library.cut(begin, end)
    for rows, columns, causal in pieces:
        size = rows.stop - rows.start, columns.stop - columns.start
        met[rows, columns] += np.tril(np.ones(size, int)) if causal else 1
        assert not causal or size[0] == size[1]
    for low, high in rest:
        met += (np.arange(120) >= low[:, None]) & (np.arange(120) < high[:, None])
    assert (met == ((np.arange(120) >= begin[:, None]) & (np.arange(120) < end[:, None]))).all()
    assert bool(pieces) is (name in BY_TORCH)


def test_small_blocks_are_ours(monkeypatch):
    monkeypatch.setattr(library, "FEWEST_PAIRS", 2401)
    assert not library.cut(*SHAPES["full"])[0]


@pytest.mark.parametrize(("n_q", "first", "top", "pieces"), [
    (99, 0, 1, 1), (99, 0, 2, 1), (99, 5, 75, 1), (99, 5, 76, 2), (64, 0, 1, 1), (63, 0, 99, 0)])
def test_slivers_are_ours(monkeypatch, n_q, first, top, pieces):
    monkeypatch.setattr(library, "LEAST", 70 if n_q == 99 else 64)
    begin, end = staircase(n_q, first, top)
    found, rest = library.cut(begin, end)
    assert len(found) == pieces
    seen = sum((high - low).sum() for low, high in [*(piece.intervals(n_q) for piece in found), *rest])
    assert seen == (end - begin).sum()
    assert not library.cut(np.zeros(200, int), np.full(200, 63))[0]


def on_cpu(name="torch on a CPU", change=None):
    """Give torch's kernel for CPUs, which has the same arguments; `change` spoils what it gives."""
    torch = pytest.importorskip("torch")
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def call(dout, q, k, v, out, lse, causal, scale):
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        grads = operator(dout, q, k, v, out, lse, 0.0, causal, scale=scale)
        if change:
            change(grads)
        return grads[0], *(x.unflatten(1, (-1, group)).sum(dim=2) for x in grads[1:])
    return library.Kernel(name, call)


def opened(monkeypatch, wish, *kernels):
    """Open the CUDA backend on an emulated GPU, with some kernels of torch; an error in their place is raised."""
    def found(gpu):
        if kernels and isinstance(kernels[0], Exception):
            raise kernels[0]
        return list(kernels)
    monkeypatch.setattr(library, "kernels", found)
    monkeypatch.setattr(device, "reason_missing", lambda: None)
    return open_backend("cuda", 1, EmulatedDevice(), gpu_kernels=wish)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_torch_takes_what_its_operators_are_given(monkeypatch, capability, kv_heads):
    """As far as shapes tell: the kernels themselves are for GPUs."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = library.kernels(EmulatedDevice(capability=capability))
    assert [kernel.name.split()[-1] for kernel in found] == (
        ["cudnn", "flash"] if capability == (9, 0) else ["flash", "cudnn"])
    q, dout, out = (torch.empty(1, 8, 64, 32, device="meta", dtype=torch.bfloat16) for _ in range(3))
    k, v = (torch.empty(1, kv_heads, 96, 32, device="meta", dtype=torch.bfloat16) for _ in range(2))
    lse = torch.empty(1, 8, 64, device="meta", dtype=torch.float32)
    for kernel in found:
        gradients = kernel.call(dout, q, k, v, out, lse, False, 0.3)
        assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)], kernel.name


def prepare(backend, dtype="bfloat16", dim=16):
    backend.prepare(DTYPES[dtype], np.dtype(np.float32), dim, dim, backward=True)
    backend.device.launched.clear()
    backend.differentiated_by = "own"


def wants_out(backend):
    return backend.wants_out(DTYPES["bfloat16"], np.dtype(np.float32), 16, 16, True)


def own_kernels(backend):
    return [name for name, *_ in backend.device.launched if name.startswith("gradient")]


def inputs(n_q, n_k, heads, kv_heads, dtype="bfloat16"):
    """q, k and v of dim 16, and cotangents of out and lse."""
    rng = np.random.default_rng(4)
    q, k, v, *_ = case(3, n_q, n_k, heads, kv_heads, 16, 16, dtype)
    return q, k, v, rng.standard_normal(q.shape).astype(q.dtype), rng.standard_normal(q.shape[:2])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_gradients(monkeypatch, dtype, name, kv_heads):
    backend = opened(monkeypatch, "library", on_cpu())
    prepare(backend, dtype)
    begin, end = SHAPES[name]
    q, k, v, dout, _ = inputs(len(begin), 100, 4, kv_heads, dtype)
    got = run(backend, q, k, v, begin, end, 0.3, {}, dout=dout)
    see = (np.arange(100) >= begin[:, None]) & (np.arange(100) < end[:, None])
    want = dense(q, k, v, see, 0.3, dout=dout)
    for x in ("dq", "dk", "dv"):
        assert oracle.error(got[x], want[x]) < BOUND[dtype], x
    whole = name in BY_TORCH - {"ragged ends", "slow stairs"} or name == "nothing"
    assert bool(own_kernels(backend)) is not whole
    assert backend.differentiated_by == ("torch on a CPU" if name in BY_TORCH else "own")


@pytest.mark.parametrize(("options", "scale"), [({"softcap": 2.0}, 0.3), ({}, -0.3), ({}, 0.0)])
def test_other_scores_are_ours(monkeypatch, options, scale):
    backend = opened(monkeypatch, "library", on_cpu())
    prepare(backend)
    q, k, v, dout, _ = inputs(40, 60, 2, 2)
    run(backend, q, k, v, *SHAPES["full"], scale, options, dout=dout)
    assert own_kernels(backend)


def test_a_cotangent_of_lse_is_ours(monkeypatch):
    """What torch makes of out is not delta then."""
    backend = opened(monkeypatch, "library", on_cpu())
    prepare(backend)
    q, k, v, dout, dlse = inputs(40, 60, 2, 2)
    got = run(backend, q, k, v, *SHAPES["full"], 0.3, {}, dout=dout, dlse=dlse)
    want = dense(q, k, v, np.ones((40, 60), bool), 0.3, dout=dout, dlse=dlse)
    assert own_kernels(backend)
    assert oracle.error(got["dq"], want["dq"]) < BOUND["bfloat16"]


def spoil(grads):
    grads[1][0, 0, 3] += 1


def complain(_):
    raise RuntimeError("no such kernel\nfor this GPU")


WRONG = {"wrong gradients (error": partial(on_cpu, change=spoil), "no such kernel": partial(
    on_cpu, change=complain), "No module named 'torch'": lambda: ModuleNotFoundError("No module named 'torch'")}


@pytest.mark.parametrize("reason", WRONG)
def test_kernels_that_are_not_right_are_given_up(monkeypatch, reason):
    backend = opened(monkeypatch, "auto", WRONG[reason]())
    prepare(backend)
    assert not wants_out(backend)
    q, k, v, dout, _ = inputs(40, 60, 2, 2)
    run(backend, q, k, v, *SHAPES["full"], 0.3, {}, dout=dout)
    assert own_kernels(backend)
    said = "'library' is not there on fake for bfloat16, dim 16: .*" + re.escape(reason)
    with pytest.raises(BackendError, match=said):
        prepare(opened(monkeypatch, "library", WRONG[reason]()))


def test_the_next_kernel_is_tried(monkeypatch):
    backend = opened(monkeypatch, "auto", on_cpu("first", spoil), on_cpu("second"))
    prepare(backend)
    q, k, v, dout, _ = inputs(40, 60, 2, 2)
    run(backend, q, k, v, *SHAPES["full"], 0.3, {}, dout=dout)
    assert wants_out(backend)
    assert backend.differentiated_by == "second"


def test_a_kernel_that_refuses_a_piece_is_given_up(monkeypatch):
    """As torch does of shapes that it has no kernel for, or where memory runs out; with "library" that is an error."""
    for wish in ("auto", "library"):
        kernel = on_cpu(change=lambda grads: grads[0].shape[2] != 33 or complain(grads))
        backend = opened(monkeypatch, wish, kernel)
        prepare(backend)
        q, k, v, dout, _ = inputs(33, 60, 2, 2)
        block = np.zeros(33, int), np.full(33, 60)
        if wish == "library":
            with pytest.raises(BackendError, match="no such kernel"):
                run(backend, q, k, v, *block, 0.3, {}, dout=dout)
            continue
        for _ in range(2):
            got = run(backend, q, k, v, *block, 0.3, {}, dout=dout)
            want = dense(q, k, v, np.ones((33, 60), bool), 0.3, dout=dout)
            for x in ("dq", "dk", "dv"):
                assert oracle.error(got[x], want[x]) < BOUND["bfloat16"], x
        assert own_kernels(backend)
        assert not wants_out(backend)


def test_torch_that_is_to_be_deterministic_is_not_asked(monkeypatch):
    torch = pytest.importorskip("torch")
    backend = opened(monkeypatch, "auto", on_cpu())
    prepare(backend)
    assert wants_out(backend)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not wants_out(backend)


def test_the_test_is_large_enough(monkeypatch):
    """For each kernel to get the pieces that it is meant for."""
    monkeypatch.undo()
    calls = []
    prepare(opened(monkeypatch, "library", on_cpu(change=lambda grads: calls.append(grads[1].shape[2]))))
    assert set(calls) == {LIBRARY_TEST[1] - 1 - LIBRARY_TEST[0], LIBRARY_TEST[0]}


def test_other_names_are_refused():
    with pytest.raises(OptionError, match="gpu_kernels: expected one of auto, own, library, got 'torch'"):
        check_gpu_kernels("torch")
    assert options.GPU_KERNELS == GPU_KERNELS          # which the command line has without loading backends


@pytest.mark.parametrize("words", [["ring"], ["kernel", "--backend", "cpu"]])
def test_a_benchmark_of_cpus_refuses_the_option(words):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    with pytest.raises(OptionError, match="--gpu-kernels: says whose kernels GPUs take"):
        bench.run(parser.parse_args([*words, "--gpu-kernels", "own"]))


@pytest.mark.parametrize(("wish", "canonical"), [("own", False), ("auto", True)])
def test_own_kernels_where_they_are_asked_for(monkeypatch, wish, canonical):
    backend = opened(monkeypatch, wish, RuntimeError("nobody is to look"))
    backend.canonical = canonical
    prepare(backend)
    assert not wants_out(backend)


def test_other_arrays_need_no_library(monkeypatch):
    """In float32, or dims that torch does not take, all is ours, and that is no error."""
    backend = opened(monkeypatch, "library", RuntimeError("nobody is to look"))
    backend.prepare(DTYPES["float32"], np.dtype(np.float32), 16, 16, backward=True)
    backend.prepare(DTYPES["bfloat16"], np.dtype(np.float32), 12, 12, backward=True)
    backend.prepare(DTYPES["bfloat16"], np.dtype(np.float32), 16, 32, backward=True)
