# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Stop a run that diverges, and save what helps to find the cause."""

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
    """Training cannot continue; the message names iteration, losses and images."""


@HOOKS.register_module()
class StopOnInvalidLossHook(Hook):
    """Stop a run whose loss is not finite, or whose mixed precision never recovers.

    The hook works for all tasks. All processes stop together. Each process with an
    invalid loss saves ``invalid_loss_iter_N_rank_R.pth`` in the work_dir. The file is a
    dict with ``iteration`` (counted from 1, as in logs), ``rank``, ``losses``,
    ``learning_rates``, ``images`` and ``data_batch``: the batch as the model got it, or
    a list of batches if gradients are accumulated.
    ``torch.load(file, weights_only=False)`` reads the file.

    In mixed precision, an update whose gradients overflow is skipped, and the loss
    scale is reduced. That is an error only after ``max_skipped`` such updates one after
    another. Updates that are skipped with a fixed loss scale are not counted, because
    they cannot be recognised.

    Every iteration is checked, because the batch is known only then. The check is
    cheap: MMEngine reads all losses from the device in every iteration anyway, and the
    processes exchange one number.

    Args:
        max_skipped (int): Number of updates, one after another, that mixed precision
            may skip. The loss scale is then 2 ** max_skipped times smaller.
            Defaults to 50.

    Raises:
        ValueError: If ``max_skipped`` is not positive.
        DivergedError: In training, on all processes.
    """

    # Before invalid weights are averaged (ABOVE_NORMAL, NORMAL) or saved (VERY_LOW).
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
            for name, value in (outputs or {}).items()
            if 'loss' in name
        }
        is_valid = all(map(isfinite, losses.values()))
        scale = _loss_scale(runner)
        if scale is not None and runner.optim_wrapper.should_update():
            is_skipped = self._scale is not None and scale < self._scale
            self._skipped = self._skipped + 1 if is_skipped else 0
            self._scale = scale
        stops = not is_valid or self._skipped >= self.max_skipped
        any_stops = torch.tensor(int(stops))
        all_reduce(any_stops, op='max')
        if any_stops:
            own = self._report(runner, losses, data_batch, is_valid) if stops else None
            reports = [report for report in all_gather_object(own) if report]
            raise DivergedError(
                '\n'.join(
                    [f'Training diverged at iteration {runner.iter + 1}.', *reports]
                )
                + '\nContinue from an earlier checkpoint with a lower learning rate, '
                'stronger clip_grad or without these images; docs/reliability.md tells '
                'how to replay the batch.'
            )

    def _report(
        self, runner, losses: Dict[str, float], data_batch: Any, is_valid: bool
    ) -> str:
        """Save the batch if its loss is invalid, and describe what happened."""
        rates = {
            name: values
            for name, values in runner.optim_wrapper.get_lr().items()
            if name.split('.')[-1] == 'lr'
        }
        low, high = min(map(min, rates.values())), max(map(max, rates.values()))
        rate = f'learning rate {low:g}' + (f' to {high:g}' if high > low else '')
        text = ', '.join(f'{name} {value:g}' for name, value in losses.items())
        if is_valid:
            return (
                f'rank {runner.rank}: mixed precision skipped {self._skipped} updates '
                f'one after another, the loss scale is {self._scale:g}; {text}, {rate}'
            )
        images = list(map(str, _image_paths(data_batch)))
        content = dict(
            iteration=runner.iter + 1,
            rank=runner.rank,
            losses=losses,
            learning_rates=rates,
            images=images,
            data_batch=data_batch,
        )
        name = f'invalid_loss_iter_{runner.iter + 1}_rank_{runner.rank}.pth'
        path = Path(runner.work_dir) / name
        file = io.BytesIO()
        torch.save(content, file)
        try:
            write_whole(path, file.getbuffer())
            saved = f'saved in {path}'
        except OSError as error:
            saved = f'not saved ({error})'
        return (
            f'rank {runner.rank}: {text}, {rate}, images '
            f'{", ".join(images) or "that have no img_path"}; the batch is {saved}'
        )


def _loss_scale(runner) -> Optional[float]:
    scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
    return None if scaler is None else scaler.get_scale()


def _image_paths(data: Any) -> Iterator[str]:
    """The img_path of all data samples in a batch, however deep they are in it."""
    if isinstance(data, BaseDataElement) and 'img_path' in data.metainfo:
        yield data.img_path
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, (list, tuple)):
        for value in data:
            yield from _image_paths(value)
