# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Which keys of a config are read, and which key is meant by one that is not."""

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from mmengine.config import Config
from mmengine.runner import Runner

from ..utils.text import listed, nearest, printable
from .parts import Keys, has_own_runner, paths_of

#: Keys of a config that something reads: MMEngine's runners, its Config, our tools.
READ = frozenset(
    [
        *(name for name in inspect.signature(Runner).parameters if name != 'cfg'),
        # Read from the config itself by Runner, FlexibleRunner or Config.
        *('runner_type', 'strategy', 'model_wrapper_cfg', 'sync_bn', 'compile'),
        *('find_unused_parameters', 'activation_checkpointing', 'custom_imports'),
        'efficient_conv_bn_eval',
        # Ours; OpenMMLab's tools read the first two as well.
        *('tta_model', 'tta_pipeline', 'allow_empty_classes', 'trust_checkpoint'),
        'skip_corrupt_images',  # an error of its own says where it belongs
    ]
)

#: Keys of configs before MMEngine (mmdet 2.x, mmseg 0.x, mmcls), and today's.
OLD_KEYS: Dict[str, str] = {
    'data': 'train_dataloader',
    'data.samples_per_gpu': 'train_dataloader.batch_size',
    'data.workers_per_gpu': 'train_dataloader.num_workers',
    'data.persistent_workers': 'train_dataloader.persistent_workers',
    **{
        f'data.{split}{old}': f'{split}_dataloader{new}'
        for split in ('train', 'val', 'test')
        for old, new in (
            ('', '.dataset'),
            ('.samples_per_gpu', '.batch_size'),
            ('_dataloader', ''),
            ('_dataloader.samples_per_gpu', '.batch_size'),
            ('_dataloader.workers_per_gpu', '.num_workers'),
        )
    },
    'runner': 'train_cfg',
    'total_epochs': 'train_cfg.max_epochs',
    'total_iters': 'train_cfg.max_iters',
    'optimizer': 'optim_wrapper.optimizer',
    'optimizer_config': 'optim_wrapper',
    'optimizer_config.grad_clip': 'optim_wrapper.clip_grad',
    'paramwise_cfg': 'optim_wrapper.paramwise_cfg',
    'fp16': 'optim_wrapper.type=AmpOptimWrapper',
    'lr_config': 'param_scheduler',
    'momentum_config': 'param_scheduler',
    'evaluation': 'val_evaluator',
    'evaluation.interval': 'train_cfg.val_interval',
    'evaluation.save_best': 'default_hooks.checkpoint.save_best',
    'evaluation.rule': 'default_hooks.checkpoint.rule',
    'checkpoint_config': 'default_hooks.checkpoint',
    'log_config': 'default_hooks.logger',
    'log_interval': 'default_hooks.logger.interval',
    'num_epochs': 'train_cfg.max_epochs',
    'epochs': 'train_cfg.max_epochs',
    'log_config.hooks': 'visualizer.vis_backends',
    'workflow': 'train_cfg.val_interval',
    'dist_params': 'env_cfg.dist_cfg',
    'cudnn_benchmark': 'env_cfg.cudnn_benchmark',
    'mp_start_method': 'env_cfg.mp_cfg.mp_start_method',
    'opencv_num_threads': 'env_cfg.mp_cfg.opencv_num_threads',
    'seed': 'randomness.seed',
    'deterministic': 'randomness.deterministic',
    'resume_from': '--resume PATH',
    'auto_resume': '--resume',
    'gpu_ids': 'CUDA_VISIBLE_DEVICES in the environment',
    'gpus': 'CUDA_VISIBLE_DEVICES in the environment',
    'device': 'CUDA_VISIBLE_DEVICES in the environment',
}
# Top-level names that configs of today use for variables of their own.
_STILL_USED = {'deterministic', 'device', 'gpus', 'paramwise_cfg', 'seed'}


def require_read(cfg: Config, options: Mapping[str, Any]) -> None:
    """Check that ``--cfg-options`` change something that is read.

    A key is read if it begins with one of :data:`READ`. A variable of the config file
    may be read by somebody's own code, unless its value went into a key of that name.

    Args:
        cfg (Config): The config before the options are merged.
        options (Mapping): Values by keys with dots.

    Raises:
        ValueError: Names the key that nothing reads, and the one that is meant.
    """
    if has_own_runner(cfg):
        return
    for key, value in options.items():
        first, *rest = key.split('.')
        if first == 'launcher':
            raise ValueError(
                '--cfg-options launcher is not read: the option is --launcher.'
            )
        if first in READ:
            continue
        if first not in cfg:
            meant = _meant(cfg, key)
            raise ValueError(
                f'--cfg-options {_assigned(key, value)}: nothing reads {first}. '
                + (f'Is {_choice(meant, value)} meant?' if meant else _where(cfg))
            )
        used = ['.'.join([*path, *rest]) for path in _uses(cfg, first)]
        # Whoever sets them too knows.
        used = [x for x in used if x not in options]
        if used:
            raise ValueError(
                f'--cfg-options {_assigned(key, value)}: {first} is a variable of the '
                'config file. Its value was used when the file was read, and nothing '
                f'reads it now. Set {_choice(used, value, "and")} instead.'
            )


def require_place(cfg: Config, options: Mapping[str, Any]) -> None:
    """Check that the values above the keys of ``--cfg-options`` can have such keys.

    Args:
        cfg (Config): The config before the options are merged.
        options (Mapping): Values by keys with dots.

    Raises:
        ValueError: Names the key, what stands in its place, and what to write.
    """
    for key in options:
        names = key.split('.')
        value: Any = cfg
        for i, name in enumerate(names):
            place = '.'.join(names[:i])
            if f'{place}._delete_' in options or name == '_delete_':
                break
            if isinstance(value, list) and i:
                value = _item(value, names, i)
            elif isinstance(value, (Mapping, Config)):
                if name not in value:
                    break
                value = value[name]
            elif value is None:
                break
            else:
                raise ValueError(
                    f'--cfg-options {key}: {place} is {_shown(value)}, which has no '
                    f'keys. Set {place} as a whole, or add {place}._delete_=True for a '
                    'dict in its place.'
                )


def _item(items: list, names: Sequence[str], i: int) -> Any:
    """The item of a list that a key names by its number."""
    key, place, name = '.'.join(names), '.'.join(names[:i]), names[i]
    if not name.isdigit() or int(name) >= len(items):
        raise ValueError(
            f'--cfg-options {key}: {place} is a list of {len(items)}, which has no '
            f'{name}. Its items have the numbers 0 to {len(items) - 1}.'
        )
    # MMEngine merges into items, and replaces none.
    if i == len(names) - 1:
        raise ValueError(
            f'--cfg-options {key} would replace an item of a list. Set {place} as a '
            'whole, or keys of the item.'
        )
    return items[int(name)]


def describe_old_keys(cfg: Config) -> Optional[str]:
    """Say which names of a config are of the time before MMEngine.

    Args:
        cfg (Config): The config that is run.

    Returns:
        str | None: A line with today's place of each. None if there are no such names,
        or if all are variables, whose values stand in another key.
    """
    if has_own_runner(cfg):
        return None
    known = OLD_KEYS.keys() - READ - _STILL_USED
    names = [x for x in cfg if x in known and not _is_used(cfg, x)]
    if not names:
        return None
    places = ', '.join(f'{name} (now {OLD_KEYS[name]})' for name in names)
    return (
        f'Warning: {cfg.filename} has {places}. Nothing reads these names of OpenMMLab '
        '2.x, unless code of your own does.'
    )


def _is_used(cfg: Config, name: str) -> bool:
    """Whether a file of a config uses a variable, as ``optimizer=optimizer`` does."""
    use = rf'[=:(\[{{,*+]\s*(_base_\.)?{re.escape(name)}\b(?!\s*=)'
    in_text = re.search(use, cfg.text or '')
    return bool(in_text) or any(_uses(cfg, name))


def describe_unused(cfg: Config) -> List[str]:
    """Say which names of a config file are set to no effect.

    They are names that nothing reads, that the file itself does not use either, and
    that are like a key which is read: ``optim_wraper``, or ``max_epochs`` in a file
    whose base has used its own. If a key of that end has the value, all is well.

    Args:
        cfg (Config): The config as it was read.

    Returns:
        list[str]: A line for each of them.
    """
    if has_own_runner(cfg) or Path(cfg.filename or '').suffix != '.py':
        return []
    values = list(_read_paths(cfg))
    lines = []
    for name in _unused_names(Path(cfg.filename).read_text('utf-8')):
        # Old names have a line of their own.
        if name not in cfg or name in READ or name in OLD_KEYS.keys() - _STILL_USED:
            continue
        meant = [OLD_KEYS[name]] if name in OLD_KEYS else _ending_in(cfg, [name])
        near = nearest(name, READ, cutoff=0.9)
        meant = meant or ([near] if near else [])
        in_force = [value for path, value in values if '.'.join(path) in meant]
        # Of other keys, it is unclear which is meant.
        is_clear = len(meant) == 1 or all('_dataloader.' in key for key in meant)
        if meant and is_clear and cfg[name] not in in_force:
            lines.append(
                f'Warning: {cfg.filename} sets {name}, which nothing reads, unless '
                f'code of your own does. Set {listed(meant, "and")} instead.'
            )
    return lines


def _unused_names(text: str) -> List[str]:
    """The names to which a Python file gives values that it does not read."""
    tree = ast.parse(text)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    read = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    targets = [
        target
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
    ]
    given = [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in dict.fromkeys(given) if name not in read]


def _read_paths(cfg: Config) -> Iterator[Tuple[Keys, Any]]:
    return ((path, x) for path, x in paths_of(cfg) if path[0] in READ)


def _uses(cfg: Config, name: str) -> Iterator[Keys]:
    """The keys that took name and value of a variable, such as ``max_epochs``.

    For a list or a dict, the end of the name is enough: ``train_pipeline``.
    """
    value = cfg[name]
    is_whole = isinstance(value, (Mapping, list, tuple)) and len(value) > 0
    for path, other in _read_paths(cfg):
        ends = '_'.join(path).endswith(f'_{name}') or (
            is_whole and f'_{name}'.endswith(f'_{path[-1]}')
        )
        if ends and other == value:
            yield path


def _meant(cfg: Config, key: str) -> List[str]:
    """Keys that may be meant by one whose first name is unknown."""
    names = key.split('.')
    for end in range(len(names), 0, -1):
        old = '.'.join(names[:end])
        if old in OLD_KEYS:
            return ['.'.join([OLD_KEYS[old], *names[end:]])]
    found = _ending_in(cfg, names)
    if found:
        return found
    near = nearest(names[0], READ, cutoff=0.7)
    if near:
        return ['.'.join([near, *names[1:]])]
    inner = {path[-1] for path, _ in _read_paths(cfg) if not path[-1].isdigit()}
    near = nearest(names[0], inner)
    return _ending_in(cfg, [near, *names[1:]]) if near else []


def _ending_in(cfg: Config, names: Sequence[str]) -> List[str]:
    """The keys that end in as many of some names as possible, with the other names."""
    for end in range(len(names), 0, -1):
        found = [
            '.'.join([*path, *names[end:]])
            for path, _ in _read_paths(cfg)
            if list(path[-end:]) == list(names[:end])
        ]
        if found:
            return found
    return []


def _where(cfg: Config) -> str:
    known = sorted(READ.intersection(cfg))
    return f'The config has {", ".join(known)}.' if known else 'The config is empty.'


def _choice(keys: Sequence[str], value: Any, word: str = 'or') -> str:
    # Some of OLD_KEYS are now an option of a tool, or a value.
    shown = [
        _assigned(key, value) if re.fullmatch(r'[\w.]+', key) else key for key in keys
    ]
    return listed(shown, word)


def _assigned(key: str, value: Any) -> str:
    return f'{printable(key)}={_shown(value)}'


def _shown(value: Any) -> str:
    return printable(value if isinstance(value, str) else repr(value), 60)
