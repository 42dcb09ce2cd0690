"""Configuration of Sphinx. `make docs` builds the site into docs/_build/html, offline, and warnings are errors."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generate  # noqa: E402  (beside this file)
from docstrings import to_rst  # noqa: E402

import engram  # noqa: E402

project = "engram"
copyright = "The engram-lm contributors, Apache-2.0"
version = release = engram.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings: list[str] = []
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = "engram"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
pygments_style = "default"
pygments_dark_style = "monokai"


def _rewrite(app, what, name, obj, options, lines):
    lines[:] = to_rst(lines)


def _point_links_at_pages(app, name, source):
    if not name.startswith(("results/", "notes/", "api/")):
        source[0] = generate.site_links(source[0], HERE / f"{name}.md")


def setup(app):
    generate.write_all()
    app.connect("source-read", _point_links_at_pages)
    app.connect("autodoc-process-docstring", _rewrite)
