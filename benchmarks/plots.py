# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Speed and memory of models beside the plain assembly of MLLA, and how they grow."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping, Sequence, Union

if TYPE_CHECKING:
    from .races import Case, Curve, Measured

_MEMORY = 'peak memory per image without weights (MiB)'


def plot_benchmark(
    results: 'Mapping[Case, Sequence[Measured]]', title: str, out: Union[str, Path]
) -> None:
    """Draw bars of speed and of peak memory, relative to the plain assembly.

    Args:
        results (Mapping[Case, Sequence[Measured]]): The same models in each case. Lines
            on the bars show the middle half of the samples. There is no bar for memory
            that was not measured.
        title (str): What was measured on what.
        out (str | Path): Picture file to write.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    from .races import find_plain, memory_ratio, speedup

    labels = [p.label for p in next(iter(results.values())) if not _is_reference(p)]
    colors = colormaps['tab20'].colors
    figure = Figure(
        figsize=(11, 1.5 + 0.2 * len(results) * (len(labels) + 1)),
        layout='constrained',
    )
    speed, memory = figure.subplots(1, 2, sharey=True)
    height = 0.8 / max(1, len(labels))
    for i, label in enumerate(labels):
        y = [j + (i - (len(labels) - 1) / 2) * height for j in range(len(results))]
        speeds, ratios = [], []
        for measured in results.values():
            (point,) = (point for point in measured if point.label == label)
            plain = find_plain(point, measured)
            speeds.append(speedup(point, plain))
            ratios.append(memory_ratio(point, plain))
        medians = [s.median for s in speeds]
        errors = (
            [s.median - s.low for s in speeds],
            [s.high - s.median for s in speeds],
        )
        style = dict(height=height, color=colors[i % len(colors)])
        bars = speed.barh(y, medians, xerr=errors, label=label, **style)
        _write_values(speed, bars)
        if None not in ratios:
            _write_values(memory, memory.barh(y, ratios, **style))
    for axes, text in ((speed, 'speed'), (memory, 'peak memory')):
        axes.axvline(1, color='black', linewidth=1)
        axes.set_xlabel(f'{text} / plain MLLA of the same size')
        axes.grid(alpha=0.3, axis='x')
        axes.set_axisbelow(True)
        axes.margins(x=0.12, y=0.02)
    cases = [str(case).replace(', ', '\n', 1) for case in results]
    speed.set_yticks(range(len(results)), cases, fontsize=8)
    speed.invert_yaxis()
    if labels:
        figure.legend(loc='outside lower center', ncols=4, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(out, dpi=150)


def _is_reference(point: 'Measured') -> bool:
    return point.model.startswith('plain-') and not point.variant


def _write_values(axes: Any, bars: Any) -> None:
    axes.bar_label(bars, fmt='%.2f', fontsize=6, padding=2)


def plot_sweep(curves: 'Sequence[Curve]', title: str, out: Union[str, Path]) -> None:
    """Plot time and memory over the number of tokens, with the exponents fitted.

    Args:
        curves (Sequence[Curve]): The models.
        title (str): What was measured on what.
        out (str | Path): Picture file to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(11, 5), layout='constrained')
    time, memory = figure.subplots(1, 2)
    for i, curve in enumerate(curves):
        style = dict(marker='o', color=f'C{i}')
        for axes, costs, exponent in (
            (time, curve.times, curve.time_exponent),
            (memory, curve.memory, curve.memory_exponent),
        ):
            if not costs:
                continue
            label = f'{curve.label}: tokens$^{{{exponent:.2f}}}$'
            axes.plot(curve.tokens, costs, label=label, **style)
    _draw_linear(time, curves[0].tokens, curves[0].times)
    _draw_linear(memory, curves[0].tokens, curves[0].memory)
    for axes, text in ((time, 'time per image (ms)'), (memory, _MEMORY)):
        axes.set(xscale='log', yscale='log', ylabel=text)
        axes.set_xlabel('tokens of an image at stride 4')
        axes.set_xticks(curves[0].tokens, curves[0].tokens, fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3, which='both')
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(out, dpi=150)


def _draw_linear(axes: Any, tokens: Sequence[float], costs: Sequence[float]) -> None:
    """Draw cost in proportion to tokens, through the last point of a curve."""
    proportional = [costs[-1] * n / tokens[-1] for n in tokens]
    axes.plot(tokens, proportional, '--', color='gray', label='linear', zorder=1)
