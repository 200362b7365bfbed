# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Where an interrupted run goes on."""

import logging
import re
import zipfile
from pathlib import Path
from typing import Dict, List, Optional, Tuple, Union

from mmengine.logging import print_log
from mmengine.runner import find_latest_checkpoint

from ..utils.checkpoint_file import read_checkpoint_meta

PREEMPTED_NAME = 'preempted_iter_{}.pth'
"""Name of the checkpoint of a run that was told to stop, after so many updates."""

# Not the best ones: those are of any time.
_NAME = re.compile(r'(preempted_)?(epoch|iter)_(\d+)\.pth')


def newest_checkpoint(work_dir: Union[str, Path]) -> Optional[Path]:
    """The furthest checkpoint of a run that is whole.

    MMEngine's ``last_checkpoint`` names one whether it is there and whole or not; it is
    believed where the checkpoints are not files of the work_dir.

    Args:
        work_dir (str | Path): Folder of the run.

    Returns:
        Path | None: The checkpoint; None if there is none.

    Raises:
        CheckpointError: If checkpoints of epochs and of iterations have to be compared,
            and one is none.
    """
    found: Dict[str, List[Tuple[int, bool, Path]]] = {'iter': [], 'epoch': []}
    for path in Path(work_dir).glob('*.pth'):
        match = _NAME.fullmatch(path.name)
        if match:
            # Of the same number, that of a stopped run is saved after the other.
            found[match[2]].append((int(match[3]), match[1] is not None, path))
    newest = [path for path in map(_newest_whole, found.values()) if path is not None]
    if newest:
        # How many updates an epoch has, only the files know.
        return newest[0] if len(newest) == 1 else max(newest, key=_updates)
    if any(found.values()) or not (Path(work_dir) / 'last_checkpoint').exists():
        return None
    elsewhere = find_latest_checkpoint(str(work_dir))
    return Path(elsewhere) if elsewhere and Path(elsewhere).exists() else None


def seed_of(checkpoint: Union[str, Path]) -> Optional[int]:
    """The random seed of the run that saved a checkpoint.

    MMEngine reads it when the data loaders have been built with another one.

    Args:
        checkpoint (str | Path): A checkpoint file.

    Raises:
        CheckpointError: If the file is damaged or no checkpoint.
    """
    return read_checkpoint_meta(checkpoint).get('seed')


def _newest_whole(numbered: List[Tuple[int, bool, Path]]) -> Optional[Path]:
    for *_, path in sorted(numbered, reverse=True):
        # The table of contents is at the end, so a file that was cut short has none.
        if zipfile.is_zipfile(path):
            return path
        print_log(
            f'{path} is damaged; looking for the one before it.',
            level=logging.WARNING,
        )
    return None


def _updates(checkpoint: Path) -> int:
    return read_checkpoint_meta(checkpoint).get('iter', 0)
