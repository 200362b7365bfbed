# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS

from ..compat.openmmlab import checkpoint_of, is_resumed
from .resume import (
    folder_of,
    keep_own_names,
    keep_sound_state,
    require_resumable,
)


@HOOKS.register_module()
class ResumedStateHook(Hook):
    """Check the state of a checkpoint before a run takes it over.

    MMEngine trusts a checkpoint: its progress, and the names of files, which it may
    remove later. This hook removes what no training can have written, and names of
    files that are not this run's.

    Raises:
        CheckpointError: If a run cannot go on from the checkpoint.
    """

    # Before any other hook reads the checkpoint.
    priority = 'HIGHEST'

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        if not is_resumed(runner):
            return
        source = checkpoint_of(runner) or f'the newest checkpoint of {runner.work_dir}'
        require_resumable(checkpoint, source)
        messages, meta = checkpoint['message_hub'], checkpoint['meta']
        # They may be NumPy's integers of 8 bits, which overflow at 128 or 256.
        meta.update(epoch=int(meta['epoch']), iter=int(meta['iter']))
        keep_sound_state(messages, updates=meta['iter'])
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook):
                keep_own_names(
                    messages['runtime_info'],
                    folder_of(hook, runner.work_dir),
                    hook.filename_tmpl,
                )
