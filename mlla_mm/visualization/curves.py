# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Learning curves of a run."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Dict, List, Sequence, Tuple, Union

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..utils.records import is_number, read_record_lines
from ..utils.text import printable
from .sheet import save_figure

Curve = List[Tuple[float, float]]


def read_scalars(work_dir: Union[str, Path]) -> Dict[str, Curve]:
    """Read what MMEngine's LocalVisBackend logged; resumed runs become one run.

    Args:
        work_dir (str | Path): The run's work_dir.

    Returns:
        dict[str, list[tuple]]: Points (step, value) by name, in the order of steps. The
        step is the iteration for training values, the epoch or iteration for metrics.

    Raises:
        FileNotFoundError: If nothing was logged there.
        ValueError: If a file is damaged, or no log.
    """
    logs = sorted(Path(work_dir).glob('*/vis_data/scalars.json'))
    if not logs:
        raise FileNotFoundError(
            f'No */vis_data/scalars.json in {work_dir}: no run yet?'
        )
    return read_logs(logs)


def read_logs(logs: Iterable[Path]) -> Dict[str, Curve]:
    """Read scalars.json files as one run, in which each resumes the one before.

    Args:
        logs (Iterable[Path]): The files, oldest first.

    Returns:
        dict[str, list[tuple]]: See :func:`read_scalars`.

    Raises:
        ValueError: If a file is damaged, or no log.
    """
    points: Dict[str, Dict[float, float]] = {}
    for log in logs:
        for entry in read_record_lines(log):
            numbers = {name: x for name, x in entry.items() if is_number(x)}
            if not math.isfinite(numbers.get('step', math.nan)):
                raise ValueError(
                    f'{printable(log)} is no log of a training: an entry has the step '
                    f'{printable(entry.get("step"))}. Move its folder out of the '
                    'work_dir.'
                )
            for name, value in numbers.items():
                # A resumed run goes over the steps since its checkpoint again.
                points.setdefault(name, {})[numbers['step']] = value
    return {name: sorted(curve.items()) for name, curve in points.items()}


def plot_curves(
    work_dir: Union[str, Path], metrics: Sequence[str], out: Union[str, Path]
) -> None:
    """Plot the training loss and the validation metrics of a run.

    Args:
        work_dir (str | Path): The run's work_dir.
        metrics (Sequence[str]): Names of logged metrics, e.g. 'coco/bbox_mAP'.
        out (str | Path): Picture file to write.

    Raises:
        FileNotFoundError: If nothing was logged.
        ValueError: If a metric was not logged.
    """
    curves = read_scalars(work_dir)
    missing = [name for name in ('loss', *metrics) if name not in curves]
    if missing:
        there = [printable(name) for name in curves]
        raise ValueError(f'Not logged in {work_dir}: {missing}; there: {there}')
    figure = Figure(figsize=(10, 3.6), layout='constrained')
    left, right = figure.subplots(1, 2)
    draw_curves(left, right, curves, metrics)
    save_figure(figure, out, dpi=120)


def draw_curves(
    left: Axes, right: Axes, curves: Dict[str, Curve], metrics: Sequence[str]
) -> None:
    """Draw the training loss on the left and validation metrics on the right.

    Args:
        left (Axes): Matplotlib's axes for the loss.
        right (Axes): Matplotlib's axes for the metrics.
        curves (dict[str, list[tuple]]): See :func:`read_scalars`.
        metrics (Sequence[str]): Names of curves to draw as metrics.
    """
    left.plot(*zip(*curves['loss']))
    left.set(xlabel='iteration', ylabel='training loss', ylim=(0, None))
    for name in metrics:
        # The markers of a long training would run together.
        marker = 'o' if len(curves[name]) <= 40 else None
        right.plot(*zip(*curves[name]), marker=marker, label=name)
    right.set(ylabel='validation')
    if metrics:
        # Metrics are logged by epoch if the run is, else by iteration.
        last_step = curves[metrics[0]][-1][0]
        by_epoch = 'epoch' in curves and curves['epoch'][-1][1] == last_step
        right.set(xlabel='epoch' if by_epoch else 'iteration')
        right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
