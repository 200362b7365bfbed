# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Images and label maps, as mmseg reads them."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import numpy as np

from ..utils.images import image_size, open_image
from .image_files import Problem, check_images, missing_files, relative, unreadable
from .source import (
    NAMES,
    PIXELS,
    Finding,
    Source,
    read_ann_file,
    require,
    require_folder,
    several,
)

_IGNORED_LABEL = 255
_UNLABELLED = 'have no labelled pixel'
_LABEL_FIX = (
    'A label map is a PNG file of one 8-bit channel, of the size of its image, with '
    "numbers of classes: see 'reduce_zero_label' in docs/datasets.md."
)


def check_label_maps(source: Source) -> Iterator[Finding]:
    dataset = source.dataset
    folder = Path(dataset.data_prefix.get('img_path') or '')
    require_folder(folder, source)
    if dataset.ann_file:
        lines = f'Mend {dataset.ann_file}: its lines are names of images.'
        read_ann_file(source, lines)
    infos = dataset.load_data_list()
    suffix = f'Check img_suffix of {source.key}.'
    require(infos, f'No images *{dataset.img_suffix} in {folder}', suffix)
    images = [Path(info['img_path']) for info in infos]
    if 'seg_map_path' not in infos[0]:
        yield from check_images(images, folder, source)
        return
    maps = {Path(info['img_path']): Path(info['seg_map_path']) for info in infos}
    map_folder = Path(dataset.data_prefix['seg_map_path'])
    fix = f'Check data_prefix and seg_map_suffix of {source.key}.'
    require(map_folder.is_dir(), f'Folder not found: {map_folder}', fix)
    missing = set(missing_files(maps.values()))
    names = sorted(relative(path, map_folder) for path in missing)
    yield from several(f'label maps are not in {map_folder}', names, fix)
    # A list may name some of the images; without a list all of them are used.
    if source.look != NAMES and not dataset.ann_file:
        others = set(map_folder.rglob(f'*{dataset.seg_map_suffix}')) - {*maps.values()}
        names = sorted(relative(path, map_folder) for path in others)
        what = f'label maps in {map_folder} have no image in {folder}'
        yield from several(what, names, f'Add the images. {suffix}')

    def check(path: Path) -> Optional[Problem]:
        problem = unreadable(path, folder, source)
        if problem is not None or maps[path] in missing:
            return problem
        # mmseg reads label maps with Pillow.
        problem = unreadable(maps[path], folder, replace(source, backend='pillow'))
        if problem is not None:
            return problem._replace(kind=f'have a label map that {problem.kind}')
        if source.look == PIXELS:
            kind = _label_problem(path, maps[path], dataset)
            if kind is not None:
                name, fatal = relative(path, folder), kind != _UNLABELLED
                return Problem(kind, name, _LABEL_FIX, fatal)
        return None

    yield from check_images(images, folder, source, check)


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
