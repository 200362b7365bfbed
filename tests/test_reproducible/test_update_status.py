# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from types import SimpleNamespace

import pytest
import torch

from benchmarks.pretended_cuda import pretended_cuda
from mlla_mm.reproducible.update_status import read_update

from ..pretended import needs_pretended_cuda

NAN, INF = float('nan'), float('inf')
WRAPPER = SimpleNamespace()  # without a scaler


def test_logs_keep_their_names_order_and_values():
    logs = dict(
        acc=torch.tensor([12.5]),
        loss=torch.tensor(1 / 3, dtype=torch.float64, requires_grad=True),
        loss_mask=0.1,
        count=torch.tensor(7),
    )
    status = read_update(logs, WRAPPER)
    assert list(status.logs) == list(logs)
    for name, value in status.logs.items():
        assert value.shape == () and not value.requires_grad
        # Numbers in Python become float32.
        assert value.item() == torch.as_tensor(logs[name]).item()
    assert status[1:] == (False, False, None)
    assert read_update({}, WRAPPER) == ({}, False, False, None)


@pytest.mark.parametrize('value', [NAN, INF, -INF])
@pytest.mark.parametrize('name, invalid', [('loss_mask', True), ('acc', False)])
def test_losses_alone_must_be_finite(name, invalid, value):
    logs = dict(loss=torch.tensor(1.0), **{name: torch.tensor(value)})
    assert read_update(logs, WRAPPER).any_invalid == invalid


def test_a_log_is_one_number():
    with pytest.raises(ValueError, match=r"'loss_mask' of shape \(3,\)"):
        read_update(dict(loss=1.0, loss_mask=torch.ones(3)), WRAPPER)


@needs_pretended_cuda
def test_logs_of_several_devices(monkeypatch):
    """A model on two GPUs may log numbers of Python, too."""
    stack = torch.stack

    def stack_as_cuda_does(tensors, *args):
        assert len({x.device for x in tensors}) == 1
        return stack(tensors, *args)

    monkeypatch.setattr(torch, 'stack', stack_as_cuda_does)
    with pretended_cuda():
        logs = dict(loss=1.0, acc=torch.ones(1, device='cuda'))
        status = read_update(logs, WRAPPER)
        assert {x.device.type for x in status.logs.values()} == {'cpu'}


def scaler(scale, enabled=True):
    return SimpleNamespace(_scale=scale, is_enabled=lambda: enabled)


@pytest.mark.parametrize(
    'loss_scaler, expected',
    [
        (scaler(torch.tensor(2.0**17)), 2.0**17),
        (scaler(None), None),  # before its first update
        (scaler(torch.tensor(2.0), enabled=False), None),
    ],
)
def test_loss_scale(loss_scaler, expected):
    wrapper = SimpleNamespace(loss_scaler=loss_scaler)
    assert read_update(dict(loss=1.0), wrapper).loss_scale == expected


SCRIPT = """
import torch
from types import SimpleNamespace
from mmengine.config import Config
from mmengine.dist import get_rank
from mlla_mm.engine import launch
from mlla_mm.reproducible.update_status import read_update

launch.set_up(Config(dict(model=dict(), launcher='pytorch')))
rank = get_rank()
scale = torch.tensor([64.0, 32.0][rank])
wrapper = SimpleNamespace(
    loss_scaler=SimpleNamespace(_scale=scale, is_enabled=lambda: True)
)
for loss, asks in ((1.0, False), ([1.0, float('nan')][rank], False), (2.0, rank == 1)):
    status = read_update(dict(loss=loss + rank), wrapper, asks)
    logs = {name: value.item() for name, value in status.logs.items()}
    print(f'\\nstatus {rank} {logs} {status[1:]}\\n', flush=True)
launch.tear_down()
"""


def test_processes_agree(run_tool, tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    output = run_tool('python', tmp_path / 'script.py', processes=2).stdout
    lines = [line for line in output.splitlines() if line.startswith('status')]
    # The logs are those of each process, and the rest is common.
    assert sorted(lines) == [
        "status 0 {'loss': 1.0} (False, False, 32.0)",
        "status 0 {'loss': 1.0} (True, False, 32.0)",
        "status 0 {'loss': 2.0} (False, True, 32.0)",
        "status 1 {'loss': 2.0} (False, False, 32.0)",
        "status 1 {'loss': 3.0} (False, True, 32.0)",
        "status 1 {'loss': nan} (True, False, 32.0)",
    ]
