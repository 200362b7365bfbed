# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class NoHook(Hook):
    """Does nothing. It takes the place of a hook in ``default_hooks``.

    MMEngine lets None stand there for its own hooks alone::

        default_hooks = dict(invalid_loss=dict(type='NoHook'))

    Args:
        **kwargs: Ignored: those of the hook that it replaces.
    """

    def __init__(self, **kwargs) -> None:
        pass
