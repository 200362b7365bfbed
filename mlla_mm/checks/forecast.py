# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What a whole run will take, by what a rehearsal of it has measured."""

import math
import shutil
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, Optional, Tuple

import torch
from mmengine.config import Config

from ..engine.batch_size import accumulated_batches
from ..engine.parts import batch_size_of, default_hook

# Of an iteration. Less may be chance.
_WAITING = 0.2


class CheckError(Exception):
    """A problem that would end the run, in words for the user."""


class Measured(NamedTuple):
    """What a rehearsal has measured, on the slowest or largest of all processes.

    Attributes:
        size (tuple[int, int], optional): Width and height of the largest images in
            pixels; None if samples are not single images.
        memory (int): Peak memory in bytes: on a GPU, of all that is in use on it; on
            the CPU, of a process.
        tensors (int): The part of it that tensors on the GPU have; 0 on the CPU.
        iteration (float): Seconds of a training iteration.
        waiting (float): The part of it that waits for data, from 0 to 1.
        made (float): Training images a second that one data worker makes.
        cores (float): Cores of the CPU for each process.
        evaluation (float): Seconds of an evaluation.
        checkpoint (int): Bytes of a checkpoint; 0 if none is saved.
        best (int): Bytes of the best checkpoints.
        done (int): Iterations before the start of the run.
        epoch (int): Iterations of an epoch.
    """

    size: Optional[Tuple[int, int]]
    memory: int
    tensors: int
    iteration: float
    waiting: float
    made: float
    cores: float
    evaluation: float
    checkpoint: int
    best: int
    done: int
    epoch: int


def remaining(cfg: Config, done: int, epoch: int) -> Tuple[int, int, int]:
    """Count what a run still has to do.

    Args:
        cfg (Config): The config of the whole run.
        done (int): Iterations before the start.
        epoch (int): Iterations of an epoch.

    Returns:
        tuple[int]: Iterations, evaluations, and checkpoints that are kept.
    """
    loop = cfg.train_cfg
    unit = epoch if 'max_epochs' in loop else 1
    # An iteration-based run is one epoch to MMEngine.
    epoch = epoch if 'max_epochs' in loop else loop.max_iters
    iterations = max(0, loop.get('max_epochs', 1) * epoch - done)
    default = 1 if 'max_epochs' in loop else 1000
    evaluations = iterations / (loop.get('val_interval', default) * unit)
    # Without a hook of the config, MMEngine saves every epoch.
    hook = default_hook(cfg, 'checkpoint') or dict(interval=1)
    interval = hook.get('interval', -1) * (epoch if hook.get('by_epoch', True) else 1)
    checkpoints = math.ceil(iterations / interval) if interval > 0 else 1
    if hook.get('max_keep_ckpts', -1) > 0:
        checkpoints = min(checkpoints, hook['max_keep_ckpts'])
    return iterations, math.ceil(evaluations), checkpoints


def describe(cfg: Config, processes: int, measured: Measured) -> str:
    """Write the report of a rehearsal.

    Args:
        cfg (Config): The config of the whole run.
        processes (int): Number of processes.
        measured (Measured): What the rehearsal has measured.

    Returns:
        str: A line for each thing that the run needs.

    Raises:
        CheckError: If there is too little disk space for the checkpoints.
    """
    iterations, evaluations, checkpoints = remaining(cfg, measured.done, measured.epoch)
    training = measured.iteration * iterations
    evaluation = measured.evaluation * evaluations
    workers = cfg.train_dataloader.get('num_workers', 0)
    images = f'{batch_size_of(cfg.train_dataloader)} images'
    if measured.size:
        images += f' of {measured.size[0]} x {measured.size[1]} pixels'
    if accumulated_batches(cfg) > 1:
        images += f', {accumulated_batches(cfg)} times for an update'
    peak = _gib(measured.memory)
    memory = f'{peak} resident set of a process, without its data workers'
    if torch.cuda.is_available():
        _, total = torch.cuda.mem_get_info()
        tensors = _gib(measured.tensors)
        memory = f'{peak} of {_gib(total)} of a GPU ({tensors} by tensors)'
    rows = {
        'processes': str(processes),
        'largest batch': f'{images}, on each process',
        'peak memory': f'{memory}, the largest of all processes',
        'iteration': f'{measured.iteration:.3g} s',
        'data loading': f'{measured.waiting:.0%} of it, waiting for {workers} workers',
        'data': _describe_data(cfg, processes, measured),
        'time to the end': f'{_duration(training + evaluation)} (training '
        f'{_duration(training)}, evaluation {_duration(evaluation)}): a rough '
        "estimate, without the metric's own computation",
    }
    if measured.checkpoint:
        rows['checkpoints'] = _describe_disk(cfg, measured, checkpoints)
    return '\n'.join(f'  {name:<16} {text}' for name, text in rows.items())


def _describe_data(cfg: Config, processes: int, measured: Measured) -> str:
    """How fast data come, and what would help if a GPU waits for them."""
    workers = cfg.train_dataloader.get('num_workers', 0)
    at_work = max(1.0, min(workers, measured.cores))
    made = at_work * measured.made
    text = (
        f'1 worker makes {_whole(measured.made)} images a second; '
        f'{workers or 1} workers x {processes} processes on {measured.cores:g} cores '
        f'each at most {_whole(made * processes)}'
    )
    # Without waiting an iteration would take the model's own time.
    model_time = measured.iteration * (1 - measured.waiting)
    micro_batches = cfg.train_cfg.get('micro_batches', 1)
    images = batch_size_of(cfg.train_dataloader) * micro_batches
    # Both have to say so: the first batches wait for workers that only start, and a
    # burst of a slow disk is no lack of workers.
    is_short = measured.waiting > _WAITING and made * model_time < images
    if not (is_short and torch.cuda.is_available()):
        return text
    wanted = images / max(model_time, 1e-9)
    text += f'. The model would take {_whole(wanted * processes)}: '
    needed = math.ceil(wanted / measured.made)
    limit = math.floor(measured.cores)
    if workers < limit:
        text += f'train_dataloader.num_workers={min(needed, limit)} would help'
        return text
    return f'{text}that needs {needed} cores for each process, see docs/data_speed.md'


def _describe_disk(cfg: Config, measured: Measured, count: int) -> str:
    """The space of the checkpoints, and the free space; an error if it is too small."""
    account = f'{count} x {_gib(measured.checkpoint)}'
    if measured.best:
        account += f' + {_gib(measured.best)}'
    target = default_hook(cfg, 'checkpoint').get('out_dir') or cfg.work_dir
    if '://' in target:
        return f'{account}, at {target}'
    free = shutil.disk_usage(existing(target)).free
    if count * measured.checkpoint + measured.best > free:
        raise CheckError(
            f'the checkpoints of the run take {account}, but {_gib(free)} are free at '
            f'{target}. Make room, or keep fewer of them: '
            'default_hooks.checkpoint.max_keep_ckpts=2.'
        )
    return f'{account}; {_gib(free)} free'


def existing(path: str) -> Path:
    """A path, or the nearest folder above it that exists."""
    absolute = Path(path).absolute()
    return next(p for p in (absolute, *absolute.parents) if p.exists())


def _whole(number: float) -> str:
    """A number to three digits, and without a fraction where it has more."""
    return f'{float(f"{number:.3g}"):,g}'


def _gib(size: int) -> str:
    return f'{size / 2**30:.3g} GiB'


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
