# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Learning curves of a run."""

from pathlib import Path
from typing import Dict, List, Sequence, Tuple, Union

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .sheet import save_figure

#: Points (step, value), in the order of steps.
Curve = List[Tuple[float, float]]


def plot_curves(
    curves: Dict[str, Curve], metrics: Sequence[str], out: Union[str, Path]
) -> None:
    """Plot the training loss and the validation metrics of a run.

    Args:
        curves (dict[str, list[tuple]]): Points (step, value) by name.
        metrics (Sequence[str]): Names of curves to draw as metrics.
        out (str | Path): Picture file to write.
    """
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
        curves (dict[str, list[tuple]]): Points (step, value) by name. The step is the
            iteration for training values, the epoch or iteration for metrics.
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
        # A run by epochs logs its metrics by epoch, any other run by iteration.
        last_step = curves[metrics[0]][-1][0]
        by_epoch = 'epoch' in curves and curves['epoch'][-1][1] == last_step
        right.set(xlabel='epoch' if by_epoch else 'iteration')
        right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
