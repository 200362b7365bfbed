# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The work of ``tools/export.py``."""

import argparse
import json
from pathlib import Path
from typing import Any, Dict, List

from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope

from ..engine.arguments import named_arguments
from ..engine.config_files import read_config
from ..engine.parts import kind_of
from ..export import (
    FORMATS,
    ExportError,
    Options,
    Part,
    export_model,
    require_support,
    select_part,
    whole_model,
)
from ..export.exported import is_exported, reverses_channels
from ..export.parts import TASKS
from ..version import __version__
from .model import load_model
from .test_data import classes_and_palette, test_datasets, test_pipeline


def export(args: argparse.Namespace) -> List[str]:
    """Export a model as the command line says.

    Args:
        args (argparse.Namespace): The arguments of ``tools/export.py``.

    Returns:
        list[str]: What was written and how well it agrees with the model, as lines to
        print.

    Raises:
        FileNotFoundError: If the config or the checkpoint does not exist.
        ExportError: If the model cannot be exported, or if the file differs from it.
        ValueError: If the weights do not fit, or if an argument is wrong.
    """
    options = Options(tuple(args.shape), args.opset, args.int8)
    # Before the model is built, which takes seconds.
    require_support(args.format, options)
    if is_exported(args.checkpoint):
        raise ExportError(
            f'{args.checkpoint} is an exported file already: give its checkpoint.'
        )
    cfg = read_config(args.config, args.cfg_options)
    model = load_model(
        cfg,
        args.checkpoint,
        args.device,
        args.ema,
        args.trust_checkpoint,
        args.fuse_conv_bn,
    )
    # A config of a backbone alone needs no task.
    name = args.part or ('model' if cfg.get('default_scope') in TASKS else 'backbone')
    if name == 'model':
        part = describe_and_select(model, cfg, not args.no_normalize, args.logits)
    else:
        part = select_part(model, name)
    checkpoint = Path(args.checkpoint)
    suffix = f'{"_int8" if args.int8 else ""}{FORMATS[args.format]}'
    out = Path(args.out or checkpoint.with_name(f'{checkpoint.stem}_{name}{suffix}'))
    differences = export_model(part, args.format, out, options)
    return _report(out, part, options, differences)


def describe_and_select(
    model: BaseModel, cfg: Config, normalize: bool = True, logits: bool = False
) -> Part:
    """The whole of a model, with what the config says about it.

    Args:
        model (BaseModel): The model in evaluation mode, from
            :func:`mlla_mm.apis.load_model`.
        cfg (Config): Its config.
        normalize (bool): Whether the file normalises images. Else they are normalised
            before. Defaults to True.
        logits (bool): Whether a segmentor's file gives logits, too. Defaults to False.

    Raises:
        ExportError: If the model cannot be exported.
        ValueError: If the config has no known task, no test data or no class names.
    """
    scope = cfg.get('default_scope')
    if scope not in TASKS:
        raise ExportError(
            f"The config's default_scope must be one of {list(TASKS)}, got {scope}. "
            "Export the backbone alone, with part 'backbone'."
        )
    with named_arguments(cfg), DefaultScope.overwrite_default_scope(scope):
        datasets = test_datasets(cfg)
        classes, palette = classes_and_palette(datasets[0][1], model.dataset_meta)
    metadata: Dict[str, Any] = dict(
        config=Path(cfg.filename).name if cfg.filename else '',
        producer=f'mlla_mm {__version__}',
        classes=list(classes),
        palette=[list(map(int, colour)) for colour in palette],
        # Reading and packing aside: what is to be done with a picture before.
        preprocessing=_plain(
            [
                dict(step, type=kind_of(step))
                for step in test_pipeline(datasets)
                if not str(kind_of(step)).startswith(('Load', 'Pack'))
            ]
        ),
    )
    if (cfg.model.get('data_preprocessor') or {}).get('rgb_to_bgr'):
        metadata['channel_order'] = 'BGR'
    return whole_model(
        model,
        TASKS[scope],
        reverses_channels(cfg.model),
        metadata,
        normalize=normalize,
        logits=logits,
    )


def _plain(value: Any) -> Any:
    """A part of a config as JSON has it."""
    return json.loads(json.dumps(value, default=str))


def _report(
    out: Path, part: Part, options: Options, differences: Dict[str, float]
) -> List[str]:
    size = out.stat().st_size / 1e6
    number = '1' if part.is_detector else 'N'
    outputs = ', '.join(part.outputs)
    lines = [
        f'{out} ({size:.1f} MB): images ({number}, {part.in_channels}, H, W) to '
        f'{outputs}'
    ]
    found = ', '.join(
        f'{kind} {value:.1e}{" px" if kind == "boxes" else ""}'
        for kind, value in differences.items()
    )
    if options.int8:
        lines.append(f'Before the linear layers became int8, it differed by: {found}')
        lines.append('Evaluate it by tools/test.py: int8 may cost accuracy.')
    else:
        lines.append(f'Largest differences to the model, at two image sizes: {found}')
    return lines
