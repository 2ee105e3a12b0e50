"""The worked examples of docs/examples, which check themselves, on ranks."""

from pathlib import Path

import launch
import pytest

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


@pytest.mark.parametrize(("name", "ranks", "options", "said"), [
    ("globe", 2, ["--shape", "31x60"], "31 x 60 points on 2 ranks"),
    ("globe", 4, ["--shape", "17x24", "--window", "2,12"], "17 x 24 points on 4 ranks"),
    ("regression", 3, ["--observations", "2000", "--points", "400"], "400 points from 2000 observations on 3 ranks"),
    ("archive", 2, [], "document 27"),
    ("language_model", 2, ["--steps", "40", "--tokens", "128"], "... 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0")])
def test_an_example(name, ranks, options, said, tmp_path):
    if name == "language_model":
        pytest.importorskip("transformers")
    result = launch.launch(ranks, [EXAMPLES / f"{name}.py", *options], folder=tmp_path, timeout=180)
    assert result.code == 0, result.text
    assert said in result.ranks[0]


def test_every_example_is_run_and_described():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    text = (EXAMPLES.parent / "examples.rst").read_text()
    assert names == {"globe", "regression", "archive", "language_model"}
    assert all(f"docs/examples/{name}.py" in text for name in names)
