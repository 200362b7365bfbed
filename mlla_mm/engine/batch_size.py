# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The recipe's total batch size, on the number of processes that there is."""

from typing import List, Optional

from mmengine.config import Config

from ..reproducible.loops import is_seeded, require_seeded
from .options import as_list, hooks_of, kind_of


def total_batch_size(cfg: Config, world_size: int) -> int:
    """Images of an optimiser update: processes x batch x accumulated batches."""
    return world_size * cfg.train_dataloader.batch_size * accumulated_batches(cfg)


def accumulated_batches(cfg: Config) -> int:
    """Batches of an optimiser update on one process, by whatever means."""
    return cfg.train_cfg.get('micro_batches', 1) * cfg.optim_wrapper.get(
        'accumulative_counts', 1
    )


def recipe_batch_size(cfg: Config) -> Optional[int]:
    """The total batch size that the config's learning rate is meant for, if stated."""
    return (cfg.get('auto_scale_lr') or {}).get('base_batch_size')


def settle(
    cfg: Config, world_size: int, keep: bool = False, scale: bool = False
) -> Optional[str]:
    """Come to terms with a total batch size that is not the recipe's.

    Args:
        cfg (Config): The config of a training run; changed in place.
        world_size (int): Number of processes.
        keep (bool): Accumulate up to the recipe's, see :func:`keep_batch_size`.
        scale (bool): Scale the recipe, see :func:`scale_to_batch_size`. (Where the
            config says ``auto_scale_lr.enable``, MMEngine scales the learning rate,
            and nothing else.)

    Returns:
        str | None: What was done, or what had better be; None if all is as it should
        be.

    Raises:
        ValueError: See the two functions.
    """
    batch = cfg.train_dataloader.batch_size
    total = total_batch_size(cfg, world_size)
    recipe = recipe_batch_size(cfg)
    if keep:
        micro_batches = keep_batch_size(cfg, world_size)
        if micro_batches == 1:
            return None
        return (
            f'Every optimiser update accumulates {micro_batches} batches: {world_size} '
            f"processes x {batch} x {micro_batches} is the recipe's {recipe}."
        )
    if scale:
        ratio = scale_to_batch_size(cfg, world_size)
        if ratio == 1:
            return None
        return (
            f"The total batch size is {total}; the recipe's is {recipe}. The learning "
            f'rate is scaled by {ratio:g}.'
        )
    if recipe is None or total == recipe:
        return None
    if cfg.auto_scale_lr.get('enable'):
        return (
            f"The total batch size is {total}; the recipe's is {recipe}. MMEngine "
            'scales the learning rate, as auto_scale_lr.enable says; --auto-scale-lr '
            'scales what goes with it too (lowest rates, averages of weights).'
        )
    options = ['--auto-scale-lr scales the learning rate']
    if recipe % total == 0 and is_seeded(cfg.train_cfg):
        options.insert(0, '--keep-batch-size accumulates gradients up to it')
    return (
        f'The total batch size is {total} ({world_size} processes x {batch}); the '
        f"recipe's is {recipe}. Published results are not reproduced like this: "
        f'{", ".join(options)}.'
    )


def keep_batch_size(cfg: Config, world_size: int) -> int:
    """Make the run's optimiser updates those of the recipe, on fewer processes.

    An iteration becomes an update of several micro-batches, made of the images that
    the recipe's processes would have drawn; all that counts iterations counts updates.
    See :class:`mlla_mm.reproducible.loops.SeededTrainLoop`.

    Args:
        cfg (Config): The config of a training run; changed in place.
        world_size (int): Number of processes.

    Returns:
        int: Number of micro-batches.

    Raises:
        ValueError: If processes x batch does not divide the recipe's total batch size,
            or the config does not state that, accumulates gradients itself, or names
            another training loop than ours.
    """
    total = recipe_batch_size(cfg)
    if total is None:
        raise ValueError(
            '--keep-batch-size needs auto_scale_lr.base_batch_size in the config, the '
            'total batch size of its recipe.'
        )
    accumulated = cfg.optim_wrapper.get('accumulative_counts', 1)
    if accumulated > 1:
        raise ValueError(
            '--keep-batch-size sets how many batches an update accumulates, but the '
            f'config says {accumulated} already. Remove '
            'optim_wrapper.accumulative_counts, or leave the option out.'
        )
    batch = cfg.train_dataloader.batch_size
    if total % (world_size * batch):
        raise ValueError(_misfit(total, world_size, batch))
    micro_batches = total // (world_size * batch)
    if micro_batches > 1:
        require_seeded(cfg.train_cfg, '--keep-batch-size')
        cfg.train_cfg.micro_batches = micro_batches
    # MMEngine would count one micro-batch.
    cfg.auto_scale_lr.enable = False
    return micro_batches


def _misfit(total: int, world_size: int, batch: int) -> str:
    message = (
        f'--keep-batch-size: {world_size} processes x {batch} images does not divide '
        f"the recipe's total batch size of {total}. "
    )
    batches = [n for n in _divisors(total) if total % (world_size * n) == 0]
    if batches:
        message += (
            f'With {world_size} processes train_dataloader.batch_size can be '
            f'{_listed(batches)}. '
        )
    processes = [n for n in _divisors(total) if total % (n * batch) == 0]
    if processes:
        message += (
            f'With {batch} images each there can be {_listed(processes)} processes.'
        )
    return message.strip()


def _divisors(number: int) -> List[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _listed(numbers: List[int]) -> str:
    *others, last = map(str, numbers)
    return f'{", ".join(others)} or {last}' if others else last


def scale_to_batch_size(cfg: Config, world_size: int) -> float:
    """Turn the recipe into one for the total batch size that there is.

    The learning rate and the absolute rates of schedulers are scaled with it (warm-ups
    are factors of the rate in MMEngine and here), and averaged weights look back over
    as many images as the recipe's. MMEngine scales the optimiser's rate alone, and
    takes no notice of accumulated gradients.

    Args:
        cfg (Config): The config of a training run; changed in place.
        world_size (int): Number of processes.

    Returns:
        float: The total batch size over the recipe's.

    Raises:
        ValueError: If the config does not state the batch size of its recipe.
    """
    recipe = recipe_batch_size(cfg)
    if recipe is None:
        raise ValueError(
            '--auto-scale-lr needs auto_scale_lr.base_batch_size in the config, the '
            'total batch size that its learning rate is meant for.'
        )
    actual = total_batch_size(cfg, world_size)
    ratio = actual / recipe
    cfg.optim_wrapper.optimizer.lr *= ratio
    for scheduler in as_list(cfg.get('param_scheduler')):
        for key in ('eta_min', 'eta_max'):
            if scheduler.get(key):
                scheduler[key] *= ratio
    for hook in hooks_of(cfg):
        _scale_average(hook, ratio)
    # The rates are meant for this batch size now; MMEngine is not to scale them again.
    cfg.auto_scale_lr.update(base_batch_size=actual, enable=False)
    return ratio


def _scale_average(hook: dict, ratio: float) -> None:
    kind = kind_of(hook)
    if kind == 'EMAHook' and hook.get('ema_type') != 'StochasticWeightAverage':
        # MMEngine's default is that of its averages.
        hook['momentum'] = 1 - (1 - hook.get('momentum', 0.0002)) ** ratio
    # Without a decay of its own, MESAHook follows the total batch size itself.
    if kind == 'MESAHook' and hook.get('decay') is not None:
        hook['decay'] **= ratio
