"""What Sphinx makes the pages by: `python -m sphinx -W -b html docs OUT`."""

import importlib.metadata

project = "ringmpi"
author = "the ringmpi developers"
version = release = importlib.metadata.version("ringmpi")
extensions = ["sphinx.ext.autodoc", "numpydoc"]
exclude_patterns = ["examples", "measured/*.json"]
html_theme = "pydata_sphinx_theme"
html_title = "ringmpi"
html_theme_options = {"show_prev_next": False, "navigation_depth": 2}
html_copy_source = False
numpydoc_show_class_members = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
