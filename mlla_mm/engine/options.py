# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""How the options of the command line change a config."""

import argparse
import os
from pathlib import Path
from typing import Any, Optional

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import METRICS

from ..checkpoints.pretrained import require_weights
from ..checkpoints.reader import trust_checkpoints
from ..reproducible.resume import newest_checkpoint, seed_of
from ..utils.text import PATH_LIMIT, printable
from .config_files import merge_options
from .parts import (
    as_list,
    datasets_of,
    default_hook,
    hooks_of,
    kind_of,
    metrics_of,
    parts_of,
    pretrained_of,
    require_kinds,
)


def apply_run_arguments(cfg: Config, args: argparse.Namespace) -> None:
    """Apply the arguments that training and testing share.

    The work_dir is that of the command line, else that of the config, else
    work_dirs/CONFIG_NAME. ``trust_checkpoint`` in the config has the same effect as
    --trust-checkpoint; it holds for this process.

    Args:
        cfg (Config): The config as it was read; changed in place.
        args (argparse.Namespace): The arguments.

    Raises:
        ValueError: If options of the config cannot be applied.
    """
    merge_options(cfg, args.cfg_options)
    require_kinds(cfg)
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
        if cfg.get(key) is None:
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
    weights, because the checkpoint replaces them. ``ResumedStateHook`` and
    ``ResumedSettingsHook`` are added if they are missing: they decide what else is
    taken over from the checkpoint. If the work_dir has no checkpoint, a new run begins.

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
    _leave_out_pretrained(cfg.model)
    kinds = list(map(kind_of, hooks_of(cfg)))
    hooks = dict(cfg.get('default_hooks') or {})
    if 'ResumedStateHook' not in kinds:
        hooks['resumed_state'] = dict(type='ResumedStateHook')
    if 'ResumedSettingsHook' not in kinds:
        # NoHook of this name leaves the checkpoint's settings in force.
        hooks.setdefault('resumed_settings', dict(type='ResumedSettingsHook'))
    cfg.default_hooks = hooks


# What decides about the weights of a checkpoint, by the names in our bases.
_OF_WEIGHTS = dict(fresh_heads='FreshHeadsHook', check_weights='CheckWeightsHook')


def add_weight_hooks(cfg: Config) -> None:
    """Add the hooks that see whether a checkpoint fits, where a config lacks them.

    Args:
        cfg (Config): The config of a run; changed in place. A hook that it replaces or
            switches off by its name stays so.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If ``load_from`` is an empty text.
    """
    source = cfg.get('load_from')
    if source == '':
        raise ValueError('load_from is empty. For no checkpoint write load_from=None.')
    is_local = source and '://' not in source
    if is_local and not os.path.exists(os.path.expanduser(source)):
        raise FileNotFoundError(
            f'load_from is {printable(source, PATH_LIMIT)}, and there is no such file. '
            'Give the path of a checkpoint, or write load_from=None.'
        )
    if not (source or cfg.get('resume')):
        return
    kinds = list(map(kind_of, hooks_of(cfg)))
    for name, kind in _OF_WEIGHTS.items():
        hooks = cfg.get('default_hooks') or {}
        if kind not in kinds and name not in hooks:
            cfg.default_hooks = dict(hooks, **{name: dict(type=kind)})


def start_from_whole_model(cfg: Config) -> None:
    """Leave out the backbone's pretrained weights if ``load_from`` replaces them.

    They stay if the config switches off the hook that requires all weights to be there.

    Args:
        cfg (Config): The config of a training run; changed in place.
    """
    is_whole = 'CheckWeightsHook' in map(kind_of, hooks_of(cfg))
    if is_whole and cfg.get('load_from') and not cfg.get('resume'):
        _leave_out_pretrained(cfg.model.get('backbone'))


def _leave_out_pretrained(model: Any) -> None:
    for part in parts_of(model):
        read = pretrained_of(part)
        if read:
            left = [x for x in as_list(part['init_cfg']) if x not in read]
            part['init_cfg'] = left or None


def require_pretrained(cfg: Config) -> None:
    """Check that the pretrained weights exist, before any data is loaded.

    Raises:
        FileNotFoundError: If a local file named by an ``init_cfg`` is missing. The
            message says where to get it.
        ValueError: If an ``init_cfg`` names no file.
    """
    for part in parts_of(cfg.model):
        for init_cfg in pretrained_of(part):
            path = init_cfg.get('checkpoint')
            if not path:
                raise ValueError(
                    "An init_cfg of type='Pretrained' names no checkpoint: write "
                    'model.backbone.init_cfg.checkpoint=FILE, or where it is.'
                )
            if '://' not in path:
                require_weights(path)


# Arguments that let each package's visualization hook draw test results to a folder.
_DRAW = {
    'DetVisualizationHook': lambda folder: dict(draw=True, test_out_dir=folder),
    'SegVisualizationHook': lambda folder: dict(draw=True, interval=1),
    'VisualizationHook': lambda folder: dict(enable=True, interval=1, out_dir=folder),
}
# The visualizers that they draw with.
_VISUALIZERS = {
    'DetVisualizationHook': 'DetLocalVisualizer',
    'SegVisualizationHook': 'SegLocalVisualizer',
    'VisualizationHook': 'UniversalVisualizer',
}


def draw_results(cfg: Config, folder: str) -> None:
    """Draw the predictions of a test run into a folder.

    Raises:
        ValueError: If the config has no visualization hook or visualizer that can do
            it.
    """
    hook = default_hook(cfg, 'visualization')
    kind = kind_of(hook)
    visualizer = cfg.get('visualizer') or {}
    if kind not in _DRAW:
        raise ValueError(
            f'--show-dir needs default_hooks.visualization of a type in {list(_DRAW)}, '
            f'got {kind!r}.'
        )
    # MMEngine's own draws no predictions.
    if kind_of(visualizer) in (None, 'Visualizer'):
        raise ValueError(
            '--show-dir needs a visualizer that draws predictions: write '
            f"visualizer=dict(type='{_VISUALIZERS[kind]}')."
        )
    # mmdet would put a relative folder into its own time-stamped one.
    hook.update(_DRAW[kind](str(Path(folder).resolve())))
    if kind == 'SegVisualizationHook':
        _draw_into(visualizer, folder)


def _draw_into(visualizer: dict, folder: str) -> None:
    """Let a visualizer store pictures in a folder; others of its backends stay.

    mmseg's hook gives pictures to the backends alone, and LocalVisBackend stores them.
    """
    backends = as_list(visualizer.get('vis_backends'))
    kinds = list(map(kind_of, backends))
    if 'LocalVisBackend' not in kinds:
        backends.append(dict(type='LocalVisBackend'))
        kinds.append('LocalVisBackend')
    local = backends[kinds.index('LocalVisBackend')]
    local['save_dir'] = str(Path(folder) / 'vis_data')
    visualizer['vis_backends'] = backends


def dump_predictions(cfg: Config, path: str) -> None:
    """Write the predictions of a test run.

    Segmentation writes a folder of label maps: PNG files with the class numbers of the
    data set's own files. IoUMetric writes them; the first one, if there are several.
    The other tasks write one pickle file of all predictions.

    Args:
        cfg (Config): The config of the test run; changed in place.
        path (str): The folder, or the file. A file's name ends in .pkl or .pickle.

    Raises:
        ValueError: If the name does not fit the task, if the evaluator has metrics for
            several data sets, or if a segmentation has no IoUMetric.
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
        metric = _label_map_writer(cfg.test_evaluator)
        # The metric makes the folder on the first process; others may need it before.
        Path(path).mkdir(parents=True, exist_ok=True)
        metric['output_dir'] = path
        return
    if not is_pickle:
        raise ValueError(f'--out must end in .pkl or .pickle, got {path}.')
    # mmdet's metric stores masks run-length encoded.
    kind = 'DumpDetResults' if cfg.default_scope == 'mmdet' else 'DumpResults'
    metrics = [*metrics_of(cfg.test_evaluator), dict(type=kind, out_file_path=path)]
    if 'metrics' in cfg.test_evaluator:
        cfg.test_evaluator['metrics'] = metrics
    else:
        cfg.test_evaluator = metrics


def _label_map_writer(evaluator: Any) -> dict:
    """The config of an evaluator's metric that writes label maps.

    Raises:
        ValueError: If there is none.
    """
    from mmseg.evaluation import IoUMetric

    with METRICS.switch_scope_and_registry('mmseg') as registry:
        for metric in metrics_of(evaluator):
            kind = metric.get('type')
            kind = registry.get(kind) if isinstance(kind, str) else kind
            if isinstance(kind, type) and issubclass(kind, IoUMetric):
                return metric
    raise ValueError(
        '--out writes the label maps of segmentation with an IoUMetric, and '
        "test_evaluator has none: add dict(type='IoUMetric', prefix='iou')."
    )
