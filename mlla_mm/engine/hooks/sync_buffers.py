# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""BatchNorm statistics that mean the same model when saved and when evaluated."""

from typing import Optional

from mmengine.dist import all_reduce_params
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class SyncBuffersBeforeSaveHook(Hook):
    """Average the model's buffers over the processes before saving and evaluating.

    BatchNorm collects its own statistics on every process, and the first process
    saves. MMEngine's ``SyncBuffersHook`` averages them after an epoch and before an
    evaluation; an iteration-based run saves before that, and what it saves is another
    model than the one that it evaluates. This hook works for both kinds of run.

    Averaging at any time gives the average of what the processes would have had
    without it, because a running mean is linear in what enters it.
    """

    # Before what copies (EMAHook: NORMAL) or saves (CheckpointHook: VERY_LOW).
    priority = 'ABOVE_NORMAL'

    def __init__(self) -> None:
        self._differ = False

    def before_train_iter(
        self, runner, batch_idx: int, data_batch: Optional[dict] = None
    ) -> None:
        self._differ = True

    def after_train_iter(
        self,
        runner,
        batch_idx: int,
        data_batch: Optional[dict] = None,
        outputs: Optional[dict] = None,
    ) -> None:
        if any(self._is_saved_now(hook, runner) for hook in runner.hooks):
            self._synchronize(runner)

    def after_train_epoch(self, runner) -> None:
        self._synchronize(runner)

    def before_val_epoch(self, runner) -> None:
        self._synchronize(runner)

    def _is_saved_now(self, hook: Hook, runner) -> bool:
        """Whether a checkpoint hook saves after the current iteration."""
        if not isinstance(hook, CheckpointHook) or hook.by_epoch:
            return False
        return self.every_n_train_iters(runner, hook.interval, hook.save_begin) or (
            hook.save_last and self.is_last_train_iter(runner)
        )

    def _synchronize(self, runner) -> None:
        # A second average of equal values may round to others than those saved.
        if self._differ:
            all_reduce_params(runner.model.buffers(), op='mean')
            self._differ = False
