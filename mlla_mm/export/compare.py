# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Exported files against the models that they were made of."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from mmengine.structures import BaseDataElement
from torch import Tensor

from .errors import ExportError
from .exported import ExportedModel
from .formats import MIN_SIDE, Runner, example_inputs
from .parts import Part, channels_of

TOLERANCES = dict(
    boxes=0.01, scores=1e-4, masks=0.01, maps=1e-4, labels=1e-4, pixels=1e-3
)
"""Largest allowed differences.

- 'boxes': in pixels.
- 'scores': probabilities.
- 'masks': pixels that differ, of those of either mask. A pixel of a probability counts
  as that part of one.
- 'maps': feature maps and logits, divided by the largest value.
- 'labels': where they differ, the logits of the two classes, divided likewise.
- 'pixels': those whose labels differ between an image alone and in a batch.
"""

#: The threshold for detections is set where so many are above it.
_DETECTIONS = (10, 40)

Shape = Tuple[int, int]


def other_shapes(shape: Shape) -> Tuple[Shape, Shape]:
    """A larger and a smaller size than the one of the trace, both with odd sides."""
    height, width = shape
    larger = height + 45, width + 26
    return larger, (max(MIN_SIDE, height // 2 + 1), max(MIN_SIDE, width - 7))


def compare_outputs(part: Part, run: Runner, shape: Shape) -> Dict[str, float]:
    """Compare a file with the module that was traced, at two other sizes.

    Args:
        part (Part): What was exported, and is no whole model.
        run (Callable): Runs the file.
        shape (tuple[int, int]): The size of the trace.

    Returns:
        dict[str, float]: The largest difference, divided by the largest value.

    Raises:
        ExportError: If the outputs differ by more than :data:`TOLERANCES`.
    """
    largest = 0.0
    for batch, size in zip((1, 3), other_shapes(shape)):
        (images,) = example_inputs(part, batch, *size)
        with torch.no_grad():
            expected, actual = part.module(images), run(images)
        for name, one, other in zip(part.outputs, expected, actual):
            found = _relative(one, other)
            largest = max(largest, _require(name, found, 'maps', size))
    return {'maps': largest}


def compare_predictions(
    model: Any, exported: ExportedModel, shape: Shape, has_settings: bool = True
) -> Dict[str, float]:
    """Compare a whole model's file with the model, from images to predictions.

    Both get pictures of two other sizes than the one of the trace. A detector is
    compared three times: with no detection, with its own score threshold, and with a
    threshold that leaves some, whose masks are probabilities. The label maps of a
    segmentor are compared at two sizes.

    Args:
        model (BaseModel): The model in evaluation mode.
        exported (ExportedModel): Its file.
        shape (tuple[int, int]): The size of the trace.
        has_settings (bool): Whether the file takes the settings of the part. A
            torch-export program does not. Defaults to True.

    Returns:
        dict[str, float]: The largest difference of each kind in :data:`TOLERANCES`.

    Raises:
        ExportError: If the predictions differ by more than :data:`TOLERANCES`.
    """
    largest: Dict[str, float] = {}
    for seed, size in enumerate(other_shapes(shape)):
        image = _image(model, seed, size)
        if exported.task == 'detection':
            found = _compare_detections(model, exported, image)
        elif exported.task == 'segmentation':
            found = _compare_label_maps(model, exported, image, has_settings)
        else:
            found = _compare_classes(model, exported, image)
        for kind, value in found.items():
            largest[kind] = max(largest.get(kind, 0), value)
    if exported.task != 'detection':  # which takes one image
        _require_batches(model, exported, shape)
    return largest


def _require_batches(model: Any, exported: ExportedModel, shape: Shape) -> None:
    """Refuse a file in which an image's outputs depend on the others of its batch."""
    size, _ = other_shapes(shape)
    settings = []
    if exported.task == 'segmentation':
        settings.append(torch.zeros(2, dtype=torch.long))
    images = [_image(model, seed, size)[None].float() for seed in range(3)]
    together = exported.run(torch.cat(images), *settings)
    alone = map(torch.cat, zip(*(exported.run(x, *settings) for x in images)))
    for name, one, other in zip(exported.outputs, alone, together):
        if name == 'labels' and one.shape == other.shape:
            # Rounding may decide a few.
            found = float((one != other).float().mean())
            _require('labels of a batch', found, 'pixels', size)
        else:
            _require(f'{name} of a batch', _relative(one, other), 'maps', size)


def _image(model: Any, seed: int, size: Shape) -> Tensor:
    """Patches of colours and noise as a picture (C, H, W), uint8.

    Each channel is darker than the one before it. The mean over noise alone would be
    almost the same whatever the order of the channels and the pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    channels = channels_of(model)
    height, width = size
    coarse = torch.rand(1, channels, height // 8, width // 8, generator=generator)
    patches = F.interpolate(coarse, size, mode='nearest')[0]
    noise = torch.rand(patches.shape, generator=generator)
    largest = torch.linspace(255, 100, channels)[:, None, None]
    return (largest * (0.7 * patches + 0.3 * noise)).byte()


def predict(
    model: Any, task: str, image: Tensor, ori_shape: Optional[Shape] = None
) -> Any:
    """What a model predicts for a picture.

    Args:
        model (BaseModel): A model in evaluation mode, or an :class:`ExportedModel`.
        task (str): Its task.
        image (Tensor): What the test pipeline gives, (C, H, W), uint8.
        ori_shape (tuple[int, int], optional): Height and width of the picture before
            it was resized, for label maps. Defaults to None: those of the image.

    Returns:
        BaseDataElement: The toolbox's sample, on the CPU.
    """
    size = tuple(image.shape[-2:])
    meta = dict(
        img_shape=size,
        ori_shape=ori_shape or size,
        pad_shape=size,
        scale_factor=(1.0, 1.0),
    )
    sample: BaseDataElement
    if task == 'detection':
        from mmdet.structures import DetDataSample as Sample
    elif task == 'segmentation':
        from mmseg.structures import SegDataSample as Sample
    else:
        from mmpretrain.structures import DataSample as Sample
    sample = Sample(metainfo=meta)
    with torch.no_grad():
        (found,) = model.test_step(dict(inputs=[image], data_samples=[sample]))
    return found.cpu()


def _compare_detections(
    model: Any, exported: ExportedModel, image: Tensor
) -> Dict[str, float]:
    size = tuple(image.shape[-2:])
    cfg = (model.roi_head if hasattr(model, 'roi_head') else model.bbox_head).test_cfg
    own, mask_threshold = float(cfg.get('score_thr', 0)), cfg.get('mask_thr_binary')
    with _set(cfg, score_thr=0.0):
        scores = predict(model, exported.task, image).pred_instances.scores
    largest: Dict[str, float] = {}
    # mmdet's masks are bytes, 255 times the probability, if their threshold is below 0.
    # A model may have no mask of noise that is above its threshold.
    for score, mask in ((own, mask_threshold), (_gap(scores), -1), (1.0, -1)):
        with _set(cfg, score_thr=score, mask_thr_binary=mask):
            one = predict(model, exported.task, image).pred_instances
        with _set(exported.test_cfg, score_thr=score):
            with _set(exported.metadata, mask_threshold=mask):
                other = predict(exported, exported.task, image).pred_instances
        for kind, value in match_detections(
            one, other, score, cfg.max_per_img, size
        ).items():
            largest[kind] = max(largest.get(kind, 0), value)
    return largest


def _gap(scores: Tensor) -> float:
    """A threshold in the widest gap between scores, with some detections above it.

    A score that is close to the threshold could be on either side of it by rounding.
    """
    fewest, most = _DETECTIONS
    scores = scores.sort(descending=True).values[fewest - 1 : most + 1]
    if len(scores) < 2:
        return 0.0
    place = int((scores[:-1] - scores[1:]).argmax())
    return float(scores[place : place + 2].mean())


@contextmanager
def _set(options: Dict[str, Any], **values: Any) -> Iterator[None]:
    """Set options for a while."""
    before = {name: options[name] for name in values if name in options}
    options.update(values)
    try:
        yield
    finally:
        for name in values:
            del options[name]
        options.update(before)


def match_detections(
    expected: Any, found: Any, threshold: float, most: int, size: Sequence[int]
) -> Dict[str, float]:
    """Match detections of one class with almost the same box, whatever their order.

    One without a partner is an error, unless its score is so close to the threshold, or
    to the last place of a full list, that rounding decides whether it is there.

    Args:
        expected (InstanceData): What the model finds.
        found (InstanceData): What the file finds.
        threshold (float): The score threshold.
        most (int): Number of detections that makes a list full.
        size (Sequence[int]): Of the image, for the message.

    Returns:
        dict[str, float]: The largest difference of each kind in :data:`TOLERANCES`.

    Raises:
        ExportError: If the detections differ.
    """
    boxes = (expected.bboxes[:, None] - found.bboxes).abs().amax(-1)
    scores = (expected.scores[:, None] - found.scores).abs()
    is_pair = expected.labels[:, None] == found.labels
    is_pair &= (boxes <= TOLERANCES['boxes']) & (scores <= TOLERANCES['scores'])
    pairs = _partners(boxes.masked_fill(~is_pair, float('inf')))
    for name, other, matched in (
        ('model', expected, [i for i, _ in pairs]),
        ('file', found, [j for _, j in pairs]),
    ):
        lonely = torch.ones(len(other), dtype=torch.bool)
        lonely[matched] = False
        is_close = (other.scores - threshold).abs() <= TOLERANCES['scores']
        if len(other) == most:
            is_close |= other.scores - other.scores.min() <= TOLERANCES['scores']
        number = int((lonely & ~is_close).sum())
        if number:
            raise ExportError(
                f'The detections of the exported model differ for an image of {size}: '
                f'{number} of {len(other)} that the {name} finds are not among the '
                "other's."
            )
    if (found.scores.diff() > 0).any():
        raise ExportError(
            f'The detections of the exported model for an image of {size} are not in '
            'the order of their scores.'
        )
    largest = dict(boxes=0.0, scores=0.0)
    for i, j in pairs:
        largest['boxes'] = max(largest['boxes'], float(boxes[i, j]))
        largest['scores'] = max(largest['scores'], float(scores[i, j]))
        if 'masks' in expected:
            share = _share(expected.masks[i], found.masks[j])
            _require('masks', share, 'masks', size)
            largest['masks'] = max(largest.get('masks', 0.0), share)
    return largest


def _partners(distances: Tensor) -> List[Tuple[int, int]]:
    """Rows and columns that belong together, the nearest first, each of them once."""
    near = distances.isfinite().nonzero()
    order = distances[distances.isfinite()].argsort()
    rows, columns = set(), set()
    pairs = []
    for i, j in near[order].tolist():
        if i not in rows and j not in columns:
            rows.add(i)
            columns.add(j)
            pairs.append((i, j))
    return pairs


def _share(expected: Tensor, found: Tensor) -> float:
    """How much of two masks (H, W) differs, bool or bytes of probabilities."""
    whole = 1 if expected.dtype == torch.bool else 255
    one, other = expected.float() / whole, found.float() / whole
    # A single pixel on the edge of a small mask may differ.
    wrong = max(0.0, float((one - other).abs().sum()) - 1)
    return wrong / max(1.0, float(torch.maximum(one, other).sum()))


def _compare_label_maps(
    model: Any, exported: ExportedModel, image: Tensor, has_settings: bool
) -> Dict[str, float]:
    height, width = image.shape[-2:]
    shapes = [(height, width)]
    if has_settings:
        shapes.append((height * 3 // 2, width // 2))
    largest = dict(labels=0.0)
    for shape in shapes:
        one, other = (
            predict(x, exported.task, image, shape) for x in (model, exported)
        )
        logits, labels = one.seg_logits.data, other.pred_sem_seg.data
        expected = one.pred_sem_seg.data
        # A head of one channel has two classes.
        is_valid = (labels >= 0) & (labels < max(2, len(logits)))
        if labels.shape != expected.shape or not is_valid.all():
            raise ExportError(
                f"The exported model's labels for an output of {shape} have the shape "
                f'{tuple(labels.shape[-2:])}, or are of no class of the model.'
            )
        if 'seg_logits' in other:
            found = _require(
                'logits', _relative(logits, other.seg_logits.data), 'maps', shape
            )
            largest['maps'] = max(largest.get('maps', 0.0), found)
        # Of classes with almost the same logit, rounding decides which is the larger.
        if len(logits) == 1:
            margin = (logits - model.decode_head.threshold).abs()
        else:
            margin = logits.amax(0, keepdim=True) - logits.gather(0, labels)
        margin = margin[labels != expected]
        wrong = float(margin.max() / logits.abs().max()) if len(margin) else 0.0
        largest['labels'] = max(
            largest['labels'], _require('labels', wrong, 'labels', shape)
        )
    return largest


def _compare_classes(
    model: Any, exported: ExportedModel, image: Tensor
) -> Dict[str, float]:
    one, other = (
        predict(x, exported.task, image).pred_score for x in (model, exported)
    )
    found = float((one - other).abs().max())
    return {'scores': _require('scores', found, 'scores', tuple(image.shape[-2:]))}


def _relative(expected: Tensor, actual: Tensor) -> float:
    """The largest difference, divided by the largest value."""
    if actual.shape != expected.shape:
        return float('inf')
    expected = expected.cpu()
    return float((actual.cpu() - expected).abs().max() / expected.abs().max())


def _require(name: str, difference: float, kind: str, size: Sequence[int]) -> float:
    if not difference <= TOLERANCES[kind]:  # so that NaN is refused, too
        raise ExportError(
            f"The exported model's {name} for an image of {tuple(size)} differ by "
            f'{difference:.1e}. At most {TOLERANCES[kind]:.0e} is allowed.'
        )
    return difference
