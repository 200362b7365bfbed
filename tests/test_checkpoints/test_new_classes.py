# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Which tensors start fresh when the classes are others, in models of all toolboxes."""

import copy
from importlib import import_module, util
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mlla_mm.checkpoints.fit import load_strictly
from mlla_mm.checkpoints.new_classes import find_other_classes
from mlla_mm.checkpoints.reader import CheckpointError

from ..nano import NANO

# Words in the names of the tensors that differ.
CONFIGS = {
    'mmdet': {
        'mask_rcnn/mask-rcnn_r50_fpn_1x_coco': ['fc_cls', 'fc_reg', 'conv_logits'],
        'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco': ['fc_cls'],
        'retinanet/retinanet_r18_fpn_1x_coco': ['retina_cls'],
        'ssd/ssd300_coco': ['cls_convs'],
        'detr/detr_r50_8xb2-150e_coco': ['fc_cls'],
        'deformable_detr/deformable-detr_r50_16xb2-50e_coco': ['cls_branches'],
        'rtmdet/rtmdet_tiny_8xb32-300e_coco': ['rtm_cls'],
    },
    'mmseg': {
        'upernet/upernet_r50_4xb4-160k_ade20k-512x512': ['conv_seg'],
        'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512': ['conv_seg'],
        'mask2former/mask2former_r50_8xb2-160k_ade20k-512x512': ['cls_embed'],
    },
    'mmpretrain': {
        'resnet/resnet18_8xb32_in1k': ['fc'],
        'swin_transformer/swin-tiny_16xb64_in1k': ['fc'],
    },
}
# They take more than ten seconds on a busy machine.
LARGE = ('mask_rcnn', 'cascade_rcnn', 'upernet', 'mask2former')


def read(scope: str, name: str) -> dict:
    pytest.importorskip(scope)
    import_module(f'{scope}.utils').register_all_modules(init_default_scope=False)
    root = Path(util.find_spec(scope).origin).parent
    return Config.fromfile(root / f'.mim/configs/{name}.py').model


def with_classes(config, classes: int):
    """Other than the code under test: a copy with every number of heads replaced."""
    config = copy.deepcopy(config)
    for part in walk(config):
        for key in ('num_classes', 'num_things_classes'):
            if part.get(key, 0) > 1:
                part[key] = classes
    return config


def walk(config):
    if isinstance(config, dict):
        yield config
        config = config.values()
    if not isinstance(config, str) and hasattr(config, '__iter__'):
        for value in config:
            yield from walk(value)


def build(config, scope: str):
    with DefaultScope.overwrite_default_scope(scope):
        return MODELS.build(copy.deepcopy(config))


def cases():
    for scope, names in CONFIGS.items():
        for name in names:
            marks = [pytest.mark.slow] if name.startswith(LARGE) else []
            yield pytest.param(scope, name, marks=marks)


@pytest.mark.parametrize('scope, name', cases())
def test_models_of_the_toolboxes(scope, name):
    config = read(scope, name)
    model = build(config, scope)
    weights = build(with_classes(config, 37), scope).state_dict()
    own = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    with DefaultScope.overwrite_default_scope(scope):
        (found,) = find_other_classes(config, own, weights)
        assert find_other_classes(config, own, own) == []
    # A run draws the same numbers afterwards.
    assert torch.equal(state, torch.random.get_rng_state())
    assert found.in_file == 37 != found.in_model
    differing = {key for key in own if own[key].shape != weights[key].shape}
    assert set(found.names) == differing
    for word in CONFIGS[scope][name]:
        assert any(word in key for key in differing)
    with pytest.raises(CheckpointError, match='do not fit the model'):
        load_strictly(model, weights, 'x.pth')
    load_strictly(model, {**weights, **{key: own[key] for key in differing}}, 'x.pth')
    for key, value in model.state_dict().items():
        expected = own[key] if key in differing else weights[key]
        # Deformable DETR leaves a parameter as the memory was, which may be NaN.
        torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)


def nano(**head):
    """A classifier's config, model and weights with changes of its head."""
    pytest.importorskip('mmpretrain')
    config = Config.fromfile(NANO['mmpretrain']).model
    config.head.update(head)
    return config, build(config, 'mmpretrain').state_dict()


def test_other_misfits_are_not_explained():
    config, own = nano()
    _, weights = nano(num_classes=4)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        (found,) = find_other_classes(config, own, weights)
        assert (found.in_file, found.in_model) == (4, 10)
        assert found.names == ['head.fc.weight', 'head.fc.bias']
        # Two tensors of one head that speak of different numbers.
        weights['head.fc.bias'] = torch.zeros(5)
        assert find_other_classes(config, own, weights) == []
        # Other channels, and one that is missing.
        weights['head.fc.bias'] = torch.zeros(4)
        weights['head.fc.weight'] = torch.zeros(4, 3)
        assert find_other_classes(config, own, weights) == []
        del weights['head.fc.weight']
        assert find_other_classes(config, own, weights) == []
        # No classes at all.
        weights = {**own, 'head.fc.weight': own['head.fc.weight'][:0]}
        weights['head.fc.bias'] = own['head.fc.bias'][:0]
        assert find_other_classes(config, own, weights) == []
        # The classes are equal, the channels not.
        weights = {**own, 'head.fc.weight': torch.zeros(10, 3)}
        assert find_other_classes(config, own, weights) == []


@MODELS.register_module()
class Panoptic(nn.Module):
    def __init__(self, num_things_classes, num_stuff_classes):
        super().__init__()
        self.fc = nn.Linear(2, num_things_classes + num_stuff_classes + 1)
        self.boxes = nn.Linear(2, 4 * num_things_classes, bias=False)


@MODELS.register_module()
class Student(nn.Module):
    """Its tensors have other names than its config."""

    def __init__(self, teacher):
        super().__init__()
        self.student = MODELS.build(teacher)


def test_panoptic_heads_count_things_and_stuff():
    config = dict(type='Panoptic', num_things_classes=3, num_stuff_classes=2)
    own = MODELS.build(config).state_dict()
    weights = MODELS.build({**config, 'num_things_classes': 5}).state_dict()
    (found,) = find_other_classes(config, own, weights)
    assert (found.in_file, found.in_model) == (7, 5)
    assert found.names == ['fc.weight', 'fc.bias', 'boxes.weight']
    # No whole number of classes has so many rows.
    odd = dict(weights, **{'boxes.weight': torch.zeros(21, 2)})
    assert find_other_classes(config, own, odd) == []
    student = dict(type='Student', teacher=config)
    own, weights = (
        {f'student.{key}': value for key, value in x.items()} for x in (own, weights)
    )
    (found,) = find_other_classes(student, own, weights)
    assert (found.in_file, found.in_model) == (7, 5)


def test_one_map_for_two_classes():
    pytest.importorskip('mmseg')
    config = Config.fromfile(NANO['mmseg']).model
    weights = build(config, 'mmseg').state_dict()
    for head in (config.decode_head, config.auxiliary_head):
        head.update(num_classes=2, out_channels=1)
    own = build(config, 'mmseg').state_dict()
    with DefaultScope.overwrite_default_scope('mmseg'):
        (found,) = find_other_classes(config, own, weights)
    assert (found.in_file, found.in_model) == (11, 2)
    assert len(found.names) == 4
