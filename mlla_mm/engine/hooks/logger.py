# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from typing import Dict, Optional

from mmengine.dist import master_only
from mmengine.hooks import LoggerHook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class MainProcessLoggerHook(LoggerHook):
    """MMEngine's hook, but the first process alone writes the metrics of a test.

    There all of them write the same file at once, which can leave it damaged.

    Args:
        *args, **kwargs: As :class:`mmengine.hooks.LoggerHook` takes them.
    """

    @master_only
    def after_test_epoch(
        self, runner, metrics: Optional[Dict[str, float]] = None
    ) -> None:
        super().after_test_epoch(runner, metrics)
