# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The program of docs/deployment.md, in a process that has no PyTorch."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest

from mlla_mm.apis import Inferencer

from ..nano import NANO
from ..processes import ROOT

PACKAGES = ('numpy', 'PIL', 'onnxruntime')


@pytest.fixture
def python(tmp_path):
    """Run Python with three packages and the standard library."""
    site = tmp_path / 'site'
    site.mkdir()
    for name in PACKAGES:
        folder = Path(find_spec(name).origin).parent
        # Wheels have their libraries beside them.
        for found in (folder, *folder.parent.glob(f'{name.lower()}.libs')):
            (site / found.name).symlink_to(found)
    for libraries in Path(find_spec('PIL').origin).parents[1].glob('pillow.libs'):
        (site / libraries.name).symlink_to(libraries)

    def run(*arguments):
        return subprocess.run(
            [sys.executable, '-S', *map(str, arguments)],
            env=dict(PYTHONPATH=str(site)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )

    return run


def test_program(python, whole, digits_coco, tmp_path):
    """It finds what the inferencer finds with the checkpoint, and draws it."""
    pytest.importorskip('mmdet')
    checkpoint, file = whole('mmdet')
    for name in ('torch', 'mmdet', 'mmcv', 'mlla_mm'):
        assert 'No module named' in python('-c', f'import {name}').stdout
    code = re.search(r'```python\n(# detect.py\n.*?)```', page(), re.S)[1]
    assert len(code.splitlines()) <= 40
    program = tmp_path / 'detect.py'
    program.write_text(code)
    picture, target = tmp_path / 'picture.png', tmp_path / 'drawn.png'
    # The size of the pipeline: the program would resize it in another way.
    image = cv2.imread(str(sorted((digits_coco / 'val').iterdir())[0]))
    image = cv2.resize(image, (128, 96))
    cv2.imwrite(str(picture), image)
    result = python(program, file, picture, target)
    assert result.returncode == 0, result.stdout
    found = [line.split() for line in result.stdout.splitlines()]
    (expected,) = Inferencer(NANO['mmdet'], checkpoint, 'cpu')(picture, score_thr=0.3)
    assert len(found) == len(expected['instances']) > 0
    for (name, *numbers), instance in zip(found, expected['instances']):
        score, *box = map(float, numbers)
        assert name == instance['name']
        assert score == pytest.approx(instance['score'], abs=2e-3)
        assert box == pytest.approx(instance['box'], abs=0.11)
    drawn = cv2.imread(str(target))
    assert drawn.shape == image.shape
    # Boxes and masks have colour, and most of what is outside of them is as it was.
    changed = (drawn != image).any(-1)
    inside = np.zeros_like(changed)
    for instance in expected['instances']:
        x1, y1, x2, y2 = np.round(instance['box']).astype(int)
        inside[max(0, y1 - 2) : y2 + 12, max(0, x1 - 2) : max(x2, x1 + 40) + 2] = True
    assert changed[inside].mean() > 0.05 and not changed[~inside].any()


def page():
    return (ROOT / 'docs' / 'deployment.md').read_text()
