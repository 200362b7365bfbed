# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Finds mistakes in the data of a config, and says how to mend them.

It knows mmdet's data sets in COCO's format, mmseg's data sets of images and label maps,
and mmpretrain's class folders and lists. It also knows classes that inherit from them
and read their files in the same way. Of other data sets that MMEngine loads it counts
the labels. It looks below wrappers of data sets, such as ``ConcatDataset``.
"""

import copy
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import reduce
from itertools import chain
from operator import add
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union

from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, DefaultScope

from ..compat.openmmlab import load_again_as_list
from ..engine.arguments import describe_argument
from ..engine.config_files import describe_changes
from ..engine.parts import SPLITS, datasets_of, kind_of, leaf_datasets, parts_of
from ..utils.files import write_whole
from ..utils.text import PATH_LIMIT, describe_error, printable
from .class_folders import check_folders, check_same_classes
from .classes import head_classes
from .coco import check_annotations, check_coco, fix_coco, read_coco
from .config import check_config
from .kinds import class_of
from .label_maps import check_label_maps
from .shared_images import check_shared_images
from .source import (
    NAMES,
    PIXELS,
    Check,
    ClassCounts,
    Finding,
    Source,
    UnusableError,
    count_labels,
    examples,
    labels_of,
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
        unchecked (list[str]): Keys of the data sets for which there is no check.
    """

    findings: List[Finding]
    counts: Dict[str, ClassCounts]
    unchecked: List[str]


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
    check_config(cfg, ('train', 'val'))
    report = check_data(cfg, 'train', 'val', look=look, num_images=num_images)
    if report is None:
        raise ValueError(
            f'There is no check for the data sets of {cfg.filename}. There are checks '
            "for local files that subclasses of MMEngine's BaseDataset read."
        )
    unchecked = several(
        'data sets were not checked',
        report.unchecked,
        'There is no check for their class, or their files are not local. Rehearse the '
        'training with --check.',
        fatal=False,
    )
    return report._replace(findings=[*report.findings, *unchecked])


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
    for split in splits:
        findings += _check_metrics(cfg, split, sources)
    findings += check_shared_images(sources)
    counts = _counts_by_split(sources)
    for split, number in counts.items():
        findings += _check_counts(split, number, cfg.get('allow_empty_classes', False))
    checked = [source.key for source in sources]
    keys = [key for split in splits for key, _ in datasets_of(cfg, split)]
    return Report(findings, counts, [key for key in keys if key not in checked])


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
        text = f'Data of {split}: {counts.images:,} images'
        if counts.unit == 'objects' and counts.numbers is not None:
            text += f', {sum(counts.numbers):,} objects'
        yield f'{text}, {len(counts.classes)} classes.'


def write_fixed(cfg: Config, folder: Union[str, Path]) -> List[str]:
    """Write repaired copies of a config's annotations in COCO's format.

    A file is written if something in it can be repaired. The originals stay as they
    are.

    Args:
        cfg (Config): The config. It is changed in place, and then names the new files.
        folder (str | Path): The folder for the files. Their names, and their folders
            below one that they share, stay as they are.

    Returns:
        list[str]: What was repaired, and what has to be changed in the config.

    Raises:
        ValueError: If there are no such annotations, if a file cannot be read, or if
            one is there that would be overwritten. Nothing is written then. Also if a
            file cannot be written.
    """
    sources: Dict[Path, List[Source]] = defaultdict(list)
    for split in SPLITS:
        for source in _sources(cfg, split, NAMES, None):
            if not is_coco(source):
                continue
            # Not the file that a link leads to: its name may be a checksum.
            path = Path(os.path.abspath(source.dataset.ann_file or ''))
            # Annotations of test images alone may not be published.
            if split != 'test' or path in sources:
                sources[path].append(source)
    if not sources:
        raise ValueError(
            f'{cfg.filename} has no annotations in the format of COCO. Others cannot '
            'be repaired.'
        )
    root = os.path.commonpath([path.parent for path in sources])
    lines, fixed = [], {}
    for path, same_file in sources.items():
        target = Path(os.path.abspath(folder)) / path.relative_to(root)
        if target.exists():
            raise ValueError(f'{target} is already there. Choose another folder.')
        try:
            content = read_coco(same_file[0])
        except UnusableError as end:
            raise ValueError('{0.problem}. {0.fix}'.format(*end.args)) from end
        done = [line for source in same_file for line in fix_coco(content, source)]
        lines += [f'{path}: {line}' for line in done or ['nothing to repair']]
        if done:
            fixed[path] = target, content
    before = copy.deepcopy(cfg.to_dict())
    for path, (target, content) in fixed.items():
        try:
            write_whole(target, json.dumps(content).encode())
        except OSError as error:
            problem = f'{target} cannot be written ({error.strerror})'
            raise ValueError(f'{problem}. Choose another folder.') from error
        for source in sources[path]:
            source.config['ann_file'] = str(target)
        for part in parts_of([cfg.get('val_evaluator'), cfg.get('test_evaluator')]):
            if part.get('ann_file') and os.path.abspath(part['ann_file']) == str(path):
                part['ann_file'] = str(target)
    changes = list(describe_changes(before, cfg.to_dict()))
    return lines + ['Change the config:'] * bool(changes) + changes


# The data sets of a config.


def _sources(
    cfg: Config, split: str, look: str, num_images: Optional[int]
) -> Iterator[Source]:
    """The data sets below a data loader for which there is a check."""
    heads = [count for _, count in head_classes(cfg.get('model') or {})]
    loader = cfg.get(f'{split}_dataloader')
    if isinstance(loader, Mapping) and loader.get('dataset') in (None, {}):
        raise ValueError(
            f'{split}_dataloader has no dataset. See docs/datasets.md for examples.'
        )
    folds = [x for x in parts_of(loader) if kind_of(x) == 'KFoldDataset']
    folded = [config for fold in folds for _, config in leaf_datasets(fold)]
    for key, config in datasets_of(cfg, split):
        dataset = _build(cfg, config, key)
        if dataset is not None:
            yield Source(
                split=split,
                key=key,
                dataset=dataset,
                config=config,
                num_classes=heads[0] if heads else None,
                look=look,
                num_images=num_images,
                backend=_image_backend(config.get('pipeline')),
                cfg=cfg,
                folded=any(config is other for other in folded),
            )


def _build(cfg: Config, config: Mapping, key: str) -> Any:
    """A data set without its annotations; None if there is no check for it."""
    if not config.get('type'):
        raise ValueError(f'{key} has no type. See docs/datasets.md for examples.')
    if _is_remote(config):
        return None
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        kind = class_of(DATASETS, config['type'])
        if kind is None:
            DATASETS.build(config)  # raises the error that names the type
        if _check_of(kind) is None:
            return None
        try:
            dataset = DATASETS.build(dict(config, lazy_init=True, pipeline=[]))
        except Exception as error:
            if kind.__module__.split('.')[0] not in (package for package, _ in _CHECKS):
                return None  # somebody's own class may take other arguments
            refused = describe_argument(error, cfg)
            raise ValueError(refused or _why_not_built(config, key, error)) from error
    # Its class may have loaded the annotations already.
    load_again_as_list(dataset)
    return dataset


def _why_not_built(config: Mapping, key: str, error: Exception) -> str:
    reason = describe_error(error)
    # Some data sets of mmseg assert, without a word, that files exist.
    if isinstance(error, AssertionError):
        prefix, root = config.get('data_prefix'), config.get('data_root') or ''
        names = prefix.values() if isinstance(prefix, Mapping) else [prefix]
        paths = [os.path.join(root, x) for x in [*names, config.get('ann_file')] if x]
        missing = [path for path in paths if not os.path.exists(path)]
        reason = f'not found: {examples(missing)}' if missing else reason
    return (
        f'{key} cannot be built ({reason}). Check data_root, data_prefix, ann_file and '
        f'the other arguments of {kind_of(dict(config))}.'
    )


def _is_remote(config: Mapping) -> bool:
    """Whether a data set reads files that are not local."""
    places = [config.get(key) for key in ('data_root', 'ann_file', 'data_prefix')]
    options = config.get('backend_args')
    backend = options.get('backend') if isinstance(options, Mapping) else None
    return '://' in str(places) or backend not in (None, 'local')


def _check_of(kind: Any) -> Optional[Check]:
    """The check for a class."""
    for base in getattr(kind, '__mro__', ()):
        check = _CHECKS.get((base.__module__.split('.')[0], base.__name__))
        # Another function may read other files.
        same = all(
            getattr(kind, name, None) is getattr(base, name, None)
            for name in ('load_data_list', 'COCOAPI')
        )
        if check is not None and same:
            return check
    if BaseDataset not in getattr(kind, '__mro__', ()):
        return None
    # mmpretrain's own would download what is missing.
    is_published = kind.load_data_list.__module__.startswith('mmpretrain.')
    # Classes of panoptic data sets are not those of their boxes alone.
    is_panoptic = 'thing_classes' in (getattr(kind, 'METAINFO', None) or {})
    return None if is_published or is_panoptic else _check_loaded


def is_coco(source: Source) -> bool:
    """Whether the annotations are read in COCO's format."""
    return _check_of(type(source.dataset)) is check_coco


def _image_backend(pipeline: Any) -> Optional[str]:
    """What decodes the images of a pipeline, by mmcv's name. OpenCV is the default.

    None if another transform reads them, such as those of mmseg for arrays of NumPy.
    """
    steps = list(parts_of(pipeline))
    loads = [step for step in steps if 'LoadImageFromFile' in str(kind_of(step))]
    if steps and not loads:
        return None
    return (loads and loads[0].get('imdecode_backend')) or 'cv2'


def _findings(source: Source, check: Optional[Check] = None) -> Iterator[Finding]:
    """What a check finds; by default, that of the data set's class."""
    check = check or _check_of(type(source.dataset))
    assert check is not None
    try:
        yield from check(source)
    except UnusableError as end:
        yield end.args[0]
    # Such as a folder that may not be read, or links in a circle.
    except OSError as error:
        path = printable(error.filename, PATH_LIMIT)
        fix = f'Mend it, or take it out of the data of {source.key}.'
        yield Finding(f'{path} cannot be read ({error.strerror})', fix)


# Labels.


def _check_loaded(source: Source) -> Iterator[Finding]:
    """Count the labels of a data set whose files are unknown."""
    dataset = source.dataset
    dataset.full_init()
    classes = dataset.metainfo.get('classes') or range(source.num_classes or 0)
    source.counts = ClassCounts(len(dataset), tuple(map(str, classes)), 'images')
    # Its own function may read files.
    if type(dataset).get_data_info is not BaseDataset.get_data_info:
        return
    infos = dataset.data_list
    try:
        labels = [labels_of(info) for info in infos]
    except (AttributeError, KeyError, TypeError):
        return  # a transform may make labels of what there is
    is_detection = any('instances' in info for info in infos)
    if not (classes and (is_detection or any('gt_label' in info for info in infos))):
        return
    known = range(len(classes))
    yield from several(
        f'labels of {source.key} are not from 0 to {len(classes) - 1}',
        [str(x) for x in {*chain(*labels)} if x not in known],
        'Labels are the positions of the names in metainfo.classes.',
    )
    source.counts = count_labels(
        labels, classes, 'objects' if is_detection else 'images'
    )


def _check_metrics(cfg: Config, split: str, sources: List[Source]) -> Iterator[Finding]:
    """Whether the metric's own annotations are those of the images that it measures.

    It knows images by their ids alone, and measures all that its annotations have.
    """
    sources = [x for x in sources if x.split == split and x.image_ids]
    counts = Counter(id_ for source in sources for id_ in source.image_ids)
    evaluator, loader = f'{split}_evaluator', f'{split}_dataloader'
    metrics = list(parts_of(cfg.get(evaluator)))
    # mmdet's MultiDatasetsEvaluator has a metric for each data set.
    if not (counts and metrics) or 'MultiDatasetsEvaluator' in map(kind_of, metrics):
        return
    yield from several(
        f'ids of images occur in more than one data set of {loader}',
        [str(x) for x, count in counts.items() if count > 1],
        'Number them anew in one of the files: metrics take them for one image.',
    )
    read = {Path(source.dataset.ann_file).resolve(): source for source in sources}
    used = {id_ for source in sources for id_ in source.used_ids}
    # Data sets of other formats, and folds, use images that are not known.
    is_known = len(sources) == len(datasets_of(cfg, split)) and all(
        source.used_ids and not source.folded for source in sources
    )
    paths = [str(part['ann_file']) for part in metrics if part.get('ann_file')]
    for path in dict.fromkeys(x for x in paths if '://' not in x):
        file = read.get(Path(path).resolve())
        if file is None:
            dataset = copy.copy(sources[0].dataset)
            dataset.ann_file = path
            file = replace(sources[0], key=evaluator, look=NAMES, dataset=dataset)
            file.image_ids = {}
            yield from _findings(file, check_annotations)
        if not file.image_ids:
            continue
        yield from several(
            f'images of {loader} are not in {path}, which {evaluator} reads: ids',
            [str(x) for x in counts if x not in file.image_ids],
            'Name the same file in ann_file of both.',
        )
        unused = [str(x) for x, has in file.image_ids.items() if has and x not in used]
        yield from several(
            f'images with objects in {path}, which {evaluator} reads, are not used by '
            f'{loader}: ids',
            unused if is_known else [],
            'Their objects count as missed. Name the same file in ann_file of both, '
            'and write test_mode=True, which switches filter_cfg off.',
            # A part is what the user asks for with indices.
            fatal=all(source.config.get('indices') is None for source in sources),
        )


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
        return
    if counts.numbers is None:
        return
    if split != 'train' and not any(counts.numbers):
        yield Finding(
            f'{split}_dataloader.dataset has no {counts.unit} of any class',
            'Look at its annotations: there is nothing to measure.',
        )
        return
    yield from several(
        f'classes of {split}_dataloader.dataset have no {counts.unit}',
        [x for x, number in zip(counts.classes, counts.numbers) if not number],
        'Add some, or leave the classes out of metainfo.classes and num_classes. With '
        'allow_empty_classes = True in the config a training goes on without them.'
        if split == 'train'
        else 'They are not measured.',
        fatal=split == 'train' and not allow_empty,
    )
