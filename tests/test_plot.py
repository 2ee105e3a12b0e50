"""`ringmpi plot`: pictures of records, of one rank or many, and of who computes which pairs."""

import json
import re
import shutil
import subprocess
from xml.etree import ElementTree

import numpy as np
import pytest

from ringmpi.cli import main
from ringmpi.layout import make
from ringmpi.pictures.perfetto import make_trace
from ringmpi.pictures.record import make_timeline

pytest.importorskip("matplotlib")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def record(ranks, wait=0.25, begin=100.0):
    """A ring of so many ranks with clocks of their own: each step computes for a second, and waits a little."""
    per_rank = []
    for rank in range(ranks):
        steps = [{"step": step, "source": (rank - step) % ranks, "compute_start": 0.5 + step * (1 + wait),
                  "compute_seconds": 1.0, "wait_start": 1.5 + step * (1 + wait),
                  "wait_seconds": wait if step < ranks - 1 else 0.0, "pairs": 10 + rank,
                  "bytes_sent": 7, "bytes_received": 7 if step < ranks - 1 else 0, "gradient_bytes_sent": 0}
                 for step in range(ranks)]
        per_rank.append({"host": f"node{rank // 4}", "started": begin - 10 * rank, "clock_offset": 10.0 * rank,
                         "setup_seconds": 0.4, "compile_seconds": 0.1, "steps": steps, "exchanges": []})
    return {"ringmpi": "0.1.0", "ranks": ranks, "grid": f"1x1x{ranks}:ring", "per_rank": per_rank, "gflops": 3.0,
            "command": "ringmpi attend <in> & out", "attend_seconds": 8.0 / ranks}


@pytest.fixture(params=[1, 4, pytest.param(64, marks=pytest.mark.exhaustive)])
def written(request, tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record(request.param)))
    return path, request.param


def test_ranks_are_put_on_one_clock():
    timeline = make_timeline(record(4))
    begins = [min(span.start for span in timeline.spans if span.rank == rank) for rank in range(4)]
    assert np.allclose(begins, 0)
    assert np.isclose(timeline.seconds, 0.5 + 3 * 1.25 + 1)
    assert np.isclose(timeline.hidden, 16 / (16 + 4 * 3 * 0.25))
    # Each block goes from a rank to the next, and there are three hops of each.
    assert len(timeline.messages) == 12
    assert all((message.sender + 1) % 4 == message.receiver for message in timeline.messages)
    assert all(np.isclose(message.stop - message.start, 1.25) for message in timeline.messages)


@pytest.mark.parametrize("picture", ["timeline", "balance"])
@pytest.mark.parametrize("end", ["png", "svg", "pdf"])
def test_pictures_of_a_record(written, picture, end, tmp_path):
    path, ranks = written
    output = tmp_path / f"picture.{end}"
    assert main(["plot", str(path), "-o", str(output), "--picture", picture]) == 0
    content = output.read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[end])
    if end == "svg":
        root = ElementTree.fromstring(content)
        shapes = sum("clip-path" in one.attrib for one in root.iter() if one.tag.endswith(("path", "use")))
        assert shapes >= ranks**2 or ranks == 1          # each rank has a bar for each step


def test_a_page(written, tmp_path):
    """It stands alone, says what ran, and has both pictures."""
    path, ranks = written
    output = tmp_path / "page.html"
    assert main(["plot", str(path), "-o", str(output)]) == 0
    text = output.read_text()
    assert text.count("<svg") == 2
    assert "ringmpi attend &lt;in&gt; &amp; out" in text
    assert "hidden" in text
    assert not re.search(r'(src|href)="http', text.replace('xlink:href="#', ""))       # nothing is fetched
    if ranks == 4:
        assert f"{100 * 16 / 19:.1f} %" in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_a_page_in_a_browser(tmp_path):
    """Its pictures are there, and the console says nothing."""
    (tmp_path / "record.json").write_text(json.dumps(record(4)))
    assert main(["plot", str(tmp_path / "record.json"), "-o", str(tmp_path / "page.html")]) == 0
    shown = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/user",
                            "--enable-logging=stderr", f"--screenshot={tmp_path}/shot.png", "--window-size=1000,1400",
                            f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert "CONSOLE" not in shown.stderr
    from matplotlib.image import imread
    pixels = imread(tmp_path / "shot.png")[:, :, :3].reshape(-1, 3)
    blue = np.abs(pixels - np.array([0x00, 0x72, 0xB2]) / 255).max(axis=1) < 0.02
    assert blue.mean() > 0.01


def test_a_trace(written, tmp_path):
    path, ranks = written
    output = tmp_path / "trace.json"
    assert main(["plot", str(path), "--trace", str(output)]) == 0
    events = json.loads(output.read_text())["traceEvents"]
    names = [event["args"]["name"] for event in events if event["ph"] == "M" and event["name"] == "thread_name"]
    assert names == [f"rank {rank}" for rank in range(ranks)]
    computing = [event for event in events if event.get("cat") == "compute"]
    assert len(computing) == ranks**2
    assert all(event["dur"] == pytest.approx(1e6) for event in computing)
    starts, ends = ([event["id"] for event in events if event["ph"] == phase] for phase in "sf")
    assert starts == ends
    assert len(make_trace(make_timeline(record(2)))["traceEvents"]) > 6


def test_scaling_and_benchmarks(tmp_path):
    paths = []
    for ranks in (1, 2, 4):
        paths.append(tmp_path / f"{ranks}.json")
        paths[-1].write_text(json.dumps(record(ranks)))
    assert main(["plot", *map(str, paths), "-o", str(tmp_path / "scaling.svg")]) == 0
    assert (tmp_path / "scaling.svg").read_bytes().startswith(b"<?xml")
    (tmp_path / "bench.json").write_text(json.dumps({"rows": [{"what": "kernel", "ratio": 1.2, "seconds": 3}]}))
    assert main(["plot", str(tmp_path / "bench.json"), "-o", str(tmp_path / "bench.svg")]) == 0


@pytest.mark.parametrize("layout", ["contiguous", "striped", "zigzag"])
def test_who_computes_which_pairs(layout, tmp_path):
    from ringmpi.mask import Mask
    from ringmpi.pictures.draw import draw_pairs
    figure = draw_pairs(Mask(causal=True), make(layout, 12, 3), layout)
    owner = np.asarray(figure.axes[0].images[0].get_array().filled(np.nan))
    for rank in range(3):
        rows = make(layout, 12, 3).positions(rank)
        assert all((owner[row, :row + 1] == rank).all() and np.isnan(owner[row, row + 1:]).all() for row in rows)
    assert main(["plot", "--layout", layout, "--causal", "-o", str(tmp_path / "pairs.svg")]) == 0


def test_what_is_refused(tmp_path, capsys):
    (tmp_path / "good.json").write_text(json.dumps(record(2)))
    other = record(2)
    del other["per_rank"][1]
    (tmp_path / "other.json").write_text(json.dumps(other))
    (tmp_path / "text.json").write_text("not JSON")
    good, other, text, out = (str(tmp_path / name) for name in ("good.json", "other.json", "text.json", "x.svg"))
    for arguments, code, said in (
            ([good], 2, "expected -o FILE"), ([good, "-o", str(tmp_path / "x.jpg")], 2, "a name that ends in"),
            ([other, "-o", out], 3, "of other ranks, or another version"),
            ([text, "-o", out], 3, "expected the record"),
            ([str(tmp_path / "none.json"), "-o", out], 3, "expected the record"),
            ([good, "-o", out, "--picture", "pairs"], 2, "no record"),
            ([good, good, "-o", out, "--picture", "timeline"], 2, "one record"),
            (["-o", out, "--picture", "timeline"], 2, "expected a record"),
            (["-o", out, "--tokens", "5000"], 2, "at most 2048"), ([good, good, "--trace", out], 2, "one record")):
        assert main(["plot", *arguments]) == code, arguments
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x.svg").exists()
    assert main(["plot", good, "-o", out]) == 0
    assert main(["plot", good, "-o", out]) == 6
    assert main(["plot", good, "-o", out, "--force"]) == 0


def test_needles_are_where_they_were_planted():
    """Each depth has its own, whole, and they come again at the end; a guess of others is wrong."""
    from ringmpi.commands import demo_map
    from ringmpi.commands.demo_text import Text
    for context in (demo_map.DEPTHS * demo_map.NEEDLE, 1000, 5000):
        text = demo_map.plant(Text(np.zeros(context, np.uint8), ["zeros"], np.array([0, context])))
        each = demo_map.needles_at_a_depth(context)
        needles = text.data[context:].reshape(demo_map.DEPTHS, -1)
        assert needles.shape[1] == each * demo_map.NEEDLE
        places = [text.data.tobytes().index(needle.tobytes()) for needle in needles]
        assert places[0] == 0
        assert places[-1] == context - each * demo_map.NEEDLE
        assert np.ptp(np.diff(places)) <= 1
        right = np.append(text.data[context + 1:], np.uint8(0))
        assert (demo_map.score(text, right) == 1).all()
        right.reshape(demo_map.DEPTHS, -1)[3] += 1
        assert demo_map.score(text, right).tolist() == [1] * 3 + [0] + [1] * 7
