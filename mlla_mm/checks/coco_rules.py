# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What pycocotools and mmdet expect of the classes, ids and images of a file."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Callable, Dict, List, NamedTuple, Optional

from ..engine.parts import parts_of
from ..utils.text import nearest, printable
from .source import Finding, Source, examples, several

NUMBER = (int, float)
ID = (*NUMBER, str)
# What mmdet and the rules read, and its types.
COCO_KEYS: Dict[str, Dict[str, Any]] = {
    'images': dict(id=ID, file_name=str, width=NUMBER, height=NUMBER),
    'annotations': dict(image_id=ID, category_id=ID, bbox=list),
    'categories': dict(id=ID, name=ID),
}
# Ends the way out of what is repaired.
BY_TOOL = 'check_dataset.py --write-fixed does it.'


class Rule(NamedTuple):
    """Something that annotations have to be.

    Attributes:
        find (callable): Finds what is wrong with parsed annotations.
        fix (callable, optional): Repairs them in place. Yields what it did.
        blocks (bool): Whether mmdet cannot load, or confuses, annotations with which
            something is wrong. Defaults to False.
    """

    find: Callable[[dict, Source], Iterator[Finding]]
    fix: Optional[Callable[[dict, Source], Iterator[str]]] = None
    blocks: bool = False


# What is read, and by whom.


def is_evaluated(source: Source) -> bool:
    """Whether pycocotools reads the file, too."""
    return any(part.get('ann_file') for part in parts_of(source.evaluator))


def classes_of(source: Source) -> Sequence[str]:
    return source.dataset.metainfo['classes']


def named_categories(content: dict, source: Source) -> List[dict]:
    """The categories that are classes, compared as pycocotools does it."""
    classes = classes_of(source)
    return [x for x in content['categories'] if x['name'] in classes]


def objects_of_classes(content: dict, source: Source) -> List[dict]:
    """The annotations that mmdet and pycocotools make objects of."""
    ids = {category['id'] for category in named_categories(content, source)}
    return [x for x in content['annotations'] if x['category_id'] in ids]


def ids_of(annotations: Sequence[dict]) -> List[str]:
    return [f'id {annotation.get("id")}' for annotation in annotations]


# Classes.


def _check_class_names(content: dict, source: Source) -> Iterator[Finding]:
    """mmdet would number the classes that it finds, as if there were no others."""
    path, classes = source.dataset.ann_file, classes_of(source)
    counts = Counter(category['name'] for category in content['categories'])
    absent = [str(x) for x in classes if x not in counts]
    numbers = [x for x in counts if not isinstance(x, str) and str(x) in absent]
    yield from several(
        f'names of categories in {path} are numbers, not text',
        list(map(str, numbers)),
        f'Write them in quotes, as in metainfo.classes: {BY_TOOL}',
    )
    absent = [x for x in absent if x not in map(str, numbers)]
    names = list(map(str, counts))
    meant = nearest(absent[0], names) if absent else None
    fix = f'The file has {examples(names)}.'
    if meant:
        fix = f"Is '{printable(meant)}' meant?"
    yield from several(
        f'classes of {source.key} are not in the categories of {path}',
        absent,
        f'{fix} Name the categories of the file in metainfo.classes, or add the '
        'classes to the file.',
    )
    yield from several(
        f'names of categories occur more than once in {path}',
        [str(x) for x in classes if counts[x] > 1],
        'mmdet counts them as several classes. Give each its own name, or merge them: '
        f'{BY_TOOL}',
    )


def _fix_class_names(content: dict, source: Source) -> Iterator[str]:
    """A class has one name in a config, so all categories of the name are meant."""
    classes, count = classes_of(source), 0
    for category in content['categories']:
        name = category['name']
        if name not in classes and str(name) in classes:
            category['name'] = str(name)
            count += 1
    if count:
        yield f'Names of {count} categories made text'
    first: Dict[Any, dict] = {}
    others = [
        category
        for category in named_categories(content, source)
        if first.setdefault(category['name'], category) is not category
    ]
    ids = {category['id']: first[category['name']]['id'] for category in others}
    for annotation in content['annotations'] if ids else ():
        old = annotation['category_id']
        annotation['category_id'] = ids.get(old, old)
    content['categories'] = [
        x for x in content['categories'] if first.get(x['name'], x) is x
    ]
    for category in others:
        old, new = category['id'], first[category['name']]['id']
        name = printable(category['name'])
        yield f"The category '{name}' of id {old} merged with that of id {new}"


def _check_order(content: dict, source: Source) -> Iterator[Finding]:
    """Labels are positions in the file, names of drawn objects those in metainfo."""
    path, classes = source.dataset.ann_file, list(classes_of(source))
    named = named_categories(content, source)
    names = [category['name'] for category in named]
    if names != classes and Counter(names) == Counter(classes):
        old, new = next((a, b) for a, b in zip(names, classes) if a != b)
        yield Finding(
            f'{path} has its categories in another order than metainfo.classes of '
            f"{source.key}: '{printable(old)}' in place of '{printable(new)}'",
            'mmdet numbers classes in the order of the file. Order metainfo.classes of '
            f'all data sets so, or the categories of the file: {BY_TOOL}',
        )
    ids = [category['id'] for category in named]
    texts = [x for x in ids if isinstance(x, str)]
    if not any(part.get('classwise') for part in parts_of(source.evaluator)):
        return
    yield from several(
        f'ids of categories in {path} are text',
        texts,
        'Make them numbers, or leave classwise out: it takes each letter for an id.',
    )
    if not texts and ids != sorted(ids):
        yield Finding(
            f'The ids of the categories in {path} do not ascend, so that '
            f'{source.split}_evaluator names the results of classes wrongly',
            'Number the categories in ascending order, or leave classwise out.',
        )


def _fix_order(content: dict, source: Source) -> Iterator[str]:
    order = {name: i for i, name in enumerate(classes_of(source))}
    named = [x['name'] for x in named_categories(content, source)]
    if named != sorted(named, key=order.__getitem__):
        content['categories'].sort(key=lambda x: order.get(x['name'], len(order)))
        yield 'Categories ordered as metainfo.classes'


# Ids.


def _check_ids(content: dict, source: Source) -> Iterator[Finding]:
    path, with_metric = source.dataset.ann_file, is_evaluated(source)
    annotations = content['annotations']
    objects = objects_of_classes(content, source) if with_metric else []
    yield from several(
        f'annotations in {path} have no usable id',
        [f'number {i}' for i, x in enumerate(annotations) if not _has_id(x)],
        f'Number them from 1: {BY_TOOL}',
    )
    for name in COCO_KEYS:
        items = content[name]
        if name == 'images':
            # Of an image that is listed again, mmdet and pycocotools keep one.
            items = {(x['id'], x['file_name']): x for x in items}.values()
        counts = Counter(item['id'] for item in items if _has_id(item))
        yield from several(
            f'ids of {name} occur more than once in {path}',
            [str(x) for x, count in counts.items() if count > 1],
            f'Number them anew{f": {BY_TOOL}" if name == "annotations" else "."}',
        )
        if with_metric and name != 'annotations':
            texts = [x for x in counts if isinstance(x, str)]
            yield from several(
                f'ids of {name} in {path} are text, and others are numbers',
                texts if len(texts) < len(counts) else [],
                'Make all of them numbers: pycocotools cannot sort them.',
            )
    yield from several(
        f'annotations in {path} have an id of 0, or an id that is no number',
        ids_of(list(filter(_is_unmatched, objects))),
        f'pycocotools takes 0 for no match. Number them from 1: {BY_TOOL}',
    )


def _has_id(item: dict) -> bool:
    identity = item.get('id')
    # NaN is not itself.
    return isinstance(identity, ID) and identity == identity


def _is_unmatched(annotation: dict) -> bool:
    """Whether an id is 0 in the array of numbers that pycocotools keeps it in."""
    try:
        return _has_id(annotation) and float(annotation['id']) == 0
    except (ValueError, OverflowError):
        return True


def _fix_ids(content: dict, source: Source) -> Iterator[str]:
    annotations = content['annotations']
    ids = {x['id'] for x in annotations if type(x.get('id')) is int and x['id']}
    if len(ids) < len(annotations):
        for i, annotation in enumerate(annotations, 1):
            annotation['id'] = i
        yield f'{len(annotations)} annotations numbered anew from 1'


def _check_references(content: dict, source: Source) -> Iterator[Finding]:
    path = source.dataset.ann_file
    for key, name in (('category_id', 'categories'), ('image_id', 'images')):
        known = {item['id'] for item in content[name]}
        unknown = [x for x in content['annotations'] if x[key] not in known]
        texts = set(map(str, known)) if unknown else set()
        meant = [x for x in unknown if str(x[key]) in texts]
        yield from several(
            f'annotations in {path} have text as {key}, and {name} have numbers as id, '
            'or the reverse',
            ids_of(meant),
            'Write all of them as numbers.',
        )
        yield from several(
            f'annotations with an unknown {key} in {path}',
            ids_of([] if meant else unknown),
            f'mmdet leaves these objects out: none of the {name} has this id.',
            # A file of fewer images may keep the annotations of all.
            fatal=name == 'categories',
        )


# Images.


def _check_sizes(content: dict, source: Source) -> Iterator[Finding]:
    yield from several(
        f'images in {source.dataset.ann_file} have no positive width and height',
        [
            image['file_name']
            for image in content['images']
            if not (image['width'] > 0 and image['height'] > 0)
        ],
        'Write the size of the image in pixels.',
    )


def _check_images_listed_twice(content: dict, source: Source) -> Iterator[Finding]:
    ids = defaultdict(set)
    for image in content['images']:
        ids[os.path.normpath(image['file_name'])].add(image['id'])
    twice = {name: found for name, found in ids.items() if len(found) > 1}
    objects: Dict[Any, List[str]] = {x: [] for found in twice.values() for x in found}
    for annotation in content['annotations'] if twice else ():
        if annotation['image_id'] in objects:
            shown = f'{annotation["category_id"]} {annotation["bbox"]}'
            objects[annotation['image_id']].append(shown)
    apart = [
        name
        for name, found in twice.items()
        if len({tuple(sorted(objects[x])) for x in found}) > 1
    ]
    yield from several(
        f'images in {source.dataset.ann_file} have several ids with other objects each',
        apart,
        'List each image once: objects of the other ids are background.',
    )
    yield from several(
        f'images in {source.dataset.ann_file} have several ids with the same objects',
        [name for name in twice if name not in apart],
        'They are used more than once.',
        fatal=False,
    )


FILE_RULES = (
    Rule(_check_class_names, _fix_class_names, blocks=True),
    Rule(_check_order, _fix_order, blocks=True),
    Rule(_check_ids, _fix_ids, blocks=True),
    Rule(_check_references),
    Rule(_check_sizes),
    Rule(_check_images_listed_twice),
)
