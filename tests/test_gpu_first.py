"""The script that asks a GPU, without one: its parts on an emulated GPU, and each on its own where it can't run."""

import json
import os
import re
import subprocess
import sys
import time
import uuid
import zipfile
from importlib.util import find_spec
from pathlib import Path

import gpu_answers
import gpu_page
import gpu_speed
import numpy as np
import oracle
import psutil
import pytest
from emulate import require_compiler

SCRIPT = Path(__file__).with_name("gpu_first.sh")
TEXT = SCRIPT.read_text()
NAMES = re.findall(r"^(?:part|ranks) (\S+) ", TEXT, re.MULTILINE)
PART_OF = {"prove-hopper": "prove", "bfloat16": "speed", "backward": "speed", "decode": "speed"}


def ask(folder, *parts, **env):
    """Run the script; give what it said, codes by part, and the answers. It must end well, with few files."""
    ran = subprocess.run(["bash", SCRIPT, folder, *parts], capture_output=True, text=True, timeout=700, check=False,
                         env={**os.environ, "PYTHON": sys.executable, "WHEELS": str(folder / "none"), **env})
    said = ran.stdout + ran.stderr
    assert ran.returncode == 0, said
    assert len(list(folder.iterdir())) <= 8
    codes = dict(row.split("\t")[:2] for row in (folder / "parts.tsv").read_text().splitlines()[1:])
    return said, codes, [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_the_parts_on_an_emulated_gpu(tmp_path):
    require_compiler()
    parts = ["about", "prove", "prove-hopper", "masks", "bfloat16", "backward", "decode", "ring", "ranks",
             *(["library"] if find_spec("torch") else [])]
    said, codes, answers = ask(tmp_path, *parts, EMULATED="1", COMMIT="abc")
    assert codes == dict.fromkeys(parts, "0"), said
    assert {answer["part"] for answer in answers} == {PART_OF.get(name, name) for name in [*parts, "canonical"]}
    assert not [answer for answer in answers if not answer["ok"]]
    proofs = [answer["case"] for answer in answers if answer["part"] == "prove"]
    assert len(proofs) == 9
    assert sum("hopper" in case for case in proofs) == 5
    assert {answer["case"].partition(":")[0] for answer in answers if answer["part"] == "ranks"} == {
        "transport", "rank 0 of 2", "rank 1 of 2"}
    decode, = (answer for answer in answers if answer.get("case", "").startswith("decode: "))
    assert decode["ratio"] == decode["rows"][0]["of copy"]
    page = (tmp_path / f"emulated-{answers[0]['date']}.rst").read_text()
    assert re.search(r"prove +9 +9\n", page)
    assert "python tests/gpu_first.py speed decode" in page


def test_without_a_gpu_every_part_fails_on_its_own(tmp_path):
    said, codes, answers = ask(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert list(codes) == NAMES, said
    assert len(NAMES) > 15
    assert not [name for name, code in codes.items() if code in ("0", "skipped")], said
    asked = [answer["part"] for answer in answers]
    assert {"about", "prove", "masks", "speed", "ring", "ranks", "library", "dlpack", "long"} <= set(asked)
    assert asked.count("ranks") == 2
    assert all(not answer["ok"] and answer["error"] for answer in answers)


def test_a_part_that_hangs_takes_no_other_with_it(tmp_path):
    """With a Python that hangs in one part, and so does its child; limits of two seconds."""
    mark = uuid.uuid4().hex
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "python").write_text(f'#!/bin/sh\ncase "$*" in *masks*) sh -c "sleep 600; : {mark}" & sleep 600; esac\n'
                                  "echo here\n")
    (tools / "timeout").write_text('#!/bin/sh\nshift 2\nexec /usr/bin/timeout --kill-after=1 2 "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    start = time.monotonic()
    _, codes, _ = ask(tmp_path / "out", "prove", "masks", "bfloat16", PYTHON=str(tools / "python"))
    assert codes == {"prove": "0", "masks": "124", "bfloat16": "0"}
    assert time.monotonic() - start < 20
    assert (tmp_path / "out" / "log.txt").read_text().count("here") == 2
    assert not [one for one in psutil.process_iter(["cmdline"]) if mark in " ".join(one.info["cmdline"] or [])]


def test_too_little_time_is_left(tmp_path):
    _, codes, _ = ask(tmp_path, SECONDS_IN_ALL="19")
    assert codes == dict.fromkeys(NAMES, "skipped")


def test_wheels_come_first(tmp_path):
    """As mpich's: a launcher and a library under data/, beside what is Python."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "mpich-9-py3-none-any.whl", "w") as wheel:
        wheel.writestr("mpich-9.data/data/bin/mpiexec", '#!/bin/sh\necho the wheel has "$LD_LIBRARY_PATH"\nenv\n')
        wheel.writestr("mpich-9.data/data/lib/libmpi.so.12", "")
        wheel.writestr("brought.py", "")
    _, codes, _ = ask(tmp_path / "out", "ranks", WHEELS=str(wheels))
    log = (tmp_path / "out" / "log.txt").read_text()
    assert codes == {"ranks": "0"}
    assert re.search(r"the wheel has \S*/mpich-9\.data/data/lib", log)
    path, = re.findall(r"^PYTHONPATH=(.*)", log, re.MULTILINE)
    assert path.split(":")[0] == str(SCRIPT.parents[1])
    assert path.endswith("/wheels")


def test_the_questions_are_those_of_the_script():
    asked = re.findall(r"speed ([\w-]+)", TEXT)
    assert set(asked) == set(gpu_speed.QUESTIONS)
    for question in (*gpu_speed.QUESTIONS.values(), *gpu_speed.RINGS):
        read, command = gpu_speed.options(question)
        assert read.backend == "cuda"
        assert command == f"ringmpi bench {question.options}"


def test_ratios():
    rows = [{"kernel": name, "ms": ms, "of copy": of_copy} for name, ms, of_copy in (
        ("ringmpi", 2.0, 0.83), ("torch flash", 1.8, None), ("torch cudnn", 1.6, None), ("torch math", 0.1, None))]
    found = gpu_speed.compared(gpu_speed.QUESTIONS["bfloat16"], rows)
    assert (found["ratio"], found["beside"], found["reached"], found["ok"]) == (0.8, "torch cudnn", True, True)
    found = gpu_speed.compared(gpu_speed.QUESTIONS["backward"], rows)
    assert (found["ratio"], found["reached"]) == (0.8, False)
    found = gpu_speed.compared(gpu_speed.QUESTIONS["decode"], rows[:1])
    assert (found["ratio"], found["reached"]) == (0.83, True)
    found = gpu_speed.compared(gpu_speed.QUESTIONS["float32"], rows[:1])
    assert (found["ratio"], found["reached"], found["ok"]) == (None, False, False)
    assert not gpu_speed.compared(gpu_speed.QUESTIONS["decode"], [])["ok"]


def test_a_failure_is_an_answer_that_names_no_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_answers, "RESULTS", tmp_path / "results.jsonl")
    assert not gpu_answers.attempt("masks", "a", lambda: (SCRIPT.parents[1] / "none").read_text())
    assert gpu_answers.attempt("masks", "b", lambda: {"ok": True})
    first, second = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert "FileNotFoundError" in first["error"]
    assert "'none'" in first["error"]
    assert re.fullmatch(r"\w+\.py:\d+: .*", first["where"])
    assert second["ok"]


def test_an_error_that_is_no_number_is_beyond_its_bound():
    assert gpu_answers.within({"out": 0.1, "lse": 0.2}, {"out": 0.1, "lse": 0.2})["ok"]
    found = gpu_answers.within({"out": float("nan"), "lse": 0.3}, {"out": 0.1, "lse": 0.2})
    assert (found["ok"], found["beyond"]) == (False, {"out": 0.1, "lse": 0.2})


def test_the_truth_by_torch():
    pytest.importorskip("torch")
    q, k, v, begin, end = oracle.case(0, 30, 50, 4, 2, 8, 12, "float64")
    dout = np.random.default_rng(1).standard_normal((30, 4, 12))
    see = (np.arange(50) >= begin[:, None]) & (np.arange(50) < end[:, None])
    want = oracle.dense(q, k, v, see, 0.3, dout=dout)
    got = gpu_answers.exact_by_torch("cpu", q, k, v, see, 0.3, dout)
    assert set(got) == {"out", "lse", "dq", "dk", "dv"}
    assert max(oracle.error(x, want[name]) for name, x in got.items()) < 1e-13


ABOUT = {"part": "about", "ok": True, "card": "NVIDIA H100 80GB HBM3, GPU-1, compute capability 9.0, 80 GiB",
         "nvidia-smi": {"name": "NVIDIA H100 80GB HBM3", "driver_version": "580.1"}, "emulated": False, "commit": "",
         "packages": {"torch": "2.11.0"}, "date": "2030-01-02"}
SPEED = {"part": "speed", "case": "bfloat16: dim 128", "ok": True,
         "ours": {"ms": 1.5, "spread": 0.01, "TFLOP/s": 400.0},
         "ratio": 0.8125, "beside": "torch cudnn", "bar": 0.75, "aim": 1.0, "note": "so and so"}


@pytest.fixture
def results(tmp_path):
    """A folder as the script leaves it, but for a line that was not finished."""
    answers = [ABOUT, {"part": "masks", "case": "a", "ok": True}, SPEED,
               {"part": "masks", "case": "b", "ok": False, "errors": {"out": 0.5}}]
    text = "".join(json.dumps(answer) + "\n" for answer in answers) + '{"part": "ran'
    (tmp_path / "results.jsonl").write_text(text)
    (tmp_path / "parts.tsv").write_text("part\tcode\tseconds\tcommand\nmasks\t124\t45\tpython x masks\n")
    return tmp_path


def test_the_page_says_what_was_found(results, capsys):
    gpu_page.main([str(results), "--into", str(results / "kept"), "--commit", "abcdef"])
    page = (results / "kept" / "nvidia-h100-80gb-hbm3-2030-01-02.rst").read_text()
    kept = json.loads((results / "kept" / "nvidia-h100-80gb-hbm3-2030-01-02.json").read_text())
    assert capsys.readouterr().out == page
    assert page.startswith("NVIDIA H100 80GB HBM3, 2030-01-02\n=====")
    for line in (r"driver_version +580\.1", r"torch +2\.11\.0", r"commit +abcdef", r"masks +1 +2",
                 r"masks  b  out 0\.5", r"bfloat16: dim 128 +0\.812 +torch cudnn +0\.75 +1\.0 +1\.5 +0\.01 +400",
                 r"masks +124 +45 +python x masks"):
        assert re.search(rf"^ +{line}$", page, re.MULTILINE), line
    assert "bfloat16: so and so." in page
    assert kept["about"]["commit"] == "abcdef"
    assert kept["answers"][1] == SPEED


@pytest.mark.parametrize(("about", "reason"), [
    ({}, "expected a commit"), ({"emulated": True, "commit": "a"}, "expected answers of a GPU")])
def test_what_is_kept_must_be_of_a_gpu_and_of_a_commit(results, capsys, about, reason):
    text = (results / "results.jsonl").read_text()
    (results / "results.jsonl").write_text(text.replace(json.dumps(ABOUT), json.dumps(ABOUT | about)))
    with pytest.raises(SystemExit):
        gpu_page.main([str(results), "--into", str(results / "kept")])
    assert reason in capsys.readouterr().err
    assert not (results / "kept").exists()
