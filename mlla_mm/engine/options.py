# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""How configs are read, and how the command line's options change them."""

import argparse
import copy
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, List, Optional, Tuple

import torch
from mmengine.config import Config, ConfigDict

from ..checkpoints.pretrained import require_weights
from ..checkpoints.reader import trust_checkpoints
from ..compat.openmmlab import lay_out_configs_once
from ..reproducible.resume import newest_checkpoint, seed_of
from ..utils.text import PATH_LIMIT, printable

SPLITS = ('train', 'val', 'test')
"""What ``_dataloader`` follows in the keys of a config."""


def read_config(path: str, options: Optional[dict] = None) -> Config:
    """Read a config file and merge ``--cfg-options`` into it.

    The config need not import the classifiers of this package: they are registered if
    its default scope is mmpretrain.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is a file of another kind, such as a checkpoint.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'Config not found: {path}. See configs/ for ours.')
    if Path(path).suffix not in ('.py', '.json', '.yaml', '.yml'):
        raise ValueError(
            f'{printable(path, PATH_LIMIT)} is no config, whose name would end in .py: '
            'check the order of the arguments.'
        )
    cfg = Config.fromfile(path)
    if options:
        cfg.merge_from_dict(options)
    if cfg.get('default_scope') == 'mmpretrain':
        import_module('mlla_mm.models.classifiers')
    return cfg


def read_run_config(path: str) -> Tuple[Config, Config]:
    """Read the config of a run.

    Returns:
        tuple[Config, Config]: The config as it is written, and a copy for the options
        of the command line.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    lay_out_configs_once()
    written = read_config(path)
    written.setdefault('launcher', 'none')  # as in MMEngine
    return written, copy.deepcopy(written)


def apply_run_arguments(cfg: Config, args: argparse.Namespace) -> None:
    """Apply the arguments that training and testing share.

    The work_dir is that of the command line, else that of the config, else
    work_dirs/CONFIG_NAME. ``trust_checkpoint`` in the config has the same effect as
    --trust-checkpoint; it holds for this process.

    Args:
        cfg (Config): The config as it was read; changed in place.
        args (argparse.Namespace): The arguments.
    """
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(cfg.filename).stem)
    if args.seed is not None:
        cfg.randomness = dict(cfg.get('randomness', {}), seed=args.seed)
    if args.trust_checkpoint:
        cfg.trust_checkpoint = True
    trust_checkpoints(cfg.get('trust_checkpoint', False))


def print_changes(written: Config, run: Config) -> None:
    """Print :func:`describe_changes`, if there are any."""
    changes = list(describe_changes(written.to_dict(), run.to_dict()))
    if changes:
        lines = [f'{run.filename} is run with these changes:', *changes]
        print('\n  '.join(lines), flush=True)


_NOTHING = object()


def describe_changes(written: Any, run: Any, key: str = '') -> Iterator[str]:
    """Compare the config that is run with the one that was read.

    Args:
        written (Any): The config as it was read, or a part of it.
        run (Any): The config that is run, or the same part of it.
        key (str): Where the part is in the config. Defaults to '', the whole config.

    Yields:
        str: ``KEY: OLD -> NEW`` for each value that was changed, added or removed.
        ``-`` stands for no value. Long values are cut in the middle.
    """
    if isinstance(written, list) and isinstance(run, list) and len(written) <= len(run):
        written, run = dict(enumerate(written)), dict(enumerate(run))
    if isinstance(written, dict) and isinstance(run, dict):
        for name in {**written, **run}:
            old, new = written.get(name, _NOTHING), run.get(name, _NOTHING)
            yield from describe_changes(old, new, f'{key}.{name}' if key else str(name))
    elif written != run:
        old, new = (
            '-' if value is _NOTHING else printable(repr(value))
            for value in (written, run)
        )
        yield f'{key}: {old} -> {new}'


def parts_of(config: Any) -> Iterator[dict]:
    """All dicts of a config's part, each before those that are in it."""
    if isinstance(config, dict):
        yield config
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for value in config:
            yield from parts_of(value)


def leaf_datasets(loader: Any) -> List[Tuple[str, Any]]:
    """The data sets of a data loader's config that read files, below all wrappers.

    A wrapper has a ``dataset``, as RepeatDataset does, or a list of ``datasets``, as
    ConcatDataset does.

    Returns:
        list[tuple[str, dict]]: Keys in the loader, such as 'dataset.datasets[0]', and
        configs. Empty if there is no loader.
    """
    return [(key, chain[-1]) for key, chain in _chains(loader)]


def datasets_of(cfg: Config, split: str) -> List[Tuple[str, Any]]:
    """The data sets of a split that read files, with their keys in the config."""
    loader = f'{split}_dataloader'
    return [(f'{loader}.{key}', x) for key, x in leaf_datasets(cfg.get(loader))]


def wrapping_datasets(loader: Any) -> List[Tuple[str, Any]]:
    """The wrappers of a data loader's config, like :func:`leaf_datasets`."""
    found = {}
    for key, chain in _chains(loader):
        for wrapper in reversed(chain[1:-1]):
            key = key.rpartition('.')[0]
            found[key] = wrapper
    return sorted(found.items())


def data_pipelines(loader: Any) -> List[Tuple[str, List[Any]]]:
    """What a data loader's config does with the samples of each of its data sets.

    Returns:
        list[tuple[str, list]]: Keys as those of :func:`leaf_datasets`, and the steps of
        the data set's own pipeline, then of those of its wrappers: MultiImageMixDataset
        has one.
    """
    return [
        (key, [step for x in reversed(chain) for step in as_list(x.get('pipeline'))])
        for key, chain in _chains(loader)
    ]


def _chains(
    config: Any, key: str = '', outer: Tuple[Any, ...] = ()
) -> Iterator[Tuple[str, Tuple[Any, ...]]]:
    """Each data set that reads files, behind the loader and its wrappers."""
    if not isinstance(config, Mapping):
        return
    chain = (*outer, config)
    parts = config.get('datasets')
    if isinstance(parts, (list, tuple)) and any(isinstance(x, Mapping) for x in parts):
        for i, part in enumerate(parts):
            yield from _chains(part, f'{key}.datasets[{i}]'.lstrip('.'), chain)
    elif isinstance(config.get('dataset'), Mapping):
        yield from _chains(config['dataset'], f'{key}.dataset'.lstrip('.'), chain)
    elif outer:
        yield key, chain


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


def default_hook(cfg: Config, name: str) -> dict:
    """The config of one of ``default_hooks``; empty if there is none."""
    return (cfg.get('default_hooks') or {}).get(name) or {}


def kind_of(part: dict) -> Optional[str]:
    """The name of a part's ``type``, also of a class, and without a scope like mmdet.

    None if there is no type.
    """
    kind = part.get('type')
    return kind and str(getattr(kind, '__name__', kind)).rpartition('.')[2]


def replace_sync_bn(model: Any) -> None:
    """Turn every SyncBN of a model config into BN, in place."""
    for part in parts_of(model):
        if kind_of(part) in ('SyncBN', 'MMSyncBN'):
            part['type'] = 'BN'


def add_hook(cfg: Config, kind: str) -> None:
    """Add a hook without arguments to ``custom_hooks``."""
    cfg.custom_hooks = [*as_list(cfg.get('custom_hooks')), dict(type=kind)]


def enable_amp(cfg: Config) -> None:
    """Train in mixed precision with a dynamic loss scale.

    Raises:
        ValueError: If there is no GPU, which MMEngine's AmpOptimWrapper needs.
    """
    if not torch.cuda.is_available():
        raise ValueError('--amp needs a GPU, and PyTorch finds none. Leave --amp out.')
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def enable_tta(cfg: Config) -> None:
    """Test with the config's test-time augmentation.

    Raises:
        ValueError: If the config has no ``tta_model``, ``tta_pipeline`` or test data.
    """
    for key in ('tta_model', 'tta_pipeline', 'test_dataloader'):
        if key not in cfg:
            raise ValueError(
                f'--tta needs {key} in the config, and {cfg.filename} has none. '
                "(mmdet's test-time augmentation does not support masks.)"
            )
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    for _, dataset in datasets_of(cfg, 'test'):
        dataset['pipeline'] = cfg.tta_pipeline


def set_resume(cfg: Config, resume: Optional[str]) -> None:
    """Resume from a checkpoint, or from the newest undamaged one of the work_dir.

    The run gets the seed of the run that it continues. It does not load pretrained
    weights, because the checkpoint replaces them. ``ResumedStateHook`` is added if it
    is missing: it decides what else is taken over from the checkpoint. If the work_dir
    has no checkpoint, a new run begins.

    Args:
        cfg (Config): The config of a training run; changed in place.
        resume (str, optional): The checkpoint, or 'auto' for the newest one. None does
            what the config says.

    Raises:
        FileNotFoundError: If the named checkpoint does not exist.
        CheckpointError: If it is damaged.
    """
    if resume is None and cfg.get('resume'):
        resume = cfg.get('load_from') or 'auto'
    if resume is None:
        return
    if resume == 'auto':
        newest = newest_checkpoint(cfg.work_dir)
        if newest is None:
            cfg.resume = False  # MMEngine would search again, and log it
            return
        resume = str(newest)
    elif not Path(resume).is_file():
        raise FileNotFoundError(
            f'Checkpoint to resume from not found: {resume}. Give --resume alone '
            'for the newest one of the work_dir.'
        )
    cfg.resume = True
    cfg.load_from = resume
    if Path(resume).is_file():
        cfg.randomness = dict(cfg.get('randomness', {}), seed=seed_of(resume))
    for part in parts_of(cfg.model):
        read = pretrained_of(part)
        if read:
            left = [x for x in as_list(part['init_cfg']) if x not in read]
            part['init_cfg'] = left or None
    if 'ResumedStateHook' not in map(kind_of, hooks_of(cfg)):
        hook = dict(type='ResumedStateHook')
        cfg.default_hooks = dict(cfg.get('default_hooks') or {}, resumed_state=hook)


def require_pretrained(cfg: Config) -> None:
    """Check that the pretrained weights exist, before any data is loaded.

    Raises:
        FileNotFoundError: If a local file named by an ``init_cfg`` is missing. The
            message says where to get it.
    """
    for part in parts_of(cfg.model):
        for init_cfg in pretrained_of(part):
            if '://' not in init_cfg['checkpoint']:
                require_weights(init_cfg['checkpoint'])


def pretrained_of(part: dict) -> List[dict]:
    """The ``init_cfg`` of a model's part that read a checkpoint."""
    return [
        init_cfg
        for init_cfg in as_list(part.get('init_cfg'))
        if isinstance(init_cfg, dict) and kind_of(init_cfg) == 'Pretrained'
    ]


# Arguments that let each package's visualization hook draw test results to a folder.
_DRAW = {
    'DetVisualizationHook': lambda folder: dict(draw=True, test_out_dir=folder),
    'SegVisualizationHook': lambda folder: dict(draw=True, interval=1),
    'VisualizationHook': lambda folder: dict(enable=True, interval=1, out_dir=folder),
}


def draw_results(cfg: Config, folder: str) -> None:
    """Draw the predictions of a test run into a folder.

    Raises:
        ValueError: If the config has no visualization hook that can do it.
    """
    hook = default_hook(cfg, 'visualization')
    kind = kind_of(hook)
    if kind not in _DRAW:
        raise ValueError(
            f'--show-dir needs default_hooks.visualization of a type in {list(_DRAW)}, '
            f'got {kind!r}.'
        )
    # mmdet would put a relative folder into its own time-stamped one.
    hook.update(_DRAW[kind](str(Path(folder).resolve())))
    if kind == 'SegVisualizationHook':
        cfg.visualizer['save_dir'] = folder


def dump_predictions(cfg: Config, path: str) -> None:
    """Write the predictions of a test run.

    Segmentation writes a folder of label maps: PNG files with the class numbers of the
    data set's own files. The other tasks write one pickle file of all predictions.

    Args:
        cfg (Config): The config of the test run; changed in place.
        path (str): The folder, or the file. A file's name ends in .pkl or .pickle.

    Raises:
        ValueError: If the name does not fit the task, or the evaluator has metrics for
            several data sets.
    """
    if 'MultiDatasetsEvaluator' in map(kind_of, as_list(cfg.test_evaluator)):
        raise ValueError(
            '--out does not go with a MultiDatasetsEvaluator. Test each of its data '
            'sets alone.'
        )
    is_pickle = path.endswith(('.pkl', '.pickle'))
    if cfg.default_scope == 'mmseg':
        if is_pickle:
            raise ValueError(
                f'--out names a folder for the label maps of segmentation, got {path}.'
            )
        # The metric makes the folder on the first process; others may need it before.
        Path(path).mkdir(parents=True, exist_ok=True)
        cfg.test_evaluator.output_dir = path
        return
    if not is_pickle:
        raise ValueError(f'--out must end in .pkl or .pickle, got {path}.')
    # mmdet's metric stores masks run-length encoded.
    kind = 'DumpDetResults' if cfg.default_scope == 'mmdet' else 'DumpResults'
    dump = dict(type=kind, out_file_path=path)
    cfg.test_evaluator = [*as_list(cfg.test_evaluator), dump]
