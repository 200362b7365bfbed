# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Time and memory of whole models, raced against the plain assembly of MLLA."""

import argparse
import copy
import json
import math
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple, Union

import mmengine
import numpy as np
import torch
from mmengine.logging import MMLogger
from torch import Tensor, nn

import mlla_mm
from mlla_mm.apis.model import Classifier
from mlla_mm.compat.pytorch import require_compiler
from mlla_mm.engine.compile import compile_backbone
from mlla_mm.evaluation.markdown import markdown_table
from mlla_mm.models import MLLA, fusing
from mlla_mm.utils.allocator import keep_freed_memory

from .accuracy_latency import describe_device
from .eager_mlla import EagerMLLA
from .latency import Spread, measure_latency, spread, unsteady_note
from .peak_memory import module_bytes, peak_bytes
from .plain_mlla import PlainMLLA

_SIZES = ('t', 's', 'b')
# Of one function.
_ASSEMBLIES = dict(mlla=MLLA, eager=EagerMLLA, plain=PlainMLLA)
# In mmpretrain's model zoo.
_ZOO = dict(swin='swin-{}_16xb64_in1k', convnext='convnext-{}_32xb128_in1k')
_SIZE_NAMES = dict(t='tiny', s='small', b='base')
#: Names of the models that can be raced.
MODELS = tuple(
    f'{family}-{size}' for family, size in product((*_ASSEMBLIES, *_ZOO), _SIZES)
)
#: What is timed by default, for one size.
DEFAULT_MODELS = ('mlla-t', 'plain-t', 'swin-t', 'convnext-t')
MODES = ('infer', 'train')
DTYPES = ('float32', 'float16', 'bfloat16')
COMPILED = 'compiled'
CUDA_GRAPH = 'CUDA graph'
#: How a model can be timed besides as it is.
VARIANTS = (COMPILED, CUDA_GRAPH)
#: Heights and widths that have a name.
PRESETS = dict(
    classification=(224, 224), detection=(800, 1280), segmentation=(512, 2048)
)
#: Sides of the square images of a sweep.
SWEEP_SIDES = (224, 320, 448, 640, 896, 1120)
TABLE_NAME = 'benchmark.md'
SAMPLES_NAME = 'benchmark.json'
PICTURE_NAME = 'benchmark.png'
# The same function in float32, but for the order of sums.
_TOLERANCE = 1e-3
_STRIDE = 4
# What PyTorch's documentation calls before it captures.
_CALLS_BEFORE_CAPTURE = 3


class Case(NamedTuple):
    """What all models do in a race.

    Attributes:
        task (str): 'classification', images to logits of 1000 classes, or a name of the
            backbone's task: images to the feature maps of all four stages.
        shape (tuple[int, int]): Height and width of the images.
        batch_size (int): Images per call.
        mode (str): 'infer', or 'train' for a training step without the optimiser's
            part: forward, backward from fixed gradients of the outputs, gradients set
            to None.
        dtype (str): 'float32', or 'float16' or 'bfloat16' for autocast.
    """

    task: str
    shape: Tuple[int, int]
    batch_size: int
    mode: str = 'infer'
    dtype: str = 'float32'

    def __str__(self) -> str:
        height, width = self.shape
        return (
            f'{self.task} {height}x{width}, batch {self.batch_size}, {self.mode}, '
            f'{self.dtype}'
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of an image in the first stage."""
        return math.prod(-(-side // _STRIDE) for side in self.shape)


class Measured(NamedTuple):
    """A model in a case.

    Attributes:
        model (str): Its name, as in :data:`MODELS`.
        variant (str): '' for the model as it is, 'compiled' for one whose backbone
            ``torch.compile`` has compiled, 'CUDA graph' for a replayed graph.
        parameters (int): Number of parameters.
        weights (int): Bytes of parameters and buffers.
        peak_memory (int, optional): Peak bytes of tensors during a call, see
            :func:`measure_case`. None for a CUDA graph.
        times (list[float]): Milliseconds per image, a sample per round.
    """

    model: str
    variant: str
    parameters: int
    weights: int
    peak_memory: Optional[int]
    times: List[float]

    @property
    def label(self) -> str:
        """Name that tells the variants of a model apart."""
        return _label(self.model, self.variant)


def _label(model: str, variant: str) -> str:
    return f'{model}, {variant}' if variant else model


def find_plain(
    point: Measured, measured: Sequence[Measured], variant: str = ''
) -> Measured:
    """Measurement of the plain assembly of a model's size.

    Args:
        point (Measured): The model.
        measured (Sequence[Measured]): All models of the case.
        variant (str): Which one of the plain assembly is meant. Defaults to '': as it
            is.
    """
    size = point.model.split('-')[1]
    return next(
        other
        for other in measured
        if (other.model, other.variant) == (f'plain-{size}', variant)
    )


def speedup(point: Measured, reference: Measured) -> Spread:
    """How many times as fast as another model a model is.

    Samples of the same round are compared, so that a machine that slows down for a
    while does so for both.
    """
    return spread([b / a for a, b in zip(point.times, reference.times)])


def memory_ratio(point: Measured, reference: Measured) -> Optional[float]:
    """Peak memory over that of another model; None where it was not measured."""
    if point.peak_memory is None:
        return None
    return point.peak_memory / reference.peak_memory


def parse_shape(text: str) -> Tuple[str, Tuple[int, int]]:
    """Task and size of images, from the name of a preset or from HEIGHTxWIDTH.

    Raises:
        ValueError: If it is neither.
    """
    if text in PRESETS:
        return text, PRESETS[text]
    found = re.fullmatch(r'([1-9]\d*)x([1-9]\d*)', text)
    if not found:
        raise ValueError(
            f'--shape takes {", ".join(PRESETS)} or HEIGHTxWIDTH, got {text!r}.'
        )
    return 'backbone', (int(found[1]), int(found[2]))


def make_cases(
    shapes: Sequence[str],
    batch_sizes: Optional[Sequence[int]] = None,
    modes: Sequence[str] = MODES[:1],
    dtypes: Sequence[str] = DTYPES[:1],
) -> List[Case]:
    """All combinations of shapes, modes and dtypes.

    Args:
        shapes (Sequence[str]): See :func:`parse_shape`.
        batch_sizes (Sequence[int], optional): One for all shapes, or one for each.
            Defaults to None: 1.
        modes (Sequence[str]): Of :data:`MODES`. Defaults to inference.
        dtypes (Sequence[str]): Of :data:`DTYPES`. Defaults to float32.

    Raises:
        ValueError: If a shape is not understood, or batch sizes are not positive or
            not as many as shapes.
    """
    batch_sizes = batch_sizes or [1]
    if len(batch_sizes) == 1:
        batch_sizes = [*batch_sizes] * len(shapes)
    if len(batch_sizes) != len(shapes) or min(batch_sizes) < 1:
        raise ValueError(
            f'--batch-size takes one positive number for all {len(shapes)} shapes, or '
            f'one for each, got {" ".join(map(str, batch_sizes))}.'
        )
    return [
        Case(*parse_shape(shape), batch_size, mode, dtype)
        for (shape, batch_size), mode, dtype in product(
            zip(shapes, batch_sizes), modes, dtypes
        )
    ]


def make_sweep(
    sides: Sequence[int],
    batch_size: int = 1,
    mode: str = MODES[0],
    dtype: str = DTYPES[0],
) -> List[Case]:
    """Cases of backbones on square images of several sizes.

    Raises:
        ValueError: If there are fewer than two sizes, whose slope is asked for.
    """
    if len(set(sides)) < 2 or min(sides) < 1:
        raise ValueError(
            '--sweep takes two or more different positive sides, got '
            f'{" ".join(map(str, sides))}.'
        )
    shapes = [f'{side}x{side}' for side in sorted(set(sides))]
    return make_cases(shapes, [batch_size], [mode], [dtype])


def check_models(models: Sequence[str]) -> None:
    """Check names of models.

    Raises:
        ValueError: If one is unknown or given twice, or if the plain assembly is
            missing that models of its size are compared with.
    """
    unknown = [model for model in models if model not in MODELS]
    if unknown:
        raise ValueError(
            f'Unknown model {unknown[0]!r}. There are: {", ".join(MODELS)}.'
        )
    if len(set(models)) < len(models):
        raise ValueError(f'--models names one twice: {" ".join(models)}.')
    for size in _SIZES:
        of_size = [model for model in models if model.endswith(f'-{size}')]
        if of_size and f'plain-{size}' not in of_size:
            raise ValueError(
                f'{of_size[0]} is compared with plain-{size}: add it to --models.'
            )


def check_device(device: str) -> None:
    """Check that tensors can be put on a device.

    Raises:
        ValueError: If not.
    """
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f'Device {device!r} cannot be used: {error}') from error


def check_variants(variants: Sequence[str], device: str) -> None:
    """Check that models can be timed in these variants.

    Args:
        variants (Sequence[str]): Of :data:`VARIANTS`.
        device (str): Where models run.

    Raises:
        ValueError: If a variant is unknown, PyTorch too old to compile, or the device
            not one that has CUDA graphs.
    """
    unknown = [variant for variant in variants if variant not in VARIANTS]
    if unknown:
        raise ValueError(
            f'Unknown variant {unknown[0]!r}. There are: {", ".join(VARIANTS)}.'
        )
    if COMPILED in variants:
        require_compiler('--compile')
    if CUDA_GRAPH in variants and not _is_cuda(device):
        raise ValueError(
            f'--cuda-graph needs a CUDA device, and this is {device!r}: leave it out.'
        )


def check_fusing(fuse_conv_bn: bool, modes: Sequence[str]) -> None:
    """Check that BatchNorm may be folded away.

    Raises:
        ValueError: If models that have lost it are to be trained.
    """
    if fuse_conv_bn and 'train' in modes:
        raise ValueError(
            '--fuse-conv-bn is for inference, and --mode has train: leave one out.'
        )


def _is_cuda(device: str) -> bool:
    return torch.device(device).type == 'cuda'


def build_model(name: str, classify: bool) -> nn.Module:
    """Build a model with random weights, without stochastic depth.

    Args:
        name (str): One of :data:`MODELS`: 'mlla-t' is :class:`mlla_mm.models.MLLA`,
            'eager-t' the same without fused kernels, 'plain-t' its plain assembly;
            others are mmpretrain's.
        classify (bool): Build a classifier of 1000 classes, else a backbone that
            returns the maps of all four stages.
    """
    family, size = name.split('-')
    if family in _ZOO:
        return _build_from_zoo(family, size, classify)
    out_indices = 3 if classify else (0, 1, 2, 3)
    backbone = _ASSEMBLIES[family](size, out_indices=out_indices)
    return Classifier(backbone, 1000) if classify else backbone


def _build_from_zoo(family: str, size: str, classify: bool) -> nn.Module:
    from mmpretrain.apis import get_model

    options = dict(drop_path_rate=0.0)
    if family == 'swin':
        # It refuses maps that are smaller than a window.
        options.update(pad_small_map=True)
    if not classify:
        options.update(out_indices=(0, 1, 2, 3))
        if family == 'convnext':
            options.update(gap_before_final_norm=False)
    model = get_model(_ZOO[family].format(_SIZE_NAMES[size]), backbone=options)
    return model if classify else model.backbone


def measure_case(
    case: Case,
    models: Sequence[str],
    device: str = 'cpu',
    repeats: int = 20,
    variants: Sequence[str] = (),
    fuse_conv_bn: bool = False,
) -> List[Measured]:
    """Race models against one another.

    They share the images, and models of the family share the weights: the assemblies of
    MLLA have to agree in float32 before anything is measured. Stochastic depth is off.
    In training BatchNorm is in training mode.

    Peak memory is that of a call after the first: weights, images, and the tensors
    that the call allocates. On CUDA ``torch.cuda.max_memory_allocated`` counts, and so
    does what the first call left behind; on the CPU PyTorch's profiler records the
    allocations. Neither sees what libraries such as oneDNN allocate by themselves. That
    of CUDA graphs is not measured: they share theirs.

    Args:
        case (Case): What they do.
        models (Sequence[str]): See :func:`check_models`.
        device (str): Where to run them, e.g. 'cuda'. Defaults to 'cpu'.
        repeats (int): Number of rounds, see
            :func:`benchmarks.latency.measure_latency`. Defaults to 20.
        variants (Sequence[str]): How to time every model besides: 'compiled', its
            backbone compiled, and 'CUDA graph', the call captured once and replayed.
            Compilation and capture are not timed. Defaults to ().
        fuse_conv_bn (bool): Fold BatchNorm into convolutions beforehand, in every model
            that has it. Defaults to False.

    Returns:
        list[Measured]: In the order of ``models``: first as they are, then variant by
        variant.

    Raises:
        ValueError: If names, device, repeats or variants are wrong, a model does not
            run on such images or cannot be captured, or BatchNorm is to be folded for
            training.
        RuntimeError: If assemblies of MLLA differ.
    """
    check_models(models)
    check_device(device)
    check_variants(variants, device)
    check_fusing(fuse_conv_bn, [case.mode])
    if repeats < 1:
        raise ValueError(f'--repeats must be at least 1, got {repeats}.')
    images = _make_images(case, device)
    calls, memory = {}, {}
    # What waits for a device waits for the current one.
    with torch.cuda.device_of(images):
        built = {(name, ''): _build_twin(name, case).to(device) for name in models}
        if fuse_conv_bn:
            for model in built.values():
                fusing.fuse_conv_bn(model)
        _check_twins({name: model for (name, _), model in built.items()}, images)
        for variant, name in product(variants, models):
            model = built[name, variant] = copy.deepcopy(built[name, ''])
            if variant == COMPILED:
                _compile(name, model)
        # Libraries allocate their workspace once: not at the expense of the first.
        torch.ones(1, 1, device=device, requires_grad=True).mm(
            images.new_ones(1, 1)
        ).backward()
        # Graphs are replayed one at a time, so the memory of one serves them all.
        pool = torch.cuda.graph_pool_handle() if CUDA_GRAPH in variants else None
        for (name, variant), model in built.items():
            label = _label(name, variant)
            calls[label], memory[label] = _prepare(
                label, model, images, case, pool if variant == CUDA_GRAPH else None
            )
        found = measure_latency(calls, repeats)
    if COMPILED in variants:
        # Another case would otherwise find code that was made for the sizes of this.
        torch.compiler.reset()
    return [
        Measured(
            name,
            variant,
            sum(p.numel() for p in model.parameters()),
            module_bytes(model),
            memory[_label(name, variant)],
            [
                seconds * 1000 / case.batch_size
                for seconds in found[_label(name, variant)].times
            ],
        )
        for (name, variant), model in built.items()
    ]


def _compile(name: str, model: nn.Module) -> None:
    """Compile a model's backbone: MLLA as we do, the others as PyTorch does."""
    if name.startswith(('mlla-', 'eager-')):
        compile_backbone(model)
    else:
        getattr(model, 'backbone', model).compile()


def _make_images(case: Case, device: str) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(case.batch_size, 3, *case.shape).to(device)


def _build_twin(name: str, case: Case) -> nn.Module:
    """Build a model in its mode; those of one architecture have the same weights."""
    torch.manual_seed(0)
    model = build_model(name, classify=case.task == 'classification')
    model.train(case.mode == 'train')  # mmpretrain's Swin returns nothing
    return model


def _check_twins(models: Mapping[str, nn.Module], images: Tensor) -> None:
    """Make sure that the race is between assemblies of one function."""
    for size in _SIZES:
        names = [n for family in _ASSEMBLIES if (n := f'{family}-{size}') in models]
        if len(names) < 2:
            continue
        outputs = {name: _evaluate(models[name], images) for name in names}
        plain = outputs.pop(f'plain-{size}')
        for name, found in outputs.items():
            for a, b in zip(found, plain):
                error = ((a - b).norm() / b.norm()).item()
                if not error < _TOLERANCE:
                    raise RuntimeError(
                        f'Outputs of {name} and plain-{size} differ by {error:.2g} '
                        f'in float32, by more than {_TOLERANCE}: a race between them '
                        'would mean nothing.'
                    )


def _evaluate(model: nn.Module, images: Tensor) -> Tuple[Tensor, ...]:
    """Outputs in evaluation mode and in float32 proper."""
    training = model.training
    # BatchNorm alone has a memory of what was run; in evaluation it has none.
    model.eval()
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        outputs = _as_tuple(model(images))
    model.train(training)
    return outputs


def _as_tuple(outputs: Union[Tensor, Sequence[Tensor]]) -> Tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _prepare(
    label: str,
    model: nn.Module,
    images: Tensor,
    case: Case,
    pool: Optional[Tuple[int, int]] = None,
) -> Tuple[Callable[[], object], Optional[int]]:
    """Make the call to time; try it, and measure its peak memory.

    With a pool of memory the call is the replay of a CUDA graph, which is not measured.
    """
    resident = module_bytes(model) + images.numel() * images.element_size()
    others = torch.cuda.memory_allocated() - resident if images.is_cuda else 0
    try:
        call = _make_call(model, images, case)
        if pool is not None:
            return _CudaGraph(call, pool), None
        call()
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f'{label} fails in {case}: {error}') from error
    peak = peak_bytes(call, images.device.type, resident)
    return call, peak - others


def _make_call(model: nn.Module, images: Tensor, case: Case) -> Callable[[], object]:
    forward = partial(_forward, model, images, getattr(torch, case.dtype))
    if case.mode == 'infer':
        return torch.no_grad()(forward)
    # Fixed gradients in the place of a loss, whose cost is not the model's. They are
    # of norm one, so that the sums over them stay in range in half precision.
    gradients = [
        nn.functional.normalize(torch.randn_like(output).flatten(), dim=0).view_as(
            output
        )
        for output in forward()
    ]
    return partial(_train, model, forward, gradients)


def _forward(
    model: nn.Module, images: Tensor, dtype: torch.dtype
) -> Tuple[Tensor, ...]:
    enabled = dtype is not torch.float32
    with torch.autocast(
        images.device.type, dtype=dtype if enabled else None, enabled=enabled
    ):
        return _as_tuple(model(images))


def _train(
    model: nn.Module,
    forward: Callable[[], Tuple[Tensor, ...]],
    gradients: Sequence[Tensor],
) -> None:
    torch.autograd.backward(forward(), gradients)
    model.zero_grad(set_to_none=True)


class _CudaGraph:
    """A call that is captured in a CUDA graph, and then replayed.

    It returns what the call returned, with values that hold until the next replay in
    the pool. A training step leaves the gradients None, so the graph has memory of its
    own for them, and nothing else ever sees it.

    Args:
        call (Callable): What to capture.
        pool (tuple[int, int]): Where the graph has its memory, of
            ``torch.cuda.graph_pool_handle``.

    Raises:
        RuntimeError: If it cannot be captured.
    """

    def __init__(self, call: Callable[[], object], pool: Tuple[int, int]) -> None:
        self._call = call  # holds what the graph reads
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        # This stream is also left where capturing fails, unlike that of the capture.
        with torch.cuda.stream(stream):
            for _ in range(_CALLS_BEFORE_CAPTURE):
                call()
            try:
                with torch.cuda.graph(self._graph, pool=pool):
                    self._outputs = call()
            except RuntimeError as error:
                # The end of a capture fails after its first error, and would hide it.
                reason = error.__context__ or error
                raise RuntimeError(f'it cannot be captured: {reason}') from error
        torch.cuda.current_stream().wait_stream(stream)

    def __call__(self) -> object:
        self._graph.replay()
        return self._outputs


def describe_run(
    device: str, repeats: int, fuse_conv_bn: bool = False
) -> Dict[str, object]:
    """Settings of a race that its numbers depend on; None for what there is not."""
    is_cuda = _is_cuda(device)
    return dict(
        device=describe_device(device),
        threads=torch.get_num_threads(),
        repeats=repeats,
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda if is_cuda else None,
        cudnn=torch.backends.cudnn.version() if is_cuda else None,
        driver=_driver_version() if is_cuda else None,
        triton=_triton_version(),
        float32_matmul_precision=torch.get_float32_matmul_precision(),
        mlla_ops=os.environ.get('MLLA_OPS') or 'default',
        fuse_conv_bn=fuse_conv_bn,
        mmengine=mmengine.__version__,
        mlla_mm=mlla_mm.__version__,
        command=shlex.join(sys.argv),
    )


def _driver_version() -> Optional[str]:
    """Version of NVIDIA's driver where Linux tells it."""
    information = Path('/proc/driver/nvidia/version')
    if not information.is_file():
        return None
    found = re.search(r'^NVRM.*?\s(\d+(\.\d+)+)\s', information.read_text(), re.M)
    return found[1] if found else None


def _triton_version() -> Optional[str]:
    """Version of Triton, without the cost of importing it."""
    try:
        return metadata.version('triton')
    except metadata.PackageNotFoundError:
        return None


def format_settings(settings: Mapping[str, object]) -> str:
    """Name the device, the versions and what was done to the models in a line.

    Args:
        settings (Mapping): See :func:`describe_run`.
    """
    names = dict(
        torch='torch',
        cuda='CUDA',
        cudnn='cuDNN',
        driver='driver',
        triton='Triton',
        python='Python',
    )
    versions = [
        f'{name} {settings[key]}' for key, name in names.items() if settings[key]
    ]
    done = ['BatchNorm in the convolutions'] if settings.get('fuse_conv_bn') else []
    return ', '.join([str(settings['device']), *versions, *done])


def save_results(
    results: Mapping[Case, Sequence[Measured]],
    settings: Mapping[str, object],
    out: Union[str, Path],
) -> None:
    """Save all samples, and what is made of them, in JSON.

    Args:
        results (Mapping[Case, Sequence[Measured]]): Models of each case.
        settings (Mapping): See :func:`describe_run`.
        out (str | Path): File to write.
    """
    cases = [
        dict(
            case._asdict(),
            num_tokens=case.num_tokens,
            models=[_as_dict(point, measured) for point in measured],
        )
        for case, measured in results.items()
    ]
    Path(out).write_text(json.dumps(dict(settings, cases=cases), indent=2) + '\n')


def _as_dict(point: Measured, measured: Sequence[Measured]) -> dict:
    plain = find_plain(point, measured)
    return dict(
        point._asdict(),
        time=spread(point.times)._asdict(),
        speedup=speedup(point, plain)._asdict(),
        memory_ratio=memory_ratio(point, plain),
    )


def format_case(case: Case, measured: Sequence[Measured]) -> str:
    """Set a case in a Markdown table, and name what is unsteady.

    Compared with the plain assembly of the same size, as it is and in each variant that
    was raced.
    """
    variants = list(dict.fromkeys(point.variant for point in measured))
    columns = ['Model', 'Params', 'ms per image', 'middle half', 'images/s']
    for variant in variants:
        columns += [f'speed / {_label("plain", variant)}', 'middle half']
    columns += ['peak memory', 'memory / plain']
    rows = [
        [
            *_time_cells(point),
            *(
                cell
                for variant in variants
                for cell in _speed_cells(point, find_plain(point, measured, variant))
            ),
            *_memory_cells(point, find_plain(point, measured)),
        ]
        for point in measured
    ]
    spreads = {point.label: spread(point.times) for point in measured}
    return f'### {case}\n\n{markdown_table(columns, rows)}{unsteady_note(spreads)}'


def _time_cells(point: Measured) -> List[str]:
    low, median, high = spread(point.times)
    return [
        point.label,
        f'{point.parameters / 1e6:.1f} M',
        f'{median:.4g}',
        f'{low:.4g} to {high:.4g}',
        f'{1000 / median:.4g}',
    ]


def _speed_cells(point: Measured, reference: Measured) -> List[str]:
    low, median, high = speedup(point, reference)
    return [f'{median:.2f}x', f'{low:.2f} to {high:.2f}']


def _memory_cells(point: Measured, reference: Measured) -> List[str]:
    if point.peak_memory is None:
        return ['-', '-']
    ratio = memory_ratio(point, reference)
    return [f'{point.peak_memory / 2**20:.0f} MiB', f'{ratio:.2f}x']


class Curve(NamedTuple):
    """How the cost of a model grows with the number of tokens.

    Attributes:
        label (str): Name of the model.
        tokens (list[int]): Tokens of an image in the first stage.
        times (list[float]): Median milliseconds per image.
        memory (list[float]): Peak MiB per image without weights. Empty for a CUDA
            graph.
        time_exponent (float): Time is as tokens to this power.
        memory_exponent (float, optional): Memory is as tokens to this power.
    """

    label: str
    tokens: List[int]
    times: List[float]
    memory: List[float]
    time_exponent: float
    memory_exponent: Optional[float]


def fit_exponent(tokens: Sequence[float], costs: Sequence[float]) -> float:
    """Exponent of the power of ``tokens`` that fits ``costs`` best.

    Least squares of the logarithms: 1 means linear cost, 2 quadratic.
    """
    slope, _ = np.polyfit(np.log(tokens), np.log(costs), 1)
    return float(slope)


def fit_curves(results: Mapping[Case, Sequence[Measured]]) -> List[Curve]:
    """Curve of each model over the cases of a sweep.

    Args:
        results (Mapping[Case, Sequence[Measured]]): The same models in each case.
    """
    tokens = [case.num_tokens for case in results]
    curves = []
    for points in zip(*results.values()):
        times = [spread(point.times).median for point in points]
        memory = [
            (point.peak_memory - point.weights) / case.batch_size / 2**20
            for case, point in zip(results, points)
            if point.peak_memory is not None
        ]
        exponents = [
            fit_exponent(tokens, costs) if costs else None for costs in (times, memory)
        ]
        curves.append(Curve(points[0].label, tokens, times, memory, *exponents))
    return curves


def format_curves(curves: Sequence[Curve]) -> str:
    """Set a sweep in two Markdown tables, of time and of memory."""
    columns = ['Model', *(f'{n} tokens' for n in curves[0].tokens), 'exponent']
    titles = ('ms per image', 'Peak MiB per image, without weights')
    tables = [
        [(c.label, c.times, c.time_exponent) for c in curves],
        [(c.label, c.memory, c.memory_exponent) for c in curves if c.memory],
    ]
    return '\n\n'.join(
        f'### {title}\n\n'
        + markdown_table(
            columns,
            [
                [label, *(f'{cost:.4g}' for cost in costs), f'{exponent:.2f}']
                for label, costs, exponent in table
            ],
        )
        for title, table in zip(titles, tables)
    )


def run(args: argparse.Namespace) -> None:
    """Race, print, and write a table, the samples and a picture.

    Args:
        args (argparse.Namespace): The arguments of
            ``tools/analysis_tools/benchmark.py``.

    Raises:
        ValueError: If an argument is wrong.
    """
    from .plots import plot_benchmark, plot_sweep

    # mmpretrain would tell how each of its classifiers augments images in training.
    MMLogger.get_instance('benchmark', log_level='ERROR')
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    wanted = zip(VARIANTS, (args.compile, args.cuda_graph))
    variants = [variant for variant, is_wanted in wanted if is_wanted]
    check_models(args.models)
    check_device(device)
    check_variants(variants, device)
    check_fusing(args.fuse_conv_bn, args.mode)
    if args.threads is not None:
        _set_threads(args.threads)
    if args.seconds is not None and not args.seconds > 0:
        raise ValueError(f'--seconds must be positive, got {args.seconds:g}.')
    keep_freed_memory()  # as training and inference do
    cases = _cases_of(args)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = describe_run(device, args.repeats, args.fuse_conv_bn)
    title = format_settings(settings)
    print(title, flush=True)
    results: Dict[Case, List[Measured]] = {}
    start = time.monotonic()
    for case in cases:
        # One case at least: there is something to show.
        if args.seconds and results and time.monotonic() - start > args.seconds:
            print(f'\nSkipped after {args.seconds:g} s: {case}', flush=True)
            continue
        results[case] = measure_case(
            case, args.models, device, args.repeats, variants, args.fuse_conv_bn
        )
        # What is measured is printed and saved at once.
        print(f'\n{format_case(case, results[case])}', flush=True)
        save_results(results, settings, out / SAMPLES_NAME)
    texts = [format_case(case, found) for case, found in results.items()]
    if args.sweep is None or len(results) < 2:  # one point has no slope
        plot_benchmark(results, title, out / PICTURE_NAME)
    else:
        curves = fit_curves(results)
        texts.append(format_curves(curves))
        print(f'\n{texts[-1]}')
        case = cases[0]
        title += f', batch {case.batch_size}, {case.mode}, {case.dtype}'
        plot_sweep(curves, title, out / PICTURE_NAME)
    (out / TABLE_NAME).write_text('\n\n'.join([title, *texts]) + '\n')
    print(f'\nSaved in {out}')


def _set_threads(threads: int) -> None:
    if threads < 1:
        raise ValueError(f'--threads must be at least 1, got {threads}.')
    torch.set_num_threads(threads)


def _cases_of(args: argparse.Namespace) -> List[Case]:
    """What the command line asks for."""
    if args.sweep is None:
        return make_cases(args.shape, args.batch_size, args.mode, args.dtype)
    if max(map(len, (args.batch_size, args.mode, args.dtype))) > 1:
        raise ValueError('--sweep takes one --batch-size, one --mode and one --dtype.')
    return make_sweep(
        args.sweep or SWEEP_SIDES, args.batch_size[0], args.mode[0], args.dtype[0]
    )
