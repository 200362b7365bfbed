# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The recipe's total batch size, on another number of processes than the recipe's."""

from typing import Optional

from mmengine.config import Config

from ..reproducible.loops import is_seeded, require_seeded
from .parts import as_list, batch_size_of, hooks_of, kind_of


def accumulated_batches(cfg: Config) -> int:
    """Batches of an optimiser update on one process, by our loop or by MMEngine."""
    by_mmengine = cfg.optim_wrapper.get('accumulative_counts', 1)
    return cfg.train_cfg.get('micro_batches', 1) * by_mmengine


def total_batch_size(cfg: Config, world_size: int) -> int:
    """Images of an optimiser update: processes x batch x accumulated batches."""
    return world_size * batch_size_of(cfg.train_dataloader) * accumulated_batches(cfg)


def recipe_batch_size(cfg: Config) -> Optional[int]:
    """The total batch size of the config's recipe; None if the config has none."""
    return (cfg.get('auto_scale_lr') or {}).get('base_batch_size')


def settle(
    cfg: Config, world_size: int, keep: bool = False, scale: bool = False
) -> Optional[str]:
    """Handle a total batch size that differs from the recipe's.

    Args:
        cfg (Config): The config of a training run; changed in place.
        world_size (int): Number of processes.
        keep (bool): Accumulate gradients up to the recipe's batch size, see
            :func:`keep_batch_size`. Defaults to False.
        scale (bool): Scale the recipe to the batch size, see
            :func:`scale_to_batch_size`. Defaults to False.

    Returns:
        str | None: What was done, or a warning; None if the batch size is the recipe's.

    Raises:
        ValueError: If the config does not state the recipe's batch size, but ``keep``
            or ``scale`` needs it. See :func:`keep_batch_size` for the other causes.
    """
    batch = batch_size_of(cfg.train_dataloader)
    total = total_batch_size(cfg, world_size)
    recipe = recipe_batch_size(cfg)
    if recipe is None:
        if keep or scale:
            raise ValueError(
                f'{"--keep-batch-size" if keep else "--auto-scale-lr"} needs '
                'auto_scale_lr.base_batch_size in the config, the total batch size of '
                'its recipe.'
            )
        return None
    if keep:
        micro_batches = keep_batch_size(cfg, world_size, recipe)
        if micro_batches == 1:
            return None
        return (
            f'Every optimiser update accumulates {micro_batches} batches: {world_size} '
            f"processes x {batch} x {micro_batches} is the recipe's {recipe}."
        )
    if scale:
        scale_to_batch_size(cfg, total, recipe)
    if total == recipe:
        return None
    difference = f"The total batch size is {total}; the recipe's is {recipe}."
    if scale:
        return f'{difference} The learning rate is scaled by {total / recipe:g}.'
    if cfg.auto_scale_lr.get('enable'):
        return (
            f'{difference} MMEngine scales the learning rate, as auto_scale_lr.enable '
            'says; --auto-scale-lr also scales what belongs to it: lowest rates and '
            'averages of weights.'
        )
    options = '--auto-scale-lr scales the learning rate'
    if recipe % total == 0 and is_seeded(cfg.train_cfg):
        options = f'--keep-batch-size accumulates gradients up to it, {options}'
    return (
        f'The total batch size is {total} ({world_size} processes x {batch}); the '
        f"recipe's is {recipe}. Published results are not reproduced like this: "
        f'{options}.'
    )


def keep_batch_size(cfg: Config, world_size: int, recipe: int) -> int:
    """Make the same optimiser updates as the recipe, on fewer processes.

    An iteration becomes an update of several micro-batches. They hold the images that
    the recipe's processes would have drawn for this update. Everything that counts
    iterations then counts updates.
    See :class:`mlla_mm.reproducible.loops.SeededTrainLoop`.

    Args:
        cfg (Config): The config of a training run; changed in place.
        world_size (int): Number of processes.
        recipe (int): The recipe's total batch size.

    Returns:
        int: Number of micro-batches.

    Raises:
        ValueError: If processes x batch does not divide the recipe's batch size, if the
            config accumulates gradients itself, or if it names another training loop
            than those of this package.
    """
    accumulated = cfg.optim_wrapper.get('accumulative_counts', 1)
    if accumulated > 1:
        raise ValueError(
            '--keep-batch-size sets how many batches an update accumulates, but the '
            f'config says {accumulated} already. Remove '
            'optim_wrapper.accumulative_counts, or leave the option out.'
        )
    batch = batch_size_of(cfg.train_dataloader)
    micro_batches, rest = divmod(recipe, world_size * batch)
    if rest:
        raise ValueError(
            f'--keep-batch-size: {world_size} processes x {batch} images does not '
            f"divide the recipe's total batch size of {recipe}. Values of "
            f'train_dataloader.batch_size that fit {world_size} processes: '
            f'{_fitting(recipe, world_size)}. Numbers of processes that fit {batch} '
            f'images each: {_fitting(recipe, batch)}.'
        )
    if micro_batches > 1:
        require_seeded(cfg.train_cfg, '--keep-batch-size')
        cfg.train_cfg.micro_batches = micro_batches
    # MMEngine would count one micro-batch.
    cfg.auto_scale_lr.enable = False
    return micro_batches


def _fitting(recipe: int, factor: int) -> str:
    """The numbers whose product with ``factor`` divides the recipe's batch size."""
    numbers = [str(n) for n in range(1, recipe + 1) if recipe % (n * factor) == 0]
    return ', '.join(numbers) or 'none'


def scale_to_batch_size(cfg: Config, total: int, recipe: int) -> None:
    """Change the recipe into one for another total batch size.

    The learning rate and the absolute rates of schedulers are scaled. (Warm-ups are
    factors of the rate.) Averages of weights look back over as many images as the
    recipe's. MMEngine would scale the optimiser's rate alone, and would not count
    accumulated gradients.

    Args:
        cfg (Config): The config of a training run; changed in place.
        total (int): Total batch size of the run.
        recipe (int): Total batch size of the recipe.

    Raises:
        ValueError: If the config has no rate at ``optim_wrapper.optimizer.lr``, as with
            several optimizers.
    """
    ratio = total / recipe
    optimizer = cfg.optim_wrapper.get('optimizer') or {}
    if 'lr' not in optimizer:
        raise ValueError(
            '--auto-scale-lr scales optim_wrapper.optimizer.lr, and the config has '
            'none. Scale the rates in the config, and leave the option out.'
        )
    optimizer['lr'] *= ratio
    for scheduler in as_list(cfg.get('param_scheduler')):
        for key in ('eta_min', 'eta_max'):
            if scheduler.get(key):
                scheduler[key] *= ratio
    for hook in hooks_of(cfg):
        kind = kind_of(hook)
        if kind == 'EMAHook' and hook.get('ema_type') != 'StochasticWeightAverage':
            # The default is that of MMEngine's averages.
            hook['momentum'] = 1 - (1 - hook.get('momentum', 0.0002)) ** ratio
        # Without a decay of its own, MESAHook follows the total batch size itself.
        if kind == 'MESAHook' and hook.get('decay') is not None:
            hook['decay'] **= ratio
    # The rates now fit this batch size. MMEngine must not scale them again.
    cfg.auto_scale_lr.update(base_batch_size=total, enable=False)
