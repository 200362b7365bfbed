# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Models of mmdet, mmseg and mmpretrain on MLLA. Wrong channels: see test_config.py."""

import importlib
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope

from mlla_mm.checks.outputs import check_outputs
from mlla_mm.models import LinearAttentionSwin
from mlla_mm.models.layers import TokenMixer

# Channels of ResNet-50's stages, and of MLLA-T's.
CHANNELS = {256: 64, 512: 128, 1024: 256, 2048: 512}
READERS = ('decode_head', 'auxiliary_head', 'head', 'neck')


# Models on ResNet-50.
CONFIGS = {
    'mmdet': (
        'carafe/faster-rcnn_r50_fpn-carafe_1x_coco',
        'cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco',
        'deformable_detr/deformable-detr_r50_16xb2-50e_coco',
        'detr/detr_r50_8xb2-150e_coco',
        'libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco',
        'mask2former/mask2former_r50_8xb2-lsj-50e_coco',
        'nas_fpn/retinanet_r50_nasfpn_crop640-50e_coco',
        'pafpn/faster-rcnn_r50_pafpn_1x_coco',
        'retinanet/retinanet_r50_fpn_1x_coco',
    ),
    'mmseg': (
        'ann/ann_r50-d8_4xb2-40k_cityscapes-512x1024',
        'deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024',
        'encnet/encnet_r50-d8_4xb2-40k_cityscapes-512x1024',
        'fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024',
        'knet/knet-s3_r50-d8_fcn_8xb2-adamw-80k_ade20k-512x512',
        'mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024',
        'ocrnet/ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024',
        'point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024',
        'sem_fpn/fpn_r50_4xb2-80k_cityscapes-512x1024',
        'upernet/upernet_r50_4xb2-40k_cityscapes-512x1024',
    ),
    'mmpretrain': (
        'barlowtwins/benchmarks/resnet50_8xb32-linear-coslr-100e_in1k',
        'resnet/resnet50_8xb32_in1k',
    ),
}


def with_our_channels(part: Any) -> Any:
    if isinstance(part, (list, tuple)):
        return [with_our_channels(x) for x in part]
    if not isinstance(part, dict):
        return part
    return {
        key: mapped(x) if 'in_channels' in key else with_our_channels(x)
        for key, x in part.items()
    }


def mapped(channels: Any) -> Any:
    if isinstance(channels, (list, tuple)):
        return [mapped(x) for x in channels]
    return CHANNELS.get(channels, channels)


@pytest.mark.parametrize(
    'package, name',
    [(package, name) for package in CONFIGS for name in CONFIGS[package]],
)
def test_models_of_the_packages_are_not_refused(package, name):
    root = Path(importlib.import_module(package).__file__).parent / '.mim' / 'configs'
    if not root.is_dir():
        pytest.skip(f'{package} is installed without its configs')
    cfg = Config.fromfile(root / f'{name}.py', import_custom_modules=False)
    model = {
        key: with_our_channels(x) if key in READERS else x
        for key, x in cfg.model.to_dict().items()
    }
    default = (3,) if package == 'mmpretrain' else (0, 1, 2, 3)
    indices = cfg.model.backbone.get('out_indices', default)
    model['backbone'] = dict(type='MLLA', out_indices=indices)
    with DefaultScope.overwrite_default_scope(package):
        check_outputs(ConfigDict(model))


def test_heads_that_read_all_maps():
    """Mask2Former has a list of channels and no indices."""
    head = dict(type='Mask2FormerHead', in_channels=[64, 128, 256, 512])
    model = dict(type='EncoderDecoder', backbone=dict(type='MLLA'), decode_head=head)
    check_outputs(model)
    head['in_channels'] = 256
    with pytest.raises(ValueError, match='decode_head.in_channels is 256'):
        check_outputs(model)


def test_the_study_backbone():
    """Its arguments and channels are compared, too; of its children the names."""
    backbone = dict(type='LinearAttentionSwin', token_mixer=dict(forget_gate=True))
    head = dict(type='FCNHead', in_index=3, in_channels=768)
    model = dict(type='EncoderDecoder', backbone=backbone, decode_head=head)
    check_outputs(model)
    head['in_channels'] = 512
    with pytest.raises(
        ValueError, match="768 channels .LinearAttentionSwin of arch 'tiny'"
    ):
        check_outputs(model)
    for wrong, message in (
        (dict(arch='small'), "model.backbone: Unknown arch 'small'"),
        (dict(expansion=2), "model.backbone: expansion = 2 is for Mamba's block"),
        (dict(input_gate=True), 'input_gate'),
        (dict(token_mixer=dict(lepe=1)), 'lepe must be True or False'),
        (dict(token_mixer=dict(type='Nothing')), 'Nothing'),
        (dict(token_mixer=dict(type='Silent')), 'model.backbone: ValueError'),
    ):
        model['backbone'] = dict(backbone, **wrong)
        with pytest.raises(ValueError, match=message):
            check_outputs(model)
    model['backbone'] = dict(type='OwnSwin', cpu=1)
    with pytest.raises(ValueError, match='cpe'):
        check_outputs(model)


@MODELS.register_module()
class Silent(TokenMixer):
    """A mixer of a user's, whose error has no text."""

    def __init__(self, **_):
        raise ValueError


@MODELS.register_module()
class OwnSwin(LinearAttentionSwin):
    """A class of a user's."""
