# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import platform
import sys
from importlib import metadata

import pytest
import torch

from benchmarks import meter
from benchmarks.meter import Meter, Spread, format_settings, spread, unsteady_note

from .gpu import needs_gpu


class Clock:
    """A clock that calls move on: nothing here depends on the machine's speed."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.calls = []
        clock = self

        class Timer:
            def __init__(self, stmt, setup, timer, globals):  # noqa: A002
                self.call = globals['call']

            def timeit(self, number):
                before = clock.now
                for _ in range(number):
                    self.call()
                return clock.now - before

        monkeypatch.setattr(meter.Timer, '_timer_cls', Timer)

    def taking(self, name, seconds):
        def call():
            self.calls.append(name)
            self.now += next(seconds)

        return call


def first_then(first, seconds):
    yield first
    while True:
        yield seconds


def test_a_sample_for_each_round(monkeypatch):
    clock = Clock(monkeypatch)
    calls = {
        'slow': clock.taking('slow', first_then(2.0, 2.0)),
        # The first call, which compiles, does not count.
        'fast': clock.taking('fast', first_then(50.0, 0.03)),
    }
    found = Meter('cpu', repeats=5).samples(calls)
    assert found == dict(slow=[pytest.approx(2.0)] * 5, fast=[pytest.approx(0.03)] * 5)
    # Four calls tell how many calls make a sample. A sample has two calls to warm up,
    # then calls for a tenth of a second.
    assert clock.calls.count('fast') == 4 + 5 * (2 + 4)
    assert clock.calls.count('slow') == 4 + 5 * (2 + 1)


def test_rounds_are_interleaved(monkeypatch):
    """A machine that becomes slower does so for all calls."""
    clock = Clock(monkeypatch)

    def slowing():
        while True:
            yield 1 + clock.now / 100

    calls = {name: clock.taking(name, slowing()) for name in 'abc'}
    found = Meter('cpu', repeats=40).samples(calls)
    medians = [spread(found[name]).median for name in 'abc']
    assert max(medians) < 1.2 * min(medians)
    blocks = ''.join(clock.calls)
    assert not any(name * 12 in blocks for name in 'abc')


def test_real_calls():
    x = torch.rand(8, 8)
    cpu = Meter('cpu', repeats=2)
    assert all(0 < t < 1 for t in cpu.samples({'a': lambda: x @ x})['a'])
    on_device, on_host = cpu.milliseconds(lambda: x @ x)
    assert 0 < on_device == on_host < 1000
    assert 0 < cpu.graph_microseconds(lambda: x @ x) < 1e6
    assert 1e6 < cpu.copy_rate() < 1e13


def test_errors():
    with pytest.raises(ValueError, match="Device 'no-such' cannot be used"):
        Meter('no-such')
    with pytest.raises(ValueError, match='--repeats must be at least 1, got 0'):
        Meter('cpu', repeats=0)


def test_peak_of_known_allocations():
    def function():
        first = torch.ones(2**20)  # 4 MiB
        second = first + 1
        del first
        third = second * 2
        del second, third
        torch.ones(2**18)

    cpu = Meter('cpu')
    assert cpu.peak_bytes(function) == pytest.approx(2**23, rel=0.01)
    assert cpu.peak_bytes(function, 2**20) == pytest.approx(9 * 2**20, rel=0.01)


def test_unsteady_note():
    steady, unsteady = Spread(9.8, 10.0, 10.2), Spread(9.0, 10.0, 14.0)
    assert unsteady_note(dict(a=steady)) == ''
    assert 'of the median: b. Stop' in unsteady_note(dict(a=steady, b=unsteady))


def test_settings(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', '--out', 'a folder'])
    monkeypatch.delenv('MLLA_OPS', raising=False)
    settings = Meter('cpu', repeats=3).describe()
    assert settings['torch'] == torch.__version__
    assert settings['threads'] == torch.get_num_threads()
    assert settings['repeats'] == 3
    assert settings['python'] == platform.python_version()
    assert settings['command'] == "benchmark.py --out 'a folder'"
    assert settings['mlla_ops'] == 'default'
    assert settings['cuda'] is settings['cudnn'] is settings['driver'] is None
    has_triton = any(d.metadata['Name'] == 'triton' for d in metadata.distributions())
    assert (settings['triton'] is not None) == has_triton
    monkeypatch.setenv('MLLA_OPS', 'naive')
    assert Meter('cpu').describe()['mlla_ops'] == 'naive'

    settings.update(device='a CPU', torch='2.8', triton=None, python='3.12')
    assert format_settings(settings) == 'a CPU, torch 2.8, Python 3.12'
    settings.update(device='a GPU', cuda='12.8', cudnn=91002, driver='570.1')
    assert format_settings({**settings, 'fuse_conv_bn': True}) == (
        'a GPU, torch 2.8, CUDA 12.8, cuDNN 91002, driver 570.1, Python 3.12, '
        'BatchNorm in the convolutions'
    )


@needs_gpu
def test_settings_of_a_gpu():
    settings = Meter('cuda').describe()
    assert settings['device'] == torch.cuda.get_device_name()
    assert settings['cuda'] == torch.version.cuda
    assert settings['cudnn'] == torch.backends.cudnn.version()


def test_triton_is_not_imported(run_tool):
    """Its import takes a second, and not every command needs it."""
    code = """
import sys
from benchmarks import races
races.Meter('cpu').describe()
print('triton' in sys.modules)
"""
    assert run_tool('python', '-c', code).stdout.splitlines()[-1] == 'False'
