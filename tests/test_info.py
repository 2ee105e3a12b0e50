"""`ringmpi info`: what each rank sees, what is odd about it, and the links of the ring."""

import json

import launch
import pytest

from ringmpi.job.survey import Link, Place, describe_links, find_odd, name_runs


def places(*cores, **others):
    return [Place(rank, "node1", list(some), 64, mpi="MPICH", thread_level="multiple", **others)
            for rank, some in enumerate(cores)]


def test_nothing_odd():
    assert find_odd(places(range(8), range(8, 16))) == []
    assert find_odd([]) == []


@pytest.mark.parametrize(("some", "said"), [
    (places([0, 1], [0, 1], [0, 1]), "ranks 0-2 have 2 cores for 3 ranks"),
    (places([3], range(4, 12)), "rank 0 may run on one core each of 64"),
    (places(range(8), range(8), gpu="GPU-1"), "ranks 0-1 share the GPU GPU-1")])
def test_what_is_odd_on_a_host(some, said):
    (text,) = find_odd(some)
    assert said in text
    assert "; " in text                    # what to do about it


def test_what_differs():
    some = places(range(8), range(8, 16), range(16, 24))
    some[1].mpi, some[2].ringmpi = "Open MPI", "0.2"
    found = find_odd(some)
    assert "mpi differs: MPICH on ranks 0, 2; Open MPI on rank 1" in found
    assert len(found) == 2
    for one in some:
        one.mpi = one.ringmpi = ""
        one.thread_level = "funneled"
    (text,) = find_odd(some)
    assert "MPI_THREAD_SERIALIZED" in text


def test_the_slow_link_is_named():
    some = places(*(range(8 * i, 8 * i + 8) for i in range(4)))
    links = [Link(i, (i + 1) % 4, 1e-6, 10e9) for i in range(4)]
    assert find_odd(some, links) == []
    links[2].bandwidth = 1e9
    (text,) = find_odd(some, links)
    assert "from rank 2 on node1 to rank 3 on node1 is slow: 1.0 us, 1.00 GB/s" in text
    assert "from rank 2 on node1 to rank 3" in describe_links(some, links)[1]


def test_links_between_hosts_are_not_compared_with_those_within():
    some = [Place(rank, f"node{rank // 4}", [rank], 4) for rank in range(12)]
    links = [Link(i, (i + 1) % 12, *((3e-7, 1e10) if i % 4 != 3 else (1.6e-6, 2e9))) for i in range(12)]
    assert find_odd(some, links) == []
    links[7].bandwidth = 1e8
    (text,) = find_odd(some, links)
    assert "from rank 7 on node1 to rank 8 on node2 is slow: 1.6 us, 0.10 GB/s, where the median between hosts" in text


def test_runs():
    assert name_runs([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert name_runs([]) == ""


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_links_of_every_pair_are_measured(ranks, tmp_path):
    result = launch.launch(ranks, ["-m", "ringmpi", "info", "--json"], folder=tmp_path, timeout=120)
    assert result.code == 0, result.text
    said = json.loads(result.ranks[0])
    assert [place["rank"] for place in said["ranks"]] == list(range(ranks))
    pairs = [(link["source"], link["target"]) for link in said["links"]]
    assert pairs == ([(0, 1)] if ranks == 2 else [(i, (i + 1) % ranks) for i in range(ranks)])
    assert all(0 < link["latency"] < 1 and link["bandwidth"] > 1e6 for link in said["links"])
    assert not any(result.ranks[1:])


def test_text_on_ranks(tmp_path):
    result = launch.launch(2, ["-m", "ringmpi", "info"], folder=tmp_path, timeout=120)
    assert result.code == 0, result.text
    assert "where           ranks 0-1 on " in result.ranks[0]
    assert "links           slowest " in result.ranks[0]
    result = launch.launch(2, ["-m", "ringmpi", "info", "--no-links"], folder=tmp_path, timeout=120)
    assert "links  " not in result.ranks[0]
