# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import re
import sys

import pytest
import torch


def test_unknown_stack(run_tool, tmp_path):
    result = run_tool(
        *('bash', 'tools/test_matrix.sh', '--dir', tmp_path, 'fork', 'old'), check=False
    )
    assert result.returncode == 2
    assert "no stack 'old'; there are fork compiled original newest" in result.stdout


def make_environment(folder, commands):
    (folder / 'bin').mkdir(parents=True)
    (folder / 'bin' / 'activate').write_text(commands)


@pytest.mark.slow
def test_environments_that_exist(run_tool, tmp_path):
    """One that cannot be used, and after it the one that runs this test."""
    make_environment(tmp_path / 'compiled', 'return 1')
    here = f'export VIRTUAL_ENV={sys.prefix} PATH={sys.prefix}/bin:$PATH'
    make_environment(tmp_path / 'fork', here)
    result = run_tool(
        'bash', 'tools/test_matrix.sh', '--dir', tmp_path, 'compiled', 'fork', '--',
        'tests/test_ops/test_rotary.py', check=False,
    )  # fmt: skip
    assert result.returncode == 1
    table = (tmp_path / 'results.md').read_text()
    assert result.stdout.endswith(table)
    _, _, compiled, fork = table.splitlines()
    assert re.search(
        r'^\| compiled \| .*FAILED: not set up, see .*compiled.log', compiled
    )
    assert re.search(r'^\| fork \| 3\.\d+\.\d+ \| .* \| \d+ passed', fork)
    assert f' | {torch.__version__.split("+")[0]}' in fork
    assert 'passed' in (tmp_path / 'fork.log').read_text()
