# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""``tools/train.py --check``: a rehearsal finds in minutes what would end a run later.

MMEngine's own runner makes two short runs in a temporary folder:

1. Two updates on batches of the largest size, a checkpoint, an evaluation of a few
   images, the best checkpoint.
2. Some updates on the usual batches. The run resumes from that checkpoint and is timed.

The report extrapolates memory, time and disk space to the whole run.
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
from datetime import timedelta
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

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
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import find_latest_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader

from ..engine import launch
from ..engine.batch_size import accumulated_batches
from ..engine.console import build_runner
from ..engine.options import as_list, default_hook, kind_of, parts_of, set_resume
from ..reproducible.resume import require_resumable
from ..reproducible.seeding import SeededDataset

UPDATES = 2
"""Optimiser updates at the largest size."""
EVALUATED_BATCHES = 3
"""Batches that each process evaluates."""
PROBED_IMAGES = 64
"""Training images that are loaded to find the largest size."""
TIMED_ITERATIONS = 10
"""Timed iterations. They come after the batches that the workers load in advance."""
TIMED_SECONDS = 60.0
"""About the longest time for the second run; two iterations are made in any case."""


class CheckError(Exception):
    """A problem that would end the run, in words for the user."""


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
    try:
        folder = _make_folder(cfg.work_dir)
        report = _rehearse(cfg, layout, folder, watch)
        barrier()
    except Exception as error:  # any error here would end the run, too
        if _is_first_to_fail(folder, layout):
            _print_cause(watch.stage, error)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if layout.rank == 0:
        print(f'Check passed: {cfg.filename}\n{report}', flush=True)
    launch.tear_down()
    return 0


def _rehearse(
    cfg: Config, layout: launch.Processes, folder: str, watch: '_WatchHook'
) -> str:
    """Make the two runs; returns the report."""
    watch.stage = 'reading the checkpoint to resume'
    start = dict(epoch=0, iter=0)
    if cfg.get('resume'):
        checkpoint = CheckpointLoader.load_checkpoint(cfg.load_from, map_location='cpu')
        require_resumable(checkpoint, cfg.load_from)
        start = checkpoint['meta']
        del checkpoint

    init_default_scope(cfg.get('default_scope', 'mmengine'))
    watch.stage = 'reading the training data'
    pinned = copy.deepcopy(cfg.train_dataloader.dataset)
    pin_scales(pinned)
    skips = cfg.train_cfg.get('skip_corrupt_images', False)
    dataset = SeededDataset(copy.deepcopy(pinned), skips)
    processes = layout.world_size * cfg.train_cfg.get('micro_batches', 1)
    batches = _count_batches(cfg.train_dataloader, dataset, processes)
    size = largest_size(dataset, cfg.train_dataloader.batch_size, pinned)
    del dataset
    val_batches = 0
    if cfg.get('val_cfg') is not None:
        watch.stage = 'reading the validation data'
        val_dataset = DATASETS.build(copy.deepcopy(cfg.val_dataloader.dataset))
        val_batches = _count_batches(cfg.val_dataloader, val_dataset, layout.world_size)

    updates = UPDATES * cfg.optim_wrapper.get('accumulative_counts', 1)
    short = _shorten(cfg, folder, start, min(updates, batches))
    short.train_dataloader.dataset = pinned
    if val_batches:
        short.val_dataloader.num_batch_per_epoch = min(EVALUATED_BATCHES, val_batches)
    watch.training = 'training at the largest scale'
    runner = _train(short, watch)
    memory = max(all_gather_object(_peak_memory()))
    update = _mean_seconds(runner, 'train/time', 1)
    evaluation = 0.0
    if val_batches:
        evaluation = _mean_seconds(runner, 'val/time', EVALUATED_BATCHES) * val_batches
    saved = find_latest_checkpoint(folder)
    if len(set(all_gather_object(saved))) > 1:
        raise CheckError(
            'some processes do not see the checkpoint that was saved. Processes on '
            'several machines need a work_dir that all of them share'
        )
    reached = dict(epoch=0, iter=0)
    if saved:
        reached = dict(epoch=runner.epoch, iter=runner.iter)
    _release(runner)
    del runner

    workers = cfg.train_dataloader.get('num_workers', 0)
    # Batches that the workers have ready; PyTorch loads two for each by default.
    ready = workers * (cfg.train_dataloader.get('prefetch_factor') or 2)
    iterations = min(1 + ready + TIMED_ITERATIONS, int(TIMED_SECONDS / update))
    usual = _shorten(cfg, folder, reached, min(max(2, iterations), batches))
    usual.resume, usual.load_from = False, None
    set_resume(usual, 'auto')
    usual.val_cfg = usual.val_dataloader = usual.val_evaluator = None
    usual.default_hooks.checkpoint = None
    watch.training = 'training after resuming'
    runner = _train(usual, watch)
    timed = max(1, min(TIMED_ITERATIONS, runner.iter - reached['iter'] - 1))
    update = _mean_seconds(runner, 'train/time', timed)
    waiting = min(1.0, _mean_seconds(runner, 'train/data_time', timed) / update)
    _release(runner)

    watch.stage = 'adding up the checkpoints of the whole run'
    loop = cfg.train_cfg
    # An iteration-based run is one epoch to MMEngine.
    epoch = max(1, batches) if 'max_epochs' in loop else loop.max_iters
    left = max(0, loop.get('max_epochs', 1) * epoch - start['iter'])
    default, unit = (1, epoch) if 'max_epochs' in loop else (1000, 1)
    evaluation *= math.ceil(left / (loop.get('val_interval', default) * unit))
    training = update * left
    images = f'{cfg.train_dataloader.batch_size} images'
    if size:
        images += f' of {size[0]} x {size[1]} pixels'
    if accumulated_batches(cfg) > 1:
        images += f', {accumulated_batches(cfg)} times for an update'
    peak = f'{_gib(memory)} resident set of a process, without its data workers'
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        peak = f'{_gib(memory)} of {_gib(total)} of a GPU, by tensors'
    rows = {
        'processes': str(layout.world_size),
        'largest batch': f'{images}, on each process',
        'peak memory': f'{peak}, the largest of all processes',
        'iteration': f'{update:.3g} s',
        'data loading': f'{waiting:.0%} of it, waiting for {workers} workers',
        'time to the end': f'{_duration(training + evaluation)} (training '
        f'{_duration(training)}, evaluation {_duration(evaluation)}): a rough '
        "estimate, without the metric's own computation",
    }
    if waiting > 0.2:
        rows['data loading'] += '; more train_dataloader.num_workers would help'
    if saved:
        rows['checkpoints'] = _describe_disk(cfg, Path(saved), left, epoch)
    return '\n'.join(f'  {name:<16} {text}' for name, text in rows.items())


def _make_folder(work_dir: str) -> str:
    """Make a folder for all processes in the work_dir, or above if there is none."""
    made = ['']
    if is_main_process():
        made[0] = tempfile.mkdtemp(prefix='check-', dir=_existing(work_dir))
    broadcast_object_list(made)
    return made[0]


def _existing(path: str) -> Path:
    """A path, or the nearest folder above it that exists."""
    absolute = Path(path).absolute()
    return next(p for p in (absolute, *absolute.parents) if p.exists())


def _is_first_to_fail(folder: str, layout: launch.Processes) -> bool:
    """Whether this process is the one to print the cause."""
    if not folder:
        return layout.rank == 0
    try:
        Path(folder, 'failed').mkdir()
    except OSError:
        return False
    return True


def _count_batches(loader: dict, dataset: Any, processes: int) -> int:
    """Complete batches of an epoch on each process."""
    if hasattr(dataset, 'full_init'):
        dataset.full_init()
    if not len(dataset):
        raise CheckError('the data set is empty')
    complete = len(dataset) // (loader['batch_size'] * processes)
    return loader.get('num_batch_per_epoch') or complete


# The largest batch.


def pin_scales(config: Any) -> None:
    """Let every random resize of a data set's config take its largest scale.

    Args:
        config (dict | list): Config of a data set, or a pipeline; changed in place.
    """
    for part in parts_of(config):
        kind = str(kind_of(part)).rpartition('.')[2]
        if kind == 'RandomChoiceResize':
            part['scales'] = [max(part['scales'], key=_area)]
        elif kind == 'RandomResize':
            scale = part['scale']
            if isinstance(scale[0], (list, tuple)):
                # Long and short side are drawn independently, between two scales.
                part['scale'] = max(map(max, scale)), max(map(min, scale))
            else:
                ratio = max(part['ratio_range'])
                part['scale'] = tuple(int(side * ratio) for side in scale)
            part['ratio_range'] = (1.0, 1.0)


def _area(scale: Any) -> int:
    return math.prod(scale) if isinstance(scale, (list, tuple)) else scale**2


def largest_size(
    dataset: Any, batch_size: int, config: dict
) -> Optional[Tuple[int, int]]:
    """Find the largest padded size of a batch, and give this size to all images.

    A batch is padded to its longest sides. A broad and a tall image together therefore
    make a larger batch than each of them alone.

    Args:
        dataset (Dataset): Training data with pinned scales.
        batch_size (int): Images of a batch.
        config (dict): The config of the data set. If its images differ in size, it gets
            a resize before the packing; changed in place.

    Returns:
        tuple[int, int] | None: Width and height in pixels; None if a sample is not one
        image.
    """
    count = len(dataset)
    probed = set(range(0, count, math.ceil(count / PROBED_IMAGES)))
    get_info = getattr(dataset, 'get_data_info', None)
    if get_info is not None and {'width', 'height'} <= set(get_info(0)):
        infos = map(get_info, range(count))
        ratios = [info['width'] / info['height'] for info in infos]
        probed |= {ratios.index(max(ratios)), ratios.index(min(ratios))}
    found = set()
    for index in sorted(probed):
        inputs = dataset[index]['inputs']
        if not isinstance(inputs, torch.Tensor) or inputs.dim() != 3:
            return None
        found.add((inputs.shape[2], inputs.shape[1]))
    # Each process has drawn its own random numbers.
    sizes = set().union(*all_gather_object(found))
    widths, heights = zip(*sizes)
    size = max(widths), max(heights)
    if batch_size == 1:
        size = max(sizes, key=_area)
    if len(sizes) > 1:
        for part in parts_of(config):
            pipeline = part.get('pipeline') or []
            kinds = [str(kind_of(step)).rpartition('.')[2] for step in pipeline]
            packing = [i for i, kind in enumerate(kinds) if kind.startswith('Pack')]
            for i in packing[:1]:
                pipeline.insert(i, dict(type='Resize', scale=size, keep_ratio=False))
    return size


# The two runs.


def _shorten(cfg: Config, folder: str, start: Dict[str, int], batches: int) -> Config:
    """A quiet, short copy of a run that writes into the folder alone.

    Args:
        cfg (Config): The config of the whole run.
        folder (str): The folder.
        start (dict): The ``epoch`` and the ``iter`` that the short run starts from.
        batches (int): Iterations of the short run. It saves and evaluates at its end.
            0 leaves an epoch as long as it is.
    """
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
    for evaluator in as_list(cfg.get('val_evaluator')):
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
        loop.max_epochs = start['epoch'] + 1
    else:
        loop.max_iters = loop.val_interval = start['iter'] + max(1, batches)
    return cfg


def _train(cfg: Config, watch: '_WatchHook') -> Any:
    """Make one of the two runs; returns the runner."""
    watch.stage = 'building the model, the data loaders and the metric'
    runner = build_runner(cfg, verbose=True)
    runner.register_hook(watch)
    runner.train()
    return runner


def _release(runner: Any) -> None:
    """Close the log file, and free the model and the workers."""
    for handler in runner.logger.handlers:
        handler.close()
    runner.hooks.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
        # A resumed best score may be higher than any now: no best one would be saved.
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


def _mean_seconds(runner: Any, name: str, count: int) -> float:
    """Mean of the last values of MMEngine's IterTimerHook, on the slowest process."""
    values = runner.message_hub.get_scalar(name).data[0][-count:]
    return max(1e-9, *all_gather_object(float(values.mean())))


def _peak_memory() -> int:
    """Bytes: on the GPU, of tensors; on the CPU, of the whole process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024


# What the user reads.


def _describe_disk(cfg: Config, saved: Path, left: int, epoch: int) -> str:
    """The space of the checkpoints, and the free space; an error if it is too small.

    The space is the size of the ``saved`` checkpoint times how many the run keeps, if
    ``left`` iterations are left and an epoch has ``epoch``, and the best checkpoint.
    """
    hook = default_hook(cfg, 'checkpoint')
    interval = hook.get('interval', -1) * (epoch if hook.get('by_epoch', True) else 1)
    count = math.ceil(left / interval) if interval > 0 else 1
    if hook.get('max_keep_ckpts', -1) > 0:
        count = min(count, hook['max_keep_ckpts'])
    size, best = _bytes(saved), sum(map(_bytes, saved.parent.glob('best_*')))
    account = f'{count} x {_gib(size)}' + (f' + {_gib(best)}' if best else '')
    target = hook.get('out_dir') or cfg.work_dir
    if '://' in target:
        return f'{account}, at {target}'
    free = shutil.disk_usage(_existing(target)).free
    if count * size + best > free:
        raise CheckError(
            f'the checkpoints of the run take {account}, but {_gib(free)} are free at '
            f'{target}. Make room, or keep fewer of them: '
            'default_hooks.checkpoint.max_keep_ckpts=2.'
        )
    return f'{account}; {_gib(free)} free'


def _bytes(path: Path) -> int:
    """Size of a checkpoint, which is a folder if the model is sharded."""
    return sum(file.stat().st_size for file in [path, *path.rglob('*')])


def _gib(size: int) -> str:
    return f'{size / 2**30:.3g} GiB'


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _print_cause(stage: str, error: Exception) -> None:
    unregistered = launch.unregistered_type(error)
    cause = unregistered or f'{type(error).__name__}: {error}'
    if isinstance(error, CheckError):
        cause = str(error)
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
