# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The race of exported files against PyTorch."""

import copy
import json
import statistics

import cv2
import numpy as np
import pytest
import torch

from benchmarks import exported
from benchmarks.exported import Measured, agreement, format_measured, prepare_image
from benchmarks.meter import Meter
from mlla_mm.apis.export import describe_and_select
from mlla_mm.apis.model import load_model
from mlla_mm.export import ExportError, Options, formats, select_part

from .. import nano as nano_models
from ..compiler import needs_compiler
from ..nano import NANO
from .test_results import cells

DET, SEG, CLS = 'mmdet', 'mmseg', 'mmpretrain'
TOOL = 'tools/analysis_tools/export_speed.py'
SHAPE = (64, 96)
# Of the columns, which have no names of their own.
SPEED, SIZE, SAME, DETECTIONS = 3, 5, 6, 7


# Few proposals and detections, so that tests are short.
FEW = {'model.test_cfg.rpn.max_per_img': 50, 'model.test_cfg.rcnn.max_per_img': 9}


@pytest.fixture
def whole(nano):
    """The config, the checkpoint and the whole of a small model, by scope."""

    def get(scope, normalize=True, logits=False, ema=False):
        cfg, checkpoint = nano(scope)
        cfg = copy.deepcopy(cfg)
        if scope == DET:
            cfg.merge_from_dict(FEW)
        model = load_model(cfg, checkpoint, 'cpu', ema)
        return cfg, checkpoint, describe_and_select(model, cfg, normalize, logits)

    return get


def write(part, path):
    format = {'.onnx': 'onnx', '.pt': 'torchscript'}[path.suffix]
    formats.write(part, format, path, Options(SHAPE))
    return path


def measure(part, *paths):
    """One round, without the tool."""
    image = prepare_image(part, None, SHAPE)
    files = exported.open_files([str(path) for path in paths], part.metadata['task'])
    return exported.measure(part, files, image, Meter('cpu', repeats=1))


def race(call_tool, tmp_path, scope, *arguments, check=True):
    """Call the tool where there are no data; returns what its process would."""
    few = [f'{key}={value}' for key, value in FEW.items()] if scope == DET else []
    return call_tool(
        TOOL, NANO[scope], *arguments, '--shape', *SHAPE, '--repeats', 3, '--threads',
        1, '--out', tmp_path / 'out', *(['--cfg-options', *few] if few else []),
        check=check, cwd=tmp_path,
    )  # fmt: skip


@pytest.mark.parametrize(
    'scope, files', [(DET, ['a.onnx']), (SEG, ['a.pt']), (CLS, ['a.pt', 'a.onnx'])]
)
def test_rows(scope, files, call_tool, whole, tmp_path):
    """Every row computes the same, and is compared with PyTorch round by round."""
    has_onnx = 'a.onnx' in files
    if has_onnx:
        pytest.importorskip('onnx')
        pytest.importorskip('onnxruntime')
    _, checkpoint, part = whole(scope)
    files = [write(part, tmp_path / name) for name in files]
    output = race(call_tool, tmp_path, scope, checkpoint, *files).stdout
    titles, _, *rows = cells(output)
    names = [exported.EAGER, exported.TEST_STEP, *map(str, files)]
    assert [row[0] for row in rows] == names
    assert [row[SIZE] for row in rows] == [
        '-', '-', *(f'{path.stat().st_size / 1e6:.1f}' for path in files)
    ]  # fmt: skip
    assert {row[SAME] for row in rows} == {'100.0%'}
    if scope == DET:
        assert titles[DETECTIONS] == 'detections above 0.05'
        assert {row[DETECTIONS] for row in rows} == {'9'}
    else:
        assert len(titles) == DETECTIONS
    assert 'a synthetic picture' in output
    assert (', onnxruntime ' in output) == has_onnx
    assert (tmp_path / 'out/export_speed.md').read_text() in output

    found = json.loads((tmp_path / 'out/export_speed.json').read_text())
    assert (found['shape'], found['threads'], found['picture']) == ([*SHAPE], 1, None)
    eager = found['rows'][0]['times']
    for row, record in zip(rows, found['rows']):
        ratio = statistics.median(a / b for a, b in zip(eager, record['times']))
        assert record['speedup']['median'] == pytest.approx(ratio)
        assert row[SPEED] == f'{ratio:.2f}x'


@pytest.mark.slow
@needs_compiler
def test_compiled(call_tool, whole, tmp_path):
    _, checkpoint, part = whole(CLS)
    file = write(part, tmp_path / 'a.pt')
    output = race(call_tool, tmp_path, CLS, checkpoint, file, '--compile').stdout
    rows = {row[0]: row for row in cells(output)}
    assert rows[exported.COMPILED][SAME] == '100.0%'


def test_other_weights_are_seen(whole, tmp_path):
    """A file may be of another checkpoint: its row tells that it predicts otherwise."""
    _, _, part = whole(CLS)
    _, _, averaged = whole(CLS, ema=True)
    found = measure(part, write(averaged, tmp_path / 'a.pt'))
    assert [x.agreement > 0.999 for x in found] == [True, True, False]


def test_onnxruntime_takes_the_threads_and_the_cpu(whole, tmp_path, monkeypatch):
    pytest.importorskip('onnx')
    onnxruntime = pytest.importorskip('onnxruntime')
    _, _, part = whole(CLS)
    path = str(write(part, tmp_path / 'a.onnx'))
    session, asked = onnxruntime.InferenceSession, []

    def open_session(path, options, providers):
        asked.append((options, providers))
        return session(path, options, providers)

    monkeypatch.setattr(onnxruntime, 'InferenceSession', open_session)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        exported.open_files([path], 'classification')
    finally:
        torch.set_num_threads(threads)
    ((options, providers),) = asked
    assert options.intra_op_num_threads == threads + 1
    assert providers == ['CPUExecutionProvider']
    everything = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert options.graph_optimization_level == everything


def test_a_picture_of_the_test_data(nano, digits_coco, tmp_path):
    """The first one, in the order that pipelines have, whatever its proportions."""
    cfg = copy.deepcopy(nano(DET)[0])
    cfg.test_dataloader.dataset.data_root = str(tmp_path / 'nowhere')
    assert exported.find_picture(cfg) is None
    cfg.test_dataloader.dataset.data_root = str(digits_coco)
    path = exported.find_picture(cfg)
    names = json.loads((digits_coco / 'annotations/instances_val.json').read_text())
    assert path.endswith(names['images'][0]['file_name'])


def test_a_picture_is_resized(whole, tmp_path):
    _, _, part = whole(CLS)
    picture = str(tmp_path / 'blue.png')
    cv2.imwrite(picture, np.full((30, 20, 3), (200, 0, 10), np.uint8))
    image = prepare_image(part, picture, (40, 60))
    assert image.shape == (3, 40, 60) and image.dtype == torch.uint8
    assert [channel.unique().tolist() for channel in image] == [[200], [0], [10]]
    with pytest.raises(FileNotFoundError):
        prepare_image(part, str(tmp_path / 'missing.png'), (40, 60))
    # Of other images than pictures there is noise alone.
    part = part._replace(in_channels=5)
    image = prepare_image(part, None, (40, 60))
    assert image.shape == (5, 40, 60) and image.float().std() > 50
    with pytest.raises(ValueError, match='blue.png .* the model takes 5'):
        prepare_image(part, picture, (40, 60))


BOXES = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]])


def detections(boxes=BOXES, labels=(1, 2)):
    return dict(boxes=boxes, labels=torch.tensor(labels, dtype=torch.long))


@pytest.mark.parametrize(
    'task, one, other, expected',
    [
        ('detection', detections(), detections(), 1),
        ('detection', detections(), detections(BOXES.flip(0), (2, 1)), 1),
        ('detection', detections(), detections(labels=(1, 1)), 0.5),
        ('detection', detections(), detections(BOXES[:1], (1,)), 0.5),
        ('detection', detections(), detections(BOXES + 0.2), 1),
        ('detection', detections(), detections(BOXES + 1), 0),
        # One box is no two detections.
        ('detection', detections(), detections(BOXES[[0, 0]], (1, 1)), 0.5),
        ('detection', detections(BOXES[:0], ()), detections(BOXES[:0], ()), 1),
        ('detection', detections(BOXES[:0], ()), detections(), 0),
        (
            'segmentation',
            dict(labels=torch.tensor([[[1, 2], [3, 4]]])),
            dict(labels=torch.tensor([[[1, 2], [3, 5]]])),
            0.75,
        ),
        (
            'classification',
            dict(scores=torch.tensor([[0.5, 0.25, 0.25]])),
            dict(scores=torch.tensor([[0.25, 0.5, 0.25]])),
            0.75,
        ),
    ],
)
def test_agreement(task, one, other, expected):
    if task == 'detection':
        pytest.importorskip('mmdet')
    assert agreement(task, one, other) == pytest.approx(expected)
    assert agreement(task, other, one) == pytest.approx(expected)


def test_table():
    """A machine that becomes twice as slow does so for all rows."""
    measured = [
        Measured('PyTorch', None, 1, 3, [4.0, 8.0, 4.0]),
        Measured('a.onnx', 2_500_000, 0.5, 6, [2.0, 4.0, 2.0]),
    ]
    settings = {
        **Meter('cpu').describe(),
        **dict(onnxruntime=None, config='x.py', shape=(8, 16), picture='b.png'),
        'score_threshold': 0.25,
    }
    text = format_measured(measured, settings)
    titles, _, *rows = cells(text)
    assert titles[-1] == 'detections above 0.25'
    assert rows == [
        ['PyTorch', '4', '4 to 6', '1.00x', '1.00 to 1.00', '-', '100.0%', '3'],
        ['a.onnx', '2', '2 to 3', '2.00x', '2.00 to 2.00', '2.5', '50.0%', '6'],
    ]
    assert '### x.py, 8x16' in text and 'From b.png.' in text
    assert 'Unsteady' in text and 'onnxruntime' not in text


def test_files_that_are_not_comparable(whole, nano, tmp_path):
    """They take other images, or give other outputs."""
    _, _, part = whole(SEG)
    _, _, normalised = whole(SEG, normalize=False)
    with pytest.raises(ExportError, match='without --no-normalize'):
        measure(part, write(normalised, tmp_path / 'a.pt'))
    _, _, logits = whole(SEG, logits=True)
    with pytest.raises(ExportError, match='gives 2 outputs, and the model 1 .labels'):
        measure(part, write(logits, tmp_path / 'b.pt'))
    _, _, part = whole(CLS)
    cfg = copy.deepcopy(nano(CLS)[0])
    cfg.model.head.num_classes = 3
    model = nano_models.build(cfg).eval()
    model.dataset_meta = {}
    other = describe_and_select(model, cfg)
    with pytest.raises(ExportError, match='of different models'):
        measure(part, write(other, tmp_path / 'c.pt'))


def test_a_file_that_fails(whole, tmp_path):
    _, _, part = whole(CLS)
    path = str(tmp_path / 'a.pt')

    def fail(*inputs):
        raise RuntimeError('Traceback\nwrong size')

    image = prepare_image(part, None, SHAPE)
    with pytest.raises(ExportError, match=r'a.pt fails for .* \(3, 64, 96\): wrong si'):
        exported.measure(part, {path: (fail, part.metadata)}, image, Meter('cpu'))


def test_operators_of_a_detector_are_known(run_tool, tmp_path):
    """Also in a process that has not imported torchvision."""
    ops = pytest.importorskip('torchvision').ops
    path = tmp_path / 'a.pt'
    script = torch.jit.trace(lambda x: ops.nms(x, x[:, 0], 0.5), BOXES)
    torch.jit.save(script, str(path))
    code = (
        'import sys; from pathlib import Path; from mlla_mm.export import formats; '
        'print("torchvision" in sys.modules); '
        f'formats.torchscript_runner(Path({str(path)!r})); print("opened")'
    )
    assert run_tool('python', '-c', code).stdout.endswith('False\nopened\n')


def test_files_that_are_not_opened(whole, tmp_path, monkeypatch):
    _, checkpoint, part = whole(CLS)
    file = str(write(part, tmp_path / 'a.pt'))
    with pytest.raises(ValueError, match='a.pt is classification, .* is detection'):
        exported.open_files([file], 'detection')
    with pytest.raises(ValueError, match='named twice'):
        exported.open_files([file, file], 'classification')
    with pytest.raises(FileNotFoundError, match='missing.pt'):
        exported.open_files([str(tmp_path / 'missing.pt')], 'classification')
    with pytest.raises(ValueError, match=r"mmpretrain.pth must be .*'.pth'"):
        exported.open_files([str(checkpoint)], 'classification')
    (tmp_path / 'checkpoint.pt').write_bytes(checkpoint.read_bytes())
    with pytest.raises(ValueError, match='checkpoint.pt cannot be read as TorchScript'):
        exported.open_files([str(tmp_path / 'checkpoint.pt')], 'classification')
    backbone = select_part(part.model, 'backbone')
    file = str(write(backbone, tmp_path / 'backbone.pt'))
    with pytest.raises(ValueError, match='backbone.pt is no whole model of tools/exp'):
        exported.open_files([file], 'classification')
    (tmp_path / 'a.onnx').touch()
    monkeypatch.setattr(formats, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match='onnx needs onnxruntime: pip install'):
        exported.open_files([str(tmp_path / 'a.onnx')], 'classification')


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--repeats', '0'], ['--repeats', 'got 0']),
        (['--threads', '0'], ['--threads', 'got 0']),
        (['--shape', '20', '64'], ['33 x 33', '(20, 64)']),
        (['--image', 'missing.png'], ['missing.png']),
    ],
)
def test_errors(arguments, words, call_tool, whole, tmp_path):
    _, checkpoint, part = whole(CLS)
    file = write(part, tmp_path / 'a.pt')
    result = call_tool(TOOL, NANO[CLS], checkpoint, file, *arguments, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith('Error: ')
    assert all(word in result.stderr for word in words), result.stderr
    assert result.stderr.count('\n') == 1


def test_the_checkpoint_is_no_exported_file(call_tool, tmp_path):
    result = race(call_tool, tmp_path, CLS, 'a.onnx', 'a.onnx', check=False)
    assert result.stderr == 'Error: a.onnx is an exported file: give its checkpoint.\n'
