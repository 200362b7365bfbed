# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Which checkpoint a run resumes, and what the run takes over from it."""

import logging
import os
import re
import zipfile
from numbers import Integral, Real
from pathlib import Path
from string import Formatter
from typing import Any, Dict, List, Optional, Pattern, Tuple, Union

from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from torch import Tensor

from ..checkpoints.layout import SWAPPED_KEY, find_weights
from ..checkpoints.reader import CheckpointError, read_checkpoint_meta
from ..compat.openmmlab import checkpoint_of, is_resumed
from ..utils.text import printable

PREEMPTED_NAME = 'preempted_iter_{}.pth'
"""Name of the checkpoint of a preempted run; {} is the number of updates made."""

SETTINGS_KEY = 'training_settings'
"""Where the message hub has what the optimiser's state does not tell of a run."""

# The best checkpoints are left out: they may be of any time.
_NAME = re.compile(r'(preempted_)?(epoch|iter)_([0-9]+)\.pth')
# No run keeps more old checkpoints than this. Each one costs a look at the disk.
_MOST_KEPT = 1000
# The parts of MMEngine's message hub.
_MESSAGES = ('log_scalars', 'runtime_info', 'resumed_keys')


def newest_checkpoint(work_dir: Union[str, Path]) -> Optional[Path]:
    """Find the newest checkpoint of a run that is complete.

    MMEngine's file ``last_checkpoint`` may name a checkpoint that is missing or cut
    off. So it is read only if the work_dir has no checkpoints.

    Args:
        work_dir (str | Path): Folder of the run.

    Returns:
        Path | None: The checkpoint; None if there is none.

    Raises:
        CheckpointError: If checkpoints of epochs and of iterations have to be compared,
            and one of them cannot be read.
    """
    found: Dict[str, List[Tuple[int, bool, Path]]] = {'iter': [], 'epoch': []}
    for path in Path(work_dir).glob('*.pth'):
        match = _NAME.fullmatch(path.name)
        if match and path.is_file():
            # Of two with the same number, the preempted one was saved later.
            found[match[2]].append((int(match[3]), match[1] is not None, path))
    iteration, epoch = _newest_whole(found['iter']), _newest_whole(found['epoch'])
    if iteration and epoch:
        return iteration if _is_behind(iteration, epoch) else epoch
    if iteration or epoch:
        return iteration or epoch
    return None if any(found.values()) else _elsewhere(Path(work_dir))


def seed_of(checkpoint: Union[str, Path]) -> Optional[int]:
    """Read the random seed of the run that saved a checkpoint.

    MMEngine reads the seed too late: it has then built the data loaders with another.

    Args:
        checkpoint (str | Path): A checkpoint file.

    Returns:
        int | None: The seed; None if the checkpoint has none.

    Raises:
        CheckpointError: If the file is damaged or no checkpoint, or if the seed is no
            number from 0 to 2 ** 32 - 1.
    """
    seed = read_checkpoint_meta(checkpoint).get('seed')
    _require_seed(seed, checkpoint)
    return seed


@HOOKS.register_module()
class ResumedStateHook(Hook):
    """Check the state of a checkpoint before a run takes it over.

    MMEngine trusts a checkpoint: its progress, and the names of files, which it may
    remove later. This hook removes what no training can have written, and names of
    files that are not this run's. Without MMEngine's EMAHook in the run, it takes the
    plain weights of such a hook's checkpoint, not the average, which MMEngine takes.

    Raises:
        CheckpointError: If a run cannot go on from the checkpoint.
    """

    # Before any other hook reads the checkpoint.
    priority = 'HIGHEST'

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        if not is_resumed(runner):
            return
        require_resumable(checkpoint, source_of(runner))
        messages, meta = checkpoint['message_hub'], checkpoint['meta']
        # They may be NumPy's integers of 8 bits, which overflow at 128 or 256.
        meta.update(epoch=int(meta['epoch']), iter=int(meta['iter']))
        keep_sound_state(messages, updates=meta['iter'])
        _resume_plain_weights(runner, checkpoint)
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook):
                keep_own_names(
                    messages['runtime_info'],
                    folder_of(hook, runner.work_dir),
                    hook.filename_tmpl,
                )
        # MMEngine warns of the others.
        known = {*messages['log_scalars'], *messages['runtime_info']}
        messages['resumed_keys'] = {
            name: True
            for name, is_saved in messages['resumed_keys'].items()
            if is_saved is True and name in known
        }


def _resume_plain_weights(runner, checkpoint: dict) -> None:
    """Take the weights that were trained, if the run has no more EMAHook."""
    has_hook = any(isinstance(hook, EMAHook) for hook in runner.hooks)
    if has_hook or SWAPPED_KEY not in checkpoint:
        return
    checkpoint['state_dict'] = find_weights(checkpoint, source_of(runner), ema=False)
    checkpoint.pop(SWAPPED_KEY)
    print_log(
        f'From iteration {checkpoint["meta"]["iter"] + 1} on: no EMAHook. The plain '
        'weights of the checkpoint go on, and its average is left behind.',
        logger='current',
    )


def source_of(runner) -> str:
    """Name the checkpoint that a runner loads, for messages."""
    # None if MMEngine has searched the work_dir itself.
    return checkpoint_of(runner) or f'the newest checkpoint of {runner.work_dir}'


def require_resumable(checkpoint: Any, source: Union[str, Path]) -> None:
    """Refuse a checkpoint that a run cannot go on from.

    Args:
        checkpoint (Any): The content of the file.
        source (str | Path): The file, for the message.

    Raises:
        CheckpointError: If the progress, the seed or the logs are missing or not as a
            training saves them.
    """
    meta, messages = _dict_in(checkpoint, 'meta'), _dict_in(checkpoint, 'message_hub')
    lacking = [
        *[f'meta.{x}' for x in ('epoch', 'iter') if not is_count(meta.get(x))],
        *[
            f'message_hub.{x}'
            for x in _MESSAGES
            if not isinstance(messages.get(x), dict)
        ],
    ]
    if lacking:
        raise CheckpointError(
            f'{printable(source)} cannot be resumed: {", ".join(lacking)} is missing '
            'or not as a training saves it. Start from its weights with load_from '
            'instead.'
        )
    _require_seed(meta.get('seed'), source)


def keep_sound_state(messages: Dict[str, Any], updates: int) -> None:
    """Remove from a resumed state what no training can have written there.

    Two kinds of entries are removed: text with characters that are not printable, which
    MMEngine would log, and values that would end the training with an error.

    Args:
        messages (dict): ``message_hub`` of a checkpoint; changed in place.
        updates (int): How many updates the checkpoint's run has made.
    """
    for part in _MESSAGES:
        for name in [x for x in messages[part] if not _is_shown(x)]:
            messages[part].pop(name)
    state = messages['runtime_info']
    for name, value in list(state.items()):
        if name == 'epoch_begun':
            is_sound = (
                isinstance(value, dict)
                and all(is_count(value.get(x)) for x in ('epoch', 'iter', 'updates'))
                and value['iter'] <= updates
            )
        elif name == SETTINGS_KEY:
            is_sound = (
                isinstance(value, dict)
                and isinstance(value.get('by_epoch'), bool)
                and is_count(value.get('total_batch'))
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
    """Return the folder in which MMEngine's checkpoint hook will save.

    The hook sets its own ``out_dir`` to it when the training starts.
    """
    if hook.out_dir is None or hook.out_dir == work_dir:
        return work_dir
    return os.path.join(hook.out_dir, os.path.basename(work_dir.rstrip(os.sep)))


def keep_own_names(state: Dict[str, Any], folder: str, template: str) -> None:
    """Let a resumed state name this run's checkpoints, and nothing else.

    MMEngine's ``CheckpointHook`` removes and publishes the files and folders that the
    state names. After this call the state names files in the run's folder, which may
    have been moved since the checkpoint was saved. Other names are removed.

    Args:
        state (dict): ``runtime_info`` of MMEngine's message hub; changed in place.
        folder (str): The folder in which this run saves checkpoints.
        template (str): Name of its checkpoints, with {} for their number.
    """
    own = checkpoint_names(template)
    for key in [x for x in state if str(x).startswith(('last_ckpt', 'best_ckpt'))]:
        path = state.pop(key)
        name = os.path.basename(path) if isinstance(path, str) else ''
        is_best = name.startswith('best_')
        path = os.path.join(folder, name)
        # A best checkpoint may have been deleted since.
        is_there = os.path.isfile(path) or not (is_best and os.path.isdir(folder))
        if own.fullmatch(name) and is_best == key.startswith('best_') and is_there:
            state[key] = path
    if 'keep_ckpt_ids' in state:
        numbers = state['keep_ckpt_ids']
        numbers = numbers if isinstance(numbers, (list, tuple)) else ()
        known = sorted({x for x in numbers if is_count(x)})[-_MOST_KEPT:]
        state['keep_ckpt_ids'] = [
            x
            for x in known
            if not os.path.isdir(os.path.join(folder, template.format(x)))
        ]


def checkpoint_names(template: str) -> Pattern:
    """Return a pattern of the names under which MMEngine's ``CheckpointHook`` saves.

    Args:
        template (str): The hook's ``filename_tmpl``, with {} for a number.

    Returns:
        Pattern: Matches names of the template, epoch_N.pth, iter_N.pth, and each of
        them with best_METRIC_ in front.
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
    """Return the file or folder that MMEngine's ``last_checkpoint`` names."""
    pointer = work_dir / 'last_checkpoint'
    if not pointer.is_file():
        return None
    with pointer.open('rb') as file:
        name = os.fsdecode(file.read(4096)).strip()  # the longest path
    base = os.path.basename(name)
    # The work_dir may have been moved or copied, so look there first.
    for path in (os.path.join(work_dir, base) if base.strip('.') else '', name):
        if path.isprintable() and (os.path.isfile(path) or os.path.isdir(path)):
            return Path(path)
    return None


def _is_behind(checkpoint: Path, epoch: Path) -> bool:
    """Whether a checkpoint of an iteration is of a time after the end of an epoch.

    With another batch size than before, it may have counted fewer iterations.
    """
    meta = read_checkpoint_meta(checkpoint)
    if is_count(meta.get('epoch')):
        return meta['epoch'] >= int(epoch.stem.split('_')[-1])
    return _updates(meta) >= _updates(read_checkpoint_meta(epoch))


def _updates(meta: Dict[str, Any]) -> int:
    updates = meta.get('iter', 0)
    return updates if is_count(updates) else 0


def _require_seed(seed: Any, source: Union[str, Path]) -> None:
    if seed is not None and not (is_count(seed) and seed < 2**32):
        raise CheckpointError(
            f'{printable(source)} cannot be resumed: its seed is {printable(seed)}, '
            'not a number from 0 to 2 ** 32 - 1. Start from its weights with load_from '
            'instead.'
        )


def _dict_in(content: Any, key: str) -> Dict[str, Any]:
    """A dict in a dict; empty if there is none."""
    value = content.get(key) if isinstance(content, dict) else None
    return value if isinstance(value, dict) else {}


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0 on, which fits 64 bits."""
    is_number = isinstance(value, Integral) and not isinstance(value, bool)
    return is_number and 0 <= value < 2**63


def _is_shown(text: Any) -> bool:
    """Whether a value is text of printable characters."""
    return isinstance(text, str) and text.isprintable()
