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
    kind = draw(st.sampled_from(["", "documents", "document_ids", "q_documents"]))
    if kind.endswith("documents"):
        documents = [0, *sorted(draw(st.lists(st.integers(0, n_k + 15) | st.just(n_k), max_size=5)))]
        number = len(documents) - 1
        ranges = st.just((-1, -1)) | st.tuples(st.integers(0, n_k), st.integers(0, n_k)).map(sorted)
        options["documents"] = documents
        options["prompts"] = draw(st.none() | st.lists(ranges, min_size=number, max_size=number))
        # a permutation of trees, so that parents may be packed behind
        order = draw(st.permutations(range(number)))
        chosen = [draw(st.sampled_from([-1, *order[:at]])) for at in range(number)]
        options["parents"] = draw(st.sampled_from([None, [chosen[order.index(d)] for d in range(number)]]))
        if kind == "q_documents":
            many = draw(st.lists(st.integers(0, 12), min_size=number, max_size=number))
            options |= {"q_offset": None, "q_documents": np.concatenate([[0], np.cumsum(many, dtype=int)])}
    elif kind:
        options["document_ids"] = draw(st.lists(st.integers(-1, 4), min_size=n_k, max_size=n_k))
    edges = sorted(draw(st.lists(st.integers(0, n_k), max_size=6)))
    options["spans"] = draw(st.none() | st.permutations([*zip(edges[::2], edges[1::2], strict=False)]))
    options["keys"] = draw(st.none() | st.integers(0, n_k))
    options["key_mask"] = draw(st.none() | st.lists(st.booleans(), min_size=n_k, max_size=n_k))
    return options


@given(st.data(), st.integers(0, 40), st.integers(0, 40))
def test_bounds_are_the_dense_mask(data, n_q, n_k):
    options = data.draw(masks(n_k))
    mask = Mask(**options)
    fits = options.get("documents", [0])[-1] <= n_k and options.get("q_documents", [0])[-1] <= n_q
    said = n_q == n_k or options["q_offset"] is not None or "q_documents" in options
    if fits and (said or not {"documents", "document_ids"} & set(options)):
        mask.check(n_q, n_k)
    intervals = mask.bounds(np.arange(n_q), n_q, n_k)
    assert len(intervals) <= mask.most
    got = np.zeros((n_q, n_k), int)
    j = np.arange(n_k)
    for low, high in intervals:
        assert ((low >= 0) & (low <= high) & (high <= n_k)).all()
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


@pytest.mark.parametrize("documents", [[0, 7, 3, 10], [1, 10], [], [[0, 10]], [0.0, 10.0]])
def test_documents_must_not_decrease(documents):
    with pytest.raises(MaskError, match="documents"):
        Mask(documents=documents)


@pytest.mark.parametrize("options", [{"keys": [[1], [1, 2]]}, {"keys": [[1, 2]]}, {"key_mask": [[True], [True, False]]},
                                     {"key_mask": [0, 2]}, {"spans": [[0, 1], [2]]},
                                     {"document_ids": np.array([2**63, 3], np.uint64)}])
def test_arrays_that_are_none(options):
    with pytest.raises(MaskError, match=next(iter(options))):
        Mask(**options)


def test_documents_must_end_among_the_keys():
    with pytest.raises(MaskError, match="must be at most the number of keys, 10, got 11"):
        Mask(documents=[0, 4, 11]).check(10, 10)


def test_documents_may_be_empty_and_leave_padding():
    mask = Mask(documents=[0, 0, 2, 2, 2, 5, 5], causal=True, window=(1, 0), first=1)
    mask.check(8, 8)
    seen = sum(((np.arange(8) >= low[:, None]) & (np.arange(8) < high[:, None]) for low, high in
                mask.bounds(np.arange(8), 8, 8)), np.zeros((8, 8), bool))
    assert [np.flatnonzero(row).tolist() for row in seen] == [[0], [0, 1], [2], [2, 3], [3, 4], [], [], []]
    (low, high), = Mask(documents=[0]).bounds(np.arange(3), 3, 3)
    assert (high - low).tolist() == [0, 0, 0]
    assert Mask(documents=[0, 2]) != Mask(documents=[0, 2, 2])


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


def test_keywords_of_others_are_answered_with_ours():
    with pytest.raises(TypeError, match=r"Mask got an unexpected keyword argument 'cu_seqlens'; here .*documents=off"):
        Mask(cu_seqlens=[0, 3])


def test_equality():
    assert Mask(documents=[0, 3]) == Mask(documents=np.array([0, 3]))
    assert Mask(documents=[0, 3]) != Mask(documents=[0, 4])
    assert len({Mask(), Mask(), Mask(causal=True)}) == 2


def test_documents_that_end_beyond_the_keys():
    """As in a cache that grows: intervals stay within the keys there are."""
    ((low, high),) = Mask(documents=[0, 10, 70, 90], q_offset=8).bounds(np.arange(70), 70, 20)
    assert (low == np.repeat([0, 10, 20], [2, 60, 8])).all()
    assert (high == np.repeat([10, 20, 20], [2, 60, 8])).all()
    see = oracle.visible(70, 20, documents=[0, 10, 70, 90], q_offset=8)
    j = np.arange(20)
    assert (see == ((j >= low[:, None]) & (j < high[:, None]))).all()
