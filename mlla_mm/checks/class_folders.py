# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Class folders and lists of images, as mmpretrain reads them."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import List, Optional

from .image_files import check_images
from .source import (
    NAMES,
    Finding,
    Source,
    examples,
    read_ann_file,
    require,
    require_folder,
    several,
)


def check_folders(source: Source) -> Iterator[Finding]:
    dataset, folder = source.dataset, Path(source.dataset.img_prefix)
    require_folder(folder, source)
    if dataset.ann_file:
        yield from _check_list(folder, source)
    elif dataset.with_label:
        yield from _check_class_folders(folder, source)


def _num_classes(source: Source) -> Optional[int]:
    classes = source.dataset.metainfo.get('classes')
    return len(classes) if classes else source.num_classes


def _class_folders(folder: Path) -> List[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def _check_class_folders(folder: Path, source: Source) -> Iterator[Finding]:
    names, count = _class_folders(folder), _num_classes(source)
    layout = 'Lay the images out as FOLDER/CLASS/IMAGE.'
    require(names, f'No class folders in {folder}', layout)
    if count not in (None, len(names)):
        yield from several(
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
        yield from several(f'class folders without an image in {folder}', empty, layout)
        yield from check_images(images, folder, source)


def _check_list(folder: Path, source: Source) -> Iterator[Finding]:
    path = source.dataset.ann_file
    fix = f'Mend {path}: its lines are IMAGE LABEL.'
    lines = read_ann_file(source, fix).splitlines()
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
        shown = f'{len(wrong)} lines of {path} without {labels}: {examples(wrong)}'
        require(not wrong, shown, fix)
        names = [name for name, _, _ in pairs]
    yield from check_images([folder / name for name in names], folder, source)


def check_same_classes(sources: Sequence[Source]) -> Iterator[Finding]:
    """Whether training and validation have the same class folders."""
    names = [
        set(_class_folders(Path(source.dataset.img_prefix)))
        for source in sources
        if getattr(source.dataset, 'with_label', False)
        and not source.dataset.ann_file
        and os.path.isdir(source.dataset.img_prefix)
    ]
    if len(names) == 2 and all(names):
        yield from several(
            'class folders are in only one of train and val',
            sorted(names[0] ^ names[1]),
            'Name the folders of both alike: labels are their positions in the sorted '
            'list.',
        )
