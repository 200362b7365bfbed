# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The end of a run that diverges, and what it leaves to find out why."""

import io
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any, Dict, Optional

import torch
from mmengine.dist import all_gather_object, all_reduce
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.structures import BaseDataElement
from torch import Tensor

from ...utils.files import write_whole


class DivergedError(RuntimeError):
    """Training cannot go on; the message names iteration, losses and images."""


@HOOKS.register_module()
class StopOnInvalidLossHook(Hook):
    """Stop a run whose loss is not finite, or whose mixed precision never recovers.

    It serves all tasks. All processes stop together, whichever of them it is about, and
    each of those leaves ``invalid_loss_iter_N_rank_R.pth`` in the work_dir: a dict with
    ``iteration`` (counted from 1, as in logs), ``rank``, ``losses``,
    ``learning_rates``, ``images`` and ``data_batch``, the batch as the model got it (a
    list of them where gradients are accumulated). ``torch.load(file,
    weights_only=False)`` reads it.

    In mixed precision an update whose gradients overflow is skipped and the loss scale
    reduced, which is no error, unless nearly nothing but that happens. Updates that are
    skipped with a fixed loss scale leave no trace and are not counted.

    Every iteration is checked, so that the batch at fault is at hand. It costs little:
    MMEngine reads all losses from the device after every iteration anyway, and the
    processes agree by the reduction of one number.

    Args:
        max_skipped (int): Number of updates, one after another, that mixed precision
            may skip. The loss scale is then 2 ** max_skipped times smaller.
            Defaults to 50.

    Raises:
        ValueError: If ``max_skipped`` is not positive.
        DivergedError: In training, on all processes.
    """

    # After the losses were read from the device, before weights that may be lost are
    # averaged (ABOVE_NORMAL, NORMAL) or saved (VERY_LOW).
    priority = 'HIGH'

    def __init__(self, max_skipped: int = 50) -> None:
        if max_skipped < 1:
            raise ValueError(f'max_skipped must be positive, got {max_skipped}.')
        self.max_skipped = max_skipped
        self._scale: Optional[float] = None
        self._skipped = 0

    def before_train(self, runner) -> None:
        self._scale = _loss_scale(runner)
        self._skipped = 0

    def after_train_iter(
        self,
        runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Optional[Dict[str, Tensor]] = None,
    ) -> None:
        losses = {
            name: torch.as_tensor(value).item()
            for name, value in outputs.items()
            if 'loss' in name
        }
        invalid = not all(map(isfinite, losses.values()))
        self._count_skipped(runner)
        report = None
        if invalid:
            report = _report(runner, losses, data_batch)
        elif self._skipped >= self.max_skipped:
            report = (
                f'rank {runner.rank}: mixed precision skipped {self._skipped} updates '
                f'one after another, the loss scale is {self._scale:g}; '
                f'{_describe(losses)}, {_learning_rates_text(runner)}'
            )
        _stop_together(runner, report, next(iter(outputs.values()), None))

    def _count_skipped(self, runner) -> None:
        scale = _loss_scale(runner)
        if scale is None or not runner.optim_wrapper.should_update():
            return
        self._skipped = self._skipped + 1 if scale < self._scale else 0
        self._scale = scale


def _stop_together(runner, report: Optional[str], like: Any) -> None:
    """Raise on all processes if one of them has something to report."""
    device = like.device if isinstance(like, Tensor) else 'cpu'
    reporting = torch.tensor(float(report is not None), device=device)
    all_reduce(reporting, op='max')
    if not reporting:
        return
    reports = [text for text in all_gather_object(report) if text is not None]
    raise DivergedError(
        '\n'.join([f'Training diverged at iteration {runner.iter + 1}.', *reports])
        + '\nGo on from an earlier checkpoint with a lower learning rate, stronger '
        'clip_grad or without these images; docs/reliability.md tells how to replay '
        'the batch.'
    )


def _report(runner, losses: Dict[str, float], data_batch: Any) -> str:
    """Save the batch and say what happened on this process."""
    images = [str(path) for path in _image_paths(data_batch)]
    name = f'invalid_loss_iter_{runner.iter + 1}_rank_{runner.rank}.pth'
    path = Path(runner.work_dir) / name
    content = io.BytesIO()
    torch.save(
        dict(
            iteration=runner.iter + 1,
            rank=runner.rank,
            losses=losses,
            learning_rates=_learning_rates(runner),
            images=images,
            data_batch=data_batch,
        ),
        content,
    )
    try:
        write_whole(path, content.getbuffer())
        saved = f'saved in {path}'
    except OSError as error:
        saved = f'not saved ({error})'
    return (
        f'rank {runner.rank}: {_describe(losses)}, {_learning_rates_text(runner)}, '
        f'images {", ".join(images) or "that have no img_path"}; the batch is {saved}'
    )


def _describe(losses: Dict[str, float]) -> str:
    return ', '.join(f'{name} {value:g}' for name, value in losses.items())


def _learning_rates(runner) -> Dict[str, list]:
    """Those that the update was made with, one for each group of parameters."""
    rates = runner.optim_wrapper.get_lr()
    return {name: rate for name, rate in rates.items() if name.split('.')[-1] == 'lr'}


def _learning_rates_text(runner) -> str:
    rates = [rate for rates in _learning_rates(runner).values() for rate in rates]
    low, high = min(rates), max(rates)
    return f'learning rate {low:g}' + (f' to {high:g}' if high > low else '')


def _loss_scale(runner) -> Optional[float]:
    scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
    return None if scaler is None else scaler.get_scale()


def _image_paths(data: Any) -> Iterator[str]:
    """The img_path of all data samples in a batch, however it is nested."""
    if isinstance(data, BaseDataElement):
        if 'img_path' in data.metainfo:
            yield data.img_path
    elif isinstance(data, dict):
        for value in data.values():
            yield from _image_paths(value)
    elif isinstance(data, (list, tuple)):
        for value in data:
            yield from _image_paths(value)
