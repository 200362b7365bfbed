# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

ROOT = Path(__file__).parents[2]


def run_tool(*args):
    search_path = [str(ROOT), os.environ.get('PYTHONPATH', '')]
    return subprocess.run(
        [sys.executable, str(ROOT / 'tools/dataset_tools/make_digits.py'), *args],
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, search_path))},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    'layout, pattern, size',
    [
        ('coco', 'train/*.png', 128),
        ('ade20k', 'images/training/*.png', 128),
        ('imagenet', 'train/*/*.png', 64),
    ],
)
def test_layouts_and_their_default_sizes(tmp_path, layout, pattern, size):
    out = tmp_path / 'data'
    counts = ('--train', '3', '--val', '2', '--seed', '5')
    result = run_tool(str(out), '--format', layout, *counts)
    assert result.returncode == 0, result.stderr
    assert str(out) in result.stdout
    images = list(out.glob(pattern))
    assert len(images) == 3
    assert cv2.imread(str(images[0])).shape == (size, size, 3)
    made = json.loads((out / 'digits.json').read_text())
    assert (made['layout'], made['seed'], made['val']) == (layout, 5, 2)


def test_errors_are_one_line_without_traceback(tmp_path):
    too_small = run_tool(str(tmp_path / 'data'), '--size', '16')
    (tmp_path / 'notes.txt').write_text('keep')
    occupied = run_tool(str(tmp_path))
    for result, message in (
        (too_small, 'size must be a whole number of at least 32, but got 16'),
        (occupied, 'Remove it or choose another folder'),
    ):
        assert result.returncode == 2
        assert message in result.stderr
        assert 'Traceback' not in result.stderr
