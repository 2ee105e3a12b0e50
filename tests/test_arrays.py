"""Arrays from outside: what is taken, and that whatever can't be taken is an error of our own, whoever refuses."""

import weakref

import numpy as np
import pytest
from foreign import CUDA, METAL, Deleted, Elsewhere, Raising, Traced, cuda_tensor

from ringmpi import BackendError, DtypeError, OptionError, RingAttention, RingError, device
from ringmpi.arrays import Refused, as_array, as_host_array
from ringmpi.checks import check_dropout, check_scale, check_slopes, check_softcap


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that can be used; what CuPy is given to view."""
    viewed = []
    monkeypatch.setattr(device, "reason_missing", lambda: None)
    monkeypatch.setattr(device, "view", lambda x: viewed.append(x) or x)
    return viewed


def dead():
    class Gone:
        pass
    return weakref.proxy(Gone())


@pytest.mark.parametrize(("make", "text"), [
    (Deleted, r"got Deleted that does not say where it is \(deleted, or on several\?\): object of type"),
    (Traced, r"got Traced: The numpy.ndarray conversion method __array__\(\) was called on traced array$"),
    (lambda: Raising(RuntimeError("not now")), "got Raising: not now$"),
    (lambda: Raising(KeyError("x")), "got Raising: 'x'"),
    (lambda: Raising(NotImplementedError()), "got Raising: NotImplementedError$"),
    (dead, "weakly-referenced object no longer exists"), (lambda: np.ma.zeros(3), "without a mask of its own"),
    (lambda: Refused(DtypeError("x: expected better")), "expected better$")])
def test_what_can_not_be_read_is_a_dtype_error(make, text):
    for take in (as_array, as_host_array):
        with pytest.raises(DtypeError, match=f"^x: .*{text}"):
            take(make(), "x")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), MemoryError(), BackendError("the GPU failed")])
def test_what_is_no_refusal_is_not_taken_for_one(error):
    with pytest.raises(type(error)):
        as_array(Raising(error), "x")


def test_where_it_is_decides_who_reads_it(gpu):
    there, elsewhere = Elsewhere(CUDA), Elsewhere(METAL)
    assert as_array(there, "x") is there
    assert gpu == [there]
    with pytest.raises(BackendError, match="x: expected an array on the host"):
        as_host_array(there, "x")
    with pytest.raises(BackendError, match="x: the array is on a device that is neither the host nor a CUDA GPU"):
        as_array(elsewhere, "x")


def test_what_cupy_refuses_is_a_dtype_error(gpu, monkeypatch):
    def refuse(x):
        raise BufferError("not this\nnor that")
    monkeypatch.setattr(device, "view", refuse)
    with pytest.raises(DtypeError, match=r"^x: expected an array, got Elsewhere: not this$"):
        as_array(Elsewhere(CUDA), "x")


@pytest.mark.parametrize("check", [check_scale, check_softcap, check_dropout, check_slopes])
def test_a_number_that_can_not_be_read_is_an_option_error(check):
    for x in (Deleted(), Raising(RuntimeError("no"))):
        with pytest.raises(OptionError, match=f"expected a .*, got .*{type(x).__name__}"):
            check(x)


# Tensors of torch, on the CPU and as they are on a GPU.

@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(params=["cpu", "cuda"])
def tensor(request, torch):
    """Make a tensor of the CPU into one of either device."""
    return (lambda x: x) if request.param == "cpu" else lambda x: x.as_subclass(cuda_tensor(torch))


def test_the_fake_of_a_cuda_tensor_refuses_as_torch_does(torch):
    x = torch.ones(2).as_subclass(cuda_tensor(torch))
    wanted = x.clone().requires_grad_()
    assert isinstance(wanted, cuda_tensor(torch)) or type(wanted).__name__ == "CudaTensor"
    assert x.__cuda_array_interface__["shape"] == (2,)
    for ask in (lambda: hasattr(wanted, "__cuda_array_interface__"), lambda: np.asarray(x), wanted.__dlpack__):
        with pytest.raises((RuntimeError, TypeError, BufferError)):
            ask()
    assert type(wanted.detach()).__name__ == "CudaTensor"


def test_tensors_whose_memory_is_not_what_they_stand_for(torch, tensor, gpu):
    turned = torch.ones(3, dtype=torch.complex64).conj()
    cases = [(torch.ones(3, requires_grad=True), "requires a gradient, which ringmpi.torch gives"),
             (turned, "signs are not applied yet; resolve_conj"), (turned.imag, "signs are not applied yet"),
             (torch._efficientzerotensor(3), "without memory")]
    cases = [(tensor(x), text) for x, text in cases]
    cases += [(torch.ones(2, 2).to_sparse(), r"layout torch.sparse_coo; to_dense\(\) it"),
              (torch.ones(2, 2).to_mkldnn(), "layout torch._mkldnn")]
    for x, text in cases:
        with pytest.raises(DtypeError, match=f"^x: expected an array, got a tensor .*{text}"):
            as_array(x, "x")
    assert gpu == []


@pytest.mark.filterwarnings("ignore")           # torch's own, on layouts that may change
def test_tensors_that_are_no_arrays(torch, gpu):
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        fakes = [torch.ones(3), torch.ones(3, device="cuda")]
    cases = [torch.ones(3, device="meta"), torch.ones(2, 2).to_sparse_csr(), torch.ones(3).to(torch.float8_e4m3fn),
             torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), *fakes]
    for x in cases:
        with pytest.raises(DtypeError, match=r"^x: expected an array.*, got"):
            as_array(x, "x")
    inside = []
    torch.func.vmap(lambda x: inside.append(outcome(x)) or x)(torch.ones(2, 3))
    assert inside[0].startswith("DtypeError: x: expected an array, got Tensor")
    assert gpu == []


def outcome(x):
    try:
        return as_array(x, "x")
    except RingError as error:
        return f"{type(error).__name__}: {error}"


def test_plain_tensors_are_viewed(torch, tensor, gpu):
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        for x in (torch.ones(3, 2, dtype=dtype), torch.ones(0, 2, dtype=dtype), torch.ones(2, 3, dtype=dtype).T):
            given = tensor(x)
            seen = as_array(given, "x")
            assert seen is given or (seen.ctypes.data == x.data_ptr() or not seen.size)
    assert len(gpu) in (0, 9)


def test_a_call_says_it_as_an_error_of_ours(torch, tensor, gpu):
    from mpi4py import MPI
    q, wanted = np.ones((3, 2, 4), "f4"), tensor(torch.ones(3, 2, 4, requires_grad=True))
    with RingAttention(MPI.COMM_SELF, backend="numpy") as attention:
        for x in (wanted, Deleted(), Traced(), Raising(RuntimeError("not now"))):
            with pytest.raises(DtypeError, match=r"rank 0: k: expected an array.*, got"):
                attention(q, x, q)
        with pytest.raises(DtypeError, match=r"sinks: expected an array.*, got"):
            attention(q, q, q, sinks=Deleted())
        attention(q, q, q)
        with pytest.raises(DtypeError, match="dout: expected an array, got"):
            attention.backward(Raising(RuntimeError("not now")))
