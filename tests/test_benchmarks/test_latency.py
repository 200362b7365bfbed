# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import pytest
import torch

from benchmarks import latency
from benchmarks.latency import measure_latency


class Clock:
    """A clock that calls move on: nothing here depends on the machine's speed."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.calls = []
        monkeypatch.setattr(latency.Timer, '_timer_cls', self._timer_class())

    def _timer_class(self):
        clock = self

        class Timer:
            def __init__(self, stmt, setup, timer, globals):  # noqa: A002
                self.call = globals['call']

            def timeit(self, number):
                before = clock.now
                for _ in range(number):
                    self.call()
                return clock.now - before

        return Timer

    def taking(self, name, seconds):
        def call():
            self.calls.append(name)
            self.now += next(seconds)

        return call


def steady(seconds):
    while True:
        yield seconds


def first_then(first, seconds):
    yield first
    yield from steady(seconds)


def test_medians_of_samples_per_round(monkeypatch):
    clock = Clock(monkeypatch)
    found = measure_latency(
        {
            'slow': clock.taking('slow', steady(2.0)),
            # Not what the first call takes, which compiles.
            'fast': clock.taking('fast', first_then(50.0, 0.03)),
        },
        repeats=5,
    )
    assert found['slow'].median == pytest.approx(2.0)
    assert found['fast'].median == pytest.approx(0.03)
    assert {name: len(m.times) for name, m in found.items()} == dict(slow=5, fast=5)
    # To find out how many calls make a sample: 1 + 3. A sample warms up with 2; then
    # it is the mean of calls for a tenth of a second.
    assert clock.calls.count('fast') == 4 + 5 * (2 + 4)
    assert clock.calls.count('slow') == 4 + 5 * (2 + 1)


def test_rounds_are_interleaved(monkeypatch):
    """A machine that becomes slower does so for all calls."""
    clock = Clock(monkeypatch)

    def slowing():
        while True:
            yield 1 + clock.now / 100

    found = measure_latency(
        {name: clock.taking(name, slowing()) for name in 'abc'}, repeats=40
    )
    medians = [found[name].median for name in 'abc']
    assert max(medians) < 1.2 * min(medians)
    blocks = ''.join(clock.calls)
    assert not any(name * 12 in blocks for name in 'abc')


def test_real_calls():
    x = torch.rand(8, 8)
    found = measure_latency({'a': lambda: x @ x}, repeats=2)
    assert 0 < found['a'].median < 1
    with pytest.raises(ValueError, match='repeats must be at least 1, got 0'):
        measure_latency({'a': lambda: x @ x}, repeats=0)
