"""The layers of the architecture, read off the import statements; and what importing the package must not load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ringmpi

ROOT = Path(ringmpi.__file__).parent
LAYERS = [
    {"errors", "keywords", "notices"},
    {"environment", "files", "layout", "mask", "phases", "score", "softmax", "trace", "watchdog"},
    {"binaries", "backends.sources", "backends.products", "process", "stored"},
    {"device"},
    {"arrays", "backends.base", "backends.hopper"},
    {"backends.cpu", "backends.cpu.vector", "backends.cpu.cache"},
    {"backends.cpu.product", "backends.cpu.team", "backends.cpu.peak"},
    {"backends.cpu.pack", "backends.cpu.softmax_rows", "backends.cpu.score_rows"},
    {"backends.cpu.tile", "backends.cpu.gradient_rows", "backends.cpu.block"},
    {"backends.cpu.gradient"},
    {"backends.cpu.fold", "backends.cpu.workspace"},
    {"backends.cpu.backward"},
    {"backends.numpy_", "backends.numba_", "backends.instances", "mpi", "hdf5"},
    {"backends.proof"},
    {"backends.cuda"},
    {"backends"},
    {"checks", "clocks", "link", "manifest", "threads", "transport", "world"},
    {"homeward", "exchange", "shards"},
    {"ring"},
    {"engine", "plan"},
    {"attention"},
    {"functional", "job", "text", "torch"},
    {"audit", "memory"},
    {"commands.display", "commands.options", "commands.bench_kernel", "commands.bench_ring",
     "commands.bench_network"},
    {"commands.bench_gpu"},
    {"commands", "commands.attend", "commands.make", "commands.check", "commands.merge", "commands.info",
     "commands.demo", "commands.bench"},
    {"cli"},
    {"__main__"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
SAME_LEVEL = {("mask", "layout"), ("score", "layout"), ("softmax", "errors")}
WALLS = [("backends", "mpi"), ("backends", "mpi4py"), ("ring", "backends"), ("link", "backends"),
         ("exchange", "backends"), ("device", "mpi"), ("device", "mpi4py"),
         ("layout", "mpi"), ("mask", "mpi"), ("softmax", "mpi"), ("notices", "mpi4py")]


def modules():
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            yield name, ast.parse(path.read_text()), path


def imports(name, tree, path):
    """Absolute names of what a module imports: `x.y` for our own, the bare top for others."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[:len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                full = ".".join([*base, alias.name])
                yield "." + (full if full in LEVEL else ".".join(base))
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize(("name", "tree", "path"), list(modules()), ids=[f"{m[0]}.py" for m in modules()])
def test_a_module_imports_only_from_above(name, tree, path):
    assert name in LEVEL, f"{name} has no layer: add it to LAYERS"
    for imported in imports(name, tree, path):
        other = imported[1:]
        if imported.startswith(".") and other and other != name:
            assert LEVEL[other] < LEVEL[name] or (name, other) in SAME_LEVEL, f"{name} imports {other} from below"
        for wall, beyond in WALLS:
            if name == wall or name.startswith(wall + "."):
                assert other.split(".")[0] != beyond or not imported.startswith("."), f"{name} imports {beyond}"
                assert imported != beyond, f"{name} imports {beyond}"


def test_only_world_touches_comm_world():
    for name, tree, _ in modules():
        used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "COMM_WORLD"]
        assert name == "world" or not used


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
