# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from pathlib import Path

import pytest
import torch
from mmengine.visualization import Visualizer

import mlla_mm  # noqa: F401  (before anything imports mmcv.ops)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def forget_visualizers():
    """MMEngine gives runners of one second the same one, and the folder that it had."""
    yield
    for cls in (Visualizer, *Visualizer.__subclasses__()):
        cls._instance_dict.clear()


@pytest.fixture(scope='session')
def digits_coco(tmp_path_factory) -> Path:
    """16 training and 5 validation images in COCO format."""
    from mlla_mm.datasets.digits import make_coco

    out = tmp_path_factory.mktemp('data') / 'digits_coco'
    make_coco(str(out), train=16, val=5, size=64)
    return out


@pytest.fixture(scope='session')
def run_tool():
    """Run a tool of the repository; returns the finished process."""
    from .processes import run_tool

    return run_tool


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
