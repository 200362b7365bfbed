# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""``tools/train.py --check``: in minutes, what would otherwise end a run in hours.

A rehearsal with MMEngine's own runner, in a folder that is removed afterwards:

1. The data sets are read, and the largest size of a training image is looked for.
2. A run of two updates on batches of that size trains, saves, evaluates a few images
   with the metric, saves the best, and loads what it saved.
3. A second run resumes from there, with the pipeline as it is, and is timed.

What it finds out is extrapolated to the whole run: memory, time and disk.
"""

import copy
import gc
import logging
import math
import resource
import shutil
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from mmengine.config import Config
from mmengine.dist import (
    all_gather_object,
    barrier,
    broadcast_object_list,
    init_dist,
    is_distributed,
)
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS, init_default_scope
from mmengine.runner import Runner, find_latest_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader

from ..compat.openmmlab import is_resumed
from ..datasets.corrupt_images import CheckedDataset
from ..engine import launch
from ..engine.batch_size import accumulated_batches
from ..engine.options import as_list, default_hook, kind_of
from ..reproducible.resume import newest_checkpoint, require_resumable
from ..reproducible.seeding import SeededDataset

UPDATES = 2
"""Optimiser updates at the largest size."""
EVALUATED_BATCHES = 3
"""Batches that each process evaluates."""
PROBED_IMAGES = 64
"""Training images that are looked at for the largest size."""
TIMED_ITERATIONS = 10
"""Timed iterations, once the batches that were loaded in advance are used up."""
TIMED_SECONDS = 60.0
"""Time after which the timing ends, however many iterations there were."""

_MEMORY_ADVICE = (
    'To need less: model.backbone.with_cp=True, --amp, or a smaller '
    'train_dataloader.batch_size with --keep-batch-size; see docs/hardware.md.'
)


class CheckError(Exception):
    """Something that would end the run, in words for the user."""


class Start(NamedTuple):
    """Where training starts: the checkpoint to resume, if any, and its counts."""

    checkpoint: Optional[str] = None
    epoch: int = 0
    iteration: int = 0


class Timing(NamedTuple):
    """Seconds of an iteration, and the part of it that is spent waiting for data."""

    seconds: float
    data_share: float


class Disk(NamedTuple):
    """Bytes that the checkpoints will take, and free bytes, with what they count."""

    needed: int
    free: int
    account: str


def run(cfg: Config, layout: launch.Processes) -> int:
    """Rehearse a training run and print what the whole of it will need.

    Called on every process. Neither the work_dir nor a checkpoint is changed.

    Args:
        cfg (Config): The run's config, as :func:`mlla_mm.engine.launch.set_up` left it.
        layout (launch.Processes): Where this process stands.

    Returns:
        int: The exit status: 0, or 1 if the run would fail, with the cause printed.
    """
    if cfg.launcher != 'none' and not is_distributed():
        init_dist(cfg.launcher, **cfg.get('env_cfg', {}).get('dist_cfg', {}))
    scratch = _Scratch(layout)
    stage = _Stage('making a folder in the work_dir')
    try:
        report = _rehearse(cfg, layout, scratch.make(cfg.work_dir), stage)
    # Whatever ends the rehearsal would end the run.
    except Exception as error:
        if scratch.claim():
            scratch.remove()
            _print_cause(stage, error)
        return 1
    except BaseException:  # Ctrl-C
        scratch.remove()
        raise
    barrier()
    if layout.local_rank == 0:
        scratch.remove()
    if layout.rank == 0:
        print(f'Check passed: {cfg.filename}\n{report}', flush=True)
    launch.tear_down()
    return 0


class _Stage:
    """What is being done, for the message if it fails."""

    def __init__(self, name: str) -> None:
        self.name = name


def _rehearse(cfg: Config, layout: launch.Processes, folder: str, stage: _Stage) -> str:
    """Everything that is checked; returns the report, or raises what went wrong."""
    stage.name = 'reading the checkpoint to resume'
    start = _start(cfg)
    init_default_scope(cfg.get('default_scope', 'mmengine'))

    stage.name = 'reading the training data'
    pinned = copy.deepcopy(cfg.train_dataloader.dataset)
    pin_scales(pinned)
    skips = cfg.train_cfg.get('skip_corrupt_images', False)
    dataset = _filled(SeededDataset(copy.deepcopy(pinned), skips))
    lengths = {'train': len(dataset)}
    size = largest_size(dataset, cfg.train_dataloader.batch_size, pinned)
    del dataset
    if cfg.get('val_cfg') is not None:
        stage.name = 'reading the validation data'
        evaluated = CheckedDataset(copy.deepcopy(cfg.val_dataloader.dataset))
        lengths['val'] = len(_filled(evaluated))

    watch = _WatchHook(stage)
    short = _short_run(cfg, folder, start, lengths, layout.world_size)
    short.train_dataloader.dataset = pinned
    runner = _train(short, watch, stage)
    memory = max(all_gather_object(_peak_memory()))
    saved = find_latest_checkpoint(folder)
    if saved and isinstance(runner, Runner):
        stage.name = 'loading the checkpoint that was saved'
        runner.load_checkpoint(saved)
    _release(runner)
    del runner

    loaded_ahead = _loaded_ahead(cfg)
    stopwatch = _StopwatchHook(1 + loaded_ahead + TIMED_ITERATIONS, stage)
    runner = _train(_resumed_run(cfg, folder, start, saved), stopwatch, stage)
    epoch_length = len(runner.train_loop.dataloader)
    _release(runner)

    stage.name = 'adding up the checkpoints of the whole run'
    left = Remaining(cfg, start, epoch_length)
    disk = _disk(cfg, folder, left)
    if disk is not None and disk.needed > disk.free:
        raise CheckError(
            f'the checkpoints of the run take {_gib(disk.needed)} ({disk.account}), '
            f'but {_gib(disk.free)} are free at {_checkpoint_folder(cfg)}. Make room, '
            'or keep fewer of them: default_hooks.checkpoint.max_keep_ckpts=2.'
        )
    timing = stopwatch.timing(1 + loaded_ahead)
    seconds = {'training': timing.seconds * left.iterations}
    if 'val' in lengths:
        batches = math.ceil(
            lengths['val'] / (layout.world_size * cfg.val_dataloader.batch_size)
        )
        seconds['evaluation'] = watch.val_seconds() * batches * left.evaluations
    return _report(cfg, layout, size, memory, timing, seconds, disk)


# The folder of the rehearsal.


class _Scratch:
    """A folder in the work_dir that all processes use, and nobody finds afterwards."""

    def __init__(self, layout: launch.Processes) -> None:
        self._layout = layout
        self._path: Optional[Path] = None
        self._missing: List[Path] = []

    def make(self, work_dir: str) -> str:
        """Make the folder, and the work_dir if need be."""
        made: List[Any] = [None, [], None]
        if self._layout.rank == 0:
            made = list(self._make(Path(work_dir).absolute()))
        broadcast_object_list(made)
        self._path, self._missing, error = made
        if error:
            raise CheckError(f'the work_dir cannot be written to: {error}')
        return str(self._path)

    @staticmethod
    def _make(
        work_dir: Path,
    ) -> Tuple[Optional[Path], List[Path], Optional[str]]:
        missing: List[Path] = []
        try:
            # Deepest first, as they are to be removed.
            missing = [p for p in (work_dir, *work_dir.parents) if not p.exists()]
            work_dir.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix='check-', dir=work_dir)), missing, None
        except OSError as error:
            return None, missing, str(error)

    def claim(self) -> bool:
        """True for one process, which is to speak, of those that share the folder."""
        if self._path is None:
            return self._layout.local_rank == 0
        claimed = self._path.with_name(f'{self._path.name}-failed')
        try:
            self._path.rename(claimed)
        except OSError:
            return False
        self._path = claimed
        return True

    def remove(self) -> None:
        """Remove the folder, and the folders above it that were made for it."""
        if self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)
        for folder in self._missing:
            with suppress(OSError):
                folder.rmdir()


# The largest batch.


def pin_scales(config: Any) -> None:
    """Let every random resize of a data set's config take its largest scale.

    Args:
        config (dict | list): A data set's config or a pipeline; changed in place.
    """
    if isinstance(config, dict):
        kind = str(config.get('type', '')).rpartition('.')[2]
        if kind == 'RandomChoiceResize':
            config['scales'] = [max(config['scales'], key=_area)]
        elif kind == 'RandomResize':
            config['scale'] = _largest_random_scale(**config)
            config['ratio_range'] = (1.0, 1.0)
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for value in config:
            pin_scales(value)


def _area(scale: Any) -> int:
    return math.prod(scale) if isinstance(scale, (list, tuple)) else scale**2


def _largest_random_scale(
    scale: Any, ratio_range: Optional[Tuple[float, float]] = None, **_: Any
) -> Tuple[int, int]:
    if isinstance(scale[0], (list, tuple)):
        # A range of scales: long and short side are drawn independently.
        return max(map(max, scale)), max(map(min, scale))
    return tuple(int(side * max(ratio_range)) for side in scale)


def largest_size(
    dataset: Any, batch_size: int, config: dict
) -> Optional[Tuple[int, int]]:
    """Find the largest padded size (W, H) of a batch, and let all images have it.

    The images of a batch are padded to the longest sides among them, so a broad and a
    tall one make it larger than either.

    Args:
        dataset (Dataset): Training data with pinned scales.
        batch_size (int): Images of a batch.
        config (dict): The config that the data set was built from. If the images
            differ in size, it gets a resize in front of its packing; changed in place.

    Returns:
        tuple[int, int] | None: Width and height in pixels; None for samples that are
        no single image.
    """
    sizes = set()
    for index in _probed(dataset):
        inputs = dataset[index]['inputs']
        if not isinstance(inputs, torch.Tensor) or inputs.dim() != 3:
            return None
        sizes.add((inputs.shape[2], inputs.shape[1]))
    # All processes: each has drawn its own random numbers.
    sizes = set().union(*all_gather_object(sizes))
    if batch_size == 1:
        size = max(sizes, key=_area)
    else:
        size = tuple(map(max, zip(*sizes)))
    if len(sizes) > 1:
        _resize_before_packing(config, size)
    return size


def _probed(dataset: Any) -> List[int]:
    """Indices all over the data set, and the broadest and the tallest image."""
    step = math.ceil(len(dataset) / PROBED_IMAGES)
    indices = set(range(0, len(dataset), step))
    infos = getattr(dataset, 'get_data_info', None)
    if infos is not None and {'width', 'height'} <= set(infos(0)):
        ratios = []
        for index in range(len(dataset)):
            info = infos(index)
            ratios.append(info['width'] / info['height'])
        indices |= {ratios.index(max(ratios)), ratios.index(min(ratios))}
    return sorted(indices)


def _resize_before_packing(config: Any, size: Tuple[int, int]) -> None:
    if isinstance(config, dict):
        config = list(config.values())
    if not isinstance(config, (list, tuple)):
        return
    for position, value in enumerate(config):
        if isinstance(value, dict) and str(value.get('type')).startswith('Pack'):
            config.insert(position, dict(type='Resize', scale=size, keep_ratio=False))
            return
        _resize_before_packing(value, size)


# The two runs.


def _start(cfg: Config) -> Start:
    """What a run that resumes goes on from."""
    if not cfg.get('resume'):
        return Start()
    path = cfg.get('load_from') or newest_checkpoint(cfg.work_dir)
    if path is None:
        return Start()
    checkpoint = CheckpointLoader.load_checkpoint(str(path), map_location='cpu')
    require_resumable(checkpoint, path)
    meta = checkpoint['meta']
    return Start(str(path), meta['epoch'], meta['iter'])


def _derived(cfg: Config, folder: str) -> Config:
    """A copy of the config that writes into the folder alone, and is quiet."""
    cfg = copy.deepcopy(cfg)
    cfg.work_dir = folder
    cfg.log_level = logging.ERROR
    # Names of global objects: those of another run in this process are not to be met.
    cfg.experiment_name = f'{Path(folder).name}-{time.monotonic_ns()}'
    if cfg.get('visualizer'):
        cfg.visualizer.pop('name', None)
        cfg.visualizer.vis_backends = [dict(type='LocalVisBackend')]
    hooks = cfg.get('default_hooks') or {}
    for name, hook in hooks.items():
        if hook and 'out_dir' in hook:
            hook.pop('out_dir')
        if hook and kind_of(hook) == 'StopOnInvalidLossHook':
            # It would leave the batch in the folder, which goes.
            hooks[name] = dict(type='NoHook')
    for evaluator in as_list(cfg.get('val_evaluator')):
        for key in {'outfile_prefix', 'output_dir', 'out_file_path'} & set(evaluator):
            evaluator[key] = str(Path(folder) / Path(evaluator[key] or key).name)
    return cfg


def _short_run(
    cfg: Config, folder: str, start: Start, lengths: Dict[str, int], world_size: int
) -> Config:
    """Two updates, a checkpoint, and an evaluation of a few images."""
    cfg = _derived(cfg, folder)
    if start.checkpoint:
        cfg.load_from = start.checkpoint
    accumulated = cfg.optim_wrapper.get('accumulative_counts', 1)
    players = world_size * cfg.train_cfg.get('micro_batches', 1)
    _shorten(cfg.train_dataloader, UPDATES * accumulated, lengths['train'], players)
    if 'val' in lengths:
        _shorten(cfg.val_dataloader, EVALUATED_BATCHES, lengths['val'], world_size)
    loop = cfg.train_cfg
    loop.pop('dynamic_intervals', None)
    loop.val_begin = 1
    if 'max_epochs' in loop:
        loop.max_epochs = start.epoch + 1
        loop.val_interval = 1
    else:
        loop.max_iters = start.iteration + UPDATES * accumulated
        loop.val_interval = loop.max_iters
    checkpoint = default_hook(cfg, 'checkpoint')
    if checkpoint:
        checkpoint.update(interval=1, save_begin=0, save_last=True)
    # A detector that has learnt nothing yet would have no detections to evaluate.
    _replace(cfg.model.get('test_cfg'), 'score_thr', 0.0)
    return cfg


def _resumed_run(
    cfg: Config, folder: str, start: Start, saved: Optional[str]
) -> Config:
    """The run as it is, from the checkpoint of the short one and without evaluation."""
    cfg = _derived(cfg, folder)
    cfg.resume = saved is not None
    cfg.load_from = None
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    loop = cfg.train_cfg
    if 'max_epochs' in loop:
        loop.max_epochs = max(loop.max_epochs, start.epoch + 2)
    else:
        loop.max_iters = max(loop.max_iters, start.iteration + 2 * UPDATES)
    return cfg


def _shorten(loader: dict, batches: int, length: int, processes: int) -> None:
    """Let a data loader take a number of batches, where there are that many."""
    batches = min(batches, length // (loader['batch_size'] * processes))
    if batches:
        loader['num_batch_per_epoch'] = batches


def _replace(config: Any, key: str, value: Any) -> None:
    if not isinstance(config, dict):
        return
    if key in config:
        config[key] = value
    for child in config.values():
        _replace(child, key, value)


def _train(cfg: Config, hook: Hook, stage: _Stage) -> Any:
    """Build the runner of a config and train, until the end or until it is enough."""
    stage.name = 'building the model, the data loaders and the metric'
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    runner.register_hook(hook)
    try:
        runner.train()
    except _EnoughError:
        pass
    return runner


def _release(runner: Any) -> None:
    """Close the log files, and free the model and the workers."""
    for handler in runner.logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.close()
    runner.hooks.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _filled(dataset: Any) -> Any:
    if hasattr(dataset, 'full_init'):
        dataset.full_init()
    if not len(dataset):
        raise CheckError('the data set is empty')
    return dataset


class _EnoughError(Exception):
    """Ends a run that has been timed for long enough."""


class _WatchHook(Hook):
    """Follows the first run: its stages, its losses, and the time of evaluation."""

    # Before CheckpointHook, which is VERY_LOW.
    priority = 'LOW'

    def __init__(self, stage: _Stage) -> None:
        self._stage = stage
        self._marks: List[float] = []

    def before_train(self, runner) -> None:
        self._stage.name = 'training at the largest scale'
        # Of a resumed run: CheckpointHook would delete the best one for a better one.
        known = runner.message_hub.runtime_info
        for key in [key for key in known if key.startswith(('best_', 'keep_ckpt'))]:
            known.pop(key)

    def after_train_iter(
        self,
        runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Optional[dict] = None,
    ) -> None:
        loss = (outputs or {}).get('loss')
        if loss is not None and not torch.as_tensor(loss).isfinite().all():
            raise CheckError(f'the loss is {float(loss)} at iteration {runner.iter}')
        if self.is_last_train_iter(runner):
            self._stage.name = 'saving a checkpoint'

    def after_train_epoch(self, runner) -> None:
        self._stage.name = 'saving a checkpoint'

    def before_val_epoch(self, runner) -> None:
        self._stage.name = 'evaluating'
        self._marks = [time.perf_counter()]

    def after_val_iter(self, runner, *args: Any, **kwargs: Any) -> None:
        self._marks.append(time.perf_counter())

    def after_val_epoch(self, runner, metrics: Optional[dict] = None) -> None:
        self._stage.name = 'saving the best checkpoint'

    def val_seconds(self) -> float:
        """Seconds of an evaluated batch; the first, which is slower, if it is alone."""
        seconds = [end - start for start, end in zip(self._marks, self._marks[1:])]
        return _mean(seconds[1:] or seconds)


class _StopwatchHook(Hook):
    """Times the iterations of the second run, and ends it.

    Args:
        iterations (int): Number of iterations after which it is enough.
        stage (_Stage): What is being done.
    """

    priority = 'LOWEST'

    def __init__(self, iterations: int, stage: _Stage) -> None:
        self._iterations = iterations
        self._stage = stage
        self._waits: List[float] = []
        self._steps: List[float] = []

    def before_run(self, runner) -> None:
        self._stage.name = 'resuming from the checkpoint that was saved'

    def before_train(self, runner) -> None:
        if is_resumed(runner) and runner.iter == 0:
            raise CheckError(
                'this process found no checkpoint to resume. Processes on several '
                'machines need a work_dir that all of them share'
            )
        self._stage.name = 'training after resuming'
        self._begin = time.perf_counter()

    def before_train_epoch(self, runner) -> None:
        self._mark = time.perf_counter()

    def before_train_iter(self, runner, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self._waits.append(now - self._mark)
        self._mark = now

    def after_train_iter(self, runner, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self._steps.append(now - self._mark)
        self._mark = now
        late = now - self._begin > TIMED_SECONDS and len(self._steps) > 1
        enough = [late or len(self._steps) >= self._iterations]
        # The processes have to stop at the same iteration.
        broadcast_object_list(enough)
        if enough[0]:
            raise _EnoughError

    def timing(self, skip: int) -> Timing:
        """Of the iterations behind the first ``skip``, or of what there is."""
        if len(self._steps) <= skip:
            skip = min(1, len(self._steps) - 1)
        wait, step = _mean(self._waits[skip:]), _mean(self._steps[skip:])
        # The slowest process keeps the others waiting.
        wait = max(all_gather_object(wait))
        seconds = max(max(all_gather_object(wait + step)), 1e-9)
        return Timing(seconds, min(1.0, wait / seconds))


def _mean(values: List[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _loaded_ahead(cfg: Config) -> int:
    """Iterations whose batches a data loader holds ready, PyTorch's default of two."""
    loader = cfg.train_dataloader
    return loader.get('num_workers', 0) * (loader.get('prefetch_factor') or 2)


# The whole run.


class Remaining:
    """How much of the run is left.

    Args:
        cfg (Config): The run's config.
        start (Start): Where it starts from.
        epoch_length (int): Iterations of an epoch.
    """

    def __init__(self, cfg: Config, start: Start, epoch_length: int) -> None:
        loop = cfg.train_cfg
        self.by_epoch = 'max_epochs' in loop
        self.epoch_length = epoch_length
        total = loop.max_epochs * epoch_length if self.by_epoch else loop.max_iters
        self.start, self.end = start.iteration, max(total, start.iteration)
        self.iterations = self.end - self.start
        interval = loop.get('val_interval', 1 if self.by_epoch else 1000)
        self.evaluations = self.times(interval, self.by_epoch, last=True)

    def times(self, interval: int, by_epoch: bool, last: bool, begin: int = 0) -> int:
        """How often something happens that is done every ``interval``."""
        unit = self.epoch_length if by_epoch and self.by_epoch else 1
        if by_epoch and not self.by_epoch:
            # An iteration-based run is one epoch to MMEngine.
            return int(last or interval == 1)
        start, end = self.start // unit, self.end // unit
        if interval < 1:
            return int(last and end > start)
        done = [n for n in range(interval, end + 1, interval) if n > max(start, begin)]
        return len(done) + int(last and end > start and end % interval != 0)


def _disk(cfg: Config, folder: str, left: Remaining) -> Optional[Disk]:
    """What the checkpoints will take; None if none are saved, or not on a disk."""
    hook = default_hook(cfg, 'checkpoint')
    target = _checkpoint_folder(cfg)
    if not hook or '://' in str(target):
        return None
    saved = find_latest_checkpoint(folder)
    if saved is None:
        return None
    size = _bytes(Path(saved))
    count = left.times(
        hook.get('interval', -1),
        hook.get('by_epoch', True),
        hook.get('save_last', True),
        hook.get('save_begin', 0),
    )
    if hook.get('max_keep_ckpts', -1) > 0:
        count = min(count, hook['max_keep_ckpts'])
    account = f'{count} x {_gib(size)}'
    needed = count * size
    best = len(as_list(hook.get('save_best')))
    if best:
        sizes = map(_bytes, Path(folder).glob('best_*'))
        best_size = max(sizes, default=size)
        account += f' + best {best} x {_gib(best_size)}'
        needed += best * best_size
    existing = next(p for p in (target, *target.parents) if p.exists())
    return Disk(needed, shutil.disk_usage(existing).free, account)


def _checkpoint_folder(cfg: Config) -> Path:
    hook = default_hook(cfg, 'checkpoint')
    return Path(hook.get('out_dir') or cfg.work_dir)


def _bytes(path: Path) -> int:
    """Size of a checkpoint; those of sharded models are folders."""
    files = path.rglob('*') if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _peak_memory() -> int:
    """Bytes: on the GPU, of tensors; on the CPU, of the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024


# What the user reads.


def _report(
    cfg: Config,
    layout: launch.Processes,
    size: Optional[Tuple[int, int]],
    memory: int,
    timing: Timing,
    seconds: Dict[str, float],
    disk: Optional[Disk],
) -> str:
    batch = cfg.train_dataloader.batch_size
    images = f'{batch} images' + (f' of {size[0]} x {size[1]} pixels' if size else '')
    accumulated = accumulated_batches(cfg)
    if accumulated > 1:
        images += f', {accumulated} times for an update'
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        peak = f'{_gib(memory)} of {_gib(total)} of a GPU, by tensors'
    else:
        peak = f'{_gib(memory)} resident set of a process, without its data workers'
    workers = cfg.train_dataloader.get('num_workers', 0)
    parts = ', '.join(f'{part} {_duration(value)}' for part, value in seconds.items())
    rows = {
        'processes': str(layout.world_size),
        'largest batch': f'{images}, on each process',
        'peak memory': f'{peak}, the largest of all processes',
        'iteration': f'{timing.seconds:.3g} s',
        'data loading': f'{timing.data_share:.0%} of it, waiting for {workers} workers',
        'time to the end': f'{_duration(sum(seconds.values()))} ({parts}): a rough '
        "estimate, without the metric's own computation",
    }
    if timing.data_share > 0.2:
        rows['data loading'] += '; more train_dataloader.num_workers would help'
    if disk is not None:
        rows['checkpoints'] = (
            f'{_gib(disk.needed)} ({disk.account}), {_gib(disk.free)} free'
        )
    return '\n'.join(f'  {name:<16} {text}' for name, text in rows.items())


def _gib(size: int) -> str:
    return f'{size / 2**30:.3g} GiB'


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _print_cause(stage: _Stage, error: Exception) -> None:
    cause = str(error) if isinstance(error, CheckError) else _named(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        cause = f'out of GPU memory. {_MEMORY_ADVICE} ({error})'
    elif not isinstance(error, (CheckError, OSError)):
        traceback.print_exception(type(error), error, error.__traceback__)
    print(f'Error: check failed while {stage.name}: {cause}', file=sys.stderr,
          flush=True)  # fmt: skip


def _named(error: Exception) -> str:
    return f'{type(error).__name__}: {error}'
