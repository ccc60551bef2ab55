"""Sphinx extension: formulas as MathML, converted by docutils.

Every current browser renders MathML by itself, so a page needs neither JavaScript nor a file from another host.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

# docutils 0.22 renamed the argument
_BLOCK: dict[str, Any] = {"as_block": True} if "as_block" in signature(tex2mathml).parameters else {"inline": False}

_log = logging.getLogger(__name__)


def _mathml(node: nodes.Element, **options: Any) -> str:
    try:
        return tex2mathml(node.astext(), **options)
    except MathError as error:
        _log.warning("formula %r: %s", node.astext(), error, location=node)
        return ""


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(_mathml(node))
    raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(translator.starttag(node, "div", CLASS="math"))
    if node["number"]:
        number = get_node_equation_number(translator, node)
        translator.body.append(f'<span class="eqno">({number})')
        translator.add_permalink_ref(node, "Link to this equation")
        translator.body.append("</span>")
    translator.body.append(_mathml(node, **_BLOCK) + "</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the renderer; it is the only one, so Sphinx selects it."""
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
