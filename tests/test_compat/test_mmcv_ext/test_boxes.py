# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import math

import pytest
import torch

from mlla_mm.compat import mmcv_ext

from .shared import (
    DEVICES,
    HALF,
    extension,
    mmcv_ops,
    needs_compiled,
    needs_stand_in,
    random_boxes,
)


def plain_iou(a, b, offset):
    width = min(a[2], b[2]) - max(a[0], b[0]) + offset
    height = min(a[3], b[3]) - max(a[1], b[1]) + offset
    intersection = max(width, 0) * max(height, 0)
    area_a = (a[2] - a[0] + offset) * (a[3] - a[1] + offset)
    area_b = (b[2] - b[0] + offset) * (b[3] - b[1] + offset)
    return intersection / (area_a + area_b - intersection)


def plain_nms(boxes, scores, iou_threshold, offset):
    boxes, scores = boxes.tolist(), scores.tolist()
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if all(plain_iou(boxes[i], boxes[j], offset) <= iou_threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('iou_threshold', [0.0, 0.3, 0.7, 1.0])
def test_nms_follows_its_definition(iou_threshold, offset, device, generator):
    boxes = random_boxes(200, generator)
    scores = torch.rand(200, generator=generator)
    kept = mmcv_ext.nms(boxes.to(device), scores.to(device), iou_threshold, offset)
    assert kept.tolist() == plain_nms(boxes, scores, iou_threshold, offset)
    dets, indices = mmcv_ops.nms(boxes, scores, iou_threshold, offset=offset)
    assert indices.tolist() == kept.tolist()
    torch.testing.assert_close(dets[:, :4], boxes[indices])


def test_nms_offset_decides_touching_boxes():
    # 10 and 9 pixels wide with offset 0, 11 and 10 with offset 1.
    boxes = torch.tensor([[0.0, 0, 10, 0], [1, 0, 10, 0]])
    scores = torch.tensor([0.9, 0.8])
    assert mmcv_ext.nms(boxes, scores, 0.5, 0).tolist() == [0, 1]  # no area
    assert mmcv_ext.nms(boxes, scores, 0.5, 1).tolist() == [0]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('offset', [0, 1])
def test_nms_of_nothing(offset, device):
    boxes, scores = torch.zeros(0, 4, device=device), torch.zeros(0, device=device)
    kept = mmcv_ext.nms(boxes, scores, 0.5, offset)
    assert kept.shape == (0,)
    assert kept.dtype == torch.int64


@pytest.mark.parametrize('device', DEVICES)
def test_nms_keeps_the_first_of_equal_scores(device):
    boxes = torch.tensor([[50.0, 50, 60, 60], [0, 0, 10, 10]]).repeat(20, 1)
    kept = mmcv_ext.nms(boxes.to(device), torch.full((40,), 0.5, device=device), 0.5, 0)
    assert kept.tolist() == [0, 1]


@pytest.mark.parametrize('tenths', [1, 3, 6, 7, 9])
def test_nms_keeps_an_overlap_equal_to_the_threshold(tenths):
    # The shorter box covers exactly this part of the longer one. In float32 the IoU
    # equals the rounded threshold, which may lie below or above the decimal number.
    boxes = torch.tensor([[0.0, 0, 10, 1], [0, 0, tenths, 1]])
    scores = torch.tensor([0.9, 0.8])
    assert mmcv_ext.nms(boxes, scores, tenths / 10, 0).tolist() == [0, 1]


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', HALF)
def test_nms_in_half_precision(dtype, device, generator):
    boxes = random_boxes(50, generator).to(dtype)
    scores = (torch.randperm(50, generator=generator) / 64).to(dtype)
    kept = mmcv_ext.nms(boxes.to(device), scores.to(device), 0.5, 1)
    assert kept.tolist() == plain_nms(boxes.float(), scores.float(), 0.5, 1)


def plain_soft_nms(boxes, scores, iou_threshold, sigma, min_score, method, offset):
    left = dict(enumerate(scores.tolist()))
    boxes = boxes.tolist()
    kept, kept_scores = [], []
    while left:
        best = max(left, key=left.get)
        kept.append(best)
        kept_scores.append(left.pop(best))
        for i in list(left):
            iou = plain_iou(boxes[best], boxes[i], offset)
            if method == 'gaussian':
                left[i] *= math.exp(-(iou**2) / sigma)
            elif iou >= iou_threshold:
                left[i] *= 1 - iou if method == 'linear' else 0
            if left[i] < min_score:
                del left[i]
    return kept, kept_scores


METHODS = ['naive', 'linear', 'gaussian']


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('min_score', [0.0, 0.05, 0.3])
def test_soft_nms_follows_its_definition(min_score, method, offset, generator):
    boxes = random_boxes(100, generator)
    scores = torch.rand(100, generator=generator)
    settings = (0.3, 0.5, min_score, method, offset)
    dets, indices = mmcv_ops.soft_nms(boxes, scores, *settings)
    kept, kept_scores = plain_soft_nms(boxes, scores, *settings)
    if min_score == 0 and method == 'naive':
        # The suppressed ones stay with score 0, in no particular order.
        number = sum(score > 0 for score in kept_scores)
        assert len(indices) == len(boxes)
        assert (dets[number:, 4] == 0).all()
        dets, indices = dets[:number], indices[:number]
        kept, kept_scores = kept[:number], kept_scores[:number]
    assert indices.tolist() == kept
    torch.testing.assert_close(dets[:, :4], boxes[indices])
    torch.testing.assert_close(dets[:, 4], torch.tensor(kept_scores))


def test_soft_nms_leaves_its_input_alone(generator):
    boxes = random_boxes(20, generator)
    scores = torch.rand(20, generator=generator)
    before = boxes.clone(), scores.clone()
    mmcv_ext.softnms(boxes, scores, boxes.new_empty(20, 5), 0.3, 0.5, 0.01, 1, 0)
    assert torch.equal(boxes, before[0])
    assert torch.equal(scores, before[1])


def test_soft_nms_of_nothing():
    boxes, scores, dets = torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, 5)
    kept = mmcv_ext.softnms(boxes, scores, dets, 0.3, 0.5, 0.01, 1, 0)
    assert kept.shape == (0,)
    assert kept.dtype == torch.int64


def plain_nms_match(boxes, scores, iou_threshold):
    groups = []
    left = sorted(range(len(boxes)), key=lambda i: -scores[i])
    while left:
        best = left[0]
        group = [best] + [
            i for i in left[1:] if plain_iou(boxes[best], boxes[i], 0) >= iou_threshold
        ]
        groups.append(group)
        left = [i for i in left if i not in group]
    return groups


@pytest.mark.parametrize('iou_threshold', [0.1, 0.5, 0.9])
def test_nms_match_follows_its_definition(iou_threshold, generator):
    boxes = random_boxes(100, generator)
    scores = torch.rand(100, generator=generator)
    groups = mmcv_ops.nms_match(torch.cat([boxes, scores[:, None]], 1), iou_threshold)
    expected = plain_nms_match(boxes.tolist(), scores.tolist(), iou_threshold)
    assert [group.tolist() for group in groups] == expected


def test_nms_match_drops_an_overlap_equal_to_the_threshold():
    dets = torch.tensor([[0.0, 0, 10, 1, 0.9], [0, 0, 5, 1, 0.8]])
    assert mmcv_ext.nms_match(dets, 0.5) == [[0, 1]]
    assert mmcv_ext.nms_match(dets, 0.6) == [[0], [1]]


@needs_stand_in
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', [torch.float64, *HALF])
@pytest.mark.parametrize('offset', [0, 1])
def test_overlaps_follow_their_definition(offset, dtype, device, generator):
    boxes, others = random_boxes(20, generator), random_boxes(30, generator)
    boxes, others = boxes.to(device, dtype), others.to(device, dtype)
    found = mmcv_ops.bbox_overlaps(boxes, others, offset=offset)
    assert found.dtype == dtype
    assert found.shape == (20, 30)
    plain = [[plain_iou(a, b, offset) for b in others.tolist()] for a in boxes.tolist()]
    expected = torch.tensor(plain, dtype=torch.float64)
    # Only the result is rounded.
    tolerance = dict(rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(found.double().cpu(), expected, **tolerance)
    pairs = mmcv_ops.bbox_overlaps(boxes, others[:20], aligned=True, offset=offset)
    torch.testing.assert_close(pairs, found.diagonal())


def test_overlaps_over_the_first_box():
    boxes = torch.tensor([[0.0, 0, 10, 10]])
    others = torch.tensor([[5.0, 0, 100, 100], [-9, -9, 30, 30], [20, 20, 30, 30]])
    assert mmcv_ops.bbox_overlaps(boxes, others, mode='iof').tolist() == [[0.5, 1, 0]]
    pairs = boxes.expand(3, 4), others
    assert mmcv_ops.bbox_overlaps(*pairs, 'iof', aligned=True).tolist() == [0.5, 1, 0]


@needs_compiled
@pytest.mark.compiled_mmcv
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('iou_threshold', [0.1, 0.3, 0.5, 0.7])
def test_nms_equals_compiled(iou_threshold, offset, generator):
    # Whole pixels give many overlaps that equal a threshold. The scores are distinct:
    # compiled mmcv sorts with an unstable sort, ours keeps the first of equal scores.
    boxes = random_boxes(400, generator, size=20.0).round()
    scores = torch.randperm(400, generator=generator) / 400
    expected = extension().nms(boxes, scores, iou_threshold, offset)
    assert torch.equal(mmcv_ext.nms(boxes, scores, iou_threshold, offset), expected)


@needs_compiled
@pytest.mark.compiled_mmcv
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', range(3))
@pytest.mark.parametrize('min_score', [0.0, 0.05, 0.3])
def test_softnms_equals_compiled(min_score, method, offset, generator):
    boxes = random_boxes(200, generator, size=20.0).round()
    scores = torch.randint(1, 20, (200,), generator=generator) / 20
    settings = (0.3, 0.5, min_score, method, offset)
    dets, expected_dets = torch.zeros(2, 200, 5)
    kept = mmcv_ext.softnms(boxes, scores, dets, *settings)
    expected = extension().softnms(boxes, scores, expected_dets, *settings)
    torch.testing.assert_close(dets[: len(kept)], expected_dets[: len(expected)])
    # Gaussian weights may differ in the last bit, and with them the order of ties.
    assert sorted(kept.tolist()) == sorted(expected.tolist())
    if method != 2:
        assert torch.equal(kept, expected)


@needs_compiled
@pytest.mark.compiled_mmcv
@pytest.mark.parametrize('iou_threshold', [0.1, 0.3, 0.5, 0.7])
def test_nms_match_equals_compiled(iou_threshold, generator):
    boxes = random_boxes(200, generator, size=20.0).round()
    scores = torch.randperm(200, generator=generator) / 200
    dets = torch.cat([boxes, scores[:, None]], dim=1)
    expected = extension().nms_match(dets, iou_threshold)
    assert mmcv_ext.nms_match(dets, iou_threshold) == expected


@needs_compiled
@pytest.mark.compiled_mmcv
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('aligned', [False, True])
@pytest.mark.parametrize('mode', [0, 1])
def test_overlaps_equal_compiled(mode, aligned, offset, generator):
    boxes, others = random_boxes(40, generator), random_boxes(40, generator)
    found, expected = torch.empty(2, 40) if aligned else torch.empty(2, 40, 40)
    mmcv_ext.bbox_overlaps(boxes, others, found, mode, aligned, offset)
    extension().bbox_overlaps(boxes, others, expected, mode, aligned, offset)
    torch.testing.assert_close(found, expected)
