# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import os
import socket
import time
from unittest import mock

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS

from mlla_mm.engine import launch, parts

from ..processes import ROOT, free_port, listening

VARIABLES = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID', 'SLURM_NTASKS_PER_NODE'),
}


@pytest.fixture(autouse=True)
def of_this_test(monkeypatch):
    """What set_up leaves in the process ends with the test."""
    monkeypatch.setattr(launch, '_local_rank', None)
    with mock.patch.dict(os.environ):
        yield


@pytest.mark.parametrize('launcher', VARIABLES)
def test_processes(monkeypatch, launcher):
    for name, value in zip(VARIABLES[launcher], '5823'):
        monkeypatch.setenv(name, value)
    assert launch.processes(launcher) == (5, 8, 2, 3)
    assert launch.processes('none') == (0, 1, 0, 1)


def test_launcher_errors(monkeypatch):
    for name in VARIABLES['slurm']:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match='needs SLURM_PROCID, SLURM_NTASKS'):
        launch.processes('slurm')
    with pytest.raises(ValueError, match="'torchrun'.*'slurm', 'mpi'"):
        launch.processes('torchrun')


def test_sync_bn_becomes_bn():
    model = ConfigDict(
        backbone=dict(norm_cfg=dict(type='SyncBN', requires_grad=True)),
        heads=[
            dict(norm_cfg=dict(type='mmengine.MMSyncBN')),
            dict(norm_cfg=dict(type='LN')),
        ],
    )
    parts.replace_sync_bn(model)
    assert model.backbone.norm_cfg == dict(type='BN', requires_grad=True)
    assert [head.norm_cfg.type for head in model.heads] == ['BN', 'LN']


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
def test_set_up_without_a_launcher(monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    # MMEngine makes it BatchNorm.
    written = dict(
        launcher='none', sync_bn='torch', model=dict(norm_cfg=dict(type='SyncBN'))
    )
    cfg = Config(written)
    assert launch.set_up(cfg) == (0, 1, 0, 1)
    assert cfg.to_dict() == Config(written).to_dict()
    assert torch.get_num_threads() == 1


SCRIPT = """
import os
import torch
from mmengine.config import Config
from mmengine.dist import all_reduce, get_rank
from mlla_mm.engine import launch, parts
from tests.processes import listening

cfg = Config(dict(launcher='pytorch', model=dict()))
layout = launch.set_up(cfg)
total = torch.tensor([float(layout.rank + 1)])
all_reduce(total)
assert get_rank() == layout.rank
assert cfg.model_wrapper_cfg['device_ids'] is None
threads = str(torch.get_num_threads())
assert os.environ['OMP_NUM_THREADS'] == os.environ['MKL_NUM_THREADS'] == threads
open(f'{OUT}/{layout.rank}', 'w').write(
    f'{total.item()} {torch.distributed.get_backend()} {torch.get_num_threads()}')
torch.distributed.barrier()
# All that torchrun has started.
open(f'{OUT}/listening{layout.rank}', 'w').write(' '.join(listening(os.getppid())))
launch.tear_down()
assert not torch.distributed.is_initialized()
launch.tear_down()  # nothing left to do
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason='for machines without a GPU')
def test_process_group_on_the_cpu(tmp_path, run_tool):
    """torchrun starts two processes. They accept no other machine's connections."""
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT.replace('{OUT}', str(tmp_path)))
    name = os.path.relpath(script, ROOT / 'tools')
    run_tool('bash', 'tools/misc/launch.sh', name, 2)
    for rank in '01':
        assert (tmp_path / rank).read_text() == '3.0 gloo 1'
        assert (tmp_path / f'listening{rank}').read_text() == '127.0.0.1'


@pytest.fixture
def first_process(monkeypatch):
    """The environment of the first of two processes that a launcher has started."""
    for name in (
        'MASTER_ADDR', 'GLOO_SOCKET_IFNAME', 'NCCL_SOCKET_IFNAME',
        'TORCHELASTIC_USE_AGENT_STORE',
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('MASTER_PORT', str(free_port()))

    def start(launcher, **variables):
        names = launch._VARIABLES[launcher]
        values = dict(zip(names, ('0', '2', '0', '2')), **variables)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        launch.set_up(Config(dict(launcher=launcher, model=dict())))
        return os.environ.get('NCCL_SOCKET_IFNAME'), listening(os.getpid())

    yield start
    launch.tear_down()


@pytest.mark.parametrize(
    'launcher, variables',
    [
        ('pytorch', {'MASTER_ADDR': '0.0.0.0'}),
        ('slurm', {'SLURM_STEP_NUM_NODES': '1'}),
        ('mpi', {}),
    ],
)
def test_one_machine_listens_to_itself(first_process, launcher, variables):
    """As on GPUs, where MMEngine makes the process group later."""
    before = listening(os.getpid())
    interface, addresses = first_process(launcher, **variables)
    assert interface == os.environ['GLOO_SOCKET_IFNAME'] == 'lo'
    assert addresses - before <= {'127.0.0.1'} <= addresses
    torch.distributed.init_process_group('gloo', rank=0, world_size=1)
    assert listening(os.getpid()) - before <= {'127.0.0.1'}
    launch.tear_down()
    with socket.create_server(('127.0.0.1', int(os.environ['MASTER_PORT']))):
        pass  # it is free again


@pytest.mark.parametrize(
    'launcher, variables',
    [
        ('pytorch', {'WORLD_SIZE': '4'}),
        # Two machines, with as many tasks as one machine may have.
        ('slurm', {'SLURM_STEP_NUM_NODES': '2'}),
    ],
)
def test_several_machines_use_their_network(first_process, launcher, variables):
    before = listening(os.getpid())
    interface, addresses = first_process(launcher, **variables)
    assert interface is None and addresses == before
    assert 'MASTER_ADDR' not in os.environ


def test_interfaces_of_the_user_stay(first_process):
    interface, _ = first_process('pytorch', NCCL_SOCKET_IFNAME='eth7')
    assert interface == 'eth7'


def test_port_of_the_processes_in_use(first_process):
    port = os.environ['MASTER_PORT']
    with socket.create_server(('127.0.0.1', int(port))):
        with pytest.raises(ValueError, match=f'{port} .*MASTER_PORT'):
            first_process('mpi')


# A process as it starts on a machine with GPUs: its launcher, its local rank, the GPUs
# that it sees, and variables besides those that every process of the launcher has.
OWN_GPU = {
    'one GPU for each task': ('slurm', 1, 1, {'SLURM_GPUS_PER_TASK': '1'}),
    'two GPUs for each task': ('slurm', 2, 2, {'SLURM_GPUS_PER_TASK': 'a100:2'}),
    'gpu-bind': ('slurm', 1, 1, {'SLURM_GPUS_ON_NODE': '4'}),
    'a task that calls itself a process of torchrun': (
        'pytorch', 3, 1, {'SLURM_LOCALID': '3', 'SLURM_GPUS_PER_TASK': '1'},
    ),
    'a script of the user': ('mpi', 1, 1, {'CUDA_VISIBLE_DEVICES': '1'}),
}  # fmt: skip
SHARED_GPU = {
    'more tasks than GPUs': ('slurm', 1, 1, {'SLURM_GPUS_ON_NODE': '1'}),
    'more processes than GPUs': ('pytorch', 2, 2, {}),
    'one GPU for all': ('mpi', 1, 1, {'CUDA_VISIBLE_DEVICES': '0'}),
    # torchrun starts them in a batch job's only task.
    'processes of a task': (
        'pytorch', 2, 2, {'SLURM_LOCALID': '0', 'SLURM_GPUS_PER_TASK': '1'},
    ),
}  # fmt: skip


def start_on_gpus(monkeypatch, launcher, local_rank, gpus, variables):
    for name in (
        'CUDA_VISIBLE_DEVICES', 'SLURM_LOCALID', 'SLURM_GPUS_PER_TASK',
        'SLURM_GPUS_ON_NODE', 'LOCAL_RANK',
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
    # Of two machines, so that no store is opened.
    for name, value in zip(launch._VARIABLES[launcher], (9, 16, local_rank, 8)):
        monkeypatch.setenv(name, str(value))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return launch.set_up(Config(dict(launcher=launcher, model=dict())))


@pytest.mark.parametrize('case', OWN_GPU)
def test_a_gpu_for_each_process(monkeypatch, case):
    """MMEngine takes the number of the GPU from the launcher's variable."""
    launcher, local_rank, *_ = OWN_GPU[case]
    layout = start_on_gpus(monkeypatch, *OWN_GPU[case])
    assert layout.local_rank == local_rank
    assert os.environ['LOCAL_RANK'] == '0'
    assert os.environ[launch._VARIABLES[launcher][2]] == '0'
    # Errors of all processes are still those of the first one to tell.
    with pytest.raises(SystemExit) as caught:
        with launch.exit_on_user_error():
            raise ValueError('no such size')
    assert caught.value.code == 1


@pytest.mark.parametrize('launcher', launch._VARIABLES)
def test_the_gpus_that_all_processes_see(monkeypatch, launcher):
    """Where they are enough, each process has the one of its local rank."""
    start_on_gpus(monkeypatch, launcher, 2, 4, {'SLURM_GPUS_PER_TASK': '1'})
    assert os.environ['LOCAL_RANK'] == '2'
    assert os.environ[launch._VARIABLES[launcher][2]] == '2'


@pytest.mark.parametrize('case', SHARED_GPU)
def test_more_processes_than_gpus(monkeypatch, case):
    gpus = SHARED_GPU[case][2]
    with pytest.raises(SystemExit) as caught:
        with launch.exit_on_user_error():
            start_on_gpus(monkeypatch, *SHARED_GPU[case])
    assert f'shows {gpus} GPUs' in caught.value.code
    for way_out in (f'at most {gpus},', '--gpus-per-task=1', 'CUDA_VISIBLE_DEVICES'):
        assert way_out in caught.value.code


def test_one_of_the_processes_without_a_gpu_speaks(monkeypatch):
    with pytest.raises(SystemExit) as caught:
        with launch.exit_on_user_error():
            start_on_gpus(monkeypatch, 'pytorch', 3, 2, {})
    assert caught.value.code == 1


BOUND_SCRIPT = """
import os
import torch
from mmengine.config import Config
from mmengine.dist import all_reduce, get_world_size, init_dist
from mmengine.logging import MMLogger
from mlla_mm.engine import launch, parts

# What srun --gpus-per-task=1 sets in place of torchrun.
rank = os.environ['RANK']
for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE'):
    del os.environ[name]
os.environ.update(
    SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_NTASKS='2', SLURM_NODELIST='here',
    SLURM_STEP_NUM_NODES='1', SLURM_GPUS_PER_TASK='1', CUDA_VISIBLE_DEVICES=rank,
)
used = []
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.set_device = used.append
layout = launch.set_up(Config(dict(launcher='slurm', model=dict())))
init_dist('slurm', backend='gloo')
assert (layout.local_rank, used) == (int(rank), [0])
total = torch.tensor([float(layout.rank + 1)])
all_reduce(total)
# It looks for the process's GPU in CUDA_VISIBLE_DEVICES.
MMLogger.get_instance('bound', log_file='{OUT}/bound.log', distributed=True)
open(f'{OUT}/{rank}', 'w').write(f'{total.item()} {get_world_size()}')
launch.tear_down()
"""


def test_mmengine_starts_tasks_with_a_gpu_each(tmp_path, run_tool):
    """Two real processes, but for CUDA, whose part MMEngine's gloo group takes."""
    script = tmp_path / 'script.py'
    script.write_text(BOUND_SCRIPT.replace('{OUT}', str(tmp_path)))
    run_tool('python', str(script), processes=2)
    for rank in '01':
        assert (tmp_path / rank).read_text() == '3.0 2'
        assert list(tmp_path.glob(f'bound_*device{rank}_rank{rank}.log'))


def test_deterministic_matrix_products(monkeypatch):
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG', raising=False)
    for randomness in (dict(seed=1), dict(deterministic=True)):
        assert 'CUBLAS_WORKSPACE_CONFIG' not in os.environ
        cfg = Config(dict(launcher='none', model=dict(), randomness=randomness))
        launch.set_up(cfg)
    # One of the two values that PyTorch accepts.
    assert os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'


def test_a_run_that_ended_is_not_started_again(monkeypatch, tmp_path):
    monkeypatch.delenv('LAUNCH_TIME', raising=False)
    launch.forbid_restart(tmp_path, 'it diverged.')
    assert not list(tmp_path.iterdir())  # there are no restarts
    launched = time.time()
    monkeypatch.setenv('LAUNCH_TIME', str(launched - 60))
    launch.require_restart_allowed(tmp_path)
    launch.forbid_restart(tmp_path, 'it diverged.')
    with pytest.raises(ValueError, match='^Not started again: it diverged.$'):
        launch.require_restart_allowed(tmp_path)
    # The user has launched the run again, so it may start.
    monkeypatch.setenv('LAUNCH_TIME', str(launched + 60))
    launch.require_restart_allowed(tmp_path)
    monkeypatch.delenv('LAUNCH_TIME')
    launch.require_restart_allowed(tmp_path)


def test_exit_on_user_error(monkeypatch):
    monkeypatch.delenv('LOCAL_RANK', raising=False)
    with pytest.raises(SystemExit, match='^Error: no such size$'):
        with launch.exit_on_user_error():
            raise ValueError('no such size')
    with pytest.raises(SystemExit, match='^Error: FPNN is not in the .* registry'):
        with launch.exit_on_user_error(()):
            MODELS.build(dict(type='FPNN'))
    for error in (ZeroDivisionError, KeyError('loss')):
        with pytest.raises((ZeroDivisionError, KeyError)):
            with launch.exit_on_user_error():
                raise error
