# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Hooks for runs of several processes."""

from typing import Dict, Optional

from mmengine.dist import is_main_process, master_only
from mmengine.hooks import CheckpointHook, Hook, LoggerHook
from mmengine.registry import HOOKS

from ...reproducible.running_statistics import make_alike


@HOOKS.register_module()
class MainProcessLoggerHook(LoggerHook):
    """MMEngine's hook, but only the first process writes the metrics of a test.

    With MMEngine's hook all processes write the same file at once, which can damage it.

    Args:
        *args, **kwargs: The arguments of :class:`mmengine.hooks.LoggerHook`.
    """

    @master_only
    def after_test_epoch(
        self, runner, metrics: Optional[Dict[str, float]] = None
    ) -> None:
        super().after_test_epoch(runner, metrics)


@HOOKS.register_module()
class SyncBuffersBeforeSaveHook(Hook):
    """Average the model's buffers over the processes before saving and evaluating.

    BatchNorm collects its own statistics on every process, but only the first process
    saves. MMEngine's ``SyncBuffersHook`` averages them after an epoch and before an
    evaluation. An iteration-based run saves before that, so the saved model differs
    from the evaluated one. This hook works for both kinds of run.

    The time of averaging does not change later results: a running mean is linear in
    its inputs, so the average of the processes' statistics is the same in any case.

    With ``train_cfg.running_statistics='first'`` the first process's buffers are taken
    instead. They count in the authors' training: see
    :class:`mlla_mm.reproducible.loops.SeededTrainLoop`.
    """

    # Before hooks that copy (EMAHook: NORMAL) or save (CheckpointHook: VERY_LOW).
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
        if any(self._saves_now(hook, runner) for hook in runner.hooks):
            self._synchronize(runner)

    def after_train_epoch(self, runner) -> None:
        self._synchronize(runner)

    def before_val_epoch(self, runner) -> None:
        self._synchronize(runner)

    def _saves_now(self, hook: Hook, runner) -> bool:
        """Whether a hook saves a checkpoint after the current iteration."""
        if not isinstance(hook, CheckpointHook) or hook.by_epoch:
            return False
        return self.every_n_train_iters(runner, hook.interval, hook.save_begin) or (
            hook.save_last and self.is_last_train_iter(runner)
        )

    def _synchronize(self, runner) -> None:
        # Averaging equal values again may round them differently from those saved.
        if self._differ:
            make_alike(runner, runner.model.buffers())
            self._differ = False


@HOOKS.register_module()
class SaveZeroOptimizerHook(Hook):
    """Let all processes send their part of a ``ZeroRedundancyOptimizer`` for saving.

    MMEngine asks only the first process for the optimiser's state. That process
    collects it from the others, and would wait for ever if they did not take part. With
    this hook they do, at every checkpoint that includes the optimiser.

    Raises:
        ValueError: If the optimiser is not a ``ZeroRedundancyOptimizer``.
    """

    def before_train(self, runner) -> None:
        optimizer = runner.optim_wrapper.optimizer
        if not hasattr(optimizer, 'consolidate_state_dict'):
            raise ValueError(
                'SaveZeroOptimizerHook is for a ZeroRedundancyOptimizer, but the '
                f'optimizer is {type(optimizer).__name__}. Remove the hook.'
            )
        if is_main_process():
            return

        # CheckpointHook calls it on every process; MMEngine's own does nothing here.
        def send(*args, save_optimizer: bool = True, **kwargs) -> None:
            if save_optimizer:
                optimizer.consolidate_state_dict()

        runner.save_checkpoint = send
