# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import os
import signal
from pathlib import Path

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.visualization import Visualizer

import mlla_mm  # noqa: F401  (before anything imports mmcv.ops)
from mlla_mm.compat.pytorch import without_tf32
from mlla_mm.engine import launch

from .durations import Durations


def pytest_configure(config):
    config.pluginmanager.register(Durations(long=20, too_long=60))


def pytest_collection_finish():
    from . import quick  # noqa: F401  (after the imports of all tests)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def exact_on_a_gpu(request):
    """What is compared on a GPU is computed in float32, without TF32."""
    if request.node.get_closest_marker('gpu') is None:
        yield
        return
    with without_tf32():
        yield


@pytest.fixture(autouse=True)
def forget_instances():
    """What a process has once, and tests must not share.

    MMEngine gives runners of one second the same instances, and the folder that they
    had. The last logger serves whoever asks for one, also when its file was closed.
    """
    yield
    for cls in (MMLogger, Visualizer, *Visualizer.__subclasses__()):
        cls._instance_dict.clear()
    launch._local_rank = None


@pytest.fixture
def no_waiting():
    """Fail a test that waits for a pipe, or reads a device without end."""

    def fail(*_):
        raise TimeoutError('Waited for a file that never ends.')

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope='session')
def once(tmp_path_factory):
    """Folders that are filled once, also for several workers of pytest-xdist."""
    from .processes import fill_once

    root = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        root = root.parent  # below it each worker has a folder of its own

    def get(name, fill) -> Path:
        return fill_once(root / 'once' / name, fill)

    return get


@pytest.fixture(scope='session')
def digits(once):
    """16 training (classes: 40) and 5 validation images: a folder for each layout."""
    from mlla_mm.datasets import digits

    def get(layout) -> Path:
        def fill(folder):
            make = getattr(digits, f'make_{layout}')
            train = 40 if layout == 'imagenet' else 16
            make(str(folder / 'data'), train=train, val=5, size=64)

        return once(layout, fill) / 'data'

    return get


@pytest.fixture(scope='session')
def digits_coco(digits) -> Path:
    return digits('coco')


@pytest.fixture(scope='session')
def digits_imagenet(digits) -> Path:
    return digits('imagenet')


@pytest.fixture(scope='session')
def segmentor(once) -> Path:
    """What ``runs.run_segmentor`` leaves."""
    from .runs import run_segmentor

    return once('segmentor', run_segmentor)


@pytest.fixture(scope='session')
def run_tool():
    """Run a tool of the repository; returns the finished process."""
    from .processes import run_tool

    return run_tool


@pytest.fixture
def call_tool(capsys):
    """Call a tool's ``main`` in this process; returns what its process would.

    What the user did wrong is the result's, any other error the test's.
    """
    from .processes import call_tool

    def call(tool, *arguments, **options):
        return call_tool(capsys, tool, *arguments, **options)

    return call


@pytest.fixture(scope='session')
def nano(tmp_path_factory):
    """Config and checkpoint of a small model with random weights, by scope."""
    from .nano import save

    folder = tmp_path_factory.mktemp('checkpoints')
    made = {}

    def get(scope):
        path = folder / f'{scope}.pth'
        if scope not in made:
            made[scope] = save(scope, path)
        return made[scope].copy(), path

    return get


# Good data of each format, for a test to spoil.


@pytest.fixture
def coco(tmp_path) -> Path:
    from . import bad_data

    return bad_data.make_coco(tmp_path)


@pytest.fixture
def masks(tmp_path) -> Path:
    from . import bad_data

    return bad_data.make_masks(tmp_path)


@pytest.fixture
def folders(tmp_path) -> Path:
    from . import bad_data

    return bad_data.make_folders(tmp_path)
