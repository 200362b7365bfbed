# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Finds mistakes in a config before anything is built from it.

It knows the keys that MMEngine's runner reads itself (:mod:`.runner_keys`), the
arguments of MLLA, the channels between the backbone and the next part, the classes, and
wrappers of data sets. An error is sure to be one: backbones, necks and data sets of
other packages are not checked. MMEngine names types that are not registered, but for
those of the runner and the optimizer.
"""

import inspect
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import (
    DATASETS,
    METRICS,
    MODELS,
    OPTIMIZERS,
    RUNNERS,
    TRANSFORMS,
    DefaultScope,
    Registry,
)

from ..compat.mmcv_ext import is_stand_in
from ..engine.arguments import unknown_arguments
from ..engine.parts import (
    SPLITS,
    as_list,
    data_pipelines,
    datasets_of,
    kind_of,
    parts_of,
    paths_of,
    wrapping_datasets,
)
from ..reproducible.loops import require_seeded
from .classes import check_classes
from .kinds import class_of, is_kind, is_known
from .outputs import check_outputs
from .runner_keys import check_runner_keys

# Transforms of mmdet that mix images and boxes alone.
_WITHOUT_MASKS = ('Mosaic', 'MixUp')
# Heads that pool maps to several sizes with AdaptiveAvgPool2d.
_POOLING_HEADS = ('PSPHead', 'UPerHead', 'APCHead')


def check_config(cfg: Config, splits: Sequence[str] = SPLITS) -> None:
    """Look for mistakes in the config of a run.

    Args:
        cfg (Config): The config, whose ``custom_imports`` have been imported.
        splits (Sequence[str]): The splits whose data the run reads. Defaults to
            ('train', 'val', 'test').

    Raises:
        ValueError: Names the key of the first mistake, and what is right.
    """
    check_runner_keys(cfg, splits)
    model = cfg.get('model')
    wrapper = cfg.get('optim_wrapper') or {}
    optimizer = (wrapper.get('optimizer') or {}).get('type')
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        _require_registered(cfg.get('runner_type'), RUNNERS, 'runner_type')
        _require_registered(optimizer, OPTIMIZERS, 'optim_wrapper.optimizer.type')
        if isinstance(model, Mapping):
            # Test-time augmentation wraps the model.
            model = model.get('module', model)
            _check_init(model)
            check_outputs(model)
        for split in splits:
            _check_wrappers(cfg.get(f'{split}_dataloader'), f'{split}_dataloader')
            _check_ann_file(cfg, split)
        if isinstance(model, Mapping):
            check_classes(model, cfg, splits)


def _check_init(model: Any) -> None:
    """Whether an initialization of MLLA has a type, without which MMEngine fails.

    Backbones of other packages may read an ``init_cfg`` of another form.
    """
    for path, part in paths_of({'model': model}):
        init = part.get('init_cfg') if isinstance(part, Mapping) else None
        if isinstance(init, Mapping) and init and not init.get('type'):
            kind = class_of(MODELS, part.get('type'))
            if getattr(kind, '__module__', '').startswith('mlla_mm.'):
                key = '.'.join((*path, 'init_cfg'))
                raise ValueError(
                    f'{key} has no type: add {key}.type=Pretrained for weights of a '
                    'checkpoint.'
                )


def check_loop(cfg: Config) -> None:
    """Look for what a config expects of a training loop that does not do it.

    Args:
        cfg (Config): The config of a training run.

    Raises:
        ValueError: Names the key, and the way out.
    """
    if cfg.get('skip_corrupt_images'):
        raise ValueError(
            'skip_corrupt_images is an argument of the training loop: write '
            'train_cfg = dict(skip_corrupt_images=True) in its place.'
        )
    wrapper = kind_of(cfg.optim_wrapper)
    if wrapper == 'AmpOptimWrapper' and get_device() in ('cpu', 'mps'):
        raise ValueError(
            'optim_wrapper.type is AmpOptimWrapper, which needs a GPU, and PyTorch '
            'finds none. To train on the CPU, write in the config '
            "optim_wrapper = dict(_delete_=True, type='OptimWrapper', ...)."
        )
    _check_erasing(cfg)
    for name in ('skip_corrupt_images', 'micro_batches', 'running_statistics'):
        if name in cfg.train_cfg:
            require_seeded(cfg.train_cfg, f'train_cfg.{name}')
    sampler = cfg.train_dataloader.get('sampler')
    if isinstance(sampler, dict) and kind_of(sampler) == 'SharedSampler':
        raise ValueError(
            'mlla_mm 0.1 wrote this config into a work_dir, with changes to data and '
            'sampler for its loop. Train with the config that the run started from.'
        )
    if torch.cuda.is_available() and (cfg.get('randomness') or {}).get('deterministic'):
        calls = dict.fromkeys(_nondeterministic(cfg))
        if calls:
            raise ValueError(
                f'randomness.deterministic is True, but {"; ".join(calls)}. On CUDA '
                'this is not deterministic, and PyTorch would raise an error. Set '
                'randomness.deterministic=False. Runs of one seed then differ by '
                'rounding alone, at first.'
            )


def _check_erasing(cfg: Config) -> None:
    """Whether the model fills the boxes that the pipeline draws."""
    steps = [
        kind_of(part)
        for _, pipeline in data_pipelines(cfg.train_dataloader)
        for part in parts_of(pipeline)
    ]
    if 'DrawErasing' not in steps:
        return
    from ..models.classifiers import ErasingDataPreprocessor

    preprocessor = cfg.model.get('data_preprocessor') or {}
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        if not is_kind(MODELS, preprocessor, ErasingDataPreprocessor):
            kind = preprocessor.get('type')
            raise ValueError(
                'The training pipeline has DrawErasing, but model.data_preprocessor '
                f'({kind or "the default"}) does not erase. Write model.'
                "data_preprocessor.type='mlla_mm.models.classifiers."
                "ErasingDataPreprocessor', or take DrawErasing out."
            )


def _nondeterministic(cfg: Config) -> Iterator[str]:
    """What PyTorch refuses in a deterministic training on CUDA, of our three tasks.

    By the documentation of PyTorch 2.1 to 2.13 and the kernels of torchvision; it was
    not run. PyTorch itself refuses whatever is not known here.
    """
    for part in parts_of(cfg.get('model')):
        kind = kind_of(part)
        sizes = part.get('pool_scales', (1, 2, 3, 6))
        # A pool of size 1 is a mean, which is deterministic.
        if kind in _POOLING_HEADS and any(size != 1 for size in sizes):
            yield f'{kind} has gradients of AdaptiveAvgPool2d'
        # PyTorch does not know of compiled mmcv's, which is not deterministic either.
        # torchvision's RoIAlign in Python is.
        if kind == 'RoIAlign' and is_stand_in() and not part.get('use_torchvision'):
            yield "RoIAlign has gradients of torchvision's kernel"
    metrics = parts_of(cfg.get('val_evaluator')) if cfg.get('val_cfg') else ()
    if 'IoUMetric' in map(kind_of, metrics):
        yield 'IoUMetric calls torch.histc'


def make_work_dir(cfg: Config) -> None:
    """Make the folder of a run, and see whether it can be written to.

    Args:
        cfg (Config): The config of the run.

    Raises:
        ValueError: If the folder cannot be written to, or if MMEngine, which copies the
            config there, would write elsewhere through a link.
    """
    try:
        Path(cfg.work_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cfg.work_dir):
            pass
    except OSError as error:
        raise ValueError(
            f'The work_dir cannot be written to: {error}. Choose one with --work-dir.'
        ) from error
    if not cfg.filename:
        return
    copy = Path(cfg.work_dir, Path(cfg.filename).name)
    if copy.is_symlink() or (copy.exists() and not copy.is_file()):
        raise ValueError(
            f'{copy} is a link, folder or pipe, but MMEngine copies the config there. '
            'Remove it, or choose another folder with --work-dir.'
        )


def _require_registered(kind: Any, registry: Registry, key: str) -> None:
    """Name an unknown type, where MMEngine does not (as it does for all others)."""
    if kind is not None and class_of(registry, kind) is None:
        raise ValueError(
            f"{key} is '{kind}', which is not registered. Name the module that "
            'registers it in custom_imports.'
        )


# Data sets of data sets.


def _check_wrappers(loader: Any, name: str) -> None:
    """Whether wrappers have arguments of others, and can mix what they are to mix."""
    for key, wrapper in wrapping_datasets(loader):
        kind = class_of(DATASETS, wrapper.get('type'))
        given = {k: v for k, v in wrapper.items() if k not in ('type', '_scope_')}
        unknown = unknown_arguments(kind, given) if inspect.isclass(kind) else []
        if unknown:
            raise ValueError(
                f'{name}.{key} has {unknown[0]}, which is not an argument of '
                f'{kind.__name__}: give it to the data set in it. If it is of a base '
                'config, add _delete_=True.'
            )
    for key, steps in data_pipelines(loader):
        masks = any(part.get('with_mask') for part in parts_of(steps))
        for part in parts_of(steps) if masks else ():
            kind = kind_of(part)
            module = getattr(class_of(TRANSFORMS, part.get('type')), '__module__', '')
            if kind in _WITHOUT_MASKS and module.startswith('mmdet.'):
                raise ValueError(
                    f"{name}.{key}: mmdet's {kind} leaves masks where they were. Use "
                    f'Cached{kind}, or load no masks and train without a mask_head.'
                )


def _check_ann_file(cfg: Config, split: str) -> None:
    """Whether a metric has the annotations of all images that it is given."""
    leaves = datasets_of(cfg, split)
    roots = [str(x.get('data_root') or '') for _, x in leaves]
    files = [str(x.get('ann_file') or '') for _, x in leaves]
    paths = list(map(os.path.normpath, map(os.path.join, roots, files)))
    for metric in as_list(cfg.get(f'{split}_evaluator')):
        known = isinstance(metric, Mapping) and is_known(METRICS, metric)
        path = metric.get('ann_file') if known else None
        others = [key for (key, _), x in zip(leaves, paths) if x != paths[0]]
        if others and path and os.path.normpath(str(path)) in paths:
            raise ValueError(
                f'{split}_evaluator.ann_file has the annotations of one data set, but '
                f'{leaves[0][0]} and {others[0]} have two. Evaluate with a metric for '
                f"each: {split}_evaluator = dict(type='MultiDatasetsEvaluator', "
                'metrics=[...], dataset_prefixes=[...]).'
            )
