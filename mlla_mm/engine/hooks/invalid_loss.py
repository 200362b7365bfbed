# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Stop a run that diverges, and save what helps to find the cause."""

import io
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any, Dict, NamedTuple, NoReturn, Optional, Set

import torch
from mmengine.dist import all_gather_object
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from ...reproducible.update_status import read_update
from ...utils.files import write_whole


class DivergedError(RuntimeError):
    """Training cannot continue; the message names iteration, losses and images."""


class _Iteration(NamedTuple):
    """What is told of an iteration."""

    number: int  # counted from 1
    logs: Dict[str, Tensor]
    data_batch: Any


@HOOKS.register_module()
class StopOnInvalidLossHook(Hook):
    """Stop a run whose loss is not finite, or whose mixed precision never recovers.

    The hook works for all tasks. All processes stop together. Each process with an
    invalid loss saves ``invalid_loss_iter_N_rank_R.pth`` in the work_dir. The file is a
    dict with ``iteration`` (counted from 1, as in logs), ``rank``, ``losses``,
    ``learning_rates``, ``images`` and ``data_batch``: the batch as the model got it, or
    a list of batches if gradients are accumulated.
    ``torch.load(file, weights_only=False)`` reads the file.

    In mixed precision, an update whose loss or gradients are not finite is skipped, and
    the dynamic loss scale is halved. That is an error only after ``max_skipped`` such
    updates one after another, or if buffers of the model, such as BatchNorm's
    statistics, are no longer finite: they would never recover. With a fixed loss scale
    a skipped update cannot be recognised. There an invalid loss stops the run, and
    invalid gradients do not.

    Every iteration is checked, because the batch is known only then. With the training
    loops of this package the check costs nothing: they read the logs, and what other
    processes have to tell, at once (``mlla_mm.reproducible.update_status``).

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
        # The first iteration of this update with an invalid loss, and the buffers that
        # are not finite by intent, such as masks of -inf.
        self._invalid: Optional[_Iteration] = None
        self._infinite: Set[str] = set()

    def before_train(self, runner) -> None:
        scaler: Any = getattr(runner.optim_wrapper, 'loss_scaler', None)
        is_scaled = scaler is not None and scaler.is_enabled()
        self._scale = scaler.get_scale() if is_scaled else None
        self._skipped = 0
        self._invalid = None
        self._infinite = _infinite_buffers(runner.model) if is_scaled else set()

    def after_train_iter(
        self,
        runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Optional[Dict[str, Tensor]] = None,
    ) -> None:
        status = getattr(runner.train_loop, 'status', None)
        if status is None:  # another training loop
            status = read_update(outputs or {}, runner.optim_wrapper)
        now = _Iteration(runner.iter + 1, status.logs, data_batch)
        if self._scale is None:
            if status.any_invalid:
                self._stop(runner, now)
            return
        if status.any_invalid and self._invalid is None:
            self._invalid = now
        # MMEngine's loops may need several iterations for an update.
        if not runner.optim_wrapper.should_update():
            return
        invalid, self._invalid = self._invalid, None
        scale = self._scale if status.loss_scale is None else status.loss_scale
        is_skipped = scale < self._scale
        self._skipped = self._skipped + 1 if is_skipped else 0
        if self._skipped >= self.max_skipped:
            cause = (
                f'Mixed precision skipped {self._skipped} updates one after another; '
                f'the loss scale is {scale:g}.'
            )
            self._stop(runner, invalid or now, cause)
        if invalid and not is_skipped:
            self._stop(runner, invalid)
        if invalid:
            self._require_finite_buffers(runner, invalid)
        self._scale = scale

    def _require_finite_buffers(self, runner, invalid: _Iteration) -> None:
        """Stop if an update that was skipped has left buffers that never recover."""
        broken = _infinite_buffers(runner.model) - self._infinite
        broken = set().union(*all_gather_object(broken))
        if broken:
            cause = (
                f'Mixed precision skipped the update, but {min(broken)} is not finite '
                f'any more ({len(broken)} buffers are not).'
            )
            self._stop(runner, invalid, cause)

    def _stop(self, runner, iteration: _Iteration, cause: str = '') -> NoReturn:
        """End the run on all processes, each of which calls this."""
        logs = iteration.logs
        losses = {name: x.item() for name, x in logs.items() if 'loss' in name}
        is_valid = all(map(isfinite, losses.values()))
        own = is_valid, self._report(runner, iteration, losses, is_valid)
        reports = all_gather_object(own)
        invalid = [report for is_valid, report in reports if not is_valid]
        lines = [
            f'Training diverged at iteration {iteration.number}.',
            *([cause] if cause else []),
            *(invalid or [reports[0][1]]),
            'Continue from an earlier checkpoint with a lower learning rate, stronger '
            'clip_grad or without these images; docs/reliability.md tells how to '
            'replay the batch.',
        ]
        raise DivergedError('\n'.join(lines))

    def _report(
        self, runner, iteration: _Iteration, losses: Dict[str, float], is_valid: bool
    ) -> str:
        """Describe this process, and save its batch if its loss is invalid."""
        rates = {
            name: values
            for name, values in runner.optim_wrapper.get_lr().items()
            if name.split('.')[-1] == 'lr'
        }
        low, high = min(map(min, rates.values())), max(map(max, rates.values()))
        rate = f'learning rate {low:g}' + (f' to {high:g}' if high > low else '')
        text = ', '.join(f'{name} {value:g}' for name, value in losses.items())
        text = f'rank {runner.rank}: {text}, {rate}'
        if is_valid:
            return text
        images = list(map(str, _image_paths(iteration.data_batch)))
        content = dict(
            iteration=iteration.number,
            rank=runner.rank,
            losses=losses,
            learning_rates=rates,
            images=images,
            data_batch=iteration.data_batch,
        )
        name = f'invalid_loss_iter_{iteration.number}_rank_{runner.rank}.pth'
        path = Path(runner.work_dir) / name
        try:
            file = io.BytesIO()
            torch.save(content, file)
            write_whole(path, file.getbuffer())
            saved = f'saved in {path}'
        # Whatever it is: the other processes wait for this one's report.
        except Exception as error:
            saved = f'not saved ({type(error).__name__}: {error})'
        named = ', '.join(images) or 'that have no img_path'
        return f'{text}, images {named}; the batch is {saved}'


def _infinite_buffers(model: nn.Module) -> Set[str]:
    """Names of the buffers that are not finite."""
    return {
        name
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and not buffer.isfinite().all()
    }


def _image_paths(data: Any) -> Iterator[str]:
    """The img_path of all data samples in a batch, however deep they are in it."""
    if isinstance(data, BaseDataElement) and 'img_path' in data.metainfo:
        yield data.img_path
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, (list, tuple)):
        for value in data:
            yield from _image_paths(value)
