# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Finds mistakes in what MMEngine's runner takes apart itself.

No class that would refuse a key stands behind it: hooks by name, data loaders, loops
without a type, random numbers, processes. What a class refuses is found when it is
built (:mod:`mlla_mm.engine.arguments`).
"""

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any, List

from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS, MODELS, DefaultScope
from mmengine.runner import (
    EpochBasedTrainLoop,
    IterBasedTrainLoop,
    Runner,
    TestLoop,
    ValLoop,
)
from mmengine.utils.dl_utils import set_multi_processing
from torch.utils.data import DataLoader

from ..engine.arguments import arguments_of
from ..engine.parts import (
    SPLITS,
    as_list,
    has_own_runner,
    kind_of,
    named_hooks,
    value_at,
)
from ..engine.toolboxes import TOOLBOXES
from ..utils.text import nearest, printable
from .kinds import class_of, is_kind, is_known

# Parts of a model whose types stand in the same registry as that of the model.
_OF_TOOLBOXES = ('backbone', 'neck', 'head', 'decode_head', 'bbox_head', 'rpn_head')
# The default hooks that None switches off.
_OF_MMENGINE = (
    'runtime_info timer sampler_seed logger param_scheduler checkpoint'
).split()
# Those of PyTorch, among them dataset, sampler and batch_sampler, and MMEngine's own.
_OF_LOADER = [
    *inspect.signature(DataLoader).parameters,
    *('num_batch_per_epoch', 'disable_subprocess_warning'),
]


def check_runner_keys(cfg: Config, splits: Sequence[str] = SPLITS) -> None:
    """Look for keys that MMEngine's runner does not read, and for parts it misses.

    Args:
        cfg (Config): The config, whose ``custom_imports`` have been imported.
        splits (Sequence[str]): The splits whose data the run reads. Defaults to
            ('train', 'val', 'test').

    Raises:
        ValueError: Names the key of the first mistake, and what is right.
    """
    _check_scope(cfg)
    if has_own_runner(cfg):
        return
    _check_hooks(cfg)
    _check_checkpoint_hooks(cfg)
    _check_arguments(cfg)
    _check_backends(cfg)
    check_numbers(cfg)
    _check_log_level(cfg)
    for split in splits:
        loop = cfg.get(f'{split}_cfg')
        if isinstance(loop, Mapping) and not loop.get('type'):
            _check_loop(loop, split)
        elif split == 'train' and isinstance(loop, Mapping) and 'by_epoch' in loop:
            raise ValueError(
                'train_cfg has a type and by_epoch, and MMEngine takes one. For '
                'a loop that counts iterations write in the config train_cfg = '
                "dict(_delete_=True, type='SeededIterBasedTrainLoop', max_iters=...)."
            )
        _check_loader(cfg.get(f'{split}_dataloader'), f'{split}_dataloader')


def _check_scope(cfg: Config) -> None:
    """Whether the default scope is one, and has the parts of the model."""
    scope = cfg.get('default_scope')
    model = cfg.get('model')
    if not isinstance(model, Mapping) or not (scope is None or isinstance(scope, str)):
        return
    model = model.get('module', model)
    parts = [model, *(model.get(key) for key in _OF_TOOLBOXES)]
    types = [part.get('type') for part in parts if isinstance(part, Mapping)]
    kinds = [kind for kind in types if isinstance(kind, str)]
    # MMEngine warns of a scope without a registry, and takes its own.
    lost = _not_in(scope or 'mmengine', kinds)
    if not lost:
        return  # before the other toolboxes are imported
    fitting = [x for x in sorted(TOOLBOXES - {scope}) if not _not_in(x, kinds)]
    if fitting:
        raise ValueError(
            f'default_scope is {scope!r}, where there is no {lost[0]}: write '
            f"default_scope = '{fitting[0]}'."
        )


def _not_in(scope: str, kinds: Sequence[str]) -> List[str]:
    """The types of a model's parts that a scope does not have."""
    with DefaultScope.overwrite_default_scope(scope):
        return [kind for kind in kinds if class_of(MODELS, kind) is None]


def _check_hooks(cfg: Config) -> None:
    defaults = cfg.get('default_hooks') or {}
    for name, hook in defaults.items():
        if hook is None and name not in _OF_MMENGINE:
            raise ValueError(
                f'default_hooks.{name} is None, which switches off hooks of MMEngine '
                f"alone: write default_hooks = dict({name}=dict(type='NoHook'))."
            )
        if isinstance(hook, Mapping) and not hook.get('type'):
            meant = nearest(name, {*_OF_MMENGINE, *defaults} - {name})
            hint = f' Is default_hooks.{meant} meant?' if meant else ''
            raise ValueError(
                f"default_hooks.{name} has no type, such as type='CheckpointHook'."
                f'{hint}'
            )
    custom = cfg.get('custom_hooks')
    if isinstance(custom, dict):
        raise ValueError(
            'custom_hooks is a dict, but MMEngine takes a list: write '
            f'custom_hooks = [dict(type={kind_of(custom) or "NAME"!r}, ...)].'
        )
    for i, hook in enumerate(as_list(custom)):
        if isinstance(hook, str) or (
            isinstance(hook, Mapping) and not hook.get('type')
        ):
            raise ValueError(
                f'custom_hooks.{i} is {printable(repr(hook))}, which has no type: '
                "write in the config custom_hooks = [dict(type='NAME', ...)]. "
                '--cfg-options cannot write dicts into lists.'
            )


def _check_checkpoint_hooks(cfg: Config) -> None:
    """MMEngine would refuse an unknown argument when it saves the first checkpoint."""
    saving = list(inspect.signature(Runner.save_checkpoint).parameters)
    for key, hook in named_hooks(cfg):
        # A user's own may take arguments out of **kwargs.
        if is_kind(HOOKS, hook, CheckpointHook) and is_known(HOOKS, hook):
            known = arguments_of(class_of(HOOKS, hook['type']))
            # Not self, out_dir and filename.
            _require_known(hook, key, ['type', 'priority', *known, *saving[3:]])


def _check_arguments(cfg: Config) -> None:
    """Whether dicts that MMEngine hands to functions have other keys than those."""
    modes = inspect.signature(set_multi_processing).parameters
    for path, known in (
        ('env_cfg', ('cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit')),
        ('env_cfg.mp_cfg', [name for name in modes if name != 'distributed']),
        ('randomness', list(inspect.signature(Runner.set_randomness).parameters)[1:]),
        ('auto_scale_lr', ('base_batch_size', 'enable')),
    ):
        _require_known(value_at(cfg, path), path, known)
    seeds = cfg.get('randomness')
    # FlexibleRunner draws one.
    is_needed = kind_of(dict(type=cfg.get('runner_type') or 'Runner')) == 'Runner'
    if is_needed and isinstance(seeds, Mapping) and 'seed' not in seeds:
        raise ValueError(
            'randomness has no seed, which MMEngine needs: write seed=None for one '
            'that is drawn.'
        )


def _check_backends(cfg: Config) -> None:
    """Whether the visualizer has a list of configs, or of objects."""
    visualizer = cfg.get('visualizer')
    found = visualizer.get('vis_backends') if isinstance(visualizer, Mapping) else None
    is_list = isinstance(found, (list, tuple))
    if found is None or (is_list and not any(isinstance(x, str) for x in found)):
        return
    kind = kind_of(found) if isinstance(found, Mapping) else found
    kind = kind if isinstance(kind, str) else 'NAME'
    raise ValueError(
        'visualizer.vis_backends is no list of dicts: write in the config '
        f"visualizer = dict(vis_backends=[dict(type='{kind}')])."
    )


def _check_log_level(cfg: Config) -> None:
    level = cfg.get('log_level')
    if isinstance(level, str) and not isinstance(logging.getLevelName(level), int):
        raise ValueError(
            f'log_level is {printable(level)!r}, which is none of Python: write INFO, '
            'DEBUG, WARNING or ERROR.'
        )


def check_numbers(cfg: Config) -> None:
    """Look for what MMEngine counts or multiplies with, and is no number.

    Args:
        cfg (Config): The config of a run.

    Raises:
        ValueError: Names the key and its value.
    """
    hooks = cfg.get('default_hooks') or {}
    wrapper = cfg.get('optim_wrapper') or {}
    for path, part, names in (
        ('train_cfg', cfg.get('train_cfg'), _LENGTHS),
        *((f'default_hooks.{name}', hooks.get(name), ['interval']) for name in hooks),
        *((f'{x}_dataloader', cfg.get(f'{x}_dataloader'), _SIZES) for x in SPLITS),
        ('optim_wrapper.optimizer', wrapper.get('optimizer'), ['lr', 'weight_decay']),
        ('auto_scale_lr', cfg.get('auto_scale_lr'), ['base_batch_size']),
    ):
        given = part if isinstance(part, Mapping) else {}
        for name in names:
            value = given.get(name)
            if isinstance(value, (str, list, tuple, Mapping)):
                raise ValueError(
                    f'{path}.{name} is {printable(repr(value))}, which is no number.'
                )
            if name in _POSITIVE and isinstance(value, int) and value < 1:
                raise ValueError(f'{path}.{name} is {value}: write 1 or more.')


_LENGTHS = ('max_epochs', 'max_iters', 'val_begin', 'val_interval')
_SIZES = ('batch_size', 'num_workers')
_POSITIVE = (
    *('max_epochs', 'max_iters', 'val_interval'),
    *('batch_size', 'base_batch_size'),
)


def _check_loop(loop: Mapping, split: str) -> None:
    """Whether a loop without a type has arguments of MMEngine's loop."""
    own = () if split != 'train' else ('by_epoch',)
    if split == 'train' and 'by_epoch' not in loop:
        raise ValueError(
            'train_cfg has no type: write the loop, such as '
            "train_cfg = dict(type='SeededEpochBasedTrainLoop', max_epochs=12)."
        )
    by_epoch = loop.get('by_epoch')
    train = EpochBasedTrainLoop if by_epoch else IterBasedTrainLoop
    kind: Any = dict(train=train, val=ValLoop, test=TestLoop)[split]
    given = ('runner', 'dataloader', 'evaluator')
    known = [name for name in arguments_of(kind) if name not in given]
    _require_known(loop, f'{split}_cfg', [*own, *known])


def _check_loader(loader: Any, key: str) -> None:
    """Whether a data loader has arguments that there are, and that go together."""
    if not isinstance(loader, Mapping):
        return
    _require_known(loader, key, _OF_LOADER)
    if loader.get('num_workers', 0):
        return
    for name, off in (('persistent_workers', False), ('prefetch_factor', None)):
        value = loader.get(name)
        if value not in (None, False):
            raise ValueError(
                f'{key}.{name} is {value}, but there are no workers: write '
                f'--cfg-options {key}.num_workers=0 {key}.{name}={off}.'
            )


def _require_known(part: Any, path: str, known: Sequence[str]) -> None:
    keys = part if isinstance(part, Mapping) else ()
    # MMEngine writes and removes the scope of a base config.
    unknown = [key for key in keys if key not in (*known, '_scope_')]
    if unknown:
        near = nearest(unknown[0], known)
        hint = f' Is {path}.{near} meant?' if near else ''
        raise ValueError(
            f'{path}.{unknown[0]} is not read.{hint} {path} has '
            f'{", ".join(dict.fromkeys(known))}.'
        )
