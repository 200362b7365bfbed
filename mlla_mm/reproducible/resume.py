# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Where an interrupted run goes on, and what it takes over from its checkpoint."""

import logging
import os
import re
import zipfile
from numbers import Integral, Real
from pathlib import Path
from string import Formatter
from typing import Any, Dict, List, Optional, Pattern, Tuple, Union

from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from torch import Tensor

from ..checkpoints.reader import CheckpointError, read_checkpoint_meta
from ..utils.text import printable

PREEMPTED_NAME = 'preempted_iter_{}.pth'
"""Name of the checkpoint of a run that was told to stop, after so many updates."""

# Not the best ones: those are of any time.
_NAME = re.compile(r'(preempted_)?(epoch|iter)_([0-9]+)\.pth')
# Nobody keeps more old checkpoints than this, and each costs a look at the disk.
_MOST_KEPT = 1000
# What MMEngine's message hub consists of.
_MESSAGES = ('log_scalars', 'runtime_info', 'resumed_keys')


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
        if match and path.is_file():
            # Of the same number, that of a stopped run is saved after the other.
            found[match[2]].append((int(match[3]), match[1] is not None, path))
    newest = [path for path in map(_newest_whole, found.values()) if path is not None]
    if newest:
        # How many updates an epoch has, only the files know.
        return newest[0] if len(newest) == 1 else max(newest, key=_updates)
    return None if any(found.values()) else _elsewhere(Path(work_dir))


def seed_of(checkpoint: Union[str, Path]) -> Optional[int]:
    """The random seed of the run that saved a checkpoint.

    MMEngine reads it when the data loaders have been built with another one.

    Args:
        checkpoint (str | Path): A checkpoint file.

    Returns:
        int | None: The seed; None if the checkpoint has none.

    Raises:
        CheckpointError: If the file is damaged or no checkpoint, or the seed is none.
    """
    seed = read_checkpoint_meta(checkpoint).get('seed')
    _require_seed(seed, checkpoint)
    return seed


def require_resumable(checkpoint: Any, source: Union[str, Path]) -> None:
    """Refuse a checkpoint that a run cannot go on from.

    Args:
        checkpoint (Any): What the file holds.
        source (str | Path): The file.

    Raises:
        CheckpointError: If it does not say how far its run has come, or nonsense.
    """
    parts = checkpoint if isinstance(checkpoint, dict) else {}
    meta, messages = parts.get('meta'), parts.get('message_hub')
    lacking = [
        f'meta.{name}'
        for name in ('epoch', 'iter')
        if not isinstance(meta, dict) or not _is_count(meta.get(name))
    ]
    lacking += [
        f'message_hub.{name}'
        for name in _MESSAGES
        if not isinstance(messages, dict) or not isinstance(messages.get(name), dict)
    ]
    if lacking:
        raise CheckpointError(
            f'{printable(source)} cannot be resumed: {", ".join(lacking)} is missing '
            'or not as a training saves it. Start from its weights with load_from '
            'instead.'
        )
    _require_seed(meta.get('seed'), source)


def keep_sound_state(messages: Dict[str, Any], updates: int) -> None:
    """Leave in a resumed state what a training can have written there.

    What MMEngine would log and a terminal would not show as it is goes, and so does
    state that the training would stumble over.

    Args:
        messages (dict): ``message_hub`` of a checkpoint; changed in place.
        updates (int): How many updates its run has made.
    """
    for part in _MESSAGES:
        for name in [x for x in messages[part] if not _is_shown(x)]:
            messages[part].pop(name)
    state = messages['runtime_info']
    for name, value in list(state.items()):
        if name == 'epoch_begun':
            is_sound = (
                isinstance(value, dict)
                and all(_is_count(value.get(x)) for x in ('epoch', 'iter', 'updates'))
                and value['iter'] <= updates
            )
        elif name.startswith('best_score'):
            is_sound = isinstance(value, Real) or (
                isinstance(value, Tensor) and value.numel() == 1
            )
        else:
            is_sound = not isinstance(value, str) or _is_shown(value)
        if not is_sound:
            state.pop(name)


def folder_of(hook: CheckpointHook, work_dir: str) -> str:
    """Where MMEngine's hook will save, which settles it when the training starts."""
    if hook.out_dir is None or hook.out_dir == work_dir:
        return work_dir
    return os.path.join(hook.out_dir, os.path.basename(work_dir.rstrip(os.sep)))


def keep_own_names(state: Dict[str, Any], folder: str, template: str) -> None:
    """Let a resumed state name checkpoints of this run alone.

    MMEngine's ``CheckpointHook`` removes and publishes what the state names, folders
    too. The names become those of files directly in this run's folder, which need not
    be where it was when the checkpoint was saved; others go.

    Args:
        state (dict): ``runtime_info`` of MMEngine's message hub; changed in place.
        folder (str): Where this run saves checkpoints.
        template (str): Name of its checkpoints, with {} for their number.
    """
    own = checkpoint_names(template)
    for key in [x for x in state if str(x).startswith(('last_ckpt', 'best_ckpt'))]:
        path = state.pop(key)
        name = os.path.basename(path) if isinstance(path, str) else ''
        is_best = name.startswith('best_')
        path = os.path.join(folder, name)
        # Nothing is to be done with a best one that is no longer there.
        is_there = os.path.isfile(path) or not (is_best and os.path.isdir(folder))
        if own.fullmatch(name) and is_best == key.startswith('best_') and is_there:
            state[key] = path
    if 'keep_ckpt_ids' in state:
        numbers = state['keep_ckpt_ids']
        numbers = numbers if isinstance(numbers, (list, tuple)) else ()
        known = sorted({x for x in numbers if _is_count(x)})[-_MOST_KEPT:]
        state['keep_ckpt_ids'] = [
            x
            for x in known
            if not os.path.isdir(os.path.join(folder, template.format(x)))
        ]


def checkpoint_names(template: str) -> Pattern:
    """The names under which MMEngine's ``CheckpointHook`` saves.

    Args:
        template (str): Its ``filename_tmpl``, with {} for a number.

    Returns:
        Pattern: Of names of the template, epoch_N.pth and iter_N.pth, and of the best
        ones of these: best_METRIC_NAME.
    """
    own = ''.join(
        re.escape(text) + ('' if field is None else '[0-9]+')
        for text, field, *_ in Formatter().parse(template)
    )
    return re.compile(rf'(best_[^/\n]+_)?({own}|(epoch|iter)_[0-9]+\.pth)')


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


def _elsewhere(work_dir: Path) -> Optional[Path]:
    """The checkpoint that MMEngine's ``last_checkpoint`` names, a file or a folder."""
    pointer = work_dir / 'last_checkpoint'
    if not pointer.is_file():
        return None
    with pointer.open('rb') as file:
        name = os.fsdecode(file.read(4096)).strip()  # paths are not longer
    base = os.path.basename(name)
    # In the work_dir first, which may have been moved or copied.
    for path in (os.path.join(work_dir, base) if base.strip('.') else '', name):
        if path.isprintable() and (os.path.isfile(path) or os.path.isdir(path)):
            return Path(path)
    return None


def _updates(checkpoint: Path) -> int:
    updates = read_checkpoint_meta(checkpoint).get('iter', 0)
    return updates if _is_count(updates) else 0


def _require_seed(seed: Any, source: Union[str, Path]) -> None:
    if seed is not None and not (_is_count(seed) and seed < 2**32):
        raise CheckpointError(
            f'{printable(source)} cannot be resumed: its seed is {printable(seed)}, no '
            'number from 0 to 2 ** 32 - 1. Start from its weights with load_from '
            'instead.'
        )


def _is_count(value: Any) -> bool:
    is_number = isinstance(value, Integral) and not isinstance(value, bool)
    return is_number and 0 <= value < 2**63


def _is_shown(text: Any) -> bool:
    """Whether it is text that a terminal shows as it is."""
    return isinstance(text, str) and text.isprintable()
