# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Several machines, restarts and Slurm, on one machine."""

import json
import os
import threading

import pytest
import torch

from ..processes import ROOT, free_port

CONFIG = 'configs/classification/mlla-nano_digits.py'
pytest.importorskip('mmpretrain')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    from mlla_mm.datasets.digits import make_imagenet

    out = tmp_path_factory.mktemp('data') / 'digits_imagenet'
    make_imagenet(str(out), train=32, val=10, size=32)
    return out


def arguments(data, work_dir, **more):
    """Of tools/train.py: two short epochs of four updates on two processes."""
    options = {
        'train_dataloader.dataset.data_root': data,
        'val_dataloader.dataset.data_root': data,
        'train_dataloader.num_workers': 0,
        'val_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'val_dataloader.persistent_workers': False,
        'train_dataloader.batch_size': 4,
        'train_cfg.max_epochs': 2,
        'param_scheduler.warmup': 0,
        'default_hooks.logger.interval': 1,
        **more,
    }
    return [
        '--work-dir', work_dir, '--seed', 0, '--cfg-options',
        *(f'{key}={value}' for key, value in options.items()),
    ]  # fmt: skip


def losses(work_dir):
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    entries = [json.loads(x) for f in files for x in f.read_text().splitlines()]
    return [(e['step'], e['loss']) for e in entries if 'loss' in e]


def on_two_machines(run_tool, command, **variables):
    """Run a command as on two machines at the same time; what each printed."""
    variables = dict(
        variables, NNODES='2', MASTER_ADDR='127.0.0.1', PORT=str(free_port()),
        RDZV_ID='a secret',
    )  # fmt: skip
    results = {}

    def run(rank):
        environment = dict(variables, NODE_RANK=str(rank))
        results[rank] = run_tool(*command, env=environment, check=False)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        assert result.returncode == 0, result.stdout[-4000:]
    return [results[rank].stdout for rank in range(2)]


@pytest.fixture(scope='module')
def alone(run_tool, data, tmp_path_factory):
    """A run of two processes on one machine."""
    work_dir = tmp_path_factory.mktemp('alone')
    run_tool(
        'python', 'tools/train.py', CONFIG, '--launcher', 'pytorch',
        *arguments(data, work_dir), processes=2,
    )  # fmt: skip
    return work_dir


def weights(path):
    return torch.load(path, map_location='cpu', weights_only=False)['state_dict']


@pytest.mark.slow
def test_two_machines_equal_one(run_tool, data, alone, tmp_path):
    command = ['bash', 'tools/dist_train.sh', CONFIG, 1, *arguments(data, tmp_path)]
    on_two_machines(run_tool, command)
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'GPU number: 2' in log  # MMEngine's name of the world size
    assert losses(tmp_path) == losses(alone)
    assert len(losses(alone)) == 8
    expected = weights(alone / 'epoch_2.pth')
    found = weights(tmp_path / 'epoch_2.pth')
    assert all(torch.equal(found[key], value) for key, value in expected.items())


# A machine fails once, in its second epoch.
FAILING = """
import os, signal
from pathlib import Path
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from tests.processes import listening


@HOOKS.register_module()
class FailOnceHook(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        with open(os.environ['LISTENING'], 'a') as file:
            print(*listening(os.getppid()), file=file)  # and all that torchrun started
        marker = Path(os.environ['FAILED'])
        if runner.rank == 1 and runner.iter == 5 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize('machines', [1, 2])
def test_restart(run_tool, data, alone, tmp_path, machines):
    """A process dies; all start again from the newest checkpoint, and finish."""
    (tmp_path / 'failing.py').write_text(FAILING)
    config = tmp_path / 'config.py'
    config.write_text(
        f"_base_ = '{ROOT / CONFIG}'\n"
        "custom_imports = dict(imports=['mlla_mm.models.classifiers', 'failing'])\n"
        "default_hooks = dict(fail=dict(type='FailOnceHook'))\n"
    )
    work_dir = tmp_path / 'work'
    work_dir.mkdir()
    # Of a run long ago, and not to be resumed.
    (work_dir / 'last_checkpoint').write_text(str(alone / 'epoch_1.pth'))
    os.utime(work_dir / 'last_checkpoint', (0, 0))
    command = [
        'bash', 'tools/dist_train.sh', config, 2 // machines,
        *arguments(data, work_dir),
    ]  # fmt: skip
    variables = dict(
        MAX_RESTARTS='1',
        FAILED=str(tmp_path / 'failed'),
        LISTENING=str(tmp_path / 'listening'),
        PYTHONPATH=f'{ROOT}{os.pathsep}{tmp_path}',
    )
    if machines == 1:
        run_tool(*command, env=variables)
    else:
        on_two_machines(run_tool, command, **variables)
    assert (tmp_path / 'failed').exists()
    if machines == 1:
        assert set((tmp_path / 'listening').read_text().split()) == {'127.0.0.1'}
    # Iteration 6 was lost with the process, and the whole second epoch done again.
    assert [step for step, _ in losses(work_dir)] == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    last = torch.load(work_dir / 'epoch_2.pth', weights_only=False)
    assert last['optimizer']['state'][0]['step'] == 8
    # The first epoch is the unharmed run's, so nothing was resumed in the beginning.
    assert losses(work_dir)[:4] == losses(alone)[:4]


# One process is told to stop, in the middle of the second epoch.
STOPPED = """
import os, signal
from pathlib import Path
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class StopOnceHook(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        marker = Path(os.environ['STOPPED'])
        if runner.rank == 1 and runner.iter == 5 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.slow
def test_sigterm(run_tool, data, alone, tmp_path):
    """All processes stop and save; the run is not restarted, and resumed in full."""
    (tmp_path / 'stopped.py').write_text(STOPPED)
    config = tmp_path / 'config.py'
    config.write_text(
        f"_base_ = '{ROOT / CONFIG}'\n"
        "custom_imports = dict(imports=['mlla_mm.models.classifiers', 'stopped'])\n"
        "default_hooks = dict(stop=dict(type='StopOnceHook'))\n"
    )
    work_dir = tmp_path / 'work'
    command = [
        'bash', 'tools/dist_train.sh', config, 2, '--resume',
        *arguments(data, work_dir),
    ]  # fmt: skip
    variables = dict(
        MAX_RESTARTS='1',
        STOPPED=str(tmp_path / 'stopped'),
        PYTHONPATH=f'{ROOT}{os.pathsep}{tmp_path}',
    )
    stopped = run_tool(*command, env=variables, check=False)
    assert stopped.returncode != 0
    saved = work_dir / 'preempted_iter_6.pth'
    assert f'after update 6: saved in {saved}. Go on with --resume.' in stopped.stdout
    assert 'Not started again: it was stopped by SIGTERM.' in stopped.stdout
    assert len(losses(work_dir)) == 6
    run_tool(*command, env=variables)
    assert losses(work_dir) == losses(alone)
    assert not saved.exists()
    expected, found = weights(alone / 'epoch_2.pth'), weights(work_dir / 'epoch_2.pth')
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.fixture
def srun(run_tool, tmp_path):
    """srun is not there: a program of its name writes down how it was called."""
    program = tmp_path / 'srun'
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/call\n')
    program.chmod(0o755)

    def run(command, **variables):
        settings = ' '.join(f'{key}={value}' for key, value in variables.items())
        run_tool('bash', '-c', f'PATH={tmp_path}:$PATH {settings} bash {command}')
        return (tmp_path / 'call').read_text().splitlines()

    return run


def test_slurm_test_command(srun):
    call = srun(
        f'tools/slurm_test.sh part job {CONFIG} model.pth --out results.pkl',
        GPUS=4,
        CPUS_PER_TASK=3,
        SRUN_ARGS='"--time 1:00"',
    )
    for argument in (
        '--partition=part',
        '--job-name=job',
        '--ntasks=4',
        '--ntasks-per-node=4',  # not more than there are
        '--gres=gpu:4',
        '--cpus-per-task=3',
        '--kill-on-bad-exit=1',
    ):
        assert argument in call
    assert call[call.index('--time') + 1] == '1:00'
    script, *rest = call[call.index('-u') + 1 :]
    assert script.endswith('tools/test.py')
    assert rest == [
        CONFIG, 'model.pth', '--out', 'results.pkl', '--launcher', 'slurm',
    ]  # fmt: skip


def test_launchers_tell_their_variables(run_tool):
    for name in ('train', 'test'):
        text = run_tool('bash', f'tools/dist_{name}.sh', check=False).stdout
        for variable in ('NNODES', 'NODE_RANK', 'MASTER_ADDR', 'PORT', 'PYTHON'):
            assert f'  {variable}' in text
        for variable in ('MAX_RESTARTS', 'RDZV_ID'):
            assert (f'  {variable}' in text) == (name == 'train')
        assert 'set -euo' not in text and not text.startswith('#')
