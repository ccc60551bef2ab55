"""Configuration of the documentation site; `make docs` builds it and fails on any warning."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, TypeVar

from docutils import nodes
from sphinx.domains.python import PyObject
from sphinx.ext import autosummary
from sphinx.util import logging

import emf_lightning

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "emf_lightning"
author = "The emf-lightning authors"
copyright = author  # Sphinx's name for the line at the foot of a page
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "mathml",  # docs/_extensions: formulas as MathML, without JavaScript
    "plain_docstrings",  # docs/_extensions: formulas in docstrings are no markup
]
exclude_patterns = ["_build", "_extensions", "_templates", "**/.ipynb_checkpoints"]
suppress_warnings = ["ref.python"]  # a public name has two pages, its own and its module's

# -- Markdown ----------------------------------------------------------------------------------------------------------
myst_enable_extensions = ["attrs_inline", "deflist", "dollarmath"]
myst_heading_anchors = 4  # [text](page.md#a-heading) is checked
nb_execution_mode = "off"  # the notebook is shown with the outputs that it was saved with

# -- API reference -----------------------------------------------------------------------------------------------------
templates_path = ["_templates"]
autosummary_ignore_module_all = False
add_module_names = False
autodoc_inherit_docstrings = False  # what Lightning says of its own hooks is in its documentation
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# Every reference must resolve; other projects' objects have no page here, and their inventories need the network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!emf_lightning\.).*")]

# -- HTML --------------------------------------------------------------------------------------------------------------
html_theme = "pydata_sphinx_theme"
html_title = "emf_lightning"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "navbar_align": "left",
    "navbar_end": ["theme-switcher"],
    "navigation_with_keys": False,
    "secondary_sidebar_items": {"results/*": [], "[!r]*": ["page-toc"]},  # results: the width is for their tables
    "show_prev_next": False,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"index": [], "getting_started": [], "tutorial": []}


def _without_page(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Private bases and type variables appear in signatures and have no page: their names stay plain text."""
    module, _, name = node.get("reftarget", "").rpartition(".")
    if module.startswith("emf_lightning") and module in sys.modules:
        found = getattr(sys.modules[module], name, None)
        if name.startswith("_") or isinstance(found, TypeVar):
            return content
    return None


def _unbroken_errors(app: Any, doctree: nodes.document) -> None:
    """Keeps a value and its error on one line."""
    for text in list(doctree.findall(nodes.Text)):
        if " ± " in text:
            text.parent.replace(text, nodes.Text(text.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")))


def setup(app: Any) -> None:
    """Connects what is too small for an extension of its own."""
    app.connect("missing-reference", _without_page)
    app.connect("doctree-read", _unbroken_errors)
    autosummary.WELL_KNOWN_ABBREVIATIONS += ("eq.",)  # it ends no summary
    listed = set(re.findall(r"^   (\w+)$", Path(__file__).with_name("api").joinpath("public.md").read_text(), re.M))
    if differing := listed ^ set(emf_lightning.__all__):
        logging.getLogger(__name__).warning("api/public.md and emf_lightning differ in %s", sorted(differing))
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"  # Sphinx says "Variables"
