"""The site: `sphinx-build -W docs site`.

Sphinx with MyST and Furo. MkDocs 1 has had no release since 2024 and Material for MkDocs ended its
support in November 2026; their successor Zensical calls its reading of docstrings preliminary. The
docstrings here are reST, which Sphinx alone reads.
"""

import sys
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).parents[1]))

import avalanche_classp
import experiments  # noqa: F401 - `avalanche_classp.experiments` of the reference is this one

project = "avalanche-classp"
author = "The avalanche-classp authors"
copyright = "2026, the avalanche-classp authors"
release = avalanche_classp.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["**.ipynb_checkpoints"]
html_theme = "furo"
html_title = "avalanche-classp"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"

nb_execution_mode = "off"  # A test executes the notebook; the site shows its stored outputs.
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"


def mathml(node, display):
    """Return a formula as MathML, which browsers draw without a script from elsewhere."""
    latex = node.astext().replace("{aligned}", "{align*}").replace(r"\_", "_")
    return convert(latex, display=display)


def show_inline(translator, node):
    """Show a formula in a line of text."""
    translator.body.append(mathml(node, "inline"))
    raise SkipNode


def show_block(translator, node):
    """Show a formula in a block of its own."""
    translator.body.append(f'<div class="formula">{mathml(node, "block")}</div>')
    raise SkipNode


def setup(app):
    """Add the renderer of formulas."""
    app.add_html_math_renderer("mathml", (show_inline, None), (show_block, None))
