# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What pycocotools and mmdet expect of the objects of a file."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from math import isfinite, prod
from typing import Any, Dict, List, Tuple

from ..engine.parts import as_list, kind_of, parts_of
from .coco_masks import (
    BAD_FIRST,
    BAD_LATER,
    FLAT,
    INCOMPLETE,
    NO_POLYGON,
    mask_area,
    mask_problem,
    repaired_mask,
)
from .coco_rules import (
    BY_TOOL,
    NUMBER,
    Rule,
    ids_of,
    is_evaluated,
    objects_of_classes,
)
from .source import Finding, Source, several

_BOX = 'A box is [x, y, width, height] in pixels'
# One in so many annotations may be left out: public data sets have a few odd ones.
_RARE = 100
_NEGATIVE = 'a box of negative width or height'
_NO_AREA = 'an area of 0 or less'
_TINY = 'a box of less than a pixel in width or height'
_NO_RLE = 'a run-length encoding, which poly2mask=False leaves out'
_LEFT_OUT = (NO_POLYGON, INCOMPLETE, _NO_RLE)


def _mask_loaders(source: Source) -> List[dict]:
    return [
        part
        for part in parts_of(source.config)
        if kind_of(part) == 'LoadAnnotations' and part.get('with_mask')
    ]


def _evaluates_masks(source: Source) -> bool:
    return any(
        'segm' in as_list(part.get('metric')) for part in parts_of(source.evaluator)
    )


def _sizes(content: dict) -> Dict[Any, Tuple[float, float]]:
    """Width and height of the images, by their ids."""
    return {x['id']: (x['width'], x['height']) for x in content['images']}


def _objects(content: dict, source: Source) -> Iterator[Tuple[dict, float, float]]:
    """Annotations of the classes with a usable box; width and height of the image."""
    sizes = _sizes(content)
    for annotation in objects_of_classes(content, source):
        size = sizes.get(annotation['image_id'])
        if size and _is_box(annotation['bbox']):
            yield (annotation, *size)


def _check_crowds(content: dict, source: Source) -> Iterator[Finding]:
    path, annotations = source.dataset.ann_file, objects_of_classes(content, source)
    with_metric = is_evaluated(source)
    yield from several(
        f'annotations in {path} have no iscrowd',
        ids_of([x for x in annotations if with_metric and x.get('iscrowd') is None]),
        f'pycocotools fails without it. Write "iscrowd": 0: {BY_TOOL}',
    )
    known = (*NUMBER, type(None))
    yield from several(
        f'annotations in {path} have an iscrowd that is no number',
        ids_of([x for x in annotations if not isinstance(x.get('iscrowd'), known)]),
        'Any text counts as a crowd, which is ignored. Write 0 or 1 without quotes: '
        f'{BY_TOOL}',
    )


def _fix_crowds(content: dict, source: Source) -> Iterator[str]:
    count = 0
    for annotation in content['annotations']:
        crowd = annotation.get('iscrowd')
        if crowd is None or (isinstance(crowd, str) and crowd.strip() in ('0', '1')):
            annotation['iscrowd'] = int(crowd or 0)
            count += 1
    if count:
        yield f'iscrowd of {count} annotations made a number'


def _check_boxes(content: dict, source: Source) -> Iterator[Finding]:
    yield from several(
        f'annotations in {source.dataset.ann_file} have a box that is not four finite '
        'numbers',
        ids_of([x for x in content['annotations'] if not _is_box(x['bbox'])]),
        f'{_BOX}.',
    )


def _is_box(box: list) -> bool:
    try:
        x, y, width, height = box
        return isfinite(x + y + width + height)
    except (TypeError, ValueError, OverflowError):
        return False


def _check_masks(content: dict, source: Source) -> Iterator[Finding]:
    loaders, evaluates_masks = _mask_loaders(source), _evaluates_masks(source)
    if not (loaders or evaluates_masks):
        return
    takes_rle = all(part.get('poly2mask', True) for part in loaders)
    kinds: Dict[str, List[dict]] = defaultdict(list)
    total = 0
    for annotation, width, height in _objects(content, source):
        total += 1
        # mmdet leaves the object out before it reads the mask.
        if not evaluates_masks and _reason_to_leave_out(annotation, width, height):
            continue
        mask = annotation.get('segmentation')
        problem = mask_problem(mask, width, height)
        if isinstance(mask, dict) and not (takes_rle or problem):
            problem = _NO_RLE
        # A crowd is ignored, whatever its mask.
        if problem and not (problem in _LEFT_OUT and annotation.get('iscrowd')):
            kinds[problem].append(annotation)
    path = source.dataset.ann_file
    for kind, annotations in kinds.items():
        breaks = evaluates_masks and kind not in (_NO_RLE, BAD_LATER)
        if kind in _LEFT_OUT and not breaks:
            yield from _left_out(kind, annotations, total, source)
        else:
            mend = f'Mend the masks: {BY_TOOL}' if kind == FLAT else 'Mend the masks.'
            yield from several(
                f'annotations with {kind} in {path}',
                ids_of(annotations),
                f'{mend} Or leave these annotations out of the file, or train without '
                'masks: see docs/datasets.md.',
                fatal=breaks or kind not in (BAD_FIRST, BAD_LATER),
            )


def _fix_masks(content: dict, source: Source) -> Iterator[str]:
    if not (_mask_loaders(source) or _evaluates_masks(source)):
        return
    sizes = _sizes(content)
    done: Counter = Counter()
    unusable = []
    for annotation in content['annotations']:
        old, size = annotation.get('segmentation'), sizes.get(annotation['image_id'])
        if size is None:
            continue
        mask = repaired_mask(old, *size)
        if mask is None:
            unusable.append(annotation)
        elif mask != old:
            annotation['segmentation'] = mask
            is_flat = mask == [old]
            done['put into a list' if is_flat else 'rid of unusable polygons'] += 1
    for what, count in done.items():
        yield f'Masks of {count} annotations {what}'
    objects = objects_of_classes(content, source)
    ids = set(map(id, objects)) & set(map(id, unusable))
    # What is left out becomes background.
    if 0 < len(ids) * _RARE <= len(objects):
        content['annotations'] = [x for x in content['annotations'] if id(x) not in ids]
        yield f'{len(ids)} annotations without a usable mask left out'


def _check_areas(content: dict, source: Source) -> Iterator[Finding]:
    path, annotations = source.dataset.ann_file, content['annotations']
    fix = f'Write the number of pixels of the mask, or of the box: {BY_TOOL}'
    yield from several(
        f'annotations in {path} have no usable area',
        ids_of([x for x in annotations if not isinstance(x.get('area'), NUMBER)]),
        fix,
    )
    if is_evaluated(source):
        areas = ((x, x.get('area')) for x in objects_of_classes(content, source))
        yield from several(
            f'annotations in {path} have an area of NaN or infinity',
            ids_of([x for x, a in areas if isinstance(a, float) and not isfinite(a)]),
            fix,
        )


def _fix_areas(content: dict, source: Source) -> Iterator[str]:
    sizes = _sizes(content)
    counts: Counter = Counter()
    for annotation in content['annotations']:
        area, size = annotation.get('area'), sizes.get(annotation['image_id'])
        if isinstance(area, NUMBER) and isfinite(area) and area > 0:
            continue
        origin, mask = 'mask', annotation.get('segmentation')
        if size and not mask_problem(mask, *size):
            area = mask_area(mask, *size)
        else:
            area = 0
        # A thin mask may have no pixel.
        if not area and _is_box(annotation['bbox']):
            origin, area = 'box', prod(max(x, 0) for x in annotation['bbox'][2:])
        if annotation.get('area') != area:
            annotation['area'] = area
            counts[origin] += 1
    for origin, count in counts.items():
        yield f'area of {count} annotations computed from their {origin}'


def _check_places(content: dict, source: Source) -> Iterator[Finding]:
    """Whether boxes and areas are such that mmdet keeps the objects."""
    kinds: Dict[str, List[dict]] = defaultdict(list)
    outside: List[dict] = []
    are_corners, total = True, 0
    for annotation, width, height in _objects(content, source):
        x, y, w, h = annotation['bbox']
        total += 1
        are_corners = are_corners and (
            -1 <= x <= w <= width + 1 and -1 <= y <= h <= height + 1
        )
        reason = _reason_to_leave_out(annotation, width, height)
        if reason:
            kinds[reason].append(annotation)
        elif min(x, y) < -1 or x + w > width + 1 or y + h > height + 1:
            outside.append(annotation)
    for kind, annotations in kinds.items():
        yield from _left_out(kind, annotations, total, source)
    if len(outside) * _RARE > total:
        # Few boxes can be read as corners by chance, and not all of a file.
        is_sure = are_corners and len(outside) * 10 > total
        cause = (
            'two corners [x1, y1, x2, y2]'
            if are_corners
            else 'of images of another size'
        )
        yield from several(
            f'of {total} annotations in {source.dataset.ann_file} have a box that '
            'sticks out of the image by more than a pixel',
            ids_of(outside),
            f'Are the boxes {cause}? {_BOX}.',
            fatal=is_sure,
        )


def _reason_to_leave_out(annotation: dict, width: float, height: float) -> str:
    """Why mmdet leaves an object out; '' if it does not."""
    x, y, w, h = annotation['bbox']
    if w < 0 or h < 0:
        return _NEGATIVE
    if w < 1 or h < 1:
        return _TINY
    if not (x < width and y < height and x + w > 0 and y + h > 0):
        return 'a box outside of the image'
    area = annotation.get('area')
    return _NO_AREA if isinstance(area, NUMBER) and area <= 0 else ''


def _left_out(
    kind: str, annotations: Sequence[dict], total: int, source: Source
) -> Iterator[Finding]:
    """A finding about annotations that mmdet leaves out."""
    fix = 'mmdet leaves these objects out.'
    if kind == _NO_AREA:
        fix += f' Write the area of the mask, or of the box: {BY_TOOL}'
    if kind == _TINY and all(max(x['bbox']) <= 1 for x in annotations):
        fix += f' Are the boxes fractions of the image? {_BOX}.'
    if kind == _NEGATIVE:
        fix += f' {_BOX}, not two corners.'
    yield from several(
        f'of {total} annotations in {source.dataset.ann_file} have {kind}',
        ids_of(annotations),
        fix,
        fatal=len(annotations) * _RARE > total,
    )


OBJECT_RULES = (
    Rule(_check_crowds, _fix_crowds),
    Rule(_check_boxes, blocks=True),
    Rule(_check_masks, _fix_masks),
    # The area is that of the repaired mask.
    Rule(_check_areas, _fix_areas, blocks=True),
    Rule(_check_places),
)
