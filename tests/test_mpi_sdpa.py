"""ringmpi.torch.scaled_dot_product_attention beside torch's own on the whole sequence. Runs under mpiexec."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import ringmpi  # noqa: E402
import ringmpi.torch  # noqa: E402
from ringmpi.call import Call  # noqa: E402
from ringmpi.torch import scaled_dot_product_attention, sequence_parallel  # noqa: E402
from ringmpi.torch.sequence import current  # noqa: E402

pytestmark = pytest.mark.mpi
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
NAMES = ("contiguous", "striped", "zigzag")


def tensors(n=37, heads=4, kv_heads=2, batch=(2,), dtype=torch.float32, seed=0, n_k=None):
    rng = torch.Generator().manual_seed(seed)
    shapes = [(*batch, heads, n, 16), (*batch, kv_heads, n_k or n, 16), (*batch, kv_heads, n_k or n, 12),
              (*batch, heads, n, 12)]
    return [torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype) for shape in shapes]


def near(found, exact, dtype=torch.float32):
    assert found.shape == exact.shape
    if exact.numel():
        assert (found - exact).abs().max() <= BOUND[dtype] * exact.abs().max()


def differentiated(attend, arrays, cotangent):
    """out, dq, dk and dv of a function of leaves."""
    leaves = [x.detach().clone().requires_grad_() for x in arrays]
    out = attend(*leaves)
    out.backward(cotangent)
    return [out.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("layout", NAMES)
def test_it_is_torchs(comm, layout, compiled):
    *arrays, cotangent = tensors()
    options = {"is_causal": layout != "zigzag", "scale": 0.3, "enable_gqa": True}
    exact = differentiated(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), arrays, cotangent)
    with sequence_parallel(comm, layout=layout) as sequence:
        def attend(q, k, v):
            return scaled_dot_product_attention(q, k, v, **options)

        if compiled:
            torch._dynamo.reset()
            attend = torch.compile(attend, fullgraph=True, backend="aot_eager")        # no break of the graph
        found = differentiated(attend, [sequence.shard(x, 2) for x in arrays], sequence.shard(cotangent, 2))
        for a, b in zip(found, exact, strict=True):
            near(sequence.gather(a, 2), b)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_leading_axes_and_dtypes(comm, batch, dtype):
    *arrays, cotangent = tensors(23, batch=batch, dtype=dtype)
    exact = differentiated(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
                           [x.double() for x in arrays], cotangent.double())
    with sequence_parallel(comm, layout="striped") as sequence:
        found = differentiated(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
                               [sequence.shard(x, -2) for x in arrays], sequence.shard(cotangent, -2))
        assert found[0].dtype == dtype
        for a, b in zip(found, exact, strict=True):
            near(sequence.gather(a, -2).double(), b, dtype)


def test_fewer_queries_than_keys_are_aligned_as_torch_aligns_them(comm):
    q, k, v, _ = tensors(11, n_k=30)
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    with sequence_parallel(comm) as sequence:
        near(sequence.gather(scaled_dot_product_attention(*(sequence.shard(x, 2) for x in (q, k, v)), is_causal=True,
                                                          enable_gqa=True), 2), exact)


def test_a_mask_of_the_context(comm):
    q, k, v, _ = tensors()
    mask = ringmpi.Mask(causal=True, window=(5, 0), first=2)
    see = torch.ones(37, 37).tril().bool()
    see &= (torch.arange(37)[:, None] - torch.arange(37) <= 5) | (torch.arange(37) < 2)
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=see, enable_gqa=True)
    with sequence_parallel(comm, layout="zigzag", mask=mask) as sequence:
        for is_causal in (False, True):
            out = scaled_dot_product_attention(*(sequence.shard(x, 2) for x in (q, k, v)), is_causal=is_causal,
                                               enable_gqa=True)
            near(sequence.gather(out, 2), exact)


def test_transposed_projections_are_not_copied(comm, monkeypatch):
    """What a layer makes, (batch, tokens, heads, dim) transposed, is what reaches the call, and it back."""
    seen = []
    check = Call.check

    def spy(inputs, *others):
        call = check(inputs, *others)
        seen.append([x.__array_interface__["data"][0] for x in (call.q, call.k, call.v)])
        return call

    monkeypatch.setattr(Call, "check", spy)
    arrays = [torch.randn(2, 9, heads, 16).transpose(1, 2) for heads in (4, 2, 2)]
    with sequence_parallel(comm):
        out = scaled_dot_product_attention(*arrays, enable_gqa=True)
    assert seen == [[x.data_ptr() for x in arrays]]
    assert out.transpose(1, 2).is_contiguous()


def test_what_needs_no_gradient_keeps_nothing(comm, monkeypatch):
    trained = []
    call = ringmpi.RingAttention._call

    def spy(self, *given, trains, **more):
        trained.append(trains)
        return call(self, *given, trains=trains, **more)

    monkeypatch.setattr(ringmpi.RingAttention, "_call", spy)
    *arrays, _ = tensors()
    with sequence_parallel(comm) as sequence:
        parts = [sequence.shard(x, 2) for x in arrays]
        assert scaled_dot_product_attention(*parts, enable_gqa=True).grad_fn is None
        parts[0].requires_grad_()
        with torch.no_grad():
            assert scaled_dot_product_attention(*parts, enable_gqa=True).grad_fn is None
        assert scaled_dot_product_attention(*parts, enable_gqa=True).grad_fn is not None
    assert trained == [False, False, True]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_gradient_on_some_ranks_alone_is_an_error_on_all(comm, compiled):
    """The others would never take part in the backward pass; it is known before there is one."""
    if comm.size == 1:
        pytest.skip("needs another rank")
    *arrays, _ = tensors()
    with sequence_parallel(comm, timeout=20) as sequence:
        parts = [sequence.shard(x, 2).requires_grad_(comm.rank == 1) for x in arrays]
        attend = scaled_dot_product_attention
        if compiled:
            torch._dynamo.reset()
            attend = torch.compile(attend, fullgraph=True, backend="aot_eager")
        with pytest.raises(ringmpi.OptionError, match=r"rank 1: expected the same requires_grad .* got 1 here and 0"):
            attend(*parts, enable_gqa=True)


def test_autocast(comm):
    *arrays, _ = tensors()
    with sequence_parallel(comm) as sequence, torch.autocast("cpu", torch.bfloat16):
        out = scaled_dot_product_attention(*(sequence.shard(x, 2) for x in arrays), enable_gqa=True)
        exact = F.scaled_dot_product_attention(*arrays, enable_gqa=True)
    assert out.dtype == exact.dtype == torch.bfloat16
    with sequence:
        near(sequence.gather(out, 2).float(), exact.float(), torch.bfloat16)


@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_is_new_in_each_call_and_the_same_when_computed_once_more(comm, compiled):
    """On any number of ranks it is what one rank drops; a checkpoint's second forward pass drops the same."""
    from mpi4py import MPI
    *arrays, cotangent = tensors(heads=2)
    results = []
    for where in (MPI.COMM_SELF, comm):
        torch.manual_seed(5 if where is not comm else 5 + comm.rank)        # rank 0 draws for all
        with sequence_parallel(where, layout="striped") as sequence:
            def attend(q, k, v):
                return scaled_dot_product_attention(q, k, v, dropout_p=0.3)

            if compiled:
                torch._dynamo.reset()
                attend = torch.compile(attend, fullgraph=True, backend="aot_eager")
            parts = [sequence.shard(x, 2) for x in arrays]
            first = attend(*parts)
            if not compiled:
                found = differentiated(lambda *x: checkpoint(attend, *x, use_reentrant=False), parts,  # noqa: B023
                                       sequence.shard(cotangent, 2))
            else:
                found = differentiated(attend, parts, sequence.shard(cotangent, 2))
            assert not torch.equal(first, found[0]) or not first.numel()
            results.append([sequence.gather(x, 2) for x in (first, *found)])
    for one, many in zip(*results, strict=True):
        near(many, one)


def test_a_second_derivative(comm):
    from mpi4py import MPI
    arrays = [x.requires_grad_() for x in tensors(6, batch=(1,), dtype=torch.float64)[:3]]
    with sequence_parallel(MPI.COMM_SELF):
        assert torch.autograd.gradgradcheck(lambda *x: scaled_dot_product_attention(*x, is_causal=True,
                                                                                    enable_gqa=True), arrays)


def test_gather_and_shard(comm):
    for layout in NAMES:
        with sequence_parallel(comm, layout=layout) as sequence:
            for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
                for dim, shape in ((0, (29,)), (1, (2, 29, 3)), (-1, (2, 1, 29)), (0, (0, 4)), (0, (29, 0))):
                    x = (torch.arange(np.prod(shape)).reshape(shape) % 7).to(dtype)
                    part = sequence.shard(x, dim)
                    assert torch.equal(sequence.gather(part, dim), x)
    with pytest.raises(ringmpi.OptionError, match="dtype"):
        sequence.gather(torch.zeros(2, 3, dtype=torch.float32 if comm.rank else torch.float64))
    if comm.size == 1:
        return


def test_gradients_are_summed(comm):
    """Those that not all ranks have count as 0, and 16-bit ones are summed in float32."""
    with sequence_parallel(comm) as sequence:
        a, b, c, d = (torch.nn.Parameter(torch.zeros(3, 2, dtype=dtype))
                      for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32))
        a.grad = torch.full((3, 2), 1.0 + comm.rank)
        if comm.rank == 0:
            b.grad = torch.full((3, 2), 4.0, dtype=torch.float64)
        c.grad = torch.full((3, 2), 1.0, dtype=torch.bfloat16).T.contiguous().T
        sequence.sum_gradients([a, b, c, d])
        assert (a.grad == sum(range(1, comm.size + 1))).all()
        assert (b.grad == 4).all()
        assert (c.grad == comm.size).all()
        assert d.grad is None
        odd = comm.rank == comm.size - 1
        for wrong in (torch.zeros(2, dtype=torch.complex64), torch.zeros(2)):
            parameter = torch.nn.Parameter(wrong)
            if not wrong.is_complex():
                parameter.grad = torch.ones(2).to_sparse() if odd else torch.ones(2)
            with pytest.raises(ringmpi.DtypeError, match="real gradients that are dense"):
                sequence.sum_gradients([parameter])
        if comm.size > 1:
            with pytest.raises(ringmpi.OptionError, match="parameters"):
                sequence.sum_gradients([a, b] if comm.rank else [a])


def test_what_is_refused(comm):
    """On all ranks, and not on that alone which asks."""
    q, k, v, _ = tensors()
    odd = comm.rank == comm.size - 1
    with pytest.raises(ringmpi.OptionError, match="expected to be called within"):
        scaled_dot_product_attention(q, k, v)
    with pytest.raises(ringmpi.OptionError, match="no scale"):
        sequence_parallel(comm, **({"scale": 1.0} if odd else {}))
    with pytest.raises(ringmpi.OptionError, match="expected options of RingAttention, got foo"):
        sequence_parallel(comm, **({"foo": 1} if odd else {}))
    with pytest.raises(ringmpi.OptionError, match="layout"):
        sequence_parallel(comm, layout="stripes" if odd else "striped")
    with sequence_parallel(comm, mask=ringmpi.Mask(window=3)) as sequence:
        parts = [sequence.shard(x, 2) for x in (q, k, v)]
        cases = [(ringmpi.OptionError, "attn_mask", {"attn_mask": torch.ones(2, 2).bool()}),
                 (ringmpi.ShapeError, "enable_gqa=True", {"enable_gqa": False}),
                 (ringmpi.OptionError, "is_causal", {"is_causal": True})]
        for kind, text, wrong in cases:
            with pytest.raises(kind, match=text):
                scaled_dot_product_attention(*parts, **{"enable_gqa": True, **(wrong if odd else {})})
        with pytest.raises(ringmpi.ShapeError, match="of one batch"):
            scaled_dot_product_attention(parts[0][0] if odd else parts[0], *parts[1:], enable_gqa=True)
        with pytest.raises(ringmpi.DtypeError, match="expected tensors"):
            scaled_dot_product_attention(None if odd else parts[0], *parts[1:], enable_gqa=True)
        assert scaled_dot_product_attention(*parts, enable_gqa=True).shape[1] == 4        # all is as before


def test_contexts_within_contexts(comm):
    with sequence_parallel(comm) as one, sequence_parallel(comm) as other:
        with one:
            assert current() is one
        assert current() is other


@pytest.mark.parametrize("batch", [(), (2, 2)])
def test_a_rank_without_tokens(comm, batch):
    q, k, v, _ = tensors(5, batch=batch)
    exact = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    mine = slice(0, 5) if comm.rank == comm.size - 1 else slice(0, 0)
    with sequence_parallel(comm) as sequence:
        out = scaled_dot_product_attention(*(x[..., mine, :] for x in (q, k, v)), enable_gqa=True)
        near(sequence.gather(out, -2), exact)


def test_compiled_dropout_draws_for_each_call(comm):
    """Two calls that look alike are two; what a checkpoint computes once more drops what it dropped."""
    *arrays, _ = tensors(heads=2)
    with sequence_parallel(comm, layout="striped") as sequence:
        parts = [sequence.shard(x, 2).requires_grad_() for x in arrays]
        torch._dynamo.reset()

        def twice(q, k, v):
            return (scaled_dot_product_attention(q, k, v, dropout_p=0.5)
                    - scaled_dot_product_attention(q, k, v, dropout_p=0.5))

        apart = torch.compile(twice, backend="aot_eager")(*parts)
        assert comm.allreduce(float(apart.detach().abs().sum())) > 0

        def once(q, k, v):
            return scaled_dot_product_attention(q, k, v, dropout_p=0.5)

        c = sequence.shard(tensors(heads=2)[3], 2)
        out = torch.compile(lambda *x: checkpoint(once, *x, use_reentrant=False), backend="aot_eager")(*parts)
        (out * c).sum().backward()            # linear in v: the sum is that of v and its gradient
        forward, backward = (comm.allreduce(float(x.detach().sum())) for x in (out * c, parts[2] * parts[2].grad))
        assert abs(forward - backward) <= 1e-3 * max(1.0, abs(forward))
