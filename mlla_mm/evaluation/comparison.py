# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Runs beside the paper: a report in Markdown with learning curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Dict, Optional, Tuple, Union

from matplotlib.figure import Figure

from ..engine.recipe import format_value
from ..utils.files import write_whole
from ..visualization.curves import Curve, draw_curves
from ..visualization.sheet import save_figure
from .markdown import markdown_table
from .published import METRICS, PublishedModel, published_models
from .runs import AVERAGED, Run, read_run

REPORT_NAME = 'comparison.md'
CURVES_NAME = 'comparison.png'


def compare_with_paper(
    work_dirs: Sequence[Union[str, Path]],
    out: Union[str, Path],
    tolerance: float = 0.5,
) -> Tuple[str, bool]:
    """Compare runs with the paper, and save a report and their learning curves.

    The name of a run's config tells which published figures belong to it.

    Args:
        work_dirs (Sequence[str | Path]): The runs' work_dirs.
        out (str | Path): Folder for ``comparison.md`` and ``comparison.png``.
        tolerance (float): Difference in points that is accepted, up and down.
            Defaults to 0.5.

    Returns:
        tuple[str, bool]: The report, and whether all results of fully trained models
        are within the tolerance, as far as the paper has these results.

    Raises:
        FileNotFoundError: If a work_dir has no run.
        ValueError: If the tolerance is negative, or a file of a run is damaged.
    """
    if not tolerance >= 0:
        raise ValueError(f'The tolerance must be at least 0 points, got {tolerance}.')
    published = published_models()
    runs = [read_run(work_dir) for work_dir in work_dirs]
    models = [published.get(run.config) for run in runs]
    table, within = _results_table(runs, models, tolerance)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    sections = ['# Measured and published', table]
    trained = [(run, model) for run, model in zip(runs, models) if 'loss' in run.curves]
    if trained:
        plot_learning_curves(trained, out / CURVES_NAME)
        sections.append(f'![Learning curves]({CURVES_NAME})')
    sections += [_run_section(run, model) for run, model in zip(runs, models)]
    report = '\n\n'.join(sections) + '\n'
    # The folder may be another user's, and have a link of this name.
    write_whole(out / REPORT_NAME, report.encode())
    return report, within


def plot_learning_curves(
    runs: Sequence[Tuple[Run, Optional[PublishedModel]]], out: Union[str, Path]
) -> None:
    """Plot loss and metrics of runs, a row each, with the published metrics as lines.

    Args:
        runs (Sequence[tuple]): Runs with curves, each with what is published about it,
            or None.
        out (str | Path): Picture file to write.
    """
    figure = Figure(figsize=(10, 3.6 * len(runs)), layout='constrained')
    axes = figure.subplots(len(runs), 2, squeeze=False)
    for (left, right), (run, model) in zip(axes, runs):
        metric_curves = _metric_curves(run)
        metrics = list(metric_curves)
        draw_curves(left, right, {**run.curves, **metric_curves}, metrics)
        for line, metric in zip(right.get_lines(), metrics):
            if model is not None and metric in model.metrics:
                value = model.metrics[metric]
                right.axhline(
                    value, color=line.get_color(), ls='--', label=f'{value}, published'
                )
        if metrics:
            right.legend()
        else:
            right.set_axis_off()
            right.text(0.5, 0.5, 'not validated yet', ha='center', va='center')
        right.set(ylabel='validation (%)')
        title = f'{run.config}: {run.progress}'
        # The name of a config may have a dollar sign, which would begin a formula.
        left.set_title(title, fontsize=10, loc='left', parse_math=False)
    save_figure(figure, out, dpi=120)


def _metric_curves(run: Run) -> Dict[str, Curve]:
    """The main metrics in percent by their published names."""
    return {
        metric.name + suffix: [(x, y * metric.scale) for x, y in run.curves[logged]]
        for name, metric in METRICS.items()
        if not metric.name.endswith(('AP50', 'AP75'))
        for logged, suffix in ((name, ''), (f'ema_{name}', AVERAGED))
        if logged in run.curves
    }


def _results_table(
    runs: Sequence[Run], models: Sequence[Optional[PublishedModel]], tolerance: float
) -> Tuple[str, bool]:
    """Measured beside published metrics, and whether all are within the tolerance."""
    rows, within = [], True
    for run, model in zip(runs, models):
        figures = {} if model is None else model.metrics
        for name, metrics, complete in run.evaluations:
            for metric, measured in metrics.items():
                published, text = figures.get(metric), '-'
                if published is not None:
                    # Without rounding, 46.3 - 46.8 would not be -0.5 exactly.
                    difference = round(measured - published, 6)
                    text = f'{difference:+.2f}'
                    if not complete:
                        text += ' (training not finished)'
                    elif not abs(difference) <= tolerance:  # NaN is beyond
                        text = f'**{text}** (beyond {tolerance:g})'
                        within = False
                figure = '-' if published is None else f'{published:g}'
                rows.append((run.config, name, metric, f'{measured:.2f}', figure, text))
    if not rows:
        return 'Nothing has been evaluated yet.', within
    columns = ('Config', 'Evaluation', 'Metric', 'Measured', 'Published', 'Difference')
    return markdown_table(columns, rows), within


def _run_section(run: Run, model: Optional[PublishedModel]) -> str:
    parts = [f'## {run.work_dir}', f'Config: {run.config}. Training: {run.progress}.']
    if model is None:
        parts.append(
            f'Nothing is published about a config named {run.config}: there is nothing '
            'to compare with.'
        )
    elif not model.metrics:
        parts.append(f'No results are published for {run.config}.')
    if run.unrecorded:
        parts.append(
            f'recipe.json is missing in {", ".join(run.unrecorded)}: whether the run '
            'deviates from the recipe is unknown. tools/train.py writes it.'
        )
    if run.unknown:
        parts.append(
            f'run.json is missing in {", ".join(run.unknown)}: left out of the report. '
            'tools/train.py and tools/test.py write it.'
        )
    if run.deviations:
        rows = [
            [format_value(value) for value in deviation] for deviation in run.deviations
        ]
        parts.append('Deviations from the recipe:')
        parts.append(markdown_table(('', 'Recipe', 'This run'), rows))
    elif run.curves and not run.unrecorded:
        parts.append('No deviation from the recipe is recorded.')
    if run.recorded:
        items = (
            f'{item} {format_value(value)}' for item, value in run.recorded.items()
        )
        parts.append(f'Settings of the run: {"; ".join(items)}.')
    return '\n\n'.join(parts)
