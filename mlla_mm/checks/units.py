# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Finds settings that count epochs in a loop of iterations, and the reverse.

To MMEngine a loop of iterations is one epoch. What counts epochs there happens at the
end of the training, at once, or never.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

from mmengine.config import Config
from mmengine.hooks import CheckpointHook, Hook, LoggerHook
from mmengine.optim import ReduceOnPlateauParamScheduler
from mmengine.registry import (
    HOOKS,
    LOG_PROCESSORS,
    LOOPS,
    PARAM_SCHEDULERS,
    DefaultScope,
)
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from ..engine.parts import kind_of, named_schedulers, training_length
from .kinds import is_kind, is_known, known_hooks

NO_VALIDATION = 'val_dataloader=None val_cfg=None val_evaluator=None'
"""Options that switch the validation off."""


class IntervalError(ValueError):
    """No checkpoint would be saved before the end; the message has the way out."""


class _Wrong(NamedTuple):
    """A setting that counts epochs: its key and value, what it does, what to write."""

    key: str
    value: Any
    effect: str
    right: str


def check_units(cfg: Config) -> None:
    """Look for what counts epochs in a loop of iterations, and for late beginnings.

    Args:
        cfg (Config): The config of a training run, whose ``custom_imports`` have been
            imported.

    Raises:
        ValueError: Names all such keys, one a line, and what to write.
    """
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        unit = loop_unit(cfg)
        if unit is None:
            return
        _check_beginnings(cfg, unit)
        wrong = list(_epochs_of(cfg)) if unit == 'iterations' else []
    if wrong:
        lines = [f'{x.key} is {x.value!r}: {x.effect}. Write {x.right}.' for x in wrong]
        raise ValueError(
            'The training loop counts iterations, so no epoch ends before the '
            'training does:\n  ' + '\n  '.join(lines)
        )


def loop_unit(cfg: Config) -> Optional[str]:
    """What a config's training loop counts: 'epochs', 'iterations', or None: unknown.

    A user's own loop may end epochs where its base class does not. The config's scope
    is to be the current one.
    """
    loop = cfg.get('train_cfg') or {}
    if 'type' not in loop:
        by_epoch = loop.get('by_epoch')
        return None if by_epoch is None else 'epochs' if by_epoch else 'iterations'
    if not is_known(LOOPS, loop):
        return None
    if is_kind(LOOPS, loop, IterBasedTrainLoop):
        return 'iterations'
    return 'epochs' if is_kind(LOOPS, loop, EpochBasedTrainLoop) else None


def _check_beginnings(cfg: Config, unit: str) -> None:
    length = training_length(cfg.train_cfg)
    begin = cfg.train_cfg.get('val_begin', 1)
    # With one more than the length, configs of mmdet switch the validation off.
    if length is not None and cfg.get('val_cfg') is not None and begin > length + 1:
        raise ValueError(
            f'train_cfg.val_begin is {begin}, but the training ends after {length} '
            f'{unit}: nothing would be validated. Write train_cfg.val_begin={length} '
            f'or less, or for no validation {NO_VALIDATION}.'
        )
    key = 'begin_epoch' if unit == 'epochs' else 'begin_iter'
    for name, hook in known_hooks(cfg):
        begin = hook.get(key, 0)
        if kind_of(hook) == 'EMAHook' and length is not None and begin > length:
            raise ValueError(
                f'{name}.{key} is {begin}, but the training ends after {length} '
                f'{unit}: no average would begin. Write a smaller one.'
            )


def _epochs_of(cfg: Config) -> Iterator[_Wrong]:
    """The settings that count epochs, in a loop of iterations."""
    for key, hook in known_hooks(cfg):
        yield from _epochs_of_hook(key, hook)
    processor = dict(dict(type='LogProcessor'), **(cfg.get('log_processor') or {}))
    if is_known(LOG_PROCESSORS, processor) and processor.get('by_epoch', True):
        effect = 'all logs are of one epoch'
        key = 'log_processor.by_epoch'
        yield _Wrong(key, True, effect, f'{key}=False')
    for key, scheduler in named_schedulers(cfg):
        if _waits_for_epochs(scheduler):
            key, effect = f'{key}.by_epoch', 'it would never change the rate'
            right = f'{key}=False, with begin and end in iterations'
            yield _Wrong(key, True, effect, right)


def _waits_for_epochs(scheduler: Mapping) -> bool:
    if not is_known(PARAM_SCHEDULERS, scheduler):
        return False
    if scheduler.get('convert_to_iter_based') or not scheduler.get('by_epoch', True):
        return False
    # It steps after validations, from the epoch ``begin`` on.
    plateau = is_kind(PARAM_SCHEDULERS, scheduler, ReduceOnPlateauParamScheduler)
    return not plateau or scheduler.get('begin', 0) > 0


def _epochs_of_hook(key: str, hook: Mapping) -> Iterator[_Wrong]:
    kind = kind_of(hook)
    if is_kind(HOOKS, hook, CheckpointHook):
        # An interval that is not positive asks for the last checkpoint alone.
        if hook.get('by_epoch', True) and hook.get('interval', -1) > 0:
            effect = 'there is no checkpoint before the end'
            right = f'{key}.by_epoch=False, with {key}.interval in iterations'
            yield _Wrong(f'{key}.by_epoch', True, effect, right)
    elif is_kind(HOOKS, hook, LoggerHook):
        # mmdet's own configs for iterations leave MMEngine's default.
        if hook.get('log_metric_by_epoch', kind == 'MainProcessLoggerHook'):
            key, effect = f'{key}.log_metric_by_epoch', 'metrics are all of step 0'
            yield _Wrong(key, True, effect, f'{key}=False')
    elif kind in _EPOCHS_OF_HOOKS:
        name, find, effect, right = _EPOCHS_OF_HOOKS[kind]
        value = find(hook)
        if value is not None:
            key = f'{key}.{name}'
            yield _Wrong(key, value, effect, right.format(key=key))


def _above(name: str, limit: float, default: Any = None) -> Callable[[Mapping], Any]:
    """Gives an argument if it is more than a limit; else None."""

    def find(hook: Mapping) -> Any:
        value = hook.get(name, default)
        is_number = isinstance(value, (int, float))
        return value if is_number and value > limit else None

    return find


def _last_switch(hook: Mapping) -> Any:
    epochs = [x.get('action_epoch') for x in hook.get('schedule') or ()]
    return epochs if any(isinstance(x, int) and x > 1 for x in epochs) else None


_EPOCHS = "train_cfg.type='SeededEpochBasedTrainLoop', or leave this hook out"
# Hooks that act on an epoch: the argument, its value if it is wrong, what happens.
_EPOCHS_OF_HOOKS: Dict[str, Tuple[str, Callable[[Mapping], Any], str, str]] = {
    'EMAHook': (
        'begin_epoch',
        _above('begin_epoch', 1),
        'the average would never begin',
        '{key}=0, with begin_iter in iterations',
    ),
    'MESAHook': (
        'start',
        _above('start', 0, 0.25),
        'it is a part of the epochs, and is not followed',
        "{key}=0.0 for a teacher from the start, or train_cfg.type='Seeded"
        "EpochBasedTrainLoop' with max_epochs",
    ),
    'YOLOXModeSwitchHook': (
        'num_last_epochs',
        _above('num_last_epochs', -1, 15),
        'it would switch at the start',
        _EPOCHS,
    ),
    'PipelineSwitchHook': (
        'switch_epoch',
        _above('switch_epoch', 0),
        'it would never switch',
        _EPOCHS,
    ),
    'SwitchRecipeHook': (
        'schedule',
        _last_switch,
        'it would never switch to what comes after epoch 1',
        _EPOCHS,
    ),
}


# The reverse, once the length of an epoch is known.


def check_checkpoints(cfg: Config, max_iters: int) -> None:
    """Look for checkpoints that a loop of epochs would not reach before its end.

    Args:
        cfg (Config): The config of a training run.
        max_iters (int): Iterations of the whole run.

    Raises:
        IntervalError: If a CheckpointHook counts more iterations than there are.
    """
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        if loop_unit(cfg) != 'epochs':
            return
        for key, hook in known_hooks(cfg):
            interval = hook.get('interval', -1)
            by_iteration = not hook.get('by_epoch', True)
            if by_iteration and is_kind(HOOKS, hook, CheckpointHook):
                if interval > max_iters:
                    raise IntervalError(
                        f'{key}.interval is {interval} iterations, but the training '
                        f'has {max_iters}: there is no checkpoint before the end. '
                        f'Write a smaller one, {key}.by_epoch=True to count epochs, '
                        f'or {key}.interval=-1 for the last checkpoint alone.'
                    )


class CheckIntervalsHook(Hook):
    """Calls :func:`check_checkpoints` before the first update, on all processes.

    Args:
        cfg (Config): The config of the run.
    """

    # Before anything is written.
    priority = 'HIGHEST'

    def __init__(self, cfg: Config) -> None:
        self._cfg = cfg

    def before_train(self, runner) -> None:
        check_checkpoints(self._cfg, runner.max_iters)
