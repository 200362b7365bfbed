# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Sphinx's settings. Build: sphinx-build -W --keep-going docs docs/_build/html."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'docs')]

from published import substitutions  # noqa: E402

from mlla_mm import __version__  # noqa: E402

project = 'mlla_mm'
author = 'mlla_mm authors'
project_copyright = author
release = __version__

extensions = [
    'myst_parser',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx_copybutton',
]
exclude_patterns = ['_build']

myst_enable_extensions = ['dollarmath', 'substitution']
myst_heading_anchors = 3
myst_substitutions = substitutions()

# Types are in the docstrings, with shapes.
autodoc_typehints = 'none'
autodoc_member_order = 'bysource'
napoleon_use_rtype = False

# References to this package have to be right; where those to others lead would need
# their inventories from the network.
nitpicky = True
nitpick_ignore_regex = [(r'py:.*', r'(?!mlla_mm\b).*')]

html_theme = 'furo'
html_title = f'mlla_mm {release}'
# Prompts are not part of a command.
copybutton_prompt_text = '$ '


def link_markdown_files(app, docname, source):
    """Let links to Markdown outside of this folder, good on GitHub, lead to the file.

    MyST takes them for pages, which they are not.
    """
    source[0] = re.sub(r'\]\((\.\./[^)#]+\.md)(#[^)]*)?\)', r'](path:\1)', source[0])


def setup(app):
    app.connect('source-read', link_markdown_files)
