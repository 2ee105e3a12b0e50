"""`redistribute` there and back is the identity. Runs under mpiexec: see test_launch.py."""

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from ringmpi import Contiguous, Custom, OptionError, ShapeError, redistribute
from ringmpi.dtypes import DTYPES
from ringmpi.layout import make

pytestmark = pytest.mark.mpi


@st.composite
def layouts(draw, length, size):
    kind = draw(st.sampled_from(["contiguous", "uneven", "striped", "zigzag", "custom"]))
    seed = draw(st.integers(0, 99))
    owner = np.random.default_rng(seed).integers(0, size, length)
    if kind == "custom":
        return Custom([np.flatnonzero(owner == rank) for rank in range(size)])
    if kind == "uneven":
        return Contiguous(np.bincount(owner, minlength=size))
    return draw(st.sampled_from([kind, make(kind, length, size)]))


@settings(deadline=None, max_examples=40, derandomize=True, database=None, phases=[Phase.generate])
@given(data=st.data())
def test_there_and_back(comm, data):
    length = data.draw(st.integers(0, 50))
    source, target = (data.draw(layouts(length, comm.size)) for _ in range(2))
    dtype = data.draw(st.sampled_from([*DTYPES.values(), np.dtype("u1"), np.dtype("i8,f4")]))
    shape = data.draw(st.sampled_from([(), (3,), (2, 5), (0, 4)]))
    noise = np.random.default_rng(length).integers(0, 255, (length, *shape, dtype.itemsize), np.uint8)
    whole = noise.view(dtype)[..., 0]
    old, new = (make(x, length, comm.size) for x in (source, target))
    shard = whole[old.positions(comm.rank)]
    there = redistribute(shard, comm=comm, source=source, target=target)
    assert there.dtype == dtype
    assert there.tobytes() == whole[new.positions(comm.rank)].tobytes()
    back = redistribute(there, comm=comm, source=new, target=old)
    assert back.tobytes() == shard.tobytes()


def test_bad_input_is_the_same_error_everywhere(comm):
    with pytest.raises(OptionError, match="layout: expected one of"):
        redistribute(np.zeros(4), comm=comm, target="spiral")
    with pytest.raises(OptionError, match=f"over {comm.size} ranks"):
        redistribute(np.zeros(4), comm=comm, target=make("striped", 5, comm.size))
    with pytest.raises(ShapeError, match="fixed size"):
        redistribute(np.array([None] * 3), comm=comm)
    with pytest.raises(ShapeError, match="scalar"):
        redistribute(np.float64(3), comm=comm)
    if comm.size > 1:
        with pytest.raises(ShapeError, match="rank 0: the striped layout"):
            redistribute(np.zeros((5 + (comm.rank == 0) * 9, 2)), comm=comm, source="striped", target="zigzag")
        with pytest.raises(OptionError, match=r"dtype of x is float32 here and float64 on rank 0"):
            redistribute(np.zeros(3, "f8" if comm.rank == 0 else "f4"), comm=comm)
        with pytest.raises(OptionError, match="target is zigzag here and striped on rank 0"):
            redistribute(np.zeros(3), comm=comm, target="striped" if comm.rank == 0 else "zigzag")
    assert len(redistribute(np.arange(3), comm=comm)) == 3
