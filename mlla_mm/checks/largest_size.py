# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The largest batch of a training: how large it is, and how to train on it."""

import math
from typing import Any, Optional, Set, Tuple

import torch
from mmengine.dist import all_gather_object

from ..engine.parts import kind_of, parts_of

PROBED_IMAGES = 64
"""Training images that are loaded to find the largest size."""

Size = Tuple[int, int]
"""Width and height in pixels."""


def pin_scales(config: Any) -> None:
    """Let every random resize of a data set's config take its largest scale.

    Args:
        config (dict | list): Config of a data set, or a pipeline; changed in place.
    """
    for part in parts_of(config):
        kind = kind_of(part)
        if kind == 'RandomChoiceResize':
            part['scales'] = [max(part['scales'], key=_area)]
        elif kind == 'RandomResize':
            scale = part['scale']
            if isinstance(scale[0], (list, tuple)):
                # Long and short side are drawn independently, between two scales.
                part['scale'] = max(map(max, scale)), max(map(min, scale))
            else:
                ratio = max(part['ratio_range'])
                part['scale'] = tuple(int(side * ratio) for side in scale)
            part['ratio_range'] = (1.0, 1.0)


def find_sizes(dataset: Any) -> Set[Size]:
    """Load some images of a data set, and list their sizes.

    The images lie at regular distances. The broadest and the tallest image are also
    loaded if the data set tells the sizes of its files.

    Args:
        dataset (Dataset): Training data with pinned scales.

    Returns:
        set[tuple[int, int]]: The sizes that all processes have found, because each
        process draws its own random numbers. Empty if a sample is not one image.
    """
    count = len(dataset)
    probed = set(range(0, count, math.ceil(count / PROBED_IMAGES)))
    get_info = getattr(dataset, 'get_data_info', None)
    if get_info is not None and {'width', 'height'} <= set(get_info(0)):
        infos = map(get_info, range(count))
        ratios = [info['width'] / info['height'] for info in infos]
        probed |= {ratios.index(max(ratios)), ratios.index(min(ratios))}
    found = {_size(dataset[index]['inputs']) for index in sorted(probed)}
    sizes = set().union(*all_gather_object(found))
    return set() if None in sizes else sizes


def largest_size(sizes: Set[Size], batch_size: int) -> Size:
    """The largest size that a batch of some images is padded to.

    A batch is padded to its longest sides. A broad and a tall image together therefore
    make a larger batch than each of them alone.

    Args:
        sizes (set[tuple[int, int]]): The sizes of the images.
        batch_size (int): Images of a batch.
    """
    if batch_size == 1:
        return max(sizes, key=_area)
    widths, heights = zip(*sizes)
    return max(widths), max(heights)


def resize_images(config: Any, size: Size) -> None:
    """Give all images of a data set one size: the last step before their packing.

    Args:
        config (dict): Config of the data set; changed in place.
        size (tuple[int, int]): Width and height in pixels.
    """
    resize = dict(type='Resize', scale=size, keep_ratio=False)
    for part in parts_of(config):
        pipeline = part.get('pipeline') or []
        packing = [
            i for i, x in enumerate(pipeline) if str(kind_of(x)).startswith('Pack')
        ]
        for i in packing[:1]:
            pipeline.insert(i, resize)


def _size(inputs: Any) -> Optional[Size]:
    """The size of an image (C, H, W); None for other inputs."""
    is_image = isinstance(inputs, torch.Tensor) and inputs.dim() == 3
    return (inputs.shape[2], inputs.shape[1]) if is_image else None


def _area(scale: Any) -> int:
    return math.prod(scale) if isinstance(scale, (list, tuple)) else scale**2
