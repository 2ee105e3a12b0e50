"""Masks: intervals against a dense boolean mask written from the definition."""

import sys

import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringmpi import Mask, MaskError, OptionError


@st.composite
def masks(draw, n_k):
    side = st.none() | st.integers(0, 12)
    options = {
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.tuples(side, side) | st.integers(0, 12)),
        "prefix": draw(st.none() | st.integers(0, 40)),
        "first": draw(st.integers(0, 8)),
        "q_offset": draw(st.none() | st.integers(-10, 40)),
    }
    if draw(st.booleans()):
        inner = draw(st.sets(st.integers(1, max(n_k - 1, 1)), max_size=5)) if n_k > 1 else set()
        options["documents"] = [0, *sorted(inner), n_k] if n_k else [0]
    return options


@given(st.data(), st.integers(0, 40), st.integers(0, 40))
def test_bounds_are_the_dense_mask(data, n_q, n_k):
    options = data.draw(masks(n_k))
    mask = Mask(**options)
    mask.check(n_k)
    intervals = mask.bounds(np.arange(n_q), n_q, n_k)
    got = np.zeros((n_q, n_k), int)
    j = np.arange(n_k)
    for low, high in intervals:
        assert (low <= high).all()
        got += (j >= low[:, None]) & (j < high[:, None])
    assert got.max(initial=0) <= 1, "intervals overlap"
    assert (got.astype(bool) == oracle.visible(n_q, n_k, **options)).all()


def test_first_adds_a_second_interval():
    assert len(Mask(causal=True, window=3).bounds([5], 10, 10)) == 1
    assert len(Mask(causal=True, window=3, first=2).bounds([5], 10, 10)) == 2


def test_ends_are_aligned():
    (low, high), = Mask(causal=True).bounds(np.arange(2), 2, 5)
    assert (low.tolist(), high.tolist()) == ([0, 0], [4, 5])
    (low, high), = Mask(causal=True, q_offset=0).bounds(np.arange(2), 2, 5)
    assert high.tolist() == [1, 2]


@pytest.mark.parametrize("documents", [[0, 5, 5, 10], [0, 7, 3, 10], [1, 10], [], [[0, 10]], [0.0, 10.0]])
def test_documents_must_increase(documents):
    with pytest.raises(MaskError, match="documents"):
        Mask(documents=documents)


def test_documents_must_end_at_the_last_key():
    with pytest.raises(MaskError, match="must be the number of keys, 10, got 9"):
        Mask(documents=[0, 4, 9]).check(10)


@pytest.mark.parametrize("options", [{"window": -1}, {"window": (1, 2, 3)}, {"window": 1.5}, {"prefix": -1},
                                     {"first": -2}, {"q_offset": 0.5}, {"window": "ab"}])
def test_numbers_that_make_no_sense(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        Mask(**options)


def test_numbers_that_mean_no_limit_do_not_wrap():
    far = sys.maxsize
    masks = (Mask(window=(None, far)), Mask(window=far), Mask(window=(far, far), first=far),
             Mask(causal=True, prefix=far))
    for mask in masks:
        assert sum((high - low).sum() for low, high in mask.bounds(np.arange(5), 5, 9)) == 45
    for offset in (far, -far, 2**63):
        with pytest.raises(OptionError, match="q_offset"):
            Mask(q_offset=offset)


def test_equality():
    assert Mask(documents=[0, 3]) == Mask(documents=np.array([0, 3]))
    assert Mask(documents=[0, 3]) != Mask(documents=[0, 4])
    assert len({Mask(), Mask(), Mask(causal=True)}) == 2
