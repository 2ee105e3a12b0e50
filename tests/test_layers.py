"""The layers of the architecture, read off the import statements; and what importing the package must not load."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import ringmpi

ROOT = Path(ringmpi.__file__).parent
# Modules and packages: each imports only from lines above it, and within a package there is no circle.
LAYERS = [
    {"errors", "gradients", "keywords", "phases", "trace", "watchdog"},
    {"dtypes", "environment", "layout", "softmax"},
    {"energy", "intervals", "relative"},
    {"documents", "mask_base"},
    {"files", "mask", "mask_batch", "mpi", "parts", "process", "score"},
    {"bounds", "compiler", "excerpts", "hdf5"},
    {"device"},
    {"arrays", "backends"},
    {"checks"},
    {"call", "schedules"},
    {"neighbourhood", "pictures", "tiles"},
    {"engine", "plan", "simulation"},
    {"left_out", "problem", "replicated"},
    {"forward"},
    {"passes"},
    {"canonical", "tangents"},
    {"checkpoint"},
    {"attention"},
    {"analysis"},
    {"functional", "jax", "job", "kv", "torch"},
    {"transformers"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
WALLS = [("backends", "mpi"), ("backends", "mpi4py"), ("schedules", "backends"), ("device", "mpi"),
         ("device", "mpi4py"), ("layout", "mpi"), ("mask", "mpi"), ("softmax", "mpi"), ("mpi.notices", "mpi4py")]


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            yield name, ast.parse(path.read_text()), path


NAMES = {name for name, _, _ in modules()}


def imports(name, tree, path):
    """Absolute names of what a module imports: `.x.y` for our own modules, the bare top for others."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[:len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                full = ".".join([*base, alias.name])
                yield "." + (full if full in NAMES else ".".join(base))
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def unit(name):
    return name.split(".")[0]


def is_beyond(imported, beyond):
    return imported == beyond or (unit(imported.lstrip(".")) == beyond and imported.startswith("."))


@pytest.mark.parametrize(("name", "tree", "path"), list(modules()), ids=[f"{m[0]}.py" for m in modules()])
def test_a_module_imports_only_from_above(name, tree, path):
    assert unit(name) in LEVEL, f"{unit(name)} has no layer: add it to LAYERS"
    for imported in imports(name, tree, path):
        other = unit(imported[1:])
        if imported.startswith(".") and other and other != unit(name):
            assert LEVEL[other] < LEVEL[unit(name)], f"{name} imports {other} from below"
        for wall, beyond in WALLS:
            if name == wall or name.startswith(wall + "."):
                assert not is_beyond(imported, beyond), f"{name} imports {beyond}"


def test_no_circle_within_a_package():
    above = {name: {other[1:] for other in imports(name, tree, path) if other.startswith(".")} - {name, unit(name)}
             for name, tree, path in modules()}
    graphlib.TopologicalSorter(above).prepare()


def test_only_world_touches_comm_world():
    for name, tree, _ in modules():
        used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "COMM_WORLD"]
        assert name == "mpi.world" or not used


def test_only_device_imports_cupy():
    for name, tree, path in modules():
        assert name == "device" or "cupy" not in imports(name, tree, path)


def test_environment_variables_are_read_in_one_place():
    for name, tree, _ in modules():
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert name == "environment" or not used & {"environ", "getenv"}


def test_no_assert_in_the_library():
    for _, tree, _ in modules():
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]


def test_importing_loads_nothing_heavy():
    code = ("import sys, ringmpi; heavy = {'mpi4py', 'cupy', 'numba', 'h5py', 'numpy', 'torch'} & set(sys.modules); "
            "sys.exit(f'loaded {heavy}' if heavy else 0)")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_public_name_is_there():
    assert {"Mask", "Custom", "ring_attention", "RingAttention", "redistribute", "RingError"} <= set(dir(ringmpi))
    for name in ringmpi.__all__:
        assert getattr(ringmpi, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ringmpi.nothing  # noqa: B018
