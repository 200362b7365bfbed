# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Races of whole models against the plain assembly of MLLA, in time and memory."""

import argparse
import copy
import json
import math
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple, Union

import torch
from mmengine.logging import MMLogger
from torch import Tensor, nn

from mlla_mm.compat.pytorch import require_compiler, without_tf32
from mlla_mm.engine.compile import compile_backbone
from mlla_mm.engine.cuda_graph import CudaGraph
from mlla_mm.models import fusing
from mlla_mm.utils.allocator import keep_freed_memory

from .cases import SWEEP_SIDES, Case, make_cases, make_sweep
from .meter import Call, Meter, format_settings, module_bytes
from .models import ASSEMBLIES, MODELS, SIZES, build_model
from .plots import plot_benchmark, plot_sweep
from .results import (
    Measured,
    Results,
    format_case,
    format_curves,
    label,
    make_curves,
    results_record,
)

COMPILED = 'compiled'
CUDA_GRAPH = 'CUDA graph'
#: How a model can be timed besides as it is.
VARIANTS = (COMPILED, CUDA_GRAPH)
# In float32 the assemblies differ in nothing but the order of sums.
_TOLERANCE = 1e-3


class Race(NamedTuple):
    """Models that are raced against one another in some cases.

    Attributes:
        models (Sequence[str]): Names of :data:`benchmarks.models.MODELS`.
        cases (Sequence[Case]): What the models do.
        variants (Sequence[str]): Of :data:`VARIANTS`: how to time every model besides.
            'compiled': with its backbone compiled. 'CUDA graph': the call captured once
            and replayed. Compilation and capture are not timed. Defaults to ().
        fuse_conv_bn (bool): Whether BatchNorm is folded into the convolutions first,
            in every model that has it. Defaults to False.
    """

    models: Sequence[str]
    cases: Sequence[Case]
    variants: Sequence[str] = ()
    fuse_conv_bn: bool = False

    def check(self, meter: Meter) -> None:
        """Check that the race can be run on a device.

        Raises:
            ValueError: If a model or a variant is unknown, a model is named twice or
                has no plain assembly of its size to be compared with, PyTorch is too
                old to compile, the device has no CUDA graphs, or BatchNorm is to be
                folded for training.
        """
        for kind, names, known in (
            ('model', self.models, MODELS),
            ('variant', self.variants, VARIANTS),
        ):
            unknown = [name for name in names if name not in known]
            if unknown:
                raise ValueError(
                    f'Unknown {kind} {unknown[0]!r}. There are: {", ".join(known)}.'
                )
        if len(set(self.models)) < len(self.models):
            raise ValueError(f'--models names one twice: {" ".join(self.models)}.')
        for size in SIZES:
            of_size = [model for model in self.models if model.endswith(f'-{size}')]
            if of_size and f'plain-{size}' not in of_size:
                raise ValueError(
                    f'{of_size[0]} is compared with plain-{size}: add it to --models.'
                )
        if COMPILED in self.variants:
            require_compiler('--compile')
        if CUDA_GRAPH in self.variants and not meter.is_cuda:
            raise ValueError(
                f"--cuda-graph needs a CUDA device, and this is '{meter.device}': "
                'leave it out.'
            )
        if self.fuse_conv_bn and any(case.mode == 'train' for case in self.cases):
            raise ValueError(
                '--fuse-conv-bn is for inference, and --mode has train: leave one out.'
            )


def measure_case(race: Race, case: Case, meter: Meter) -> List[Measured]:
    """Race models against one another in one case.

    All models get the same images. Models of one architecture get the same weights:
    before anything is measured, the outputs of the assemblies of MLLA are compared in
    float32. Stochastic depth is off. In training BatchNorm is in training mode.

    Peak memory is that of a call after the first one: weights, images, and the tensors
    that the call allocates. On CUDA ``torch.cuda.max_memory_allocated`` counts, without
    what the other models hold. On the CPU PyTorch's profiler records the allocations.
    Neither sees what libraries such as oneDNN allocate by themselves. The memory of
    CUDA graphs is not measured, because all graphs share one pool.

    Args:
        race (Race): The models, and how they are timed.
        case (Case): What the models do, one of the race's cases.
        meter (Meter): The device, and the number of rounds.

    Returns:
        list[Measured]: In the order of the race's models: first as they are, then
        variant by variant.

    Raises:
        ValueError: If the race cannot be run (:meth:`Race.check`), or a model does not
            run on such images or cannot be captured.
        RuntimeError: If the outputs of the assemblies of MLLA differ.
    """
    race.check(meter)
    torch.manual_seed(0)
    images = torch.randn(case.batch_size, 3, *case.shape).to(meter.device)
    built: Dict[Tuple[str, str], nn.Module] = {}
    calls: Dict[Tuple[str, str], Call] = {}
    memory: Dict[Tuple[str, str], Optional[int]] = {}
    # Synchronising waits for the current device.
    with torch.cuda.device_of(images):
        for name in race.models:
            built[name, ''] = prepare_model(name, case, meter.device)
            if race.fuse_conv_bn:
                fusing.fuse_conv_bn(built[name, ''])
        _check_assemblies({name: model for (name, _), model in built.items()}, images)
        for variant, name in product(race.variants, race.models):
            model = built[name, variant] = copy.deepcopy(built[name, ''])
            if variant == COMPILED and name.startswith(('mlla-', 'fused-', 'eager-')):
                compile_backbone(model)
            elif variant == COMPILED:
                getattr(model, 'backbone', model).compile()
        # Libraries allocate their workspace once. The first model is not to pay for it.
        one = images.new_ones(1, 1)
        torch.ones_like(one, requires_grad=True).mm(one).backward()
        # Graphs are replayed one at a time, so one memory serves them all.
        graph: Optional[CudaGraph] = None
        for key, model in built.items():
            name, variant = key
            resident = module_bytes(model) + images.numel() * images.element_size()
            others = torch.cuda.memory_allocated() - resident if meter.is_cuda else 0
            memory[key] = None
            try:
                call = make_call(model, images, case)
                if variant == CUDA_GRAPH:
                    calls[key] = graph = CudaGraph(call, graph)
                    continue
                call()
            except (AssertionError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f'{label(name, variant)} fails in {case}: {error}'
                ) from error
            calls[key] = call
            memory[key] = meter.peak_bytes(call, resident) - others
        samples = meter.samples(calls)
    if COMPILED in race.variants:
        # Another case would otherwise find code that was made for these image sizes.
        torch.compiler.reset()
    return [
        Measured(
            *key,
            sum(p.numel() for p in model.parameters()),
            module_bytes(model),
            memory[key],
            [seconds * 1000 / case.batch_size for seconds in samples[key]],
        )
        for key, model in built.items()
    ]


def prepare_model(name: str, case: Case, device: torch.device) -> nn.Module:
    """Build a model for a case; models of one architecture get the same weights.

    Args:
        name (str): One of :data:`benchmarks.models.MODELS`.
        case (Case): What the model does.
        device (torch.device): Where the model runs.
    """
    torch.manual_seed(0)
    model = build_model(name, classify=case.task == 'classification')
    model.train(case.mode == 'train')  # a statement: mmpretrain's Swin returns None
    return model.to(device)


def make_call(model: nn.Module, images: Tensor, case: Case) -> Call:
    """The call that is timed: an inference, or a training step.

    Args:
        model (nn.Module): A model in the mode of the case.
        images (Tensor): (N, 3, H, W).
        case (Case): Mode and dtype of the call.
    """
    # Autocast on a CPU warns about float32, even where it is disabled.
    dtype = None if case.dtype == 'float32' else getattr(torch, case.dtype)

    def forward() -> Tuple[Tensor, ...]:
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
            return _as_tuple(model(images))

    if case.mode == 'infer':
        return torch.no_grad()(forward)
    # Fixed gradients stand for a loss, whose cost is not the model's. Their norm is
    # one, so that the sums over them stay in range in half precision.
    gradients = [
        nn.functional.normalize(torch.randn_like(output).flatten(), dim=0).view_as(
            output
        )
        for output in forward()
    ]

    def step() -> None:
        torch.autograd.backward(forward(), gradients)
        model.zero_grad(set_to_none=True)

    return step


def _as_tuple(outputs: Union[Tensor, Sequence[Tensor]]) -> Tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _check_assemblies(models: Mapping[str, nn.Module], images: Tensor) -> None:
    """Check that the assemblies of MLLA compute the same function."""
    outputs = {}
    for name, model in models.items():
        if name.split('-')[0] not in ASSEMBLIES:
            continue
        training = model.training
        # In evaluation BatchNorm does not keep statistics of the images. Without TF32
        # float32 is exact.
        model.eval()
        with torch.no_grad(), without_tf32():
            outputs[name] = _as_tuple(model(images))
        model.train(training)
    for name, found in outputs.items():
        plain = 'plain-' + name.split('-')[1]
        for a, b in zip(found, outputs[plain]):
            error = ((a - b).norm() / b.norm()).item()
            if not error < _TOLERANCE:  # also for NaN
                raise RuntimeError(
                    f'Outputs of {name} and {plain} differ by {error:.2g} in float32, '
                    f'by more than {_TOLERANCE}: a race between them would mean '
                    'nothing.'
                )


def run_races(
    races: Sequence[Race],
    meter: Meter,
    save: Callable[[List[Results]], object],
    seconds: float = math.inf,
    keep_going: bool = False,
) -> bool:
    """Run race after race. Each measured case is printed and saved at once.

    Args:
        races (Sequence[Race]): The races.
        meter (Meter): The device, and the number of rounds of each case.
        save (Callable): Is called after each case, with the results of all races.
        seconds (float): Cases whose turn comes later are skipped, and named. The first
            case is always measured. Defaults to infinity.
        keep_going (bool): Whether a case that fails is named and the others are run.
            Else its error is raised. Defaults to False.

    Returns:
        bool: Whether no case failed.

    Raises:
        ValueError: As :func:`measure_case`.
        RuntimeError: As :func:`measure_case`.
    """
    # mmpretrain would tell how each of its classifiers augments images in training.
    MMLogger.get_instance('benchmark', log_level='ERROR')
    results: List[Results] = [{} for _ in races]
    all_passed = True
    start = time.monotonic()
    for race, found in zip(races, results):
        names = ' '.join(race.models)
        for case in race.cases:
            if any(results) and time.monotonic() - start > seconds:
                print(f'\nSkipped after {seconds:g} s: {case} ({names})', flush=True)
                continue
            try:
                found[case] = measure_case(race, case, meter)
            except (RuntimeError, ValueError) as error:
                if not keep_going:
                    raise
                print(f'FAIL {case} ({names}): {error}', flush=True)
                all_passed = False
                continue
            print(f'\n{format_case(case, found[case])}', flush=True)
            save(results)
    return all_passed


def run(args: argparse.Namespace) -> None:
    """Race, print, and write a table, the samples and a picture.

    Args:
        args (argparse.Namespace): The arguments of
            ``tools/analysis_tools/benchmark.py``.

    Raises:
        ValueError: If an argument is wrong.
    """
    meter = Meter(args.device, args.repeats)
    wanted = zip(VARIANTS, (args.compile, args.cuda_graph))
    variants = [variant for variant, is_wanted in wanted if is_wanted]
    race = Race(args.models, _cases_of(args), variants, args.fuse_conv_bn)
    race.check(meter)
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f'--threads must be at least 1, got {args.threads}.')
        torch.set_num_threads(args.threads)
    if args.seconds is not None and not args.seconds > 0:
        raise ValueError(f'--seconds must be positive, got {args.seconds:g}.')
    keep_freed_memory()  # as training and inference do
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {**meter.describe(), 'fuse_conv_bn': args.fuse_conv_bn}
    title = format_settings(settings)
    print(title, flush=True)
    measured: Results = {}

    def save(results: List[Results]) -> None:
        measured.update(results[0])
        record = results_record(measured, settings)
        (out / 'benchmark.json').write_text(json.dumps(record, indent=2) + '\n')

    run_races([race], meter, save, args.seconds or math.inf)
    texts = [title, *(format_case(case, found) for case, found in measured.items())]
    if args.sweep is None or len(measured) < 2:  # one point has no slope
        plot_benchmark(measured, title, out / 'benchmark.png')
    else:
        curves = make_curves(measured)
        texts.append(format_curves(curves))
        print(f'\n{texts[-1]}')
        case = race.cases[0]
        title += f', batch {case.batch_size}, {case.mode}, {case.dtype}'
        plot_sweep(curves, title, out / 'benchmark.png')
    (out / 'benchmark.md').write_text('\n\n'.join(texts) + '\n')
    print(f'\nSaved in {out}')


def _cases_of(args: argparse.Namespace) -> List[Case]:
    """The cases that the command line asks for."""
    if args.sweep is None:
        return make_cases(args.shape, args.batch_size, args.mode, args.dtype)
    if max(map(len, (args.batch_size, args.mode, args.dtype))) > 1:
        raise ValueError('--sweep takes one --batch-size, one --mode and one --dtype.')
    return make_sweep(
        args.sweep or SWEEP_SIDES, args.batch_size[0], args.mode[0], args.dtype[0]
    )
