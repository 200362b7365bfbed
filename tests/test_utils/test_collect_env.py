# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from mlla_mm.utils.collect_env import collect_env, format_problems, format_table
from mlla_mm.utils.stack import Stack, collect_stack

ROOT = Path(__file__).parents[2]


def run(extra_path=None):
    path = os.pathsep.join(str(p) for p in (extra_path, ROOT) if p)
    return subprocess.run(
        [sys.executable, '-m', 'mlla_mm.utils.collect_env'],
        env={**os.environ, 'PYTHONPATH': path},
        capture_output=True,
        text=True,
    )


def read_table(text):
    lines = text.split('\n\n')[0].splitlines()
    return dict(line.split('  ', 1) for line in lines)


def test_report_of_this_environment():
    result = run()
    table = {k: v.strip() for k, v in read_table(result.stdout).items()}
    assert table['PyTorch'] == torch.__version__
    for found in collect_stack().packages.values():
        for name in found:
            assert f'{metadata.version(name)} ({name})' in result.stdout
    assert table['mmcv ops'].startswith(('stand-in', 'compiled ('))
    assert table['CUDA'].startswith('available') == torch.cuda.is_available()
    assert ('No problem found.' in result.stdout) == (result.returncode == 0)


def test_exit_status_of_a_broken_environment(tmp_path):
    # The records of both distributions, as after installing one over the other.
    for name in ('mmcv', 'onedl_mmcv'):
        record = tmp_path / f'{name}-2.1.0.dist-info'
        record.mkdir()
        (record / 'METADATA').write_text(
            f'Metadata-Version: 2.1\nName: {name}\nVersion: 2.1.0\n'
        )
    result = run(tmp_path)
    assert result.returncode == 1, result.stderr
    assert 'onedl-mmcv and mmcv are installed on top of each other' in result.stdout
    assert 'pip uninstall -y onedl-mmcv mmcv' in result.stdout


def test_values_start_in_one_column():
    rows = collect_env(collect_stack())
    table = format_table(rows)
    columns = {
        line.index(value)
        for line, value in zip(table.splitlines(), rows.values())
        if value
    }
    assert columns == {max(map(len, rows)) + 2}


def test_report_of_an_environment_with_nothing_in_it():
    packages = {n: {} for n in ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')}
    rows = collect_env(Stack(packages=packages))
    assert rows['mmcv'] == rows['mmcv ops'] == 'not installed'
    assert rows['PyTorch'] == 'does not import'


def test_problems_are_numbered():
    text = format_problems(['first\n  mend it', 'second'])
    assert '1. first\n  mend it\n\n2. second' in text
    assert format_problems([]) == 'No problem found.'
