"""What a job shows while it runs: lines in a log, or a bar."""

import re
import time
from pathlib import Path

import launch
import pytest

from ringmpi.cli import main
from ringmpi.commands import display
from ringmpi.commands.display import Display, describe
from ringmpi.job.inputs import Sizes
from ringmpi.job.memory import count_pairs, predict_seconds
from ringmpi.job.options import Options
from ringmpi.job.report import Start
from ringmpi.layout import Contiguous
from ringmpi.mask import Mask
from ringmpi.phases import phase

SIZES = Sizes(1000, 1000, 4, 2, 16, 16, "float32")
# Rank 1 has three quarters of the work, and is slow; rank 0 has nothing to do meanwhile.
SLOW = """
import os, sys, time
from ringmpi.cli import main
from ringmpi.commands import display
from ringmpi.passes import Pass
display.TICK_SECONDS, display.STEP_SECONDS, display.STEP = 0.05, 0.0, 0.02
compute = Pass._run
def slow(self, work, *rest):
    slow = self.movers.carrier.comm.rank == 1 and work.step.step == 1
    time.sleep(0.7 * slow)
    compute(self, work, *rest)
    time.sleep(0.7 * slow)
Pass._run = slow
sys.exit(main())
"""


def start(hosts=("a",), threads=(1,), sizes=SIZES, layout="contiguous", backend="numpy"):
    return Start(Path("in.h5"), sizes, Options(layout=layout, causal=True, backend="numpy"), Mask(causal=True), backend,
                 list(hosts), list(threads))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(display, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(display, "STEP_SECONDS", 0.0)
    monkeypatch.setattr(display, "LINE_SECONDS", 0.1)


def test_a_log_has_the_share_of_the_work_and_the_time_left(quick, capsys):
    begin = time.monotonic()
    with Display(bar=False) as shown:
        shown.start(start())
        with phase("attending"), shown.attending(lambda: (int(2e6 * (time.monotonic() - begin)), 0)):
            time.sleep(0.25)
    lines = capsys.readouterr().err.splitlines()
    shares = [int(share) for share in re.findall(r"attending: (\d+)% in \d s, about \d s left", "\n".join(lines))]
    assert 5 <= len(shares) <= 15
    assert shares == sorted(shares)
    assert shares[-1] <= 100


def test_a_log_has_what_takes_long(quick, capsys):
    with Display(bar=False) as shown:
        shown.start(start())
        with phase("writing out.h5"):
            time.sleep(0.35)
    lines = capsys.readouterr().err.splitlines()[1:]
    assert 1 <= len(lines) <= 3
    assert set(lines) == {"ringmpi: writing out.h5 for 0 s so far"}


@pytest.mark.parametrize("doing", ["reading in.h5", "redistributing /q", "compiling kernels", "writing out.h5"])
def test_the_bar_shows_every_phase(quick, capsys, doing):
    with Display(bar=True) as shown:
        shown.start(start())
        with phase(doing):
            time.sleep(0.2)
    assert f"\r{doing}:   0%" in capsys.readouterr().err


def test_the_work_of_all_ranks_counts(tmp_path):
    """Rank 0 finishes its quarter of a causal job long before rank 1 does the rest."""
    assert main(["make", "random", str(tmp_path / "in.h5"), "--tokens", "2000", "--heads", "2", "--dim", "16"]) == 0
    result = launch.launch(2, ["-c", SLOW, "attend", tmp_path / "in.h5", tmp_path / "out.h5", "--causal", "--backend",
                               "numpy", "--schedule", "ring"], folder=tmp_path / "said", timeout=60)
    assert result.code == 0, result.text
    shares = [int(share) for share in re.findall(r"attending: (\d+)%", result.ranks[0])]
    assert shares, result.text
    assert shares[0] < 60, result.text
    assert shares[-1] == 100, result.text
    assert result.ranks[1] == ""


def test_what_begins():
    line, = describe(start(["a", "a", "b", "b"], [1, 1, 2, 2]), [1] * 4)
    assert line.startswith("4 ranks on a, b, 1 to 2 threads each (numpy); in.h5: 1,000 queries, 1,000 keys, heads 4/2, "
                           "dim 16, float32; predicted: ")
    line, = describe(start([f"n{i}" for i in range(9)], [1] * 9), [10**13] * 9)
    assert "9 ranks on n0, n1, n2, n3 and 5 more nodes, 1 thread each" in line
    assert re.search(r"predicted: \d+ MiB a rank, about \d+:\d\d:\d\d h$", line)
    assert "some seconds" not in describe(start(backend="cuda"), [10**13])[0]


@pytest.mark.parametrize(("layout", "ranks"), [("contiguous", 3), ("striped", 4), ("contiguous", 7)])
def test_pairs_of_each_rank(layout, ranks):
    counted = count_pairs(Mask(causal=True), SIZES, ranks, layout)
    assert sum(counted) == pytest.approx(1000 * 1001 / 2, abs=ranks)
    if layout == "contiguous":
        parts = [Contiguous.even(1000, ranks).positions(rank) for rank in range(ranks)]
        assert counted == [sum(part + 1) for part in parts]
    many = Sizes(10**7, 10**7, 4, 2, 16, 16, "float32")
    assert sum(count_pairs(Mask(causal=True), many, ranks, layout)) == pytest.approx(5e13, rel=1e-3)


def test_seconds_are_those_of_the_slowest_rank():
    one = predict_seconds([10**12], SIZES, [1], "numba")
    assert one > 0
    assert predict_seconds([10**12, 10**9], SIZES, [2, 1], "numba") == pytest.approx(one / 2)
    assert predict_seconds([10**12], SIZES, [1], "cuda") == 0
