# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Boxes under mixed precision: levels, coordinates, anchors and proposals."""

import math

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import DefaultScope

from ..nano import NANO, build

pytest.importorskip('mmdet')
from mmcv.ops import RoIAlign  # noqa: E402
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor  # noqa: E402
from mmdet.models.task_modules import DeltaXYWHBBoxCoder, MaxIoUAssigner  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmdet.structures.mask import BitmapMasks  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402
from torchvision.ops import roi_align  # noqa: E402

from mlla_mm.models.float32_boxes import (  # noqa: E402
    Float32RoIExtractor,
    Float32RPNHead,
)

HALF = (torch.float16, torch.bfloat16)
STRIDES = (4, 8, 16, 32)
META = dict(
    dict.fromkeys(
        ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), (800, 1333)
    ),
    scale_factor=(1.0, 1.0),
)


def extractor(kind=Float32RoIExtractor, strides=STRIDES):
    layer = ConfigDict(type='RoIAlign', output_size=7, sampling_ratio=0)
    return kind(layer, out_channels=3, featmap_strides=strides)


def feature_maps(dtype=torch.float32, images=1, strides=STRIDES):
    generator = torch.Generator().manual_seed(0)
    sizes = ((math.ceil(800 / s), math.ceil(1344 / s)) for s in strides)
    return [
        torch.randn(images, 3, *size, generator=generator).to(dtype) for size in sizes
    ]


def squares():
    """Boxes of 16 to 1300 pixels, whose sides are no powers of 2 and whose corners
    bfloat16 and float16 do not have."""
    sides = torch.cat([torch.arange(16.37, 1300, 7.3), torch.arange(257.1, 447.5, 1.9)])
    first = torch.linspace(0.3, 31.3, len(sides))
    return torch.stack([0 * first, first, first, first + sides, first + sides], dim=1)


def fpn_levels(rois):
    """FPN's rule, in float64."""
    widths, heights = (rois[:, 3:] - rois[:, 1:3]).double().T
    return [
        min(max(math.floor(math.log2(math.sqrt(w * h) / 56)), 0), 3)
        for w, h in zip(widths.tolist(), heights.tolist())
    ]


@pytest.mark.parametrize('dtype', HALF)
def test_levels_and_coordinates_of_half_precision_maps(dtype):
    """torchvision pools each box from its level of FPN's, all in float32."""
    maps, rois = feature_maps(dtype), squares()
    pooled = extractor()(maps, rois)
    assert pooled.dtype == dtype
    assert set(fpn_levels(rois)) == {0, 1, 2, 3}
    for level, roi, features in zip(fpn_levels(rois), rois, pooled):
        expected = roi_align(
            maps[level].float(), roi[None], 7, 1 / STRIDES[level], 0, aligned=True
        )
        torch.testing.assert_close(
            features.float(), expected[0], rtol=torch.finfo(dtype).eps, atol=1e-5
        )


@pytest.mark.parametrize('dtype', HALF)
def test_gradient_of_half_precision_maps(dtype):
    """It is that of float32 maps with the same values, rounded once."""
    rois, gradients = squares(), []
    for maps in (feature_maps(dtype), [m.float() for m in feature_maps(dtype)]):
        for feature in maps:
            feature.requires_grad_()
        extractor()(maps, rois).float().square().sum().backward()
        gradients.append([feature.grad.float() for feature in maps])
    for got, expected in zip(*gradients):
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            got / scale, expected / scale, rtol=0, atol=4 * torch.finfo(dtype).eps
        )


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('factor', [None, 1.5])
@pytest.mark.parametrize('strides', [STRIDES, (8,)])
@pytest.mark.parametrize('number', [0, 40])
def test_maps_of_full_precision_are_mmdets(number, strides, factor, dtype):
    """Outputs and gradients to the bit, also where levels get no box."""
    rois = squares()[:number]
    rois[::2, 0] = 1
    results = []
    for kind in (Float32RoIExtractor, SingleRoIExtractor):
        maps = feature_maps(dtype, images=2, strides=strides)
        for feature in maps:
            feature.requires_grad_()
        pooled = extractor(kind, strides)(maps, rois, factor)
        unused = sum(0 * feature.sum() for feature in maps)
        (pooled.square().sum() + unused).backward()
        results.append([pooled.detach(), *(feature.grad for feature in maps)])
    assert results[0][0].dtype == dtype
    assert all(map(torch.equal, *results))


def rpn(kind=Float32RPNHead):
    """One level of stride 64: deltas as in training, logits of distinct values."""
    torch.manual_seed(0)
    test_cfg = dict(
        nms_pre=-1,
        max_per_img=10_000,
        nms=dict(type='nms', iou_threshold=1.0),
        min_bbox_size=0,
    )
    with DefaultScope.overwrite_default_scope('mmdet'):
        head = kind(
            in_channels=4,
            feat_channels=4,
            anchor_generator=dict(
                type='AnchorGenerator', scales=[8], ratios=[0.5, 1.0, 2.0], strides=[64]
            ),
            test_cfg=ConfigDict(test_cfg),
        )
    torch.nn.init.normal_(head.rpn_conv.weight, std=0.3)
    torch.nn.init.normal_(head.rpn_reg.weight, std=0.1)
    torch.nn.init.normal_(head.rpn_cls.weight, std=1)
    return head


def decode(deltas):
    """Boxes (N, 4) of deltas (12, H, W), by the definition in float64.

    Anchor a at (i, j) has its centre at 64 (j, i), the area 512^2 and the ratio
    h / w of 0.5, 1 or 2.
    """
    height, width = deltas.shape[1:]
    boxes = []
    dx, dy, dw, dh = deltas.double().view(3, 4, height, width).unbind(1)
    for a, ratio in enumerate((0.5, 1.0, 2.0)):
        w, h = 512 / ratio**0.5, 512 * ratio**0.5
        x = 64 * torch.arange(width).double() + dx[a] * w
        y = 64 * torch.arange(height).double()[:, None] + dy[a] * h
        w, h = w * dw[a].exp(), h * dh[a].exp()
        x1, x2 = ((x + sign * w / 2).clamp(0, 1333) for sign in (-1, 1))
        y1, y2 = ((y + sign * h / 2).clamp(0, 800) for sign in (-1, 1))
        boxes.append(torch.stack([x1, y1, x2, y2], dim=-1).view(-1, 4))
    return torch.cat(boxes)


def test_proposals_are_decoded_in_float32():
    """Under autocast, boxes are those of the deltas to float32's rounding."""
    head = rpn()
    outputs = {}
    for name in ('rpn_cls', 'rpn_reg'):
        getattr(head, name).register_forward_hook(
            lambda module, inputs, output, name=name: outputs.update({name: output})
        )
    features = [torch.randn(1, 4, 13, 21)]
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        scores, deltas = head(features)
        (proposals,) = head.predict_by_feat(scores, deltas, batch_img_metas=[META])
    assert outputs['rpn_reg'].dtype == torch.bfloat16  # the convolutions are not kept
    assert proposals.bboxes.dtype == proposals.scores.dtype == torch.float32
    # Float32 boxes of distinct coordinates overlap by less than 1: NMS drops none.
    expected = decode(outputs['rpn_reg'][0].float())
    assert len(proposals) == len(expected) == 819
    distance = torch.cdist(proposals.bboxes.double(), expected, p=math.inf)
    assert distance.min(0)[0].max() < 1e-3
    assert distance.min(1)[0].max() < 1e-3
    ranks = outputs['rpn_cls'].double().sigmoid().flatten().sort(descending=True)[0]
    torch.testing.assert_close(proposals.scores.double(), ranks, rtol=1e-6, atol=0)


def mask_rcnn():
    cfg = Config.fromfile(NANO['mmdet'])
    cfg.model.test_cfg.rcnn.score_thr = 0
    cfg.model.test_cfg.rpn.nms_pre = 20  # of each level
    model = build(cfg)
    torch.nn.init.normal_(model.rpn_head.rpn_reg.weight, std=0.02)
    return model


def sample():
    """An image with one object of 300 pixels and one of 700."""
    boxes = torch.tensor([[20.3, 30.7, 320.3, 330.7], [601.3, 40.1, 1301.3, 740.1]])
    masks = torch.zeros(2, 800, 1333, dtype=torch.uint8)
    masks[0, 31:331, 21:321] = 1
    masks[1, 40:740, 602:1302] = 1
    instances = InstanceData(
        bboxes=boxes,
        labels=torch.tensor([1, 2]),
        masks=BitmapMasks(masks.numpy(), 800, 1333),
    )
    found = DetDataSample(metainfo=META)
    found.gt_instances, found.ignored_instances = instances, instances[:0]
    return found


@pytest.fixture
def boxes_seen(monkeypatch):
    """Boxes that are decoded or assigned to objects, in their order."""
    seen = []
    decode, assign = DeltaXYWHBBoxCoder.decode, MaxIoUAssigner.assign

    def record_decoded(*args, **kwargs):
        seen.append(decode(*args, **kwargs))
        return seen[-1]

    def record_assigned(assigner, predictions, *args, **kwargs):
        seen.append(predictions.priors)
        return assign(assigner, predictions, *args, **kwargs)

    monkeypatch.setattr(DeltaXYWHBBoxCoder, 'decode', record_decoded)
    monkeypatch.setattr(MaxIoUAssigner, 'assign', record_assigned)
    return seen


@pytest.fixture
def boxes_pooled(monkeypatch):
    """Boxes that RoIAlign gets, with the stride of the map and the size of the bins."""
    seen = []
    forward = RoIAlign.forward

    def record(layer, features, rois):
        seen.append((round(1 / layer.spatial_scale), layer.output_size, rois))
        return forward(layer, features, rois)

    monkeypatch.setattr(RoIAlign, 'forward', record)
    return seen


@pytest.mark.parametrize('mode', ['loss', 'predict'])
def test_mask_rcnn_under_autocast(mode, boxes_seen, boxes_pooled):
    """All boxes are in float32, and pooled from their levels by both heads."""
    model = mask_rcnn().train(mode == 'loss')
    image = torch.randn(1, 3, 800, 1344)
    scope = DefaultScope.overwrite_default_scope('mmdet')
    with scope, torch.autocast('cpu', torch.bfloat16):
        if mode == 'loss':
            loss, _ = model.parse_losses(model.loss(image, [sample()]))
            assert loss.isfinite()
            assert len(boxes_seen) == 3  # anchors, proposals decoded and assigned
        else:
            with torch.no_grad():
                (result,) = model.predict(image, [sample()])
            boxes_seen.append(result.pred_instances.bboxes)
            assert len(boxes_seen) == 3  # proposals, detections, after NMS
    for boxes in (*boxes_seen, *(rois for *_, rois in boxes_pooled)):
        assert boxes.dtype == torch.float32
        assert not torch.equal(boxes.bfloat16().float(), boxes)  # nor rounded before
    assert {bins for _, bins, _ in boxes_pooled} == {(7, 7), (14, 14)}
    assert len({stride for stride, *_ in boxes_pooled}) > 2
    for stride, _, rois in boxes_pooled:
        assert {STRIDES[level] for level in fpn_levels(rois)} == {stride}
