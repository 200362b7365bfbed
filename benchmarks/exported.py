# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""How fast an exported file is, against the model that it was made of."""

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from torch import Tensor

from mlla_mm.apis.export import describe_and_select
from mlla_mm.apis.model import load_model
from mlla_mm.apis.test_data import test_datasets
from mlla_mm.compat.pytorch import require_compiler
from mlla_mm.engine.arguments import named_arguments
from mlla_mm.engine.compile import compile_backbone
from mlla_mm.engine.config_files import read_config
from mlla_mm.evaluation.markdown import markdown_table
from mlla_mm.export import FORMATS, ExportError, Options, Part, require_support
from mlla_mm.export.compare import predict
from mlla_mm.export.exported import is_exported, require_task
from mlla_mm.export.formats import (
    Runner,
    example_inputs,
    onnx_runner,
    torchscript_runner,
)
from mlla_mm.export.parts import TASKS
from mlla_mm.utils.allocator import keep_freed_memory
from mlla_mm.utils.images import read_image

from .meter import (
    Call,
    Meter,
    format_settings,
    spread,
    times_as_fast,
    unsteady_note,
)
from .pictures import natural_picture

Shape = Tuple[int, int]

EAGER = 'PyTorch'
COMPILED = 'PyTorch, compiled'
TEST_STEP = 'PyTorch, test_step'

SHAPES: Dict[str, Shape] = dict(
    detection=(800, 1280), segmentation=(512, 512), classification=(224, 224)
)
"""Height and width that are usual in each task."""

_TORCHSCRIPT, _ONNX = FORMATS['torchscript'], FORMATS['onnx']
# In as many, TorchScript looks at its inputs and makes faster code.
_FIRST_CALLS = 3
# Detections of a class that overlap by more are one: NMS leaves no two of them.
_SAME_BOX = 0.9


class Measured(NamedTuple):
    """What was measured of a model, or of a file.

    Attributes:
        name (str): :data:`EAGER`, :data:`COMPILED`, :data:`TEST_STEP` or the path of
            the file.
        size (int, optional): Bytes of the file. None for what is no file.
        agreement (float): Share of its predictions that are PyTorch's, see
            :func:`agreement`.
        detections (int, optional): Their number. None for other tasks.
        times (list[float]): Milliseconds per image, a sample for each round.
    """

    name: str
    size: Optional[int]
    agreement: float
    detections: Optional[int]
    times: List[float]


def run(args: argparse.Namespace) -> None:
    """Measure as the command line says; print and save the results.

    Args:
        args (argparse.Namespace): The arguments of
            ``tools/analysis_tools/export_speed.py``.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If an argument is wrong, a package is missing, or a file is no whole
            model of the config's task.
    """
    meter = Meter('cpu', args.repeats)
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f'--threads must be at least 1, got {args.threads}.')
        torch.set_num_threads(args.threads)
    if args.compile:
        require_compiler('--compile')
    if is_exported(args.checkpoint):
        raise ValueError(f'{args.checkpoint} is an exported file: give its checkpoint.')
    cfg = read_config(args.config, args.cfg_options)
    task = TASKS.get(cfg.get('default_scope'), '')
    shape = tuple(args.shape or SHAPES.get(task, SHAPES['classification']))
    require_support('torchscript', Options(shape))
    files = open_files(args.files, task)
    model = load_model(
        cfg, args.checkpoint, 'cpu', args.ema, args.trust_checkpoint, args.fuse_conv_bn
    )
    part = describe_and_select(model, cfg)
    picture = args.image or find_picture(cfg)
    image = prepare_image(part, picture, shape)
    keep_freed_memory()  # as training and inference do
    measured = measure(part, files, image, meter, args.compile)
    settings = {
        **meter.describe(),
        'onnxruntime': _onnxruntime(args.files),
        'config': str(args.config),
        'checkpoint': str(args.checkpoint),
        'fuse_conv_bn': args.fuse_conv_bn,
        'shape': shape,
        'picture': picture,
        'score_threshold': part.metadata.get('score_threshold'),
    }
    text = format_measured(measured, settings)
    print(text)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = [
        {**x._asdict(), 'speedup': times_as_fast(x.times, measured[0].times)._asdict()}
        for x in measured
    ]
    record = json.dumps({**settings, 'rows': rows}, indent=2)
    (out / 'export_speed.json').write_text(record + '\n')
    (out / 'export_speed.md').write_text(text + '\n')
    print(f'\nSaved in {out}')


def open_files(
    paths: Sequence[str], task: str
) -> Dict[str, Tuple[Runner, Mapping[str, str]]]:
    """Open exported files, to run on the CPU with as many threads as PyTorch.

    Args:
        paths (Sequence[str]): TorchScript and ONNX files of whole models.
        task (str): Their task.

    Returns:
        dict[str, tuple[Callable, Mapping[str, str]]]: What runs each file, and its
        metadata.

    Raises:
        FileNotFoundError: If one does not exist.
        ValueError: If one is named twice, has another suffix, cannot be read or is no
            whole model of the task, or onnxruntime is missing.
    """
    if len(set(paths)) < len(paths):
        raise ValueError(f'A file is named twice: {" ".join(paths)}.')
    files: Dict[str, Tuple[Runner, Mapping[str, str]]] = {}
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f'Exported file not found: {path}')
        suffix = Path(path).suffix
        if suffix == _TORCHSCRIPT:
            files[path] = torchscript_runner(Path(path))
        elif suffix == _ONNX:
            run_file, _, metadata = onnx_runner(
                Path(path), 'cpu', torch.get_num_threads()
            )
            files[path] = run_file, metadata
        else:
            raise ValueError(
                f'{path} must be TorchScript ({_TORCHSCRIPT}) or ONNX ({_ONNX}), and '
                f'its suffix is {suffix!r}.'
            )
        require_task(path, files[path][1], task)
    return files


def find_picture(cfg: Config) -> Optional[str]:
    """The first picture of a config's test data; None if they are not here."""
    (_, dataset), *_ = test_datasets(cfg)
    scope = DefaultScope.overwrite_default_scope(cfg.default_scope)
    # pycocotools tells what it is doing.
    with named_arguments(cfg), scope, redirect_stdout(StringIO()):
        try:
            built = DATASETS.build(copy.deepcopy(dataset))
        except FileNotFoundError:
            return None
    path = built.get_data_info(0)['img_path'] if len(built) else ''
    return path if Path(path).is_file() else None


def prepare_image(part: Part, picture: Optional[str], shape: Shape) -> Tensor:
    """An image of a size, as a test pipeline gives it.

    Args:
        part (Part): The whole model that gets it.
        picture (str, optional): What is resized to it, whatever its proportions. None
            makes a synthetic picture, for models of other than three channels noise.
        shape (tuple[int, int]): Height and width in pixels.

    Returns:
        Tensor: BGR, uint8, (C, height, width).

    Raises:
        FileNotFoundError: If there is no such picture.
        ValueError: If it cannot be read, or the model takes no colours.
    """
    height, width = shape
    if part.in_channels != 3:
        if picture is not None:
            raise ValueError(
                f'{picture} is read as three channels, and the model takes '
                f'{part.in_channels}: its speed can be measured where its test data '
                'are not, and without --image.'
            )
        return example_inputs(part, 1, height, width)[0][0].byte()
    if picture is None:
        pixels = natural_picture(np.random.default_rng(0), width, height)
    else:
        pixels = mmcv.imresize(read_image(picture), (width, height))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def measure(
    part: Part,
    files: Mapping[str, Tuple[Runner, Mapping[str, str]]],
    image: Tensor,
    meter: Meter,
    compiled: bool = False,
) -> List[Measured]:
    """Race a whole model in PyTorch against exported files of it, in one race.

    A call takes one image and gives the predictions for it: normalising, padding,
    thresholds and NMS are timed, reading and resizing are not. PyTorch runs the module
    that files are traced from, so that all rows compute the same. Besides, there is
    ``model.test_step``, with data samples, and in a detector with masks pasted into the
    image. All get the same image and the same settings, such as the score threshold.

    Args:
        part (Part): The whole of a model, on the CPU.
        files (Mapping): From :func:`open_files`.
        image (Tensor): From :func:`prepare_image`.
        meter (Meter): The CPU, and the number of rounds.
        compiled (bool): Whether to race PyTorch with a compiled backbone, too.
            Compilation is not timed. Defaults to False.

    Returns:
        list[Measured]: :data:`EAGER`, :data:`COMPILED` if it is wanted,
        :data:`TEST_STEP`, and the files.

    Raises:
        ValueError: If a file fails, or is normalised or gives other outputs than the
            model's own.
    """
    task = part.metadata['task']
    reversed_ = image.flip(0) if part.reverse_channels else image
    inputs = [reversed_[None].float(), *part.settings.values()]
    runners: Dict[str, Runner] = {EAGER: part.module}
    if compiled:
        module = copy.deepcopy(part.module)
        compile_backbone(module)
        runners[COMPILED] = module
    steps: Dict[str, Call] = {
        name: partial(runner, *inputs) for name, runner in runners.items()
    }
    steps[TEST_STEP] = partial(predict, part.model, task, image)
    for path, (runner, metadata) in files.items():
        # Whether it normalises itself.
        ours = part.metadata['normalization']
        if metadata['normalization'] != ours:
            raise ExportError(
                f'{path} takes images that are normalised {metadata["normalization"]} '
                f'it, and the model is measured with that {ours}: export it without '
                '--no-normalize.'
            )
        steps[path] = partial(runner, *inputs)
    calls = {name: torch.no_grad()(step) for name, step in steps.items()}
    found: Dict[str, Mapping[str, Tensor]] = {}
    for name, call in calls.items():
        try:
            for _ in range(_FIRST_CALLS if name.endswith(_TORCHSCRIPT) else 1):
                outputs: Any = call()
        except Exception as error:  # runtimes raise errors of many types
            if name not in files:
                raise
            reason = str(error).strip().splitlines() or ['']
            raise ExportError(
                f'{name} fails for an image of {tuple(image.shape)}: {reason[-1]}'
            ) from error
        if name == TEST_STEP:
            found[name] = _outputs_of(task, outputs)
            continue
        if len(outputs) != len(part.outputs):
            raise ExportError(
                f'{name} gives {len(outputs)} outputs, and the model '
                f'{len(part.outputs)} ({", ".join(part.outputs)}): export it with this '
                'config, without --logits.'
            )
        found[name] = dict(zip(part.outputs, outputs))
    samples = meter.samples(calls)
    if compiled:
        # Another race would otherwise find code that was made for this image size.
        torch.compiler.reset()
    return [
        Measured(
            name,
            Path(name).stat().st_size if name in files else None,
            agreement(task, found[EAGER], outputs),
            len(outputs['scores']) if part.is_detector else None,
            [seconds * 1000 for seconds in samples[name]],
        )
        for name, outputs in found.items()
    ]


def agreement(
    task: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> float:
    """Share of predictions for an image that another program makes, too.

    Args:
        task (str): 'detection': of the detections of whichever has more, those that
            both have, with one class and boxes that overlap by more than 90%, whatever
            their masks. 1 if neither has any. 'segmentation': of the pixels.
            'classification': of the probability.
        expected (Mapping[str, Tensor]): Outputs of one program, by name.
        found (Mapping[str, Tensor]): Those of the other.

    Returns:
        float: 0 to 1.

    Raises:
        ValueError: If outputs that have a fixed size differ in size.
    """
    if task == 'detection':
        return _same_detections(expected, found)
    name = 'labels' if task == 'segmentation' else 'scores'
    one, other = expected[name], found[name]
    if one.shape != other.shape:
        raise ExportError(
            f'{name} {tuple(one.shape)} and {tuple(other.shape)} are of different '
            'models: export the file with this config.'
        )
    if task == 'segmentation':
        return float((one == other).float().mean())
    return float(torch.minimum(one, other).sum() / one.sum())


def _same_detections(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> float:
    from mmdet.structures.bbox import bbox_overlaps

    most = max(len(expected['boxes']), len(found['boxes']))
    if most == 0:
        return 1.0
    is_pair = bbox_overlaps(expected['boxes'], found['boxes']) > _SAME_BOX
    is_pair &= expected['labels'][:, None] == found['labels']
    # A box may have two partners where NMS allows that.
    return min(int(is_pair.any(0).sum()), int(is_pair.any(1).sum())) / most


def _outputs_of(task: str, sample: Any) -> Dict[str, Tensor]:
    """What a data sample says, under the names of an exported file."""
    if task == 'detection':
        instances = sample.pred_instances
        return dict(
            boxes=instances.bboxes, scores=instances.scores, labels=instances.labels
        )
    if task == 'segmentation':
        return dict(labels=sample.pred_sem_seg.data)
    return dict(scores=sample.pred_score[None])


def _onnxruntime(paths: Sequence[str]) -> Optional[str]:
    """Version of onnxruntime; None if no file needs it."""
    if not any(path.endswith(_ONNX) for path in paths):
        return None
    import onnxruntime

    return onnxruntime.__version__


def format_measured(measured: Sequence[Measured], settings: Mapping[str, Any]) -> str:
    """Set a race in a Markdown table, below what it depends on.

    Args:
        measured (Sequence[Measured]): From :func:`measure`.
        settings (Mapping): From :meth:`.meter.Meter.describe`, with ``onnxruntime``,
            ``config``, ``shape``, ``picture`` and ``score_threshold``, as :func:`run`
            has them.
    """
    height, width = settings['shape']
    title = format_settings(settings)
    if settings['onnxruntime']:
        title += f', onnxruntime {settings["onnxruntime"]}'
    columns = ['', 'ms per image', 'middle half', f'speed / {EAGER}', 'middle half']
    columns += ['MB', 'same predictions']
    has_detections = measured[0].detections is not None
    if has_detections:
        columns.append(f'detections above {settings["score_threshold"]:g}')
    rows, spreads = [], {}
    for x in measured:
        times = spreads[x.name] = spread(x.times)
        low, ratio, high = times_as_fast(x.times, measured[0].times)
        row = [
            x.name,
            f'{times.median:.4g}',
            f'{times.low:.4g} to {times.high:.4g}',
            f'{ratio:.2f}x',
            f'{low:.2f} to {high:.2f}',
            '-' if x.size is None else f'{x.size / 1e6:.1f}',
            f'{x.agreement:.1%}',
        ]
        rows.append([*row, str(x.detections)] if has_detections else row)
    picture = settings['picture'] or 'a synthetic picture'
    lines = [
        title,
        '',
        f'### {settings["config"]}, {height}x{width}',
        '',
        f'From {picture}.',
        '',
        markdown_table(columns, rows) + unsteady_note(spreads),
        '',
        f'{EAGER}: the module that files are traced from. test_step: with data '
        'samples, and masks, if there are any, pasted into the image.',
    ]
    return '\n'.join(lines)
