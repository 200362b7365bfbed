# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Saving when SIGTERM comes, which clusters send before they take a machine."""

import functools
import os
import signal
from pathlib import Path
from threading import Thread, current_thread, main_thread
from typing import Any, List, NoReturn, Optional

import torch
from mmengine.dist import all_gather_object, all_reduce, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from torch import Tensor

from ..utils.files import write_whole
from .resume import PREEMPTED_NAME
from .running_statistics import make_alike

_BUFFERS_KEY = 'process_buffers'


class Preempted(SystemExit):
    """Training was stopped by SIGTERM, and its progress is saved.

    If it is not caught, the program ends with status 143, which shells report for the
    signal.
    """

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


@HOOKS.register_module()
class PreemptionHook(Hook):
    """Save a checkpoint and end the training when SIGTERM comes.

    All processes stop together, whichever of them got the signal: between two updates,
    or within a validation, which the resumed run repeats. The checkpoint is
    ``preempted_iter_N.pth`` in the work_dir, where N is the number of updates made. A
    resumed run ends as if it had not been stopped. The file is removed when the next
    regular checkpoint is saved (see :class:`WholeCheckpointHook`). Further signals
    change nothing. A signal after the last update or validation lets the training
    finish. If the training does not run in the main thread, SIGTERM ends it at once.

    The hook is made for the training loops of this package and for
    :class:`WholeCheckpointHook`. Without them the file stays, a validation is not
    repeated, and MMEngine's loop over epochs begins the epoch anew.

    Buffers, such as BatchNorm's statistics, may differ between processes. Each process
    continues with its own: those of the model, and those that other hooks return from a
    method ``own_buffers()``, as :class:`MESAHook` does.

    Raises:
        Preempted: In training, on all processes, when the checkpoint is saved.
    """

    # Before other hooks count the update.
    priority = 'HIGHEST'

    def __init__(self) -> None:
        self._told = False
        self._first_iter = 0
        self._training = False
        self._previous_handler: Any = None
        self._common_val_iters = 0
        self._buffers: Optional[List[List[Tensor]]] = None
        self._is_saving = False

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        self._buffers = checkpoint.pop(_BUFFERS_KEY, None)

    def before_train(self, runner) -> None:
        self._told = False
        self._first_iter = runner.iter
        self._training = True
        self._previous_handler = handle_sigterm(self._take_note)

    # Not in before_train: MESAHook makes its averaged model there.
    def before_train_epoch(self, runner) -> None:
        buffers, self._buffers = self._buffers, None
        # With another number of processes, each goes on from the model's weights.
        if buffers and runner.iter > 0 and len(buffers) == runner.world_size:
            for own, saved in zip(_own_buffers(runner), buffers[runner.rank]):
                own.copy_(saved)

    def before_train_iter(
        self, runner, batch_idx: int, data_batch: Optional[dict] = None
    ) -> None:
        # What the training loop has found out after the last update.
        status = getattr(runner.train_loop, 'status', None)
        if self._is_any_told() if status is None else status.any_asks_to_stop:
            self._stop(runner)

    def asks_to_stop(self) -> bool:
        """Whether SIGTERM has come; the training loop tells the other processes."""
        return self._told

    def before_val_epoch(self, runner) -> None:
        if not self._training:
            return
        if any(isinstance(hook, EMAHook) for hook in runner.hooks):
            # Until the validation ends, the model has EMAHook's averaged weights.
            self._common_val_iters = 0
            return
        # Every process must ask equally often, but one may have fewer batches.
        count = torch.tensor(len(runner.val_dataloader))
        all_reduce(count, op='min')
        self._common_val_iters = int(count)

    def after_val_iter(
        self,
        runner,
        batch_idx: int,
        data_batch: Optional[dict] = None,
        outputs: Optional[list] = None,
    ) -> None:
        if not self._training or batch_idx >= self._common_val_iters:
            return
        if self._is_any_told():
            if getattr(runner.train_loop, 'repeats_validation', False):
                runner.message_hub.update_info('validation_due', True)
            self._stop(runner)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        if self._buffers is not None:
            checkpoint[_BUFFERS_KEY] = self._buffers
        if self._is_saving:
            # FlexibleRunner adds one, as if an update had just been made.
            checkpoint['meta'].update(epoch=runner.epoch, iter=runner.iter)

    def after_train(self, runner) -> None:
        self._training = False
        handle_sigterm(self._previous_handler)

    def _take_note(self, number: int, frame: Any) -> None:
        self._told = True

    def _is_any_told(self) -> bool:
        told = torch.tensor(int(self._told))
        all_reduce(told, op='max')
        return bool(told)

    def _stop(self, runner) -> NoReturn:
        if runner.iter == self._first_iter:
            saved = 'no update was made since the start, so nothing is saved'
        else:
            saved = f'saved in {self._save(runner)}'
        runner.logger.warning(
            f'Stopped by SIGTERM after update {runner.iter}: {saved}. Go on with '
            '--resume.'
        )
        raise Preempted()

    def _save(self, runner) -> Path:
        path = Path(runner.work_dir) / PREEMPTED_NAME.format(runner.iter)
        if runner.world_size > 1:
            # BatchNorm statistics differ between processes. A resumed run gives each
            # process its own; the model's weights are those of any checkpoint.
            own = [buffer.cpu() for buffer in _own_buffers(runner)]
            self._buffers = all_gather_object(own)
            make_alike(runner, _own_buffers(runner))
        self._is_saving = True
        runner.save_checkpoint(
            runner.work_dir,
            path.name,
            save_param_scheduler=runner.param_schedulers is not None,
            meta=dict(epoch=runner.epoch, iter=runner.iter),
            by_epoch=False,
            backend_args=dict(backend='whole_file'),
        )
        if is_main_process():
            # MMEngine's own tools read it to resume.
            write_whole(path.with_name('last_checkpoint'), str(path).encode())
        return path


def handle_sigterm(handler: Any) -> Any:
    """Set the handler of SIGTERM, and return the previous one.

    Only the main thread can set it, so a call in another thread changes nothing.

    Args:
        handler (Callable | signal.Handlers | None): The handler, as for
            ``signal.signal``. None, which stands for a handler that Python did not set,
            changes nothing.
    """
    if current_thread() is not main_thread() or handler is None:
        return signal.getsignal(signal.SIGTERM)
    return signal.signal(signal.SIGTERM, handler)


@functools.cache  # once in a process
def shield_workers() -> None:
    """Let processes that are forked from now on obey SIGTERM from their parent only.

    Clusters send SIGTERM to all processes of a job. It would end the data loaders'
    workers before the checkpoint is saved, and PyTorch would then end the training.
    ``worker_init_fn`` is too late, because the signal may come while a worker starts.
    Processes that are not forked, but started in another way, are not changed.
    """
    os.register_at_fork(after_in_child=_obey_parent_alone)


def _obey_parent_alone() -> None:
    # PyTorch's own handler in workers obeys every sender.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Thread(target=_wait_for_parents_signal, args=(os.getppid(),), daemon=True).start()


def _wait_for_parents_signal(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _own_buffers(runner) -> List[Tensor]:
    """The buffers of this process: those of the model and of other hooks."""
    buffers = list(runner.model.buffers())
    for hook in runner.hooks:
        if hasattr(hook, 'own_buffers'):
            buffers += hook.own_buffers()
    return buffers
