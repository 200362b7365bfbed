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
    """Take over from a resumed checkpoint what is this run's business.

    MMEngine believes what a checkpoint says of its run: how far it has come, and which
    files it has saved, some to be removed later.

    Raises:
        CheckpointError: If a run cannot go on from the checkpoint.
    """

    # Before anything looks at the checkpoint.
    priority = 'HIGHEST'

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        if not is_resumed(runner):
            return
        source = checkpoint_of(runner) or f'the newest checkpoint of {runner.work_dir}'
        require_resumable(checkpoint, source)
        messages, meta = checkpoint['message_hub'], checkpoint['meta']
        # NumPy's integers may be of 8 bits, and 256 updates none.
        meta.update(epoch=int(meta['epoch']), iter=int(meta['iter']))
        keep_sound_state(messages, updates=meta['iter'])
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook):
                keep_own_names(
                    messages['runtime_info'],
                    folder_of(hook, runner.work_dir),
                    hook.filename_tmpl,
                )
