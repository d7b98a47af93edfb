"""Build the documentation: `make docs`. Nothing is fetched from the network."""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

import reference_pages  # noqa: E402

from mochi import __version__  # noqa: E402

project = "MoCHi"
author = copyright = "The MoCHi pipeline developers"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
nitpicky = False
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository; a test checks them

myst_enable_extensions = ["dollarmath", "deflist", "attrs_inline"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = True

html_theme = "furo"
html_title = f"MoCHi {release}"
html_static_path: list[str] = []
html_show_sphinx = False

reference_pages.write(DOCS / "_generated")
