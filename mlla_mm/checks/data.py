# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What is wrong with the data that a config names, and how to mend it.

For mmdet's data sets in COCO's format, mmseg's of images and label maps, and
mmpretrain's class folders and lists, and what is derived from them without reading its
files in another way. Other data sets are left alone.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from ..utils.images import open_image
from .config import check_config, head_classes, innermost_dataset, nearest
from .published import (
    Finding,
    SizeCheck,
    decode_problem,
    examples,
    group,
    image_size,
    is_empty,
    relative_name,
    track,
)

_COCO_KEYS = ('images', 'annotations', 'categories')
_IMAGE_KEYS = ('id', 'file_name', 'width', 'height')
# All of them are read for every annotation.
_ANNOTATION_KEYS = ('id', 'image_id', 'category_id', 'bbox', 'area')
_IGNORED_LABEL = 255


class _Source(NamedTuple):
    """A data set of a config.

    Attributes:
        key (str): Where it stands in the config.
        dataset (Dataset): Built, but nothing read: it knows its paths and classes.
        config (dict): Its config.
        num_classes (int, optional): Number of classes of the model's heads.
        decode (bool): Whether to look into images and label maps.
    """

    key: str
    dataset: Any
    config: Mapping
    num_classes: Optional[int]
    decode: bool


def check_split(
    cfg: Config, split: str, decode: bool = True
) -> Optional[List[Finding]]:
    """Check the data set of a data loader.

    Args:
        cfg (Config): The config, whose ``custom_imports`` have been imported.
        split (str): 'train', 'val' or 'test'.
        decode (bool): Look into every image and label map. False looks at annotation
            files, folders and names alone. Defaults to True.

    Returns:
        list[Finding] | None: What is wrong; empty if nothing is. None if there is no
        such data loader, or if its data set is of a kind that is not known here.

    Raises:
        ValueError: If the data set's config is wrong.
    """
    config = innermost_dataset(cfg.get(f'{split}_dataloader'))
    if config is None or not isinstance(config.get('type'), str) or _is_remote(config):
        return None
    key = f'{split}_dataloader.dataset'
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        with DATASETS.switch_scope_and_registry(None) as registry:
            check = _check_of(registry.get(config['type']))
            if check is None:
                return None
            dataset = registry.build(dict(config, lazy_init=True, pipeline=[]))
    counts = [count for _, count in head_classes(cfg.get('model') or {})]
    source = _Source(key, dataset, config, counts[0] if counts else None, decode)
    return check(source)


def check_splits(cfg: Config, decode: bool = True) -> List[Finding]:
    """Check a config and its data sets for training and validation.

    Args:
        cfg (Config): The config, whose ``custom_imports`` have been imported.
        decode (bool): As in :func:`check_split`. Defaults to True.

    Returns:
        list[Finding]: What is wrong; empty if nothing is.

    Raises:
        ValueError: If the config is wrong, or neither data set is of a known kind.
    """
    check_config(cfg)
    found = [check_split(cfg, split, decode) for split in ('train', 'val')]
    if found == [None, None]:
        raise ValueError(
            f'{cfg.filename} has no data set of a known kind: there is no check.'
        )
    return [finding for findings in found for finding in findings or []]


def require_data(cfg: Config, *splits: str) -> None:
    """Refuse to start with data that a run would fail with, or learn wrong things of.

    Annotation files, folders and names are looked at, no images.

    Args:
        cfg (Config): The config of the run.
        *splits (str): 'train', 'val' or 'test'.

    Raises:
        ValueError: Names the first thing that is wrong.
    """
    for split in splits:
        findings = check_split(cfg, split, decode=False) or []
        fatal = [finding for finding in findings if finding.fatal]
        if fatal:
            more = f' ({len(fatal) - 1} more findings)' if len(fatal) > 1 else ''
            raise ValueError(f'{fatal[0].problem}. {fatal[0].fix}{more}')


def _is_remote(config: Mapping) -> bool:
    backend = (config.get('backend_args') or {}).get('backend', 'local')
    return backend != 'local' or '://' in str(config.get('data_root'))


def _check_of(kind: Any) -> Optional[Callable]:
    """The check for a class, which has to read its files as the known one does."""
    for base in getattr(kind, '__mro__', ()):
        check = _CHECKS.get((base.__module__.split('.')[0], base.__name__))
        if check is not None and kind.load_data_list is base.load_data_list:
            return check
    return None


# COCO's format.


def _check_coco(source: _Source) -> List[Finding]:
    path = Path(source.dataset.ann_file)
    content, problem = _read_json(path, source.key)
    if problem:
        return [problem]
    if source.key.startswith('test') and isinstance(content, dict):
        # Those of COCO's test images are not published.
        content.setdefault('annotations', [])
    findings = _check_coco_lists(path, content)
    if findings:
        return findings
    findings = _check_boxes(path, content['annotations'], _loads_masks(source.config))
    findings += _check_ids(path, content)
    findings += _check_names(path, content, source)
    folder = Path(source.dataset.data_prefix.get('img', ''))
    images = {
        folder / image['file_name']: (image['width'], image['height'])
        for image in content['images']
    }
    return findings + _check_images(images, folder, source)


def _read_json(path: Path, key: str) -> Tuple[Any, Optional[Finding]]:
    where = f'Check data_root and ann_file of {key}.'
    if not path.is_file():
        return None, Finding(f'Annotation file not found: {path}', where)
    try:
        with path.open(encoding='utf-8') as file:
            return json.load(file), None
    except (ValueError, RecursionError) as error:
        what = 'empty' if path.stat().st_size == 0 else f'not JSON ({error})'
        return None, Finding(f'{path} is {what}', 'Write or download it again.')


def _check_coco_lists(path: Path, content: Any) -> List[Finding]:
    """Whether everything is there that mmdet and the checks below ask for."""
    fix = 'See docs/datasets.md for the format.'
    if not isinstance(content, dict):
        return [Finding(f'{path} holds no dict with {", ".join(_COCO_KEYS)}', fix)]
    missing = [key for key in _COCO_KEYS if not isinstance(content.get(key), list)]
    if missing:
        return [Finding(f'{path} has no list of {" and ".join(missing)}', fix)]
    if not content['images']:
        return [Finding(f'{path} lists no images', fix)]
    findings = []
    for name, keys in zip(_COCO_KEYS, (_IMAGE_KEYS, _ANNOTATION_KEYS, ('id', 'name'))):
        for key in keys:
            lacking = [
                str(i)
                for i, item in enumerate(content[name])
                if not (isinstance(item, dict) and key in item)
            ]
            if lacking:
                findings.append(
                    Finding(
                        f'{len(lacking)} of the {name} in {path} have no {key}: '
                        f'number {examples(lacking)}',
                        fix,
                    )
                )
    return findings


def _check_boxes(path: Path, annotations: List[dict], masks: bool) -> List[Finding]:
    kinds: Dict[str, List[str]] = {}
    for annotation in annotations:
        problem = _box_problem(annotation['bbox'])
        if problem is None and masks and not annotation.get('segmentation'):
            problem = 'no mask'
        if problem is not None:
            kinds.setdefault(problem, []).append(str(annotation['id']))
    fixes = {
        _NEGATIVE: 'A box is [x, y, width, height] in pixels, not two corners.',
        _EMPTY: 'mmdet leaves them out.',
        'no mask': 'Leave them out of the file, or train without masks: see '
        'docs/datasets.md.',
    }
    return [
        Finding(
            f'{len(ids)} annotations with {kind} in {path}: id {examples(ids)}',
            fixes.get(kind, 'A box is [x, y, width, height] in pixels.'),
            fatal=kind != _EMPTY,
        )
        for kind, ids in kinds.items()
    ]


_NEGATIVE = 'a box of negative width or height'
_EMPTY = 'a box of no width or height'


def _box_problem(box: Any) -> Optional[str]:
    if not isinstance(box, list) or len(box) != 4:
        return 'a box that is not four numbers'
    if not all(type(x) in (int, float) for x in box):
        return 'a box that is not four numbers'
    if not all(map(math.isfinite, box)):
        return 'a box of NaN or infinity'
    if box[2] < 0 or box[3] < 0:
        return _NEGATIVE
    return _EMPTY if 0 in box[2:] else None


def _check_ids(path: Path, content: dict) -> List[Finding]:
    findings = []
    for name in _COCO_KEYS:
        counts = Counter(item['id'] for item in content[name])
        twice = [str(x) for x, count in counts.items() if count > 1]
        if twice:
            findings.append(
                Finding(
                    f'{len(twice)} ids of {name} occur more than once in {path}: '
                    f'{examples(twice)}',
                    'Number them anew.',
                )
            )
    for key, name in (('category_id', 'categories'), ('image_id', 'images')):
        known = {item['id'] for item in content[name]}
        unknown = [str(a['id']) for a in content['annotations'] if a[key] not in known]
        if unknown:
            findings.append(
                Finding(
                    f'{len(unknown)} annotations with an unknown {key} in {path}: id '
                    f'{examples(unknown)}',
                    f'Every {key} has to be the id of one of the {name}.',
                )
            )
    return findings


def _check_names(path: Path, content: dict, source: _Source) -> List[Finding]:
    """mmdet would number the classes that it finds, as if the others were not named."""
    names = [str(category['name']) for category in content['categories']]
    absent = [x for x in source.dataset.metainfo['classes'] if x not in names]
    if not absent:
        return []
    meant = nearest(absent[0], names)
    fix = f"Is '{meant}' meant?" if meant else f'The file has {examples(names)}.'
    return [
        Finding(
            f'{len(absent)} classes of {source.key} are not in the categories of '
            f'{path}: {examples(absent)}',
            f'{fix} Name its categories in metainfo.classes.',
        )
    ]


def _loads_masks(config: Any) -> bool:
    if isinstance(config, Mapping):
        if config.get('type') == 'LoadAnnotations' and config.get('with_mask'):
            return True
        config = list(config.values())
    return isinstance(config, (list, tuple)) and any(map(_loads_masks, config))


def _check_images(
    images: Dict[Path, Optional[Tuple[int, int]]], folder: Path, source: _Source
) -> List[Finding]:
    """Whether images exist and, if asked for, decode, to the annotated size (W, H)."""
    where = f'Check data_root and data_prefix of {source.key}.'
    findings = _missing_files(list(images), folder, 'images', where)
    if source.decode:
        # A link to nothing is there, and a pipe: they are found to be unreadable.
        present = list(filter(os.path.lexists, images))
        sizes = {path: size for path, size in images.items() if size is not None}
        findings += group(
            track(present, _Nonempty(SizeCheck(sizes))),
            folder,
            'Replace them, or take them out of the data set.',
        )
    return findings


def _missing_files(
    paths: List[Path], folder: Path, what: str, fix: str
) -> List[Finding]:
    if not folder.is_dir():
        return [Finding(f'Folder not found: {folder}', fix)]
    # A look into each folder once: a file system over a network answers slowly.
    parents = {path.parent for path in paths}
    names = {x: set(os.listdir(x)) if x.is_dir() else set() for x in parents}
    missing = [
        relative_name(path, folder)
        for path in paths
        if path.name not in names[path.parent]
    ]
    if not missing:
        return []
    return [
        Finding(f'{len(missing)} {what} are not in {folder}: {examples(missing)}', fix)
    ]


class _Nonempty:
    """A check of an image, preceded by a look whether there is anything in the file."""

    def __init__(self, check: Callable[[Path], Optional[str]]) -> None:
        self.check = check

    def __call__(self, path: Path) -> Optional[str]:
        return 'of zero bytes' if is_empty(path) else self.check(path)


# Images and label maps.


def _check_label_maps(source: _Source) -> List[Finding]:
    dataset = source.dataset
    folder = Path(dataset.data_prefix.get('img_path') or '')
    where = f'Check data_root and data_prefix of {source.key}.'
    if not folder.is_dir():
        return [Finding(f'Folder not found: {folder}', where)]
    if dataset.ann_file and not Path(dataset.ann_file).is_file():
        return [Finding(f'Annotation file not found: {dataset.ann_file}', where)]
    infos = dataset.load_data_list()
    if not infos:
        return [
            Finding(
                f'No images *{dataset.img_suffix} in {folder}',
                f'Check img_suffix of {source.key}.',
            )
        ]
    images = [Path(info['img_path']) for info in infos]
    findings = _missing_files(images, folder, 'images', where)
    if 'seg_map_path' not in infos[0]:
        return findings
    maps = {Path(info['img_path']): Path(info['seg_map_path']) for info in infos}
    findings += _missing_files(
        list(maps.values()),
        Path(dataset.data_prefix['seg_map_path']),
        'label maps',
        f'Check data_prefix and seg_map_suffix of {source.key}.',
    )
    if source.decode:
        check = _LabelCheck(maps, dataset)
        present = [pair[0] for pair in maps.items() if all(map(os.path.lexists, pair))]
        for problem in group(track(present, _Nonempty(check)), folder, _LABEL_FIX):
            findings.append(problem._replace(fatal=_UNLABELLED not in problem.problem))
    return findings


_UNLABELLED = 'without a labelled pixel'
_LABEL_FIX = (
    'A label map is a PNG file of one 8-bit channel, of the size of its image, with '
    "numbers of classes: see 'reduce_zero_label' in docs/datasets.md."
)


class _LabelCheck:
    """Whether an image and its label map decode, fit and have labels of classes.

    Args:
        maps (dict): Label maps by image.
        dataset (BaseSegDataset): Says which labels there are.
    """

    def __init__(self, maps: Dict[Path, Path], dataset: Any) -> None:
        self.maps = maps
        if dataset.label_map is not None:
            count = len(dataset.label_map)
        else:
            count = len(dataset.metainfo.get('classes') or range(_IGNORED_LABEL))
        self.first = 1 if dataset.reduce_zero_label else 0
        self.last = count - 1 + self.first

    def __call__(self, path: Path) -> Optional[str]:
        problem = decode_problem(path)
        if problem:
            return problem
        map_path = self.maps[path]
        if is_empty(map_path) or decode_problem(map_path):
            return 'with an unreadable label map'
        with open_image(path) as image, open_image(map_path) as label_map:
            # mmcv turns the image as its EXIF data say, and not the label map.
            if image_size(image) != label_map.size:
                return 'of another size than the label map'
            labels = np.asarray(label_map)
        if labels.ndim != 2 or labels.dtype != np.uint8:
            return 'whose label map is not of one 8-bit channel'
        labels = labels[labels != _IGNORED_LABEL]
        if self.first == 1:
            labels = labels[labels != 0]
        if labels.size == 0:
            return _UNLABELLED
        if labels.max() > self.last:
            return f'with labels above {self.last}'
        return None


# Class folders and lists.


def _check_folders(source: _Source) -> List[Finding]:
    folder = Path(source.dataset.img_prefix)
    if not folder.is_dir():
        return [
            Finding(
                f'Folder not found: {folder}',
                f'Check data_root and data_prefix of {source.key}.',
            )
        ]
    if source.dataset.ann_file:
        return _check_list(source, folder)
    if not source.dataset.with_label:
        return []
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    layout = 'Lay the images out as FOLDER/CLASS/IMAGE.'
    if not names:
        return [Finding(f'No class folders in {folder}', layout)]
    findings = []
    classes = source.dataset.metainfo.get('classes')
    expected = len(classes) if classes else source.num_classes
    if expected is not None and len(names) != expected:
        findings.append(
            Finding(
                f'{len(names)} class folders in {folder}, but {expected} classes in '
                f'the config: {examples(names)}',
                'Set num_classes of the model, or mend the folders: labels are their '
                'positions in the sorted list.',
            )
        )
    images, empty = [], []
    for name in names if source.decode else ():
        found = [
            path
            for path in sorted((folder / name).rglob('*'))
            if source.dataset.is_valid_file(path.name)
        ]
        images += found
        if not found:
            empty.append(name)
    if empty:
        findings.append(
            Finding(f'{len(empty)} class folders without an image in {folder}: '
                    f'{examples(empty)}', layout)
        )  # fmt: skip
    return findings + _check_images(dict.fromkeys(images), folder, source)


def _check_list(source: _Source, folder: Path) -> List[Finding]:
    path = Path(source.dataset.ann_file)
    fix = f'Mend {path}: its lines are IMAGE LABEL.'
    if not path.is_file():
        return [
            Finding(
                f'Annotation file not found: {path}',
                f'Check data_root and ann_file of {source.key}.',
            )
        ]
    lines = [line.strip() for line in path.read_text(encoding='utf-8').splitlines()]
    if not any(lines):
        return [Finding(f'{path} is empty', fix)]
    if not source.dataset.with_label:
        return _check_images(dict.fromkeys(folder / x for x in lines), folder, source)
    parts = [line.rsplit(' ', 1) for line in lines]
    classes = source.dataset.metainfo.get('classes')
    count = len(classes) if classes else source.num_classes or math.inf
    wrong = [
        f'line {i}'
        for i, part in enumerate(parts, 1)
        if len(part) != 2 or not (part[1].isdecimal() and int(part[1]) < count)
    ]
    if wrong:
        labels = (
            'IMAGE LABEL' if count == math.inf else f'a label from 0 to {count - 1}'
        )
        return [
            Finding(
                f'{len(wrong)} lines of {path} without {labels}: {examples(wrong)}',
                fix,
            )
        ]
    images = dict.fromkeys(folder / name for name, _ in parts)
    return _check_images(images, folder, source)


_CHECKS: Dict[Tuple[str, str], Callable[[_Source], List[Finding]]] = {
    ('mmdet', 'CocoDataset'): _check_coco,
    ('mmseg', 'BaseSegDataset'): _check_label_maps,
    ('mmpretrain', 'CustomDataset'): _check_folders,
}
