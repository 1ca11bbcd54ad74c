"""How Sphinx builds the documentation: ``make docs``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "sasa_det"
copyright = "the authors of sasa_det"

extensions = [
    "config_keys",
    "myst_parser",
    "papers",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["extensions"]

# The results are a part of README.md, whose headings begin one level lower.
suppress_warnings = ["myst.header"]
myst_heading_anchors = 3
smartquotes = False  # values of arguments and keys stand in quotes

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say what is accepted, with shapes
autodoc_class_signature = "separated"

html_theme = "furo"
html_title = "sasa_det"
html_copy_source = False
html_show_sphinx = False
