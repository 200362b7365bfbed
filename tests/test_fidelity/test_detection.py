# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""One batch of Mask R-CNN on MLLA-T, beside the authors' detector."""

from unittest import mock

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

from mlla_mm.compat.mmcv_ext import is_stand_in

from . import authors

pytest.importorskip('mmdet')
from mmdet.models.task_modules import AnchorGenerator, RandomSampler  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmdet.structures.mask import BitmapMasks  # noqa: E402

pytestmark = pytest.mark.skipif(
    not is_stand_in(), reason="compiled mmcv's NMS takes no float64 on the CPU"
)
BATCH = (192, 224)
# Height and width of the images, without and with padding to a multiple of 32.
SIZES = {(150, 203): (160, 224), (187, 130): (192, 160)}
FACTORS = {
    'rpn_head.rpn_reg.weight': 0.125,
    'roi_head.bbox_head.fc_reg.weight': 0.125,
    'roi_head.mask_head.conv_logits.weight': 8,
}


@pytest.fixture(scope='module', autouse=True)
def float64():
    with authors.float64('mmdet'):
        yield


def images() -> torch.Tensor:
    batch = torch.zeros(2, 3, *BATCH, dtype=torch.float64)
    for i, (height, width) in enumerate(SIZES):
        image = authors.normal(f'detection/image{i}', (3, height, width))
        batch[i, :, :height, :width] = image
    return batch


def sample(i: int, size: tuple, padded: tuple) -> DetDataSample:
    """Six ellipses, whose boxes may reach beyond the image and are clipped."""
    height, width = size
    limits = np.array([width, height])
    u = authors.uniform(f'detection/image{i}/boxes', (6, 4)).numpy()
    centres = (0.15 + 0.7 * u[:, :2]) * limits
    extents = (0.1 + 0.8 * u[:, 2:]) * limits
    boxes = np.concatenate([centres - extents / 2, centres + extents / 2], axis=1)
    boxes = boxes.clip(0, [*limits, *limits])
    y, x = np.mgrid[: BATCH[0], : BATCH[1]] + 0.5
    inside = (y < height) & (x < width)
    masks = [
        inside & (((x - cx) / (w / 2)) ** 2 + ((y - cy) / (h / 2)) ** 2 <= 1)
        for (cx, cy), (w, h) in zip(centres, extents)
    ]
    found = DetDataSample(
        metainfo=dict(
            img_shape=size,
            ori_shape=size,
            pad_shape=padded,
            batch_input_shape=BATCH,
            scale_factor=(1.0, 1.0),
        )
    )
    found.gt_instances = InstanceData(
        bboxes=torch.from_numpy(boxes),
        labels=authors.integers(f'detection/image{i}/labels', (6,), 80),
        masks=BitmapMasks(np.stack(masks).astype(np.uint8), *BATCH),
    )
    found.ignored_instances = InstanceData(
        bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)
    )
    return found


def spread_evenly(self, gallery, num):
    """In the place of the random choice among candidates."""
    return gallery[torch.arange(num) * len(gallery) // num]


@pytest.fixture(scope='module')
def step():
    """The step, and the numbers of positives and negatives of each sampling."""
    chosen = []
    grid_priors = AnchorGenerator.single_level_grid_priors
    choose = RandomSampler.sample

    def grid_priors_in_float64(self, *args, **kwargs):
        return grid_priors(self, *args, **{**kwargs, 'dtype': torch.float64})

    def recorded_sample(self, *args, **kwargs):
        result = choose(self, *args, **kwargs)
        chosen.append([len(result.pos_inds), len(result.neg_inds)])
        return result

    samples = [sample(i, *sizes) for i, sizes in enumerate(SIZES.items())]
    cfg = authors.config('detection/mask-rcnn_mlla-t_fpn_1x_coco.py')
    model = authors.build(cfg, FACTORS)
    expected = authors.recorded('detection_losses')
    with (
        mock.patch.multiple(
            RandomSampler, random_choice=spread_evenly, sample=recorded_sample
        ),
        mock.patch.object(
            AnchorGenerator, 'single_level_grid_priors', grid_priors_in_float64
        ),
    ):
        losses = model.loss(images(), samples)
    return authors.Step(model, losses, expected), chosen


def test_samples(step):
    """RPN of both images, then RoI of both."""
    result, chosen = step
    assert chosen == result.expected['samples'].tolist()


def test_losses(step):
    step[0].check_losses()


@pytest.mark.slow
def test_gradients(step):
    step[0].check_gradients()


def test_statistics(step):
    step[0].check_statistics()
