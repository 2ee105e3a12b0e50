"""The job scripts: sound shell, and options that the command line knows."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ringmpi.cli import main

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
    for name in ("cpu.sbatch", "gpu.sbatch"):
        text = (JOBS / name).read_text()
        assert "--kill-on-bad-exit=1" in text
        assert "SRUN_CPUS_PER_TASK" in text
    gpu = (JOBS / "gpu.sbatch").read_text()
    assert "#SBATCH --gpus-per-node" in gpu
    assert "--gpu-bind=none" in gpu


def test_local(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    script = subprocess.run([JOBS / "local.sh", "600"], capture_output=True, text=True, timeout=120, cwd=tmp_path,
                            check=False, env={**os.environ, "PATH": path})
    assert script.returncode == 0, script.stdout + script.stderr
    assert "600 tokens on 4 ranks" in script.stdout
    assert "passed: 64 rows" in script.stdout
