# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Learning curves of a run."""

import json
from pathlib import Path
from typing import Dict, List, Sequence, Tuple, Union

Curve = List[Tuple[float, float]]


def read_scalars(work_dir: Union[str, Path]) -> Dict[str, Curve]:
    """Read what MMEngine's LocalVisBackend logged, resumed runs in one.

    Args:
        work_dir (str | Path): The run's work_dir.

    Returns:
        dict[str, list[tuple]]: Points (step, value) by name, in the order of steps. The
        step is the iteration for training values, the epoch or iteration for metrics.

    Raises:
        FileNotFoundError: If nothing was logged there.
    """
    logs = sorted(Path(work_dir).glob('*/vis_data/scalars.json'))
    if not logs:
        raise FileNotFoundError(
            f'No */vis_data/scalars.json in {work_dir}: no run yet?'
        )
    points: Dict[str, Dict[float, float]] = {}
    for log in logs:
        for line in log.read_text().splitlines():
            entry = json.loads(line)
            for name, value in entry.items():
                if isinstance(value, (int, float)):
                    # A resumed run goes over the steps since its checkpoint again.
                    points.setdefault(name, {})[entry['step']] = value
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
        raise ValueError(f'Not logged in {work_dir}: {missing}; there: {list(curves)}')
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 3.6), layout='constrained')
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*curves['loss']))
    left.set(xlabel='iteration', ylabel='training loss', ylim=(0, None))
    for name in metrics:
        right.plot(*zip(*curves[name]), marker='o', label=name)
    right.set(xlabel=_step_unit(curves, metrics[0]), ylabel='validation')
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(out, dpi=120)


def _step_unit(curves: Dict[str, Curve], metric: str) -> str:
    """Metrics of epoch-based runs are logged by epoch, those of others by iteration."""
    last_epoch = curves['epoch'][-1][1] if 'epoch' in curves else None
    return 'epoch' if curves[metric][-1][0] == last_epoch else 'iteration'
