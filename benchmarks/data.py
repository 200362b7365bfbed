# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""How fast a config's data are loaded, step by step, by a worker and by all workers."""

import argparse
import copy
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from mmengine.utils.dl_utils import set_multi_processing
from torch import nn

from mlla_mm.datasets.corrupt_images import CheckedDataset
from mlla_mm.datasets.speed import READING, spread_indices, time_samples, timed_steps
from mlla_mm.engine.arguments import named_arguments
from mlla_mm.engine.parts import batch_size_of, require_parts
from mlla_mm.evaluation.markdown import markdown_table
from mlla_mm.reproducible.seeding import seed_generators

from . import pretended_cuda, roofline
from .meter import Meter, format_settings
from .pictures import write_pictures
from .timm_pipeline import TimmDataset

_ALL = 'all'


class Measured(NamedTuple):
    """What was measured of a config's data.

    Attributes:
        config (str): The config.
        phase (str): 'train' or 'val'.
        images (int): Images of a round.
        milliseconds (float): Of one image on one core, of the fastest round of each.
        steps (dict[str, float]): Milliseconds of one image by step, see
            :func:`mlla_mm.datasets.speed.timed_steps`.
        timm (float, optional): Milliseconds of one image by the authors' transforms.
        workers (int): Workers of the config's data loader.
        cores (int): Cores of the CPU that this process may use.
        loader (float, optional): Images a second of the data loader.
        batch (int): Images of a batch of the data loader.
        preprocessor (float, optional): Milliseconds of one image in the model's data
            preprocessor, on the device.
        counted (dict, optional): What it does with a batch on an NVIDIA GPU, counted:
            the fields of :class:`.roofline.Total`.
    """

    config: str
    phase: str
    images: int
    milliseconds: float
    steps: Dict[str, float]
    timm: Optional[float]
    workers: int
    cores: int
    loader: Optional[float] = None
    batch: int = 1
    preprocessor: Optional[float] = None
    counted: Optional[Dict[str, float]] = None

    @property
    def rate(self) -> float:
        """Images a second of one core."""
        return 1000 / self.milliseconds


def run(args: argparse.Namespace) -> None:
    """Measure as the command line says; print and save the results.

    Args:
        args (argparse.Namespace): The arguments of
            ``tools/analysis_tools/data_speed.py``.

    Raises:
        ValueError: If an argument does not fit the config, or a package is missing.
    """
    from mlla_mm.engine.config_files import read_config

    for name in ('images', 'repeats', 'seconds', 'model_speed'):
        value = getattr(args, name)
        if value is not None and value <= 0:
            option = name.replace('_', '-')
            raise ValueError(f'--{option} must be positive, got {value:g}.')
    meter = Meter(args.device, args.repeats)
    cfg = read_config(args.config, args.cfg_options)
    require_parts(cfg, f'{args.phase}_dataloader', 'model', user='The measurement')
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    set_multi_processing(**(cfg.get('env_cfg') or {}).get('mp_cfg', {}))
    with ExitStack() as stack:
        loader = cfg[f'{args.phase}_dataloader']
        if args.synthetic:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            loader.dataset = write_pictures(
                loader.dataset, cfg.default_scope, Path(folder), args.images
            )
        stack.enter_context(named_arguments(cfg))
        measured = measure(cfg, args, meter)
    settings = {**meter.describe(), 'synthetic': args.synthetic}
    text = format_measured(measured, args.model_speed)
    print(f'{format_settings(settings)}\n\n{text}')
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    record = {**settings, **measured._asdict(), 'images_per_second': measured.rate}
    (out / 'data_speed.json').write_text(json.dumps(record, indent=2))


def measure(cfg: Config, args: argparse.Namespace, meter: Meter) -> Measured:
    """Measure the data of a phase, and the data preprocessor for them."""
    loader = cfg[f'{args.phase}_dataloader']
    dataset = CheckedDataset(copy.deepcopy(loader.dataset))
    if not len(dataset):
        raise ValueError(f'{args.phase}_dataloader has no images.')
    indices = spread_indices(len(dataset), args.images)[: args.images]
    theirs = None
    if args.against:
        if cfg.default_scope != 'mmpretrain':
            raise ValueError(
                f'--against {args.against} is for classification, and the '
                f'default_scope of {cfg.filename} is {cfg.default_scope!r}.'
            )
        side = dataset[0]['inputs'].shape[-1]
        theirs = TimmDataset(dataset, side, is_training=args.phase == 'train')
    totals, of_steps, of_timm = [], [], []
    for i in range(args.repeats + 1):
        # The first round imports, and reads files that are not in memory yet.
        last = _round(dataset, indices)
        with timed_steps(dataset) as seconds:
            parts = _round(dataset, indices, seconds)
        timm = [] if theirs is None else _round(theirs, indices)
        if i > 0:
            totals.append(last)
            of_steps.append(parts)
            of_timm.append(timm)
    fastest = _fastest(of_steps)
    steps = {name: value for name, value in fastest.items() if name != _ALL}
    cores = len(os.sched_getaffinity(0))
    measured = Measured(
        config=str(cfg.filename),
        phase=args.phase,
        images=len(indices),
        milliseconds=_fastest(totals)[_ALL],
        steps=steps,
        timm=_fastest(of_timm)[_ALL] if theirs is not None else None,
        workers=loader.get('num_workers', 0),
        cores=cores,
    )
    length = len(dataset)
    del dataset  # its annotations may be large, and the loader has its own
    rate = measured.rate * max(1, min(measured.workers, cores))
    found, batch = load(loader, length, args.seconds, rate)
    is_training = args.phase == 'train'
    # The model gives it what belongs to a batch, such as Mixup.
    preprocessor = MODELS.build(cfg.model).data_preprocessor
    counted = None
    if pretended_cuda.AVAILABLE:
        total = count_preprocessor(copy.deepcopy(preprocessor), batch, is_training)
        counted = total._asdict()
    preprocess = preprocessor_milliseconds(preprocessor, batch, meter, is_training)
    return measured._replace(
        loader=found,
        batch=len(batch['inputs']),
        preprocessor=preprocess,
        counted=counted,
    )


def _round(
    dataset: Any, indices: Sequence[int], seconds: Optional[Dict[str, float]] = None
) -> List[Dict[str, float]]:
    """Seconds of each image by step, always with the same random numbers.

    Other draws would be easier in some rounds than in others.

    Args:
        dataset (Dataset): The data set.
        indices (Sequence[int]): The images.
        seconds (dict[str, float], optional): What :func:`timed_steps` adds up.
            Defaults to None: the whole alone, under :data:`_ALL`.
    """
    seed_generators(0)
    found = []
    steps = {} if seconds is None else seconds
    for index in indices:
        steps.clear()
        whole = time_samples(dataset, [index]).seconds
        found.append({**steps, _ALL: whole})
    return found


def _fastest(rounds: Sequence[Sequence[Dict[str, float]]]) -> Dict[str, float]:
    """Mean milliseconds of an image by step, of the fastest round of each image.

    Other programs slow down some images of every round, but hardly one in all rounds.
    """
    names = {name: None for images in rounds for image in images for name in image}

    def mean(name: str) -> float:
        fastest = (min(x.get(name, 0.0) for x in alike) for alike in zip(*rounds))
        return 1000 * statistics.fmean(fastest)

    return {name: mean(name) for name in names}


def load(
    loader_cfg: Mapping, length: int, seconds: float, rate: float
) -> Tuple[float, Any]:
    """Load batches with all workers of a data loader.

    What the workers have loaded in advance when the first batch comes is not counted,
    and as many batches of each worker are.

    Args:
        loader_cfg (Mapping): The config of the data loader.
        length (int): Images of its data set.
        seconds (float): About how long to load.
        rate (float): Images a second to expect.

    Returns:
        tuple[float, Any]: Images a second, and the last batch.
    """
    config = copy.deepcopy(dict(loader_cfg))
    workers, size = config.get('num_workers', 0), batch_size_of(config)
    cycle = max(1, workers)
    ahead = workers * (config.get('prefetch_factor') or 2)
    cycles = max(1, math.ceil(seconds * rate / (cycle * size)))
    wanted = max(1, ahead) + cycles * cycle
    # A loader that begins anew would have to fill its queue again.
    times = math.ceil((wanted + 1) * size / length)
    config['dataset'] = dict(
        type='CheckedDataset',
        dataset=dict(type='RepeatDataset', times=times, dataset=config['dataset']),
    )
    batches = iter(Runner.build_dataloader(config, seed=0))
    for _ in range(max(1, ahead)):
        batch = next(batches)
    begin = time.perf_counter()
    for _ in range(cycles * cycle):
        batch = next(batches)
    return cycles * cycle * size / (time.perf_counter() - begin), batch


def count_preprocessor(
    preprocessor: nn.Module, batch: Any, is_training: bool
) -> roofline.Total:
    """What a data preprocessor does with a batch on an NVIDIA GPU, counted without one.

    The copy to the GPU is a kernel that reads and writes the batch.
    """
    seed_generators(0)
    with roofline.counted() as counter:
        preprocessor.to('cuda')
        own = copy.deepcopy(batch)
        with counter:
            preprocessor(own, is_training)
    return roofline.add_up(counter.kernels, roofline.GPU())


def preprocessor_milliseconds(
    preprocessor: nn.Module, batch: Any, meter: Meter, is_training: bool
) -> float:
    """Milliseconds of an image in a model's data preprocessor, with the copy."""
    preprocessor.to(meter.device)
    images = len(batch['inputs'])
    # It may change a batch, so each call has one of its own.
    batches = [copy.deepcopy(batch) for _ in range(meter.repeats + 2)]

    def call() -> None:
        preprocessor(batches.pop(), is_training)

    call()
    call()
    return meter.milliseconds(call)[0] / images


def format_measured(measured: Measured, model_speed: Optional[float] = None) -> str:
    """The results as a table and some sentences.

    Args:
        measured (Measured): What was measured.
        model_speed (float, optional): Images a second of the model on one GPU.
            Defaults to None: said is what the workers can feed.
    """
    x, rate = measured, measured.rate
    total = x.milliseconds
    rows = [
        [f'- {name}, part of the step that reads' if name == READING else name,
         f'{value:.3g}', f'{value / total:.0%}']
        for name, value in sorted(x.steps.items(), key=_place)
    ]  # fmt: skip
    rows.append(['all', f'{total:.3g}', ''])
    lines = [
        f'### {x.config}, {x.phase}, {x.images} images',
        '',
        markdown_table(['Step', 'ms an image', 'share'], rows),
        '',
        f'One core: {rate:.4g} images/s.',
    ]
    if x.timm is not None:
        lines.append(
            f"The authors' transforms (timm): {1000 / x.timm:.4g} images/s; ours are "
            f'{x.timm / total:.2f}x as fast.'
        )
    if x.loader is not None:
        lines.append(
            f'{x.workers} workers on {x.cores} cores: {x.loader:.4g} images/s.'
        )
    if x.preprocessor is not None:
        lines.append(f'Data preprocessor: {x.preprocessor:.3g} ms an image.')
    if x.counted is not None:
        lines.append(
            f'On an H100, counted: {x.counted["bytes"] / 1e6 / x.batch:.3g} MB and '
            f'{1000 * x.counted["seconds"] / x.batch:.2g} ms an image at least, '
            f'{x.counted["launches"]} launches for a batch of {x.batch}.'
        )
    if model_speed:
        cores = cores_needed(model_speed, rate)
        lines.append(
            f'A GPU that takes {model_speed:.4g} images/s needs {cores} cores.'
        )
    else:
        workers = max(1, x.workers)
        lines.append(
            f'{workers} workers, each with a core, feed a GPU of at most '
            f'{workers * rate:.4g} images/s.'
        )
    return '\n'.join(lines)


def cores_needed(model_speed: float, rate: float) -> int:
    """Cores whose workers make as many images a second as a model takes."""
    return math.ceil(model_speed / rate)


def _place(item: Any) -> float:
    """Steps in their order; reading behind the first, in which it mostly is."""
    name, _ = item
    return 1.5 if name == READING else float(name.split()[0])
