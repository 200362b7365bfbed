# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The measuring of data sets, by a clock that the steps set themselves."""

import cv2
import pytest
import torch
from mmengine import fileio
from mmengine.dataset import BaseDataset, Compose, ConcatDataset, RepeatDataset
from mmengine.runner import Runner

from mlla_mm.compat.openmmlab import whole_dataset
from mlla_mm.datasets import speed
from mlla_mm.datasets.corrupt_images import CheckedDataset
from mlla_mm.utils.images import RegularFilesBackend


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(speed.time, 'perf_counter', lambda: now[0])
    return now


class _Load:
    def __init__(self, clock, path):
        self.clock, self.path = clock, path

    def __call__(self, results):
        assert fileio.get(self.path) == b'content'
        self.clock[0] += 2  # decodes
        return results


class _Step:
    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def __call__(self, results):
        self.clock[0] += self.seconds
        return dict(results, seconds=self.seconds)


class _Choice(_Step):
    """A step that contains another."""

    def __call__(self, results):
        return _Step(self.clock, 3)(super().__call__(results))


class _Dataset(BaseDataset):
    def __init__(self, steps):
        super().__init__(serialize_data=False)
        self.pipeline = Compose(steps)

    def load_data_list(self):
        return [dict() for _ in range(4)]


@pytest.fixture
def dataset(clock, tmp_path, monkeypatch):
    (tmp_path / 'image').write_bytes(b'content')
    read = RegularFilesBackend.get

    def slow_read(self, path):
        clock[0] += 1
        return read(self, path)

    monkeypatch.setattr(RegularFilesBackend, 'get', slow_read)
    load = _Load(clock, str(tmp_path / 'image'))
    return _Dataset([load, _Step(clock, 5), _Choice(clock, 7), _Step(clock, 0.5)])


PER_SAMPLE = 1 + 2 + 5 + 7 + 3 + 0.5


@pytest.mark.parametrize(
    'wrap',
    [
        lambda x: x,
        lambda x: CheckedDataset(x),
        lambda x: CheckedDataset(RepeatDataset(x, times=2)),
        # The same data set twice, whose steps are wrapped once.
        lambda x: ConcatDataset([x, x]),
    ],
)
def test_steps(dataset, wrap):
    wrapped, steps = wrap(dataset), list(dataset.pipeline.transforms)
    backend = RegularFilesBackend.get
    with speed.timed_steps(wrapped) as seconds:
        timing = speed.time_samples(wrapped, [0, 1, 3])
    assert timing == (3, 3 * PER_SAMPLE)
    assert dict(seconds) == {
        speed.READING: 3,
        '1 _Load': 9,
        '2 _Step': 15,
        '3 _Choice': 30,
        '4 _Step': 1.5,
    }
    assert dataset.pipeline.transforms == steps
    assert RegularFilesBackend.get is backend


def test_steps_are_restored_after_an_error(dataset):
    steps, backend = list(dataset.pipeline.transforms), RegularFilesBackend.get
    with pytest.raises(ZeroDivisionError):
        with speed.timed_steps(dataset):
            1 / 0  # noqa: B018
    assert dataset.pipeline.transforms == steps
    assert RegularFilesBackend.get is backend


def test_a_limit_of_time(dataset):
    assert speed.time_samples(dataset, range(4), limit=30).samples == 2
    assert speed.time_samples(dataset, range(4), limit=0).samples == 1
    assert speed.time_samples(dataset, range(4)).rate == 1 / PER_SAMPLE


@pytest.mark.parametrize('threads', [1, 2])
def test_threads(dataset, threads):
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    seen = []
    dataset.pipeline.transforms.append(
        lambda x: seen.append((torch.get_num_threads(), cv2.getNumThreads())) or x
    )
    try:
        speed.time_samples(dataset, [0])
        assert seen == [(1, 1)]
        assert torch.get_num_threads() == threads
        assert cv2.getNumThreads() == threads
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


@pytest.mark.parametrize(
    'length, count, expected',
    [(10, 3, [0, 4, 8]), (3, 10, [0, 1, 2]), (1, 1, [0]), (4, 4, [0, 1, 2, 3])],
)
def test_indices(length, count, expected):
    assert list(speed.spread_indices(length, count)) == expected


def test_a_part_of_a_data_set(dataset):
    """MMEngine's loader takes a part; its whole is found."""
    loader = Runner.build_dataloader(
        dict(
            dataset=dataset,
            batch_size=1,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=False),
            num_batch_per_epoch=2,
        )
    )
    assert len(loader.dataset) == 2
    whole = whole_dataset(loader.dataset)
    assert isinstance(whole, _Dataset) and len(whole) == 4
    assert whole_dataset(whole) is whole
