"""DEVELOPING.rst and docs/: the files and names that they mention exist, and the layers are those that are kept."""

import importlib
import re
from pathlib import Path

import pytest
from test_layers import LAYERS, NAMES

import ringmpi

ROOT = Path(__file__).parent.parent
PACKAGE = Path(ringmpi.__file__).parent
PAGES = [ROOT / "DEVELOPING.rst", *sorted((ROOT / "docs").glob("*.rst"))]
TEXT = {page.name: page.read_text() for page in PAGES}


def quoted(text):
    """What stands between double backticks, outside literal blocks."""
    return re.findall(r"``([^`]+)``", text)


def place(path):
    """Where a path of the checkout is: the package and its kernels may be installed elsewhere."""
    if path.startswith(("ringmpi/", "kernels/")):
        inside = PACKAGE / path.removeprefix("ringmpi/")
        return inside if inside.exists() else PACKAGE.parent / path
    return ROOT / path


@pytest.mark.parametrize("page", TEXT)
def test_paths_exist(page):
    paths = [text for text in quoted(TEXT[page]) if re.fullmatch(r"[\w.]+(/[\w.]+)*/?", text) and
             ("/" in text or text.endswith((".cfg", ".toml", ".cff"))) and not re.match(r".*\.h5(\.|$)", text)]
    missing = [path for path in paths if not place(path).exists()]
    made = re.findall(r"[Ss]ave\s+as\s+``(\w+\.py)``", TEXT[page])                    # by the reader
    modules = [text for text in quoted(TEXT[page]) if re.fullmatch(r"\w+\.py", text) and text not in made]
    missing += [name for name in modules if not list(PACKAGE.rglob(name))]
    assert not missing
    assert paths or page != "DEVELOPING.rst"


def test_names_exist():
    here = NAMES - {"__main__", "torch"}
    modules = [importlib.import_module(f"ringmpi.{name}") for name in sorted(here)]
    for text in quoted(TEXT["DEVELOPING.rst"]):
        if re.fullmatch(r"[A-Z]\w*[a-z]\w*(\.\w+)?", text):
            first, *rest = text.split(".")
            found = [getattr(module, first) for module in modules if hasattr(module, first)]
            assert found, text
            assert not rest or any(hasattr(x, rest[0]) for x in found), text


def test_the_layers_are_those_that_are_kept():
    block = re.search(r"checks both\)::\n\n((?:    .*\n)+)", TEXT["DEVELOPING.rst"]).group(1)
    assert [set(line.split()) for line in block.splitlines()] == LAYERS


def test_commands_to_test_with_exist():
    cases = re.findall(r'-k "(\w+)-(\d)"', TEXT["DEVELOPING.rst"])
    from test_launch import LAUNCHES
    assert cases
    assert all(int(ranks) in LAUNCHES[name][1] for name, ranks in cases)
