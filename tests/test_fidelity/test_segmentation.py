# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""UPerNet on MLLA-B, beside the authors' segmentor: evaluations, and a batch."""

import copy

import numpy as np
import pytest
import torch
from mmengine.structures import PixelData
from torch.nn import functional as F

from mlla_mm.engine.parts import replace_sync_bn

from . import authors

pytest.importorskip('mmseg')
from mmseg.models import SegTTAModel  # noqa: E402
from mmseg.structures import SegDataSample  # noqa: E402

FACTORS = {'decode_head.conv_seg.weight': 4, 'auxiliary_head.conv_seg.weight': 4}
RATIOS = (0.5, 0.75, 1, 1.25, 1.5, 1.75)
SIZE = (91, 127)


@pytest.fixture(scope='module', autouse=True)
def float64():
    with authors.float64('mmseg'):
        yield


@pytest.fixture(scope='module')
def model():
    """In evaluation mode, with the weights as made."""
    cfg = authors.config('segmentation/upernet_mlla-b_8xb2-160k_ade20k-512x512.py')
    replace_sync_bn(cfg.model)
    for head in ('decode_head', 'auxiliary_head'):
        cfg.model[head].dropout_ratio = 0.0
    return authors.build(cfg, FACTORS).eval()


@pytest.fixture(scope='module')
def expected() -> dict:
    return authors.recorded('segmentation_losses')


def image() -> torch.Tensor:
    """Blocks of 8 x 8 pixels, and noise."""
    noise = authors.normal('segmentation/test/noise', (1, 3, *SIZE))
    blocks = authors.normal('segmentation/test/blocks', (1, 3, 12, 16))
    blocks = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)
    return 1.5 * blocks[:, :, : SIZE[0], : SIZE[1]] + 0.5 * noise


@torch.no_grad()
def predict(model, view: torch.Tensor, flip: bool) -> SegDataSample:
    meta = dict(
        img_path='image.png',
        ori_shape=(70, 101),
        img_shape=view.shape[2:],
        pad_shape=view.shape[2:],
        flip=flip,
        flip_direction='horizontal' if flip else None,
    )
    (found,) = model.predict(view, [SegDataSample(metainfo=meta)])
    return found


def views():
    """The sizes of multi-scale evaluation, each with its mirror image."""
    for ratio in RATIOS:
        size = tuple(int(side * ratio + 0.5) for side in SIZE)
        view = F.interpolate(image(), size, mode='bilinear', align_corners=False)
        yield view, False
        yield view.flip(3), True


def grid(scores: torch.Tensor) -> np.ndarray:
    return scores[:, 3::7, 3::7].numpy()


def test_single_scale(model, expected):
    found = predict(model, image(), flip=False)
    softmax = grid(found.seg_logits.data.softmax(0))
    np.testing.assert_allclose(softmax, expected['ss_softmax'], rtol=1e-10, atol=0)
    assert np.array_equal(found.pred_sem_seg.data[0], expected['ss_labels'])


@pytest.mark.slow
def test_multiple_scales_and_flips(model, expected):
    found = [predict(model, *view) for view in views()]
    softmax = sum(x.seg_logits.data.softmax(0) for x in found) / len(found)
    np.testing.assert_allclose(
        grid(softmax), expected['ms_softmax'], rtol=1e-10, atol=0
    )
    (merged,) = SegTTAModel(module=model).merge_preds([found])
    assert np.array_equal(merged.pred_sem_seg.data[0], expected['ms_labels'])


@pytest.fixture(scope='module')
def step(model, expected):
    shape = (2, 1, 96, 128)
    labels = authors.integers('segmentation/labels', shape, 150)
    labels[authors.uniform('segmentation/ignored', shape) < 0.2] = 255
    samples = [SegDataSample(gt_sem_seg=PixelData(data=x)) for x in labels]
    images = authors.normal('segmentation/images', (2, 3, 96, 128))
    trained = copy.deepcopy(model).train()
    return authors.Step(trained, trained.loss(images, samples), expected)


def test_losses(step):
    step.check_losses()


def test_statistics(step):
    step.check_statistics()


def test_gradients(step):
    step.check_gradients()
