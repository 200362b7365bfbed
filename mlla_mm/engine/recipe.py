# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""A recipe and the run that was made of it, item by item."""

import math
from typing import Any, Dict, List, Optional

import torch
from mmengine.config import Config

from .batch_size import accumulated_batches, recipe_batch_size, total_batch_size
from .ema import recipe_decay
from .options import hooks_of, kind_of, modules_with_pretrained, pretrained_of

Items = Dict[str, Any]


def describe_recipe(cfg: Config) -> Items:
    """What a config means to be run with.

    Args:
        cfg (Config): The config as it was written, before command-line choices.

    Returns:
        dict: Values by item, None where the recipe does not say.
    """
    total = recipe_batch_size(cfg)
    batch = cfg.train_dataloader.batch_size * accumulated_batches(cfg)
    processes = total // batch if total and total % batch == 0 else None
    items = dict(describe_run(cfg, processes or 1), processes=processes)
    if total is None:
        items['total batch'] = None
    if items['mixed precision'] == 'float32' and torch.cuda.is_available():
        # PyTorch allowed it by default when the published models were trained.
        items['TF32'] = True
    return items


def describe_run(cfg: Config, world_size: int) -> Items:
    """What a config is run with on ``world_size`` processes.

    Returns:
        dict: Values by item, in the order to print.
    """
    total = total_batch_size(cfg, world_size)
    loop = cfg.train_cfg
    length = None  # of a loop that counts otherwise
    if 'max_epochs' in loop:
        length = f'{loop.max_epochs} epochs'
    elif 'max_iters' in loop:
        length = f'{loop.max_iters} iterations'
    return {
        'processes': world_size,
        'batch per process': cfg.train_dataloader.batch_size,
        'accumulated batches': accumulated_batches(cfg),
        'total batch': total,
        'length': length,
        'learning rate': cfg.optim_wrapper.get('optimizer', {}).get('lr'),
        'EMA decay': _ema_decay(cfg, total),
        'mixed precision': _precision(cfg),
        'TF32': torch.backends.cuda.matmul.allow_tf32
        if torch.cuda.is_available()
        else None,
        'pretrained weights': _pretrained(cfg.model) or None,
        'start from': cfg.get('load_from'),
    }


def updates_per_epoch(
    images: int, processes: int, batch_size: int, drop_last: bool
) -> int:
    """Optimiser updates of an epoch.

    Args:
        images (int): Length of the data set.
        processes (int): Number of processes; each gets as many images, some repeated.
        batch_size (int): Images of an update on one process.
        drop_last (bool): Whether an incomplete last batch is left out.
    """
    per_process = math.ceil(images / processes)
    if drop_last:
        return per_process // batch_size
    return math.ceil(per_process / batch_size)


def compare(recipe: Items, actual: Items) -> Dict[str, Dict[str, Any]]:
    """Set a recipe beside a run.

    Returns:
        dict: ``dict(recipe=…, actual=…)`` by item; a recipe's value is None where it
        does not say.
    """
    return {
        item: dict(recipe=recipe.get(item), actual=value)
        for item, value in actual.items()
    }


def deviations(record: Dict[str, Dict[str, Any]]) -> List[str]:
    """The items of :func:`compare` in which a run is not its recipe's."""
    return [
        item
        for item, values in record.items()
        if values['recipe'] is not None and values['recipe'] != values['actual']
    ]


def format_record(record: Dict[str, Dict[str, Any]]) -> str:
    """Print a record of :func:`compare` as a table; deviations are marked."""
    marked = deviations(record)
    rows = [('', 'recipe', 'this run')]
    for item, values in record.items():
        if values['actual'] is None and values['recipe'] is None:
            continue
        rows.append(
            (item, format_value(values['recipe']), format_value(values['actual']))
        )
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return '\n'.join(
        f'{item:<{widths[0]}}  {recipe:<{widths[1]}}  {actual}'
        + ('  <- differs' if item in marked else '')
        for item, recipe, actual in rows
    )


def format_value(value: Any) -> str:
    """An item's value for a table."""
    if value is None:
        return '-'
    if isinstance(value, float):
        return f'{value:.8g}'
    return ', '.join(value) if isinstance(value, list) else str(value)


def _ema_decay(cfg: Config, total: int) -> Optional[float]:
    for hook in hooks_of(cfg):
        if kind_of(hook) == 'MESAHook':
            decay = hook.get('decay')
            return recipe_decay(total) if decay is None else decay
        if kind_of(hook) == 'EMAHook' and 'momentum' in hook:
            return 1 - hook['momentum']
    return None


def _precision(cfg: Config) -> str:
    if cfg.optim_wrapper.get('type') != 'AmpOptimWrapper':
        return 'float32'
    return cfg.optim_wrapper.get('dtype') or 'float16'


def _pretrained(model: dict) -> List[str]:
    modules = modules_with_pretrained(model)
    return sorted(x['checkpoint'] for part in modules for x in pretrained_of(part))
