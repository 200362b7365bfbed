# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Finds keys of metrics that a config names, but its validation does not give.

MMEngine looks for them after the first validation, or never. What a metric gives is
known of those whose keys follow from their arguments. Others, and parts of other
packages that could add keys, make every key possible.
"""

import difflib
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, Callable, Dict, List, NamedTuple, Optional

from mmengine.config import Config
from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmengine.optim import ReduceOnPlateauParamScheduler
from mmengine.registry import (
    EVALUATOR,
    HOOKS,
    LOOPS,
    METRICS,
    MODELS,
    PARAM_SCHEDULERS,
    DefaultScope,
)

from ..engine.parts import (
    as_list,
    kind_of,
    metrics_of,
    named_hooks,
    named_schedulers,
    training_length,
)
from .kinds import class_of, is_kind, is_known, known_hooks, package_of

# A key holds it in place of the name of any class.
_ANY_CLASS = '{class}'
_VAL_LOOPS = ('ValLoop', 'CheckedValLoop')


class _Monitor(NamedTuple):
    """A part of a config that reads metrics.

    Attributes:
        key (str): Where the config names them, as for ``--cfg-options``.
        wanted (list[str]): Their keys.
        value (Any): The value of ``key``.
        off (str): How to do without.
    """

    key: str
    wanted: List[str]
    value: Any
    off: str


def check_monitors(cfg: Config) -> None:
    """Look for keys of metrics that no validation of a training run gives.

    They are those of ``save_best``, EarlyStoppingHook and ReduceOnPlateau schedulers.

    Args:
        cfg (Config): The config, whose ``custom_imports`` have been imported.

    Raises:
        ValueError: Names the place and its key, and the keys that exist, the most
            similar first. Also if the config has no validation, if two metrics give
            the same key, or if MMEngine cannot know whether more of a metric is better.
    """
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        reason = _no_validation(cfg)
        keys = None if reason else metric_keys(cfg)
        for monitor in _monitors(cfg):
            if reason:
                raise ValueError(
                    f'{monitor.key} is {monitor.value!r}, but nothing is validated: '
                    f'{reason}. {monitor.off}'
                )
            if keys is not None:
                _require_keys(monitor, keys)
        for key, hook in known_hooks(cfg):
            _require_rule(key, hook, keys)


def _no_validation(cfg: Config) -> str:
    """Why a training has no validation; empty if it has one."""
    if cfg.get('val_cfg') is None:
        return 'val_cfg is None'
    loop = cfg.get('train_cfg') or {}
    begin, length = loop.get('val_begin', 1), training_length(loop)
    if length is not None and begin > length:
        return f'train_cfg.val_begin is {begin}, and the training ends at {length}'
    return ''


def metric_keys(cfg: Config) -> Optional[List[str]]:
    """The keys of the numbers that a config's validation gives, in their order.

    Args:
        cfg (Config): The config of a training run with a validation.

    Returns:
        list[str] | None: The keys; one with ``{class}`` stands for those of all
        classes. None if any key is possible.
    """
    hooks = [hook for _, hook in named_hooks(cfg)]
    all_known = (
        all(is_known(HOOKS, hook) for hook in hooks)
        # A model may give losses in a validation, which MMEngine adds to the metrics.
        and is_known(MODELS, cfg.model)
        and kind_of(cfg.val_cfg) in (None, *_VAL_LOOPS)
        and (cfg.val_cfg.get('type') is None or is_known(LOOPS, cfg.val_cfg))
        and cfg.get('runner_type', 'Runner') == 'Runner'
    )
    keys = _evaluator_keys(cfg.get('val_evaluator')) if all_known else None
    if keys and 'MESAHook' in map(kind_of, hooks):
        keys += [f'ema_{key}' for key in keys]
    return keys


def _monitors(cfg: Config) -> Iterator[_Monitor]:
    for key, hook in known_hooks(cfg):
        if is_kind(HOOKS, hook, CheckpointHook) and hook.get('save_best'):
            key, value = f'{key}.save_best', hook['save_best']
            if not all(isinstance(x, str) for x in as_list(value)):
                raise ValueError(
                    f'{key} is {value!r}, which is no name of a metric: write '
                    f'{key}=auto for the first one.'
                )
            wanted = [x for x in as_list(value) if x != 'auto']
            yield _Monitor(key, wanted, value, f'Write {key}=None.')
        if is_kind(HOOKS, hook, EarlyStoppingHook) and hook.get('monitor'):
            value = hook['monitor']
            yield _Monitor(f'{key}.monitor', [value], value, 'Remove this hook.')
    for key, scheduler in named_schedulers(cfg):
        if is_kind(PARAM_SCHEDULERS, scheduler, ReduceOnPlateauParamScheduler):
            if is_known(PARAM_SCHEDULERS, scheduler):
                value = scheduler.get('monitor', 'loss')  # MMEngine's default
                off = 'Remove this scheduler.'
                yield _Monitor(f'{key}.monitor', [value], value, off)


def _require_keys(monitor: _Monitor, keys: List[str]) -> None:
    if not keys:
        raise ValueError(
            f'{monitor.key} is {monitor.value!r}, but val_evaluator gives no numbers. '
            f'{monitor.off}'
        )
    for wanted in monitor.wanted:
        if isinstance(wanted, str) and not any(_matches(wanted, key) for key in keys):
            likely = _by_likeness(wanted, keys)
            right: Any = likely[0]
            if isinstance(monitor.value, (list, tuple)):
                right = [right if x == wanted else x for x in monitor.value]
            raise ValueError(
                f'{monitor.key} is {monitor.value!r}, but val_evaluator gives no '
                f"'{wanted}'. Is {monitor.key}={right!r} meant? It gives "
                f'{", ".join(likely)}.'
            )


def _matches(wanted: str, key: str) -> bool:
    start, any_class, end = key.partition(_ANY_CLASS)
    if any_class:
        return wanted.startswith(start) and wanted.endswith(end)
    return wanted == key


def _by_likeness(name: str, keys: List[str]) -> List[str]:
    """The keys, those first that are most like a name in lower case."""

    def likeness(key: str) -> float:
        return difflib.SequenceMatcher(None, key.lower(), name.lower()).ratio()

    return sorted(keys, key=likeness, reverse=True)


def _require_rule(key: str, hook: Mapping, keys: Optional[List[str]]) -> None:
    """Let MMEngine say whether it knows when a metric is better."""
    options = {x: hook[x] for x in ('rule', 'greater_keys', 'less_keys') if x in hook}
    try:
        if is_kind(HOOKS, hook, CheckpointHook) and hook.get('save_best'):
            best = hook['save_best']
            if best in ('auto', ['auto']) and keys:
                best = keys[0]
            CheckpointHook(save_best=best, **options)
        elif is_kind(HOOKS, hook, EarlyStoppingHook) and hook.get('monitor'):
            EarlyStoppingHook(hook['monitor'], options.get('rule'))
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"{key}: {error.args[0]} Write {key}.rule='greater', or 'less' if less is "
            'better, or a list with one of them for each key.'
        ) from error


# What an evaluator gives.


def _evaluator_keys(evaluator: Any) -> Optional[List[str]]:
    found = map(_metric_keys, metrics_of(evaluator))
    if not isinstance(evaluator, Mapping) or 'metrics' not in evaluator:
        return _union(found)
    # MMEngine builds a dict of metrics as an evaluator.
    part = {'type': 'Evaluator', **evaluator}
    package, kind = package_of(EVALUATOR, part), kind_of(part)
    if (package, kind) == ('mmengine', 'Evaluator'):
        return _union(found)
    if (package, kind) == ('mmdet', 'MultiDatasetsEvaluator'):
        return _union(
            None if keys is None else [f'{prefix}/{key}' for key in keys]
            for prefix, keys in zip(evaluator.get('dataset_prefixes') or (), found)
        )
    return None


def _union(found: Iterator[Optional[List[str]]]) -> Optional[List[str]]:
    keys: List[str] = []
    for of_metric in found:
        if of_metric is None:
            return None
        double = next((key for key in of_metric if key in keys), None)
        if double:
            raise ValueError(
                f"Two metrics of val_evaluator give '{double}', which MMEngine refuses "
                "after the validation. Give one of them a prefix='...' of its own."
            )
        keys += of_metric
    return keys


def _metric_keys(metric: Any) -> Optional[List[str]]:
    if not isinstance(metric, Mapping) or '_scope_' in metric:
        return None
    find = _KEYS.get(f'{package_of(METRICS, metric)}.{kind_of(metric)}')
    if find is None:
        return None
    prefix = metric.get('prefix') or class_of(METRICS, metric['type']).default_prefix
    names = dict.fromkeys(find(metric))  # several of them may give the same
    return [f'{prefix}/{key}' if prefix else key for key in names]


def _coco_keys(metric: Mapping) -> Iterator[str]:
    for name in as_list(metric.get('metric', 'bbox')):
        items = metric.get('metric_items')
        if name == 'proposal_fast':
            nums = metric.get('proposal_nums', (100, 300, 1000))
            yield from (f'AR@{num}' for num in nums)
        elif name == 'proposal':
            areas = ('AR@100', 'AR@300', 'AR@1000')
            by_size = ('AR_s@1000', 'AR_m@1000', 'AR_l@1000')
            yield from (*areas, *by_size) if items is None else items
        else:
            if metric.get('classwise'):
                yield f'{_ANY_CLASS}_precision'
            if items is None:
                items = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l')
            yield from (f'{name}_{item}' for item in items)


def _voc_keys(metric: Mapping) -> Iterator[str]:
    thresholds = as_list(metric.get('iou_thrs', 0.5))
    if 'recall' not in as_list(metric.get('metric', 'mAP')):
        yield 'mAP'
        yield from (f'AP{int(x * 100):02d}' for x in thresholds)
        return
    nums = metric.get('proposal_nums', (100, 300, 1000))
    yield from (f'recall@{num}@{x}' for num, x in product(nums, thresholds))
    if len(thresholds) > 1:
        yield from (f'AR@{num}' for num in nums)


def _iou_keys(metric: Mapping) -> Iterator[str]:
    yield 'aAcc'
    others = {
        'mIoU': ('mIoU', 'mAcc'),
        'mDice': ('mDice', 'mAcc'),
        'mFscore': ('mFscore', 'mPrecision', 'mRecall'),
    }
    for name in as_list(metric.get('iou_metrics', 'mIoU')):
        yield from others.get(name, ())


def _accuracy_keys(metric: Mapping) -> Iterator[str]:
    for k, suffix in product(
        as_list(metric.get('topk', 1)), _threshold_suffixes(metric)
    ):
        yield f'top{k}{suffix}'


def _single_label_keys(metric: Mapping) -> Iterator[str]:
    return _precision_keys(metric, _threshold_suffixes(metric))


def _multi_label_keys(metric: Mapping) -> Iterator[str]:
    threshold, topk = metric.get('thr'), metric.get('topk')
    if threshold is None and topk is None:
        threshold = 0.5
    if not threshold:
        return _precision_keys(metric, [f'_top{topk}'])
    suffix = '' if threshold == 0.5 else f'_thr-{threshold:.2f}'
    return _precision_keys(metric, [suffix])


def _precision_keys(metric: Mapping, suffixes: List[str]) -> Iterator[str]:
    average = metric.get('average', 'macro')
    if average is None:
        return  # lists, which cannot be compared
    items = metric.get('items', ('precision', 'recall', 'f1-score'))
    ending = '_micro' if average == 'micro' else ''
    for suffix in suffixes:
        for item in ('precision', 'recall', 'f1-score', 'support'):
            if item in items:
                yield f'{item}{suffix}{ending}'


def _threshold_suffixes(metric: Mapping) -> List[str]:
    thresholds = metric.get('thrs', 0.0)
    if not isinstance(thresholds, (list, tuple)) or len(thresholds) == 1:
        return ['']
    return ['_no-thr' if x is None else f'_thr-{x:.2f}' for x in thresholds]


def _average_precision_keys(metric: Mapping) -> List[str]:
    return [] if metric.get('average', 'macro') is None else ['mAP']


def _unless_format_only(
    find: Callable[[Mapping], Any],
) -> Callable[[Mapping], Any]:
    """Such a metric writes files alone if it is asked to."""
    return lambda metric: () if metric.get('format_only') else find(metric)


_KEYS: Dict[str, Callable[[Mapping], Any]] = {
    'mmengine.DumpResults': lambda metric: (),
    'mmdet.DumpDetResults': lambda metric: (),
    'mmdet.CocoMetric': _unless_format_only(_coco_keys),
    'mmdet.VOCMetric': _voc_keys,
    'mmseg.IoUMetric': _unless_format_only(_iou_keys),
    'mmpretrain.Accuracy': _accuracy_keys,
    'mmpretrain.SingleLabelMetric': _single_label_keys,
    'mmpretrain.MultiLabelMetric': _multi_label_keys,
    'mmpretrain.VOCMultiLabelMetric': _multi_label_keys,
    'mmpretrain.AveragePrecision': _average_precision_keys,
    'mmpretrain.VOCAveragePrecision': _average_precision_keys,
}
