"""Sphinx with MyST, as Optax and Flax have it: docstrings are reStructuredText, with doctests and formulas.

sphinx-build -W docs out/docs
"""

import lpmm_optax

project = 'lpmm_optax'
author = 'the authors of lpmm_optax'
release = lpmm_optax.__version__
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.mathjax', 'sphinx.ext.napoleon', 'sphinxcontrib.mermaid']
html_theme = 'furo'
html_title = project

# Single backticks in docstrings are code, and a link where they name something of this site.
default_role = 'py:obj'
autodoc_typehints = 'none'
autodoc_member_order = 'bysource'
napoleon_use_rtype = False
myst_fence_as_directive = ['mermaid']
myst_heading_anchors = 3
