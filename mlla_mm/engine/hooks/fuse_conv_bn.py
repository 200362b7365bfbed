# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ...models.fusing import fuse_conv_bn


@HOOKS.register_module()
class FuseConvBNHook(Hook):
    """Fold BatchNorm into the convolutions before it, when a test has its weights.

    See :func:`mlla_mm.models.fusing.fuse_conv_bn`.
    """

    def before_test(self, runner) -> None:
        fuse_conv_bn(runner.model)
