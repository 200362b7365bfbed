# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Finds mistakes in the data of a config, and says how to mend them.

It knows mmdet's data sets in COCO's format, mmseg's data sets of images and label maps,
and mmpretrain's class folders and lists. It also knows classes that inherit from them
and read their files in the same way. Other data sets are not checked.

A format has one function in ``_CHECKS``. COCO's consists of small rules: a new rule is
a function that yields findings, and stands in ``_COCO_RULES``.
"""

import json
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from rich.progress import track

from ..engine.options import innermost_dataset, kind_of, parts_of
from ..utils.files import file_problem
from ..utils.images import image_problem, image_size, open_image
from ..utils.text import PATH_LIMIT, printable
from .config import check_config, head_classes, nearest

NAMES, FILES, PIXELS = 'names', 'files', 'pixels'
LOOKS = (NAMES, FILES, PIXELS)
"""How closely images are looked at.

'names': annotation files, folders and the names of files. 'files': also whether every
image and label map is a file with something in it. 'pixels': also whether each can be
decoded, and its size and labels.
"""

_NUM_EXAMPLES = 3
_IGNORED_LABEL = 255


class Finding(NamedTuple):
    """Something that is wrong with the data.

    Attributes:
        problem (str): What is wrong, with examples.
        fix (str): How to mend it.
        fatal (bool): Whether a run would fail, or learn something wrong. Defaults to
            True.
    """

    problem: str
    fix: str
    fatal: bool = True


class _UnusableError(Exception):
    """Ends the check of a data set. Its argument is the last :class:`Finding`."""


class _Source(NamedTuple):
    """A data set of a config.

    Attributes:
        key (str): Its key in the config.
        check (callable): The check of its format.
        dataset (Dataset): Built, but without its annotations.
        config (dict): Its config.
        num_classes (int, optional): Number of classes of the model's heads.
        look (str): How closely to look, one of :data:`LOOKS`.
        num_images (int, optional): Expected number of images, if it is known.
        backend (str): What decodes the images, by mmcv's name. Defaults to 'cv2'.
    """

    key: str
    check: Callable[['_Source'], Iterator[Finding]]
    dataset: Any
    config: Mapping
    num_classes: Optional[int]
    look: str
    num_images: Optional[int]
    backend: str = 'cv2'


def check_splits(
    cfg: Config, look: str = PIXELS, num_images: Optional[Mapping[str, int]] = None
) -> List[Finding]:
    """Check a config and its data sets for training and validation.

    Args:
        cfg (Config): The config, whose ``custom_imports`` have been imported.
        look (str): How closely to look, one of :data:`LOOKS`. Defaults to 'pixels'.
        num_images (dict, optional): Expected numbers of images under 'train' and 'val'.
            None allows any number. Defaults to None.

    Returns:
        list[Finding]: What is wrong; empty if nothing is.

    Raises:
        ValueError: If the config is wrong, or if there is no check for either data set.
    """
    check_config(cfg)
    findings = check_data(cfg, 'train', 'val', look=look, num_images=num_images)
    if findings is None:
        raise ValueError(
            f'There is no check for the data sets of {cfg.filename}. There are checks '
            'for CocoDataset, BaseSegDataset, CustomDataset and their subclasses.'
        )
    return findings


def check_data(
    cfg: Config,
    *splits: str,
    look: str = PIXELS,
    num_images: Optional[Mapping[str, int]] = None,
) -> Optional[List[Finding]]:
    """Check the data sets of some data loaders.

    Args:
        cfg (Config): The config, whose ``custom_imports`` have been imported.
        *splits (str): 'train', 'val' or 'test'.
        look (str): As in :func:`check_splits`. Defaults to 'pixels'.
        num_images (dict, optional): Expected numbers of images by split.
            Defaults to None.

    Returns:
        list[Finding] | None: What is wrong; empty if nothing is. None if there is no
        check for any of the data sets.

    Raises:
        ValueError: If the config of a data set is wrong.
    """
    counts = num_images or {}
    found = [_source(cfg, split, look, counts.get(split)) for split in splits]
    sources = [source for source in found if source is not None]
    if not sources:
        return None
    findings = [finding for source in sources for finding in _findings(source)]
    return findings + list(_check_same_classes(sources))


def require_data(cfg: Config, *splits: str) -> None:
    """Refuse to start with data on which a run fails, or learns something wrong.

    It looks at annotation files, folders and names of files, not into images.

    Args:
        cfg (Config): The config of the run.
        *splits (str): 'train', 'val' or 'test'.

    Raises:
        ValueError: Names the first thing that is wrong.
    """
    findings = check_data(cfg, *splits, look=NAMES) or []
    fatal = [finding for finding in findings if finding.fatal]
    if fatal:
        more = f' ({len(fatal) - 1} more)' if len(fatal) > 1 else ''
        raise ValueError(f'{fatal[0].problem}. {fatal[0].fix}{more}')


def _source(
    cfg: Config, split: str, look: str, num_images: Optional[int]
) -> Optional[_Source]:
    """The data set of a data loader, or None if there is no check for it."""
    config = innermost_dataset(cfg.get(f'{split}_dataloader'))
    if config is None or not isinstance(config.get('type'), str):
        return None
    backend = (config.get('backend_args') or {}).get('backend', 'local')
    if backend != 'local' or '://' in str(config.get('data_root')):
        return None
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        with DATASETS.switch_scope_and_registry(None) as registry:
            kind = registry.get(config['type'])
            if kind is None:
                registry.build(config)  # raises the error that names the type
            check = _check_of(kind)
            if check is None:
                return None
            dataset = registry.build(dict(config, lazy_init=True, pipeline=[]))
    counts = [count for _, count in head_classes(cfg.get('model') or {})]
    return _Source(
        key=f'{split}_dataloader.dataset',
        check=check,
        dataset=dataset,
        config=config,
        num_classes=counts[0] if counts else None,
        look=look,
        num_images=num_images,
        backend=_image_backend(config.get('pipeline')),
    )


def _check_of(kind: Any) -> Optional[Callable[[_Source], Iterator[Finding]]]:
    """The check for a class, if the class reads its files as the known one does."""
    for base in getattr(kind, '__mro__', ()):
        check = _CHECKS.get((base.__module__.split('.')[0], base.__name__))
        if check is not None and kind.load_data_list is base.load_data_list:
            return check
    return None


def _image_backend(pipeline: Any) -> str:
    """What decodes the images of a pipeline, by mmcv's name. OpenCV is the default."""
    for step in parts_of(pipeline):
        if 'LoadImage' in str(kind_of(step)) and step.get('imdecode_backend'):
            return step['imdecode_backend']
    return 'cv2'


def _findings(source: _Source) -> Iterator[Finding]:
    try:
        yield from source.check(source)
    except _UnusableError as end:
        yield end.args[0]


def _require(condition: object, problem: str, fix: str) -> None:
    """End the check of this data set if it makes no sense to go on."""
    if not condition:
        raise _UnusableError(Finding(problem, fix))


def _require_folder(folder: Path, source: _Source) -> None:
    fix = f'Check data_root and data_prefix of {source.key}.'
    _require(folder.is_dir(), f'Folder not found: {folder}', fix)


def _read_ann_file(source: _Source, fix: str) -> str:
    """The text of the annotation file; ends the check if there is none."""
    path = Path(source.dataset.ann_file)
    where = f'Check data_root and ann_file of {source.key}.'
    _require(path.is_file(), f'Annotation file not found: {path}', where)
    try:
        text = path.read_text(encoding='utf-8').strip()
    except UnicodeDecodeError as error:
        raise _UnusableError(Finding(f'{path} is not UTF-8 ({error})', fix)) from error
    _require(text, f'{path} is empty', fix)
    return text


def _several(
    what: str, things: Sequence[str], fix: str, fatal: bool = True
) -> Iterator[Finding]:
    """One finding for all things of a kind; none if there are no such things."""
    if things:
        yield Finding(f'{len(things)} {what}: {_examples(things)}', fix, fatal)


def _examples(things: Sequence[str]) -> str:
    shown = ', '.join(printable(thing, PATH_LIMIT) for thing in things[:_NUM_EXAMPLES])
    more = len(things) - _NUM_EXAMPLES
    return f'{shown} and {more} more' if more > 0 else shown


# Images.


class _Problem(NamedTuple):
    """What is wrong with an image: said of several images, an example, and the fix."""

    kind: str
    example: str
    fix: str = 'Replace them, or take them out of the data set.'


def _check_images(
    images: Sequence[Path],
    folder: Path,
    source: _Source,
    check: Optional[Callable[[Path], Optional[_Problem]]] = None,
) -> Iterator[Finding]:
    """Whether images exist, are as many as expected, and pass a check of each image.

    Args:
        images (list[Path]): The images of the data set.
        folder (Path): The folder that has them.
        source (_Source): The data set.
        check (callable, optional): Says what is wrong with an image; called in threads,
            as decoding releases the GIL. By default it is :func:`_unreadable`.
    """
    _require_folder(folder, source)
    where = f'Check data_root and data_prefix of {source.key}.'
    if source.num_images not in (None, len(images)):
        number = f'{len(images)} images in {folder}, expected {source.num_images}'
        yield Finding(number, where)
    missing = set(_missing(images))
    names = [_relative(path, folder) for path in images if path in missing]
    yield from _several(f'images are not in {folder}', names, where)
    if source.look == NAMES:
        return
    check = check or partial(_unreadable, folder=folder, source=source)
    present = [path for path in images if path not in missing]
    kinds: Dict[str, List[_Problem]] = defaultdict(list)
    with ThreadPool() as pool:
        found = pool.imap(check, present, chunksize=16)
        # In a log the bar would be many lines.
        silent = not sys.stdout.isatty()
        for problem in track(found, 'Checking', len(present), disable=silent):
            if problem is not None:
                kinds[problem.kind].append(problem)
    for kind, problems in kinds.items():
        examples = [problem.example for problem in problems]
        what, fatal = f'images in {folder} {kind}', kind != _UNLABELLED
        yield from _several(what, examples, problems[0].fix, fatal)


def _unreadable(path: Path, folder: Path, source: _Source) -> Optional[_Problem]:
    if source.look == PIXELS:
        problem = image_problem(path, source.backend)
    else:
        problem = file_problem(path)
    if problem is None:
        return None
    return _Problem('cannot be read', f'{_relative(path, folder)} {problem}')


def _missing(paths: Iterable[Path]) -> List[Path]:
    # A look into each folder once: a file system over a network answers slowly.
    parents = {path.parent for path in paths}
    names = {x: set(os.listdir(x)) if x.is_dir() else set() for x in parents}
    return [path for path in paths if path.name not in names[path.parent]]


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


# COCO's format.

_ID, _NUMBER = (int, str), (int, float)
# What mmdet and the rules read, and its types.
_COCO_KEYS: Dict[str, Dict[str, Any]] = {
    'images': dict(id=_ID, file_name=str, width=_NUMBER, height=_NUMBER),
    'annotations': dict(id=_ID, image_id=_ID, category_id=_ID, bbox=list, area=_NUMBER),
    'categories': dict(id=_ID, name=_ID),
}
_NEGATIVE = 'a box of negative width or height'
_EMPTY = 'a box of no width or height'


def _check_coco(source: _Source) -> Iterator[Finding]:
    fix = 'Write or download it again.'
    text = _read_ann_file(source, fix)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = f'{source.dataset.ann_file} is not JSON ({error})'
        raise _UnusableError(Finding(problem, fix)) from error
    # Annotations of COCO's test images are not published.
    if source.key.startswith('test') and isinstance(content, dict):
        content.setdefault('annotations', [])
    incomplete = list(_check_structure(content, source))
    yield from incomplete
    for rule in () if incomplete else _COCO_RULES:
        yield from rule(content, source)


def _check_structure(content: Any, source: _Source) -> Iterator[Finding]:
    """Whether everything is there, and has a usable type."""
    path = source.dataset.ann_file
    fix = 'See docs/datasets.md for the format.'
    names = ', '.join(_COCO_KEYS)
    _require(isinstance(content, dict), f'{path} holds no dict with {names}', fix)
    absent = [key for key in _COCO_KEYS if not isinstance(content.get(key), list)]
    _require(not absent, f'{path} has no list of {" and ".join(absent)}', fix)
    _require(content['images'], f'{path} lists no images', fix)
    for name, keys in _COCO_KEYS.items():
        for key, kind in keys.items():
            lacking = [
                f'number {i}'
                for i, item in enumerate(content[name])
                if not (isinstance(item, dict) and isinstance(item.get(key), kind))
            ]
            yield from _several(f'{name} in {path} have no usable {key}', lacking, fix)


def _check_boxes(content: dict, source: _Source) -> Iterator[Finding]:
    kinds: Dict[str, List[str]] = defaultdict(list)
    for annotation in content['annotations']:
        kinds[_box_problem(annotation['bbox'])].append(f'id {annotation["id"]}')
    kinds.pop('', None)
    for kind, ids in kinds.items():
        corners = ', not two corners' if kind == _NEGATIVE else ''
        fix = f'A box is [x, y, width, height] in pixels{corners}.'
        yield from _several(
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


def _check_masks(content: dict, source: _Source) -> Iterator[Finding]:
    ids = [
        f'id {annotation["id"]}'
        for annotation in content['annotations']
        if not (annotation.get('segmentation') or _box_problem(annotation['bbox']))
    ]
    if any(
        part.get('type') == 'LoadAnnotations' and part.get('with_mask')
        for part in parts_of(source.config)
    ):
        yield from _several(
            f'annotations with no mask in {source.dataset.ann_file}',
            ids,
            'Leave them out of the file, or train without masks: see docs/datasets.md.',
        )


def _check_ids(content: dict, source: _Source) -> Iterator[Finding]:
    for name in _COCO_KEYS:
        counts = Counter(item['id'] for item in content[name])
        yield from _several(
            f'ids of {name} occur more than once in {source.dataset.ann_file}',
            [str(x) for x, count in counts.items() if count > 1],
            'Number them anew.',
        )


def _check_references(content: dict, source: _Source) -> Iterator[Finding]:
    for key, name in (('category_id', 'categories'), ('image_id', 'images')):
        known = {item['id'] for item in content[name]}
        yield from _several(
            f'annotations with an unknown {key} in {source.dataset.ann_file}',
            [f'id {a["id"]}' for a in content['annotations'] if a[key] not in known],
            f'Every {key} has to be the id of one of the {name}.',
        )


def _check_class_names(content: dict, source: _Source) -> Iterator[Finding]:
    """mmdet would number the classes that it finds, as if there were no others."""
    names = [str(category['name']) for category in content['categories']]
    absent = [x for x in source.dataset.metainfo['classes'] if x not in names]
    meant = nearest(absent[0], names) if absent else None
    fix = f"Is '{meant}' meant?" if meant else f'The file has {_examples(names)}.'
    yield from _several(
        f'classes of {source.key} are not in the categories of '
        f'{source.dataset.ann_file}',
        absent,
        f'{fix} Name its categories in metainfo.classes.',
    )


def _check_coco_images(content: dict, source: _Source) -> Iterator[Finding]:
    folder = Path(source.dataset.data_prefix.get('img', ''))
    sizes = {
        folder / image['file_name']: (image['width'], image['height'])
        for image in content['images']
    }

    def check(path: Path) -> Optional[_Problem]:
        problem = _unreadable(path, folder, source)
        if problem is None and source.look == PIXELS:
            with open_image(path) as image:
                if image_size(image) != sizes[path]:
                    name = _relative(path, folder)
                    return _Problem('have another size than annotated', name)
        return problem

    yield from _check_images(list(sizes), folder, source, check)


_COCO_RULES: Tuple[Callable[[dict, _Source], Iterator[Finding]], ...] = (
    _check_boxes,
    _check_masks,
    _check_ids,
    _check_references,
    _check_class_names,
    _check_coco_images,
)


# Images and label maps.

_UNLABELLED = 'have no labelled pixel'
_LABEL_FIX = (
    'A label map is a PNG file of one 8-bit channel, of the size of its image, with '
    "numbers of classes: see 'reduce_zero_label' in docs/datasets.md."
)


def _check_label_maps(source: _Source) -> Iterator[Finding]:
    dataset = source.dataset
    folder = Path(dataset.data_prefix.get('img_path') or '')
    _require_folder(folder, source)
    if dataset.ann_file:
        lines = f'Mend {dataset.ann_file}: its lines are names of images.'
        _read_ann_file(source, lines)
    infos = dataset.load_data_list()
    suffix = f'Check img_suffix of {source.key}.'
    _require(infos, f'No images *{dataset.img_suffix} in {folder}', suffix)
    images = [Path(info['img_path']) for info in infos]
    if 'seg_map_path' not in infos[0]:
        yield from _check_images(images, folder, source)
        return
    maps = {Path(info['img_path']): Path(info['seg_map_path']) for info in infos}
    map_folder = Path(dataset.data_prefix['seg_map_path'])
    fix = f'Check data_prefix and seg_map_suffix of {source.key}.'
    _require(map_folder.is_dir(), f'Folder not found: {map_folder}', fix)
    missing = set(_missing(maps.values()))
    names = sorted(_relative(path, map_folder) for path in missing)
    yield from _several(f'label maps are not in {map_folder}', names, fix)
    # A list may name some of the images; without a list all of them are used.
    if source.look != NAMES and not dataset.ann_file:
        others = set(map_folder.rglob(f'*{dataset.seg_map_suffix}')) - {*maps.values()}
        names = sorted(_relative(path, map_folder) for path in others)
        what = f'label maps in {map_folder} have no image in {folder}'
        yield from _several(what, names, f'Add the images. {suffix}')

    def check(path: Path) -> Optional[_Problem]:
        problem = _unreadable(path, folder, source)
        if problem is not None or maps[path] in missing:
            return problem
        # mmseg reads label maps with Pillow.
        problem = _unreadable(maps[path], folder, source._replace(backend='pillow'))
        if problem is not None:
            return problem._replace(kind=f'have a label map that {problem.kind}')
        if source.look == PIXELS:
            kind = _label_problem(path, maps[path], dataset)
            if kind is not None:
                return _Problem(kind, _relative(path, folder), _LABEL_FIX)
        return None

    yield from _check_images(images, folder, source, check)


def _label_problem(path: Path, map_path: Path, dataset: Any) -> Optional[str]:
    """What is wrong with a label map that can be read."""
    with open_image(path) as image, open_image(map_path) as label_map:
        # mmcv turns the image as its EXIF data say, but not the label map.
        if image_size(image) != label_map.size:
            return 'have another size than their label map'
        labels = np.asarray(label_map)
    if labels.ndim != 2 or labels.dtype != np.uint8:
        return 'have a label map that is not of one 8-bit channel'
    first = 1 if dataset.reduce_zero_label else 0
    labels = labels[(labels >= first) & (labels != _IGNORED_LABEL)]
    if labels.size == 0:
        return _UNLABELLED
    classes = dataset.label_map or dataset.metainfo.get('classes')
    last = first + len(classes or range(_IGNORED_LABEL)) - 1
    return f'have labels above {last}' if labels.max() > last else None


# Class folders and lists.


def _check_folders(source: _Source) -> Iterator[Finding]:
    dataset, folder = source.dataset, Path(source.dataset.img_prefix)
    _require_folder(folder, source)
    if dataset.ann_file:
        yield from _check_list(folder, source)
    elif dataset.with_label:
        yield from _check_class_folders(folder, source)


def _num_classes(source: _Source) -> Optional[int]:
    classes = source.dataset.metainfo.get('classes')
    return len(classes) if classes else source.num_classes


def _class_folders(folder: Path) -> List[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def _check_class_folders(folder: Path, source: _Source) -> Iterator[Finding]:
    names, count = _class_folders(folder), _num_classes(source)
    layout = 'Lay the images out as FOLDER/CLASS/IMAGE.'
    _require(names, f'No class folders in {folder}', layout)
    if count not in (None, len(names)):
        yield from _several(
            f'class folders in {folder}, but {count} classes in the config',
            names,
            'Set num_classes of the model, or mend the folders: labels are their '
            'positions in the sorted list.',
        )
    if source.look != NAMES:
        images, empty = [], []
        for name in names:
            files = sorted((folder / name).rglob('*'))
            found = [x for x in files if source.dataset.is_valid_file(x.name)]
            images += found
            empty += [] if found else [name]
        yield from _several(
            f'class folders without an image in {folder}', empty, layout
        )
        yield from _check_images(images, folder, source)


def _check_list(folder: Path, source: _Source) -> Iterator[Finding]:
    path = source.dataset.ann_file
    fix = f'Mend {path}: its lines are IMAGE LABEL.'
    lines = _read_ann_file(source, fix).splitlines()
    names = [line.strip() for line in lines]
    if source.dataset.with_label:
        count = _num_classes(source) or math.inf
        pairs = [name.rpartition(' ') for name in names]
        wrong = [
            f'line {i}'
            for i, (name, _, label) in enumerate(pairs, 1)
            if not (name and label.isdecimal() and int(label) < count)
        ]
        labels = (
            'IMAGE LABEL' if count == math.inf else f'a label from 0 to {count - 1}'
        )
        shown = f'{len(wrong)} lines of {path} without {labels}: {_examples(wrong)}'
        _require(not wrong, shown, fix)
        names = [name for name, _, _ in pairs]
    yield from _check_images([folder / name for name in names], folder, source)


def _check_same_classes(sources: Sequence[_Source]) -> Iterator[Finding]:
    """Whether training and validation have the same class folders."""
    names = [
        set(_class_folders(Path(source.dataset.img_prefix)))
        for source in sources
        if source.check is _check_folders
        and source.dataset.with_label
        and not source.dataset.ann_file
        and os.path.isdir(source.dataset.img_prefix)
    ]
    if len(names) == 2 and all(names):
        yield from _several(
            'class folders are in only one of train and val',
            sorted(names[0] ^ names[1]),
            'Name the folders of both alike: labels are their positions in the sorted '
            'list.',
        )


_CHECKS: Dict[Tuple[str, str], Callable[[_Source], Iterator[Finding]]] = {
    ('mmdet', 'CocoDataset'): _check_coco,
    ('mmseg', 'BaseSegDataset'): _check_label_maps,
    ('mmpretrain', 'CustomDataset'): _check_folders,
}
