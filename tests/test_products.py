"""How bfloat16 is multiplied: chosen by name and by what the ranks have, not by a stopwatch."""

import subprocess
import sys

import numpy as np
import pytest

from ringmpi import BackendError, OptionError
from ringmpi.backends import open_backend
from ringmpi.backends.numba_ import amx, vector
from ringmpi.backends.products import FLOAT32_PRODUCTS, PRODUCTS, bits, choose, choose_float32, wish
from ringmpi.commands import options
from ringmpi.environment import BFLOAT16_PRODUCTS

ALL, WIDEN = bits(PRODUCTS), bits(["widen"])


def test_what_all_ranks_have_is_chosen():
    assert choose("auto", [ALL, ALL]) == "tiles"
    assert choose("auto", [ALL, WIDEN]) == choose("auto", [bits(["widen", "pairs"]), ALL]) == "widen"
    assert choose("auto", np.array([bits(["pairs"])] * 2)) == "pairs"
    assert choose("pairs", [ALL, ALL]) == "pairs"
    assert choose("tiles", [ALL, ALL]) == "tiles"
    with pytest.raises(BackendError, match="'tiles' is not there on rank 1: expected a CPU with AMX that Linux lets"):
        choose("tiles", [ALL, bits(["widen", "pairs"])])
    with pytest.raises(BackendError, match="'pairs' is not there on rank 1: expected a CPU with AVX512_BF16"):
        choose("pairs", [ALL, WIDEN])


def test_float32_goes_in_pieces_where_all_ranks_have_tiles():
    """Whatever is asked for of bfloat16."""
    assert FLOAT32_PRODUCTS == ("pieces", "fma")
    assert choose_float32([ALL, bits(["tiles"])]) == choose_float32(np.array([ALL] * 2)) == "pieces"
    assert choose_float32([ALL, WIDEN]) == choose_float32([bits(["pairs", "widen"])]) == "fma"
    backend = open_backend("numpy", 1)
    assert backend.float32_products == "fma"
    backend.settle("widen", [ALL, ALL])
    assert (backend.products, backend.float32_products) == ("widen", "pieces")


def test_the_caller_is_heard_before_the_variable(monkeypatch):
    monkeypatch.delenv(BFLOAT16_PRODUCTS, raising=False)
    assert wish("auto") == "auto"
    monkeypatch.setenv(BFLOAT16_PRODUCTS, "pairs")
    assert (wish("auto"), wish("widen")) == ("pairs", "widen")
    with pytest.raises(OptionError, match="bfloat16_products: expected one of auto, tiles, widen, pairs, got 'fast'"):
        wish("fast")
    monkeypatch.setenv(BFLOAT16_PRODUCTS, "native")
    with pytest.raises(OptionError, match=f"{BFLOAT16_PRODUCTS}: expected one of"):
        wish("auto")


def test_the_command_line_has_the_same_names():
    assert ("auto", *PRODUCTS) == options.PRODUCTS


def test_numba_has_what_the_cpu_has():
    backend = open_backend("numba", 1)
    tiles = [] if amx.missing() else ["tiles"]
    assert backend.ways == bits(["widen", *tiles, *["pairs"] * vector.machine().pairs])
    assert (backend.products, backend.float32_products) == ("widen", "fma")
    backend.close()
    assert open_backend("numpy", 1).ways == WIDEN


def test_no_backend_asks_a_clock_what_to_do():
    """In a process of its own, as what was found may be kept."""
    code = ("import time\n"
            "def clock(): raise AssertionError('a stopwatch')\n"
            "import numpy as np, ml_dtypes, ringmpi.backends as b; from ringmpi.score import Score\n"
            "x = b.open_backend('numba', 1); x.settle('auto', [x.ways]); q = np.ones((1, 1, 2), ml_dtypes.bfloat16)\n"
            "x.prepare(q.dtype, np.dtype('f4'), 2, 2); s = x.new_state(1, 1, 2, 'f4')\n"
            "time.perf_counter = time.monotonic = clock\n"
            "one = np.ones(1, int); list(x.accumulate(s, q, q, q, 0 * one, one, Score(1.0))); print(x.products)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout == ("widen\n" if amx.missing() else "tiles\n"), done.stderr
