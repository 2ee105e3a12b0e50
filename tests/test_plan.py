"""`ringmpi plan`: what it prints and writes, what it says of the ring, simulations, and errors. Without MPI."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ringmpi.backends import backend_class
from ringmpi.cli import main
from ringmpi.commands.units import bandwidth, duration, size_text, time_text
from ringmpi.job.inputs import Sizes
from ringmpi.job.memory import Process, predict_memory
from ringmpi.job.options import Options
from ringmpi.schedules.rates import CPU, LinkRate

NO_MPI = "import sys; sys.modules['mpi4py'] = None; from ringmpi.cli import main; sys.exit(main())"
LARGE = ("--tokens", 1048576, "--heads", 32, "--kv-heads", 8, "--dim", 128, "--dtype", "bfloat16", "--backend", "cuda")


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "PMI_", "OMPI_COMM")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("RINGMPI_RATES", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)


def plan(*arguments):
    """Exit code of a plan, argparse's included."""
    try:
        return main(["plan", *(str(x) for x in arguments)])
    except SystemExit as stop:
        return stop.code


def record(*arguments):
    assert plan(*arguments, "--json", "plan.json") == 0
    with open("plan.json") as file:
        return json.load(file)


def test_it_needs_no_mpi_and_answers_for_thousands_of_ranks():
    asked = *map(str, LARGE), "--ranks", "4096", "--ranks-per-node", "8", "--link", "25GB/s", "--latency", "2us"
    said = subprocess.run([sys.executable, "-c", NO_MPI, "plan", *asked], capture_output=True, text=True, timeout=120,
                          check=False)
    assert said.returncode == 0, said.stderr
    assert "between nodes 25 GB/s and 2 us" in said.stdout
    *_, verdict = said.stdout.splitlines()
    assert re.fullmatch(r"The ring takes \d+ times as long as \S+: each hop has [\d.]+ us to compute and [\d.]+ us to "
                        r"send, and a step takes [\d.]+ us besides\.", verdict)
    assert re.search(r"^1x1x4096:ring +\S+ ms", said.stdout, re.MULTILINE)


def test_the_examples_of_the_docs_say_what_is_said(capsys):
    """But for the numbers, and what they lead to."""
    text = (Path(__file__).parent.parent / "docs/planning.rst").read_text()
    examples = re.findall(r"^    \$ ringmpi plan ((?:.*\\\n)*.*)\n((?:    .*\n|\n(?=    ))+)", text, re.MULTILINE)
    assert len(examples) == 2
    for command, printed in examples:
        assert plan(*command.replace("\\\n", " ").split()) == 0
        said = capsys.readouterr().out.strip().splitlines()
        first, *_, last = printed.strip().splitlines()
        assert said[0] == first
        assert re.sub(r"\d.*? (?=ranks|times|have|has)", "", said[-1])[:28] == re.sub(
            r"\d.*? (?=ranks|times|have|has)", "", last.strip())[:28]


def test_candidates_are_sorted_and_auto_is_marked(capsys):
    got = record("--tokens", 65536, "--ranks", 8, "--all", "--causal", "--layout", "striped")
    seconds = [x["seconds"] for x in got["candidates"]]
    assert seconds == sorted(seconds)
    lines = capsys.readouterr().out.splitlines()
    marked = [line for line in lines if line.endswith("auto")]
    assert [line.split()[0] for line in marked] == [got["chosen"]]
    assert len([line for line in lines if re.match(r"\dx\dx\d:", line)]) == len(got["candidates"])
    assert lines[-1] == got["says"]


def test_memory_is_that_of_a_dry_run():
    """But for what the backend needs for itself."""
    got = record("--tokens", 8192, "--ranks", 8, "--kv-heads", 2, "--backend", "cuda")
    items, shapes = np.dtype("f4"), ((1024, 8, 64), (1024, 2, 64), (1024, 2, 64))
    own = backend_class("cuda").scratch_bytes(*shapes, items, items)
    for candidate in got["candidates"]:
        options = Options(schedule=candidate["schedule"], backend="cuda")
        parts = predict_memory(Sizes(8192, 8192, 8, 2, 64, 64, "float32"), 8, options, Process(0, 0))
        assert candidate["memory"] == parts["total"] - sum(own.values())


def test_values_in_keys_are_not_sent_or_held(tmp_path):
    """By sizes, and by a file whose keys hold values: 576 numbers of a token in place of 1088."""
    sizes = ["--tokens", 8192, "--ranks", 4, "--heads", 4, "--kv-heads", 1, "--dim", 576, "--dim-v", 512]
    apart, together = (record(*sizes, *more)["candidates"] for more in ([], ["--values-in-keys"]))
    ring_apart, ring = (next(x for x in some if x["schedule"] == "1x1x4:ring") for some in (apart, together))
    assert ring["bytes_sent"] * 1088 == ring_apart["bytes_sent"] * 576
    assert ring_apart["memory"] - ring["memory"] == 3 * 2048 * 512 * 4             # v, and two buffers
    parts = [predict_memory(Sizes(8192, 8192, 4, 1, 576, 512, "float32", in_keys=in_keys), 4,
                            Options(schedule="ring"), Process(0, 0)) for in_keys in (False, True)]
    assert parts[0]["total"] - parts[1]["total"] == 3 * 2048 * 512 * 4
    assert plan(*sizes[:-1], 577, "--values-in-keys") == 2
    assert plan("--tokens", 9, "--ranks", 1, "--values-in-keys") == 2
    assert main(["make", "random", str(tmp_path / "in.h5"), "--tokens", "512", "--dim", "24"]) == 0
    said = [tmp_path / "in.h5", "--ranks", 4, "--dim-v", 16]
    got = record(*said, "--values-in-keys")["candidates"]
    assert next(x for x in got if x["schedule"] == "1x1x4:ring")["bytes_sent"] == 3 * 128 * 8 * 24 * 4
    assert plan(*said) == 2


@pytest.mark.parametrize(("link", "says"), [("10GB/s", r"The ring will do: each hop has"),
                                            ("20MB/s", r"The ring takes \d+% longer than 1x2x2:\w+: ")])
def test_the_ring_is_too_slow_on_slow_links_only(link, says, capsys):
    assert plan("--tokens", 32768, "--heads", 7, "--kv-heads", 7, "--ranks", 4, "--ranks-per-node", 1, "--threads", 1,
                "--link", link) == 0
    assert re.match(says, capsys.readouterr().out.splitlines()[-1])


def test_a_memory_limit_is_kept_and_what_is_larger_marked(capsys):
    free = record("--tokens", 65536, "--ranks", 16, "--ranks-per-node", 4, "--all")
    limit = sorted(x["memory"] for x in free["candidates"])[3]
    kept = record("--tokens", 65536, "--ranks", 16, "--ranks-per-node", 4, "--all", "--memory-limit", limit)
    memory = {x["schedule"]: x["memory"] for x in free["candidates"]}
    assert memory[kept["chosen"]] <= limit
    said = capsys.readouterr().out
    assert said.count("too large") == sum(nbytes > limit for nbytes in memory.values())
    assert plan("--tokens", 65536, "--ranks", 16, "--memory-limit", "1KB") == 2
    assert "memory limit: expected" in capsys.readouterr().err


def test_a_backward_pass_comes_on_top():
    one, both = (record("--tokens", 65536, "--ranks", 8, *more) for more in ((), ("--backward",)))
    forward, all_of_it = ({x["schedule"]: x["seconds"] for x in got["candidates"]} for got in (one, both))
    assert all(all_of_it[name] > 2 * seconds for name, seconds in forward.items())


def test_a_file_says_the_same_as_its_sizes(tmp_path):
    assert main(["make", "random", "in.h5", "--tokens", "512", "--queries", "256", "--heads", "4", "--kv-heads", "2",
                 "--documents", "8"]) == 0
    file = record("in.h5", "--ranks", 4, "--causal")
    sizes = record("--tokens", 512, "--queries", 256, "--heads", 4, "--kv-heads", 2, "--ranks", 4, "--causal")
    assert file["candidates"] == sizes["candidates"]
    short = record("in.h5", "--ranks", 4, "--documents", "--q-offset", 256)
    assert short["candidates"] != file["candidates"]


def test_rates_of_a_file_count(tmp_path, capsys):
    replace(CPU, between=LinkRate(1e-6, 3e9), where="two boxes").save(tmp_path / "rates.json")
    assert plan("--tokens", 4096, "--ranks", 16, "--rates", tmp_path / "rates.json") == 0
    assert "rates: two boxes; between nodes 3 GB/s and 1 us" in capsys.readouterr().out
    (tmp_path / "bad.json").write_text("{}")
    assert plan("--tokens", 4096, "--ranks", 16, "--rates", tmp_path / "bad.json") == 2


def test_a_simulation_says_where_a_ring_stops_scaling_and_who_is_late(capsys):
    got = record(*LARGE, "--ranks", 1024, "--simulate", "--slow-rank", "3:2")
    said = capsys.readouterr().out
    assert got["straggler"]["what"] == "rank 3"
    assert "Rank 3 holds the others up" in said
    assert f"The ring stops scaling at {got['stops_scaling_at']:,} ranks" in said
    usual = record(*LARGE, "--ranks", 1024, "--simulate")
    assert "Nobody holds the others up." in usual["says"]
    assert got["scaling"] == usual["scaling"]
    assert got["seconds"] - usual["seconds"] == pytest.approx(got["straggler"]["seconds"], rel=0.1)
    planned = {x["schedule"]: x for x in record(*LARGE, "--ranks", 1024)["candidates"]}["1x1x1024:ring"]
    assert usual["seconds"] == pytest.approx(planned["seconds"], rel=0.01)
    assert usual["bytes_sent"] == pytest.approx(planned["bytes_sent"], rel=0.01)


def test_a_simulation_says_what_was_not_simulated(capsys):
    assert plan(*LARGE, "--ranks", 100000, "--simulate", "--slow-link", "3-4:10", "--causal") == 0
    said = capsys.readouterr().out
    assert re.search(r"the first \d+ of 100,000 steps were simulated", said)
    assert "beyond 2,048 ranks, all are taken to have the average work" in said


def test_ranks_share_cores_only_if_it_is_said(capsys):
    assert plan("--tokens", 65536, "--ranks", 8, "--threads", 1) == 0
    many = record("--tokens", 65536, "--ranks", 8, "--threads", 1)
    few = record("--tokens", 65536, "--ranks", 8, "--threads", 1, "--cores", 2)
    ring = [next(x["seconds"] for x in got["candidates"] if x["schedule"] == "1x1x8:ring") for got in (many, few)]
    assert ring[1] == pytest.approx(4 * ring[0], rel=0.01)


def test_jitter_is_the_same_for_the_same_seed():
    asked = "--tokens", 65536, "--ranks", 8, "--threads", 1, "--simulate", "--jitter", 0.2, "--schedule", "mesh"
    one, again, other = (record(*asked, "--seed", seed)["seconds"] for seed in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize(("arguments", "says"), [
    (("--ranks", 4), "expected IN.h5, or --tokens"),
    (("--tokens", 64), "the following arguments are required: --ranks"),
    (("in.h5", "--ranks", 4, "--dim", 64), "--dim: IN.h5 says that; leave one of them out"),
    (("--tokens", 64, "--ranks", 4, "--link", "25"), "expected a bandwidth like 25GB/s, 23GiB/s or"),
    (("--tokens", 64, "--ranks", 4, "--link", "0GB/s"), "expected a bandwidth like"),
    (("--tokens", 64, "--ranks", 4, "--latency", "2"), "expected a time like 2us, 0.5ms or 1s, got '2'"),
    (("--tokens", 64, "--ranks", 4, "--heads", 8, "--kv-heads", 3), "must be a multiple of --kv-heads"),
    (("--tokens", 64, "--ranks", 4, "--documents"), "--documents: read from IN.h5, which is not given"),
    (("--tokens", 64, "--ranks", 4, "--key-bias"), "--key-bias: read from IN.h5, which is not given"),
    (("--tokens", 64, "--ranks", 4, "--jitter", 0.1), "--jitter: says what to simulate"),
    (("--tokens", 64, "--ranks", 4, "--simulate", "--backward"), "--simulate simulates the forward pass"),
    (("--tokens", 64, "--ranks", 4, "--simulate", "--slow-rank", "3"), "expected RANK:TIMES"),
    (("--tokens", 64, "--ranks", 4, "--simulate", "--slow-rank", "4:2"), "a rank from 0 to 3 to be slow, got 4"),
    (("--tokens", 64, "--ranks", 4, "--simulate", "--slow-link", "1-1:2"), "expected RANK-RANK:TIMES"),
    (("--tokens", 64, "--ranks", 4, "--simulate", "--slow-link", "1-2:0"), "expected RANK-RANK:TIMES with TIMES > 0"),
    (("--tokens", 64, "--ranks", 4, "--simulate", "--jitter", "-1"), "expected a number > 0"),
    (("--tokens", 64, "--ranks", 4, "--simulate", "--slow-rank", "\N{SUPERSCRIPT TWO}:2"), "expected RANK:TIMES"),
    (("--tokens", 64, "--ranks", 4, "--simulate", "--slow-link", "1-01:2"), "expected RANK-RANK:TIMES"),
    (("--tokens", 64, "--ranks", 4, "--simulate", "--all"), "--all: says what to list"),
    (("--tokens", 10**20, "--ranks", 4), "--tokens: expected 67,108,864 a rank at most"),
    (("--tokens", 64, "--ranks", 4, "--heads", 10**20), "--heads: expected 65,536 at most"),
    (("--tokens", 64, "--ranks", 2**30), "--ranks: expected 1,048,576 at most, got 1,073,741,824"),
    (("--tokens", 64, "--ranks", 4, "--prefix", 3), "--prefix widens only --causal")])
def test_usage_errors_say_what_would_do(arguments, says, capsys):
    assert plan(*arguments) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("asked", [("--heads", 6, "--ranks", 6, "--schedule", "heads"),
                                   ("--ranks", 12, "--ranks-per-node", 6, "--schedule", "1x2x6:window")])
def test_the_table_of_a_simulation_leaves_out_what_is_not_possible(asked, capsys):
    assert plan("--tokens", 4096, *asked, "--simulate") == 0
    assert "efficiency" in capsys.readouterr().out


def test_what_can_not_be_planned_is_refused(capsys):
    assert plan("--tokens", 64, "--ranks", 6, "--simulate", "--schedule", "1x1x4") == 2
    assert "expected heads x queries x keys to be the number of ranks, 6" in capsys.readouterr().err
    assert plan("--tokens", 64, "--ranks", 6, "--rates", "missing.json") == 2
    assert "--rates: expected a file that" in capsys.readouterr().err
    assert plan("missing.h5", "--ranks", 6) == 3
    assert "missing.h5" in capsys.readouterr().err


def test_units():
    assert [bandwidth(x) for x in ("25GB/s", "1.5 GiB/s", "200Gbit/s", "3B/s")] == [25e9, 1.5 * 2**30, 25e9, 3]
    assert [duration(x) for x in ("2us", "2µs", "0.5 ms", "1s", "3ns")] == pytest.approx([2e-6, 2e-6, 5e-4, 1, 3e-9])
    assert [time_text(x) for x in (1.5, 0.00213, 2e-6, 1e-9, 0)] == ["1.5 s", "2.13 ms", "2 us", "1 ns", "0 ns"]
    assert [time_text(x) for x in (12345.6, 0.9999)] == ["12,346 s", "1 s"]
    assert [size_text(x) for x in (3 * 2**30, 1.5 * 2**20, 2**40, 100)] == ["3 GiB", "1.5 MiB", "1 TiB", "0.0977 KiB"]
