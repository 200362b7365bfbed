# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import json

import cv2
import pytest

TOOL = ('python', 'tools/dataset_tools/make_digits.py')


@pytest.mark.parametrize(
    'layout, pattern, size',
    [
        ('coco', 'train/*.png', 128),
        ('ade20k', 'images/training/*.png', 128),
        ('imagenet', 'train/*/*.png', 64),
    ],
)
def test_layouts_and_their_default_sizes(run_tool, tmp_path, layout, pattern, size):
    out = tmp_path / 'data'
    counts = ('--train', 3, '--val', 2, '--seed', 5)
    result = run_tool(*TOOL, out, '--format', layout, *counts, separate=True)
    assert str(out) in result.stdout
    images = list(out.glob(pattern))
    assert len(images) == 3
    assert cv2.imread(str(images[0])).shape == (size, size, 3)
    made = json.loads((out / 'digits.json').read_text())
    assert (made['layout'], made['seed'], made['val']) == (layout, 5, 2)


def test_errors_are_one_line_without_traceback(run_tool, tmp_path):
    too_small = run_tool(
        *TOOL, tmp_path / 'data', '--size', 16, check=False, separate=True
    )
    (tmp_path / 'notes.txt').write_text('keep')
    occupied = run_tool(*TOOL, tmp_path, check=False, separate=True)
    for result, message in (
        (too_small, 'size must be a whole number of at least 32, but got 16'),
        (occupied, 'Remove it or choose another folder'),
    ):
        assert result.returncode == 2
        assert message in result.stderr
        assert 'Traceback' not in result.stderr
