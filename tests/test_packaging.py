"""packaging/, CITATION.cff and the types: what others install by is what pyproject.toml says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGING = ROOT / "packaging"
PROJECT = (ROOT / "pyproject.toml").read_text()
VERSION = re.search(r'^version = "(.+)"', PROJECT, re.M)[1]
PYTHON = re.search(r'^requires-python = ">=(.+)"', PROJECT, re.M)[1]
BUILD = dict(re.findall(r'"(setuptools)>=([\d.]+)"', PROJECT))
NEEDED = PROJECT.partition("\ndependencies = [")[2].partition("\n]")[0]
DEPENDENCIES = dict(re.findall(r'"([\w.-]+)>=([\d.]+)"', NEEDED))
SPACK = (PACKAGING / "spack/spack_repo/ringmpi/packages/py_ringmpi/package.py").read_text()
CONDA = (PACKAGING / "conda/recipe.yaml").read_text()
IMAGE = (PACKAGING / "apptainer/ringmpi.def").read_text()
(EASYCONFIG,) = (PACKAGING / "easybuild").glob("*.eb")

# A program as a user would write it, for `mypy --strict`.
CLIENT = '''
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

import ringmpi
import ringmpi.analysis
import ringmpi.hdf5
import ringmpi.torch


def attend(q: npt.NDArray[np.float32], k: npt.NDArray[np.float32], comm: MPI.Intracomm) -> float:
    mask = ringmpi.Mask(causal=True, window=(9, 0))
    out, lse = ringmpi.ring_attention(q, k, k, comm=comm, mask=mask, return_lse=True)
    layout: ringmpi.Layout = ringmpi.Striped(64, comm.size)
    again = ringmpi.redistribute(out, comm=comm, source=layout, target=ringmpi.Contiguous.even(64, comm.size))
    with ringmpi.RingAttention(comm, mask=[ringmpi.Mask(), ringmpi.Grid((8, 8), 1)], layout=layout,
                               schedule=ringmpi.Schedule(heads=2)) as attention:
        out = attention(q, k, k)
        gradients = attention.backward(out)
        seconds: float = attention.trace.wait_seconds
    with ringmpi.KVCache(comm, kv_heads=2, dim=64, mask=mask) as cache:
        cache.append(k, k)
    mass = ringmpi.analysis.key_mass(q, k, lse, comm=comm)
    print(gradients.dq, mass, again)
    return seconds


def train(x: Any, comm: MPI.Intracomm) -> Any:
    with ringmpi.torch.sequence_parallel(comm, layout="striped") as sequence:
        x = ringmpi.torch.scaled_dot_product_attention(x, x, x, is_causal=True)
        return sequence.gather(ringmpi.torch.ring_attention(x, x, x, comm=comm))


try:
    attend(np.zeros((4, 2, 8), "f4"), np.zeros((4, 2, 8), "f4"), MPI.COMM_WORLD)
except ringmpi.RingError as error:
    raise SystemExit(str(error)) from error
'''


def at_least(version, least):
    return [int(x) for x in version.split(".")] >= [int(x) for x in least.split(".")]


def test_the_project_is_read():
    assert {"numpy", "mpi4py", "h5py", "numba"} <= set(DEPENDENCIES)
    assert len(DEPENDENCIES) == NEEDED.strip().count("\n") + 1


def test_all_name_this_version():
    assert f'version("{VERSION}"' in SPACK
    assert f"ringmpi-{VERSION}.tar.gz" in SPACK
    assert f'version: "{VERSION}"' in CONDA
    assert EASYCONFIG.name.startswith(f"ringmpi-{VERSION}-")
    assert f"image.version {VERSION}\n" in IMAGE
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"version = {{{VERSION}}}" in (ROOT / "docs/cite.rst").read_text()


def test_spack_depends_on_the_same():
    always = SPACK.partition('type=("build", "run")')[2]
    found = dict(re.findall(r'depends_on\("(?:py-)?([\w-]+)@([\d.]+):"\)', always))
    assert found == {"python": PYTHON, **{name.replace("_", "-"): least for name, least in DEPENDENCIES.items()}}
    assert f'depends_on("py-setuptools@{BUILD["setuptools"]}:", type="build")' in SPACK
    for name, least in re.findall(r'depends_on\("py-(\w+)@([\d.]+):", when=', SPACK):
        assert f'{name} = ["' in PROJECT.replace("plot = [", "matplotlib = [")
        assert f'"{name}>={least}"' in PROJECT


def test_conda_depends_on_the_same():
    run = CONDA.partition("  run:\n")[2].partition("\n\n")[0]
    assert dict(re.findall(r"- (\w+) >=([\d.]+)", run)) == DEPENDENCIES
    assert f"- setuptools >={BUILD['setuptools']}\n" in CONDA
    (command,) = re.findall(r"entry_points:\n +- (.+)", CONDA)
    assert command == re.search(r'\[project.scripts\]\n(.+)', PROJECT)[1].replace('"', "")


def test_easybuild_has_versions_that_will_do():
    known = {"PYPI_SOURCE": "", "SOURCE_TAR_GZ": ""}
    exec(EASYCONFIG.read_text(), known)
    assert (known["name"], known["version"]) == ("ringmpi", VERSION)
    found = dict(known["dependencies"])
    text = EASYCONFIG.read_text()
    for bundle in ("threadpoolctl", "numpy"):                          # parts of bundles, named in comments
        found[bundle] = re.search(rf"# {bundle} ([\d.]+)", text)[1]
    assert at_least(found["Python"], PYTHON)
    for name, least in DEPENDENCIES.items():
        assert at_least(found[name], least), name


def test_the_image_copies_what_it_installs():
    files = [line.split() for line in IMAGE.partition("%files\n")[2].partition("\n\n")[0].splitlines()]
    needed = {"pyproject.toml", "setup.cfg", "README.rst", "LICENSE", "ringmpi", "kernels"}
    assert {source for source, _ in files} == needed
    assert all(target == f"/opt/ringmpi/{source}" for source, target in files)
    for section in ("post", "environment", "runscript", "test"):
        script = IMAGE.partition(f"%{section}\n")[2].partition("\n%")[0]
        assert script.strip()
        subprocess.run(["sh", "-n"], input=script, text=True, check=True, timeout=20)


def test_the_types_please_a_strict_client(tmp_path):
    """As installed: py.typed, and annotations for everything public."""
    pytest.importorskip("mypy")
    (tmp_path / "right.py").write_text(CLIENT)
    (tmp_path / "wrong.py").write_text(CLIENT.replace("causal=True", "casual=True").replace("schedule=", "scheduled="))
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--cache-dir", "cache"]
    checked = subprocess.run([*command, "right.py", "wrong.py"], cwd=tmp_path, capture_output=True, text=True,
                             timeout=300)
    errors = [line for line in checked.stdout.splitlines() if ": error:" in line]
    assert all(line.startswith("wrong.py") for line in errors), checked.stdout
    assert any("casual" in line for line in errors), checked.stdout
    assert any("scheduled" in line for line in errors), checked.stdout
