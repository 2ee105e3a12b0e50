"""A cut of attacks.py: signals in each phase, and damaged files. The rest of it is in test_faults.py."""

import attack_mutations
import attack_seals
import attack_signals
from attack_cases import OTHER, REFUSED, outcomes
from fault_matrix import ROWS

from ringmpi import ShardError


def test_signals_in_each_phase(tmp_path):
    """Each ends in bounded time, with an exit code of the matrix, a word, no process, and no half of an output."""
    ended = outcomes(attack_signals.signals(tmp_path, attack_signals.cut()), 38)
    assert {"SIGINT: exit 130", "SIGTERM: exit 143", "SIGSTOP: exit 5", "SIGSTOP, SIGCONT: exit 0"} <= ended


def test_damaged_inputs(tmp_path):
    assert f"summed: {REFUSED}" in outcomes(attack_mutations.inputs(tmp_path, range(120)), 120)


def test_damaged_outputs(tmp_path):
    seeds = range(1000, 1080)         # none for which HDF5 takes for ever
    assert {f"OUT.h5: {REFUSED}", f"shard: {REFUSED}"} <= outcomes(attack_mutations.outputs(tmp_path, seeds), 80)


def test_damaged_caches(tmp_path):
    assert REFUSED in outcomes(attack_mutations.caches(tmp_path, range(200)), 200)


def test_damaged_results_in_one_file(tmp_path):
    found = outcomes(attack_mutations.singles(tmp_path, range(200)), 200)
    assert {f"together: {REFUSED}", f"merged: {REFUSED}"} <= found


def test_texts_that_say_other_things_under_a_right_digest(tmp_path):
    """Of an output, of a result in one file and of a cache."""
    ended = outcomes(attack_seals.seals(tmp_path, range(210)), 210)
    assert {f"{what}: {REFUSED}" for what in ("manifest", "rows", "cache")} <= ended


def test_damaged_rates(tmp_path):
    assert {f"rates: {REFUSED}", f"rates: {OTHER}"} <= outcomes(attack_seals.rates(tmp_path, range(300)), 300)


def test_damaged_checkpoints(tmp_path):
    ended = outcomes(attack_mutations.checkpoints(tmp_path, range(210)), 210)
    assert {f"{what}: {REFUSED}" for what in ("states", "manifest", "sealed")} <= ended
    assert ROWS["seeds"].codes == {ShardError.exit_code}


def test_damaged_checkpoints_of_streams(tmp_path):
    ended = outcomes(attack_mutations.streams(tmp_path, range(240)), 240)
    assert {f"{what}: {REFUSED}" for what in ("states", "manifest", "sealed", "shard")} <= ended
