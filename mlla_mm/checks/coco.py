# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Annotations in COCO's format, as pycocotools and mmdet read them."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

from ..engine.options import parts_of
from ..utils.images import image_size, open_image
from .config import nearest
from .image_files import Problem, check_images, relative, unreadable
from .source import (
    PIXELS,
    Finding,
    Source,
    UnusableError,
    examples,
    read_ann_file,
    require,
    several,
)

_ID, _NUMBER = (int, str), (int, float)
# What mmdet and the rules read, and its types.
_COCO_KEYS: Dict[str, Dict[str, Any]] = {
    'images': dict(id=_ID, file_name=str, width=_NUMBER, height=_NUMBER),
    'annotations': dict(id=_ID, image_id=_ID, category_id=_ID, bbox=list, area=_NUMBER),
    'categories': dict(id=_ID, name=_ID),
}
_NEGATIVE = 'a box of negative width or height'
_EMPTY = 'a box of no width or height'


def check_coco(source: Source) -> Iterator[Finding]:
    fix = 'Write or download it again.'
    text = read_ann_file(source, fix)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = f'{source.dataset.ann_file} is not JSON ({error})'
        raise UnusableError(Finding(problem, fix)) from error
    # Annotations of COCO's test images are not published.
    if source.key.startswith('test') and isinstance(content, dict):
        content.setdefault('annotations', [])
    incomplete = list(_check_structure(content, source))
    yield from incomplete
    for rule in () if incomplete else _COCO_RULES:
        yield from rule(content, source)


def _check_structure(content: Any, source: Source) -> Iterator[Finding]:
    """Whether everything is there, and has a usable type."""
    path = source.dataset.ann_file
    fix = 'See docs/datasets.md for the format.'
    names = ', '.join(_COCO_KEYS)
    require(isinstance(content, dict), f'{path} holds no dict with {names}', fix)
    absent = [key for key in _COCO_KEYS if not isinstance(content.get(key), list)]
    require(not absent, f'{path} has no list of {" and ".join(absent)}', fix)
    require(content['images'], f'{path} lists no images', fix)
    for name, keys in _COCO_KEYS.items():
        for key, kind in keys.items():
            lacking = [
                f'number {i}'
                for i, item in enumerate(content[name])
                if not (isinstance(item, dict) and isinstance(item.get(key), kind))
            ]
            yield from several(f'{name} in {path} have no usable {key}', lacking, fix)


def _check_boxes(content: dict, source: Source) -> Iterator[Finding]:
    kinds: Dict[str, List[str]] = defaultdict(list)
    for annotation in content['annotations']:
        kinds[_box_problem(annotation['bbox'])].append(f'id {annotation["id"]}')
    kinds.pop('', None)
    for kind, ids in kinds.items():
        corners = ', not two corners' if kind == _NEGATIVE else ''
        fix = f'A box is [x, y, width, height] in pixels{corners}.'
        yield from several(
            f'annotations with {kind} in {source.dataset.ann_file}',
            ids,
            'mmdet leaves them out.' if kind == _EMPTY else fix,
            fatal=kind != _EMPTY,
        )


def _box_problem(box: list) -> str:
    if len(box) != 4 or not all(type(x) in _NUMBER for x in box):
        return 'a box that is not four numbers'
    if not all(map(math.isfinite, box)):
        return 'a box of NaN or infinity'
    if min(box[2:]) < 0:
        return _NEGATIVE
    return _EMPTY if 0 in box[2:] else ''


def _check_masks(content: dict, source: Source) -> Iterator[Finding]:
    ids = [
        f'id {annotation["id"]}'
        for annotation in content['annotations']
        if not (annotation.get('segmentation') or _box_problem(annotation['bbox']))
    ]
    if any(
        part.get('type') == 'LoadAnnotations' and part.get('with_mask')
        for part in parts_of(source.config)
    ):
        yield from several(
            f'annotations with no mask in {source.dataset.ann_file}',
            ids,
            'Leave them out of the file, or train without masks: see docs/datasets.md.',
        )


def _check_ids(content: dict, source: Source) -> Iterator[Finding]:
    for name in _COCO_KEYS:
        counts = Counter(item['id'] for item in content[name])
        yield from several(
            f'ids of {name} occur more than once in {source.dataset.ann_file}',
            [str(x) for x, count in counts.items() if count > 1],
            'Number them anew.',
        )


def _check_references(content: dict, source: Source) -> Iterator[Finding]:
    for key, name in (('category_id', 'categories'), ('image_id', 'images')):
        known = {item['id'] for item in content[name]}
        yield from several(
            f'annotations with an unknown {key} in {source.dataset.ann_file}',
            [f'id {a["id"]}' for a in content['annotations'] if a[key] not in known],
            f'Every {key} has to be the id of one of the {name}.',
        )


def _check_class_names(content: dict, source: Source) -> Iterator[Finding]:
    """mmdet would number the classes that it finds, as if there were no others."""
    names = [str(category['name']) for category in content['categories']]
    absent = [x for x in source.dataset.metainfo['classes'] if x not in names]
    meant = nearest(absent[0], names) if absent else None
    fix = f"Is '{meant}' meant?" if meant else f'The file has {examples(names)}.'
    yield from several(
        f'classes of {source.key} are not in the categories of '
        f'{source.dataset.ann_file}',
        absent,
        f'{fix} Name its categories in metainfo.classes.',
    )


def _check_coco_images(content: dict, source: Source) -> Iterator[Finding]:
    folder = Path(source.dataset.data_prefix.get('img', ''))
    sizes = {
        folder / image['file_name']: (image['width'], image['height'])
        for image in content['images']
    }

    def check(path: Path) -> Optional[Problem]:
        problem = unreadable(path, folder, source)
        if problem is None and source.look == PIXELS:
            with open_image(path) as image:
                if image_size(image) != sizes[path]:
                    name = relative(path, folder)
                    return Problem('have another size than annotated', name)
        return problem

    yield from check_images(list(sizes), folder, source, check)


_COCO_RULES: Tuple[Callable[[dict, Source], Iterator[Finding]], ...] = (
    _check_boxes,
    _check_masks,
    _check_ids,
    _check_references,
    _check_class_names,
    _check_coco_images,
)
