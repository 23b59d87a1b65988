"""Sphinx configuration. ``make docs`` builds the site with warnings as errors."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import bagua_syncbn_algo

project = "bagua_syncbn_algo"
author = "The bagua_syncbn_algo contributors"
release = bagua_syncbn_algo.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
myst_heading_anchors = 3
myst_enable_extensions = ["fieldlist"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_custom_sections = [("Collectives", "notes_style")]
napoleon_google_docstring, napoleon_numpy_docstring = True, False
nitpicky = True
# No references to other projects, whose inventories are not loaded, and to private types of this package.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|collections|typing|datetime|weakref|contextlib)\..*"),
    ("py:.*", r"bagua_syncbn_algo\.(comm|ops|graph|embedded|layer|convert|host|algorithm|config)\..*"),
    ("py:.*", r"(?!bagua_syncbn_algo)[A-Za-z_]+(\.[A-Za-z_]+)*"),
]
