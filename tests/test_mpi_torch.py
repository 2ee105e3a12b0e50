"""ringmpi.torch: autograd through the ring, and training through it. Runs under mpiexec."""

import copy
import io
import itertools
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fake_device import FakeArray, FakeDevice  # noqa: E402
from foreign import CUDA  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import ringmpi  # noqa: E402
import ringmpi.torch  # noqa: E402
from ringmpi.dtypes import BFLOAT16  # noqa: E402
from ringmpi.layout import make  # noqa: E402
from ringmpi.torch.function import tensor_of  # noqa: E402

pytestmark = pytest.mark.mpi

STEPS, TOKENS, WIDTH, HEADS, VOCABULARY = 20, 64, 32, 4, 17


def tensors(seed, n, *, dtype=torch.float64, grad=True):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(n, heads, dim, generator=rng, dtype=torch.float64).to(dtype).requires_grad_(grad)
            for heads, dim in ((4, 6), (2, 6), (2, 5))]


def dense(q, k, v, see, sinks=None):
    """The same by torch alone, dense: out and lse."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[2])
    scores = scores.masked_fill(~see, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(q), 1)], dim=2)
    weights = torch.softmax(scores, dim=2)[:, :, :len(k)]
    return torch.einsum("hij,jhd->ihd", weights, v), torch.logsumexp(scores, dim=2).T


def test_queries_that_all_ranks_have(comm):
    """Their gradients are the same everywhere, or an error everywhere: a loss that differs between ranks is heard."""
    q, k, v = tensors(9, 5, dtype=torch.float32)
    odd = comm.rank == comm.size - 1
    out = ringmpi.torch.ring_attention(q, k, v, comm=comm, layout="replicated")
    out.square().sum().backward()
    assert len(set(comm.allgather(q.grad.numpy().tobytes()))) == 1
    if comm.size > 1:
        out = ringmpi.torch.ring_attention(q, k, v, comm=comm, layout="replicated")
        with pytest.raises(ringmpi.OptionError, match="the same dout, dlse, out and lse, where all ranks have the que"):
            (out.sum() * (2 if odd else 1)).backward()


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_gradcheck(backend):
    from mpi4py import MPI
    q, k, v = tensors(0, 7)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    key_bias = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    table = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    with ringmpi.RingAttention(MPI.COMM_SELF, mask=ringmpi.Mask(causal=True), backend=backend, softcap=2.0, dropout=0.2,
                               alibi=[0.1, 0.2, 0.3, 0.4]) as attention:
        assert torch.autograd.gradcheck(lambda *x: ringmpi.torch.ring_attention(
            *x[:3], sinks=x[3], key_bias=x[4], relative=x[5], attention=attention, seed=3, return_lse=True),
            (q, k, v, sinks, key_bias, table))
    tables = [torch.randn(4, 2 * reach + 1, dtype=torch.float64, requires_grad=True) for reach in (1, 3)]
    q, k, v = tensors(0, 8)
    with ringmpi.RingAttention(MPI.COMM_SELF, mask=ringmpi.Grid((2, 4), 1, periodic=True),
                               backend=backend) as attention:
        assert torch.autograd.gradcheck(lambda *x: ringmpi.torch.ring_attention(
            *x[:3], relative=x[3:], attention=attention), (q, k, v, *tables))
        assert torch.autograd.gradcheck(lambda *x: ringmpi.torch.ring_attention(
            *x[:2], None, dim_v=3, sinks=x[2], key_bias=x[3], relative=x[4:], attention=attention),
            (q, k, sinks, key_bias.detach().repeat(2, 1)[:8].requires_grad_(), *tables))


def test_a_bias_by_distance(comm):
    """Its gradient is this rank's share, in its own dtype."""
    n = 41
    q, k, v = tensors(1, n, dtype=torch.float32, grad=False)
    table = torch.randn(4, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    dout = torch.randn(n, 4, 5, generator=torch.Generator().manual_seed(5))
    mine = torch.from_numpy(make("striped", n, comm.size).positions(comm.rank))
    part, exact = table.clone().requires_grad_(), table.clone().requires_grad_()
    out = ringmpi.torch.ring_attention(q[mine], k[mine], v[mine], comm=comm, layout="striped", relative=part)
    out.backward(dout[mine])
    scores = torch.einsum("ihd,jhd->hij", q.double(), k.double().repeat_interleave(2, dim=1)) * q.shape[2]**-0.5
    away = torch.clamp(torch.arange(n)[:, None] - torch.arange(n), -4, 4) + 4
    weights = torch.softmax(scores + exact[:, away], dim=2)
    torch.einsum("hij,jhd->ihd", weights, v.double().repeat_interleave(2, dim=1)).backward(dout.double())
    assert part.grad.dtype == torch.float64
    total = torch.from_numpy(comm.allreduce(part.grad.numpy()))
    assert (total - exact.grad).abs().max() <= 5e-6 * exact.grad.abs().max()
    with pytest.raises(ringmpi.DtypeError, match="relative: expected a tensor, got ndarray"):
        ringmpi.torch.ring_attention(q[mine], k[mine], v[mine], comm=comm, layout="striped", relative=table.numpy())


@pytest.mark.parametrize("by_head", [False, True])
def test_a_bias_of_the_keys(comm, by_head):
    """Its gradient is whole on the rank that has the key, in its own dtype; keys that are left out have 0."""
    n = 41
    q, k, v = tensors(1, n, dtype=torch.float32, grad=False)
    bias = torch.randn((n, 4) if by_head else n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    bias[5:9] = -torch.inf
    dout = torch.randn(n, 4, 5, generator=torch.Generator().manual_seed(5))
    mine = torch.from_numpy(make("striped", n, comm.size).positions(comm.rank))
    part, exact = bias[mine].requires_grad_(), bias.clone().requires_grad_()
    out = ringmpi.torch.ring_attention(q[mine], k[mine], v[mine], comm=comm, layout="striped", key_bias=part)
    out.backward(dout[mine])
    scores = torch.einsum("ihd,jhd->hij", q.double(), k.double().repeat_interleave(2, dim=1)) * q.shape[2]**-0.5
    weights = torch.softmax(scores + (exact.T[:, None] if by_head else exact), dim=2)
    torch.einsum("hij,jhd->ihd", weights, v.double().repeat_interleave(2, dim=1)).backward(dout.double())
    assert part.grad.dtype == torch.float64
    assert part.grad.shape == part.shape
    if len(mine):
        assert (part.grad - exact.grad[mine]).abs().max() <= 5e-6 * exact.grad.abs().max()
    assert (part.grad[part == -torch.inf] == 0).all()


def test_canonical_order(comm):
    """Gradients of one rank, bit by bit."""
    from mpi4py import MPI
    whole = tensors(2, 400, dtype=torch.float32)
    mine = torch.from_numpy(make("striped", 400, comm.size).positions(comm.rank))
    parts = [x.detach()[mine].requires_grad_() for x in whole]
    options = {"mask": ringmpi.Mask(causal=True), "layout": "striped", "order": "canonical"}
    for where, arrays in ((MPI.COMM_SELF, whole), (comm, parts)):
        ringmpi.torch.ring_attention(*arrays, comm=where, **options).square().sum().backward()
    assert all(torch.equal(x.grad[mine], y.grad) for x, y in zip(whole, parts, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_gradients_are_those_of_a_dense_softmax(comm, dtype, backend):
    n = 41
    q, k, v = tensors(1, n, dtype=dtype)
    sinks = torch.linspace(-1, 1, 4).requires_grad_()
    rng = torch.Generator().manual_seed(5)
    dout, dlse = torch.randn(n, 4, 5, generator=rng).to(dtype), torch.randn(n, 4, generator=rng)
    mine = torch.from_numpy(make("striped", n, comm.size).positions(comm.rank))
    parts = [x.detach()[mine].requires_grad_() for x in (q, k, v)]
    shared = sinks.detach().clone().requires_grad_()
    out, lse = ringmpi.torch.ring_attention(*parts, comm=comm, mask=ringmpi.Mask(causal=True), layout="striped",
                                            sinks=shared, backend=backend, return_lse=True)
    kinds = out.dtype, lse.dtype
    torch.autograd.backward([out, lse], [dout[mine], dlse[mine].to(lse.dtype)])
    total = torch.from_numpy(comm.allreduce(shared.grad.numpy()))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, sinks)]
    want = dense(*exact[:3], torch.ones(n, n, dtype=torch.bool).tril(), exact[3])
    torch.autograd.backward(want, [dout.double(), dlse.double()])
    bound = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}[dtype]
    assert kinds == (dtype, torch.float64 if dtype == torch.float64 else torch.float32)
    for x, y in zip(parts, exact, strict=False):
        assert x.grad.dtype == dtype
        if len(mine):
            assert (x.grad.double() - y.grad[mine]).abs().max() <= bound * y.grad.abs().max()
    assert (total - exact[3].grad).abs().max() <= max(bound, 1e-6) * exact[3].grad.abs().max()


def test_redistribute_has_a_second_derivative(comm):
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    moved = ringmpi.torch.redistribute(x, comm=comm)
    gradient, = torch.autograd.grad(moved.pow(3).sum(), x, create_graph=True)
    gradient.sum().backward()
    assert torch.allclose(x.grad, 6 * x)


def test_no_copies_and_no_graph_without_gradients(comm):
    x = np.arange(24.0).reshape(3, 2, 4)
    tensor = torch.from_numpy(x)
    assert ringmpi.arrays.as_array(tensor, "x").ctypes.data == x.ctypes.data
    assert tensor_of(x).data_ptr() == x.ctypes.data
    q, k, v = tensors(2, 5, grad=False)
    out = ringmpi.torch.ring_attention(q, k, v, comm=comm)
    assert not out.requires_grad


def test_only_one_output_is_used_and_some_inputs_are_fixed(comm):
    q, k, v = tensors(3, 6)
    fixed = k.detach()
    _, lse = ringmpi.torch.ring_attention(q, fixed, v, comm=comm, return_lse=True)
    lse.sum().backward()
    grad, none = q.grad.clone(), v.grad.clone()
    out = ringmpi.torch.ring_attention(q, fixed, v, comm=comm)
    out.sum().backward()                        # an expanded gradient, without memory of its own
    assert grad.abs().max() > 0
    assert (none == 0).all()
    assert (v.grad != 0).all()


def test_activation_checkpointing(comm):
    grads = []
    for checkpointed in (False, True):
        q, k, v = tensors(4, 9)

        def block(q, k, v):
            return ringmpi.torch.ring_attention(q.sin(), k, v, comm=comm, dropout=0.3, seed=1).cos()

        out = checkpoint(block, q, k, v, use_reentrant=False) if checkpointed else block(q, k, v)
        out.square().sum().backward()
        grads.append([x.grad for x in (q, k, v)])
    assert all((a == b).all() for a, b in zip(*grads, strict=True))


def there_and_back(comm, dtype, between=lambda: None, **options):
    """Redistribute uneven contiguous shards: the gradient comes back to where each token came from."""
    counts = [3 * rank % 5 for rank in range(comm.size)]
    start, length = sum(counts[:comm.rank]), sum(counts)
    x = torch.arange(2 * length, dtype=dtype).reshape(length, 2)[start:start + counts[comm.rank]].requires_grad_()
    moved = ringmpi.torch.redistribute(x, comm=comm, **options)
    between()
    tokens = make("striped", length, comm.size).positions(comm.rank)
    weights = torch.from_numpy(tokens * 10.0).to(dtype)[:, None].expand(-1, 2)
    (moved * weights).sum().backward()
    same = ringmpi.torch.redistribute(x, comm=comm, target=ringmpi.Contiguous(counts))
    assert (moved.detach().double().numpy() == 2 * tokens[:, None] + [0, 1]).all()
    assert (x.grad.double().numpy() == 10.0 * np.arange(start, start + counts[comm.rank])[:, None]).all()
    assert (same == x).all()
    assert same.data_ptr() != x.data_ptr() or not len(x)
    assert x.grad.dtype == moved.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_redistribute_and_its_way_back(comm, dtype):
    there_and_back(comm, dtype, target="striped")


@pytest.fixture
def gpu(comm, monkeypatch):
    """A lazy device for each rank; every tensor says that it is there."""
    made = FakeDevice(comm.rank)

    def view(x):
        return FakeArray(made, x.view(torch.int16).numpy().view(BFLOAT16) if x.dtype == torch.bfloat16 else x.numpy())

    monkeypatch.setattr("ringmpi.mpi.pace.LONGEST_PAUSE", 2e-5)
    monkeypatch.setattr("ringmpi.schedules.device_links.CHUNK_BYTES", 50)
    monkeypatch.setattr(ringmpi.device, "reason_missing", lambda: None)
    monkeypatch.setattr(ringmpi.device, "view", view)
    monkeypatch.setattr(ringmpi.device, "index_of", lambda x: 0)
    monkeypatch.setattr(ringmpi.device, "open_device", lambda index: made)
    monkeypatch.setattr(torch.Tensor, "__dlpack_device__", lambda x: (CUDA, 0))
    monkeypatch.setattr(torch, "from_dlpack", lambda x: torch.from_numpy(x.host))
    return made


@pytest.mark.parametrize("transport", ["direct", "staged"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_redistribute_and_its_way_back_on_gpus(comm, gpu, monkeypatch, dtype, transport):
    copied, there = [], []
    original = gpu.take_rows
    monkeypatch.setattr(gpu, "take_rows", lambda *x: copied.append(x) or original(*x))
    there_and_back(comm, dtype, lambda: there.append(len(copied)), timeout=60, gpu_transport=transport)
    assert (*there, len(copied)) == (3, 6)      # packed and unpacked on the GPU, both ways


def test_bad_arguments(comm):
    q, k, v = tensors(5, 4)
    with pytest.raises(ringmpi.OptionError, match="expected either comm"):
        ringmpi.torch.ring_attention(q, k, v)
    with ringmpi.RingAttention(comm) as attention:
        for more in ({"comm": comm}, {"layout": "striped"}):
            with pytest.raises(ringmpi.OptionError, match="expected either comm"):
                ringmpi.torch.ring_attention(q, k, v, attention=attention, **more)


class Layer(torch.nn.Module):
    """Attention with rotary embeddings, and a feed-forward part."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.up, self.down = torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.Linear(2 * WIDTH, WIDTH)
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(WIDTH) for _ in range(2)])

    def forward(self, x, positions, attend):
        q, k, v = self.qkv(self.norms[0](x)).view(len(x), 3, HEADS, -1).unbind(1)
        x = x + self.out(attend(rotated(q, positions), rotated(k, positions), v).reshape(len(x), -1))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norms[1](x))))


def rotated(x, positions):
    """Rotary embeddings (Su et al. 2021), by the global position of each token."""
    half = x.shape[2] // 2
    angles = positions[:, None, None] * 100.0 ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=2)


def train(positions, attend, reduce):
    """Losses of some steps on the tokens at `positions` of a sequence; `reduce` sums over all that train together."""
    torch.manual_seed(0)
    embedding, layers = torch.nn.Embedding(VOCABULARY, WIDTH), torch.nn.ModuleList([Layer(), Layer()])
    head = torch.nn.Linear(WIDTH, VOCABULARY)
    parameters = [*embedding.parameters(), *layers.parameters(), *head.parameters()]
    optimiser = torch.optim.SGD(parameters, lr=0.3)
    tokens = torch.from_numpy(np.cumsum(np.random.default_rng(0).integers(0, 3, TOKENS + 1)) % VOCABULARY)
    losses = []
    for _ in range(STEPS):
        optimiser.zero_grad()
        x = embedding(tokens[positions])
        for layer in layers:
            x = layer(x, positions, attend)
        loss = torch.nn.functional.cross_entropy(head(x), tokens[positions + 1], reduction="sum") / TOKENS
        loss.backward()
        for parameter in parameters:
            parameter.grad = reduce(parameter.grad)
        optimiser.step()
        losses.append(float(reduce(loss.detach())))
    return losses


class Holder(torch.nn.Module):
    """Holds what can't be copied."""

    def __init__(self, comm):
        super().__init__()
        torch.manual_seed(0)
        self.project, self.comm = torch.nn.Linear(8, 24), comm
        self.attention = ringmpi.RingAttention(comm, mask=ringmpi.Mask(causal=True), backend="numpy", layout="striped")

    def forward(self, x):
        x = ringmpi.torch.redistribute(x, comm=self.comm)
        q, k, v = self.project(x * 2).reshape(len(x), 2, 12).split(4, dim=2)
        return ringmpi.torch.ring_attention(q, k, v, attention=self.attention).sin().sum()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")      # torch's own, on tracing
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_module_gives_what_it_gives_without(comm, backend):
    layer, x = Holder(comm), torch.randn(5, 8, generator=torch.Generator().manual_seed(comm.rank))
    torch.compiler.reset()
    results = []
    for model in (layer, torch.compile(layer, backend=backend)):
        layer.zero_grad()
        loss = model(x)
        loss.backward()
        results.append([loss.detach(), layer.project.weight.grad.clone()])
    for got, want in zip(*results, strict=True):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    layer.attention.close()


def test_a_module_that_holds_a_ring_attention_is_copied_but_not_saved(comm):
    layer = Holder(comm)
    twin = copy.deepcopy(layer)
    assert twin.attention is layer.attention
    assert twin.project.weight is not layer.project.weight
    torch.save(layer.state_dict(), io.BytesIO())
    with pytest.raises(TypeError, match=r"can't be pickled: .*state_dict\(\)"):
        torch.save(layer.attention, io.BytesIO())
    layer.attention.close()


@pytest.mark.parametrize("options", [
    {"scale": torch.tensor(0.3, requires_grad=True)}, {"softcap": torch.tensor(30.0, requires_grad=True)},
    {"dropout": torch.tensor(0.1, requires_grad=True)}, {"alibi": torch.ones(4, requires_grad=True)},
    {"alibi": [torch.tensor(1.0, requires_grad=True)] * 4}], ids=lambda x: str(next(iter(x))))
def test_a_constant_that_wants_a_gradient_is_refused(comm, options):
    q, k, v = tensors(0, 3)
    name = next(iter(options))
    with pytest.raises(ringmpi.OptionError, match=f"{name}: expected a constant, got a tensor that requires"):
        ringmpi.torch.ring_attention(q, k, v, comm=comm, **options)
    value = options[name]
    plain = {name: [x.detach() for x in value] if isinstance(value, list) else value.detach()}
    ringmpi.torch.ring_attention(q, k, v, comm=comm, **plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_function_for_arrays_refuses_what_it_would_not_differentiate(comm, dtype):
    q, k, v = tensors(0, 3, dtype=dtype)
    with pytest.raises(ringmpi.DtypeError, match="q: expected an array, got a tensor that requires a gradient"):
        ringmpi.ring_attention(q, k, v, comm=comm)


def test_a_cotangent_may_require_a_gradient(comm):
    q, k, v = tensors(0, 3)
    out, lse = ringmpi.torch.ring_attention(q, k, v, comm=comm, return_lse=True)
    torch.autograd.backward([out, lse], [torch.ones_like(x, requires_grad=True) for x in (out, lse)])
    assert q.grad.isfinite().all()


def test_signs_that_torch_has_yet_to_apply_are_applied(comm):
    """Of an imaginary part that was conjugated: torch marks the tensor, or the gradient, and negates it later."""
    grads = []
    for late in (False, True):
        q, k, v = tensors(7, 6)
        turned = torch.complex(torch.zeros_like(k), -k).conj().imag if late else k * 1
        out = ringmpi.torch.ring_attention(q, turned, v, comm=comm)
        moved = ringmpi.torch.redistribute(torch.complex(out, out).conj().imag if late else -out, comm=comm)
        (torch.complex(moved, moved).conj().imag if late else -moved).square().sum().backward()
        grads.append([x.grad for x in (q, k, v)])
        assert turned.is_neg() is late
    assert all(torch.allclose(x, y) for x, y in zip(*grads, strict=True))


def test_what_is_no_tensor_on_one_rank_is_one_error_on_all(comm):
    q, k, v = tensors(0, 3)
    mine = comm.rank == comm.size - 1
    meta = torch.ones(3, 2, 6, device="meta", dtype=torch.float64)
    for bad, text in ((np.ones((3, 2, 6)), "expected a tensor, got ndarray"), (meta, "expected an array, got")):
        calls = [("k", lambda x: ringmpi.torch.ring_attention(q, x if mine else k, v, comm=comm, timeout=20)),
                 ("x", lambda x: ringmpi.torch.redistribute(x if mine else k, comm=comm, timeout=20))]
        for name, call in calls:
            with pytest.raises(ringmpi.DtypeError, match=f"rank {comm.size - 1}: {name}: {text}"):
                call(bad)
    with pytest.raises(ringmpi.DtypeError, match=f"rank {comm.size - 1}: sinks: expected a tensor, got Tensor"):
        ringmpi.torch.ring_attention(q, k, v, comm=comm, timeout=20,
                                     sinks=torch.ones(4, device="meta") if mine else torch.ones(4))
    ringmpi.torch.ring_attention(q, k, v, comm=comm).sum().backward()


def test_keywords_of_torch_are_answered_with_ours(comm):
    q, k, v = tensors(0, 3)
    with pytest.raises(TypeError, match=r"ring_attention got .* 'is_causal'; here that is mask=ringmpi.Mask\(causal"):
        ringmpi.torch.ring_attention(q, k, v, comm=comm, is_causal=True)


def test_a_transformer_trains_as_in_one_process(comm):
    """Step for step: a sequence in stripes over the ranks, against torch alone."""
    see = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    alone = train(torch.arange(TOKENS), lambda q, k, v: dense(q, k, v, see)[0], lambda x: x)
    positions = torch.from_numpy(make("striped", TOKENS, comm.size).positions(comm.rank))
    with ringmpi.RingAttention(comm, mask=ringmpi.Mask(causal=True), layout="striped") as attention:
        together = train(positions, lambda q, k, v: ringmpi.torch.ring_attention(q, k, v, attention=attention),
                         lambda x: torch.from_numpy(np.asarray(comm.allreduce(x.numpy()))))
    assert alone[-1] < 0.7 * alone[0]
    assert max(abs(a - b) for a, b in zip(alone, together, strict=True)) < 1e-6 * alone[0]
    assert all(b < a for a, b in itertools.pairwise(alone[:5]))


@pytest.mark.parametrize("schedule", ["ring", "gather", "2x1x{rest}:ring", "1x2x{rest}:ring"])
@pytest.mark.parametrize("extra", ["none", "bias", "values in keys"])
def test_frozen_keys_cost_nothing(comm, schedule, extra):
    """dq has the same bits; no gradient travels. If one rank wants those of its keys, all have them."""
    if "rest" in schedule:
        if comm.size % 2:
            pytest.skip("needs an even number of ranks")
        schedule = schedule.format(rest=comm.size // 2)
    n = 20 + 3 * comm.rank
    rng = np.random.default_rng(comm.rank)
    shapes = (n, 4, 8), (n, 2, 8), (n, 2, 5), (n,)
    q, k, v, bias = (torch.from_numpy(rng.standard_normal(shape)) for shape in shapes)
    options = {"key_bias": bias} if extra == "bias" else {}
    cotangent = torch.from_numpy(rng.standard_normal((n, 4, 5)))

    def differentiate(of_keys, **more):
        leaves = [q.clone().requires_grad_(), k.clone().requires_grad_(of_keys), v.clone()]
        values = {"dim_v": 5} if extra == "values in keys" else {"v": leaves[2]}
        backend = "numba" if extra == "none" else "numpy"
        with ringmpi.RingAttention(comm, mask=ringmpi.Mask(causal=True), schedule=schedule,
                                   backend=backend) as attention:
            ringmpi.torch.ring_attention(leaves[0], leaves[1], **values, **options, attention=attention
                                         ).backward(cotangent)
            return leaves[0].grad, leaves[1].grad, comm.allreduce(attention.trace.gradient_bytes_sent)

    dq, dk, sent = differentiate(True)
    alone, none, nothing = differentiate(False)
    again, of_one, _ = differentiate(comm.rank == 0)
    assert torch.equal(alone, dq)
    assert none is None
    assert nothing == 0
    assert comm.size == 1 or sent > 0 or schedule.endswith("x1:ring")
    assert torch.equal(again, dq)
    assert of_one is None if comm.rank else torch.equal(of_one, dk)
