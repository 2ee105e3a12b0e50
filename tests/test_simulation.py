"""Simulated passes: closed forms, bytes, two engines that agree, stragglers, and more ranks than can be told apart."""

from dataclasses import replace

import numpy as np
import pytest

from ringmpi.errors import OptionError
from ringmpi.mask import Mask
from ringmpi.schedules.base import Route
from ringmpi.schedules.cost import estimate, kernel_seconds
from ringmpi.schedules.machine import Machine
from ringmpi.schedules.movers import carrier_class
from ringmpi.schedules.rates import CPU, GPU, LinkRate
from ringmpi.schedules.relays import Tree
from ringmpi.schedules.spec import CARRIERS, Schedule, check_schedule
from ringmpi.schedules.traffic import Shape
from ringmpi.simulation import carriers
from ringmpi.simulation.case import prepare
from ringmpi.simulation.events import simulate_events
from ringmpi.simulation.rounds import simulate
from ringmpi.simulation.study import Size, find_straggler, run, scaling, stops_scaling
from ringmpi.simulation.trouble import Trouble

SLOW = replace(CPU, between=LinkRate(3e-6, 1e8))
FREE = replace(SLOW, call=0.0, step=0.0, message=0.0)
MASKS = {"full": (Mask(), "contiguous"), "causal": (Mask(causal=True), "contiguous"),
         "striped": (Mask(causal=True), "striped"), "window": (Mask(window=(30, 5)), "contiguous")}


def shape_of(tokens, heads=8, kv_heads=8, **more):
    return Shape(tokens, tokens, heads, kv_heads, 64, 64, **more)


def nodes_of_one(ranks, rates=FREE):
    return Machine(ranks, 1, 1, 1, rates=rates)


@pytest.mark.parametrize("ranks", [2, 3, 8, 50])
@pytest.mark.parametrize("tokens", [400, 8000])
def test_a_ring_takes_the_longer_of_computing_and_sending_in_each_step(ranks, tokens):
    """And computes with the last block, when nothing is left to send."""
    shape, machine = shape_of(tokens * ranks), nodes_of_one(ranks)
    compute = kernel_seconds(shape, machine, tokens, tokens, 1.0)
    send = machine.rates.between.seconds(tokens * 8 * 128 * 4)
    outcome = simulate(prepare(shape, Schedule(keys=ranks), machine))
    assert outcome.seconds == pytest.approx((ranks - 1) * max(compute, send) + compute, rel=1e-9)
    assert (send > compute) == (tokens == 400)
    exposed = max(0.0, send - compute)
    assert outcome.hidden == pytest.approx(1 - exposed / send, rel=1e-9)


@pytest.mark.parametrize(("here", "links", "gain"), [(1, 1, 1), (2, 1, 1), (2, 2, 2)])
def test_two_ways_round_gain_where_there_are_links_for_both(here, links, gain):
    """A ring sends one way and receives the other: a node's only link is busy both ways. A slow cable is not."""
    machine = Machine(16, here, 1, here, False, links, FREE)

    def seconds(carrier, trouble):
        schedule = Schedule(keys=16, carrier=carrier)
        return simulate(prepare(shape_of(6400), schedule, machine, trouble=trouble)).seconds
    assert seconds("ring", Trouble()) / seconds("two-way", Trouble()) == pytest.approx(gain, rel=0.1)
    cable = Trouble(slow_links={(1, 2): 50.0})
    slower = seconds("ring", cable) / seconds("ring", Trouble())
    assert slower == pytest.approx(50, rel=0.1)
    assert seconds("ring", cable) / seconds("two-way", cable) == pytest.approx(2, rel=0.1)


def test_a_gather_hides_all_but_what_comes_late():
    ranks, tokens = 6, 400
    shape, machine = shape_of(tokens * ranks), nodes_of_one(ranks)
    compute = kernel_seconds(shape, machine, tokens, tokens, 1.0)
    send = machine.rates.between.seconds(tokens * 8 * 128 * 4)
    outcome = simulate(prepare(shape, Schedule(keys=ranks, carrier="gather"), machine))
    assert outcome.seconds == pytest.approx(send * (ranks - 1) + compute)


@pytest.mark.parametrize("rates", [CPU, GPU, SLOW])
@pytest.mark.parametrize("spec", ["1x1x16:ring", "1x4x4:ring", "4x1x4:ring", "1x16x1:ring", "1x1x16:window"])
def test_without_trouble_it_takes_what_the_estimate_says(rates, spec):
    if rates is GPU and spec.endswith("window"):
        pytest.skip("GPUs do not share memory so")
    machine = Machine(16, 16, 1, 16, rates is GPU, 1, rates)
    shape = shape_of(16384)
    outcome = simulate(prepare(shape, check_schedule(spec), machine))
    cost = estimate(shape, check_schedule(spec), machine)
    assert outcome.seconds == pytest.approx(cost.seconds, rel=0.1 if rates is GPU else 0.02)    # hides queries
    assert outcome.sent.mean() == pytest.approx(cost.bytes_sent, rel=1e-6)


@pytest.mark.parametrize("carrier", CARRIERS)
@pytest.mark.parametrize("name", MASKS)
def test_every_byte_of_the_steps_is_sent_once(carrier, name):
    mask, layout = MASKS[name]
    for ranks in (1, 2, 5, 8):
        case = prepare(shape_of(13 * ranks + 3), Schedule(keys=ranks, carrier=carrier), Machine(ranks, ranks, 1, ranks),
                       mask, layout)
        route = Route(case.needed(0), case.tokens[0].astype(int).tolist())
        steps = carrier_class(carrier).steps(route, [[int(n)] for n in case.block_bytes[0]])
        sent = np.zeros(ranks)
        for message in (message for step in steps for message in step):
            sent[message.source] += message.nbytes
        assert np.array_equal(simulate(case).sent[0], sent)


def troubles(ranks):
    yield Trouble()
    yield Trouble(jitter=0.3, seed=4)
    yield Trouble(slow_ranks={ranks - 1: 2.5})
    if ranks > 1:
        yield Trouble(slow_links={(0, ranks - 1): 12.0})


@pytest.mark.parametrize(("ranks", "here"), [(1, 1), (2, 1), (3, 3), (6, 3), (8, 4), (12, 4), (16, 4)])
def test_all_ranks_at_once_take_what_they_take_event_by_event(ranks, here):
    """To the last digits, for every carrier, grid, mask and trouble: ranks that are alike are simulated once."""
    random = np.random.default_rng(ranks)
    specs = [f"1x1x{ranks}:{carrier}" for carrier in CARRIERS if carrier != "window" or here == ranks]
    grids = [f"1x{ranks}x1", f"1x2x{ranks // 2}", f"2x2x{ranks // 4}:two-way"]
    specs += grids[:1 + (ranks % 2 == 0) + (ranks % 4 == 0)]
    for spec in specs:
        for mask, layout in MASKS.values():
            for trouble in troubles(ranks):
                shape = shape_of(int(random.integers(1, 40)) * ranks + int(random.integers(0, 2)) * 3, 8, 4)
                case = prepare(shape, check_schedule(spec), Machine(ranks, here, 1, here, rates=SLOW), mask, layout,
                               trouble)
                fast, slow = simulate(case), simulate_events(case)
                for what in ("ended", "compute", "copied", "wait", "carried", "sent"):
                    assert np.allclose(getattr(fast, what), getattr(slow, what), rtol=1e-9, atol=1e-12), (spec, what)


def test_the_hops_of_a_broadcast_are_those_of_its_tree():
    for count in range(1, 40):
        tree = Tree(list(np.random.default_rng(count).permutation(100)[:count]))
        hops = [(int(parent), int(child)) for parents, children in carriers.tree_levels(np.array(tree.members))
                for parent, child in zip(parents, children, strict=True)]
        assert sorted(hops) == sorted((tree.parent(member), member) for member in tree.members[1:])


def test_a_rank_that_waits_leaves_its_core_to_the_others():
    """Four ranks on two cores: in twice its own time each has done its work, and a quarter of it the slow one."""
    shape, machine = shape_of(4096), Machine(4, 4, 1, 2, rates=replace(FREE, inside=LinkRate(0.0, 1e15)))
    work = kernel_seconds(shape, replace(machine, cores=4), 1024, 1024, 1.0)
    case = prepare(shape, Schedule(keys=4), machine, trouble=Trouble(slow_ranks={1: 4.0}))
    assert run(case).seconds == pytest.approx(4 * (2 + 3) * work, rel=0.05)       # some are a step ahead
    assert simulate(case).seconds == pytest.approx(4 * 2 * 4 * work, rel=1e-6)        # which does not know of that
    assert run(prepare(shape, Schedule(keys=4), machine)).seconds == pytest.approx(4 * 2 * work, rel=1e-6)


@pytest.mark.parametrize("spec", ["1x1x12:ring", "1x1x12:two-way", "1x3x4:ring", "1x12x1:ring"])
def test_a_slow_rank_is_found_and_costs_what_it_is_slower_by(spec):
    shape, machine = shape_of(12 * 512), Machine(12, 4, 1, 4)
    schedule = check_schedule(spec)
    usual = run(prepare(shape, schedule, machine))
    for rank in (0, 7):
        outcome = run(prepare(shape, schedule, machine, trouble=Trouble(slow_ranks={rank: 3.0})))
        found = find_straggler(outcome)
        assert found.what == f"rank {rank}"
        assert found.seconds == pytest.approx(outcome.seconds - usual.seconds, rel=0.25)
    assert find_straggler(usual) is None


def test_a_slow_link_is_found_if_it_is_on_the_way():
    shape, machine = shape_of(12 * 64), nodes_of_one(12, CPU)
    far = Trouble(slow_links={(3, 4): 1000.0})
    assert find_straggler(run(prepare(shape, Schedule(keys=12), machine, trouble=far))).what == \
        "the link between ranks 3 and 4"
    beside = Trouble(slow_links={(3, 8): 1000.0})
    assert find_straggler(run(prepare(shape, Schedule(keys=12), machine, trouble=beside))) is None


def test_the_rank_to_which_a_mask_gives_most_work_is_found():
    shape, machine = shape_of(8 * 512, seen=0.5), nodes_of_one(8, CPU)
    outcome = run(prepare(shape, Schedule(keys=8), machine, Mask(causal=True)))
    assert find_straggler(outcome).what == "rank 7"
    assert find_straggler(run(prepare(shape, Schedule(keys=8), machine, Mask(causal=True), "striped"))) is None


def test_jitter_is_the_same_for_a_seed_and_costs_more_the_more_ranks_wait_for_each_other():
    shape = shape_of(4096)
    for ranks in (4, 16):
        machine = nodes_of_one(ranks, CPU)
        one, again, other, none = (simulate(prepare(shape, Schedule(keys=ranks), machine, trouble=trouble)).seconds
                                   for trouble in (Trouble(0.2, 1), Trouble(0.2, 1), Trouble(0.2, 2), Trouble()))
        assert one == again != other
        assert min(one, other) > none
    factors = np.concatenate([Trouble(0.2).factors(step, 1000) for step in range(20)])
    assert factors.mean() == pytest.approx(1, abs=0.01)
    assert factors.std() == pytest.approx(0.2, abs=0.01)


def test_a_hundred_thousand_ranks_are_not_looked_at_one_by_one(monkeypatch):
    """Ranks of a node stand for all, and steps that repeat themselves are taken once."""
    steps = []
    original = carriers.RingSteps._step
    monkeypatch.setattr(carriers.RingSteps, "_step", lambda self, number, clock: steps.append(clock.now.size) or
                        original(self, number, clock))
    shape, machine = shape_of(2**20, 32, 8), Machine(100_000, 8, 1, 8, True, 8, GPU)
    outcome = simulate(prepare(shape, Schedule(keys=100_000), machine))
    assert outcome.steps == 100_000
    assert max(steps) <= 8
    assert len(steps) < 1000
    assert outcome.seconds == pytest.approx(estimate(shape, Schedule(keys=100_000), machine).seconds, rel=1e-3)

    # With a rank that is slow all are, for some steps; and the others like those.
    steps.clear()
    slow = Trouble(slow_ranks={3: 2.0})
    outcome = simulate(prepare(shape, Schedule(keys=100_000), machine, trouble=slow), budget=2**23)
    assert outcome.steps == len(steps) == 2**23 // 100_000
    step = outcome.seconds / 100_000
    assert step == pytest.approx(GPU.step + 2 * kernel_seconds(shape, machine, shape.n_q / 1e5, shape.n_k / 1e5, 1.0),
                                 rel=0.01)


def test_what_goes_on_as_before_is_what_would_have_come():
    """The first steps of many, against all of them."""
    shape, machine, schedule = shape_of(2048 * 4), nodes_of_one(512, CPU), Schedule(keys=512)
    for trouble in (Trouble(slow_ranks={3: 2.0}), Trouble(jitter=0.2)):
        case = prepare(shape, schedule, machine, trouble=trouble)
        some, everything = simulate(case, budget=2**16), simulate(case)
        assert (some.steps, everything.steps) == (128, 512)
        assert some.seconds == pytest.approx(everything.seconds, rel=0.03)
        assert some.sent.sum() == pytest.approx(everything.sent.sum(), rel=0.01)


def test_where_a_ring_stops_scaling():
    shape = shape_of(2**16)

    def make(ranks):
        return prepare(shape, Schedule(keys=ranks), nodes_of_one(ranks))

    sizes = scaling(make, 700, 2**20)
    assert [size.ranks for size in sizes] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 700]
    assert sizes[0].efficiency == 1
    stop = stops_scaling(sizes)
    before = [size for size in sizes if size.ranks < stop]
    assert all(size.efficiency < 0.5 for size in sizes[len(before):])
    assert before[-1].efficiency >= 0.5
    for size in (before[-1], sizes[len(before)]):
        compute = kernel_seconds(shape, nodes_of_one(1), 2**16, 2**16, 1.0)
        assert size.efficiency == pytest.approx(compute / size.ranks / make_seconds(make, size.ranks))
    assert stops_scaling([Size(1, 1.0, 1.0), Size(2, 0.6, 0.8)]) is None


def make_seconds(make, ranks):
    return simulate_events(make(ranks)).seconds if ranks <= 16 else simulate(make(ranks)).seconds


def test_what_does_not_fit_is_refused():
    with pytest.raises(OptionError, match="expected heads x queries x keys to be the number of ranks, 6, got 4"):
        prepare(shape_of(64), Schedule(keys=4), Machine(6, 6))
    with pytest.raises(OptionError, match="window"):
        prepare(shape_of(64), Schedule(keys=6, carrier="window"), Machine(6, 3))
    with pytest.raises(OptionError, match="divide the 8 heads"):
        prepare(shape_of(64), Schedule(heads=3), Machine(3, 3))


@pytest.mark.parametrize(("bias", "bytes_more"), [(1, [4, 4]), (8, [16, 16])])
def test_a_bias_travels_with_its_keys(bias, bytes_more):
    """One number in float32 for each key, or one for each head that a rank has."""
    plain, biased = (prepare(Shape(64, 64, 8, 4, 64, 64, 4, 4, bias=numbers), Schedule(heads=2, keys=2),
                             nodes_of_one(4)).block_bytes for numbers in (0, bias))
    assert ((biased - plain) / 32 == np.array(bytes_more)[:, None]).all()
