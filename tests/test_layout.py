"""Layouts: every position once, increasing; `count_below` against brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringmpi import Contiguous, Custom, OptionError, ShapeError, Striped, Zigzag
from ringmpi.layout import make, resolve


@st.composite
def layouts(draw):
    length, size = draw(st.integers(0, 200)), draw(st.integers(1, 9))
    kind = draw(st.sampled_from(["even", "contiguous", "striped", "zigzag", "custom"]))
    if kind == "even":
        return Contiguous.even(length, size)
    if kind == "contiguous":
        return Contiguous(draw(st.lists(st.integers(0, 40), min_size=size, max_size=size)))
    if kind == "custom":
        owner = np.array(draw(st.lists(st.integers(0, size - 1), min_size=length, max_size=length)), int)
        return Custom([np.flatnonzero(owner == rank) for rank in range(size)])
    return (Striped if kind == "striped" else Zigzag)(length, size)


@given(layouts())
def test_every_position_is_on_exactly_one_rank(layout):
    held = [layout.positions(rank) for rank in range(layout.size)]
    assert [len(p) for p in held] == list(layout.counts)
    assert all(p.dtype == np.int64 and (np.diff(p) > 0).all() for p in held)
    assert sorted(np.concatenate(held)) == list(range(layout.length))


@given(layouts())
def test_count_below_is_brute_force(layout):
    x = np.arange(-3, layout.length + 4)
    for rank in range(layout.size):
        brute = [(layout.positions(rank) < y).sum() for y in x]
        assert layout.count_below(x, rank).tolist() == brute


def test_striped_deals_tokens_in_turn():
    assert Striped(7, 3).positions(1).tolist() == [1, 4]
    assert Zigzag(8, 2).positions(0).tolist() == [0, 1, 6, 7]
    assert Contiguous.even(10, 4).counts == (2, 3, 2, 3)


def test_equality_tells_layouts_apart():
    assert Striped(7, 3) == Striped(7, 3)
    assert Striped(8, 3) != Striped(7, 3)
    assert Custom([[0, 2], [1]]) != Custom([[0, 1], [2]])
    assert hash(Custom([[0, 2], [1]])) == hash(Custom([[0, 2], [1]]))


@pytest.mark.parametrize(("positions", "text"), [
    ([[0, 1], [1]], "missing or held twice"),
    ([[0, 1], [3]], "missing or held twice"),
    ([[1, 0]], "strictly increase"),
    ([[0.5, 1.5]], "integer"),
    ([[[0]]], "1-D"),
])
def test_custom_refuses_what_is_no_layout(positions, text):
    with pytest.raises(OptionError, match=text):
        Custom(positions)


def test_resolve_says_what_it_expected():
    with pytest.raises(ShapeError, match=r"rank 0: the striped layout of 10 tokens over 3 ranks expects 4 .* got 3"):
        resolve("striped", [3, 3, 4], "q")
    with pytest.raises(OptionError, match="expected one of contiguous"):
        resolve("diagonal", [3])
    with pytest.raises(OptionError, match="over 2 ranks"):
        make(Striped(4, 3), 4, 2)
    assert resolve("contiguous", [3, 0, 4]).counts == (3, 0, 4)
