# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import copy
import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS

from mlla_mm.datasets.corrupt_images import CorruptImageError
from mlla_mm.reproducible.seeding import (
    SAMPLE,
    UPDATE,
    Draw,
    SeededDataset,
    seed_generators,
)

IMAGES = 1000


@DATASETS.register_module()
class HalfCorrupt(torch.utils.data.Dataset):
    """Every other image cannot be read; the others come with random numbers."""

    def __len__(self):
        return IMAGES

    def __getitem__(self, index):
        assert type(index) is int
        drawn = draw()
        if index % 2:
            raise CorruptImageError(f'{index}.jpg is truncated. Replace it.')
        return index, drawn


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def dataset(**options):
    return SeededDataset(dict(type='HalfCorrupt'), **options)


def test_all_generators_follow_the_key():
    keys = [(SAMPLE, 1, 2, 3), (UPDATE, 1, 2, 3), (SAMPLE, 1, 3, 2), (SAMPLE, 1, 2)]
    drawn = []
    for key in keys:
        seed_generators(*key)
        drawn.append((*draw(), *draw()))
        draw()  # they have moved on
        seed_generators(*key)
        assert (*draw(), *draw()) == drawn[-1]
    for numbers in zip(*drawn):
        assert len(set(numbers)) == len(keys)


def test_a_worker_draws_the_same(monkeypatch):
    seed_generators(SAMPLE, 1, 2, 3)
    expected = draw()
    torch.manual_seed(0)
    monkeypatch.setattr('mlla_mm.reproducible.seeding.get_worker_info', lambda: 'one')
    seed_generators(SAMPLE, 1, 2, 3)
    assert draw() == expected


def test_pytorch_gets_all_of_its_64_bits():
    """With 32 bits, two of 100,000 updates would be equal with a chance of 69 %."""
    seeds = []
    for number in range(64):
        seed_generators(UPDATE, 0, number)
        seeds.append(torch.initial_seed())
    for bit in range(64):
        assert {seed >> bit & 1 for seed in seeds} == {0, 1}, bit


def test_a_draw_keeps_its_key_on_the_way_to_a_worker():
    index = Draw(4, (SAMPLE, 0, 1, 2))
    for other in (pickle.loads(pickle.dumps(index)), copy.copy(index)):
        assert (other, other.key) == (4, (SAMPLE, 0, 1, 2))


def test_augmentations_follow_the_draw():
    images = dataset()
    first = images[Draw(4, (SAMPLE, 0, 0, 7))]
    assert images[Draw(4, (SAMPLE, 0, 0, 7))] == first
    assert images[Draw(4, (SAMPLE, 0, 1, 7))] != first
    # A plain index does not seed the generators.
    seed_generators(3)
    draw()
    expected = draw()
    seed_generators(3)
    draw()
    assert images[4] == (4, expected)


@pytest.mark.filterwarnings('ignore:Skipped')
@pytest.mark.parametrize('kind', ['draws', 'plain indices'])
def test_every_corrupt_image_gets_a_replacement_of_its_own(kind):
    """The replacement depends on the draw alone, and differs between epochs."""
    images = dataset(skip_corrupt_images=True)
    found = []
    for epoch in (0, 1) if kind == 'draws' else (0,):
        indices = [
            Draw(image, (SAMPLE, 0, epoch, image)) if kind == 'draws' else image
            for image in range(1, 40, 2)
        ]
        samples = [images[index] for index in indices]
        for index, sample in zip(reversed(indices), reversed(samples)):
            assert images[index] == sample
        found += samples
    names = Counter(name for name, _ in found)
    assert all(name % 2 == 0 for name in names)
    # There are 500 sound images, so few are drawn twice.
    assert len(names) > 0.8 * len(found)
    # Their augmentations have different random numbers.
    assert len({numbers for _, numbers in found}) == len(found)


def test_skipped_images_are_counted():
    images = dataset(skip_corrupt_images=True)
    assert images[4][0] == 4 and images.skipped.value == 0
    with pytest.warns(UserWarning, match='Skipped: 5.jpg is truncated') as caught:
        images[Draw(5, (SAMPLE, 0, 0, 5))]
    # Its replacement may be corrupt as well. A file that an earlier test left open may
    # be warned of at any time.
    told = [x for x in caught if str(x.message).startswith('Skipped: ')]
    assert images.skipped.value == len(told) >= 1


def test_corrupt_images_are_errors_unless_they_are_to_be_skipped():
    with pytest.raises(CorruptImageError, match='5.jpg is truncated'):
        dataset()[Draw(5, (SAMPLE, 0, 0, 5))]
