# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Pictures of races, of sweeps, and of accuracy over latency."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, List, Union

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter

from .results import (
    Curve,
    Results,
    find_plain,
    fit_exponent,
    memory_ratio,
    speedup,
)

if TYPE_CHECKING:
    from .accuracy_latency import Measured


def plot_benchmark(results: Results, title: str, out: Union[str, Path]) -> None:
    """Draw bars of speed and of peak memory, relative to the plain assembly.

    Args:
        results (dict[Case, list[Measured]]): The same models in each case. Lines on the
            bars show the middle half of the samples. Memory that was not measured has
            no bar.
        title (str): What was measured on what.
        out (str | Path): Picture file to write.
    """
    labels = [
        point.label
        for point in next(iter(results.values()))
        if point.variant or not point.model.startswith('plain-')
    ]
    colors = colormaps['tab20'](range(20))
    rows = np.arange(len(results))
    figure = Figure(
        figsize=(11, 1.5 + 0.2 * len(rows) * (len(labels) + 1)), layout='constrained'
    )
    speed, memory = figure.subplots(1, 2, sharey=True)
    height = 0.8 / max(1, len(labels))
    for i, label in enumerate(labels):
        speeds, ratios = [], []
        for measured in results.values():
            (point,) = (point for point in measured if point.label == label)
            plain = find_plain(point, measured)
            speeds.append(speedup(point, plain))
            ratios.append(memory_ratio(point, plain))
        low, median, high = np.transpose(speeds)
        y = rows + (i - (len(labels) - 1) / 2) * height
        color = colors[i % len(colors)]
        errors = (median - low).tolist(), (high - median).tolist()
        bars = [speed.barh(y, median, height, xerr=errors, label=label, color=color)]
        if None not in ratios:
            bars.append(memory.barh(y, ratios, height, color=color))
        for axes, drawn in zip((speed, memory), bars):
            axes.bar_label(drawn, fmt='%.2f', fontsize=6, padding=2)
    for axes, text in ((speed, 'speed'), (memory, 'peak memory')):
        axes.axvline(1, color='black', linewidth=1)
        axes.set_xlabel(f'{text} / plain MLLA of the same size')
        axes.grid(alpha=0.3, axis='x')
        axes.set_axisbelow(True)
        axes.margins(x=0.12, y=0.02)
    cases = [str(case).replace(', ', '\n', 1) for case in results]
    speed.set_yticks(rows, cases, fontsize=8)
    speed.invert_yaxis()
    if labels:
        figure.legend(loc='outside lower center', ncols=4, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(out, dpi=150)


def plot_sweep(curves: Sequence[Curve], title: str, out: Union[str, Path]) -> None:
    """Plot time and memory over the number of tokens, with the exponents fitted.

    Args:
        curves (Sequence[Curve]): The models. A dashed line is in proportion to tokens,
            through the last point of the first model.
        title (str): What was measured on what.
        out (str | Path): Picture file to write.
    """
    figure = Figure(figsize=(11, 5), layout='constrained')
    tokens = curves[0].tokens
    panels = (
        ('time per image (ms)', [curve.times for curve in curves]),
        (
            'peak memory per image without weights (MiB)',
            [curve.memory for curve in curves],
        ),
    )
    for axes, (text, all_costs) in zip(figure.subplots(1, 2), panels):
        for i, (curve, costs) in enumerate(zip(curves, all_costs)):
            if costs:
                exponent = fit_exponent(tokens, costs)
                label = f'{curve.label}: tokens$^{{{exponent:.2f}}}$'
                axes.plot(tokens, costs, marker='o', color=f'C{i}', label=label)
        linear = np.array(tokens) / tokens[-1] * all_costs[0][-1]
        axes.plot(tokens, linear, '--', color='gray', label='linear', zorder=1)
        axes.set(xscale='log', yscale='log', ylabel=text)
        axes.set_xlabel('tokens of an image at stride 4')
        axes.set_xticks(tokens, tokens, fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3, which='both')
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(out, dpi=150)


def plot_accuracy_latency(
    measured: 'Sequence[Measured]', title: str, out: Union[str, Path]
) -> None:
    """Plot top-1 accuracy over latency, a line for each family of models.

    Args:
        measured (Sequence[Measured]): The models. Bars show the middle half of their
            samples.
        title (str): What was measured on what.
        out (str | Path): Picture file to write.
    """
    figure = Figure(figsize=(7.5, 5), layout='constrained')
    axes = figure.subplots()
    families: List[str] = list(dict.fromkeys(point.family for point in measured))
    for i, family in enumerate(families):
        points = sorted(
            (point for point in measured if point.family == family),
            key=lambda point: point.latency,
        )
        ours = family == 'MLLA'
        color = 'black' if ours else f'C{i}'
        latency = np.array([point.latency for point in points])
        low, high = np.transpose([point.quartiles for point in points])
        axes.errorbar(
            latency,
            [point.top1 for point in points],
            xerr=((latency - low).tolist(), (high - latency).tolist()),
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
                # The size: 'tiny' of 'swin-tiny_16xb64_in1k'.
                point.name.split('_')[0].split('-', 1)[-1],
                (point.latency, point.top1),
                xytext=(0, 9 if ours else -14),
                textcoords='offset points',
                ha='center',
                fontsize=8,
                color=color,
            )
    axes.set_xscale('log')
    for set_formatter in (
        axes.xaxis.set_major_formatter,
        axes.xaxis.set_minor_formatter,
    ):
        formatter = ScalarFormatter()
        formatter.set_scientific(False)
        set_formatter(formatter)
    axes.margins(0.12)
    axes.set(
        xlabel='latency per image (ms), measured',
        ylabel='ImageNet-1K top-1 accuracy (%), published',
    )
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, which='both')
    axes.legend(loc='lower right')
    figure.savefig(out, dpi=150)
