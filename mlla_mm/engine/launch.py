# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Prepare a process before MMEngine's runner starts: launcher, devices, threads."""

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
from typing import Dict, NamedTuple, Optional, Tuple, Type

import torch
from mmengine.config import Config
from mmengine.dist import master_only
from torch import distributed

from ..reproducible.resume import newest_checkpoint
from ..utils.allocator import keep_freed_memory
from ..utils.files import write_whole
from ..utils.text import printable
from .arguments import ArgumentError
from .parts import replace_sync_bn

# A file in the work_dir. It says why torchrun must not start the run again.
_ENDED_NAME = '.ended'
# The first process listens with it from set_up to tear_down.
_store: Optional['distributed.TCPStore'] = None
# Seconds that processes wait for each other; PyTorch's default for gloo.
_TIMEOUT = 1800


class Processes(NamedTuple):
    """Rank of this process and number of processes: in all, and on this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


# The environment variables that hold the fields of Processes, by launcher.
_VARIABLES: Dict[str, Tuple[str, ...]] = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE'),
    'slurm': (
        'SLURM_PROCID',
        'SLURM_NTASKS',
        'SLURM_LOCALID',
        'SLURM_NTASKS_PER_NODE',
    ),
    'mpi': (
        'OMPI_COMM_WORLD_RANK',
        'OMPI_COMM_WORLD_SIZE',
        'OMPI_COMM_WORLD_LOCAL_RANK',
        'OMPI_COMM_WORLD_LOCAL_SIZE',
    ),
}
LAUNCHERS = ('none', *_VARIABLES)
# Of this process. set_up keeps it, because it makes LOCAL_RANK the number of the GPU.
_local_rank: Optional[int] = None


class OwnError(ValueError):
    """An error that the first process of the machine does not have."""


@contextmanager
def exit_on_user_error(
    kinds: Tuple[Type[Exception], ...] = (FileNotFoundError, ValueError),
    shared: bool = True,
) -> Iterator[None]:
    """End the program with an error's message, without its traceback.

    MMEngine's error for a ``type`` that is not registered is one of them, and so is an
    :class:`ArgumentError`.

    Args:
        kinds (tuple[type]): The errors to which this applies. The default fits checks
            before the work starts. Defaults to (FileNotFoundError, ValueError).
        shared (bool): Whether all processes have the error. If so, only the first
            process of each machine prints it, but for an :class:`OwnError`. Defaults
            to True.
    """
    try:
        yield
    except Exception as error:
        unregistered = unregistered_type(error)
        if not (unregistered or isinstance(error, (ArgumentError, *kinds))):
            raise
        local_rank = os.environ.get('LOCAL_RANK') or 0
        is_first = int(local_rank if _local_rank is None else _local_rank) == 0
        is_printed = not shared or is_first or isinstance(error, OwnError)
        sys.exit(f'Error: {unregistered or error}' if is_printed else 1)


def unregistered_type(error: Exception) -> Optional[str]:
    """Return what MMEngine says of a ``type`` that is not registered; else None."""
    if not isinstance(error, KeyError):
        return None
    text = str(error.args[0] if error.args else '')
    return text if re.search(r'is not in the \S+ registry', text) else None


def processes(launcher: str) -> Processes:
    """Read rank and number of the processes from the launcher's variables.

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
    # Only some srun calls set the tasks per node, the last variable.
    missing = [name for name in names[:-1] if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"launcher '{launcher}' needs {', '.join(missing)} in the environment. "
            'Start with tools/dist_train.sh or tools/slurm_train.sh, or leave '
            '--launcher out.'
        )
    return Processes(*(int(os.environ.get(name) or '1') for name in names))


def set_up(cfg: Config) -> Processes:
    """Prepare this process and its config for the devices of the machine.

    Processes that are all on one machine accept connections from this machine alone.

    With GPUs, MMEngine's own launcher does the rest, and takes the local rank for the
    number of the GPU. A cluster can show each process a GPU of its own, as ``srun
    --gpus-per-task=1`` does. Then this function makes the local rank 0 for MMEngine.

    On the CPU MMEngine would ask for CUDA devices. There this function makes a gloo
    process group, wraps the model without device ids, and turns SyncBatchNorm, which
    has no CPU kernel, into BatchNorm.

    Args:
        cfg (Config): The run's config with ``launcher`` set; changed in place.

    Returns:
        Processes: Rank and number of the processes.

    Raises:
        ValueError: If the launcher is unknown, did not start this process, or started
            more processes than there are GPUs; if the processes' port is in use.
        OwnError: The second of these, in the first process that has no GPU.
    """
    global _local_rank
    keep_freed_memory()
    layout = processes(cfg.launcher)
    _local_rank = layout.local_rank
    _stay_on_one_machine(cfg.launcher, layout)
    has_gpus = torch.cuda.is_available()
    if has_gpus and cfg.launcher != 'none':
        gpu = _own_gpu(layout.local_rank, torch.cuda.device_count())
        # MMEngine reads one when it makes the group, the other for the model.
        os.environ[_VARIABLES[cfg.launcher][2]] = os.environ['LOCAL_RANK'] = str(gpu)
    if (cfg.get('randomness') or {}).get('deterministic'):
        # Without it, matrix products raise an error on CUDA.
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    threads = 1
    if not has_gpus:
        cores = len(os.sched_getaffinity(0))
        share = max(1, cores // layout.local_world_size)
        threads = int(os.environ.get('OMP_NUM_THREADS', share))
        torch.set_num_threads(threads)
    if cfg.launcher != 'none':
        # MMEngine would set these to 1, with a warning.
        os.environ.setdefault('OMP_NUM_THREADS', str(threads))
        os.environ.setdefault('MKL_NUM_THREADS', os.environ['OMP_NUM_THREADS'])
    if cfg.launcher != 'none' and not has_gpus:
        os.environ.setdefault('MASTER_ADDR', '127.0.0.1')
        os.environ.setdefault('MASTER_PORT', '29500')
        # MMEngine reads it when it wraps the model.
        os.environ['LOCAL_RANK'] = str(layout.local_rank)
        options = cfg.get('env_cfg', {}).get('dist_cfg', {})
        distributed.init_process_group(
            'gloo',
            rank=layout.rank,
            world_size=layout.world_size,
            timeout=timedelta(seconds=options.get('timeout', _TIMEOUT)),
        )
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
    """Find the checkpoint to resume after torchrun has restarted the processes.

    torchrun's own count of restarts is of no use here: it differs between the machine
    of the dead process and the others.

    Args:
        work_dir (str): Folder of the run.

    Returns:
        str | None: The newest checkpoint, if it was saved after ``LAUNCH_TIME``. Our
        launch script sets this variable, in seconds, if restarts are asked for.
    """
    # Without restarts, the work_dir need not be searched.
    newest = newest_checkpoint(work_dir) if 'LAUNCH_TIME' in os.environ else None
    return str(newest) if newest and _is_of_this_launch(newest) else None


@master_only
def forbid_restart(work_dir: str, reason: str) -> None:
    """Note that torchrun must not restart this run: it would end in the same way.

    Args:
        work_dir (str): Folder of the run.
        reason (str): How the run ended, for :func:`require_restart_allowed`.
    """
    if 'LAUNCH_TIME' in os.environ:
        write_whole(Path(work_dir) / _ENDED_NAME, reason.encode())


def require_restart_allowed(work_dir: str) -> None:
    """Refuse a restart by torchrun that :func:`forbid_restart` has forbidden.

    torchrun restarts every run that fails. It cannot be told not to.

    Args:
        work_dir (str): Folder of the run.

    Raises:
        ValueError: If :func:`forbid_restart` was called since the launch.
    """
    path = Path(work_dir) / _ENDED_NAME
    if path.is_file() and _is_of_this_launch(path):
        with path.open('rb') as file:
            raise ValueError(f'Not started again: {printable(file.read(2000), 2000)}')


def _is_of_this_launch(path: Path) -> bool:
    """Whether a file was written after ``LAUNCH_TIME``; False without restarts."""
    return path.stat().st_mtime >= float(os.environ.get('LAUNCH_TIME', 'inf'))


def tear_down() -> None:
    """Leave the process group when all processes have done their work.

    Threads of the group may abort a process that ends while they run. The launcher
    would take that for a failed run. The wrapped model keeps the group alive, so the
    caller must not hold the runner any more.
    """
    if distributed.is_available() and distributed.is_initialized():
        # When the runner is freed, PyTorch waits 5 seconds for each worker of a data
        # loader, because the queue that tells the worker to end is closed before.
        for worker in multiprocessing.active_children():
            worker.terminate()
        gc.collect()  # a runner and its loops refer to one another
        distributed.barrier()
        distributed.destroy_process_group()
    global _store
    _store = None


def _own_gpu(local_rank: int, gpus: int) -> int:
    """The GPU of a process: its number among those that the process sees.

    Two processes on one GPU are an error of NCCL ("Duplicate GPU detected"), so what
    the environment says of the GPUs need not be certain.

    Args:
        local_rank (int): Rank of the process on its machine.
        gpus (int): Number of GPUs that the process sees.
    """
    if local_rank < gpus:
        return local_rank
    environment = os.environ.get
    # Processes that a task of Slurm starts have its variables too, but other ranks.
    is_task = environment('SLURM_LOCALID') == str(local_rank)
    on_node = environment('SLURM_GPUS_ON_NODE', '')
    has_fewer = on_node.isdigit() and int(on_node) > gpus
    if is_task and (has_fewer or environment('SLURM_GPUS_PER_TASK')):
        return 0
    if environment('CUDA_VISIBLE_DEVICES') == str(local_rank):
        return 0
    # One of the processes without a GPU speaks for all.
    raise (OwnError if local_rank == gpus else ValueError)(
        f'More than {local_rank} processes were started on this machine, but it shows '
        f'{gpus} GPUs. Ask for at most {gpus}, or check CUDA_VISIBLE_DEVICES. Where '
        'each process has a GPU of its own, start them with srun --gpus-per-task=1, or '
        'with CUDA_VISIBLE_DEVICES set to the local rank.'
    )


def _stay_on_one_machine(launcher: str, layout: Processes) -> None:
    """Use the loopback interface alone if all processes are on one machine.

    Process groups have no authentication: whoever can connect can run code. NCCL
    needs the interface only to set up its connections. The GPUs of one machine exchange
    data through NVLink, PCIe or shared memory.
    """
    if launcher == 'slurm':  # its tasks per node are an upper limit
        alone = os.environ.get('SLURM_STEP_NUM_NODES') == '1'
    else:
        alone = layout.local_world_size == layout.world_size
    if launcher == 'none' or not alone:
        return
    os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')
    os.environ.setdefault('NCCL_SOCKET_IFNAME', 'lo')
    # torchrun has opened the store already if it was not started by our scripts.
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True':
        os.environ['MASTER_ADDR'] = '127.0.0.1'
        if layout.rank == 0:
            _open_store(int(os.environ.setdefault('MASTER_PORT', '29500')))


def _open_store(port: int) -> None:
    """Open the processes' store on the loopback interface.

    ``init_process_group`` would open a store that listens on all interfaces. It joins
    this one instead, because this one has the same port.
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
        use_libuv=False,  # libuv's store takes no open socket before PyTorch 2.8
    )
