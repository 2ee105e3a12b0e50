"""What travels of a block, against lists of its columns."""

import itertools

import numpy as np
import pytest

from ringmpi import excerpts
from ringmpi.layout import Contiguous
from ringmpi.parts import Part


def test_excerpts():
    """Columns of a block in two parts, of which some runs travel, against a list of what they are."""
    layout = Contiguous([5, 9, 4])
    parts = [Part(slice(0, 9), [1], layout), Part(slice(9, 14), [0], layout)]
    positions = np.array([*range(5, 14), *range(5)])
    for kept in ([slice(2, 4), slice(7, 11)], [slice(0, 14)], [slice(13, 14)], []):
        some = excerpts.excerpts(parts, kept)
        columns = [c for run in kept for c in range(run.start, run.stop)]
        assert [*some[0].positions(), *some[1].positions()] == positions[columns].tolist()
        for part, whole in zip(some, (range(9), range(9, 14)), strict=True):
            held = positions[[c for c in columns if c in whole]]
            assert part.columns.stop - part.columns.start == len(held)
            assert part.count_below(np.arange(20)).tolist() == [(held < x).sum() for x in range(20)]


@pytest.mark.parametrize("seed", range(20))
def test_sections_that_are_seen(seed):
    rng = np.random.default_rng(seed)
    tokens = int(rng.integers(0, 40))
    count = int(rng.integers(1, 9))
    begin = rng.integers(0, tokens + 1, 3)
    end = np.maximum(begin, rng.integers(0, tokens + 1, 3))
    edges = excerpts.edges(tokens, count)
    got = excerpts.touched([Part(slice(0, tokens), [0], Contiguous([tokens]))], [[(begin, end)]], count)
    want = [any((b < hi) & (lo < e) & (b < e) & (lo < hi) for b, e in zip(begin, end, strict=True))
            for lo, hi in itertools.pairwise(edges)]
    assert got.tolist() == want
    kept = [c for run in excerpts.runs(got, tokens) for c in range(run.start, run.stop)]
    assert kept == [c for lo, hi, keep in zip(edges[:-1], edges[1:], got, strict=True) if keep for c in range(lo, hi)]
