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
from .meter import Meter, format_settings, spread
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
#: What was measured of a row, see :func:`summarize`.
Result = Dict[str, Any]
#: Seconds of a call for each round, by row and mode.
Seconds = Dict[Tuple[str, str], List[float]]


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
    for name, title in ROWS.items():
        if name == 'baseline' or names is None or name in names:
            suffix = '' if name == 'baseline' else f'_{name}'
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
    first: Dict[str, Any] = {}
    for row in rows:
        cfg = read_config(str(row.config), dict(options or {}))
        data = cfg.train_dataloader.dataset.get('data_root')
        # A folder of digits says with what it was made.
        made_as = Path(data or '') / 'digits.json'
        if made_as.is_file():
            data = _join(json.loads(made_as.read_text()), ' ')
        changes = _join(options or {}, '=') or None
        budget = {**describe_run(cfg, processes), 'data': data, 'with': changes}
        first = first or budget
        for item in _differing(first, budget):
            raise ValueError(
                f'All rows need one budget: {item} is {format_value(first[item])} in '
                f'{rows[0].config}, and {format_value(budget[item])} in {row.config}.'
            )
    return first


def _join(values: Mapping[str, Any], sign: str) -> str:
    return ', '.join(f'{key}{sign}{value}' for key, value in values.items())


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> List[str]:
    return [item for item in {**a, **b} if a.get(item) != b.get(item)]


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
    for item in _differing(before, budget):
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
) -> Tuple[Dict[str, int], Seconds, Case]:
    """Time the classifiers against one another, in inference and in training.

    Every round times each row once, in a random order. A training step has no
    optimiser, see :class:`benchmarks.cases.Case`. Images have the size of the
    validation's, and there are as many as in a batch of the training.

    Args:
        rows (Sequence[Row]): The rows.
        meter (Meter): The device, and the number of rounds.
        options (Mapping, optional): Changes to all configs. Defaults to None.

    Returns:
        tuple: The numbers of parameters by row, the times, and the case of the first
        mode.
    """
    cfgs = [read_config(str(row.config), dict(options or {})) for row in rows]
    with DefaultScope.overwrite_default_scope(cfgs[0].default_scope):
        dataset = DATASETS.build(cfgs[0].val_dataloader.dataset)
    height, width = dataset[0]['inputs'].shape[-2:]
    batch_size = batch_size_of(cfgs[0].train_dataloader)
    images = torch.randn(batch_size, 3, height, width).to(meter.device)
    cases = [Case('classification', (height, width), batch_size, x) for x in MODES]
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
        return parameters, meter.samples(calls), cases[0]


def summarize(
    rows: Sequence[Row],
    top1: Mapping[str, Dict[int, float]],
    parameters: Mapping[str, int],
    seconds: Seconds,
) -> List[Result]:
    """Set what was measured of each row beside the paper.

    Args:
        rows (Sequence[Row]): The rows, with the baseline first.
        top1 (Mapping): Accuracies in percent by row and seed, at least one for each.
        parameters (Mapping): Numbers of parameters by row.
        seconds (dict): From :func:`measure_speed`.

    Returns:
        list[dict]: Of each row ``name``, ``title``, ``config`` and ``parameters``; its
        ``top1`` by seed, their ``mean`` and sample standard ``deviation``; the
        ``difference`` of the mean to the baseline's, and its standard ``error``; its
        throughput over the baseline's, ``speed``, by mode; ``paper_top1``,
        ``paper_difference`` and ``paper_speed``, of the paper. None is for what does
        not exist: a deviation of one seed, a difference of the baseline.
    """
    base = rows[0]
    base_values = list(top1[base.name].values())
    base_top1, base_throughput = _published(base)
    results = []
    for row in rows:
        values = list(top1[row.name].values())
        paper_top1, throughput = _published(row)
        result: Result = dict(
            name=row.name,
            title=row.title,
            config=row.config.stem,
            parameters=parameters[row.name],
            top1=top1[row.name],
            mean=statistics.mean(values),
            deviation=statistics.stdev(values) if len(values) > 1 else None,
            difference=None,
            error=None,
            speed={},
            paper_top1=paper_top1,
            paper_difference=None,
            paper_speed=None,
        )
        for mode in MODES:
            # Rounds are compared: a machine that slows down does so for all.
            pairs = zip(seconds[base.name, mode], seconds[row.name, mode])
            result['speed'][mode] = spread([x / y for x, y in pairs])._asdict()
        if row is not base:
            result['difference'] = result['mean'] - statistics.mean(base_values)
            if min(len(values), len(base_values)) > 1:
                of_means = (
                    statistics.variance(x) / len(x) for x in (values, base_values)
                )
                result['error'] = sum(of_means) ** 0.5
            if paper_top1 and base_top1:
                # Without rounding, 77.8 - 77.6 would not be 0.2.
                result['paper_difference'] = round(paper_top1 - base_top1, 6)
        if throughput and base_throughput:
            result['paper_speed'] = throughput / base_throughput
        results.append(result)
    return results


def _published(row: Row) -> Tuple[Optional[float], Optional[float]]:
    """The paper's top-1 accuracy and throughput."""
    if row.paper is None:
        return None, None
    return row.paper.metrics.get(_TOP1), row.paper.paper_throughput


def format_results(results: Sequence[Result]) -> str:
    """Set the results in a Markdown table, beside the paper's."""
    columns = (
        *('Row', 'Params', 'Top-1', 'Difference', 'Inference', 'Training'),
        *('Paper: top-1', 'difference', 'throughput'),
    )

    def cell(form: str, value: Optional[float], error: Optional[float] = None) -> str:
        text = '' if value is None else form.format(value)
        return text if error is None else f'{text} ± {error:.1f}'

    table = [
        [
            x['title'],
            f'{x["parameters"]:,}',
            cell('{:.1f}', x['mean'], x['deviation']),
            cell('{:+.1f}', x['difference'], x['error']),
            *(cell('{:.2f}x', x['speed'][mode]['median']) for mode in MODES),
            cell('{:.1f}', x['paper_top1']),
            cell('{:+.1f}', x['paper_difference']),
            cell('{:.2f}x', x['paper_speed']),
        ]
        for x in results
    ]
    return markdown_table(columns, table)


def plot_results(results: Sequence[Result], title: str, out: Path) -> None:
    """Draw top-1 accuracies, and their differences to the baseline beside the paper's.

    Args:
        results (Sequence[dict]): The rows, with the baseline first.
        title (str): What was measured.
        out (Path): Picture file to write.
    """
    figure = Figure(figsize=(9, 1.4 + 0.3 * len(results)), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    base = results[0]['mean']
    for i, x in enumerate(results):
        deviation = x['deviation'] or 0
        left.errorbar(x['mean'], i, xerr=deviation, fmt='o', color='black', capsize=3)
        left.plot([*x['top1'].values()], [i] * len(x['top1']), '|', color='C7')
    # None is drawn as nothing.
    here, errors, paper = np.array(
        [[x['difference'], x['error'], x['paper_difference']] for x in results], float
    ).T
    places = np.arange(len(results))
    right.barh(
        places - 0.2, here, 0.38, xerr=errors, color='black', alpha=0.75, label='here',
        error_kw=dict(capsize=2, ecolor='C7'),
    )  # fmt: skip
    if not np.isnan(paper).all():
        right.barh(places + 0.2, paper, 0.38, color='C1', label='paper, ImageNet-1K')
    right.legend(fontsize=8)
    left.set_yticks(places, [x['title'] for x in results])
    left.invert_yaxis()
    left.set_xlabel('top-1 (%): mean, deviation, each seed')
    right.set_xlabel('difference to the baseline (points)')
    # A row that does not learn would leave no room to tell the others apart.
    for axes, center in ((left, base), (right, 0)):
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, center - _SHOWN), min(high, center + _SHOWN))
        axes.axvline(center, color='C7', linewidth=0.8)
        axes.grid(alpha=0.3, axis='x')
    for i, x in enumerate(results):
        if x['mean'] < base - _SHOWN:
            left.text(left.get_xlim()[0], i, f' ← {x["mean"]:.1f}', va='center')
    figure.suptitle(title, fontsize=10)
    save_figure(figure, out, dpi=100)


def format_report(results: Sequence[Result], record: Mapping[str, Any]) -> str:
    """The table, what was run, and how it is to be read.

    Args:
        results (Sequence[dict]): The rows.
        record (Mapping): What ``ablation.json`` has beside them.
    """
    done = '; '.join(
        f'{item} {format_value(value)}'
        for item, value in record['budget'].items()
        if value is not None
    )
    seeds = sorted({seed for result in results for seed in result['top1']})
    parts = [
        '# Ablation',
        format_results(results),
        f'![Top-1 accuracies]({PICTURE_NAME})',
        '## What was run',
        f'Seeds: {", ".join(map(str, seeds))}. Each run: {done}. The weights of the '
        'end are evaluated.',
        f'Speed on {format_settings(record)}: {record["case"]}, and training; '
        f'{record["repeats"]} rounds.',
        '## How to read it',
        'Top-1 is the mean over the seeds ± the sample standard deviation. A '
        'difference is that of the means ± its standard error, from very few runs '
        'each: one within twice its error tells nothing. Speed is throughput over that '
        'of the baseline, the median of rounds that time all rows in turn. It holds '
        'for this device and these images. The recurrence of a forget gate is plain '
        "PyTorch here, and Mamba's CUDA kernel in the paper.",
        'The paper reports one training of each row, 300 epochs on ImageNet-1K. A '
        'small network, few classes and a short training show whether a row runs and '
        'learns, and what it costs. They cannot show its accuracy at scale: signs that '
        'agree are no proof, and signs that differ are no contradiction.',
    ]
    if record['failed']:
        parts += ['## Failed', *record['failed']]
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
        first = next(x for x in failed if x.startswith(f'{rows[0].name}, '))
        raise ValueError(f'Without the baseline there is no table. {first}')
    rows = [row for row in rows if row.name in top1]
    parameters, seconds, case = measure_speed(rows, meter, options)
    results = summarize(rows, top1, parameters, seconds)
    record = dict(meter.describe(), budget=budget, failed=failed, case=str(case))
    title = f'Top-1 accuracy after {budget["length"]}, {args.seeds} seeds'
    plot_results(results, title, out / PICTURE_NAME)
    text = json.dumps({**record, 'rows': results}, indent=2) + '\n'
    write_whole(out / JSON_NAME, text.encode())
    write_whole(out / REPORT_NAME, format_report(results, record).encode())
    print(f'\n{format_results(results)}\n\nSaved in {out}')
    for line in failed:
        print(f'Failed: {line}')
    return 1 if failed else 0
