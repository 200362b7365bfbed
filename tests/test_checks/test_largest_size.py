# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest
import torch
from mmengine.config import Config

from mlla_mm.checks.largest_size import (
    find_sizes,
    largest_size,
    pin_scales,
    resize_images,
)

from ..processes import ROOT


@pytest.mark.parametrize(
    'name, scales',
    [
        ('detection/mask-rcnn_mlla-t_fpn_1x_coco', [(800, 1333), (600, 1333)] * 2),
        ('segmentation/upernet_mlla-t_8xb2-160k_ade20k-512x512', [(4096, 1024)]),
    ],
)
def test_largest_scales_of_the_recipes(name, scales):
    dataset = Config.fromfile(ROOT / f'configs/{name}.py').train_dataloader.dataset
    wrapped = dict(type='RepeatDataset', dataset=dict(datasets=[dataset]))
    pin_scales(wrapped)

    found = []

    def collect(config):
        if isinstance(config, dict):
            if 'Random' in config.get('type', '') and 'Resize' in config['type']:
                found.append(config)
            config = list(config.values())
        for value in config if isinstance(config, (list, tuple)) else ():
            collect(value)

    collect(wrapped)
    assert {tuple(c.get('scale') or c['scales'][0]) for c in found} == set(scales)
    assert all(len(c.get('scales', [0])) == 1 for c in found)
    assert all(c.get('ratio_range', (1, 1)) == (1, 1) for c in found)


def test_range_of_scales():
    resize = dict(type='mmdet.RandomResize', scale=[(1333, 640), (1200, 800)])
    pin_scales([resize])
    assert resize['scale'] == (1333, 800)


class Images:
    """Samples of given sizes (width, height)."""

    def __init__(self, *sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def get_data_info(self, index):
        width, height = self.sizes[index]
        return dict(width=width, height=height)

    def __getitem__(self, index):
        width, height = self.sizes[index]
        return dict(inputs=torch.zeros(3, height, width))


def test_largest_size():
    broad_and_tall = [(20, 10)] * 500 + [(8, 16), (40, 10)] + [(20, 10)] * 500
    # Both extremes lie between the images that are looked at at regular distances.
    sizes = find_sizes(Images(*broad_and_tall))
    assert sizes == {(20, 10), (8, 16), (40, 10)}
    assert largest_size(sizes, batch_size=2) == (40, 16)
    assert largest_size(sizes, batch_size=1) == (40, 10)


def test_samples_that_are_no_single_images():
    samples = [dict(inputs=[torch.zeros(3, 4, 4)] * 2)]
    assert find_sizes(samples) == set()


def test_images_of_one_size():
    pipeline = [dict(type='mmdet.LoadImageFromFile'), dict(type='mmdet.PackDetInputs')]
    first, last = pipeline
    config = dict(dataset=dict(pipeline=pipeline))
    resize_images(config, (40, 16))
    resize = dict(type='Resize', scale=(40, 16), keep_ratio=False)
    assert config['dataset']['pipeline'] == [first, resize, last]
