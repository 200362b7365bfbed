# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import List, Optional, Union

from mmengine.dist import is_main_process, master_only
from mmengine.fileio import register_backend
from mmengine.fileio.backends import LocalBackend
from mmengine.logging import print_log
from mmengine.registry import HOOKS

from ...checkpoints.reader import read_checkpoint_meta
from ...compat.openmmlab import CheckpointHookSteps
from ...reproducible.resume import PREEMPTED_NAME, checkpoint_names
from ...utils.files import write_whole
from ...utils.text import printable


@register_backend('whole_file')
class WholeFileBackend(LocalBackend):
    """MMEngine's local files, but a file is written completely or not at all."""

    def put(self, obj: bytes, filepath: Union[str, Path]) -> None:
        try:
            write_whole(filepath, obj)
        except OSError as error:
            raise OSError(
                error.errno,
                f'{filepath} was not saved ({error.strerror}); earlier checkpoints are '
                'unchanged. Make room or choose another --work-dir, and continue with '
                '--resume',
            ) from error


class _OwnFiles:
    """A storage backend that removes only checkpoint files of this run.

    Args:
        backend (BaseStorageBackend): The backend for everything else.
        hook (WholeCheckpointHook): Knows which files are its own.

    Attributes:
        removed (list[str] | None): A list collects the files to remove. None removes
            them at once.
    """

    def __init__(self, backend, hook: 'WholeCheckpointHook') -> None:
        self.removed: Optional[List[str]] = None
        self._backend = backend
        self._hook = hook

    def remove(self, filepath: str) -> None:
        if self.removed is not None:
            self.removed.append(filepath)
        elif self._hook.is_own(filepath):
            self._backend.remove(filepath)
        else:
            self.rmtree(filepath)

    def rmtree(self, dir_path: str) -> None:
        """Warn instead of removing: this hook saves no folders."""
        print_log(
            f'{printable(dir_path)} is not removed: it is not a checkpoint file of '
            'this run. Remove it if you do not need it.',
            logger='current',
            level=logging.WARNING,
        )

    def __getattr__(self, name: str):
        return getattr(self._backend, name)


@HOOKS.register_module()
class WholeCheckpointHook(CheckpointHookSteps):
    """MMEngine's hook, but a kill or a full disk does not destroy a checkpoint.

    A checkpoint gets its name when it is complete. Only then an old one is removed, and
    the one of :class:`PreemptionHook`. (MMEngine removes it before it begins to write.)

    A resumed checkpoint cannot make the hook remove or publish other files. It removes
    and publishes only checkpoints of this run: files in its folder, no links and no
    folders, with the names that this hook gives.

    Args: Those of :class:`mmengine.hooks.CheckpointHook`.
    """

    def __init__(self, *args, **kwargs) -> None:
        if 'file_client_args' not in kwargs and kwargs.get('backend_args') is None:
            kwargs['backend_args'] = dict(backend='whole_file')
        super().__init__(*args, **kwargs)

    @property
    def file_backend(self):
        """_OwnFiles: The storage that MMEngine's hook chose in ``before_train``."""
        return self._file_backend

    @file_backend.setter
    def file_backend(self, backend) -> None:
        # Not later: MMEngine may remove files right after it has set the backend.
        self._file_backend = _OwnFiles(backend, self)

    def before_train(self, runner) -> None:
        super().before_train(runner)
        if runner.iter > 0:
            # MMEngine forgets it, and then does not note that a checkpoint is the best.
            self.last_ckpt = runner.message_hub.get_info('last_ckpt')
        if is_main_process():
            if self.file_backend.isdir(self.out_dir):
                # Incomplete files of a killed process.
                for part in Path(self.out_dir).glob('.*.pth.part'):
                    _unlink(part)
            pointer = Path(runner.work_dir) / 'last_checkpoint'
            # MMEngine would write to a link's target, or wait for a pipe's reader.
            if pointer.is_symlink() or not pointer.is_file():
                _unlink(pointer)

    def is_own(self, path: str) -> bool:
        """Whether a file is a checkpoint of this run, by its folder and name."""
        folder = os.path.join(self.out_dir, '')
        names = checkpoint_names(self.filename_tmpl)
        return (
            path.startswith(folder)
            and names.fullmatch(path[len(folder) :]) is not None
            and not os.path.islink(path)
        )

    def saved_usual(self, runner) -> None:
        self._remove_preempted(runner)

    def after_train(self, runner) -> None:
        super().after_train(runner)
        last = self.last_ckpt
        # A resumed run may have had only an evaluation left to do, and nothing to save.
        if last and Path(last).is_file():
            if read_checkpoint_meta(last).get('iter') == runner.iter:
                self._remove_preempted(runner)

    def publishes(self, path: Optional[str]) -> bool:
        # None if no model was the best. A run that was moved may not have its file.
        is_own = path is not None and self.is_own(path)
        return is_own and self.file_backend.isfile(path)

    @master_only
    def _remove_preempted(self, runner) -> None:
        for path in Path(runner.work_dir).glob(PREEMPTED_NAME.format('*')):
            _unlink(path)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Delay removals until the end; nothing is removed if saving fails."""
        removed: List[str] = []
        # MMEngine may save a usual checkpoint within the saving of a best one.
        outer, self.file_backend.removed = self.file_backend.removed, removed
        try:
            yield
        finally:
            self.file_backend.removed = outer
        for path in removed:
            self.file_backend.remove(path)


def _unlink(path: Path) -> None:
    """Remove a file or a link, but no folder."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        path.unlink()
