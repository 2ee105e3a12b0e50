"""Runs the tests marked `mpi` under mpiexec, file by file, on 1, 2, 3, 4 and 7 ranks; `redistribute` on 1 to 9."""

from importlib.util import find_spec
from pathlib import Path

import launch
import pytest

HERE = Path(__file__).parent
RANKS = {path.name: (1, 2, 3, 4, 7) for path in sorted(HERE.glob("test_mpi_*.py"))} | {
    "test_mpi_leaks.py": (2,), "test_mpi_torch.py": (1, 2, 4), "test_mpi_cuda.py": (1, 2, 3, 5),
    "test_mpi_redistribute.py": tuple(range(1, 10))}


@pytest.mark.parametrize(("file", "ranks"), [(file, ranks) for file, many in RANKS.items() for ranks in many])
def test_under_mpiexec(file, ranks, tmp_path):
    if file == "test_mpi_torch.py" and find_spec("torch") is None:
        pytest.skip("torch is not installed")
    result = launch.launch(ranks, ["-m", "pytest", "--with-mpi", "-q", "-p", "no:cacheprovider", "-x", HERE / file],
                           folder=tmp_path, timeout=400)
    assert result.code == 0, result.text
    assert len(result.ranks) == ranks, result.text
    for text in result.ranks:
        assert " passed" in text, result.text
