# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""mmdet's models with deformable attention, on this project's backbone; DyHead."""

import copy
from pathlib import Path
from unittest import mock

import pytest
import torch
from mmengine.config import Config

from ...nano import NANO, build
from .shared import needs_stand_in

mmdet = pytest.importorskip('mmdet')
attention = pytest.importorskip('mmcv.ops.multi_scale_deform_attn')

FOLDER = Path(mmdet.__file__).parent / '.mim/configs'
# Configs, and the layers of the small model with deformable attention.
CONFIGS = {
    'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py': 2,
    'dino/dino-4scale_r50_8xb2-12e_coco.py': 2,
    'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py': 1,
}
OPS = ('ms_deform_attn_forward', 'ms_deform_attn_backward')


def small_model(name):
    """mmdet's model with few layers and queries, on the backbone of the demo."""
    cfg = Config.fromfile(FOLDER / name)
    model = cfg.model
    model.backbone = Config.fromfile(NANO['mmdet']).model.backbone
    if model.type == 'Mask2Former':
        model.data_preprocessor.batch_augments = None
        head = model.panoptic_head
        head.update(in_channels=[32, 64, 128, 256], num_queries=8)
        head.pixel_decoder.encoder.num_layers = 1
        head.transformer_decoder.num_layers = 1
        model.train_cfg.num_points = 100
    else:
        model.backbone.out_indices = (1, 2, 3)
        model.neck.in_channels = [64, 128, 256]
        model.num_queries = 20
        model.encoder.num_layers = model.decoder.num_layers = 1
    model = build(cfg)
    model.init_weights()  # some parameters have no values before
    return model


def through_the_extension(value, shapes, places, weights):
    """The path that mmcv takes on a GPU, with the arguments of that on a CPU."""
    starts = shapes.prod(1).cumsum(0) - shapes.prod(1)
    function = attention.MultiScaleDeformableAttnFunction
    return function.apply(value, shapes, starts, places, weights, 64)


def train_and_predict(model, batch):
    """Loss, gradients and predictions."""
    torch.manual_seed(0)  # dropout, and the noise of DINO
    model = copy.deepcopy(model)  # training changes BatchNorm's statistics
    model.train()
    data = model.data_preprocessor(copy.deepcopy(batch), training=True)
    loss, _ = model.parse_losses(model(**data, mode='loss'))
    loss.backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    model.eval()
    with torch.no_grad():
        predictions = [x.pred_instances for x in model.test_step(copy.deepcopy(batch))]
    return loss, grads, predictions


def labelled_boxes(instances):
    """Boxes that are far from each other if their labels differ."""
    labels = 10000 * instances.labels[:, None]
    return torch.cat([instances.bboxes, labels], dim=1).double()


@needs_stand_in
@pytest.mark.parametrize('name', CONFIGS, ids=lambda name: name.split('/')[0])
def test_training_and_predictions_are_those_of_mmcv_s_own_path(name, monkeypatch):
    from mmdet.testing import demo_mm_inputs

    model = small_model(name)
    batch = demo_mm_inputs(2, [(3, 64, 96), (3, 80, 64)], with_mask=True)
    expected = train_and_predict(model, batch)
    spies = [mock.Mock(wraps=getattr(attention.ext_module, op)) for op in OPS]
    for op, spy in zip(OPS, spies):
        monkeypatch.setattr(attention.ext_module, op, spy)
    monkeypatch.setattr(
        attention, 'multi_scale_deformable_attn_pytorch', through_the_extension
    )
    found = train_and_predict(model, batch)
    # In training and in prediction.
    layers = CONFIGS[name]
    assert [spy.call_count for spy in spies] == [2 * layers, layers]
    torch.testing.assert_close(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for key, grad in found[1].items():
        torch.testing.assert_close(grad, expected[1][key], rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(found[2], expected[2]):
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-5)
        # Predictions of nearly the same score may change places.
        distances = torch.cdist(labelled_boxes(ours), labelled_boxes(theirs), p=1)
        assert distances.amin(0).max() < 0.01
        assert distances.amin(1).max() < 0.01


@pytest.mark.parametrize('size', [16, 20])
def test_dyhead_convolves_levels_with_the_shifts_of_larger_ones(size, generator):
    from mmdet.models.necks import DyHead

    neck = DyHead(16, 16, 1)
    levels = [
        torch.randn(2, 16, size // 2**i, size // 2**i, generator=generator)
        for i in range(3)
    ]
    outputs = neck(levels)
    assert [x.shape for x in outputs] == [x.shape for x in levels]
    sum(x.sum() for x in outputs).backward()
    assert all(p.grad is not None for p in neck.parameters())
