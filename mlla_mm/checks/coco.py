# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Annotations in COCO's format, as pycocotools and mmdet read them."""

import copy
import gc
import io
import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Dict, List, Optional

from ..utils.images import image_size, open_image
from ..utils.text import printable
from .coco_objects import OBJECT_RULES
from .coco_rules import COCO_KEYS, FILE_RULES, classes_of, objects_of_classes
from .image_files import Problem, check_images, relative, unreadable
from .source import (
    PIXELS,
    Finding,
    Source,
    UnusableError,
    count_labels,
    labels_of,
    progress,
    read_ann_file,
    require,
    several,
    stage,
)

_RULES = (*FILE_RULES, *OBJECT_RULES)


def check_coco(source: Source) -> Iterator[Finding]:
    """Look at annotations and images."""
    content = yield from check_annotations(source)
    if content:
        yield from _check_coco_images(content, source)


def check_annotations(
    source: Source,
) -> Generator[Finding, None, Optional[Dict[str, Any]]]:
    """Look at annotations alone.

    Yields:
        Finding: What is wrong.

    Returns:
        dict | None: The annotations, unless they are too wrong to go on.
    """
    require(
        'img' in source.dataset.data_prefix,
        f'{source.key} has no data_prefix.img, the folder of the images',
        "Write data_prefix=dict(img='train/'), or img='' for data_root itself.",
    )
    name = printable(Path(source.dataset.ann_file or '').name)
    with stage(f'Reading {name}'):
        content = read_coco(source)
    with _without_collection():
        findings = list(_check_structure(content, source))
        is_complete = not findings
        if is_complete:
            findings = _check_content(content, source, name)
    yield from findings
    return content if is_complete else None


def _check_content(content: dict, source: Source, name: str) -> List[Finding]:
    with_object = {x['image_id'] for x in objects_of_classes(content, source)}
    source.image_ids = {x['id']: x['id'] in with_object for x in content['images']}
    findings: List[Finding] = []
    loads = True
    for rule in progress(_RULES, f'Checking {name}', len(_RULES)):
        found = list(rule.find(content, source))
        findings += found
        loads = loads and not (found and rule.blocks)
    if loads:
        with stage(f'Counting objects of {name}'):
            findings += _check_what_is_left(content, source)
    return findings


def fix_coco(content: dict, source: Source) -> List[str]:
    """Repair annotations whose right values follow from the others.

    Args:
        content (dict): What :func:`read_coco` returns; changed in place.
        source (Source): The data set. Its config decides whether masks are needed.

    Returns:
        list[str]: What was done, and how often. Empty if there is nothing to do, or if
        so much is missing that nothing can be done.
    """
    try:
        if list(_check_structure(content, source)):
            return []
    except UnusableError:
        return []
    fixes = [rule.fix for rule in _RULES if rule.fix]
    return [line for fix in fixes for line in fix(content, source)]


def read_coco(source: Source) -> dict:
    """Parse the annotation file.

    Raises:
        UnusableError: If it is not there, or no JSON.
    """
    fix = 'Write or download it again.'
    text = read_ann_file(source, fix)
    try:
        with _without_collection():
            content = json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = f'{source.dataset.ann_file} is not JSON ({error})'
        raise UnusableError(Finding(problem, fix)) from error
    # Annotations of COCO's test images are not published.
    if source.split == 'test' and isinstance(content, dict):
        content.setdefault('annotations', [])
    return content


@contextmanager
def _without_collection() -> Iterator[None]:
    """Make millions of objects without a search for unused ones again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _check_structure(content: Any, source: Source) -> Iterator[Finding]:
    """Whether everything is there, and has a usable type."""
    path = source.dataset.ann_file
    fix = 'See docs/datasets.md for the format.'
    names = ', '.join(COCO_KEYS)
    require(isinstance(content, dict), f'{path} holds no dict with {names}', fix)
    absent = [key for key in COCO_KEYS if not isinstance(content.get(key), list)]
    require(not absent, f'{path} has no list of {" and ".join(absent)}', fix)
    for name in ('images', 'categories'):
        require(content[name], f'{path} lists no {name}', fix)
    for name, keys in COCO_KEYS.items():
        for key, kind in keys.items():
            lacking = [
                f'number {i}'
                for i, item in enumerate(content[name])
                if not (isinstance(item, dict) and isinstance(item.get(key), kind))
            ]
            yield from several(f'{name} in {path} have no usable {key}', lacking, fix)


def _check_coco_images(content: dict, source: Source) -> Iterator[Finding]:
    folder = Path(source.dataset.data_prefix['img'])
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


# What the data set makes of it.


def _check_what_is_left(content: dict, source: Source) -> Iterator[Finding]:
    """Count what is left after the data set's own filters."""
    dataset = _give(content, source.dataset)
    dataset.full_init()
    if not len(dataset):
        yield _explain_filters(content, source)
        return
    labels = [labels_of(image) for image in dataset.data_list]
    total = sum(len(image.get('instances', ())) for image in dataset.data_list)
    objects = sum(map(len, labels))
    if objects * 2 < total:
        yield Finding(
            f'{total - objects} of {total} objects in {source.dataset.ann_file} are '
            'crowds',
            'Write "iscrowd": 0 for single objects: crowds are ignored.',
            fatal=not objects,
        )
        if not objects:
            return
    counts = count_labels(labels, classes_of(source), 'objects')
    if source.split == 'test' and not content['annotations']:
        counts = counts._replace(numbers=None, images_with=None)
    source.counts = counts
    source.used_ids = [image['img_id'] for image in dataset.data_list]


def _give(content: dict, dataset: Any) -> Any:
    """A copy of a data set that loads these annotations instead of its file."""
    dataset = copy.copy(dataset)
    api = dataset.COCOAPI()
    # mmdet writes into the images.
    api.dataset = dict(content, images=[dict(image) for image in content['images']])
    with redirect_stdout(io.StringIO()):
        api.createIndex()
    # As in mmdet's constructor.
    api.img_ann_map, api.cat_img_map = api.imgToAnns, api.catToImgs
    dataset.COCOAPI = lambda path: api
    dataset.serialize_data = False
    return dataset


def _explain_filters(content: dict, source: Source) -> Finding:
    images = _give(content, source.dataset).load_data_list()
    reasons = []
    empty = sum(not image.get('instances') for image in images)
    if empty:
        reasons.append(f'{empty} have no object of the classes')
    least = (source.dataset.filter_cfg or {}).get('min_size', 0)
    small = sum(min(x['width'], x['height']) < least for x in content['images'])
    if small:
        reasons.append(f'{small} are smaller than min_size={least}')
    return Finding(
        f'None of {len(images)} images of {source.dataset.ann_file} is left: '
        f'{", ".join(reasons) or "all are filtered away"}',
        f'Look at its annotations, and at filter_cfg and indices of {source.key}.',
    )
