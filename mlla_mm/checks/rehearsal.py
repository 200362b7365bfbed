# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""``tools/train.py --check``: a rehearsal finds in minutes what would end a run later.

MMEngine's own runner makes two short runs in a temporary folder:

1. Two updates on batches of the largest size, a checkpoint, an evaluation of a few
   images, the best checkpoint.
2. Some updates on the usual batches. The run resumes from that checkpoint and is timed.
   Behind it, images are made as one data worker makes them.

A run that resumes a checkpoint does it once as a whole before, up to its first update.

The report extrapolates memory, time and disk space to the whole run.
"""

import copy
import gc
import logging
import math
import os
import random
import resource
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, NoReturn, Optional, Set, Tuple

import torch
from mmengine.config import Config
from mmengine.dist import (
    all_gather_object,
    barrier,
    broadcast_object_list,
    init_dist,
    is_distributed,
    is_main_process,
)
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import find_latest_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader

from ..checkpoints.reader import CheckpointError
from ..compat.openmmlab import whole_dataset
from ..datasets import speed
from ..datasets.corrupt_images import CorruptImageError
from ..engine import launch
from ..engine.arguments import ArgumentError, named_arguments
from ..engine.console import build_runner
from ..engine.options import set_resume
from ..engine.parts import as_list, batch_size_of, hooks_of, kind_of, parts_of
from ..reproducible.preemption import handle_sigterm
from ..reproducible.resume import require_resumable
from ..reproducible.seeding import SeededDataset
from .forecast import CheckError, Measured, describe, existing
from .largest_size import find_sizes, largest_size, pin_scales, resize_images
from .units import IntervalError, check_checkpoints

UPDATES = 2
"""Optimiser updates at the largest size."""
EVALUATED_BATCHES = 3
"""Batches that each process evaluates."""
TIMED_ITERATIONS = 10
"""Timed iterations. They come after the batches that the workers load in advance."""
TIMED_SECONDS = 60.0
"""About the longest time for the second run; two iterations are made in any case."""
DATA_SECONDS = 1.0
"""Seconds for which images are made to see how fast they come."""
_MOST_IMAGES = 1000


class Position(NamedTuple):
    """How far a run has got: its epochs and iterations."""

    epoch: int = 0
    iter: int = 0


class Batches(NamedTuple):
    """Batches of an epoch on each process: all of them, and the full ones alone."""

    all: int
    full: int


def run(cfg: Config, layout: launch.Processes) -> int:
    """Rehearse a training run and print what the whole run will need.

    Every process calls this function. The work_dir is left as it was.

    Args:
        cfg (Config): The run's config, after :func:`mlla_mm.engine.launch.set_up`.
        layout (launch.Processes): Rank and number of the processes.

    Returns:
        int: The exit status: 0, or 1 if the run would fail. The cause is printed.
    """
    if cfg.launcher != 'none' and not is_distributed():
        init_dist(cfg.launcher, **cfg.get('env_cfg', {}).get('dist_cfg', {}))
    watch = _WatchHook()
    folder = ''
    # Another process may wait for others, and must end at once.
    on_sigterm = _exit_by_sigterm if layout.rank == 0 else None
    previous_handler = handle_sigterm(on_sigterm)
    try:
        folder = _make_folder(cfg.work_dir)
        with named_arguments(cfg):
            report = _rehearse(cfg, layout, folder, watch)
        barrier()
    except Exception as error:  # any error here would end the run, too
        if _is_first_to_fail(folder, layout):
            _print_cause(watch.stage, error)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        handle_sigterm(previous_handler)
    if layout.rank == 0:
        print(f'Check passed: {cfg.filename}\n{report}', flush=True)
    launch.tear_down()
    return 0


def _rehearse(
    cfg: Config, layout: launch.Processes, folder: str, watch: '_WatchHook'
) -> str:
    """Read the data and make the two runs; returns the report."""
    watch.stage = 'reading the checkpoint to resume'
    start = _read_start(cfg)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    watch.stage = 'reading the training data'
    largest, size, batches = _read_training_data(cfg, layout.world_size)
    if 'max_epochs' in cfg.train_cfg:
        check_checkpoints(cfg, cfg.train_cfg.max_epochs * batches.all)
    watch.stage = 'reading the validation data'
    evaluated = _read_validation_data(cfg, layout.world_size)

    updates = UPDATES * cfg.optim_wrapper.get('accumulative_counts', 1)
    if cfg.get('resume'):
        done = _resume(cfg, folder, watch)
    else:
        done = start
    first = _shorten(cfg, folder, start, min(updates, batches.full))
    first.train_dataloader.dataset = largest
    evaluators = map(kind_of, as_list(cfg.get('val_evaluator')))
    # mmdet's evaluator of several data sets needs all of their images.
    if evaluated.full and 'MultiDatasetsEvaluator' not in evaluators:
        count = min(EVALUATED_BATCHES, evaluated.full)
        first.val_dataloader.num_batch_per_epoch = count
    peak = _PeakMemoryHook()
    stage = 'training at the largest scale'
    reached, times = _train(first, watch, stage, others=(peak,))
    memory, tensors = max(all_gather_object(peak.measure()))
    update, evaluation = _seconds(times, 'train/time', 1), 0.0
    if evaluated.all:
        evaluation = _seconds(times, 'val/time', EVALUATED_BATCHES) * evaluated.all

    saved = _find_saved(folder)
    resumed = reached if saved else Position()
    iterations = 1 + _loaded_in_advance(cfg) + TIMED_ITERATIONS
    iterations = max(2, min(iterations, int(TIMED_SECONDS / update)))
    second = _shorten(cfg, folder, resumed, min(iterations, batches.full))
    second.resume, second.load_from = False, None
    set_resume(second, 'auto')
    second.val_cfg = second.val_dataloader = second.val_evaluator = None
    second.default_hooks.checkpoint = None
    data = _DataHook(watch)
    reached, times = _train(second, watch, 'training after resuming', others=(data,))
    timed = max(1, min(TIMED_ITERATIONS, reached.iter - resumed.iter - 1))
    iteration = _seconds(times, 'train/time', timed)
    waiting = _seconds(times, 'train/data_time', timed)

    watch.stage = 'adding up the checkpoints of the whole run'
    measured = Measured(
        size=size,
        memory=memory,
        tensors=tensors,
        iteration=iteration,
        waiting=min(1.0, waiting / iteration),
        made=min(all_gather_object(data.rate)),
        cores=_cores_per_process(),
        evaluation=evaluation,
        checkpoint=_bytes(Path(saved)) if saved else 0,
        best=sum(map(_bytes, Path(folder).glob('best_*'))),
        done=done.iter,
        epoch=batches.all,
    )
    return describe(cfg, layout.world_size, measured)


# The folder, and what is said of a failure.


def _make_folder(work_dir: str) -> str:
    """Make a folder for all processes in the work_dir, or above if there is none."""
    made = ['']
    if is_main_process():
        made[0] = tempfile.mkdtemp(prefix='check-', dir=existing(work_dir))
    broadcast_object_list(made)
    return made[0]


def _find_saved(folder: str) -> Optional[str]:
    """The checkpoint of the first run; None if it saves none."""
    saved = find_latest_checkpoint(folder)
    if len(set(all_gather_object(saved))) > 1:
        raise CheckError(
            'some processes do not see the checkpoint that was saved. Processes on '
            'several machines need a work_dir that all of them share'
        )
    return saved


def _bytes(path: Path) -> int:
    """Size of a checkpoint, which is a folder if the model is sharded."""
    return sum(file.stat().st_size for file in [path, *path.rglob('*')])


def _exit_by_sigterm(number: int, frame: Any) -> NoReturn:
    """Handle SIGTERM: end such that the folder is removed, as Ctrl-C does."""
    sys.exit(128 + number)


def _is_first_to_fail(folder: str, layout: launch.Processes) -> bool:
    """Whether this process is the one to print the cause."""
    if not folder:
        return layout.rank == 0
    try:
        Path(folder, 'failed').mkdir()
    except OSError:
        return False
    return True


def _print_cause(stage: str, error: Exception) -> None:
    unregistered = launch.unregistered_type(error)
    cause = unregistered or f'{type(error).__name__}: {error}'
    if isinstance(
        error,
        (ArgumentError, CheckError, CheckpointError, CorruptImageError, IntervalError),
    ):
        cause = str(error)  # These errors are written for users.
    elif isinstance(error, torch.cuda.OutOfMemoryError):
        cause = (
            'out of GPU memory. To need less: model.backbone.with_cp=True, --amp, or a '
            'smaller train_dataloader.batch_size with --keep-batch-size; see '
            f'docs/hardware.md. ({error})'
        )
    elif not (unregistered or isinstance(error, OSError)):
        traceback.print_exception(type(error), error, error.__traceback__)
    text = f'Error: check failed while {stage}: {cause}'
    print(text, file=sys.stderr, flush=True)


# The data.


def _read_start(cfg: Config) -> Position:
    """Where the run starts: at zero, or at the checkpoint that it resumes."""
    if not cfg.get('resume'):
        return Position()
    checkpoint = CheckpointLoader.load_checkpoint(cfg.load_from, map_location='cpu')
    require_resumable(checkpoint, cfg.load_from)
    return Position(checkpoint['meta']['epoch'], checkpoint['meta']['iter'])


def _read_training_data(
    cfg: Config, world_size: int
) -> Tuple[dict, Optional[Tuple[int, int]], Batches]:
    """Read the training data, and find the largest size of its images.

    Returns:
        tuple: Config of the data with all images of the largest size; this size (W, H),
        or None if samples are not single images; batches of an epoch.
    """
    config = copy.deepcopy(cfg.train_dataloader.dataset)
    pin_scales(config)
    skips = cfg.train_cfg.get('skip_corrupt_images', False)
    dataset = SeededDataset(copy.deepcopy(config), skips)
    processes = world_size * cfg.train_cfg.get('micro_batches', 1)
    batches = _count_batches(cfg.train_dataloader, dataset, processes)
    if not batches.all and 'max_epochs' in cfg.train_cfg:
        raise CheckError(
            f'an epoch has no update: the {len(dataset)} images are less than a batch, '
            'and drop_last leaves it out'
        )
    sizes = find_sizes(dataset)
    if not sizes:
        return config, None, batches
    size = largest_size(sizes, batch_size_of(cfg.train_dataloader))
    if len(sizes) > 1:
        resize_images(config, size)
    return config, size, batches


def _read_validation_data(cfg: Config, world_size: int) -> Batches:
    """Read the validation data, if there are any. Returns batches of an evaluation."""
    if cfg.get('val_cfg') is None:
        return Batches(0, 0)
    dataset = DATASETS.build(copy.deepcopy(cfg.val_dataloader.dataset))
    return _count_batches(cfg.val_dataloader, dataset, world_size)


def _count_batches(loader: dict, dataset: Any, processes: int) -> Batches:
    if hasattr(dataset, 'full_init'):
        dataset.full_init()
    count, size = len(dataset), batch_size_of(loader)
    if not count:
        raise CheckError('the data set is empty')
    given = loader.get('num_batch_per_epoch')
    if given:
        return Batches(given, given)
    # Samplers repeat images, so that all processes have equally many.
    images = math.ceil(count / processes)
    drops_last = (loader.get('batch_sampler') or loader).get('drop_last')
    batches = images // size if drops_last else math.ceil(images / size)
    return Batches(batches, count // (size * processes))


def _loaded_in_advance(cfg: Config) -> int:
    """Batches that the workers load in advance. PyTorch's default is two for each."""
    loader = cfg.train_dataloader
    return loader.get('num_workers', 0) * (loader.get('prefetch_factor') or 2)


# The two runs.


def _move(cfg: Config, folder: str) -> Config:
    """A quiet copy of a run that writes into the folder alone."""
    cfg = copy.deepcopy(cfg)
    cfg.work_dir = folder
    cfg.log_level = logging.ERROR
    # MMEngine keeps loggers and the like by this name, also those of the other run.
    cfg.experiment_name = f'{Path(folder).name}-{time.monotonic_ns()}'
    if cfg.get('visualizer'):
        cfg.visualizer.pop('name', None)
        cfg.visualizer.vis_backends = [dict(type='LocalVisBackend')]
    hooks = dict(cfg.get('default_hooks') or {}, timer=dict(type='IterTimerHook'))
    for name, hook in hooks.items():
        if hook:
            hook.pop('out_dir', None)
            if kind_of(hook) == 'StopOnInvalidLossHook':
                # It would save the batch in the folder, which is removed.
                hooks[name] = dict(type='NoHook')
    if hooks.get('checkpoint'):
        hooks['checkpoint'].update(interval=1, save_begin=0, save_last=True)
    cfg.default_hooks = hooks
    return cfg


def _shorten(cfg: Config, folder: str, start: Position, batches: int) -> Config:
    """A quiet, short copy of a run that writes into the folder alone.

    Args:
        cfg (Config): The config of the whole run.
        folder (str): The folder.
        start (Position): Where the short run starts.
        batches (int): Iterations of the short run. It saves and evaluates at its end.
            0 leaves an epoch as long as it is.
    """
    cfg = _move(cfg, folder)
    # It would see that the schedule is another one.
    for hook in hooks_of(cfg):
        if kind_of(hook) == 'ResumedSettingsHook':
            hook['type'] = 'NoHook'
    cfg.default_hooks.setdefault('resumed_settings', dict(type='NoHook'))
    for evaluator in parts_of(cfg.get('val_evaluator')):
        for key in {'outfile_prefix', 'output_dir', 'out_file_path'} & set(evaluator):
            evaluator[key] = str(Path(folder, Path(evaluator[key] or key).name))
    # A detector that has learnt nothing yet would have no detections to evaluate.
    for part in parts_of(cfg.model.get('test_cfg')):
        if 'score_thr' in part:
            part['score_thr'] = 0.0
    cfg.train_dataloader.num_batch_per_epoch = batches or None
    loop = cfg.train_cfg
    loop.pop('dynamic_intervals', None)
    loop.val_begin = loop.val_interval = 1
    if 'max_epochs' in loop:
        loop.max_epochs = start.epoch + 1
    else:
        loop.max_iters = loop.val_interval = start.iter + max(1, batches)
    return cfg


def _resume(cfg: Config, folder: str, watch: '_WatchHook') -> Position:
    """Resume as the whole run does, up to its first update; returns where it starts."""
    stage = 'resuming'
    return _train(_move(cfg, folder), watch, stage, others=(_EndHook(),))[0]


def _train(
    cfg: Config, watch: '_WatchHook', stage: str, others: Sequence[Hook] = ()
) -> Tuple[Position, MessageHub]:
    """Make one of the short runs.

    Args:
        cfg (Config): The config of the short run.
        watch (_WatchHook): Follows the run.
        stage (str): What its training is called in a message.
        others (Sequence[Hook]): Further hooks. Defaults to ().

    Returns:
        tuple: How far the run got, and its times. The model and the workers are freed.
    """
    watch.stage = 'building the model, the data loaders and the metric'
    watch.training = stage
    runner = build_runner(cfg, verbose=True)
    for hook in (watch, *others):
        runner.register_hook(hook)
    with suppress(_Ended):
        runner.train()
    reached, times = Position(runner.epoch, runner.iter), runner.message_hub
    for handler in runner.logger.handlers:
        handler.close()
    runner.hooks.clear()
    del runner
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return reached, times


class _WatchHook(Hook):
    """Knows what a run is doing, and checks its losses.

    Attributes:
        stage (str): What is being done, for the message if it fails.
        training (str): The stage of training, in words that tell the two runs apart.
    """

    # Before CheckpointHook, which is VERY_LOW.
    priority = 'LOW'

    def __init__(self) -> None:
        self.stage = 'writing to the work_dir'
        self.training = ''

    def before_run(self, runner) -> None:
        self.stage = 'loading the initial weights or the checkpoint'

    def before_train(self, runner) -> None:
        self.stage = self.training
        # With the better score of a resumed run, no best checkpoint would be saved.
        known = runner.message_hub.runtime_info
        for key in [key for key in known if key.startswith('best_')]:
            known.pop(key)

    def after_train_iter(
        self,
        runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Optional[dict] = None,
    ) -> None:
        loss = torch.as_tensor((outputs or {}).get('loss', 0.0)).item()
        if not math.isfinite(loss):
            raise CheckError(f'the loss is {loss} at iteration {runner.iter}')
        if self.is_last_train_iter(runner):
            self.stage = 'saving a checkpoint'

    def after_train_epoch(self, runner) -> None:
        self.stage = 'saving a checkpoint'

    def before_val_epoch(self, runner) -> None:
        self.stage = 'evaluating'

    def after_val_epoch(self, runner, metrics: Optional[dict] = None) -> None:
        self.stage = 'saving the best checkpoint'


class _Ended(Exception):
    """Raised to end a run before its first update."""


class _EndHook(Hook):
    """Ends a run when it has loaded its checkpoint."""

    def before_train(self, runner) -> None:
        raise _Ended


class _DataHook(Hook):
    """Makes training images as a worker does, when a run is over.

    Attributes:
        rate (float): Images a second.
    """

    def __init__(self, watch: _WatchHook) -> None:
        self.rate = 0.0
        self._watch = watch

    def after_train(self, runner) -> None:
        self._watch.stage = 'timing the training data'
        # All of it, since the few images of the run have just been read.
        dataset = whole_dataset(runner.train_dataloader.dataset)
        count = len(dataset)
        indices = random.Random(0).sample(range(count), min(count, _MOST_IMAGES))
        dataset[indices[0]]  # opens files and imports what the steps need
        found = speed.time_samples(dataset, indices[1:] or indices, DATA_SECONDS)
        self.rate = found.rate


class _PeakMemoryHook(Hook):
    """Reads the peak memory before LoggerHook does, which resets PyTorch's counts."""

    # LoggerHook is BELOW_NORMAL.
    priority = 'NORMAL'

    def __init__(self) -> None:
        self._peak = 0, 0

    def after_train_iter(self, *args: Any, **kwargs: Any) -> None:
        self.measure()

    def measure(self) -> Tuple[int, int]:
        """The largest :func:`_peak_memory` until now, each of its numbers."""
        now = _peak_memory()
        self._peak = max(self._peak[0], now[0]), max(self._peak[1], now[1])
        return self._peak


def _seconds(times: MessageHub, name: str, count: int) -> float:
    """Mean of the last times of MMEngine's IterTimerHook, on the slowest process."""
    values = times.get_scalar(name).data[0][-count:]
    return max(1e-9, *all_gather_object(float(values.mean())))


def _cores_per_process() -> float:
    """Cores that the processes of a machine may use, by process; the fewest of all.

    A launcher may give each process cores of its own, or all processes the same.
    """
    own = socket.gethostname(), os.sched_getaffinity(0)
    machines: Dict[str, List[Set[int]]] = defaultdict(list)
    for name, cores in all_gather_object(own):
        machines[name].append(cores)
    return min(len(set().union(*found)) / len(found) for found in machines.values())


def _peak_memory() -> Tuple[int, int]:
    """Bytes in use at the peak since the last reset: of the GPU, and of tensors on it.

    The first is what nvidia-smi shows of the GPU. CUDA, NCCL and other programs have
    what is neither free nor PyTorch's. This part is measured now: only PyTorch keeps
    its peak.

    On the CPU the first is the resident set of the process, and the second is 0.
    """
    if not torch.cuda.is_available():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, 0
    free, total = torch.cuda.mem_get_info()
    others = total - free - torch.cuda.memory_reserved()
    return (
        torch.cuda.max_memory_reserved() + others,
        torch.cuda.max_memory_allocated(),
    )
