# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Boxes: NMS, soft NMS, the groups that NMS makes, overlaps."""

from typing import List

import torch
from torch import Tensor

from .common import as_float32, at_least_float32, torchvision_ops


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Non-maximum suppression.

    Args:
        boxes (Tensor): Boxes ``(x1, y1, x2, y2)`` in pixels, of shape (N, 4).
        scores (Tensor): Scores of shape (N, ).
        iou_threshold (float): A box is dropped if its IoU with a better box is larger.
        offset (int): 1 if a box is ``x2 - x1 + 1`` pixels wide, 0 if ``x2 - x1``.

    Returns:
        Tensor: Indices of the kept boxes, int64, of shape (K, ), best score first.
    """
    boxes = at_least_float32(boxes)
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    scores = scores.to(boxes.dtype)
    return torchvision_ops().nms(boxes, scores, as_float32(iou_threshold))


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft NMS (Bodla et al., ICCV 2017): overlapping boxes get lower scores.

    Boxes are rearranged as in compiled mmcv: the best one is swapped to the front, and
    the last one takes the place of a dropped one. So boxes with equal scores are taken
    in the same order.

    Args:
        boxes (Tensor): Boxes ``(x1, y1, x2, y2)`` in pixels, of shape (N, 4), CPU.
        scores (Tensor): Scores of shape (N, ).
        dets (Tensor): Output of shape (N, 5). Its first K rows become the kept boxes
            and their new scores.
        iou_threshold (float): Methods 0 and 1 reduce a score from this IoU on.
        sigma (float): Width of the Gaussian of method 2.
        min_score (float): A box is dropped if its score falls below this.
        method (int): 0 sets the score to 0, 1 multiplies it by ``1 - IoU``, and 2 by
            ``exp(-IoU^2 / sigma)``.
        offset (int): 1 if a box is ``x2 - x1 + 1`` pixels wide, 0 if ``x2 - x1``.

    Returns:
        Tensor: Indices of the kept boxes, int64, of shape (K, ).
    """
    boxes, scores = at_least_float32(boxes), at_least_float32(scores).clone()
    min_score = as_float32(min_score)
    order = torch.arange(len(boxes), device=boxes.device)
    done = 0
    while done < len(order):
        best = done + int(scores[done:].argmax())
        order[[done, best]] = order[[best, done]]
        scores[[done, best]] = scores[[best, done]]
        dets[done, :4] = boxes[order[done]]
        dets[done, 4] = scores[done]
        done += 1
        overlaps = _overlaps(boxes[order[done - 1]], boxes[order[done:]], offset)
        decay = _softnms_decay(overlaps, as_float32(iou_threshold), sigma, method)
        scores[done:] *= decay
        kept = done + _fill_from_the_end(~(scores[done:] < min_score))
        order = torch.cat([order[:done], order[kept]])
        scores = torch.cat([scores[:done], scores[kept]])
    return order


def _softnms_decay(
    overlaps: Tensor, iou_threshold: float, sigma: float, method: int
) -> Tensor:
    """Factors that soft NMS multiplies the scores by, of shape (N, )."""
    if method == 2:
        return torch.exp(-(overlaps * overlaps) / sigma)
    reduced = 1 - overlaps if method == 1 else torch.zeros_like(overlaps)
    return torch.where(overlaps >= iou_threshold, reduced, torch.ones_like(overlaps))


def _fill_from_the_end(keep: Tensor) -> Tensor:
    """Order of the entries after each dropped one was replaced by the last one.

    Args:
        keep (Tensor): Whether an entry stays, bool, of shape (N, ).

    Returns:
        Tensor: Indices of the K entries that stay, of shape (K, ).
    """
    number = int(keep.sum())
    order = torch.arange(number, device=keep.device)
    order[~keep[:number]] = number + keep[number:].nonzero()[:, 0].flip(0)
    return order


def nms_match(dets: Tensor, iou_threshold: float) -> List[List[int]]:
    """Group each box that NMS keeps with the boxes that are dropped for it.

    Other than :func:`nms`, it also drops a box whose IoU equals the threshold.

    Args:
        dets (Tensor): Boxes ``(x1, y1, x2, y2)`` in pixels and scores, of shape (N, 5).
        iou_threshold (float): A box is dropped if its IoU with a better box is as
            large.

    Returns:
        List[List[int]]: Indices of each group, best score first.
    """
    dets = at_least_float32(dets)
    iou_threshold = as_float32(iou_threshold)
    left = dets[:, 4].sort(descending=True, stable=True).indices
    groups = []
    while len(left):
        best, others = left[:1], left[1:]
        overlaps = _overlaps(dets[best, :4], dets[others, :4], 0)
        dropped = overlaps >= iou_threshold
        groups.append(torch.cat([best, others[dropped]]).tolist())
        left = others[~dropped]
    return groups


def bbox_overlaps(
    bboxes1: Tensor,
    bboxes2: Tensor,
    ious: Tensor,
    mode: int,
    aligned: bool,
    offset: int,
) -> None:
    """Intersection over union (IoU), or over the first box (IoF).

    Args:
        bboxes1 (Tensor): Boxes ``(x1, y1, x2, y2)`` in pixels, of shape (M, 4).
        bboxes2 (Tensor): Boxes of shape (N, 4).
        ious (Tensor): Output of shape (M, N), or (M, ) if ``aligned``.
        mode (int): 0 divides the intersection by the union, 1 by the area of the first
            box.
        aligned (bool): Whether each box is compared only with the one of the same
            index. Then M equals N.
        offset (int): 1 if a box is ``x2 - x1 + 1`` pixels wide, 0 if ``x2 - x1``.
    """
    bboxes1, bboxes2 = at_least_float32(bboxes1), at_least_float32(bboxes2)
    if not aligned:
        bboxes1 = bboxes1[:, None]
    ious.copy_(_overlaps(bboxes1, bboxes2, offset, mode))


def _overlaps(boxes: Tensor, others: Tensor, offset: int, mode: int = 0) -> Tensor:
    """IoU (mode 0) or IoF (mode 1) of boxes (..., 4), of shape (...)."""
    top_left = torch.max(boxes[..., :2], others[..., :2])
    bottom_right = torch.min(boxes[..., 2:], others[..., 2:])
    intersection = (bottom_right - top_left + offset).clamp(min=0).prod(-1)
    area = (boxes[..., 2:] - boxes[..., :2] + offset).prod(-1)
    if mode == 1:
        return intersection / area
    areas = (others[..., 2:] - others[..., :2] + offset).prod(-1)
    return intersection / (area + areas - intersection)
