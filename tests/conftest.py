# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mlla_mm  # noqa: F401  (before anything imports mmcv.ops)

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


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

    def run(*command, check=True, env=None, cwd=ROOT):
        # The launchers call 'python'; it has to be the one that runs the tests.
        environment = {
            **os.environ,
            'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
            'PYTHONPATH': str(ROOT),
            'OMP_NUM_THREADS': '1',
            # Two processes need two GPUs, or none.
            'CUDA_VISIBLE_DEVICES': '',
            **(env or {}),
        }
        result = subprocess.run(
            [str(word) for word in command],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        if check:
            assert result.returncode == 0, result.stdout[-4000:]
        return result

    return run


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
