# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_tool(*args):
    return subprocess.run(
        [sys.executable, str(ROOT / 'tools/dataset_tools/check_dataset.py'), *args],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope='module')
def ade20k(tmp_path_factory):
    """As many files as ADE20K has: not images, which --fast does not see."""
    root = tmp_path_factory.mktemp('ade') / 'ADEChallengeData2016'
    for split, count in (('training', 20210), ('validation', 2000)):
        for kind, suffix in (('images', 'jpg'), ('annotations', 'png')):
            folder = root / kind / split
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f'{i}.{suffix}').write_bytes(b'x')
    return root


def test_complete_data(ade20k):
    result = run_tool('ade20k', str(ade20k), '--fast')
    assert result.returncode == 0, result.stdout + result.stderr
    assert str(ade20k) in result.stdout
    # No progress bar where there is no terminal.
    assert '\r' not in result.stdout and '[' not in result.stdout


def test_table_of_findings(ade20k):
    image = ade20k / 'images/validation/7.jpg'
    image.unlink()
    result = run_tool('ade20k', str(ade20k), '--fast')
    image.write_bytes(b'x')
    assert result.returncode == 1
    table = ' '.join(result.stdout.replace('│', ' ').split())
    for text in ('What is wrong', 'How to fix it', '1999 files', 'expected 2000', '7'):
        assert text in table
    assert 'ADEChallengeData2016.zip' in result.stdout


def test_missing_folder_and_unknown_data_set(tmp_path):
    result = run_tool('coco', str(tmp_path / 'nowhere'))
    assert result.returncode == 1
    assert result.stderr.startswith('Error: Folder not found')
    assert run_tool('pascal', str(tmp_path)).returncode == 2
