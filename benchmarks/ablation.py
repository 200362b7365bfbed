# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The study of Mamba's designs: train each row, measure its speed, write a table."""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, DefaultScope

from mlla_mm.datasets.digits import make_imagenet
from mlla_mm.engine.config_files import read_config
from mlla_mm.engine.parts import batch_size_of
from mlla_mm.engine.recipe import describe_run, format_value
from mlla_mm.evaluation.markdown import markdown_table
from mlla_mm.evaluation.published import METRICS, PublishedModel, published_models
from mlla_mm.evaluation.runs import read_run
from mlla_mm.utils.files import write_whole
from mlla_mm.visualization.sheet import save_figure

from .cases import MODES, Case
from .meter import Meter, Spread, format_settings, spread
from .races import make_call

ROOT = Path(__file__).parents[1]
#: The rows on digits by name, with their titles. The first one is the baseline.
ROWS: Dict[str, str] = {
    'baseline': 'Baseline',
    'input-gate': '+ input gate',
    'forget-gate': '+ forget gate',
    'shortcut': '+ shortcut',
    'no-normalization': '- normalization',
    'single-head': '- multi-head',
    'block-all': '+ block design, all',
    'block-sub': '+ block design, sub',
    'ape': '+ APE',
    'lepe': '+ LePE',
    'cpe': '+ CPE',
    'rope': '+ RoPE',
    'mamba': 'all of Mamba',
    'softmax': 'softmax attention',
    'hydra': 'Hydra attention',
    'efficient': 'Efficient attention',
    'enhanced': 'Enhanced linear attention',
    'focused': 'focused linear attention',
}
#: Arguments of :func:`mlla_mm.datasets.digits.make_imagenet` for the rows on digits.
DIGITS = dict(train=4000, val=2000, size=32)

BUDGET_NAME = 'budget.json'
JSON_NAME = 'ablation.json'
REPORT_NAME = 'ablation.md'
PICTURE_NAME = 'ablation.png'

_TOP1 = METRICS['accuracy/top1'].name
_POLL_SECONDS = 0.2
# Points on either side of the baseline in the picture.
_SHOWN = 15

Options = Optional[Mapping[str, Any]]


class Row(NamedTuple):
    """A network of the study.

    Attributes:
        name (str): Its name, and that of its folder.
        title (str): What it is, for readers.
        config (Path): Its config file.
        paper (PublishedModel, optional): What the paper has about it.
    """

    name: str
    title: str
    config: Path
    paper: Optional[PublishedModel]


class Measured(NamedTuple):
    """The speed of a row.

    Attributes:
        parameters (int): Number of parameters.
        seconds (dict[str, list[float]]): Seconds of a call for each round, by mode.
    """

    parameters: int
    seconds: Dict[str, List[float]]


class Result(NamedTuple):
    """What was measured of a row, beside the paper.

    Attributes:
        row (Row): The row.
        top1 (dict[int, float]): Top-1 accuracy in percent by seed.
        mean (float): Over the seeds.
        deviation (float, optional): Sample standard deviation over the seeds. None for
            one seed.
        difference (float, optional): Mean minus the baseline's, in points. None for
            the baseline.
        error (float, optional): Standard error of the difference. None for one seed.
        parameters (int): Number of parameters.
        speed (dict[str, Spread]): Throughput over the baseline's by mode: median and
            middle half of the rounds.
        paper_top1 (float, optional): The paper's top-1 accuracy.
        paper_difference (float, optional): The same minus the baseline's.
        paper_speed (float, optional): The paper's throughput over the baseline's.
    """

    row: Row
    top1: Dict[int, float]
    mean: float
    deviation: Optional[float]
    difference: Optional[float]
    error: Optional[float]
    parameters: int
    speed: Dict[str, Spread]
    paper_top1: Optional[float]
    paper_difference: Optional[float]
    paper_speed: Optional[float]


def digits_rows(names: Optional[Sequence[str]] = None) -> List[Row]:
    """The rows on digits, with the baseline first.

    Args:
        names (Sequence[str], optional): Which of :data:`ROWS`, besides the baseline.
            Defaults to None: all.

    Raises:
        ValueError: If a row is unknown.
    """
    unknown = [name for name in names or () if name not in ROWS]
    if unknown:
        raise ValueError(f'Unknown row {unknown[0]!r}. There are: {", ".join(ROWS)}.')
    published = published_models()
    folder = ROOT / 'configs/classification/ablation'
    rows = []
    for i, (name, title) in enumerate(ROWS.items()):
        if i == 0 or names is None or name in names:
            suffix = f'_{name}' if i else ''
            paper = published.get(f'la-swin-t{suffix}_8xb128_in1k')
            config = folder / f'la-swin-nano{suffix}_digits.py'
            rows.append(Row(name, title, config, paper))
    return rows


def config_rows(configs: Sequence[str]) -> List[Row]:
    """A row for each config, named after it. The first one is the baseline.

    Raises:
        ValueError: If two configs have one name.
    """
    published = published_models()
    names = [Path(config).stem for config in configs]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f'--configs has {name} twice.')
    return [
        Row(name, name, Path(config), published.get(name))
        for name, config in zip(names, configs)
    ]


def find_budget(
    rows: Sequence[Row], options: Options = None, processes: int = 1
) -> Dict[str, Any]:
    """What all runs of a study have in common: data, length, batch, rate, options.

    Args:
        rows (Sequence[Row]): The rows.
        options (Mapping, optional): Changes to all configs. Defaults to None.
        processes (int): Number of processes of a run. Defaults to 1.

    Returns:
        dict: Values by item, as they are written to a JSON file.

    Raises:
        FileNotFoundError: If there is no such config.
        ValueError: If a config cannot be read, or a row's budget is not the baseline's.
    """
    budgets: List[Dict[str, Any]] = []
    for row in rows:
        cfg = read_config(str(row.config), dict(options or {}))
        data = Path(cfg.train_dataloader.dataset.data_root)
        made_as = data / 'digits.json'
        arguments = json.loads(made_as.read_text()) if made_as.is_file() else {}
        # A folder of digits says with what it was made.
        named = _join(arguments, ' ') or str(data)
        changes = _join(options or {}, '=') or None
        budgets.append({**describe_run(cfg, processes), 'data': named, 'with': changes})
        for item, value in budgets[0].items():
            if budgets[-1][item] != value:
                raise ValueError(
                    f'All rows need one budget: {item} is {format_value(value)} in '
                    f'{rows[0].config}, and {format_value(budgets[-1][item])} in '
                    f'{row.config}.'
                )
    return budgets[0]


def _join(values: Mapping[str, Any], sign: str) -> str:
    return ', '.join(f'{key}{sign}{value}' for key, value in values.items())


def settle_budget(out: Path, budget: Mapping[str, Any]) -> None:
    """Write the budget of a study into its folder, or compare it with what is there.

    Raises:
        ValueError: If the folder has runs of another budget.
    """
    path = out / BUDGET_NAME
    if not path.is_file():
        write_whole(path, (json.dumps(budget, indent=2) + '\n').encode())
        return
    before = json.loads(path.read_text())
    for item in {**before, **budget}:
        if before.get(item) != budget.get(item):
            raise ValueError(
                f'{out} has runs of another budget: {item} was '
                f'{format_value(before.get(item))}, and is '
                f'{format_value(budget.get(item))}. Give another --out.'
            )


def read_top1(work_dir: Path) -> Optional[float]:
    """Top-1 accuracy in percent at the end of a run; None if it has not ended.

    Raises:
        ValueError: If a file of the run is damaged.
    """
    with suppress(FileNotFoundError):
        for evaluation in read_run(work_dir).evaluations:
            if evaluation.complete and _TOP1 in evaluation.metrics:
                return evaluation.metrics[_TOP1]
    return None


def train_command(config: Path, processes: int) -> List[str]:
    """The beginning of the command that trains a config."""
    if processes == 1:
        return [sys.executable, str(ROOT / 'tools/train.py'), str(config)]
    return ['bash', str(ROOT / 'tools/dist_train.sh'), str(config), str(processes)]


def train(
    rows: Sequence[Row],
    seeds: int,
    out: Path,
    jobs: int = 1,
    processes: int = 1,
    options: Options = None,
) -> List[str]:
    """Train what has not been trained, each run in a process of its own.

    A run has its work_dir in ``OUT/ROW/seed_N`` and what it printed in
    ``OUT/ROW/seed_N.log``. All rows get the first seed before any gets the second. An
    interrupted run goes on from its last checkpoint.

    Args:
        rows (Sequence[Row]): The rows.
        seeds (int): Number of seeds, from 0.
        out (Path): Folder of the study.
        jobs (int): How many runs there are at a time. Defaults to 1.
        processes (int): Number of processes of a run. Defaults to 1.
        options (Mapping, optional): Changes to all configs. Defaults to None.

    Returns:
        list[str]: The runs that failed, with the last line that each printed.
    """
    changes = [f'{key}={value}' for key, value in (options or {}).items()]
    waiting = deque((row, seed) for seed in range(seeds) for row in rows)
    running: Dict[Path, Tuple[str, float, subprocess.Popen]] = {}
    failed = []
    # As torchrun does: runs side by side share the cores.
    environment = {'OMP_NUM_THREADS': '1', **os.environ}
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                row, seed = waiting.popleft()
                work_dir = out / row.name / f'seed_{seed}'
                label = f'{row.name}, seed {seed}'
                if read_top1(work_dir) is not None:
                    continue
                command = train_command(row.config, processes)
                command += ['--work-dir', str(work_dir), '--seed', str(seed)]
                command += ['--resume', *(['--cfg-options', *changes] * bool(changes))]
                work_dir.parent.mkdir(parents=True, exist_ok=True)
                with work_dir.with_suffix('.log').open('w') as log:
                    process = subprocess.Popen(
                        command, env=environment, stdout=log, stderr=subprocess.STDOUT
                    )
                running[work_dir] = label, time.monotonic(), process
            time.sleep(_POLL_SECONDS if running else 0)
            for work_dir, (label, start, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[work_dir]
                top1 = read_top1(work_dir)
                if process.returncode == 0 and top1 is not None:
                    seconds = time.monotonic() - start
                    print(f'{label}: top-1 {top1:.2f} ({seconds:.0f} s)', flush=True)
                else:
                    log_file = work_dir.with_suffix('.log')
                    lines = log_file.read_text(errors='replace').split('\n')
                    last = [*filter(str.strip, lines)][-1:] or ['nothing was printed']
                    failed.append(f'{label}: {last[0]} ({log_file})')
                    print(f'{label} failed: {last[0]}', flush=True)
    finally:
        # They save a checkpoint first.
        for _, _, process in running.values():
            process.terminate()
        for _, _, process in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)
    return failed


def measure_speed(
    rows: Sequence[Row], meter: Meter, options: Options = None
) -> Tuple[Dict[str, Measured], Case]:
    """Time the classifiers against one another, in inference and in training.

    Every round times each row once, in a random order. A training step has no
    optimiser, see :class:`benchmarks.cases.Case`. Images have the size of the
    validation's, and there are as many as in a batch of the training.

    Args:
        rows (Sequence[Row]): The rows, with the baseline first.
        meter (Meter): The device, and the number of rounds.
        options (Mapping, optional): Changes to all configs. Defaults to None.

    Returns:
        tuple: The measurements by the name of the row, and the case of the first mode.
    """
    cfgs = [read_config(str(row.config), dict(options or {})) for row in rows]
    shape = _image_shape(cfgs[0])
    batch_size = batch_size_of(cfgs[0].train_dataloader)
    images = torch.randn(batch_size, 3, *shape).to(meter.device)
    cases = [Case('classification', shape, batch_size, mode) for mode in MODES]
    parameters, calls = {}, {}
    with torch.cuda.device_of(images):
        for row, cfg in zip(rows, cfgs):
            for case in cases:
                torch.manual_seed(0)
                with DefaultScope.overwrite_default_scope(cfg.default_scope):
                    model = MODELS.build(cfg.model)
                model.train(case.mode == 'train').to(meter.device)
                parameters[row.name] = sum(p.numel() for p in model.parameters())
                calls[row.name, case.mode] = make_call(model, images, case)
        samples = meter.samples(calls)
    measured = {
        name: Measured(number, {mode: samples[name, mode] for mode in MODES})
        for name, number in parameters.items()
    }
    return measured, cases[0]


def _image_shape(cfg: Config) -> Tuple[int, int]:
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        dataset = DATASETS.build(cfg.val_dataloader.dataset)
    height, width = dataset[0]['inputs'].shape[-2:]
    return height, width


def summarize(
    rows: Sequence[Row],
    top1: Mapping[str, Dict[int, float]],
    speed: Dict[str, Measured],
) -> List[Result]:
    """Means, deviations, and differences to the first row.

    Args:
        rows (Sequence[Row]): The rows, with the baseline first.
        top1 (Mapping): Accuracies by row and seed, at least one for each row.
        speed (dict[str, Measured]): By row.
    """
    values = {name: list(by_seed.values()) for name, by_seed in top1.items()}
    mean = {name: statistics.mean(found) for name, found in values.items()}
    deviation = {
        name: statistics.stdev(found) if len(found) > 1 else None
        for name, found in values.items()
    }
    base = rows[0]
    results = []
    for row in rows:
        a, b = deviation[row.name], deviation[base.name]
        is_base = row is base
        error = None
        if not (is_base or a is None or b is None):
            variances = a**2 / len(values[row.name]), b**2 / len(values[base.name])
            error = sum(variances) ** 0.5
        paper_top1 = row.paper and row.paper.metrics.get(_TOP1)
        paper_base = base.paper and base.paper.metrics.get(_TOP1)
        paper_speed = row.paper and row.paper.paper_throughput
        base_speed = base.paper and base.paper.paper_throughput
        results.append(
            Result(
                row=row,
                top1=top1[row.name],
                mean=mean[row.name],
                deviation=a,
                difference=None if is_base else mean[row.name] - mean[base.name],
                error=error,
                parameters=speed[row.name].parameters,
                speed={
                    # Rounds are compared: a machine that slows down does so for all.
                    mode: spread([y / x for x, y in zip(seconds, of_base)])
                    for (mode, seconds), of_base in zip(
                        speed[row.name].seconds.items(),
                        speed[base.name].seconds.values(),
                    )
                },
                paper_top1=paper_top1,
                # Without rounding, 77.8 - 77.6 would not be 0.2.
                paper_difference=None
                if is_base or not (paper_top1 and paper_base)
                else round(paper_top1 - paper_base, 6),
                paper_speed=paper_speed / base_speed
                if paper_speed and base_speed
                else None,
            )
        )
    return results


def format_results(results: Sequence[Result]) -> str:
    """Set the results in a Markdown table, beside the paper's."""
    columns = (
        *('Row', 'Params', 'Top-1', 'Difference', 'Inference', 'Training'),
        *('Paper: top-1', 'difference', 'throughput'),
    )
    table = []
    for result in results:
        cells = [result.row.title, f'{result.parameters:,}']
        cells.append(f'{result.mean:.1f}' + _plus_minus(result.deviation))
        cells.append(
            '' if result.difference is None
            else f'{result.difference:+.1f}' + _plus_minus(result.error)
        )  # fmt: skip
        cells += [f'{result.speed[mode].median:.2f}x' for mode in MODES]
        for value, form in (
            (result.paper_top1, '{:.1f}'),
            (result.paper_difference, '{:+.1f}'),
            (result.paper_speed, '{:.2f}x'),
        ):
            cells.append('' if value is None else form.format(value))
        table.append(cells)
    return markdown_table(columns, table)


def _plus_minus(value: Optional[float]) -> str:
    return '' if value is None else f' ± {value:.1f}'


def plot_results(results: Sequence[Result], title: str, out: Path) -> None:
    """Draw top-1 accuracies, and their differences to the baseline beside the paper's.

    Args:
        results (Sequence[Result]): The rows, with the baseline first.
        title (str): What was measured.
        out (Path): Picture file to write.
    """
    figure = Figure(figsize=(9, 1.4 + 0.3 * len(results)), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    rows = np.arange(len(results))
    base = results[0].mean
    left.errorbar(
        [result.mean for result in results],
        rows,
        xerr=[result.deviation or 0 for result in results],
        fmt='o',
        color='black',
        capsize=3,
    )
    for i, result in enumerate(results):
        left.plot([*result.top1.values()], [i] * len(result.top1), '|', color='C7')
    left.axvline(base, color='C7', linewidth=0.8)
    left.set_yticks(rows, [result.row.title for result in results])
    left.invert_yaxis()
    left.set_xlabel('top-1 (%): mean, deviation, each seed')
    for label, offset, color, points in (
        ('here', -0.2, 'black', [(x.difference, x.error) for x in results]),
        ('paper, ImageNet-1K', 0.2, 'C1', [(x.paper_difference, 0) for x in results]),
    ):
        drawn = [(i, x, e or 0) for i, (x, e) in enumerate(points) if x is not None]
        if not drawn:
            continue
        places, values, errors = np.transpose(drawn)
        right.barh(
            places + offset, values, 0.38, color=color, alpha=0.75, label=label,
            xerr=errors if errors.any() else None,
            error_kw=dict(capsize=2, ecolor='C7'),
        )  # fmt: skip
    right.axvline(0, color='black', linewidth=0.8)
    right.set_xlabel('difference to the baseline (points)')
    if right.get_legend_handles_labels()[0]:
        right.legend(fontsize=8)
    # A row that does not learn would leave no room to tell the others apart.
    for axes, center in ((left, base), (right, 0)):
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, center - _SHOWN), min(high, center + _SHOWN))
        axes.grid(alpha=0.3, axis='x')
    for i, result in enumerate(results):
        if result.mean < base - _SHOWN:
            left.text(left.get_xlim()[0], i, f' ← {result.mean:.1f}', va='center')
    figure.suptitle(title, fontsize=10)
    save_figure(figure, out, dpi=100)


def results_record(
    results: Sequence[Result], settings: Mapping[str, Any]
) -> Dict[str, Any]:
    """All that a study measured, for a JSON file."""
    rows = []
    for result in results:
        entry: Dict[str, Any] = result._asdict()
        entry.pop('row')
        entry['speed'] = {mode: x._asdict() for mode, x in result.speed.items()}
        rows.append(
            dict(
                name=result.row.name,
                title=result.row.title,
                config=result.row.config.stem,
                **entry,
            )
        )
    return {**settings, 'rows': rows}


def format_report(
    results: Sequence[Result],
    budget: Mapping[str, Any],
    settings: Mapping[str, Any],
    case: Case,
    failed: Sequence[str],
) -> str:
    """The table, what was run, and how it is to be read."""
    done = '; '.join(
        f'{item} {format_value(value)}'
        for item, value in budget.items()
        if value is not None
    )
    seeds = sorted({seed for result in results for seed in result.top1})
    parts = [
        '# Ablation',
        format_results(results),
        f'![Top-1 accuracies]({PICTURE_NAME})',
        '## What was run',
        f'Seeds: {", ".join(map(str, seeds))}. Each run: {done}. The weights of the '
        'end are evaluated.',
        f'Speed on {format_settings(settings)}: {case}, and training; '
        f'{settings["repeats"]} rounds.',
        '## How to read it',
        'Top-1 is the mean over the seeds ± the sample standard deviation. A '
        'difference is that of the means ± its standard error, from very few runs '
        'each: one within twice its error tells nothing. Speed is throughput over that '
        'of the baseline, the median of rounds that time all rows in turn. It holds '
        'for this device and these images. The recurrence of a forget gate is plain '
        "PyTorch here, and Mamba's CUDA kernel in the paper.",
        'The paper trains each row once, 300 epochs on ImageNet-1K. A small network, '
        'few classes and a short training show whether a row runs and learns, and what '
        'it costs. They cannot show its accuracy at scale: signs that agree are no '
        'proof, and signs that differ are no contradiction.',
    ]
    if failed:
        parts += ['## Failed', *failed]
    return '\n\n'.join(parts) + '\n'


def run(args: argparse.Namespace) -> int:
    """Train, measure, print, and write a table, a picture and a JSON file.

    Args:
        args (argparse.Namespace): The arguments of
            ``tools/analysis_tools/run_ablation.py``.

    Returns:
        int: The exit status, 1 if a run failed.

    Raises:
        FileNotFoundError, ValueError: If an argument is wrong.
        FileExistsError: If another process makes other data at the same place.
    """
    for name in ('seeds', 'jobs', 'processes'):
        if getattr(args, name) < 1:
            raise ValueError(f'--{name} must be at least 1, got {getattr(args, name)}.')
    meter = Meter(args.device, args.repeats)
    rows = config_rows(args.configs) if args.configs else digits_rows(args.rows)
    out, options = Path(args.out), args.cfg_options
    if not args.configs:
        cfg = read_config(str(rows[0].config), dict(options or {}))
        data_root = Path(cfg.train_dataloader.dataset.data_root)
        if not data_root.exists():
            print(f'Making {data_root}')
            make_imagenet(data_root, **DIGITS)
    budget = find_budget(rows, options, args.processes)
    settle_budget(out, budget)
    failed = train(rows, args.seeds, out, args.jobs, args.processes, options)
    top1: Dict[str, Dict[int, float]] = {}
    for row in rows:
        for seed in range(args.seeds):
            value = read_top1(out / row.name / f'seed_{seed}')
            if value is not None:
                top1.setdefault(row.name, {})[seed] = value
    if rows[0].name not in top1:
        raise ValueError(f'Without the baseline there is no table. {failed[0]}')
    rows = [row for row in rows if row.name in top1]
    speed, case = measure_speed(rows, meter, options)
    results = summarize(rows, top1, speed)
    settings = meter.describe()
    record = dict(settings, budget=budget, failed=failed, case=str(case))
    report = format_report(results, budget, settings, case, failed)
    title = f'Top-1 accuracy after {budget["length"]}, {args.seeds} seeds'
    plot_results(results, title, out / PICTURE_NAME)
    text = json.dumps(results_record(results, record), indent=2) + '\n'
    write_whole(out / JSON_NAME, text.encode())
    write_whole(out / REPORT_NAME, report.encode())
    print(f'\n{format_results(results)}\n\nSaved in {out}')
    for line in failed:
        print(f'Failed: {line}')
    return 1 if failed else 0
