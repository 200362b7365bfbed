# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What a process needs before MMEngine's runner starts: devices, threads, launchers."""

import gc
import multiprocessing
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Tuple, Type

import cv2
import torch
from mmengine.config import Config
from mmengine.dist import master_only
from torch import distributed

from ..reproducible.resume import newest_checkpoint
from ..utils.allocator import keep_freed_memory
from ..utils.files import write_whole
from ..utils.text import printable

# In the work_dir; says why torchrun need not start the run again.
_ENDED_NAME = '.ended'
LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')
# Of the first process: it listens from set_up to tear_down.
_store: Optional['distributed.TCPStore'] = None


class Processes(NamedTuple):
    """Where this process stands among those that the launcher started."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


# The variables that hold the fields of Processes, by launcher.
_VARIABLES: Dict[str, Processes] = {
    'pytorch': Processes('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE'),
    'slurm': Processes(
        'SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID', 'SLURM_NTASKS_PER_NODE'
    ),
    'mpi': Processes(
        'OMPI_COMM_WORLD_RANK',
        'OMPI_COMM_WORLD_SIZE',
        'OMPI_COMM_WORLD_LOCAL_RANK',
        'OMPI_COMM_WORLD_LOCAL_SIZE',
    ),
}


@contextmanager
def exit_on_user_error(
    kinds: Tuple[Type[Exception], ...] = (FileNotFoundError, ValueError),
    shared: bool = True,
) -> Iterator[None]:
    """End the program with the message alone when what the user gave is wrong.

    That includes MMEngine's error for a ``type`` that is not registered.

    Args:
        kinds (tuple[type]): The errors that it is about. The default is for the checks
            before the work starts: errors out of a run keep their traceback, but for
            those that tell users all that they need. Defaults to
            (FileNotFoundError, ValueError).
        shared (bool): Whether all processes have the error, so that one of them speaks
            for all. Defaults to True.
    """
    try:
        yield
    except Exception as error:
        unregistered = isinstance(error, KeyError) and re.search(
            r'is not in the \S+ registry', str(error)
        )
        if not (unregistered or isinstance(error, kinds)):
            raise
        speaks = not shared or os.environ.get('LOCAL_RANK', '0') == '0'
        # The text of a KeyError is in quotes.
        sys.exit(f'Error: {error.args[0] if unregistered else error}' if speaks else 1)


def processes(launcher: str) -> Processes:
    """Read the process layout that a launcher left in the environment.

    Args:
        launcher (str): 'none', 'pytorch', 'slurm' or 'mpi'.

    Raises:
        ValueError: If the launcher is unknown or did not start this process.
    """
    if launcher == 'none':
        return Processes(0, 1, 0, 1)
    if launcher not in _VARIABLES:
        raise ValueError(f"Unknown launcher '{launcher}': choose from {LAUNCHERS}.")
    names = _VARIABLES[launcher]
    values = {name: os.environ.get(name) for name in names}
    # Only some srun calls set the tasks per node.
    values[names.local_world_size] = values[names.local_world_size] or '1'
    missing = [name for name, value in values.items() if not value]
    if missing:
        raise ValueError(
            f"launcher '{launcher}' needs {', '.join(missing)} in the environment. "
            'Start with tools/dist_train.sh or tools/slurm_train.sh, or leave '
            '--launcher out.'
        )
    return Processes(*(int(values[name]) for name in names))


def set_up(cfg: Config) -> Processes:
    """Prepare this process and its config for the devices of the machine.

    Where all processes are on one machine, they listen to this machine alone.
    With GPUs MMEngine's own launcher does what is left. On the CPU it would ask for
    CUDA devices, so the gloo process group is made here, the model is wrapped without
    device ids, and SyncBatchNorm, which has no CPU kernel, becomes BatchNorm.

    Args:
        cfg (Config): The run's config with ``launcher`` set; changed in place.

    Returns:
        Processes: Where this process stands.

    Raises:
        ValueError: If the launcher is unknown, did not start this process, or started
            more processes than there are GPUs; if the processes' port is in use.
    """
    keep_freed_memory()
    layout = processes(cfg.launcher)
    _stay_on_one_machine(cfg.launcher, layout)
    if torch.cuda.is_available():
        _check_gpu_count(layout)
        _name_threads(cfg.launcher, 1)
        return layout
    _share_threads(layout)
    _name_threads(cfg.launcher, torch.get_num_threads())
    if cfg.launcher != 'none':
        _init_gloo(layout, cfg.get('env_cfg', {}).get('dist_cfg', {}))
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel',
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
        cfg.pop('sync_bn', None)
        replace_sync_bn(cfg.model)
    return layout


def restart_checkpoint(work_dir: str) -> Optional[str]:
    """Where to go on from after torchrun has started the processes again.

    The count of restarts that torchrun hands down does not tell: it differs between
    the machine of the dead process and the others.

    Args:
        work_dir (str): Folder of the run.

    Returns:
        str | None: The newest checkpoint that was saved since ``LAUNCH_TIME`` (in the
        environment, in seconds, where restarts are asked for); None if there is none.
    """
    if 'LAUNCH_TIME' not in os.environ:
        return None
    newest = newest_checkpoint(work_dir)
    if newest is None or newest.stat().st_mtime < float(os.environ['LAUNCH_TIME']):
        return None
    return str(newest)


@master_only
def forbid_restart(work_dir: str, reason: str) -> None:
    """Let :func:`require_restart_allowed` refuse to start this run again by itself.

    Args:
        work_dir (str): Folder of the run.
        reason (str): How the run ended.
    """
    if 'LAUNCH_TIME' in os.environ:
        write_whole(Path(work_dir) / _ENDED_NAME, reason.encode())


def require_restart_allowed(work_dir: str) -> None:
    """Refuse to do what has to end as it did before torchrun started the run again.

    torchrun restarts whatever fails, and cannot be told that it is in vain.

    Args:
        work_dir (str): Folder of the run.

    Raises:
        ValueError: If :func:`forbid_restart` was called since the launch.
    """
    path = Path(work_dir) / _ENDED_NAME
    if 'LAUNCH_TIME' not in os.environ or not path.is_file():
        return
    if path.stat().st_mtime >= float(os.environ['LAUNCH_TIME']):
        with path.open('rb') as file:
            raise ValueError(f'Not started again: {printable(file.read(2000), 2000)}')


def tear_down() -> None:
    """Leave the process group, when the work is done on every process.

    A process that ends with the group's threads still running may be aborted by them,
    and the launcher takes that for a failed run. A model that is wrapped for the group
    keeps it alive, so the runner has to be out of scope.
    """
    if distributed.is_available() and distributed.is_initialized():
        # The queue that tells a data loader's worker to end is closed first when both
        # are freed, and PyTorch then waits 5 seconds for each of the workers.
        for worker in multiprocessing.active_children():
            worker.terminate()
        gc.collect()  # a runner and its loops refer to one another
        distributed.barrier()
        distributed.destroy_process_group()
    global _store
    _store = None


def _check_gpu_count(layout: Processes) -> None:
    gpus = torch.cuda.device_count()
    if layout.local_rank >= gpus:
        raise ValueError(
            f'{layout.local_world_size} processes were started on this machine, but it '
            f'shows {gpus} GPUs. Ask for at most {gpus}, or check CUDA_VISIBLE_DEVICES.'
        )


def _share_threads(layout: Processes) -> None:
    """Give every process of the machine its part of the cores, unless it is set."""
    if 'OMP_NUM_THREADS' in os.environ:
        threads = int(os.environ['OMP_NUM_THREADS'])
    else:
        cores = len(os.sched_getaffinity(0))
        threads = max(1, cores // layout.local_world_size)
    torch.set_num_threads(threads)
    cv2.setNumThreads(0)


def _name_threads(launcher: str, threads: int) -> None:
    """Set what MMEngine would set with warnings, in a run of several processes."""
    if launcher != 'none':
        os.environ.setdefault('OMP_NUM_THREADS', str(threads))
        os.environ.setdefault('MKL_NUM_THREADS', os.environ['OMP_NUM_THREADS'])


def _stay_on_one_machine(launcher: str, layout: Processes) -> None:
    """Let the processes meet on the loopback interface, if one machine has them all.

    Process groups have no authentication, and whoever can connect can run code. NCCL
    uses the interface to introduce the GPUs to one another; they exchange data through
    NVLink, PCIe or shared memory.
    """
    if launcher == 'slurm':  # its tasks per node are an upper limit
        alone = os.environ.get('SLURM_STEP_NUM_NODES') == '1'
    else:
        alone = layout.local_world_size == layout.world_size
    if launcher == 'none' or not alone:
        return
    names = {name for _, name in socket.if_nameindex()}
    for loopback in names & {'lo', 'lo0'}:  # of Linux, of BSD and macOS
        os.environ.setdefault('GLOO_SOCKET_IFNAME', loopback)
        os.environ.setdefault('NCCL_SOCKET_IFNAME', loopback)
    # torchrun may have opened the store, when it was not started by our scripts.
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True':
        os.environ['MASTER_ADDR'] = '127.0.0.1'
        if layout.rank == 0:
            _open_store(int(os.environ.setdefault('MASTER_PORT', '29500')))


def _open_store(port: int) -> None:
    """Open the processes' store on the loopback interface.

    The store that ``init_process_group`` opens listens on all interfaces, but it joins
    one of its process that has the same port.
    """
    global _store
    try:
        server = socket.create_server(('127.0.0.1', port))
    except OSError as error:
        raise ValueError(
            f'Port {port} of this machine is not free ({error.strerror}). Start again; '
            'set another MASTER_PORT in the environment if Slurm starts the processes.'
        ) from None
    _store = distributed.TCPStore(
        '127.0.0.1',
        port,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=server.detach(),
        use_libuv=False,  # before PyTorch 2.8 libuv's takes no socket over
    )


def _init_gloo(layout: Processes, dist_cfg: Dict[str, Any]) -> None:
    os.environ.setdefault('MASTER_ADDR', '127.0.0.1')
    os.environ.setdefault('MASTER_PORT', '29500')
    # MMEngine reads it when it wraps the model.
    os.environ['LOCAL_RANK'] = str(layout.local_rank)
    timeout = {}
    if 'timeout' in dist_cfg:
        timeout['timeout'] = timedelta(seconds=dist_cfg['timeout'])
    distributed.init_process_group(
        'gloo', rank=layout.rank, world_size=layout.world_size, **timeout
    )


def replace_sync_bn(model: Any) -> None:
    """Turn every SyncBN of a model config into BN, in place."""
    if isinstance(model, dict):
        if model.get('type') in ('SyncBN', 'MMSyncBN'):
            model['type'] = 'BN'
        model = list(model.values())
    if isinstance(model, (list, tuple)):
        for value in model:
            replace_sync_bn(value)
