"""The notebook, run as it is: it says what it shows."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import launch
import pytest

nbformat = pytest.importorskip("nbformat")
for module in ("nbclient", "ipykernel", "ipyparallel"):
    pytest.importorskip(module)
NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebooks" / "first_steps.ipynb"
RUN = ("import nbclient, nbformat, sys\n"
       "notebook = nbformat.read(sys.argv[1], as_version=4)\n"
       "nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3').execute()\n"
       "nbformat.write(notebook, sys.argv[2])\n")


def shown(notebook):
    """What each cell of code shows, engines in order, without bars of progress."""
    return [sorted(line for output in cell.outputs if output.output_type != "stream"
                   for line in output.data["text/plain"].splitlines())
            for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.skipif(launch.is_openmpi(), reason="its mpiexec starts no engines for root, nor more than cores")
def test_the_notebook_says_what_it_shows(tmp_path):
    mark = uuid.uuid4().hex
    path = os.pathsep.join([str(Path(launch.mpiexec()).parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    with (tmp_path / "said.txt").open("w+") as said:
        process = subprocess.Popen([sys.executable, "-c", RUN, NOTEBOOK, tmp_path / "run.ipynb"], cwd=tmp_path,
                                   stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
                                   env={**os.environ, "PATH": path, "IPYTHONDIR": str(tmp_path), launch.MARK: mark})
        try:
            code = process.wait(400)
        finally:
            launch.end_tree(process, mark)
    assert code == 0, (tmp_path / "said.txt").read_text()
    expected, found = (shown(nbformat.read(path, as_version=4)) for path in (NOTEBOOK, tmp_path / "run.ipynb"))
    assert found == expected
    assert sum(lines == ["True"] for lines in expected) == 3
