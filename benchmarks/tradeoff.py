# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Accuracy over latency."""

from pathlib import Path
from typing import TYPE_CHECKING, Sequence, Union

if TYPE_CHECKING:
    from .accuracy_latency import Measured

_EMPHASIZED = 'MLLA'


def plot_accuracy_latency(
    measured: 'Sequence[Measured]', title: str, out: Union[str, Path]
) -> None:
    """Plot top-1 accuracy over latency, a line for each family of models.

    Args:
        measured (Sequence[Measured]): The models; bars show the middle half of their
            samples.
        title (str): What was measured on what.
        out (str | Path): Picture file to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(7.5, 5), layout='constrained')
    axes = figure.subplots()
    for i, family in enumerate(dict.fromkeys(point.family for point in measured)):
        points = sorted(
            (point for point in measured if point.family == family),
            key=lambda point: point.latency,
        )
        ours = family == _EMPHASIZED
        color = 'black' if ours else f'C{i}'
        x = [point.latency for point in points]
        lower = [point.latency - point.quartiles[0] for point in points]
        upper = [point.quartiles[1] - point.latency for point in points]
        axes.errorbar(
            x,
            [point.top1 for point in points],
            xerr=(lower, upper),
            marker='*' if ours else 'o',
            markersize=12 if ours else 6,
            linewidth=2 if ours else 1.2,
            color=color,
            capsize=2,
            label=family,
            zorder=3 if ours else 2,
        )
        for point in points:
            axes.annotate(
                _size(point.name),
                (point.latency, point.top1),
                xytext=(0, 9 if ours else -14),
                textcoords='offset points',
                ha='center',
                fontsize=8,
                color=color,
            )
    axes.set_xscale('log')
    for formatted in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        formatter = ScalarFormatter()
        formatter.set_scientific(False)
        formatted(formatter)
    axes.margins(0.12)
    axes.set(
        xlabel='latency per image (ms), measured',
        ylabel='ImageNet-1K top-1 accuracy (%), published',
    )
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, which='both')
    axes.legend(loc='lower right')
    figure.savefig(out, dpi=150)


def _size(name: str) -> str:
    """What a model's name has between family and recipe: 'tiny' of 'swin-tiny_…'."""
    return name.split('_')[0].split('-', 1)[-1]
