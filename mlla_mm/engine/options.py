# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""What the command line asks for, put into a config; and how configs are read."""

import argparse
import copy
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, List, Optional, Tuple

import torch
from mmengine.config import Config, ConfigDict

from ..checkpoints.pretrained import require_weights
from ..checkpoints.reader import trust_checkpoints
from ..compat.openmmlab import lay_out_configs_once
from ..reproducible.resume import newest_checkpoint, seed_of


def read_config(path: str, options: Optional[dict] = None) -> Config:
    """Read a config file and merge ``--cfg-options`` into it.

    Everything of ours is registered then, whatever the config's ``custom_imports`` are:
    the classifiers as well, if its default scope is mmpretrain.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'Config not found: {path}. See configs/ for ours.')
    cfg = Config.fromfile(path)
    if options:
        cfg.merge_from_dict(options)
    if cfg.get('default_scope') == 'mmpretrain':
        import_module('mlla_mm.models.classifiers')
    return cfg


def read_run_config(path: str) -> Tuple[Config, Config]:
    """Read the config of a run: as it is written, and a copy for the command line.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    lay_out_configs_once()
    written = read_config(path)
    written.setdefault('launcher', 'none')  # as in MMEngine
    return written, copy.deepcopy(written)


def apply_run_arguments(cfg: Config, args: argparse.Namespace) -> None:
    """Apply the arguments that training and testing share.

    The work_dir is the command line's, else the config's, else work_dirs/CONFIG_NAME.
    The config's trust_checkpoint does what --trust-checkpoint does, for this process.

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
    changes = describe_changes(written, run)
    if changes:
        lines = [f'{run.filename} is run with these changes:', *changes]
        print('\n  '.join(lines), flush=True)


def describe_changes(written: Config, run: Config) -> List[str]:
    """What a run's config has otherwise than the file says.

    Args:
        written (Config): The config as it was read.
        run (Config): The config that is run.

    Returns:
        list[str]: ``KEY: OLD -> NEW`` for each value that was changed, added or
        removed, ``-`` being none; long ones are cut.
    """
    return list(_changes(written.to_dict(), run.to_dict(), ''))


def _changes(written: Any, run: Any, key: str) -> Iterator[str]:
    if isinstance(written, Mapping) and isinstance(run, Mapping):
        keys = [*written, *(name for name in run if name not in written)]
        pairs = [(n, written.get(n, _NOTHING), run.get(n, _NOTHING)) for n in keys]
    elif _is_list(written) and _is_list(run) and len(written) <= len(run):
        longer = [*written, *[_NOTHING] * (len(run) - len(written))]
        pairs = [(i, *values) for i, values in enumerate(zip(longer, run))]
    else:
        if written != run:
            yield f'{key}: {_shown(written)} -> {_shown(run)}'
        return
    for name, old, new in pairs:
        yield from _changes(old, new, f'{key}.{name}' if key else str(name))


_NOTHING = object()


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _shown(value: Any) -> str:
    return '-' if value is _NOTHING else textwrap.shorten(repr(value), 100)


def parts_of(config: Any) -> Iterator[dict]:
    """All dicts of a config's part, each before those that are in it."""
    if isinstance(config, dict):
        yield config
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        for value in config:
            yield from parts_of(value)


def as_list(value: Any) -> List[Any]:
    """What a config has one or several of, or none (None, or empty)."""
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
    """The name of a part's ``type``, which may be a class; None if there is none."""
    kind = part.get('type')
    return getattr(kind, '__name__', kind)


def add_hook(cfg: Config, kind: str) -> None:
    """Add a hook without arguments to ``custom_hooks``."""
    cfg.custom_hooks = [*as_list(cfg.get('custom_hooks')), dict(type=kind)]


def enable_amp(cfg: Config) -> None:
    """Train in mixed precision with a dynamic loss scale.

    Raises:
        ValueError: Without a GPU: MMEngine's AmpOptimWrapper needs one.
    """
    if not torch.cuda.is_available():
        raise ValueError('--amp needs a GPU, and torch sees none. Leave it out.')
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def enable_tta(cfg: Config) -> None:
    """Test with the config's test-time augmentation.

    Raises:
        ValueError: If the config has no ``tta_model`` or no ``tta_pipeline``.
    """
    for key in ('tta_model', 'tta_pipeline'):
        if key not in cfg:
            raise ValueError(
                f'--tta needs {key} in the config, and {cfg.filename} has none. '
                "(mmdet's test-time augmentation does not support masks.)"
            )
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline


def set_resume(cfg: Config, resume: Optional[str]) -> None:
    """Resume from a checkpoint, or from the newest whole one of the work_dir ('auto').

    The run gets the seed of the run that it goes on with, and does without pretrained
    weights: the checkpoint replaces them. What it may take over from the checkpoint,
    ``ResumedStateHook`` decides in any case. A work_dir without a checkpoint is that of
    a new run.

    Args:
        cfg (Config): The config of a training run; changed in place.
        resume (str, optional): The checkpoint, or 'auto'. None does what the config
            says.

    Raises:
        FileNotFoundError: If the named checkpoint does not exist.
        CheckpointError: If it is damaged.
    """
    if resume is None and cfg.get('resume'):
        resume = cfg.get('load_from') or 'auto'
    if resume is None:
        return
    if resume == 'auto':
        resume = newest_checkpoint(cfg.work_dir)
        if resume is None:
            cfg.resume = False  # MMEngine would look again, and say so
            return
    elif not Path(resume).is_file():
        raise FileNotFoundError(
            f'Checkpoint to resume from not found: {resume}. Give --resume alone '
            'for the newest one of the work_dir.'
        )
    cfg.resume = True
    cfg.load_from = str(resume)
    if Path(resume).is_file():
        cfg.randomness = dict(cfg.get('randomness', {}), seed=seed_of(resume))
    for module in modules_with_pretrained(cfg.model):
        read = pretrained_of(module)
        left = [x for x in as_list(module['init_cfg']) if x not in read]
        module['init_cfg'] = left or None
    if 'ResumedStateHook' not in map(kind_of, hooks_of(cfg)):
        hook = dict(type='ResumedStateHook')
        cfg.default_hooks = dict(cfg.get('default_hooks') or {}, resumed_state=hook)


def require_pretrained(cfg: Config) -> None:
    """Ask for the pretrained weights before any data is loaded.

    Raises:
        FileNotFoundError: If a local file named by an ``init_cfg`` is missing; the
            message tells where to get it.
    """
    for module in modules_with_pretrained(cfg.model):
        for init_cfg in pretrained_of(module):
            if '://' not in init_cfg['checkpoint']:
                require_weights(init_cfg['checkpoint'])


def modules_with_pretrained(model: Any) -> Iterator[dict]:
    """The parts of a model's config that start from a checkpoint, by ``init_cfg``."""
    if isinstance(model, dict):
        if pretrained_of(model):
            yield model
        model = list(model.values())
    if isinstance(model, (list, tuple)):
        for value in model:
            yield from modules_with_pretrained(value)


def pretrained_of(module: dict) -> List[dict]:
    """Those of a module's ``init_cfg``, one or several, that read a checkpoint."""
    return [
        init_cfg
        for init_cfg in as_list(module.get('init_cfg'))
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained'
    ]


# How each package's visualization hook is told to draw test results into a folder.
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
    # Absolute: mmdet joins a relative folder to its own time-stamped one.
    hook.update(_DRAW[kind](str(Path(folder).resolve())))
    if kind == 'SegVisualizationHook':
        cfg.visualizer['save_dir'] = folder


def dump_predictions(cfg: Config, path: str) -> None:
    """Write the predictions of a test run.

    Segmentation writes a folder of label maps (PNG, in the numbers of the data set's
    own files), the other tasks one pickle file of all predictions.

    Args:
        cfg (Config): The config of the test run; changed in place.
        path (str): The folder, or the file, which ends in .pkl or .pickle.

    Raises:
        ValueError: If the name does not fit the task.
    """
    is_pickle = path.endswith(('.pkl', '.pickle'))
    if cfg.default_scope == 'mmseg':
        if is_pickle:
            raise ValueError(
                f'--out names a folder for the label maps of segmentation, got {path}.'
            )
        # The metric makes the folder on the first process, and others may be faster.
        Path(path).mkdir(parents=True, exist_ok=True)
        cfg.test_evaluator.output_dir = path
        return
    if not is_pickle:
        raise ValueError(f'--out must end in .pkl or .pickle, got {path}.')
    # mmdet's own one stores masks run-length encoded.
    kind = 'DumpDetResults' if cfg.default_scope == 'mmdet' else 'DumpResults'
    evaluators = cfg.test_evaluator
    if not isinstance(evaluators, list):
        evaluators = [evaluators]
    cfg.test_evaluator = [*evaluators, dict(type=kind, out_file_path=path)]
