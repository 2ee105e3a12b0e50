"""A page that stands alone: facts of a run and its pictures, for a browser without a network."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse } td { padding: 0.1rem 1rem 0.1rem 0; vertical-align: top }
svg { max-width: 100%; height: auto }"""


def make_svg(figure: Figure) -> str:
    """Give a figure as an element of a page. Local."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True)
    text = file.getvalue()
    return text[text.index("<svg"):]


def make_page(title: str, facts: Mapping[str, str], figures: Sequence[tuple[str, Figure]]) -> str:
    """Give a page in HTML. Local.

    Parameters
    ----------
    title : str
    facts : mapping of str to str
    figures : sequence of (heading, figure)
    """
    rows = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(text)}</td></tr>\n"
                   for name, text in facts.items())
    parts = "".join(f"<h2>{html.escape(heading)}</h2>\n{make_svg(figure)}\n" for heading, figure in figures)
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
            f'<link rel="icon" href="data:,">\n<style>{STYLE}</style></head><body>\n<h1>{html.escape(title)}</h1>\n'
            f"<table>\n{rows}</table>\n{parts}</body></html>\n")
