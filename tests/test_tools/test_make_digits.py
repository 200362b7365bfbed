# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import json

import cv2
import pytest

TOOL = 'tools/dataset_tools/make_digits.py'


@pytest.mark.parametrize(
    'layout, pattern, size',
    [
        ('coco', 'train/*.png', 128),
        ('ade20k', 'images/training/*.png', 128),
        ('imagenet', 'train/*/*.png', 64),
    ],
)
def test_layouts_and_their_default_sizes(call_tool, tmp_path, layout, pattern, size):
    out = tmp_path / 'data'
    counts = ('--train', 3, '--val', 2, '--seed', 5)
    result = call_tool(TOOL, out, '--format', layout, *counts)
    assert str(out) in result.stdout
    images = list(out.glob(pattern))
    assert len(images) == 3
    assert cv2.imread(str(images[0])).shape == (size, size, 3)
    made = json.loads((out / 'digits.json').read_text())
    assert (made['layout'], made['seed'], made['val']) == (layout, 5, 2)


@pytest.mark.parametrize(
    'arguments, words', [(['--size', 16], ['size', '32', '16']), ([], ['folder'])]
)
def test_errors(call_tool, tmp_path, arguments, words):
    """A size that is too small, and a folder that holds something else."""
    (tmp_path / 'notes.txt').write_text('keep')
    out = tmp_path / 'data' if arguments else tmp_path
    result = call_tool(TOOL, out, *arguments, check=False)
    assert result.returncode == 2
    assert all(word in result.stderr for word in words)
    assert list(tmp_path.iterdir()) == [tmp_path / 'notes.txt']
