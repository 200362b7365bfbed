# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Tools in processes that import the packages themselves, as run_tool's do not."""

import pytest

from ..processes import ROOT

TOOLS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob('tools/**/*.py'))


@pytest.mark.slow
@pytest.mark.parametrize('tool', TOOLS)
def test_every_tool_starts(run_tool, tool):
    output = run_tool('env', 'python', tool, '--help').stdout
    assert f'usage: {tool.rpartition("/")[2]}' in output
