"""Runs the tests marked `mpi` under mpiexec: some files in one launch, for what starting ranks takes."""

from importlib.util import find_spec
from pathlib import Path

import launch
import pytest

HERE = Path(__file__).parent
# Files that one launch runs, and on how many ranks, the most first, but for those that come early and compile kernels;
# with `-m exhaustive` on the second numbers.
LAUNCHES = {
    "attention": (("attention", "gradients", "masks", "redistribute", "latent"), (4, 2, 1), (3, 7)),
    "links": (("link", "gradient_ring", "messages", "schedules", "strided", "window"), (2, 4), (1, 3, 7)),
    "auto": (("auto",), (4,), (1, 2, 3, 6, 16)),
    "grids": (("grids", "key_bias", "relative"), (4,), (1, 2, 3, 6, 7, 8)),
    "analysis": (("analysis",), (4,), (1, 2, 3, 7)),
    "canonical": (("canonical",), (3,), (1, 2, 4, 5, 7, 8, 16)),
    "canonical_cases": (("canonical_cases",), (), (3,)),
    "checkpoint": (("checkpoint",), (3,), (1, 2, 4, 7)),
    "kv": (("kv",), (3,), (1, 2, 4, 7)),
    "waits": (("errors", "waits"), (2, 3), (1, 4, 7)),
    "cuda": (("cuda",), (2,), (1, 3, 5)),
    "cuda_canonical": (("cuda_canonical",), (3,), (1, 2, 5)),
    "torch": (("torch", "sdpa"), (2,), (1, 4)),
    "transformers": (("transformers",), (4,), (1, 2, 3)),
    "jax": (("jax",), (2,), (1, 4)),
    "second": (("second",), (3,), (1, 2, 4, 7)),
    "leaks": (("leaks",), (), (2,)),
    "redistribute": (("redistribute",), (), (5, 6, 8, 9)),
}


def cases():
    """Every launch: the name of its files, and its ranks."""
    found = []
    for name, (_, ranks, more) in LAUNCHES.items():
        for number in (*more, *ranks):
            marks = [pytest.mark.exhaustive] if number in more else []
            found.append(pytest.param(name, number, marks=marks, id=f"{name}-{number}"))
    return found


@pytest.mark.parametrize(("name", "ranks"), cases())
def test_under_mpiexec(name, ranks, tmp_path):
    needed = {"torch": "torch", "second": "torch", "transformers": "transformers", "jax": "jax"}.get(name)
    if needed and find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    files = [HERE / f"test_mpi_{part}.py" for part in LAUNCHES[name][0]]
    result = launch.launch(ranks, ["-m", "pytest", "--with-mpi", "-q", "-p", "no:cacheprovider", "-x", *files],
                           folder=tmp_path, timeout=600)
    assert result.code == 0, result.text
    assert len(result.ranks) == ranks, result.text
    for text in result.ranks:
        assert " passed" in text, result.text


def test_every_file_is_launched():
    launched = {f"test_mpi_{part}.py" for files, *_ in LAUNCHES.values() for part in files}
    assert launched == {path.name for path in HERE.glob("test_mpi_*.py")}
