# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import json

import cv2
import pytest

from benchmarks.cases import MODES, Case, make_cases, make_sweep
from benchmarks.meter import Spread, spread
from benchmarks.plots import plot_benchmark, plot_sweep
from benchmarks.races import COMPILED, CUDA_GRAPH
from benchmarks.results import (
    Measured,
    find_plain,
    fit_exponent,
    format_case,
    format_curves,
    make_curves,
    read_results,
    results_record,
    speedup,
)

SMALL = Case('backbone', (32, 64), 2)


def point(model, times, variant='', memory=1000):
    return Measured(model, variant, 10, 400, memory, times)


def cells(text):
    """Cells of the rows of a table, the titles first."""
    lines = [line for line in text.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in line.split('|')[1:-1]] for line in lines]


def assert_is_picture(path):
    picture = cv2.imread(str(path))
    assert min(picture.shape[:2]) > 300
    assert picture.std() > 10


def test_speed_is_compared_round_by_round():
    """A machine that becomes twice as slow does so for both."""
    plain = point('plain-t', [4.0, 8.0, 4.0, 8.0])
    ours = point('mlla-t', [2.0, 4.0, 2.0, 4.0])
    assert speedup(ours, plain) == Spread(2.0, 2.0, 2.0)
    assert not spread(ours.times).is_steady
    compiled = point('plain-t', [1.0] * 4, COMPILED)
    measured = [ours, point('plain-s', [1.0] * 4), compiled, plain]
    assert find_plain(ours, measured) is plain
    assert find_plain(ours, measured, COMPILED) is compiled


def test_table():
    models = [('mlla-t', 2.0, 3), ('plain-t', 4.0, 4)]
    measured = [
        *(point(name, [t] * 3, memory=mib * 2**20) for name, t, mib in models),
        *(point(name, [t / 4, t / 2, t], COMPILED) for name, t, _ in models),
        *(point(name, [t / 8] * 3, CUDA_GRAPH, None) for name, t, _ in models),
    ]
    text = format_case(SMALL, measured)
    assert text.startswith('### backbone 32x64, batch 2, infer, float32\n')
    titles, _, ours, _, compiled, _, graph, _ = cells(text)
    assert [title for title in titles if title.startswith('speed')] == [
        'speed / plain',
        'speed / plain, compiled',
        'speed / plain, CUDA graph',
    ]
    assert ours[:7] == [
        *('mlla-t', '0.0 M', '2', '2 to 2', '500', '2.00x', '2.00 to 2.00')
    ]
    assert ours[-2:] == ['3 MiB', '0.75x']
    assert compiled[0] == 'mlla-t, compiled'
    assert graph == [
        *('mlla-t, CUDA graph', '0.0 M', '0.25', '0.25 to 0.25', '4000'),
        *('16.00x', '16.00 to 16.00', '8.00x', '6.00 to 12.00'),
        *('2.00x', '2.00 to 2.00', '-', '-'),
    ]
    assert 'of the median: mlla-t, compiled, plain-t, compiled. Stop other' in text


def test_saved(tmp_path):
    results = {
        case: [
            point('mlla-t', [2.0, 2.2, 2.1]),
            point('swin-t', [3.0, 3.0, 3.3]),
            point('plain-t', [4.0, 4.0, 4.4], memory=2000),
            point('plain-t', [1.0, 1.0, 1.1], CUDA_GRAPH, None),
        ]
        for case in make_cases(['32x64', '64x64'], modes=MODES)
    }
    content = json.loads(json.dumps(results_record(results, dict(torch='2.8'))))
    assert content['torch'] == '2.8'
    assert [case['mode'] for case in content['cases']] == ['infer', 'train'] * 2
    ours, _, _, graph = content['cases'][0]['models']
    assert ours['times'] == [2.0, 2.2, 2.1]
    assert ours['time']['median'] == 2.1
    assert ours['speedup']['median'] == pytest.approx(2.0)
    assert ours['memory_ratio'] == 0.5
    assert ours['variant'] == ''
    assert graph['variant'] == 'CUDA graph'
    assert graph['speedup']['median'] == pytest.approx(4.0)
    assert graph['peak_memory'] is graph['memory_ratio'] is None
    assert read_results(content) == results
    plot_benchmark(results, 'a CPU', tmp_path / 'a.png')
    assert_is_picture(tmp_path / 'a.png')


@pytest.mark.parametrize('exponent', [0.5, 1.0, 2.0])
def test_exponent(exponent):
    tokens = [3136, 6400, 12544, 25600]
    costs = [0.01 * n**exponent for n in tokens]
    assert fit_exponent(tokens, costs) == pytest.approx(exponent)


def test_curves(tmp_path):
    """Time is linear, memory quadratic beside the weights."""
    results = {
        case: [
            point('plain-t', [0.8 * n, n, 1.1 * n], memory=400 + 2 * n**2),
            point('plain-t', [n], CUDA_GRAPH, None),
        ]
        for case in make_sweep([64, 32, 128], batch_size=2)
        for n in [case.num_tokens]
    }
    curve, graph = make_curves(results)
    assert curve.tokens == curve.times == [64, 256, 1024]
    assert curve.memory[0] == 64**2 / 2**20
    assert graph.memory == []
    time, memory = format_curves([curve, graph]).split('\n\n### ')
    assert cells(time)[0] == [
        *('Model', '64 tokens', '256 tokens', '1024 tokens', 'exponent')
    ]
    assert [(row[0], row[-1]) for row in cells(time)[2:]] == [
        ('plain-t', '1.00'),
        ('plain-t, CUDA graph', '1.00'),
    ]
    assert [(row[0], row[-1]) for row in cells(memory)[2:]] == [('plain-t', '2.00')]
    plot_sweep([curve, graph], 'a CPU', tmp_path / 'a.png')
    assert_is_picture(tmp_path / 'a.png')
