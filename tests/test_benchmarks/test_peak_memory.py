# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest
import torch
from mmengine.config import Config

from benchmarks.peak_memory import largest_size, measure_config

from ..processes import ROOT


def config(name):
    return Config.fromfile(ROOT / 'configs' / f'{name}.py')


@pytest.mark.parametrize(
    'name, size',
    [
        ('detection/mask-rcnn_mlla-t_fpn_1x_coco', (1333, 800)),
        ('segmentation/upernet_mlla-t_8xb2-160k_ade20k-512x512', (512, 512)),
        ('classification/mlla-t_8xb128_in1k', (224, 224)),
        ('detection/mask-rcnn_mlla-nano_fpn_digits', (128, 128)),
    ],
)
def test_size_of_the_recipe(name, size):
    assert largest_size(config(name)) == size


@pytest.mark.parametrize(
    'package, name',
    [
        ('mmdet', 'detection/mask-rcnn_mlla-nano_fpn_digits'),
        ('mmseg', 'segmentation/upernet_mlla-nano_digits'),
        ('mmpretrain', 'classification/mlla-nano_digits'),
    ],
)
def test_checkpointing_needs_less(package, name):
    pytest.importorskip(package)
    torch.set_num_threads(1)
    plain = measure_config(config(name), batch_size=2)
    less = measure_config(config(name), batch_size=2, with_cp=True)
    more = measure_config(config(name), batch_size=3)
    assert plain.batch_size == 2
    # Weights, gradients and AdamW's two averages are there in any case.
    assert 3.9 * 4 * 10**6 < less.bytes < plain.bytes < more.bytes


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
def test_mixed_precision_needs_a_gpu():
    with pytest.raises(ValueError, match="amp='bfloat16' needs a GPU"):
        measure_config(config('classification/mlla-nano_digits'), amp='bfloat16')


def test_missing_parts_are_named():
    cfg = config('classification/mlla-nano_digits')
    cfg.train_dataloader = None
    with pytest.raises(ValueError, match='A training step needs train_dataloader'):
        measure_config(cfg)
    assert measure_config(cfg, batch_size=2, size=(64, 64)).size == (64, 64)
    cfg.optim_wrapper = None
    with pytest.raises(ValueError, match='needs optim_wrapper in'):
        measure_config(cfg, batch_size=2, size=(64, 64))
