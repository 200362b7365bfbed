# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Makes runs of tools quicker; imported last, before the first of them."""

import ast
import gc
import sys

from yapf.yapflib import yapf_api


def _lay_out(text: str, **kwargs) -> tuple:
    """Write code as the standard library does, for YAPF."""
    return ast.unparse(ast.parse(text)), True


# A run lays out its config for readers, and in a short one YAPF takes most of the time.
# Runs that launchers start keep YAPF.
for owner in (yapf_api, sys.modules['mmengine.config.config']):
    if hasattr(owner, 'FormatCode'):  # mmengine 0.10.7 has its own name for it
        owner.FormatCode = _lay_out
# Each data set starts a collection. It need not look at what was imported.
gc.collect()
gc.freeze()
