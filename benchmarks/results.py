# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Results of races: comparisons with the plain assembly, tables, JSON, growth."""

from collections.abc import Mapping, Sequence
from typing import Any, Dict, List, NamedTuple, Optional

import numpy as np

from mlla_mm.evaluation.markdown import markdown_table

from .cases import Case
from .meter import Spread, spread, time_cells, times_as_fast, unsteady_note


class Measured(NamedTuple):
    """A model in a case.

    Attributes:
        model (str): Its name, as in :data:`benchmarks.models.MODELS`.
        variant (str): '' for the model as it is, 'compiled' for a backbone that
            ``torch.compile`` has compiled, 'CUDA graph' for a replayed graph.
        parameters (int): Number of parameters.
        weights (int): Bytes of parameters and buffers.
        peak_memory (int, optional): Peak bytes of tensors during a call, see
            :func:`benchmarks.races.measure_case`. None for a CUDA graph.
        times (list[float]): Milliseconds per image, a sample for each round.
    """

    model: str
    variant: str
    parameters: int
    weights: int
    peak_memory: Optional[int]
    times: List[float]

    @property
    def label(self) -> str:
        """A name that tells the variants of a model apart."""
        return label(self.model, self.variant)


#: The models of each case.
Results = Dict[Case, List[Measured]]


def label(model: str, variant: str) -> str:
    """Name of a model in a variant."""
    return f'{model}, {variant}' if variant else model


def find_plain(
    point: Measured, measured: Sequence[Measured], variant: str = ''
) -> Measured:
    """The plain assembly of a model's size.

    Args:
        point (Measured): The model.
        measured (Sequence[Measured]): All models of the case.
        variant (str): Variant of the plain assembly. Defaults to '': as it is.
    """
    plain = 'plain-' + point.model.split('-')[1]
    return next(x for x in measured if (x.model, x.variant) == (plain, variant))


def speedup(point: Measured, reference: Measured) -> Spread:
    """How many times as fast as another model a model is."""
    return times_as_fast(point.times, reference.times)


def memory_ratio(point: Measured, reference: Measured) -> Optional[float]:
    """Peak memory over that of another model; None where it was not measured."""
    if point.peak_memory is None or reference.peak_memory is None:
        return None
    return point.peak_memory / reference.peak_memory


def format_case(case: Case, measured: Sequence[Measured]) -> str:
    """Set a case in a Markdown table, and name the models whose times are unsteady.

    Models are compared with the plain assembly of the same size, as it is and in each
    variant that was raced.
    """
    variants = list(dict.fromkeys(point.variant for point in measured))
    columns = ['Model', 'Params', 'ms per image', 'middle half', 'images/s']
    for variant in variants:
        columns += [f'speed / {label("plain", variant)}', 'middle half']
    columns += ['peak memory', 'memory / plain']
    rows, spreads = [], {}
    for point in measured:
        times = spreads[point.label] = spread(point.times)
        row = [point.label, f'{point.parameters / 1e6:.1f} M', *time_cells(times)]
        for variant in variants:
            low, median, high = speedup(point, find_plain(point, measured, variant))
            row += [f'{median:.2f}x', f'{low:.2f} to {high:.2f}']
        ratio = memory_ratio(point, find_plain(point, measured))
        if point.peak_memory is None or ratio is None:
            row += ['-', '-']
        else:
            row += [f'{point.peak_memory / 2**20:.0f} MiB', f'{ratio:.2f}x']
        rows.append(row)
    return f'### {case}\n\n{markdown_table(columns, rows)}{unsteady_note(spreads)}'


def results_record(results: Results, settings: Mapping[str, object]) -> Dict[str, Any]:
    """All samples and what is computed from them, for a JSON file.

    Args:
        results (dict[Case, list[Measured]]): Models of each case.
        settings (Mapping): From :meth:`benchmarks.meter.Meter.describe`.
    """
    cases = []
    for case, measured in results.items():
        models = []
        for point in measured:
            plain = find_plain(point, measured)
            comparison = dict(
                time=spread(point.times)._asdict(),
                speedup=speedup(point, plain)._asdict(),
                memory_ratio=memory_ratio(point, plain),
            )
            models.append({**point._asdict(), **comparison})
        cases.append(
            {**case._asdict(), 'num_tokens': case.num_tokens, 'models': models}
        )
    return {**settings, 'cases': cases}


def read_results(record: Mapping[str, Any]) -> Results:
    """The results in what :func:`results_record` made."""
    results = {}
    for entry in record['cases']:
        values = {name: entry[name] for name in Case._fields}
        case = Case(**{**values, 'shape': tuple(entry['shape'])})
        results[case] = [
            Measured(**{name: model[name] for name in Measured._fields})
            for model in entry['models']
        ]
    return results


class Curve(NamedTuple):
    """Cost of a model over the number of tokens.

    Attributes:
        label (str): Name of the model.
        tokens (list[int]): Tokens of an image in the first stage.
        times (list[float]): Median milliseconds per image.
        memory (list[float]): Peak MiB per image without weights. Empty for a CUDA
            graph.
    """

    label: str
    tokens: List[int]
    times: List[float]
    memory: List[float]


def fit_exponent(tokens: Sequence[float], costs: Sequence[float]) -> float:
    """Exponent of the power of ``tokens`` that fits ``costs`` best.

    Least squares of the logarithms: 1 means linear cost, 2 means quadratic cost.
    """
    slope, _ = np.polyfit(np.log(tokens), np.log(costs), 1)
    return float(slope)


def make_curves(results: Results) -> List[Curve]:
    """The curve of each model over the cases of a sweep.

    Args:
        results (dict[Case, list[Measured]]): The same models in each case.
    """
    tokens = [case.num_tokens for case in results]
    curves = []
    for points in zip(*results.values()):
        times = [spread(point.times).median for point in points]
        memory = [
            (point.peak_memory - point.weights) / case.batch_size / 2**20
            for case, point in zip(results, points)
            if point.peak_memory is not None
        ]
        curves.append(Curve(points[0].label, tokens, times, memory))
    return curves


def format_curves(curves: Sequence[Curve]) -> str:
    """Set a sweep in two Markdown tables, of time and of memory, with exponents."""
    tokens = curves[0].tokens
    columns = ['Model', *(f'{n} tokens' for n in tokens), 'exponent']
    tables = {
        'ms per image': [(c.label, c.times) for c in curves],
        'Peak MiB per image, without weights': [
            (c.label, c.memory) for c in curves if c.memory
        ],
    }
    texts = []
    for title, table in tables.items():
        rows = [
            [
                name,
                *(f'{cost:.4g}' for cost in costs),
                f'{fit_exponent(tokens, costs):.2f}',
            ]
            for name, costs in table
        ]
        texts.append(f'### {title}\n\n{markdown_table(columns, rows)}')
    return '\n\n'.join(texts)
