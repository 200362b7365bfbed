# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Finds mistakes in the data of a config, and says how to mend them.

It knows mmdet's data sets in COCO's format, mmseg's data sets of images and label maps,
and mmpretrain's class folders and lists. It also knows classes that inherit from them
and read their files in the same way. Of other data sets that MMEngine loads it counts
the labels. It looks below wrappers of data sets, such as ``ConcatDataset``.
"""

from collections.abc import Iterator, Mapping
from functools import reduce
from operator import add
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, DefaultScope

from ..engine.options import kind_of, leaf_datasets, parts_of
from .class_folders import check_folders, check_same_classes
from .coco import check_coco
from .config import check_config, head_classes
from .label_maps import check_label_maps
from .source import (
    NAMES,
    PIXELS,
    Check,
    ClassCounts,
    Finding,
    Source,
    UnusableError,
    several,
)

_CHECKS: Dict[Tuple[str, str], Check] = {
    ('mmdet', 'CocoDataset'): check_coco,
    ('mmseg', 'BaseSegDataset'): check_label_maps,
    ('mmpretrain', 'CustomDataset'): check_folders,
}


class Report(NamedTuple):
    """What the checks of some data loaders found.

    Attributes:
        findings (list[Finding]): What is wrong; empty if nothing is.
        counts (dict[str, ClassCounts]): How often each class occurs, by split.
    """

    findings: List[Finding]
    counts: Dict[str, ClassCounts]


def check_splits(
    cfg: Config, look: str = PIXELS, num_images: Optional[Mapping[str, int]] = None
) -> Report:
    """Check a config and its data sets for training and validation.

    Args:
        cfg (Config): The config, whose ``custom_imports`` have been imported.
        look (str): How closely to look, one of :data:`mlla_mm.checks.source.LOOKS`.
            Defaults to 'pixels'.
        num_images (dict, optional): Expected numbers of images under 'train' and 'val'.
            None allows any number. Defaults to None.

    Raises:
        ValueError: If the config is wrong, or if there is no check for either data set.
    """
    check_config(cfg)
    report = check_data(cfg, 'train', 'val', look=look, num_images=num_images)
    if report is None:
        raise ValueError(
            f'There is no check for the data sets of {cfg.filename}. There are checks '
            'for CocoDataset, BaseSegDataset, CustomDataset and their subclasses.'
        )
    return report


def check_data(
    cfg: Config,
    *splits: str,
    look: str = PIXELS,
    num_images: Optional[Mapping[str, int]] = None,
) -> Optional[Report]:
    """Check the data sets of some data loaders.

    Args:
        cfg (Config): The config, whose ``custom_imports`` have been imported.
        *splits (str): 'train', 'val' or 'test'.
        look (str): As in :func:`check_splits`. Defaults to 'pixels'.
        num_images (dict, optional): Expected numbers of images by split.
            Defaults to None.

    Returns:
        Report | None: What is wrong. None if there is no check for any of the data
        sets.

    Raises:
        ValueError: If the config of a data set is wrong.
    """
    expected = num_images or {}
    sources = [
        source
        for split in splits
        for source in _sources(cfg, split, look, expected.get(split))
    ]
    if not sources:
        return None
    findings = [finding for source in sources for finding in _findings(source)]
    findings += check_same_classes(sources)
    counts = _counts_by_split(sources)
    for split, number in counts.items():
        findings += _check_counts(split, number, cfg.get('allow_empty_classes', False))
    return Report(findings, counts)


def require_data(cfg: Config, *splits: str) -> Optional[Report]:
    """Refuse to start with data on which a run fails, or learns something wrong.

    It looks at annotation files, folders and names of files, and into a few label maps.

    Args:
        cfg (Config): The config of the run.
        *splits (str): 'train', 'val' or 'test'.

    Returns:
        Report | None: What is odd, but no reason to refuse. None if there is no check
        for any of the data sets.

    Raises:
        ValueError: Names the first thing that is wrong.
    """
    report = check_data(cfg, *splits, look=NAMES)
    fatal = [finding for finding in report.findings if finding.fatal] if report else []
    if fatal:
        more = f' ({len(fatal) - 1} more)' if len(fatal) > 1 else ''
        raise ValueError(f'{fatal[0].problem}. {fatal[0].fix}{more}')
    return report


def describe(report: Optional[Report]) -> Iterator[str]:
    """Lines of text: what is odd, and how much data there are in each split."""
    if report is None:
        return
    for finding in report.findings:
        yield f'Warning: {finding.problem}. {finding.fix}'
    for split, counts in report.counts.items():
        text = f'Data of {split}: {counts.images} images'
        if counts.unit == 'objects' and counts.numbers is not None:
            text += f', {sum(counts.numbers)} objects'
        yield f'{text}, {len(counts.classes)} classes.'


# The data sets of a config.


def _sources(
    cfg: Config, split: str, look: str, num_images: Optional[int]
) -> Iterator[Source]:
    """The data sets below a data loader for which there is a check."""
    heads = [count for _, count in head_classes(cfg.get('model') or {})]
    for key, config in leaf_datasets(cfg.get(f'{split}_dataloader')):
        dataset = _build(cfg, config)
        if dataset is not None:
            yield Source(
                split=split,
                key=f'{split}_dataloader.{key}',
                dataset=dataset,
                config=config,
                num_classes=heads[0] if heads else None,
                look=look,
                num_images=num_images,
                backend=_image_backend(config.get('pipeline')),
                cfg=cfg,
            )


def _build(cfg: Config, config: Mapping) -> Any:
    """A data set without its annotations; None if there is no check for it."""
    if not isinstance(config.get('type'), str):
        return None
    backend = (config.get('backend_args') or {}).get('backend', 'local')
    if backend != 'local' or '://' in str(config.get('data_root')):
        return None
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        with DATASETS.switch_scope_and_registry(None) as registry:
            kind = registry.get(config['type'])
            if kind is None:
                registry.build(config)  # raises the error that names the type
            if _check_of(kind) is None:
                return None
            return registry.build(dict(config, lazy_init=True, pipeline=[]))


def _check_of(kind: Any) -> Optional[Check]:
    """The check for a class."""
    for base in getattr(kind, '__mro__', ()):
        check = _CHECKS.get((base.__module__.split('.')[0], base.__name__))
        # Another function may read other files.
        if check is not None and kind.load_data_list is base.load_data_list:
            return check
    if BaseDataset not in getattr(kind, '__mro__', ()):
        return None
    # mmpretrain's own would download what is missing.
    is_published = kind.load_data_list.__module__.startswith('mmpretrain.')
    return None if is_published else _check_loaded


def _image_backend(pipeline: Any) -> str:
    """What decodes the images of a pipeline, by mmcv's name. OpenCV is the default."""
    for step in parts_of(pipeline):
        if 'LoadImage' in str(kind_of(step)) and step.get('imdecode_backend'):
            return step['imdecode_backend']
    return 'cv2'


def _findings(source: Source) -> Iterator[Finding]:
    check = _check_of(type(source.dataset))
    assert check is not None
    try:
        yield from check(source)
    except UnusableError as end:
        yield end.args[0]


# Labels.


def _check_loaded(source: Source) -> Iterator[Finding]:
    """Count the labels of a data set whose files are unknown."""
    dataset = source.dataset
    dataset.full_init()
    classes = dataset.metainfo.get('classes') or range(source.num_classes or 0)
    numbers = [0] * len(classes)
    images_with = [0] * len(classes)
    outside: List[str] = []
    labelled = False
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        labels = _labels_of(info)
        labelled = labelled or labels is not None
        for label in labels or ():
            if classes and not 0 <= label < len(classes):
                outside.append(f'{label} in sample {i}')
            elif classes:
                numbers[label] += 1
        for label in {x for x in labels or () if 0 <= x < len(classes)}:
            images_with[label] += 1
    yield from several(
        f'labels of {source.key} are not from 0 to {len(classes) - 1}',
        outside,
        'Labels are the positions of the names in metainfo.classes.',
    )
    source.counts = ClassCounts(
        images=len(dataset),
        classes=tuple(map(str, classes)),
        unit='objects',
        numbers=numbers if labelled else None,
        images_with=images_with if labelled else None,
    )


def _labels_of(info: Mapping) -> Optional[List[int]]:
    """The labels of a sample; None if it does not tell them."""
    if 'instances' in info:
        return [
            x['bbox_label'] for x in info['instances'] if not x.get('ignore_flag', 0)
        ]
    if 'gt_label' in info:
        return [int(x) for x in np.atleast_1d(info['gt_label'])]
    return None


def _counts_by_split(sources: List[Source]) -> Dict[str, ClassCounts]:
    """The counts of each split, if all of its data sets were counted alike."""
    found: Dict[str, ClassCounts] = {}
    for split in dict.fromkeys(source.split for source in sources):
        counts = [x.counts for x in sources if x.split == split and x.counts]
        alike = len({(x.classes, x.unit) for x in counts}) == 1
        if alike and len(counts) == sum(x.split == split for x in sources):
            found[split] = reduce(add, counts)
    return found


def _check_counts(
    split: str, counts: ClassCounts, allow_empty: bool
) -> Iterator[Finding]:
    """Whether each class occurs."""
    if not counts.images:
        yield Finding(
            f'{split}_dataloader.dataset has no image left',
            'Look at its annotations and filter_cfg: all images are filtered away.',
        )
    elif counts.numbers is not None:
        names = [x for x, number in zip(counts.classes, counts.numbers) if not number]
        yield from several(
            f'classes of {split}_dataloader.dataset have no {counts.unit}',
            names,
            'Add some, or leave the classes out of metainfo.classes and num_classes. '
            'Training goes on without them with allow_empty_classes = True.'
            if split == 'train'
            else 'They are not measured.',
            fatal=split == 'train' and not allow_empty,
        )
