"""What Sphinx makes the pages by: `python -m sphinx -W -b html docs OUT`."""

import importlib.metadata

project = "ringmpi"
author = "the ringmpi developers"
version = release = importlib.metadata.version("ringmpi")
extensions = ["sphinx.ext.autodoc", "numpydoc", "myst_nb"]
nb_execution_mode = "off"          # a test runs the notebook, and compares with what it shows
exclude_patterns = ["examples", "measured/*.json"]
html_theme = "pydata_sphinx_theme"
html_title = "ringmpi"
html_theme_options = {"show_prev_next": False, "navigation_depth": 2}
html_copy_source = False
numpydoc_show_class_members = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"


def setup(app):
    """Draw the pictures of docs/pictures.rst."""
    from pathlib import Path

    from ringmpi.layout import make
    from ringmpi.mask import Mask
    from ringmpi.pictures.draw import draw_pairs

    folder = Path(app.srcdir) / "made"
    folder.mkdir(exist_ok=True)
    for layout in ("contiguous", "striped"):
        draw_pairs(Mask(causal=True), make(layout, 64, 4), layout).savefig(folder / f"{layout}.svg")
