"""The job scripts: sound shell, and options that the command line knows."""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ringmpi
from ringmpi.cli import main
from ringmpi.commands.attend import add_arguments

JOBS = Path(__file__).parent.parent / "jobs"
SCRIPTS = sorted(path for path in JOBS.iterdir() if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell(script):
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -eu -o pipefail\n" in text
    subprocess.run(["bash", "-n", script], check=True, timeout=20)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True, timeout=60)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_options_exist(script, capsys):
    with pytest.raises(SystemExit):
        main(["attend", "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    calls = re.findall(r"ringmpi attend ((?:[^\\\n]|\\\n)*)", script.read_text().replace("# ", ""))
    assert calls
    for call in calls:
        assert set(re.findall(r"--[a-z][a-z-]+", call)) <= known


def test_sbatch_scripts_end_with_a_dead_rank():
    for name in ("cpu.sbatch", "gpu.sbatch", "array.sbatch"):
        text = (JOBS / name).read_text()
        assert "--kill-on-bad-exit=1" in text
        assert "SRUN_CPUS_PER_TASK" in text
        assert "SLURM_RESTART_COUNT" in text
    assert "#SBATCH --gpus-per-node" in (JOBS / "gpu.sbatch").read_text()


def submitted(tmp_path, name, *arguments, code=0):
    """The command that a script gives to srun, in the environment that Slurm makes."""
    srun = tmp_path / "srun"
    srun.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@"\nexit {code}\n')
    srun.chmod(0o755)
    slurm = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "3", "SLURM_ARRAY_JOB_ID": "7",
             "SLURM_ARRAY_TASK_ID": "5"}
    return subprocess.run(["bash", JOBS / name, *arguments], capture_output=True, text=True, timeout=20, check=False,
                          env={**os.environ, **slurm, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"})


@pytest.mark.parametrize("name", ["cpu.sbatch", "gpu.sbatch", "array.sbatch"])
def test_a_users_options_overrule_those_of_the_script(tmp_path, name):
    said = submitted(tmp_path, name, "in-%a.h5", "out-%a.h5", "--timeout", "9", "--json", "mine.json")
    assert said.returncode == 0, said.stderr
    words = said.stdout.splitlines()
    words = words[words.index("attend") + 1:]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args(words)
    assert options.timeout == 9
    assert str(options.json) == "mine.json"
    assert options.expect_ranks == 2
    if name == "array.sbatch":
        assert (str(options.input), str(options.output)) == ("in-5.h5", "out-5.h5")


@pytest.mark.parametrize("code", [0, 75, 143])
@pytest.mark.parametrize("name", ["cpu.sbatch", "gpu.sbatch", "array.sbatch"])
def test_a_job_that_was_stopped_on_request_is_queued_again(tmp_path, name, code):
    """And no other; its checkpoints are beside its output."""
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho scontrol "$@"\n')
    (tmp_path / "scontrol").chmod(0o755)
    said = submitted(tmp_path, name, "in-%a.h5", "out-%a.h5", code=code)
    assert said.returncode == code, said.stderr
    words = said.stdout.splitlines()
    output = "out-5.h5" if name == "array.sbatch" else "out-%a.h5"
    assert words[words.index("--checkpoint") + 1] == f"{output}.checkpoints"
    assert ("scontrol requeue 7" in words) == (code == 75)


@pytest.mark.parametrize("name", ["cpu.sbatch", "gpu.sbatch", "array.sbatch"])
@pytest.mark.parametrize("arguments", [[], ["in-%a.h5"], ["--causal", "in-%a.h5", "out-%a.h5"],
                                       ["in-%a.h5", "--causal", "out-%a.h5"]])
def test_files_come_before_options(tmp_path, name, arguments):
    """Else the checkpoints of all jobs would lie in one folder of a strange name."""
    said = submitted(tmp_path, name, *arguments)
    assert said.returncode == 2
    assert f"{name}: expected IN.h5 OUT.h5, and options after them, got: {' '.join(arguments)}" in said.stderr
    assert not said.stdout


def test_tasks_of_an_array_have_outputs_of_their_own(tmp_path):
    said = submitted(tmp_path, "array.sbatch", "in-%a.h5", "out.h5")
    assert said.returncode == 2
    assert "expected an output with %a in its name, got out.h5" in said.stderr


def test_local(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = subprocess.run([JOBS / "local.sh", "600"], capture_output=True, text=True, timeout=120, cwd=tmp_path,
                            check=False, env={**os.environ, "PATH": path})
    assert script.returncode == 0, script.stdout + script.stderr
    assert "600 tokens on 4 ranks" in script.stdout
    assert "passed: 64 rows" in script.stdout


def said_by(whom):
    """The errors that jobs/README.rst lists under a heading."""
    part = (JOBS / "README.rst").read_text().partition(f"\nBy {whom}:\n")[2].partition("\nBy ")[0]
    return re.findall(r"^``(.+)``$", part, re.MULTILINE)


def sentences():
    """Every string in the package but docstrings; what is put into it later is left open."""
    found = []
    for path in Path(ringmpi.__file__).parent.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                found.append("\0".join(x.value if isinstance(x, ast.Constant) else "" for x in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found.append(node.value)
    return found


def test_errors_that_the_page_explains_are_those_of_the_code():
    known = sentences()
    errors = said_by("ringmpi")
    assert len(errors) > 10
    for error in errors:
        for words in filter(None, error.split("...")):
            assert any(words in sentence for sentence in known), (error, words)


def test_the_page_names_every_script():
    assert set(re.findall(r"``(\w+\.(?:sh|sbatch))``", (JOBS / "README.rst").read_text())) == {x.name for x in SCRIPTS}
