# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What the tests of the ops share."""

import importlib

import pytest
import torch

from mlla_mm.compat import mmcv_ext

mmcv_ext.install()
mmcv_ops = pytest.importorskip('mmcv.ops')

needs_stand_in = pytest.mark.skipif(
    not mmcv_ext.is_stand_in(), reason='mmcv is compiled here'
)
needs_compiled = pytest.mark.skipif(
    mmcv_ext.is_stand_in(), reason='mmcv is not compiled here'
)
DEVICES = ['cpu']
if torch.cuda.is_available():
    DEVICES.append(pytest.param('cuda', marks=pytest.mark.gpu))
HALF = [torch.float16, torch.bfloat16]


def extension():
    """What mmcv takes for its compiled ops."""
    return importlib.import_module('mmcv._ext')


def random_boxes(number, generator, size=100.0):
    corners = torch.rand(number, 2, generator=generator) * size
    sides = 1 + torch.rand(number, 2, generator=generator) * size / 2
    return torch.cat([corners, corners + sides], dim=1)


def random_rois(number, images, generator, size=100.0):
    boxes = random_boxes(number, generator, size) - size / 10
    index = torch.randint(images, (number, 1), generator=generator)
    return torch.cat([index.to(boxes), boxes], dim=1)
