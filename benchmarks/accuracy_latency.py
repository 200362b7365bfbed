# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Published accuracy over latency measured here: MLLA among mmpretrain's models."""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Callable, List, NamedTuple, Tuple

import torch
from torch import nn

import mlla_mm
from mlla_mm.evaluation.markdown import markdown_table
from mlla_mm.evaluation.published import METRICS, published_models

from .meter import Meter, Spread, spread, time_cells, unsteady_note
from .plots import plot_accuracy_latency

#: Models in three sizes each, trained on ImageNet-1K alone, at 224x224.
DEFAULT_MODELS = (
    'mlla-t_8xb128_in1k',
    'mlla-s_8xb64_in1k',
    'mlla-b_8xb64_in1k',
    'swin-tiny_16xb64_in1k',
    'swin-small_16xb64_in1k',
    'swin-base_16xb64_in1k',
    'convnext-tiny_32xb128_in1k',
    'convnext-small_32xb128_in1k',
    'convnext-base_32xb128_in1k',
    'mvitv2-tiny_3rdparty_in1k',
    'mvitv2-small_3rdparty_in1k',
    'mvitv2-base_3rdparty_in1k',
    'davit-tiny_3rdparty_in1k',
    'davit-small_3rdparty_in1k',
    'davit-base_3rdparty_in1k',
)
_TOP1 = METRICS['accuracy/top1'].name


class Candidate(NamedTuple):
    """A classifier with published accuracy.

    Attributes:
        name (str): Its name in our metafile or in mmpretrain's model zoo.
        family (str): Its kind of network.
        top1 (float): Published ImageNet-1K top-1 accuracy in percent.
        build (Callable): Builds it, in evaluation mode, with random weights.
    """

    name: str
    family: str
    top1: float
    build: Callable[[], nn.Module]


class Measured(NamedTuple):
    """A classifier's accuracy and latency.

    Attributes:
        name (str): Its name.
        family (str): Its kind of network.
        top1 (float): Published ImageNet-1K top-1 accuracy in percent.
        parameters (int): Number of parameters.
        latency (float): Median time per image in milliseconds.
        quartiles (tuple[float, float]): Bounds of the middle half of the samples, in
            milliseconds per image.
    """

    name: str
    family: str
    top1: float
    parameters: int
    latency: float
    quartiles: Tuple[float, float]


def find_candidate(name: str) -> Candidate:
    """Look up a model in our metafiles, then in mmpretrain's model zoo.

    Args:
        name (str): E.g. 'mlla-t_8xb128_in1k' or 'swin-tiny_16xb64_in1k'.

    Raises:
        ValueError: If neither has the model, or its top-1 accuracy is not published.
    """
    from mmpretrain.apis import ModelHub, get_model

    ours = published_models().get(name)
    if ours is not None:
        family, metrics, source = ours.collection, ours.metrics, str(ours.config)
    else:
        entry = ModelHub.get(name)
        metrics = {k: v for r in entry.results or [] for k, v in r.metrics.items()}
        family, source = entry.in_collection, name
    if _TOP1 not in metrics:
        raise ValueError(f'No {_TOP1} is published for {name}.')
    return Candidate(name, family, metrics[_TOP1], lambda: get_model(source))


def measure_candidates(
    candidates: Sequence[Candidate],
    meter: Meter,
    batch_size: int,
    shape: Tuple[int, int] = (224, 224),
) -> List[Measured]:
    """Measure the latency of classifiers against one another, in float32.

    Args:
        candidates (Sequence[Candidate]): The classifiers.
        meter (Meter): The device, and the number of samples of each classifier.
        batch_size (int): Images per call; the latency is divided by it.
        shape (tuple[int, int]): Height and width of the images. Defaults to 224x224,
            for which the accuracies are published.

    Raises:
        ValueError: If a number is not positive, or a model does not run on such images.
    """
    if batch_size < 1 or min(shape) < 1:
        raise ValueError(
            f'Batch size and shape must be positive, got {batch_size}, {shape}.'
        )
    images = torch.rand(batch_size, 3, *shape, device=meter.device)
    models = {c.name: c.build().to(meter.device) for c in candidates}
    # Synchronising waits for the current device.
    with torch.no_grad(), torch.cuda.device_of(images):
        for name, model in models.items():
            # Before anything is measured: images may be too small.
            try:
                model(images)
            except (AssertionError, RuntimeError) as error:
                raise ValueError(
                    f'{name} does not run on images {tuple(images.shape)}: {error}'
                ) from error
        calls = {name: partial(model, images) for name, model in models.items()}
        samples = meter.samples(calls)
    measured = []
    for candidate in candidates:
        low, median, high = spread(
            [seconds * 1000 / batch_size for seconds in samples[candidate.name]]
        )
        parameters = sum(p.numel() for p in models[candidate.name].parameters())
        measured.append(Measured(*candidate[:3], parameters, median, (low, high)))
    return measured


def format_measured(measured: Sequence[Measured]) -> str:
    """Set the numbers in a Markdown table, and name those that are unsteady."""
    columns = ('Model', 'Params', 'Top-1', 'ms per image', 'middle half', 'images/s')
    rows, spreads = [], {}
    for point in measured:
        low, high = point.quartiles
        times = spreads[point.name] = Spread(low, point.latency, high)
        parameters = f'{point.parameters / 1e6:.1f} M'
        rows.append([point.name, parameters, f'{point.top1:.1f}', *time_cells(times)])
    return markdown_table(columns, rows) + unsteady_note(spreads)


def run(args: argparse.Namespace) -> None:
    """Measure, print, and write a table and a picture.

    Args:
        args (argparse.Namespace): The arguments of
            ``tools/analysis_tools/plot_accuracy_latency.py``.

    Raises:
        ValueError: If an argument is wrong.
    """
    meter = Meter(args.device, args.repeats)
    batch_size = args.batch_size
    if batch_size is None:
        batch_size = 64 if torch.cuda.is_available() else 1
    candidates = [find_candidate(name) for name in args.models or DEFAULT_MODELS]
    measured = measure_candidates(candidates, meter, batch_size, args.shape)
    record = dict(
        device=meter.device_name(),
        dtype='float32',
        batch_size=batch_size,
        shape=args.shape,
        samples=args.repeats,
        torch=torch.__version__,
        mlla_mm=mlla_mm.__version__,
        models=[point._asdict() for point in measured],
    )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / 'accuracy_latency.json').write_text(json.dumps(record, indent=2) + '\n')
    height, width = args.shape
    title = f'{record["device"]}, float32, batch {batch_size}, {height}x{width}'
    plot_accuracy_latency(measured, title, out / 'accuracy_latency.png')
    print(f'{title}\n\n{format_measured(measured)}\n\nSaved in {out}')
