# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Random numbers that depend on their purpose, and on nothing that came before.

The generators are seeded anew for every image, by the place of the image in the order
of all images, and for every update, by the number of the update and of the recipe's
process. So the numbers of workers and processes change nothing, nor does an
interruption, and no random state has to be restored.
"""

import multiprocessing
import random
import warnings
from typing import Any, Tuple, Union

import numpy as np
import torch
from mmengine.registry import DATASETS
from torch.utils.data import Dataset, get_worker_info

from ..datasets.corrupt_images import CheckedDataset, CorruptImageError

# Two purposes, so that images and updates never have the same random numbers.
SAMPLE, UPDATE = 0, 1
# So many corrupt images in a row end the run.
_MAX_SKIPS = 20


def seed_generators(*key: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators of this process, on all devices.

    A worker of a data loader has no device but the CPU.

    Args:
        *key (int): Non-negative numbers that name the purpose. Other numbers give
            independent random numbers.
    """
    # SeedSequence mixes the numbers: near keys give unrelated seeds.
    python, numpy, low, high = map(int, np.random.SeedSequence(key).generate_state(4))
    random.seed(python)
    np.random.seed(numpy)
    seed = low + (high << 32)
    if get_worker_info() is None:
        torch.manual_seed(seed)
    else:
        # The former also notes where CUDA is to be seeded once it is there, with a
        # whole traceback: a third of a millisecond for each image.
        torch.default_generator.manual_seed(seed)


class Draw(int):
    """An index into a data set, with the seed of its augmentation.

    Args:
        index (int): The index.
        key (tuple[int]): For :func:`seed_generators`.
    """

    key: Tuple[int, ...]

    def __new__(cls, index: int, key: Tuple[int, ...]) -> 'Draw':
        draw = super().__new__(cls, index)
        draw.key = key
        return draw

    def __reduce__(self) -> Tuple[type, Tuple[int, Tuple[int, ...]]]:
        return type(self), (int(self), self.key)


@DATASETS.register_module()
class SeededDataset(CheckedDataset):
    """A data set that seeds the augmentation of an image by its :class:`Draw`.

    For an index that is no :class:`Draw`, it seeds nothing.

    Args:
        dataset (dict | Dataset): The data set, or its config.
        skip_corrupt_images (bool): True replaces an image that cannot be read by
            another one, drawn from the same seed, and counts it in ``skipped``, a
            number that all workers share. False raises an error. Defaults to False.

    Raises:
        CorruptImageError: If an image cannot be read, or too many in a row.
    """

    _way_out = (
        'Replace it, take it out of the data set, or set '
        'train_cfg.skip_corrupt_images=True.'
    )
    _own = ('dataset', 'skipped')

    def __init__(
        self, dataset: Union[dict, Dataset], skip_corrupt_images: bool = False
    ) -> None:
        super().__init__(dataset)
        self.skipped = multiprocessing.Value('q', 0) if skip_corrupt_images else None

    def __getitem__(self, index: int) -> Any:
        key: Tuple[int, ...] = (int(index),)
        if isinstance(index, Draw):
            key, index = index.key, int(index)
            seed_generators(*key)
        if self.skipped is None:
            return super().__getitem__(index)
        for skips in range(1, _MAX_SKIPS + 1):
            try:
                return super().__getitem__(index)
            except CorruptImageError as error:
                with self.skipped.get_lock():
                    self.skipped.value += 1
                problem = str(error).split('. ')[0]
                warnings.warn(f'Skipped: {problem}.', stacklevel=2)
            seed_generators(*key, skips)
            index = random.randrange(len(self))
        return super().__getitem__(index)
