# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Finds the parts of a config: its data sets, pipelines, hooks and weights."""

from collections.abc import Iterator, Mapping
from typing import Any, Dict, List, Optional, Tuple

from mmengine.config import Config

from ..utils.text import printable

SPLITS = ('train', 'val', 'test')
"""What ``_dataloader`` follows in the keys of a config."""


Keys = Tuple[str, ...]
"""Keys below one another, as ``--cfg-options`` joins them with dots."""


def paths_of(value: Any, path: Keys = ()) -> Iterator[Tuple[Keys, Any]]:
    """All keys of a config's part with their values, each before those below it."""
    if isinstance(value, (Mapping, Config)):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        return
    for key, item in items:
        yield (*path, key), item
        yield from paths_of(item, (*path, key))


def parts_of(config: Any) -> Iterator[dict]:
    """All dicts of a config's part, each before those that are in it."""
    if isinstance(config, dict):
        yield config
    for _, value in paths_of(config):
        if isinstance(value, dict):
            yield value


def value_at(config: Any, key: str) -> Any:
    """The value of a key with dots; None if something above it has no such key."""
    for name in key.split('.'):
        config = config.get(name) if isinstance(config, (Mapping, Config)) else None
    return config


def named_parts(value: Any, key: str) -> Iterator[Tuple[str, Mapping]]:
    """A dict of a config, or each dict of a list, with keys as for ``--cfg-options``.

    Args:
        value (Any): A config's value.
        key (str): Its key.
    """
    if isinstance(value, Mapping):
        yield key, value
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from named_parts(item, f'{key}.{i}')


def leaf_datasets(loader: Any) -> List[Tuple[str, Any]]:
    """The data sets of a data loader's config that read files, below all wrappers.

    A wrapper has a ``dataset``, as RepeatDataset does, or a list of ``datasets``, as
    ConcatDataset does.

    Returns:
        list[tuple[str, dict]]: Keys in the loader, such as 'dataset.datasets.0', and
        configs. Empty if there is no loader.
    """
    return [chain[-1] for chain in _chains(loader)]


def datasets_of(cfg: Config, split: str) -> List[Tuple[str, Any]]:
    """The data sets of a split that read files, with their keys in the config."""
    loader = f'{split}_dataloader'
    return [(f'{loader}.{key}', x) for key, x in leaf_datasets(cfg.get(loader))]


def wrapping_datasets(loader: Any) -> List[Tuple[str, Any]]:
    """The wrappers of a data loader's config, like :func:`leaf_datasets`."""
    found = dict(part for chain in _chains(loader) for part in chain[:-1])
    return sorted(found.items())


def data_pipelines(loader: Any) -> List[Tuple[str, List[Any]]]:
    """What a data loader's config does with the samples of each of its data sets.

    Returns:
        list[tuple[str, list]]: Keys as those of :func:`leaf_datasets`, and the steps of
        the data set's own pipeline, then of those of its wrappers: MultiImageMixDataset
        has one.
    """
    return [
        (
            chain[-1][0],
            [step for _, x in reversed(chain) for step in as_list(x.get('pipeline'))],
        )
        for chain in _chains(loader)
    ]


def _chains(
    config: Any, key: str = '', outer: Tuple[Tuple[str, Any], ...] = ()
) -> Iterator[Tuple[Tuple[str, Any], ...]]:
    """Each data set that reads files, behind its wrappers, all with their keys."""
    if not isinstance(config, Mapping):
        return
    # The loader itself, which has no key, is no data set.
    chain = (*outer, (key, config)) if key else ()
    parts = config.get('datasets')
    if isinstance(parts, (list, tuple)) and any(isinstance(x, Mapping) for x in parts):
        for name, part in named_parts(parts, f'{key}.datasets'.lstrip('.')):
            yield from _chains(part, name, chain)
    elif isinstance(config.get('dataset'), Mapping):
        yield from _chains(config['dataset'], f'{key}.dataset'.lstrip('.'), chain)
    elif chain:
        yield chain


def batch_size_of(loader: Mapping) -> int:
    """The images of a batch of one process; PyTorch's default is 1."""
    return loader.get('batch_size') or 1


def as_list(value: Any) -> List[Any]:
    """Make a list of a config's value: one item, a list of items, or nothing."""
    if not value:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def hooks_of(cfg: Config) -> List[dict]:
    """The configs of a run's hooks, those of ``default_hooks`` first."""
    defaults = cfg.get('default_hooks') or {}
    hooks = [*defaults.values(), *as_list(cfg.get('custom_hooks'))]
    return [hook for hook in hooks if isinstance(hook, dict)]


def named_hooks(cfg: Config) -> Iterator[Tuple[str, Mapping]]:
    """The hooks of a run that are configs, with their keys.

    MMEngine's checkpoint hook is one of them if the config names no other.
    """
    checkpoint = dict(type='CheckpointHook', interval=1)
    defaults = dict(dict(checkpoint=checkpoint), **(cfg.get('default_hooks') or {}))
    for name, hook in defaults.items():
        if isinstance(hook, Mapping):
            yield f'default_hooks.{name}', hook
    yield from named_parts(cfg.get('custom_hooks'), 'custom_hooks')


def named_schedulers(cfg: Config) -> Iterator[Tuple[str, Mapping]]:
    """The schedulers of a run, with their keys: one, a list, or those of optimizers."""
    found = cfg.get('param_scheduler')
    if isinstance(found, Mapping) and 'type' not in found:
        for name, value in found.items():
            yield from named_parts(value, f'param_scheduler.{name}')
    else:
        yield from named_parts(found, 'param_scheduler')


def training_length(loop: Mapping) -> Optional[int]:
    """The epochs or iterations of a training loop's config; None if it has neither."""
    return loop.get('max_epochs', loop.get('max_iters'))


def default_hook(cfg: Config, name: str) -> dict:
    """The config of one of ``default_hooks``; empty if there is none."""
    return (cfg.get('default_hooks') or {}).get(name) or {}


def kind_of(part: Mapping) -> Optional[str]:
    """The name of a part's ``type``, also of a class, and without a scope like mmdet.

    None if there is no type.
    """
    kind = part.get('type')
    return kind and str(getattr(kind, '__name__', kind)).rpartition('.')[2]


def pretrained_of(part: dict) -> List[dict]:
    """The ``init_cfg`` of a model's part that read a checkpoint."""
    return [
        init_cfg
        for init_cfg in as_list(part.get('init_cfg'))
        if isinstance(init_cfg, dict) and kind_of(init_cfg) == 'Pretrained'
    ]


def metrics_of(evaluator: Any) -> List[Any]:
    """The metrics of an evaluator's config: one, a list, or an evaluator with them."""
    if isinstance(evaluator, Mapping) and 'metrics' in evaluator:
        evaluator = evaluator['metrics']
    return as_list(evaluator)


def has_own_runner(cfg: Config) -> bool:
    """Whether another runner than MMEngine's reads the config, and may read any key."""
    runner = dict(type=cfg.get('runner_type') or 'Runner')
    return kind_of(runner) not in ('Runner', 'FlexibleRunner')


# The kinds of values that MMEngine takes, besides None and objects. Where they are
# several, a class decides.
_KINDS: Dict[str, Tuple[type, ...]] = {
    'model': (dict,),
    **{
        f'{split}_{part}': (dict, list, tuple) if part == 'evaluator' else (dict,)
        for split in SPLITS
        for part in ('dataloader', 'cfg', 'evaluator')
    },
    'optim_wrapper': (dict,),
    'optim_wrapper.optimizer': (dict,),
    'param_scheduler': (dict, list, tuple),
    'default_hooks': (dict,),
    'visualizer': (dict,),
    'log_processor': (dict,),
    'auto_scale_lr': (dict,),
    'env_cfg': (dict,),
    'env_cfg.mp_cfg': (dict,),
    'env_cfg.dist_cfg': (dict,),
    'randomness': (dict,),
    'tta_model': (dict,),
    'default_scope': (str,),
    'work_dir': (str,),
    'load_from': (str,),
    'experiment_name': (str,),
}
_PLAIN = (dict, list, tuple, str, int, float)
_WORDS = {dict: 'a dict', list: 'a list', str: 'a text'}


def require_kinds(cfg: Config) -> None:
    """Refuse plain values of another kind than MMEngine's runner takes.

    Args:
        cfg (Config): The config of a run. Another runner may take anything.

    Raises:
        ValueError: Names the first key, its value, and the kinds that are right.
    """
    if has_own_runner(cfg):
        return
    for key, kinds in _KINDS.items():
        value = value_at(cfg, key)
        if isinstance(value, _PLAIN) and not isinstance(value, kinds):
            right = ' or '.join(_WORDS[kind] for kind in kinds if kind in _WORDS)
            raise ValueError(
                f'{key} is {printable(repr(value))}, but it has to be {right}: see '
                'configs/ for examples.'
            )


def require_parts(cfg: Config, *keys: str, user: str) -> None:
    """Refuse a config that lacks something.

    Args:
        cfg (Config): The config.
        *keys (str): Its keys that may not be missing or None.
        user (str): What needs them, for the message.

    Raises:
        ValueError: Names the keys that are missing.
    """
    missing = [key for key in keys if cfg.get(key) is None]
    if missing:
        raise ValueError(
            f'{user} needs {", ".join(missing)} in the config, and '
            f'{cfg.filename or "this one"} has none.'
        )


# What MMEngine's runner takes together or not at all.
_TOGETHER = {
    'training': ('train_dataloader', 'train_cfg', 'optim_wrapper'),
    'validation': ('val_dataloader', 'val_cfg', 'val_evaluator'),
    'test': ('test_dataloader', 'test_cfg', 'test_evaluator'),
}


def require_whole_splits(cfg: Config) -> None:
    """Refuse a config with only some parts of a training, validation or test.

    Raises:
        ValueError: Names what is there and what is missing.
    """
    for name, keys in _TOGETHER.items():
        given = [key for key in keys if cfg.get(key) is not None]
        missing = [key for key in keys if cfg.get(key) is None]
        if given and missing:
            raise ValueError(
                f'A {name} needs {", ".join(keys)}, but the config has no '
                f'{" and no ".join(missing)}. Give all of them, or for no {name} '
                f'{" ".join(f"{key}=None" for key in given)}.'
            )
    if cfg.get('optim_wrapper') is None and cfg.get('param_scheduler') is not None:
        raise ValueError(
            'param_scheduler changes the rates of optim_wrapper, but the config has '
            'none. Give both, or write param_scheduler=None.'
        )


def replace_sync_bn(model: Any) -> None:
    """Turn every SyncBN of a model config into BN, in place."""
    for part in parts_of(model):
        if kind_of(part) in ('SyncBN', 'MMSyncBN'):
            part['type'] = 'BN'
