"""What schedules cost: bytes against the carriers' own steps, what is chosen where, memory limits, rates in files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ringmpi.engine import rates_of_this_machine
from ringmpi.environment import rates_file
from ringmpi.errors import OptionError
from ringmpi.job.inputs import Sizes
from ringmpi.job.memory import Process, predict_memory, schedule_of
from ringmpi.job.options import Options
from ringmpi.schedules.base import Route
from ringmpi.schedules.calibration import Measured, _least_squares, fit
from ringmpi.schedules.cost import candidates, choose, estimate, fewest_bytes
from ringmpi.schedules.machine import Machine
from ringmpi.schedules.movers import carrier_class
from ringmpi.schedules.rates import CPU, GPU, KernelRate, LinkRate, Rates
from ringmpi.schedules.spec import CARRIERS, Schedule, check_memory_limit
from ringmpi.schedules.traffic import Shape, traffic

SHAPE = Shape(4096, 4096, 8, 8, 64, 64)
SLOW = replace(CPU, between=LinkRate(50e-6, 1e8))


def shape_of(tokens, **more):
    return replace(SHAPE, n_q=tokens, n_k=tokens, **more)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_bytes_of_blocks_are_those_of_the_steps(carrier):
    """For any numbers of ranks and any sizes of blocks, forward and backward; values in keys are not sent."""
    random = np.random.default_rng(5)
    for number in range(60):
        ranks, kv_heads, dim, dim_v = (int(x) for x in random.integers(1, 10, 4))
        tokens = random.integers(0, 30, ranks).tolist()
        in_keys = number % 3 == 0
        shape = Shape(sum(tokens), sum(tokens), kv_heads, kv_heads, dim, dim_v, item=2, wide=4, in_keys=in_keys)
        widths = (dim,) if in_keys else (dim, dim_v)
        sizes, wide = ([[n * kv_heads * width * nbytes for width in widths] for n in tokens] for nbytes in (2, 4))
        route = Route(np.ones((ranks, ranks), bool), tokens)
        for gradients in (None, wide):
            steps = carrier_class(carrier).steps(route, sizes, gradients)
            sent = sum(message.nbytes for messages in steps for message in messages)
            schedule = Schedule(keys=ranks, carrier=carrier)
            assert round(traffic(shape, schedule, gradients is not None).carried * ranks) == sent


def test_a_mesh_of_16_ranks_sends_less_than_the_ring():
    """Of queries few and heads many, or as many keys as queries: by the formula of each."""
    mesh, ring = (traffic(SHAPE, Schedule(queries=16 // keys, keys=keys)) for keys in (4, 16))
    tokens, heads, dim = 256, 8, 64
    assert mesh.carried == 3 * tokens * heads * 2 * dim * 4
    assert mesh.queries + mesh.states == 3 * tokens * heads * (dim + dim + 2) * 4
    assert ring.total == 15 * tokens * heads * 2 * dim * 4
    assert mesh.total < 0.41 * ring.total


def test_what_is_chosen_where():
    """Constructed cases of which the answer is known."""
    nodes = Machine(16, 1, 1, 1, rates=SLOW)
    few = replace(shape_of(2**16), n_q=16)
    assert choose(few, nodes).queries == 16                               # a query is less than the keys
    alone = replace(shape_of(16 * 64, heads=5, kv_heads=5))
    mesh = choose(alone, nodes)                                           # 5 heads can't be shared
    assert (mesh.heads, mesh.queries > 1, mesh.keys > 1) == (1, True, True)
    fast = Machine(16, 1, 1, 1, rates=replace(CPU, between=LinkRate(1e-6, 1e12)))
    assert choose(shape_of(16 * 16384, heads=5, kv_heads=5), fast) == Schedule(keys=16)       # hidden: nothing gains
    assert choose(shape_of(64), Machine(1, 1)) == Schedule()
    assert choose(replace(few, replicated=True), nodes) == Schedule(queries=16)
    assert fewest_bytes(4, 10, 20) == Schedule(queries=4)


def test_candidates_keep_to_what_there_is():
    on_gpu = candidates(Machine(8, 8, on_gpu=True, rates=GPU), 8)
    assert not any(schedule.carrier == "window" for schedule in on_gpu)
    assert not any(schedule.keys > 2 for schedule in candidates(Machine(8, 2), 8) if schedule.carrier == "window")
    assert {schedule.heads for schedule in candidates(Machine(8, 8), 6)} == {1, 2}
    assert all(schedule.ranks == 12 for schedule in candidates(Machine(12, 4), 12))
    assert len(set(on_gpu)) == len(on_gpu)
    assert candidates(Machine(4, 4), 8, replicated=True) == [Schedule(queries=4)]


def test_costs_grow_with_what_there_is_to_do():
    for schedule in candidates(Machine(8, 2, 1, 2), 8):
        for backward in (False, True):
            times = [estimate(shape_of(n), schedule, Machine(8, 2, 1, 2), backward=backward) for n in (512, 1024, 8192)]
            assert times[0].seconds < times[1].seconds < times[2].seconds
            assert all(0 <= x.hidden <= 1 and x.bytes_sent <= x.memory * 8 for x in times)
            slow = estimate(shape_of(1024), schedule, Machine(8, 2, 1, 2, rates=SLOW), backward=backward)
            assert slow.seconds >= times[1].seconds
            assert slow.bytes_sent == times[1].bytes_sent
    crowded = [estimate(SHAPE, Schedule(keys=8), Machine(8, 8, 1, cores)).seconds for cores in (8, 4, 2)]
    assert crowded[0] * 3.9 < crowded[1] * 2 < crowded[2] * 1.01


def test_blocks_that_nobody_needs_cost_nothing():
    """A window on contiguous shards: two blocks of sixteen are computed with, and one travels."""
    machine, ring = Machine(16, 1, 1, 1, rates=SLOW), Schedule(keys=16)
    near, far = (estimate(replace(SHAPE, seen=1 / 16, reach=reach), ring, machine) for reach in (1 / 15, 1.0))
    assert near.compute_seconds < 0.5 * far.compute_seconds
    assert near.carried == pytest.approx(far.carried / 15)
    assert near.bytes_sent == pytest.approx(far.bytes_sent / 15, abs=1)


def test_a_hundred_thousand_ranks_are_chosen_for_at_once():
    machine = Machine(100_000, 8, on_gpu=True, links=8, rates=GPU)
    best = choose(shape_of(100_000 * 8, heads=32, kv_heads=8, item=2), machine, backward=True)
    assert best.ranks == 100_000
    assert best.keys < 100_000


def test_a_memory_limit_is_kept_or_names_the_smallest_need():
    machine = Machine(8, 8, 1, 8)
    free = estimate(SHAPE, choose(SHAPE, machine), machine)
    least = min(estimate(SHAPE, schedule, machine).memory for schedule in candidates(machine, 8))
    kept = estimate(SHAPE, choose(SHAPE, machine, least), machine)
    assert kept.memory == least < free.memory
    with pytest.raises(OptionError, match=rf"memory limit: expected {least} bytes a rank at least .*got {least - 1}"):
        choose(SHAPE, machine, least - 1)


def test_a_job_keeps_within_its_limit():
    sizes = Sizes(4096, 4096, 8, 8, 64, 64, "float32")
    assert schedule_of(sizes, 4, Options(schedule="mesh")) == Schedule(queries=2, keys=2)
    parts = predict_memory(sizes, 4, Options(schedule="ring"), Process(0, 0))
    arrays = estimate(SHAPE, Schedule(keys=4), Machine(4, 4)).memory
    assert arrays <= parts["total"]
    with pytest.raises(OptionError, match=rf"expected {arrays} bytes"):
        schedule_of(sizes, 4, Options(schedule="ring", memory_limit=arrays - 1))
    assert schedule_of(sizes, 4, Options(memory_limit=arrays)).ranks == 4


@pytest.mark.parametrize(("text", "want"), [
    (None, None), (5, 5), (np.int64(7), 7), ("2GiB", 2**31), ("1.5 KiB", 1536), ("500MB", 5 * 10**8), ("12", 12),
    ("12B", 12)])
def test_limits_are_read(text, want):
    assert check_memory_limit(text) == want


@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "", "2 apples", "GiB", "-3MB", "0", b"2GiB"])
def test_what_is_no_limit_is_refused(wrong):
    with pytest.raises(OptionError, match="memory_limit: expected bytes"):
        check_memory_limit(wrong)


def test_rates_go_through_a_file(tmp_path, monkeypatch):
    path = tmp_path / "new" / "rates.json"
    rates = replace(CPU, call=1 / 3, where="Überall")
    rates.save(path)
    assert Rates.load(path) == rates
    assert [x.name for x in path.parent.iterdir()] == ["rates.json"]
    monkeypatch.setenv("RINGMPI_RATES", str(path))
    assert Rates.from_text(rates_of_this_machine(False)) == rates
    assert all(line for line in rates.describe())


def test_without_a_file_there_are_no_rates(tmp_path, monkeypatch):
    monkeypatch.setenv("RINGMPI_RATES", str(tmp_path / "none"))
    assert rates_of_this_machine(False) is None


DAMAGE = {
    "cut": lambda text: text[:len(text) // 2], "empty": lambda _: "", "other": lambda _: "[1, 2]",
    "bytes": lambda _: "\udcff\udcfe", "format": lambda text: text.replace('rates": 1', 'rates": 2'),
    "names": lambda text: text.replace('"call"', '"cell"'),
    "negative": lambda text: text.replace('"call": ', '"call": -'),
    "nan": lambda text: text.replace('"step": ', '"step": NaN, "x": '),
    "stopped": lambda text: json.dumps(json.loads(text) | {"inside": {"latency": 1.0, "bandwidth": 0.0}}),
    "short": lambda text: json.dumps(json.loads(text) | {"inside": [1.0]}),
    "text": lambda text: json.dumps(json.loads(text) | {"step": "fast"}),
    "huge": lambda text: text.replace('"step": ', '"step": 1' + "0" * 400 + ', "x": '),
    "deep": lambda _: "[" * 60000,
    "terminal": lambda text: json.dumps(json.loads(text) | {"where": "\x1b[2J"}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_warned_of(damage, tmp_path, monkeypatch):
    """A call goes on with default rates; what reads the file itself gets an error that names it."""
    path = tmp_path / "rates.json"
    CPU.save(path)
    path.write_bytes(damage(path.read_text()).encode(errors="surrogateescape"))
    monkeypatch.setenv("RINGMPI_RATES", str(path))
    with pytest.raises(OptionError, match=r"rates.json: expected the rates of a machine.*measure again"):
        Rates.load(path)
    with pytest.warns(UserWarning, match=r"rates.json.*chosen by default rates"):
        assert rates_of_this_machine(False) is None


def test_no_home_folder(monkeypatch):
    """As in a container whose user has no name: there are no rates then, and a variable is read without one."""
    monkeypatch.delenv("RINGMPI_RATES", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert rates_file() is None
    assert rates_of_this_machine(False) is None
    monkeypatch.setenv("RINGMPI_RATES", "/some/rates.json")
    assert rates_file() == Path("/some/rates.json")


def test_gpus_do_not_go_by_the_rates_of_cpus(tmp_path, monkeypatch):
    CPU.save(tmp_path / "rates.json")
    monkeypatch.setenv("RINGMPI_RATES", str(tmp_path / "rates.json"))
    assert rates_of_this_machine(False) == CPU.as_text()
    assert rates_of_this_machine(True) is None


def test_a_folder_is_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("RINGMPI_RATES", str(tmp_path))
    with pytest.warns(UserWarning, match="chosen by default rates"):
        assert rates_of_this_machine(False) is None


def test_rates_are_found_again_in_what_calls_take():
    """Estimates by known rates, with noise of 2 %: the rates that are fitted predict other calls within 5 %."""
    known = replace(CPU, forward=KernelRate(1e-4, 5e-6, 2e-9, 1e-9, 8e10), call=7e-4, step=3e-4, message=5e-5)
    machine = Machine(4, 4, 1, 4, rates=known)
    random = np.random.default_rng(1)
    measured = [Measured(shape, schedule, backward, float(random.normal(1, 0.02)) *
                         estimate(shape, schedule, machine, backward=backward).seconds)
                for shape in (shape_of(4 * n, kv_heads=g) for n in (32, 128, 384) for g in (8, 2))
                for schedule in candidates(machine, 8) for backward in (False, True)]
    found = replace(machine, rates=fit(measured, machine, known.inside, known.between, "here"))
    for tokens in (64, 256, 4096):
        for schedule in (Schedule(keys=4), Schedule(heads=4), Schedule(queries=2, keys=2)):
            for backward in (False, True):
                want, got = (estimate(shape_of(tokens), schedule, x, backward=backward).seconds
                             for x in (machine, found))
                assert abs(got / want - 1) < 0.05


def least_squares_cases():
    """Tables, what is wanted and the solutions; columns are of all lengths, as rates are, and some almost alike."""
    rng = np.random.default_rng(3)
    for alike in 10 * [1.0] + 10 * [0.01]:
        table = np.abs(rng.standard_normal((60, 15)))
        table[:, 1::2] = table[:, 0:-1:2] + alike * table[:, 1::2]
        table = np.concatenate([table, 0.3 * np.eye(15)])
        wanted = rng.standard_normal(75) + 1
        lengths = 10.0 ** rng.integers(-9, 3, 15)
        yield table, wanted, _least_squares(table * lengths, wanted) * lengths


def test_least_squares_of_numbers_not_below_zero():
    """No number can be changed for the better: the slope is 0, or upwards at 0."""
    for table, wanted, x in least_squares_cases():
        slope = table.T @ (table @ x - wanted)
        assert (x >= 0).all()
        assert 0 < (x == 0).sum() < 15
        assert np.abs(slope[x > 0]).max() < 1e-5
        assert slope[x == 0].min() > -1e-5


def test_least_squares_beside_scipy():
    nnls = pytest.importorskip("scipy.optimize").nnls
    for table, wanted, x in least_squares_cases():
        assert np.abs(nnls(table, wanted)[0] - x).max() < 1e-5
