# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Pictures of the size and the kind of published data sets, to measure without them."""

import copy
import json
import math
from pathlib import Path
from typing import Any, Dict, List

import cv2
import numpy as np
from mmengine.registry import DATASETS

from mlla_mm.checks.kinds import class_of
from mlla_mm.engine.parts import leaf_datasets

# Width and height that are frequent in ImageNet, COCO and ADE20K.
SIZES = dict(mmpretrain=(500, 375), mmdet=(640, 480), mmseg=(683, 512))
QUALITY = 90
OBJECTS = 7
"""Mean number of objects in a picture of a detector's, as in COCO (7.3)."""


def write_pictures(
    dataset: Any, scope: str, folder: Path, count: int
) -> Dict[str, Any]:
    """Write synthetic pictures with labels, and let a data set read them.

    Args:
        dataset (dict): The config of a data set. It has one data set that reads files,
            in wrappers or not.
        scope (str): 'mmdet', 'mmseg' or 'mmpretrain'.
        folder (Path): Where to write.
        count (int): Number of pictures.

    Returns:
        dict: A copy of the config that reads these files.

    Raises:
        ValueError: If the task is none of the three, or there are several data sets.
    """
    if scope not in SIZES:
        raise ValueError(f'default_scope must be one of {list(SIZES)}, got {scope!r}.')
    config = copy.deepcopy(dataset)
    leaves = leaf_datasets(dict(dataset=config))
    if len(leaves) != 1:
        raise ValueError(f'Synthetic data need one data set, not {len(leaves)}.')
    ((_, leaf),) = leaves
    rng = np.random.default_rng(0)
    (folder / 'images').mkdir(parents=True)
    names = [f'{i:05d}.jpg' for i in range(count)]
    for name in names:
        picture = natural_picture(rng, *SIZES[scope])
        options = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
        cv2.imwrite(str(folder / 'images' / name), picture, options)
    write = dict(mmpretrain=_list, mmdet=_coco, mmseg=_label_maps)[scope]
    classes = (leaf.get('metainfo') or {}).get('classes')
    if classes is None:
        kind = class_of(DATASETS, leaf['type'])
        classes = (getattr(kind, 'METAINFO', None) or {}).get('classes')
    leaf.update(
        data_root=str(folder),
        **write(rng, folder, names, list(classes or '0123456789')),
    )
    # Such as a part of the images, or those of one label.
    leaf.pop('indices', None)
    return config


def natural_picture(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Smooth colours with noise, whose JPEG is about as large as a photograph's.

    Returns:
        np.ndarray: BGR, uint8, (height, width, 3).
    """
    coarse = rng.uniform(0, 255, (6, 8, 3)).astype(np.float32)
    fine = rng.normal(0, 28, (height // 4, width // 4, 3)).astype(np.float32)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    texture = cv2.resize(fine, (width, height), interpolation=cv2.INTER_LINEAR)
    noise = rng.normal(0, 14, (height, width, 1)).astype(np.float32)
    return (smooth + texture + noise).clip(0, 255).astype(np.uint8)


def _list(
    rng: np.random.Generator, folder: Path, names: List[str], classes: List[str]
) -> Dict[str, Any]:
    """A list with labels, for mmpretrain."""
    lines = [f'{name} {rng.integers(len(classes))}\n' for name in names]
    (folder / 'list.txt').write_text(''.join(lines))
    return dict(data_prefix='images', ann_file='list.txt')


def _coco(
    rng: np.random.Generator, folder: Path, names: List[str], classes: List[str]
) -> Dict[str, Any]:
    """Annotations in COCO's format: polygons of 10 to 60 points, of many sizes."""
    width, height = SIZES['mmdet']
    annotations: List[dict] = []
    for i in range(len(names)):
        for _ in range(1 + rng.poisson(OBJECTS - 1)):
            # From 1/40 of the height to 1/3.
            radius = height * 10 ** rng.uniform(math.log10(1 / 40), math.log10(1 / 3))
            x, y = rng.uniform(0.1, 0.9, 2) * (width, height)
            angles = np.sort(rng.uniform(0, 2 * math.pi, rng.integers(10, 61)))
            radii = radius * rng.uniform(0.7, 1.0, len(angles))
            points = np.stack(
                [x + radii * np.cos(angles), y + radii * np.sin(angles)], 1
            ).clip(0, (width - 1, height - 1))
            (left, top), (right, bottom) = points.min(0), points.max(0)
            box = [left, top, right - left + 1, bottom - top + 1]
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=i,
                    category_id=int(rng.integers(len(classes))) + 1,
                    bbox=[float(v) for v in box],
                    area=float(box[2] * box[3] / 2),
                    segmentation=[points.ravel().round(2).tolist()],
                    iscrowd=0,
                )
            )
    content = dict(
        images=[
            dict(id=i, file_name=name, width=width, height=height)
            for i, name in enumerate(names)
        ],
        annotations=annotations,
        categories=[dict(id=i, name=name) for i, name in enumerate(classes, 1)],
    )
    (folder / 'instances.json').write_text(json.dumps(content))
    return dict(ann_file='instances.json', data_prefix=dict(img='images/'))


def _label_maps(
    rng: np.random.Generator, folder: Path, names: List[str], classes: List[str]
) -> Dict[str, Any]:
    """Label maps of regions, with about 10 of ADE20K's values from 0 on."""
    width, height = SIZES['mmseg']
    (folder / 'maps').mkdir()
    for name in names:
        values = rng.integers(0, len(classes), 12).astype(np.uint8)
        # Every pixel has the value whose smooth map is highest.
        coarse = rng.normal(size=(6, 8, len(values))).astype(np.float32)
        regions = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        labels = values[regions.argmax(2)]
        cv2.imwrite(str(folder / 'maps' / name.replace('.jpg', '.png')), labels)
    return dict(
        data_prefix=dict(img_path='images', seg_map_path='maps'),
        ann_file='',
        img_suffix='.jpg',
        seg_map_suffix='.png',
    )
