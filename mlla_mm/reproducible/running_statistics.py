# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Whose running statistics count, where every process has BatchNorm's of its own."""

from collections.abc import Iterable

from mmengine.dist import all_reduce_params, broadcast
from torch import Tensor

#: What ``train_cfg.running_statistics`` may be.
RULES = ('mean', 'first')


def make_alike(runner, buffers: Iterable[Tensor]) -> None:
    """Give all processes the same buffers, by the rule of the training loop.

    All processes have to call it. In a run of one process it changes nothing.

    Args:
        runner (Runner): Its training loop says the rule: ``'mean'`` over the processes,
            or those of the ``'first'``. A loop that has no
            ``running_statistics`` means ``'mean'``.
        buffers (Iterable[Tensor]): The buffers of this process, which are overwritten.
    """
    if getattr(runner.train_loop, 'running_statistics', 'mean') == 'mean':
        all_reduce_params(buffers, op='mean')
        return
    for buffer in buffers:
        broadcast(buffer)
