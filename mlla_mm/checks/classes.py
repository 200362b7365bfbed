# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Finds out whether the heads of a model and its data sets have the same classes."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple, Set, Tuple

from mmengine.config import Config
from mmengine.fileio import list_from_file
from mmengine.registry import DATASETS

from ..engine.parts import SPLITS, datasets_of, named_parts, wrapping_datasets
from ..utils.text import printable
from .kinds import PACKAGES, class_of

# Keys of heads whose classes are those of the data set.
_HEADS = ('bbox_head', 'mask_head', 'decode_head', 'auxiliary_head', 'head')
_OF_PIXELS = ('model.decode_head', 'model.auxiliary_head')
_OF_CLASSIFIERS = ('model.head.num_classes', 'model.data_preprocessor.num_classes')


def head_classes(model: Mapping) -> Iterator[Tuple[str, int]]:
    """Numbers of classes in the config of a model, with their keys.

    None of a model that is given the classes in words: its heads have places for words.
    """
    if 'language_model' in model:
        return
    found = list(named_parts(model.get('data_preprocessor'), 'model.data_preprocessor'))
    parents = [('model', model), *named_parts(model.get('roi_head'), 'model.roi_head')]
    for path, parent in parents:
        for key in _HEADS:
            found += named_parts(parent.get(key), f'{path}.{key}')
    main = {part.get('type') for path, part in found if 'decode_head' in path}
    for path, part in found:
        # Other auxiliary heads may have a task of their own, such as edges.
        other = 'auxiliary_head' in path and part.get('type') not in {'FCNHead', *main}
        count = part.get('num_classes')
        if isinstance(count, int) and not (other or part.get('class_agnostic')):
            yield f'{path}.num_classes', count


class _Classes(NamedTuple):
    """Names of the classes of a data set, and its key."""

    key: str
    names: Sequence[str]


def _dataset_classes(dataset: Mapping, key: str) -> Sequence[str]:
    """Names of the classes by a data set's config or type; empty if unknown."""
    metainfo = dataset.get('metainfo')
    metainfo = metainfo if isinstance(metainfo, Mapping) else {}
    if 'CLASSES' in metainfo:
        raise ValueError(
            f'{key}.metainfo has CLASSES, which nothing reads: write classes instead.'
        )
    # The second is an argument of mmpretrain's data sets, which metainfo overrides.
    for where, classes in (
        (f'{key}.metainfo.classes', metainfo.get('classes')),
        (f'{key}.classes', dataset.get('classes')),
    ):
        if classes is not None:
            return _named_classes(classes, where)
    known = getattr(class_of(DATASETS, dataset.get('type')), 'METAINFO', None) or {}
    # Panoptic data sets have more classes than the heads for things.
    classes = None if 'thing_classes' in known else known.get('classes')
    return classes if isinstance(classes, (list, tuple)) else ()


def _named_classes(classes: Any, key: str) -> Sequence[str]:
    """The names that a config gives, or that are in the file which it names."""
    if isinstance(classes, (set, frozenset)):
        raise ValueError(
            f'{key} is a set, whose order differs between runs. Labels are positions: '
            'write a tuple.'
        )
    if isinstance(classes, str):
        if '://' in classes:
            return ()
        path = os.path.expanduser(classes)
        if not os.path.isfile(path):
            raise ValueError(
                f'{key} is the text {printable(repr(classes))}, and there is no such '
                'file of names. For one class write a comma: '
                f'({printable(repr(classes))},).'
            )
        classes = list_from_file(path)
    return classes if isinstance(classes, (list, tuple)) else ()


def check_classes(model: Mapping, cfg: Config, splits: Sequence[str] = SPLITS) -> None:
    """See whether the heads and all data sets mean the same by a label.

    Args:
        model (Mapping): The config of the model, without its test-time augmentation.
        cfg (Config): The whole config, whose default scope is the current one.
        splits (Sequence[str]): The splits whose data the run reads. Defaults to
            ('train', 'val', 'test').

    Raises:
        ValueError: Names the keys, and what they say.
    """
    found = {
        split: [
            _Classes(key, _dataset_classes(dataset, key))
            for key, dataset in datasets_of(cfg, split)
        ]
        for split in splits
    }
    heads = list(head_classes(model))
    if not heads:
        return
    known = {}
    for split in splits:
        others = tuple(_wrappers_of_others(cfg, split))
        named = [x for x in found[split] if x.names and not x.key.startswith(others)]
        known[split] = named
    for split, leaves in known.items():
        for leaf in leaves[1:]:
            _expect_same(leaves[0], leaf)
        for leaf in leaves[:1]:
            _check_names(leaf, cfg)
            _check_number(heads, leaf, split)
    for one, other in zip(known.get('train', [])[:1], known.get('val', [])[:1]):
        # A classifier can be evaluated on fewer classes.
        if len(one.names) == len(other.names):
            _expect_same(one, other)


def _wrappers_of_others(cfg: Config, split: str) -> Iterator[str]:
    """Where the keys begin of what is in wrappers that may change the classes."""
    loader = f'{split}_dataloader'
    for key, wrapper in wrapping_datasets(cfg.get(loader)):
        bases = getattr(class_of(DATASETS, wrapper.get('type')), '__mro__', ())
        if not {base.__module__.split('.')[0] for base in bases} & PACKAGES:
            yield f'{loader}.{key}.'


def _expect_same(one: _Classes, other: _Classes) -> None:
    for i, pair in enumerate(zip_longest(one.names, other.names)):
        if pair[0] != pair[1]:
            first, second = (
                'missing' if name is None else printable(repr(name)) for name in pair
            )
            raise ValueError(
                f'{one.key} and {other.key} have other classes: label {i} is {first} '
                f'in the first, and {second} in the second. Give both the same names '
                'in the same order in metainfo.classes.'
            )


def _check_names(classes: _Classes, cfg: Config) -> None:
    """Names are found in the data by mmdet and mmseg, and by mmpretrain only shown."""
    seen: Set[str] = set()
    # ImageNet has two kinds of cranes.
    for name in classes.names if cfg.get('default_scope') != 'mmpretrain' else ():
        if name in seen:
            raise ValueError(
                f'{classes.key} has the class {printable(repr(name))} twice. Remove '
                'one of them from metainfo.classes.'
            )
        seen.add(name)


def _check_number(
    heads: Iterable[Tuple[str, int]], classes: _Classes, split: str
) -> None:
    names = classes.names
    text = ', '.join(map(str, names[:3])) + (', ...' if len(names) > 3 else '')
    for path, count in heads:
        # A classifier of more classes can be evaluated on some of them.
        on_some = split != 'train' and path in _OF_CLASSIFIERS
        # One channel tells two classes of pixels apart, by a sigmoid.
        if (count, len(names)) == (1, 2) and path.startswith(_OF_PIXELS):
            continue
        if count < len(names) or (count > len(names) and not on_some):
            raise ValueError(
                f'{path} is {count}, but the data set of {split}_dataloader has '
                f'{len(names)} classes ({text}). Set the number, or '
                'metainfo.classes of the data set.'
            )
