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
html_theme_options = {"show_prev_next": False, "navigation_depth": 2, "navbar_center": []}
html_sidebars = {"**": ["globaltoc.html"]}       # all pages by their captions: a heading for each would not fit
html_static_path = ["static"]
html_css_files = ["pages.css"]
html_copy_source = False
numpydoc_show_class_members = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"


def setup(app):
    """Draw the pictures of docs/howitworks.rst and docs/pictures.rst."""
    from pathlib import Path

    from ringmpi.layout import make
    from ringmpi.mask import Mask
    from ringmpi.pictures.draw import draw_pairs

    causal = Mask(causal=True)
    pictures = {
        "contiguous": (causal, "contiguous"),
        "striped": (causal, "striped"),
        "zigzag": (causal, "zigzag"),
        "window": (Mask(causal=True, window=(15, 0)), "contiguous"),
        "documents": (Mask(causal=True, documents=[0, 20, 36, 64]), "striped"),
    }
    folder = Path(app.srcdir) / "made"
    folder.mkdir(exist_ok=True)
    for name, (mask, layout) in pictures.items():
        draw_pairs(mask, make(layout, 64, 4), layout).savefig(folder / f"{name}.svg")
