# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Which of a checkpoint's weights a model gets, and whether they fit."""

from typing import Any

from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import HOOKS

from ...checkpoints.layout import EMA_KEY, check_fit, describe, find_weights
from ...checkpoints.reader import CheckpointError
from ...models.fusing import fuse_conv_bn
from ...reproducible.resume import source_of


def unwrap(model: Any) -> Any:
    """The model inside wrappers for several processes and test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


@HOOKS.register_module()
class CheckWeightsHook(Hook):
    """Refuse a checkpoint that does not fit a model with an MLLA backbone.

    MMEngine loads the weights that fit, warns of the rest and continues, for
    ``load_from``, resuming and testing. This hook does not check other backbones.

    Raises:
        CheckpointError: If the checkpoint does not fit.
    """

    # After the hooks that choose among a checkpoint's weights.
    priority = 'VERY_LOW'

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        own = unwrap(runner.model).state_dict()
        if describe(own) is not None:
            source = source_of(runner)
            check_fit(own, find_weights(checkpoint, source, ema=False), source)


@HOOKS.register_module()
class UseEMAWeightsHook(Hook):
    """Load a checkpoint's averaged weights instead of its plain ones.

    Raises:
        CheckpointError: If the checkpoint has no averaged weights.
    """

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        if EMA_KEY not in checkpoint:
            raise CheckpointError(
                f"The checkpoint has no averaged weights ('{EMA_KEY}'): it was "
                'trained without MESAHook. Leave --ema out.'
            )
        checkpoint['state_dict'] = checkpoint[EMA_KEY]


@HOOKS.register_module()
class FuseConvBNHook(Hook):
    """Fold BatchNorm into the convolution before it, after a test has loaded weights.

    The averaged models of MMEngine's EMAHook are folded too, because the hook swaps
    their weights with the model's. See :func:`mlla_mm.models.fusing.fuse_conv_bn`.
    """

    def before_test(self, runner) -> None:
        averages = [x.ema_model.module for x in runner.hooks if isinstance(x, EMAHook)]
        for model in (runner.model, *averages):
            fuse_conv_bn(model.eval())
