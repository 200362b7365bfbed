# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Command-line choices applied to a config."""

import argparse
import functools
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, List, Optional

import torch
from mmengine.config import Config, ConfigDict
from yapf.yapflib import yapf_api

from ..models.weights import require_weights
from ..utils.checkpoint_file import trust_checkpoints
from .resume import newest_checkpoint, seed_of

# Hooks of every run.
_ALWAYS = (
    *('CheckWeightsHook', 'RecordRunHook', 'ResumedStateHook'),
    'StopOnInvalidLossHook',
)


def read_run_config(args: argparse.Namespace) -> Config:
    """Read the config of a run and apply the arguments that tools share.

    The work_dir is the command line's, else the config's, else work_dirs/CONFIG_NAME.
    The config's trust_checkpoint does what --trust-checkpoint does, for this process.

    Raises:
        FileNotFoundError: If there is no such config.
    """
    cfg = read_config(args.config, args.cfg_options)
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
    hooks = list(cfg.get('custom_hooks') or [])
    for kind in _ALWAYS:
        # A config may have one with options of its own.
        if all(hook.get('type') != kind for hook in hooks if isinstance(hook, dict)):
            hooks.append(dict(type=kind))
    cfg.custom_hooks = hooks
    compile_backbone(cfg)
    lay_out_configs_once()
    return cfg


def lay_out_configs_once() -> None:
    """Let YAPF lay out a config's text once in this process.

    It takes a second or more. MMEngine writes the text in four places when a run
    starts, and in every checkpoint.
    """
    # mmengine 0.10.7 imports the function once, the fork whenever it calls it.
    config = import_module('mmengine.config.config')
    owner = config if hasattr(config, 'FormatCode') else yapf_api
    lay_out = owner.FormatCode
    if hasattr(lay_out, '__wrapped__'):
        return
    known = {}

    @functools.wraps(lay_out)
    def format_code(text: str, **options) -> tuple:
        if text not in known:
            known[text] = lay_out(text, **options)
        return known[text]

    owner.FormatCode = format_code


def compile_backbone(cfg: Config) -> None:
    """Let a config's ``compile`` mean our backbone alone.

    MMEngine compiles the whole training step, in over a hundred graphs for Mask R-CNN.
    With another backbone it keeps that meaning.

    Args:
        cfg (Config): The config of a run; changed in place.
    """
    backbone = cfg.get('model', {}).get('backbone') or {}
    if cfg.get('compile') and backbone.get('type') == 'MLLA':
        backbone['compile'] = cfg.compile
        cfg.compile = False


def read_config(path: str, options: Optional[dict] = None) -> Config:
    """Read a config file and merge ``--cfg-options`` into it.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'Config not found: {path}. See configs/ for ours.')
    cfg = Config.fromfile(path)
    if options:
        cfg.merge_from_dict(options)
    return cfg


def as_list(value: Any) -> List[Any]:
    """What a config has one or several of, or none (None, or empty)."""
    if not value:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


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

    The run gets the seed of the run that it goes on with. A work_dir without a
    checkpoint is that of a new run.

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


def check_pretrained(cfg: Config) -> None:
    """Ask for the pretrained weights before any data is loaded.

    A run that resumes does without them: the checkpoint replaces every weight.

    Raises:
        FileNotFoundError: If a local file named by an ``init_cfg`` is missing; the
            message tells where to get it.
    """
    resuming = cfg.get('resume') and (
        cfg.get('load_from') or newest_checkpoint(cfg.work_dir)
    )
    for module in modules_with_pretrained(cfg.model):
        if '://' in module['init_cfg']['checkpoint']:
            continue
        if resuming:
            module['init_cfg'] = None
        else:
            require_weights(module['init_cfg']['checkpoint'])


def modules_with_pretrained(model: Any) -> Iterator[dict]:
    """The parts of a model's config that start from a checkpoint, by ``init_cfg``."""
    if isinstance(model, dict):
        init_cfg = model.get('init_cfg')
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
            yield model
        model = list(model.values())
    if isinstance(model, (list, tuple)):
        for value in model:
            yield from modules_with_pretrained(value)


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
    hook = cfg.default_hooks.get('visualization') or {}
    if hook.get('type') not in _DRAW:
        raise ValueError(
            f'--show-dir needs default_hooks.visualization of a type in {list(_DRAW)}, '
            f'got {hook.get("type")!r}.'
        )
    # Absolute: mmdet joins a relative folder to its own time-stamped one.
    hook.update(_DRAW[hook['type']](str(Path(folder).resolve())))
    if hook['type'] == 'SegVisualizationHook':
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
