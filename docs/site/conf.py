"""The published site (`make site`), by Sphinx: README, the notebooks and docs, with navigation and search."""

project = html_title = "emonb"
extensions = ["myst_nb", "sphinx_external_toc"]
external_toc_path = "docs/site/toc.yml"
exclude_patterns = [".*", "build", "models", "tests"]
nb_execution_mode = "off"
myst_heading_anchors = 3  # for links such as glossary.md#temperature
html_theme = "furo"
html_static_path, html_css_files = ["static"], ["tables.css"]
templates_path = ["templates"]
_parts = ("brand", "search", "scroll-start", "navigation")
html_sidebars = {"**": [*(f"sidebar/{part}.html" for part in _parts), "report.html", "sidebar/scroll-end.html"]}


def setup(app):
    """Pictures in cells: MyST-NB knows no attachments."""
    there = ("attachment:", "../docs/pictures/")
    app.connect("source-read", lambda app, name, text: text.__setitem__(0, text[0].replace(*there)))
