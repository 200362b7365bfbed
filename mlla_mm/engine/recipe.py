# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Comparison of a run with the recipe in its config, item by item."""

import math
from typing import Any, Dict, List, Optional

import torch
from mmengine.config import Config

from ..compat.pytorch import products_use_tf32
from .batch_size import accumulated_batches, recipe_batch_size, total_batch_size
from .ema import recipe_decay
from .parts import batch_size_of, hooks_of, kind_of, parts_of, pretrained_of

Items = Dict[str, Any]
_DESCRIBED = ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper')


def describe_recipe(cfg: Config) -> Items:
    """The settings that a config is made for.

    Args:
        cfg (Config): The config as it was written, before the command line's changes.

    Returns:
        dict: Values by item; None if the recipe does not say. Empty if the config is
        no whole training.
    """
    if any(cfg.get(key) is None for key in _DESCRIBED):
        return {}  # --cfg-options give the rest
    total = recipe_batch_size(cfg)
    batch = batch_size_of(cfg.train_dataloader) * accumulated_batches(cfg)
    processes = total // batch if total and total % batch == 0 else None
    items = dict(describe_run(cfg, processes or 1), processes=processes)
    if total is None:
        items['total batch'] = None
    if items['mixed precision'] == 'float32' and torch.cuda.is_available():
        # The published models were trained with a PyTorch that allowed it by default.
        items['TF32'] = True
    return items


def describe_run(cfg: Config, world_size: int) -> Items:
    """The settings that a config is run with on ``world_size`` processes.

    Returns:
        dict: Values by item, in the order of the table.
    """
    total = total_batch_size(cfg, world_size)
    loop = cfg.train_cfg
    length = None  # of a loop that counts otherwise
    if 'max_epochs' in loop:
        length = f'{loop.max_epochs} epochs'
    elif 'max_iters' in loop:
        length = f'{loop.max_iters} iterations'
    decay = None
    for hook in hooks_of(cfg):
        if kind_of(hook) == 'MESAHook':
            own = hook.get('decay')
            decay = recipe_decay(total) if own is None else own
        elif kind_of(hook) == 'EMAHook' and 'momentum' in hook:
            decay = 1 - hook['momentum']
    is_amp = kind_of(cfg.optim_wrapper) == 'AmpOptimWrapper'
    precision = cfg.optim_wrapper.get('dtype') or 'float16'
    weights = {
        x.get('checkpoint') for y in parts_of(cfg.model) for x in pretrained_of(y)
    }
    return {
        'processes': world_size,
        'batch per process': batch_size_of(cfg.train_dataloader),
        'accumulated batches': accumulated_batches(cfg),
        'total batch': total,
        'length': length,
        'learning rate': _learning_rate(cfg, world_size),
        'EMA decay': decay,
        'mixed precision': precision if is_amp else 'float32',
        'TF32': products_use_tf32() if torch.cuda.is_available() else None,
        # A recipe may leave them to --cfg-options.
        'pretrained weights': sorted(filter(None, weights)) or None,
        'start from': cfg.get('load_from'),
    }


def _learning_rate(cfg: Config, world_size: int) -> Optional[float]:
    """The optimiser's rate before the schedule, as MMEngine may scale it."""
    rate = (cfg.optim_wrapper.get('optimizer') or {}).get('lr')
    scale = cfg.get('auto_scale_lr') or {}
    if rate is None or not scale.get('enable'):
        return rate
    batch = world_size * batch_size_of(cfg.train_dataloader)
    return rate * (batch / scale['base_batch_size'])


def updates_per_epoch(
    images: int, processes: int, batch_size: int, drop_last: bool
) -> int:
    """Optimiser updates of an epoch.

    Args:
        images (int): Length of the data set.
        processes (int): Number of processes. Each gets the same number of images; some
            images are repeated for that.
        batch_size (int): Images of an update on one process.
        drop_last (bool): Whether an incomplete last batch is left out.
    """
    per_process = math.ceil(images / processes)
    if drop_last:
        return per_process // batch_size
    return math.ceil(per_process / batch_size)


def compare(recipe: Items, actual: Items) -> Dict[str, Items]:
    """Set a recipe beside a run.

    Returns:
        dict: ``dict(recipe=…, actual=…)`` by item. The recipe's value is None if it
        does not say.
    """
    return {
        item: dict(recipe=recipe.get(item), actual=value)
        for item, value in actual.items()
    }


def deviations(record: Dict[str, Items]) -> List[str]:
    """The items of :func:`compare` in which a run differs from its recipe."""
    return [
        item
        for item, values in record.items()
        if values['recipe'] is not None and values['recipe'] != values['actual']
    ]


def format_record(record: Dict[str, Items]) -> str:
    """Print a record of :func:`compare` as a table that marks the deviations."""
    differing = deviations(record)
    rows = [('', 'recipe', 'this run')]
    for item, values in record.items():
        recipe, actual = format_value(values['recipe']), format_value(values['actual'])
        if recipe != '-' or actual != '-':
            mark = '  <- differs' if item in differing else ''
            rows.append((item, recipe, actual + mark))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join(
        f'{item:<{widths[0]}}  {recipe:<{widths[1]}}  {actual}'
        for item, recipe, actual in rows
    )


def format_value(value: Any) -> str:
    """The text of an item's value in a table."""
    if value is None:
        return '-'
    if isinstance(value, float):
        return f'{value:.8g}'
    return ', '.join(value) if isinstance(value, list) else str(value)
