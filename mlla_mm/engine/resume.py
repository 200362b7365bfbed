# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Where an interrupted run goes on."""

import logging
import re
import zipfile
from pathlib import Path
from typing import Optional, Union

from mmengine.logging import print_log
from mmengine.runner import find_latest_checkpoint

from ..utils.checkpoint_file import load_checkpoint_file

# Not the best ones: those are of any time.
_NAME = re.compile(r'(?:epoch|iter)_(\d+)\.pth')


def newest_checkpoint(work_dir: Union[str, Path]) -> Optional[Path]:
    """The newest checkpoint of a run that is whole.

    MMEngine's ``last_checkpoint`` names one whether it is there and whole or not; it is
    believed where the checkpoints are not files of the work_dir.

    Args:
        work_dir (str | Path): Folder of the run.

    Returns:
        Path | None: The checkpoint; None if there is none.
    """
    found = {}
    for path in Path(work_dir).glob('*.pth'):
        match = _NAME.fullmatch(path.name)
        if match:
            found[int(match[1])] = path
    for number in sorted(found, reverse=True):
        # The table of contents is at the end, so a file that was cut short has none.
        if zipfile.is_zipfile(found[number]):
            return found[number]
        print_log(
            f'{found[number]} is damaged; looking for the one before it.',
            level=logging.WARNING,
        )
    elsewhere = None if found else find_latest_checkpoint(str(work_dir))
    return Path(elsewhere) if elsewhere and Path(elsewhere).exists() else None


def seed_of(checkpoint: Union[str, Path]) -> Optional[int]:
    """The random seed of the run that saved a checkpoint.

    MMEngine reads it when the data loaders have been built with another one.

    Args:
        checkpoint (str | Path): A checkpoint file.

    Raises:
        CheckpointError: If the file is damaged or no checkpoint.
    """
    content = load_checkpoint_file(checkpoint)
    meta = content.get('meta') if isinstance(content, dict) else None
    return meta.get('seed') if isinstance(meta, dict) else None
