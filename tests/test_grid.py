"""Windows over grids: intervals against a dense boolean mask written from the definition."""

import itertools
import math

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringmpi import Grid, Mask, MaskError, OptionError

SIDES = st.none() | st.integers(0, 5)


@st.composite
def grids(draw):
    axes = draw(st.integers(1, 4))
    shape = draw(st.lists(st.integers(0, 7 if axes < 3 else 4), min_size=axes, max_size=axes))
    sides = draw(st.lists(SIDES | st.tuples(SIDES, SIDES), min_size=axes, max_size=axes))
    periodic = draw(st.lists(st.booleans(), min_size=axes, max_size=axes))
    causal = draw(st.booleans()) and not periodic[0]
    return {"shape": shape, "window": sides, "periodic": periodic, "edges": draw(st.sampled_from(["cut", "shifted"])),
            "causal": causal}


@given(grids())
def test_bounds_are_the_dense_mask(options):
    n = math.prod(options["shape"])
    mask = Grid(**options)
    mask.check(n, n)
    got = np.zeros((n, n), int)
    j = np.arange(n)
    last = np.zeros(n, int)
    intervals = mask.bounds(j, n, n)
    assert len(intervals) <= mask.most
    for low, high in intervals:
        assert ((last <= low) & (low <= high) & (high <= n)).all()
        got += (j >= low[:, None]) & (j < high[:, None])
        last = high
    assert got.max(initial=0) <= 1, "intervals overlap"
    assert (got.astype(bool) == oracle.near(**options)).all()


def test_every_point_sees_as_many_with_shifted_edges():
    bounds = Grid((9, 11), (2, 1), edges="shifted").bounds(np.arange(99), 99, 99)
    assert set(sum(high - low for low, high in bounds).tolist()) == {15}


def test_a_line_is_a_window():
    line, mask = (x.bounds(np.arange(50), 50, 50) for x in (Grid(50, [(3, 7)]), Mask(window=(3, 7))))
    assert all((a == b).all() for a, b in zip(line[0], mask[0], strict=True))


@pytest.mark.parametrize(("options", "message"), [
    ({"shape": (2, 3, 4, 5, 6), "window": 1}, "1 to 4 axes"), ({"shape": (), "window": 1}, "1 to 4 axes"),
    ({"shape": (4, -1), "window": 1}, "grid shape"), ({"shape": (4, 4), "window": (1, 2, 3)}, "each of 2 axes, got 3"),
    ({"shape": 9, "window": -1}, "grid window"), ({"shape": 9, "window": [(1, 2, 3)]}, "before, after"),
    ({"shape": (4, 4), "window": 1, "periodic": [True]}, "periodic for each of 2"),
    ({"shape": 9, "window": 1, "periodic": "no"}, "True or False"),
    ({"shape": 9, "window": 1, "edges": "round"}, "cut, shifted"), ({"shape": 9, "window": "3"}, "grid window"),
    ({"shape": 9, "window": 1, "periodic": True, "causal": True}, "first axis, which is periodic")])
def test_what_makes_no_sense(options, message):
    with pytest.raises(OptionError, match=message):
        Grid(**options)


def test_points_are_the_tokens():
    with pytest.raises(MaskError, match="as many queries and keys as 4x5 has points, 20, got 20 and 21"):
        Grid((4, 5), 1).check(20, 21)
    assert Grid((4, 5), 1) == Grid(np.array([4, 5]), (1, 1), np.array([False, False]))
    assert repr(Grid((4, 5), [(1, 0), None], causal=True)) == (
        "Grid((4, 5), [(1, 0), (None, None)], periodic=(False, False), edges='cut', causal=True)")
    assert Grid((4, 5), 1) != Grid((5, 4), 1)
    assert len({Grid(4, 1), Grid(4, 1), Mask()}) == 2


def test_points_asked_about_in_any_order():
    mask = Grid((5, 6), 1, periodic=(False, True))
    rows = np.array([29, 3, 17, 3])
    whole = sum((np.arange(30) >= low[:, None]) & (np.arange(30) < high[:, None])
                for low, high in mask.bounds(np.arange(30), 30, 30))
    some = sum((np.arange(30) >= low[:, None]) & (np.arange(30) < high[:, None])
               for low, high in mask.bounds(rows, 30, 30))
    assert (whole[rows] == some).all()


def test_near_is_what_it_says():
    """The oracle itself, on a case done by hand."""
    seen = oracle.near((3, 4), [(1, 0), 1], [False, True], "cut", False)
    assert np.flatnonzero(seen[4]).tolist() == [0, 1, 3, 4, 5, 7]
    assert list(itertools.compress(range(12), seen[2])) == [1, 2, 3]


def test_a_block_is_met_in_one_pass_however_many_intervals_there_are(monkeypatch):
    """Forward and backward the backend is called once, and packs each tile of keys once."""
    from mpi4py import MPI

    from ringmpi import RingAttention
    from ringmpi.backends.numba_ import backward, forward
    from ringmpi.backends.numba_.backend import NumbaBackend

    calls, packed = [], []
    for name in ("accumulate", "backward"):
        made = getattr(NumbaBackend, name)
        monkeypatch.setattr(NumbaBackend, name, lambda self, *given, name=name, made=made:
                            calls.append(name) or made(self, *given))
    monkeypatch.setattr(forward.Forward, "_heads_apart", lambda *given: False)         # which packs in another way
    for kind in (forward.Forward, backward.Backward):
        made = kind._pack
        monkeypatch.setattr(kind, "_pack", lambda self, start, stop, first, last, *given, made=made:
                            packed.append(last - first) or made(self, start, stop, first, last, *given))
    grid = {"shape": (40, 60), "window": [5, 7], "periodic": [False, True], "edges": "cut", "causal": False}
    n = 2400
    q, k, v = oracle.random_qkv(0, n, n, 1, 1, 8, 8, "float32")
    with RingAttention(MPI.COMM_SELF, threads=1, backend="numba", mask=Grid(**grid)) as attention:
        out = attention(q, k, v)
        of_forward, packed[:] = sum(packed), []
        dq, _, _ = attention.backward(q)
    assert calls == ["accumulate", "backward"]
    assert 0 < of_forward <= -(-n // 64)
    assert 0 < sum(packed) <= -(-n // 64)
    want = oracle.dense(q, k, v, oracle.near(**grid), 8**-0.5, dout=q, dlse=np.zeros((n, 1)))
    assert oracle.error(out, want["out"]) < 1e-6
    assert oracle.error(dq, want["dq"]) < 5e-6
