# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from itertools import chain, islice

import pytest
import torch
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader

from mlla_mm.reproducible.samplers import (
    SharedBatchSampler,
    SharedSampler,
    collate_micro_batches,
)
from mlla_mm.reproducible.seeding import SAMPLE

SEED = 3


def make(images: int, kind: str, micro_batches: int = 4, batch_size: int = 2, **more):
    sampler = SharedSampler(
        list(range(images)), dict(type=kind, shuffle=True), micro_batches, seed=SEED
    )
    return SharedBatchSampler(sampler, batch_size, **more)


def permutation(images: int, epoch: int = 0) -> list:
    generator = torch.Generator().manual_seed(SEED + epoch)
    return torch.randperm(images, generator=generator).tolist()


@pytest.mark.parametrize('images', [8, 16, 19, 21])
@pytest.mark.parametrize('drop_last', [False, True])
def test_epochs_are_those_of_as_many_processes(images, drop_last):
    """Process r of 4 gets every fourth image from r on, of a padded permutation."""
    batches = make(images, 'DefaultSampler', drop_last=drop_last)
    for epoch in (0, 1):
        batches.sampler.set_epoch(epoch)
        order = permutation(images, epoch)
        order += order[: -len(order) % 4]
        streams = [order[rank::4] for rank in range(4)]
        expected = [
            [index for stream in streams for index in stream[start : start + 2]]
            for start in range(0, len(streams[0]), 2)
        ]
        if drop_last:
            expected = [update for update in expected if len(update) == 8]
        assert list(batches) == expected
        assert len(batches) == len(expected)


@pytest.fixture
def act_as(monkeypatch):
    def act_as(rank, processes):
        monkeypatch.setattr('mmengine.dist.utils.get_rank', lambda group=None: rank)
        monkeypatch.setattr(
            'mmengine.dist.utils.get_world_size', lambda group=None: processes
        )

    return act_as


@pytest.mark.parametrize('kind', ['DefaultSampler', 'InfiniteSampler'])
@pytest.mark.parametrize('processes', [1, 2, 4])
def test_an_augmentation_is_seeded_with_the_place_of_its_image(act_as, kind, processes):
    """No two images of a run have the same seed."""
    endless = kind == 'InfiniteSampler'
    images = 10
    places = {}
    for rank in range(processes):
        act_as(rank, processes)
        batches = make(images, kind, micro_batches=4 // processes)
        for epoch in (0,) if endless else (0, 1):
            batches.sampler.set_epoch(epoch)
            for draw in chain.from_iterable(islice(batches, 3)):
                assert draw.key not in places
                places[draw.key] = int(draw)
    if endless:
        generator = torch.Generator().manual_seed(SEED)
        orders = [
            [i for _ in range(3) for i in torch.randperm(images, generator=generator)]
        ]
    else:
        orders = [permutation(images, epoch) for epoch in (0, 1)]
        orders = [order + order[:2] for order in orders]
    assert places == {
        (SAMPLE, SEED, epoch, place): int(order[place])
        for epoch, order in enumerate(orders)
        for place in range(24 if endless else 12)
    }


def test_endless_passes():
    expected = permutation(5)
    generator = torch.Generator().manual_seed(SEED)
    stream = [i for _ in range(9) for i in torch.randperm(5, generator=generator)]
    assert stream[:5] == expected
    for update, found in enumerate(islice(make(5, 'InfiniteSampler'), 5)):
        seen = [int(index) for index in stream[8 * update : 8 * update + 8]]
        assert found == [i for rank in range(4) for i in seen[rank::4]]


def test_a_batch_sampler_of_the_recipes():
    kind = dict(type=BatchSampler, drop_last=True)
    batches = make(19, 'DefaultSampler', batch_sampler=kind)
    assert list(batches) == list(make(19, 'DefaultSampler', drop_last=True))
    assert batches.drop_last


@pytest.mark.parametrize('kind', ['DefaultSampler', 'InfiniteSampler'])
@pytest.mark.parametrize('seen', [0, 1, 2, 4, 7])
def test_skipping(kind, seen):
    """Three updates a pass with DefaultSampler, no end with InfiniteSampler."""

    def run(batches, passes):
        for epoch in passes:
            yield from batches
            batches.sampler.set_epoch(epoch + 1)  # between passes alone, as MMEngine

    def keys(updates):
        return [[draw.key for draw in update] for update in updates]

    expected = list(islice(run(make(19, kind), range(4)), 10))
    batches = make(19, kind)
    next(iter(batches))  # MMEngine 0.10.7 has begun to load
    passes = batches.skip(seen)
    assert passes == (seen // 3 if kind == 'DefaultSampler' else 0)
    found = list(islice(run(batches, range(passes, 4)), 10 - seen))
    assert found == expected[seen:]
    assert keys(found) == keys(expected[seen:])


def test_skipping_with_an_endless_sampler_of_mmdet():
    """Nothing in its type says that it is endless, and it keeps its position."""
    pytest.importorskip('mmdet.datasets')
    dataset = ConcatDataset([list(range(5)), list(range(4))])
    kind = dict(type='mmdet.MultiSourceSampler', batch_size=2, source_ratio=[1, 1])

    def batches():
        sampler = SharedSampler(dataset, kind, micro_batches=2, seed=SEED)
        return SharedBatchSampler(sampler, batch_size=2)

    expected = list(islice(batches(), 12))
    resumed = batches()
    next(iter(resumed))
    assert resumed.skip(7) == 0  # of 9 images in updates of 4
    assert list(islice(resumed, 5)) == expected[7:]


def test_one_seed_for_all_when_none_is_given():
    """With several seeds, a pass could have an image twice and lack another."""
    sampler = SharedSampler(list(range(16)), dict(type='DefaultSampler'), 4)
    assert sorted(sampler) == list(range(16))
    other = SharedSampler(list(range(16)), dict(type='DefaultSampler'), 4)
    assert other.seed != sampler.seed


def test_batches_of_a_loader():
    def collate(samples, offset):
        return [sample + offset for sample in samples]

    loader = DataLoader(
        list(range(9)),
        batch_sampler=[[0, 1, 2, 3, 4, 5], [6, 7, 8]],
        collate_fn=lambda data: collate_micro_batches(
            data, 3, dict(type=collate, offset=10)
        ),
    )
    assert list(loader) == [[[10, 11], [12, 13], [14, 15]], [[16], [17], [18]]]
