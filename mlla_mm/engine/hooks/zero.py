# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class SaveZeroOptimizerHook(Hook):
    """Let all processes hand in their part of a ``ZeroRedundancyOptimizer`` for saving.

    MMEngine asks the first process alone for the optimiser's state, which that one
    collects from the others: they have to take part, or it waits for ever. With this
    hook they do, at every checkpoint that holds the optimiser.
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
        def hand_in(*args, save_optimizer: bool = True, **kwargs) -> None:
            if save_optimizer:
                optimizer.consolidate_state_dict()

        runner.save_checkpoint = hand_in
