# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Published accuracy over latency measured here: MLLA among mmpretrain's models."""

import json
import platform
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Tuple, Union

import torch
from torch import nn

from mlla_mm.evaluation.markdown import markdown_table
from mlla_mm.evaluation.published import METRICS, published_models

from .latency import Spread, measure_latency, spread, unsteady_note

#: Trained on ImageNet-1K alone, at 224x224, in three sizes each.
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
TABLE_NAME = 'accuracy_latency.json'
PICTURE_NAME = 'accuracy_latency.png'
_TOP1 = METRICS['accuracy/top1'].name


class Candidate(NamedTuple):
    """A classifier with published accuracy.

    Attributes:
        name (str): Its name in our metafile or in mmpretrain's model zoo.
        family (str): Its kind of network.
        top1 (float): Published ImageNet-1K top-1 accuracy in percent.
        build (Callable): Makes it, in evaluation mode and without weights.
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
        quartiles (tuple[float, float]): What bounds the middle half of the samples, in
            milliseconds per image.
    """

    name: str
    family: str
    top1: float
    parameters: int
    latency: float
    quartiles: Tuple[float, float]


def find_candidate(name: str) -> Candidate:
    """Look a model up in our metafiles, then in mmpretrain's model zoo.

    Args:
        name (str): E.g. 'mlla-t_8xb128_in1k' or 'swin-tiny_16xb64_in1k'.

    Raises:
        ValueError: If neither has it, or no top-1 accuracy of it is published.
    """
    from mmpretrain.apis import ModelHub, get_model

    ours = published_models().get(name)
    if ours is not None:
        family, metrics, source = 'MLLA', ours.metrics, str(ours.config)
    else:
        entry = ModelHub.get(name)
        metrics = {k: v for r in entry.results or [] for k, v in r.metrics.items()}
        family, source = entry.in_collection, name
    if _TOP1 not in metrics:
        raise ValueError(f'No {_TOP1} is published for {name}.')
    return Candidate(name, family, metrics[_TOP1], lambda: get_model(source))


def measure_candidates(
    candidates: Sequence[Candidate],
    device: str,
    batch_size: int,
    shape: Tuple[int, int] = (224, 224),
    repeats: int = 20,
) -> List[Measured]:
    """Measure the latency of classifiers against one another, in float32.

    Args:
        candidates (Sequence[Candidate]): The classifiers.
        device (str): Where to run them, e.g. 'cuda'.
        batch_size (int): Images per call; the latency is divided by it.
        shape (tuple[int, int]): Height and width of the images. Defaults to 224x224,
            for which the accuracies are published.
        repeats (int): Samples of each. Defaults to 20.

    Raises:
        ValueError: If the device does not exist, a number is not positive, or a model
            does not run on such images.
    """
    if batch_size < 1 or min(shape) < 1:
        raise ValueError(
            f'Batch size and shape must be positive, got {batch_size}, {shape}.'
        )
    try:
        images = torch.rand(batch_size, 3, *shape, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f'Images cannot be put on device {device!r}: {error}'
        ) from error
    models = {c.name: c.build().to(device) for c in candidates}
    with torch.no_grad():
        for name, model in models.items():
            _try_out(name, model, images)
        found = measure_latency(
            {name: partial(model, images) for name, model in models.items()}, repeats
        )
    measured = []
    for candidate in candidates:
        times = [x * 1000 / batch_size for x in found[candidate.name].times]
        low, median, high = spread(times)
        parameters = sum(p.numel() for p in models[candidate.name].parameters())
        measured.append(
            Measured(*candidate[:3], parameters, median, (low, high)),
        )
    return measured


def _try_out(name: str, model: nn.Module, images: torch.Tensor) -> None:
    """Fail before anything is measured, e.g. on images that are too small."""
    try:
        model(images)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f'{name} does not run on images {tuple(images.shape)}: {error}'
        ) from error


def save_measured(
    measured: Sequence[Measured], settings: Dict[str, object], out: Union[str, Path]
) -> None:
    """Save the numbers with what they were measured on.

    Args:
        measured (Sequence[Measured]): The numbers.
        settings (dict): How they were measured.
        out (str | Path): JSON file to write.
    """
    content = dict(settings, models=[point._asdict() for point in measured])
    Path(out).write_text(json.dumps(content, indent=2) + '\n')


def describe_device(device: str) -> str:
    """Name of a device, for a picture's title."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{_cpu_name()}, threads: {torch.get_num_threads()}'


def _cpu_name() -> str:
    """Model of the CPU where Linux tells it, else the architecture."""
    information = Path('/proc/cpuinfo')
    if information.is_file():
        found = re.search(r'^model name\s*: (.+)$', information.read_text(), re.M)
        if found:
            return found[1]
    return f'{platform.machine()} CPU'


def format_measured(measured: Sequence[Measured]) -> str:
    """Set the numbers in a Markdown table, and name those that are unsteady."""
    columns = ('Model', 'Params', 'Top-1', 'ms per image', 'middle half', 'images/s')
    rows = [
        (
            point.name,
            f'{point.parameters / 1e6:.1f} M',
            f'{point.top1:.1f}',
            f'{point.latency:.4g}',
            ' to '.join(f'{bound:.4g}' for bound in point.quartiles),
            f'{1000 / point.latency:.4g}',
        )
        for point in measured
    ]
    spreads = {
        point.name: Spread(point.quartiles[0], point.latency, point.quartiles[1])
        for point in measured
    }
    return markdown_table(columns, rows) + unsteady_note(spreads)
