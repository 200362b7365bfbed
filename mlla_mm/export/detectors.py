# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""mmdet's detectors as programs for every image size, thresholds and NMS included.

mmdet's own post-processing branches on sizes and counts in Python, which a trace would
fix. Here the same steps are tensors alone. Networks, priors and box coders are mmdet's,
NMS and RoIAlign are torchvision's.

Importing this module needs mmdet.
"""

import math
from collections.abc import Sequence
from typing import Any, List, Optional, Tuple

import torch
from mmcv.ops import RoIAlign
from mmdet.models.dense_heads import RPNHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder, DistancePointBBoxCoder
from mmengine.config import ConfigDict
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

from ..compat.openmmlab import predicts_as
from ..models.float32_boxes import Float32RoIExtractor
from .errors import ExportError, require_prediction, unknown_prediction

Detections = Tuple[Tensor, Tensor, Tensor]
"""Boxes (K, 4), scores (K,) and labels (K,), best score first."""


def make_detector(model: nn.Module) -> nn.Module:
    """Make a program of a detector.

    It turns normalised and padded images (1, C, H, W), the limits (x, y, x, y) of boxes
    (4,) and a score threshold () into boxes (K, 4), scores (K,), labels (K,) and, if
    the detector has masks, their probabilities within the boxes (K, h, w). Boxes are
    ``(x1, y1, x2, y2)`` in pixels of the image.

    Args:
        model (nn.Module): A two-stage detector with an RPN, such as Faster, Mask and
            Cascade Mask R-CNN, or a one-stage detector such as RetinaNet and FCOS.

    Raises:
        ExportError: If the detector predicts in another way.
    """
    if predicts_as(model, TwoStageDetector) and model.with_rpn:
        return _TwoStage(model)
    if predicts_as(model, SingleStageDetector):
        return _OneStage(model)
    raise unknown_prediction(
        model, "mmdet's one-stage detectors and two-stage ones with an RPN"
    )


class _TwoStage(nn.Module):
    """Faster, Mask and Cascade R-CNN."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        head = model.roi_head
        require_prediction(model.rpn_head, RPNHead)
        require_prediction(head, StandardRoIHead, CascadeRoIHead)
        if head.with_shared_head:
            raise ExportError(
                'RoI heads with a shared_head are not exported. Export the backbone '
                "alone, with part 'backbone'."
            )
        self.model = model
        self.rpn = model.rpn_head
        # A cascade has lists of heads, the others one of each.
        self.extractors = _as_list(head.bbox_roi_extractor)
        self.heads = _as_list(head.bbox_head)
        self.mask_extractors = _as_list(
            head.mask_roi_extractor if head.with_mask else ()
        )
        self.mask_heads = _as_list(head.mask_head if head.with_mask else ())
        self.test_cfg = head.test_cfg
        for bbox_head in self.heads:
            require_prediction(bbox_head, BBoxHead)
            _require_usual_outputs(bbox_head)
        for mask_head in self.mask_heads:
            require_prediction(mask_head, FCNMaskHead)
        for extractor in (*self.extractors, *self.mask_extractors):
            _require_pooling(extractor)
        for part in (self.rpn, *self.heads):
            _require_coder(part.bbox_coder)
        for cfg in (self.rpn.test_cfg, self.test_cfg):
            _require_nms(cfg)

    def forward(
        self, images: Tensor, limits: Tensor, score_threshold: Tensor
    ) -> Tuple[Tensor, ...]:
        maps = self.model.extract_feat(images)
        boxes = self._proposals(maps, limits)
        boxes, scores = self._refine(maps, boxes, limits)
        found = self._select(boxes, scores, score_threshold)
        if not self.mask_heads:
            return found
        boxes, _, labels = found
        return (*found, self._masks(maps, boxes, labels))

    def _proposals(self, maps: Sequence[Tensor], limits: Tensor) -> Tensor:
        """The RPN's boxes (P, 4): the best of each level, and NMS on each level."""
        cfg = self.rpn.test_cfg
        found = []
        logits, deltas = self.rpn(maps)
        for level, (score, delta, prior) in enumerate(
            zip(logits, deltas, _priors(self.rpn, logits))
        ):
            score = _activate(self.rpn, _rows(score, self.rpn.cls_out_channels))
            # Slicing, other than top-k, takes all of fewer than there should be.
            score, best = score.flatten().sort(descending=True)
            if cfg.get('nms_pre', -1) > 0:
                score, best = score[: cfg.nms_pre], best[: cfg.nms_pre]
            prior, delta = prior[best], _rows(delta, 4)[best]
            found.append((prior, delta, score, torch.full_like(best, level)))
        prior, delta, scores, levels = map(torch.cat, zip(*found))
        boxes = _decode(self.rpn.bbox_coder, prior, delta, limits)
        boxes, scores, levels = _without_small(boxes, scores, levels, cfg)
        return boxes[_nms(boxes, scores, levels, cfg.nms)[: cfg.max_per_img]]

    def _refine(
        self, maps: Sequence[Tensor], boxes: Tensor, limits: Tensor
    ) -> Tuple[Tensor, Tensor]:
        """Boxes of every class (P, C, 4), or one for all (P, 1, 4), and scores (P, C).

        The logits of a cascade's stages are averaged. Each stage takes the boxes of the
        one before it.
        """
        logits: List[Tensor] = []
        for extractor, head in zip(self.extractors, self.heads):
            if logits:
                boxes = self._best_class(boxes, logits[-1])
            logit, delta = head(_extract(extractor, maps, boxes))
            logits.append(logit)
            per_class: Any = 1 if head.reg_class_agnostic else head.num_classes
            boxes = _decode(
                head.bbox_coder,
                boxes.repeat_interleave(per_class, dim=0),
                delta.reshape(-1, 4),
                limits,
            ).reshape(-1, per_class, 4)
        scores = torch.stack(logits).mean(0).softmax(-1)[:, :-1]
        return boxes, scores

    @staticmethod
    def _best_class(boxes: Tensor, logits: Tensor) -> Tensor:
        """The boxes (P, 4) of the classes with the best scores."""
        if boxes.shape[1] == 1:
            return boxes[:, 0]
        labels = logits[:, :-1].argmax(1)
        return boxes[torch.arange(labels.shape[0], device=labels.device), labels]

    def _select(
        self, boxes: Tensor, scores: Tensor, score_threshold: Tensor
    ) -> Detections:
        """What is above the threshold, after NMS of each class."""
        rows, labels = (scores > score_threshold).nonzero(as_tuple=True)
        scores = scores[rows, labels]
        boxes = boxes[:, 0][rows] if boxes.shape[1] == 1 else boxes[rows, labels]
        kept = _nms(boxes, scores, labels, self.test_cfg.nms)
        if self.test_cfg.max_per_img > 0:
            kept = kept[: self.test_cfg.max_per_img]
        return boxes[kept], scores[kept], labels[kept]

    def _masks(self, maps: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Probabilities (K, h, w) within boxes. Those of a cascade are averaged."""
        # Convolutions of some runtimes refuse an empty batch: one box more than there
        # are, which is left out afterwards.
        boxes = torch.cat([boxes, boxes.new_zeros(1, 4)])
        labels = torch.cat([labels, labels.new_zeros(1)])
        rows = torch.arange(labels.shape[0], device=labels.device)
        masks = []
        for extractor, head in zip(self.mask_extractors, self.mask_heads):
            mask = head(_extract(extractor, maps, boxes))
            masks.append(mask[:, 0] if head.class_agnostic else mask[rows, labels])
        return torch.stack(masks).sigmoid().mean(0)[:-1]


class _OneStage(nn.Module):
    """RetinaNet, FCOS and others whose head scores every prior of every level."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        head = model.bbox_head
        require_prediction(head, BaseDenseHead)
        _require_usual_outputs(head)
        _require_coder(head.bbox_coder)
        _require_nms(head.test_cfg)
        smallest = head.test_cfg.get('min_bbox_size', -1)
        if smallest > 0:
            raise ExportError(
                f'min_bbox_size = {smallest} of a one-stage detector is in pixels of '
                'the picture before it was resized, which an exported file does not '
                'see. Set model.test_cfg.min_bbox_size=0.'
            )
        self.model = model
        self.head = head

    def forward(
        self, images: Tensor, limits: Tensor, score_threshold: Tensor
    ) -> Detections:
        cfg = self.head.test_cfg
        outputs = self.head(self.model.extract_feat(images))
        found = []
        for prior, logit, delta, *factor in zip(
            _priors(self.head, outputs[0]), *outputs
        ):
            scores = _activate(self.head, _rows(logit, self.head.cls_out_channels))
            rows, labels = (scores > score_threshold).nonzero(as_tuple=True)
            # Without nms_pre, mmdet slices by -1: all but the worst.
            number = cfg.get('nms_pre', -1)
            score, best = scores[rows, labels].sort(descending=True)
            score, best = score[:number], best[:number]
            rows, labels = rows[best], labels[best]
            if factor:  # FCOS's centerness, after the choice
                score = score * _rows(factor[0], 1).flatten()[rows].sigmoid()
            found.append((prior[rows], _rows(delta, 4)[rows], score, labels))
        prior, delta, scores, labels = map(torch.cat, zip(*found))
        boxes = _decode(self.head.bbox_coder, prior, delta, limits)
        boxes, scores, labels = _without_small(boxes, scores, labels, cfg)
        kept = _nms(boxes, scores, labels, cfg.nms)[: cfg.max_per_img]
        return boxes[kept], scores[kept], labels[kept]


def _priors(head: Any, maps: Sequence[Tensor]) -> List[Tensor]:
    """Anchors (n, 4) or points (n, 2) of every level."""
    sizes = [x.shape[-2:] for x in maps]
    return head.prior_generator.grid_priors(
        sizes, dtype=maps[0].dtype, device=maps[0].device
    )


def _rows(x: Tensor, channels: int) -> Tensor:
    """(1, A * channels, H, W) -> (H * W * A, channels)."""
    return x[0].permute(1, 2, 0).reshape(-1, channels)


def _activate(head: Any, logits: Tensor) -> Tensor:
    """Logits (n, C) or, with a background class at the end, (n, C + 1) to scores."""
    return logits.sigmoid() if head.use_sigmoid_cls else logits.softmax(-1)[:, :-1]


def _decode(coder: Any, priors: Tensor, deltas: Tensor, limits: Tensor) -> Tensor:
    """Boxes (n, 4) within the image."""
    if isinstance(coder, DeltaXYWHBBoxCoder):
        boxes = _move(coder, priors, deltas)
    else:
        boxes = coder.decode(priors, deltas)  # a max_shape would be fixed in a trace
    return torch.minimum(boxes.clamp(min=0), limits) if coder.clip_border else boxes


def _move(coder: Any, boxes: Tensor, deltas: Tensor) -> Tensor:
    """Boxes (n, 4) moved and stretched by (dx, dy, dw, dh), as in R-CNN.

    mmdet's function asks in Python whether there are any boxes.
    """
    deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    shift, stretch = deltas.chunk(2, -1)
    low, high = boxes.chunk(2, -1)
    size = high - low
    centre = (low + high) * 0.5 + size * shift
    # mmdet's bound, 16 / 1000, is an argument that no detector sets.
    bound = abs(math.log(16 / 1000))
    half = size * stretch.clamp(-bound, bound).exp() * 0.5
    return torch.cat([centre - half, centre + half], -1)


def _without_small(
    boxes: Tensor, scores: Tensor, groups: Tensor, cfg: ConfigDict
) -> Detections:
    """Leave out boxes that are not wider and higher than ``min_bbox_size``."""
    smallest = cfg.get('min_bbox_size', -1)
    if smallest < 0:
        return boxes, scores, groups
    kept = (boxes[:, 2:] - boxes[:, :2] > smallest).all(1)
    return boxes[kept], scores[kept], groups[kept]


def _nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, cfg: Optional[ConfigDict]
) -> Tensor:
    """Places (k,) of the boxes that NMS keeps in each group, best score first.

    As mmcv's ``batched_nms``, it moves the groups apart. ``class_agnostic`` leaves them
    where they are, if there are fewer boxes than ``split_thr``. None keeps all boxes.
    """
    if cfg is None:
        return scores.argsort(descending=True)
    # There may be no box.
    largest = torch.cat([boxes.flatten(), boxes.new_zeros(1)]).max()
    shift = groups.to(boxes) * (largest + 1)
    if cfg.get('class_agnostic', False):
        # A Python number would be fixed in a trace.
        number = torch.ones_like(groups).sum()
        shift = shift * (number >= cfg.get('split_thr', 10000))
    iou_threshold = cfg.get('iou_threshold', cfg.get('iou_thr'))
    return nms(boxes + shift[:, None], scores, iou_threshold)


def _extract(extractor: Any, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """Features (K, C, h, w) of boxes (K, 4), each from the level of its size."""
    maps = maps[: extractor.num_inputs]
    rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], 1)
    levels = extractor.map_roi_levels(rois, len(maps))
    places, features = [], []
    for level, (layer, x) in enumerate(zip(extractor.roi_layers, maps)):
        place = (levels == level).nonzero()[:, 0]
        places.append(place)
        features.append(
            roi_align(
                x,
                rois[place],
                layer.output_size,
                layer.spatial_scale,
                layer.sampling_ratio,
                layer.aligned,
            )
        )
    return torch.cat(features)[torch.cat(places).argsort()]


def _as_list(parts: Any) -> nn.ModuleList:
    if isinstance(parts, (nn.ModuleList, tuple)):
        return nn.ModuleList(parts)
    return nn.ModuleList([parts])


def _require_usual_outputs(head: Any) -> None:
    """Refuse heads without scores or deltas, or whose loss makes the scores."""
    loss = getattr(head, 'loss_cls', None)  # an SSD has none
    if any(
        getattr(loss, f'custom_{name}', False)
        for name in ('cls_channels', 'activation')
    ):
        raise ExportError(
            f'{type(loss).__name__} is not exported: it makes scores of its own from '
            f'the outputs of {type(head).__name__}. Export the backbone alone, with '
            "part 'backbone'."
        )
    for option in ('with_cls', 'with_reg'):
        if not getattr(head, option, True):
            raise ExportError(
                f'{type(head).__name__} with {option}=False is not exported. Export '
                "the backbone alone, with part 'backbone'."
            )


def _require_pooling(extractor: Any) -> None:
    """Refuse all but the average of RoIAlign, from the level of a box's size."""
    if type(extractor) not in (SingleRoIExtractor, Float32RoIExtractor):
        raise unknown_prediction(extractor, "mmdet's SingleRoIExtractor")
    for layer in extractor.roi_layers:
        mode = getattr(layer, 'pool_mode', None)
        if type(layer) is not RoIAlign or mode != 'avg':
            raise ExportError(
                f'{type(layer).__name__} with pool_mode {mode!r} is not exported, as '
                "RoIAlign with pool_mode 'avg' is. Export the backbone alone, with "
                "part 'backbone'."
            )


def _require_coder(coder: Any) -> None:
    if type(coder) not in (DeltaXYWHBBoxCoder, DistancePointBBoxCoder):
        raise unknown_prediction(
            coder, "mmdet's DeltaXYWHBBoxCoder and DistancePointBBoxCoder"
        )
    if getattr(coder, 'add_ctr_clamp', False):
        raise ExportError(
            'DeltaXYWHBBoxCoder with add_ctr_clamp=True is not exported. Export the '
            "backbone alone, with part 'backbone'."
        )


def _require_nms(cfg: ConfigDict) -> None:
    options = dict(cfg.nms or {})
    kind = options.pop('type', 'nms')
    if kind != 'nms':
        raise ExportError(
            f"NMS of type '{kind}' is not exported. Set nms.type='nms' in the model's "
            'test_cfg.'
        )
    for name in ('iou_threshold', 'iou_thr', 'class_agnostic', 'split_thr'):
        options.pop(name, None)
    usual = dict(offset=0, score_threshold=0, max_num=-1)
    for name, value in options.items():
        if value != usual.get(name):
            raise ExportError(
                f'NMS with {name} = {value} is not exported. Leave {name} out of nms '
                "in the model's test_cfg."
            )
