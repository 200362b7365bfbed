# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ...checkpoints.layout import check_fit, describe, find_weights
from ...compat.openmmlab import checkpoint_of
from ..wrappers import unwrap


@HOOKS.register_module()
class CheckWeightsHook(Hook):
    """Refuse a checkpoint that does not fit a model with an MLLA backbone.

    MMEngine loads what fits, warns of the rest and goes on, for ``load_from``, resuming
    and testing alike. Models with other backbones are left to it.
    """

    # After the hooks that choose among a checkpoint's weights.
    priority = 'VERY_LOW'

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        own = unwrap(runner.model).state_dict()
        if describe(own) is None:
            return
        source = checkpoint_of(runner) or f'the newest checkpoint of {runner.work_dir}'
        check_fit(own, find_weights(checkpoint, source, ema=False), source)
