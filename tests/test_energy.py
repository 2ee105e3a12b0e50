"""Energy: the counters of a made-up machine, which wrap, can't be read, or are seen by several ranks."""

import sys
import types

import pytest

from ringmpi.energy import Meter, sum_up
from ringmpi.pictures.job import describe_energy

RANGE = 1000000


def zone(root, name, says, value):
    folder = root / name
    folder.mkdir()
    (folder / "name").write_text(says + "\n")
    (folder / "max_energy_range_uj").write_text(f"{RANGE}\n")
    (folder / "energy_uj").write_text(f"{value}\n")
    return folder / "energy_uj"


@pytest.fixture
def machine(tmp_path):
    """Two packages, one with memory, and what would count twice."""
    files = {"package-0": zone(tmp_path, "intel-rapl:0", "package-0", 900000),
             "package-1": zone(tmp_path, "intel-rapl:1", "package-1", 0),
             "dram of package-1": zone(tmp_path, "intel-rapl:1:1", "dram", 5)}
    for name, says in (("intel-rapl:0:0", "core"), ("intel-rapl:2", "psys"), ("intel-rapl-mmio:0", "package-0")):
        zone(tmp_path, name, says, 10)
    return tmp_path, files


def test_counters_add_up_and_wrap(machine):
    root, files = machine
    with Meter(powercap=root) as meter:
        assert {counter.name for counter in meter.counters} == set(files)
        files["package-0"].write_text("100000\n")         # began at 0 again
        files["package-1"].write_text("300000\n")
        meter._look()
        files["package-0"].write_text("150000\n")
        spent = meter.read()
    assert spent["counters"] == pytest.approx({"package-0": 0.25, "package-1": 0.3, "dram of package-1": 0.0})
    assert spent["not_read"] == []


def test_what_cannot_be_read_is_said_and_makes_no_sum(machine):
    root, files = machine
    files["package-1"].write_text("no number\n")
    with Meter(powercap=root) as meter:
        assert {counter.name for counter in meter.counters} == {"package-0", "dram of package-1"}
        files["package-0"].unlink()
        spent = meter.read()
    assert set(spent["counters"]) == {"dram of package-1"}
    assert [text.partition(":")[0] for text in spent["not_read"]] == ["package-1", "package-0"]
    energy = sum_up([spent], 10)
    assert energy["joules"] is None
    assert energy["joules_per_token"] is None
    assert "package-1" in describe_energy(energy)
    with Meter(powercap=root / "none") as meter:
        assert meter.read()["not_read"] == [f"processors: there is no counter in {root / 'none'}"]


def test_a_node_counts_once():
    """Its ranks have read the same counters; GPUs are different ones."""
    ranks = [{"node": ["a", "1"], "counters": {"package-0": 5.0, "GPU-x": 2.0}, "not_read": []},
             {"node": ["a", "1"], "counters": {"package-0": 5.5, "GPU-y": 3.0}, "not_read": []},
             {"node": ["a", "2"], "counters": {"package-0": 7.0}, "not_read": []}]       # another of the same name
    energy = sum_up(ranks, 7)
    assert energy["joules"] == 5.5 + 2 + 3 + 7
    assert energy["joules_per_token"] == 2.5
    assert [node["host"] for node in energy["nodes"]] == ["a", "a"]
    assert describe_energy(energy) == "17.5 J, 2.5 J a token"
    assert sum_up(ranks, 0)["joules_per_token"] is None


def test_a_gpu(machine, monkeypatch):
    """By its UUID, in millijoules; without NVML it says so."""
    root, _ = machine
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert Meter("GPU-1", root).not_read == ["GPU-1: nvidia-ml-py is not installed"]
    values = iter([7000, 7000, 9500])
    monkeypatch.setitem(sys.modules, "pynvml", types.SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID={"GPU-1": "handle"}.__getitem__,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(values)))
    with Meter("GPU-1", root) as meter:
        assert meter.read()["counters"]["GPU-1"] == 2.5
    assert Meter("GPU-2", root).not_read[0].startswith("GPU-2: NVML: ")
