# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Tools that are called leave nothing behind for the tests after them."""

import os
import random
import signal
import sys
import warnings

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

from mlla_mm.checkpoints.reader import checkpoints_are_trusted

from .nano import NANO


def state() -> tuple:
    return (
        *(dict(os.environ), os.getcwd(), sys.argv, list(sys.path), list(sys.meta_path)),
        *(list(DefaultScope._instance_dict), list(MMLogger._instance_dict)),
        *(list(warnings.filters), signal.getsignal(signal.SIGTERM)),
        *(random.getstate(), np.random.get_state()[1].tolist(), torch.rand(1).item()),
        *(torch.get_num_threads(), checkpoints_are_trusted()),
        [name for name, module in sys.modules.items() if 'print' in dir(module)],
    )


def test_called_tools_leave_no_state(call_tool, tmp_path):
    pytest.importorskip('mmdet')
    MMLogger._instance_dict.clear()
    before = state()
    torch.manual_seed(0)
    result = call_tool(
        'tools/train.py', NANO['mmdet'], '--work-dir', tmp_path, '--trust-checkpoint',
        '--cfg-options', 'train_dataloader.dataset.data_root=no', check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.startswith('Error: ') and 'no/' in result.stderr
    assert state() == before
