# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Imported by the configs of test_two_processes.py."""

import json
from hashlib import sha256
from pathlib import Path

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class UpdateCounter(Hook):
    """Write what a process has done to ``updates_RANK.json`` in the work_dir.

    ``updates`` is the number of calls of the optimiser, ``losses`` has the total loss
    of each. ``weights`` are digests of all parameters, at the start and at the end.
    """

    def before_train(self, runner) -> None:
        self.seen = dict(updates=0, losses=[], weights=[digest(runner.model)])
        runner.optim_wrapper.optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer, args, kwargs) -> None:
        self.seen['updates'] += 1

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen['losses'].append(outputs['loss'].item())

    def after_train(self, runner) -> None:
        self.seen['weights'].append(digest(runner.model))
        path = Path(runner.work_dir, f'updates_{get_rank()}.json')
        path.write_text(json.dumps(self.seen))


def digest(model) -> str:
    found = sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().contiguous().numpy())
    return found.hexdigest()
