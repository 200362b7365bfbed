# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class NoHook(Hook):
    """A hook that does nothing. It switches off a hook of ``default_hooks``.

    None switches off MMEngine's own hooks only. For the others write::

        default_hooks = dict(invalid_loss=dict(type='NoHook'))

    Args:
        **kwargs: Ignored: the arguments of the hook that this one replaces.
    """

    def __init__(self, **kwargs) -> None:
        pass
