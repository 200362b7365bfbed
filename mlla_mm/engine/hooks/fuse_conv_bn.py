# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS

from ...models.fusing import fuse_conv_bn


@HOOKS.register_module()
class FuseConvBNHook(Hook):
    """Fold BatchNorm into the convolutions before it, when a test has its weights.

    So is it in the averaged models of MMEngine's EMAHook, which trade weights with the
    model. See :func:`mlla_mm.models.fusing.fuse_conv_bn`.
    """

    def before_test(self, runner) -> None:
        runner.model.eval()
        fuse_conv_bn(runner.model)
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                fuse_conv_bn(hook.ema_model.module.eval())
