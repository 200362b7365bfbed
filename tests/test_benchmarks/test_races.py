# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import json
import os
import platform
import sys
from importlib import metadata

import cv2
import pytest
import torch
from torch import nn

from benchmarks import races
from benchmarks.eager_mlla import EagerMLLA
from benchmarks.latency import Spread, spread, unsteady_note
from benchmarks.plain_mlla import PlainMLLA
from benchmarks.plots import plot_benchmark, plot_sweep
from mlla_mm.models import MLLA

from .. import reference
from ..compiler import needs_compiler

NANO = dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
SMALL = races.Case('backbone', (32, 64), 2)


@pytest.fixture
def nano(monkeypatch):
    """What 't' means, so that tests take no longer than they have to."""
    monkeypatch.setitem(MLLA.arch_zoo, 't', NANO)


def point(model, times, variant='', memory=1000):
    return races.Measured(model, variant, 10, 400, memory, times)


def needs_gpu(test):
    no_gpu = not torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(no_gpu, reason='needs a GPU')(test))


def test_cases_are_combinations():
    cases = races.make_cases(
        ['classification', '64x96'], [8, 2], races.MODES, ['float32']
    )
    assert cases == [
        races.Case('classification', (224, 224), 8, 'infer', 'float32'),
        races.Case('classification', (224, 224), 8, 'train', 'float32'),
        races.Case('backbone', (64, 96), 2, 'infer', 'float32'),
        races.Case('backbone', (64, 96), 2, 'train', 'float32'),
    ]
    detection, segmentation = races.make_cases(['detection', 'segmentation'], [4])
    assert detection == races.Case('detection', (800, 1280), 4, 'infer', 'float32')
    assert segmentation.batch_size == 4
    assert str(detection) == 'detection 800x1280, batch 4, infer, float32'
    assert detection.num_tokens == 200 * 320
    assert races.Case('backbone', (5, 9), 1).num_tokens == 2 * 3


@pytest.mark.parametrize(
    'arguments, message',
    [
        ((['224'],), "HEIGHTxWIDTH, got '224'"),
        ((['0x32'],), "HEIGHTxWIDTH, got '0x32'"),
        ((['32x32'], [0]), 'got 0'),
        ((['32x32', '64x64', '96x96'], [1, 2]), 'for all 3 shapes, .* got 1 2'),
    ],
)
def test_bad_cases(arguments, message):
    with pytest.raises(ValueError, match=message):
        races.make_cases(*arguments)


@pytest.mark.parametrize('sides', [[224], [64, 64], [0, 64]])
def test_bad_sweep(sides):
    with pytest.raises(ValueError, match='two or more different positive sides'):
        races.make_sweep(sides)


@pytest.mark.parametrize(
    'models, message',
    [
        (['mlla-x'], "Unknown model 'mlla-x'. There are: mlla-t, "),
        (['plain-t', 'mlla-t', 'mlla-t'], 'names one twice'),
        (['plain-t', 'mlla-t', 'swin-s'], 'swin-s is compared with plain-s: add it'),
        (['eager-b', 'plain-t'], 'eager-b is compared with plain-b: add it'),
    ],
)
def test_bad_models(models, message):
    with pytest.raises(ValueError, match=message):
        races.check_models(models)


def test_bad_device_and_repeats():
    with pytest.raises(ValueError, match="Device 'no-such' cannot be used"):
        races.measure_case(SMALL, ['plain-t'], 'no-such')
    with pytest.raises(ValueError, match='--repeats must be at least 1, got 0'):
        races.measure_case(SMALL, ['plain-t'], repeats=0)


def test_bad_variants():
    with pytest.raises(ValueError, match="--cuda-graph needs a CUDA .* is 'cpu'"):
        races.measure_case(SMALL, ['plain-t'], variants=[races.CUDA_GRAPH])
    with pytest.raises(ValueError, match="'traced'. There are: compiled, CUDA graph"):
        races.measure_case(SMALL, ['plain-t'], variants=['traced'])


def test_images_that_are_too_small_to_train(nano):
    case = races.Case('backbone', (32, 32), 1, 'train')
    with pytest.raises(ValueError, match='32x32|Expected more than 1 value'):
        races.measure_case(case, ['plain-t'], repeats=1)


@pytest.mark.parametrize('classify', [False, True])
@pytest.mark.parametrize('family', ['mlla', 'eager', 'plain', 'swin', 'convnext'])
def test_models_are_comparable(family, classify):
    """Maps of four strides or logits, of any image, without stochastic depth."""
    pytest.importorskip('mmpretrain')
    model = races.build_model(f'{family}-t', classify)
    model.train()
    x = torch.rand(2, 3, 72, 100)
    outputs = model(x)
    if classify:
        assert outputs.shape == (2, 1000)
    else:
        assert [output.shape[2] for output in outputs[:2]] == [18, 9]
        assert len(outputs) == 4
    again = model(x)
    outputs = [outputs] if classify else outputs
    again = [again] if classify else again
    assert all(torch.equal(a, b) for a, b in zip(outputs, again))
    parameters = sum(p.numel() for p in model.parameters())
    assert 23e6 < parameters < 29e6


@pytest.mark.parametrize(
    'task, mode, dtype',
    [
        ('backbone', 'infer', 'float32'),
        ('classification', 'train', 'float32'),
        ('backbone', 'train', 'bfloat16'),
    ],
)
def test_measured(nano, task, mode, dtype):
    case = SMALL._replace(task=task, mode=mode, dtype=dtype)
    names = ['mlla-t', 'eager-t', 'plain-t']
    found = races.measure_case(case, names, repeats=2)
    assert [measured.label for measured in found] == names
    assert len({measured.parameters for measured in found}) == 1
    for measured in found:
        assert measured.parameters > 10**5
        assert len(measured.times) == 2
        assert min(measured.times) > 0
        assert measured.weights >= 4 * measured.parameters
        images = 4 * 2 * 3 * 32 * 64
        # In training there are gradients besides.
        copies = 2 if mode == 'train' else 1
        assert measured.peak_memory > copies * 4 * measured.parameters + images


def test_training_needs_more_memory_and_leaves_the_weights(nano):
    model = races.build_model('plain-t', classify=False).train()
    before = [p.clone() for p in model.parameters()]
    images = torch.rand(2, 3, 32, 64)
    train, training = races._prepare(
        'plain-t', model, images, SMALL._replace(mode='train')
    )
    train()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))
    _, inference = races._prepare('plain-t', model.eval(), images, SMALL)
    assert training > inference + races.module_bytes(model) / 2


@pytest.mark.parametrize('name, other', [('plain', 'mlla'), ('eager', 'eager')])
def test_models_that_differ_are_not_raced(name, other, nano, monkeypatch):
    def forward(self, x):
        return tuple(1.01 * out for out in MLLA.forward(self, x))

    wrong = dict(plain=PlainMLLA, eager=EagerMLLA)[name]
    monkeypatch.setattr(wrong, 'forward', forward)
    message = f'{other}-t and plain-t differ by 0.0(099|1) in float32'
    with pytest.raises(RuntimeError, match=message):
        races.measure_case(SMALL, ['mlla-t', 'plain-t', 'eager-t'], repeats=1)


def test_batch_norm_in_the_convolutions(nano, monkeypatch):
    """In every model that is raced, and said in what is written."""
    raced = []
    monkeypatch.setattr(races, '_check_twins', lambda models, x: raced.append(models))
    models = ['mlla-t', 'plain-t']
    for fuse in (False, True):
        races.measure_case(SMALL, models, repeats=1, fuse_conv_bn=fuse)
        for model in raced.pop().values():
            norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
            assert bool(norms) is not fuse
    settings = races.describe_run('cpu', 1, fuse_conv_bn=True)
    assert settings['fuse_conv_bn'] is True
    assert 'BatchNorm in the convolutions' in races.format_settings(settings)
    with pytest.raises(ValueError, match='--fuse-conv-bn is for inference'):
        races.measure_case(SMALL._replace(mode='train'), models, fuse_conv_bn=True)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize('mode', races.MODES)
def test_compiled_models(nano, mode):
    case = SMALL._replace(mode=mode)
    measured = races.measure_case(
        case, ['mlla-t', 'plain-t'], repeats=1, variants=[races.COMPILED]
    )
    assert [m.label for m in measured] == [
        'mlla-t',
        'plain-t',
        'mlla-t, compiled',
        'plain-t, compiled',
    ]


def graph_of(case):
    """A model, its images, a call of it, and the graph of one."""
    model = races._build_twin('mlla-t', case).cuda()
    images = races._make_images(case, 'cuda')
    graph, peak = races._prepare(
        'mlla-t, CUDA graph', model, images, case, torch.cuda.graph_pool_handle()
    )
    assert peak is None
    return model, images, races._make_call(model, images, case), graph


@needs_gpu
def test_a_cuda_graph_computes_anew(nano):
    """It gives what a call gives, of images that were not there when it was made."""
    _, images, call, graph = graph_of(SMALL)
    before = graph()[0].clone()
    images.copy_(torch.rand_like(images))
    after, expected = graph(), call()
    for new, feature in zip(after, expected):
        assert reference.relative_error(new, feature) < 1e-3
    # Features of deeper stages depend little on the images where weights are random.
    assert reference.relative_error(before, expected[0]) > 1e-2


@needs_gpu
def test_a_cuda_graph_of_a_training_step(nano):
    """Its gradients, that nothing else sees, and its statistics are those of a call."""
    case = SMALL._replace(mode='train')
    model, images, call, _ = graph_of(case)
    weight = model.layers[0].blocks[0].in_proj.weight
    statistics = model.patch_embed.conv1.norm.running_mean
    gradients = []
    weight.register_hook(gradients.append)
    graph = races._CudaGraph(call, torch.cuda.graph_pool_handle())
    captured = gradients[-1]
    images.copy_(torch.rand_like(images))

    found = []
    for step in (graph, call):
        statistics.zero_()
        step()
        found.append((statistics.clone(), gradients[-1].clone()))
    assert gradients[-1] is not captured
    for replayed, expected in zip(*found):
        assert reference.relative_error(replayed, expected) < 1e-3
    assert all(p.grad is None for p in model.parameters())


@needs_gpu
@pytest.mark.parametrize('mode', races.MODES)
@pytest.mark.parametrize('dtype', races.DTYPES)
def test_cuda_graphs_are_raced(mode, dtype):
    pytest.importorskip('mmpretrain')
    names = ['mlla-t', 'eager-t', 'plain-t', 'swin-t', 'convnext-t']
    case = races.Case('classification', (96, 96), 4, mode, dtype)
    found = races.measure_case(case, names, 'cuda', 2, [races.CUDA_GRAPH])
    labels = [*names, *(f'{name}, CUDA graph' for name in names)]
    assert [measured.label for measured in found] == labels
    for measured in found:
        assert len(measured.times) == 2
        assert min(measured.times) > 0
        assert (measured.peak_memory is None) == bool(measured.variant)


# In a process of its own, since PyTorch does not get over a capture that failed.
WAITS = """
from benchmarks import races

def forward(self, x):
    x.sum().item()
    return (x,)

races.PlainMLLA.forward = forward
try:
    races.measure_case(
        races.Case('backbone', (32, 64), 2), ['plain-t'], 'cuda', 1, [races.CUDA_GRAPH]
    )
except ValueError as error:
    print(error)
"""


@needs_gpu
def test_a_model_that_cannot_be_captured(run_tool):
    visible = os.environ.get('CUDA_VISIBLE_DEVICES', '0')
    env = dict(CUDA_VISIBLE_DEVICES=visible)
    output = run_tool('python', '-c', WAITS, env=env).stdout
    assert 'plain-t, CUDA graph fails in backbone 32x64, batch 2, infer' in output
    assert 'it cannot be captured: ' in output
    assert 'operation not permitted when stream is capturing' in output


def test_speed_is_compared_round_by_round():
    """A machine that becomes twice as slow does so for both."""
    plain = point('plain-t', [4.0, 8.0, 4.0, 8.0])
    ours = point('mlla-t', [2.0, 4.0, 2.0, 4.0])
    assert races.speedup(ours, plain) == Spread(2.0, 2.0, 2.0)
    assert not spread(ours.times).is_steady
    compiled = point('plain-t', [1.0] * 4, races.COMPILED)
    of_small = point('plain-s', [1.0] * 4)
    measured = [ours, of_small, compiled, plain]
    assert races.find_plain(ours, measured) is plain
    assert races.find_plain(ours, measured, races.COMPILED) is compiled


def test_table():
    measured = [
        point('mlla-t', [2.0, 2.0, 2.0], memory=3 * 2**20),
        point('plain-t', [4.0, 4.0, 4.0], memory=4 * 2**20),
    ]
    lines = races.format_case(SMALL, measured).splitlines()
    assert lines[0] == '### backbone 32x64, batch 2, infer, float32'
    cells = [cell.strip() for cell in lines[4].split('|')[1:-1]]
    assert cells == [
        *('mlla-t', '0.0 M', '2', '2 to 2', '500', '2.00x', '2.00 to 2.00'),
        *('3 MiB', '0.75x'),
    ]


def test_table_of_variants():
    plain = [('mlla-t', 2.0), ('plain-t', 4.0)]
    measured = [
        *(point(name, [time] * 3) for name, time in plain),
        *(
            point(name, [time / 4, time / 2, time], races.COMPILED)
            for name, time in plain
        ),
        *(point(name, [time / 8] * 3, races.CUDA_GRAPH, None) for name, time in plain),
    ]
    text = races.format_case(SMALL, measured)
    lines = [
        [cell.strip() for cell in line.split('|')[1:-1]]
        for line in text.splitlines()
        if line.startswith('|')
    ]
    assert [title for title in lines[0] if title.startswith('speed')] == [
        'speed / plain',
        'speed / plain, compiled',
        'speed / plain, CUDA graph',
    ]
    assert [line[0] for line in lines[4:]] == [
        'mlla-t, compiled',
        'plain-t, compiled',
        'mlla-t, CUDA graph',
        'plain-t, CUDA graph',
    ]
    of_graph = lines[6]
    assert of_graph[5:] == [
        *('16.00x', '16.00 to 16.00', '8.00x', '6.00 to 12.00'),
        *('2.00x', '2.00 to 2.00', '-', '-'),
    ]
    assert 'of the median: mlla-t, compiled, plain-t, compiled. Stop other' in text


def test_unsteady_note():
    steady, unsteady = Spread(9.8, 10.0, 10.2), Spread(9.0, 10.0, 14.0)
    assert unsteady_note(dict(a=steady)) == ''
    assert 'of the median: b. Stop' in unsteady_note(dict(a=steady, b=unsteady))


def test_saved(tmp_path):
    results = {
        case: [
            point('mlla-t', [2.0, 2.2, 2.1]),
            point('swin-t', [3.0, 3.0, 3.3]),
            point('plain-t', [4.0, 4.0, 4.4], memory=2000),
            point('plain-t', [1.0, 1.0, 1.1], races.CUDA_GRAPH, None),
        ]
        for case in races.make_cases(['32x64', '64x64'], modes=races.MODES)
    }
    races.save_results(results, races.describe_run('cpu', 3), tmp_path / 'a.json')
    content = json.loads((tmp_path / 'a.json').read_text())
    assert content['torch'] == torch.__version__
    assert content['threads'] == torch.get_num_threads()
    assert content['repeats'] == 3
    assert [case['mode'] for case in content['cases']] == ['infer', 'train'] * 2
    ours = content['cases'][0]['models'][0]
    assert ours['times'] == [2.0, 2.2, 2.1]
    assert ours['time']['median'] == 2.1
    assert ours['speedup']['median'] == pytest.approx(2.0)
    assert ours['memory_ratio'] == 0.5
    assert ours['variant'] == ''
    graph = content['cases'][0]['models'][3]
    assert graph['variant'] == 'CUDA graph'
    assert graph['speedup']['median'] == pytest.approx(4.0)
    assert graph['peak_memory'] is graph['memory_ratio'] is None

    plot_benchmark(results, 'a CPU', tmp_path / 'a.png')
    picture = cv2.imread(str(tmp_path / 'a.png'))
    assert min(picture.shape[:2]) > 300
    assert picture.std() > 10


def test_settings(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', '--out', 'a folder'])
    monkeypatch.delenv('MLLA_OPS', raising=False)
    settings = races.describe_run('cpu', 3)
    assert settings['python'] == platform.python_version()
    assert settings['command'] == "benchmark.py --out 'a folder'"
    assert settings['mlla_ops'] == 'default' and settings['fuse_conv_bn'] is False
    assert settings['cuda'] is settings['cudnn'] is settings['driver'] is None
    has_triton = any(d.metadata['Name'] == 'triton' for d in metadata.distributions())
    assert (settings['triton'] is not None) == has_triton
    monkeypatch.setenv('MLLA_OPS', 'naive')
    assert races.describe_run('cpu', 3)['mlla_ops'] == 'naive'

    settings.update(device='a CPU', torch='2.8', triton=None, python='3.12')
    assert races.format_settings(settings) == 'a CPU, torch 2.8, Python 3.12'
    settings.update(device='a GPU', cuda='12.8', cudnn=91002, driver='570.1')
    assert races.format_settings(settings) == (
        'a GPU, torch 2.8, CUDA 12.8, cuDNN 91002, driver 570.1, Python 3.12'
    )


@needs_gpu
def test_settings_of_a_gpu():
    settings = races.describe_run('cuda', 3)
    assert settings['device'] == torch.cuda.get_device_name()
    assert settings['cuda'] == torch.version.cuda
    assert settings['cudnn'] == torch.backends.cudnn.version()


def test_triton_is_not_imported(run_tool):
    """It takes a second, and not every command needs it."""
    code = """
import sys
from benchmarks import races
races.describe_run('cpu', 1)
print('triton' in sys.modules)
"""
    assert run_tool('python', '-c', code).stdout.splitlines()[-1] == 'False'


@pytest.mark.parametrize('exponent', [0.5, 1.0, 2.0])
def test_exponent(exponent):
    tokens = [3136, 6400, 12544, 25600]
    costs = [0.01 * n**exponent for n in tokens]
    assert races.fit_exponent(tokens, costs) == pytest.approx(exponent)


def test_curves(tmp_path):
    """Time is linear, memory quadratic beside the weights."""
    results = {
        case: [
            point(
                'plain-t', [0.8 * n, n, 1.1 * n], memory=400 + case.batch_size * n**2
            ),
            point('plain-t', [n], races.CUDA_GRAPH, None),
        ]
        for case in races.make_sweep([64, 32, 128], batch_size=2)
        for n in [case.num_tokens]
    }
    curve, graph = races.fit_curves(results)
    assert curve.tokens == [64, 256, 1024]
    assert curve.times == [64, 256, 1024]
    assert curve.time_exponent == pytest.approx(1)
    assert curve.memory[0] == 64**2 / 2**20
    assert curve.memory_exponent == pytest.approx(2)
    assert graph.time_exponent == pytest.approx(1)
    assert (graph.memory, graph.memory_exponent) == ([], None)

    text = races.format_curves([curve, graph])
    assert text.count('| plain-t ') == 2
    assert text.count('| plain-t, CUDA graph ') == 1
    assert [
        line.split('|')[-2].strip() for line in text.splitlines() if 'plain' in line
    ]
    assert '1024 tokens' in text
    plot_sweep([curve, graph], 'a CPU', tmp_path / 'a.png')
    picture = cv2.imread(str(tmp_path / 'a.png'))
    assert picture.shape[1] > picture.shape[0] > 300
    assert picture.std() > 10
