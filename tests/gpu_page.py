"""Make a page, and one file of JSON, of what `gpu_first.sh` found.

    python tests/gpu_page.py FOLDER [--into docs/measured] [--commit COMMIT] [--name NAME]

Into is FOLDER itself unless said. The names tell card and day, and NAME where there is one. What is kept under
docs/measured must say of which commit it is: where the files had been copied without it, --commit does.
"""

import argparse
import json
import re
import sys
from pathlib import Path

SPEED = ("speed", "ring")                    # parts that measure; the others say what is right
MOST_WRONG = 40                              # answers that a page spells out, of a part


def main(arguments=None):
    """Write both files, and print what is not right and what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--into", type=Path)
    parser.add_argument("--commit")
    parser.add_argument("--name")
    asked = parser.parse_args(arguments)
    found = gather(asked.folder)
    found["about"]["commit"] = asked.commit or found["about"].get("commit", "")
    if asked.into and found["about"].get("emulated"):
        parser.error(f"{asked.folder}: expected answers of a GPU, got those of an emulated one")
    if asked.into and not found["about"]["commit"]:
        parser.error(f"{asked.folder}: expected a commit in results.jsonl, got none; give --commit")
    target = asked.into or asked.folder
    target.mkdir(parents=True, exist_ok=True)
    name = name_of(found["about"]) + (f"-{asked.name}" if asked.name else "")
    (target / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    text = page(found)
    (target / f"{name}.rst").write_text(text)
    sys.stdout.write(text)


def gather(folder):
    """Read what the script wrote: about, the parts with their commands, and the answers."""
    lines = (folder / "results.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines if line.endswith("}")]           # the last may be cut off
    for answer in answers:
        if answer.get("ok"):
            answer.pop("said", None)           # warnings, with paths of that machine
    header, *rows = ((folder / "parts.tsv").read_text()).splitlines()
    parts = [dict(zip(header.split("\t"), row.split("\t"), strict=True)) for row in rows]
    about = next((answer for answer in answers if answer["part"] == "about"), {})
    return {"about": about, "parts": parts, "answers": [answer for answer in answers if answer["part"] != "about"]}


def name_of(about):
    """Give a name for files: the card, in small letters, and the day."""
    card = about.get("nvidia-smi", {}).get("name") or about.get("card") or "no GPU"
    return re.sub(r"[^a-z0-9.]+", "-", f"{card.split(',')[0]} {about.get('date', '')}".lower()).strip("-")


def page(found):
    """Give the page: what it ran on, what was right, what was measured, and by which commands."""
    about = found["about"]
    title = f"{about.get('card', '').split(',')[0] or 'No GPU'}, {about.get('date', 'day unknown')}"
    sections = [f"{title}\n{'=' * len(title)}\n", "What ``tests/gpu_first.sh`` found, and by which commands.\n",
                table(described(about)),
                heading("Right"), table(counted(found["answers"])), *wrong(found["answers"]),
                heading("Fast"), *figures(found["answers"]),
                heading("Commands"), table([("part", "code", "seconds", "command"),
                                            *(tuple(part.values()) for part in found["parts"])])]
    return "\n".join(sections)


def heading(text):
    """Underline the title of a section."""
    return f"{text}\n{'-' * len(text)}\n"


def table(rows):
    """Give a literal block with columns of even width."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "::\n\n" + "\n".join(f"    {line}" for line in lines) + "\n" if rows else "Nothing.\n"


def described(about):
    """Give a row for each thing to know of the machine."""
    flat = {"card": about.get("card"), **about.get("nvidia-smi", {}),
            **{name: about.get(name) for name in ("cupy", "nvrtc", "python", "cores")}, **about.get("packages", {}),
            "commit": about.get("commit"), "kernels (digest of the sources)": about.get("kernels")}
    return [(name, value) for name, value in flat.items() if value not in (None, "")] or [("nothing", "is known")]


def counted(answers):
    """Give a row for each part that says what is right."""
    rows = [("part", "right", "of")]
    for part in dict.fromkeys(answer["part"] for answer in answers if answer["part"] not in SPEED):
        mine = [bool(answer.get("ok")) for answer in answers if answer["part"] == part]
        rows.append((part, sum(mine), len(mine)))
    return rows


def wrong(answers):
    """Spell out what was not right, or could not be asked."""
    bad = [answer for answer in answers if not answer.get("ok")]
    if not bad:
        return []
    rows = [(answer["part"], answer.get("case", ""), why(answer)) for answer in bad[:MOST_WRONG]]
    more = [f"And {len(bad) - MOST_WRONG} more.\n"] if len(bad) > MOST_WRONG else []
    return ["Not right, or without an answer:\n", table(rows), *more]


def why(answer):
    """Say in one short line what is wrong."""
    text = answer.get("error") or answer.get("said") or numbers(answer.get("errors"))
    return " ".join(text.split())[:160]


def figures(answers):
    """Give tables: ratios beside the bars, torch's kernels, and the notes."""
    measured = [answer for answer in answers if answer["part"] in ("speed", "ring") and answer.get("ok")]
    rows = [("case", "ratio", "beside", "bar", "aim", "ms or s", "spread", "TFLOP/s")]
    for answer in measured:
        row = answer["ours"]
        rows.append((named(answer), number(answer["ratio"]), answer["beside"] or "-", answer["bar"], answer["aim"],
                     number(row.get("ms", row.get("seconds"))), number(row.get("spread")), number(row.get("TFLOP/s"))))
    notes = dict.fromkeys(f"{named(answer).partition(':')[0]}: {answer['note']}." for answer in measured
                          if answer["note"])
    return [table(rows) if measured else "Nothing was measured.\n", *(f"{note}\n" for note in notes)]


def named(answer):
    """Give the name and the case of a measurement."""
    return f"ring: {answer['case']}" if answer["part"] == "ring" else answer["case"]


def number(value):
    """Three digits of a number; a dash for none."""
    return "-" if value is None else f"{value:.3g}"


def numbers(values):
    """Name and three digits of each."""
    return ", ".join(f"{name} {number(value)}" for name, value in (values or {}).items())


if __name__ == "__main__":
    main()
