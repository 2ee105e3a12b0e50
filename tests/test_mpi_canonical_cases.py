"""Canonical order in a covering of all cases: the bits of one rank, and a dense softmax. Runs under mpiexec."""

import pytest
from cases import covering
from test_mpi_canonical import COVERING, Problem, check_dense

from ringmpi.dtypes import DTYPES

pytestmark = pytest.mark.mpi

CASES = covering({
    "mask": ["full", "causal", "window", "documents", "prefix", "first", "all", "trees", "numbered", "holes"],
    "dtype": list(DTYPES), "layout": ["striped", "uneven", "empty", "zigzag"],
    "kv_layout": ["custom", "uneven", "striped", None], "heads": [(4, 4), (8, 2), (3, 1)],
    "function": ["plain", "all"], "batch": [None, 2],
    "lengths": [(610, 790), (1, 1500), (1000, 3), (192, 192), (0, 5)]})


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_the_bits_of_one_rank_in_any_case(comm, case):
    same = Problem(**case).compare(comm)
    assert all(same.values()), same


@pytest.mark.parametrize("number", range(0, len(COVERING), 3))
def test_dense_softmax(comm, number):
    check_dense(comm, number)
