# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import List, Union

from mmengine.dist import is_main_process, master_only
from mmengine.fileio import register_backend
from mmengine.fileio.backends import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS

from ...utils.checkpoint_file import read_checkpoint_meta
from ...utils.files import write_whole
from ..resume import PREEMPTED_NAME


@register_backend('whole_file')
class WholeFileBackend(LocalBackend):
    """MMEngine's local files, but a file that is written is there whole or not."""

    def put(self, obj: bytes, filepath: Union[str, Path]) -> None:
        try:
            write_whole(filepath, obj)
        except OSError as error:
            raise OSError(
                error.errno,
                f'{filepath} was not saved ({error.strerror}); earlier checkpoints are '
                'as they were. Make room or choose another --work-dir, and go on with '
                '--resume',
            ) from error


class _RemoveLater:
    """A storage backend that keeps in mind what it is asked to remove.

    Args:
        backend (BaseStorageBackend): Does all the rest.
    """

    def __init__(self, backend) -> None:
        self.removed: List[str] = []
        self._backend = backend

    def remove(self, filepath: str) -> None:
        self.removed.append(filepath)

    def __getattr__(self, name: str):
        return getattr(self._backend, name)


@HOOKS.register_module()
class WholeCheckpointHook(CheckpointHook):
    """MMEngine's hook, but a kill or a full disk costs no checkpoint.

    A checkpoint gets its name when it is complete, and an old one is removed after
    that, as are those of :class:`PreemptionHook`; MMEngine removes it before it begins
    to write.

    Args:
        *args, **kwargs: As :class:`mmengine.hooks.CheckpointHook` takes them.
    """

    def __init__(self, *args, **kwargs) -> None:
        if 'file_client_args' not in kwargs and kwargs.get('backend_args') is None:
            kwargs['backend_args'] = dict(backend='whole_file')
        super().__init__(*args, **kwargs)

    def before_train(self, runner) -> None:
        super().before_train(runner)
        if runner.iter > 0:
            # MMEngine forgets it, and then does not save that a checkpoint is the best.
            self.last_ckpt = runner.message_hub.get_info('last_ckpt')
        if is_main_process() and self.file_backend.isdir(self.out_dir):
            # What a killed process was writing.
            for part in Path(self.out_dir).glob('.*.pth.part'):
                part.unlink()

    def _save_checkpoint_with_step(self, runner, step, meta) -> None:
        with self._removals_last():
            super()._save_checkpoint_with_step(runner, step, meta)
        self._remove_preempted(runner)

    def _save_best_checkpoint(self, runner, metrics) -> None:
        with self._removals_last():
            super()._save_best_checkpoint(runner, metrics)

    def after_train(self, runner) -> None:
        super().after_train(runner)
        last = self.last_ckpt
        # The last evaluation alone was left to do, and nothing to save.
        if last and Path(last).is_file():
            if read_checkpoint_meta(last).get('iter') == runner.iter:
                self._remove_preempted(runner)

    @master_only
    def _remove_preempted(self, runner) -> None:
        for path in Path(runner.work_dir).glob(PREEMPTED_NAME.format('*')):
            path.unlink()

    @contextmanager
    def _removals_last(self) -> Iterator[None]:
        """Remove what is asked to be removed at the end, if all went well."""
        backend = self.file_backend
        self.file_backend = _RemoveLater(backend)
        try:
            yield
            for path in self.file_backend.removed:
                backend.remove(path)
        finally:
            self.file_backend = backend
