# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Exported files in the tools, beside the checkpoints that they were made of."""

import json
import pickle

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from pycocotools.mask import decode

from mlla_mm.apis import load_model
from mlla_mm.export import exported
from mlla_mm.export.compare import predict

from ..nano import CLASSES, NANO
from ..runs import without_workers

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
LAYOUTS = dict(mmdet='coco', mmseg='ade20k', mmpretrain='imagenet')
TASKS = dict(mmdet='detection', mmseg='segmentation', mmpretrain='classification')

PICTURES = dict(mmdet=2, mmseg=5, mmpretrain=5)


@pytest.fixture
def evaluate(call_tool, digits, tmp_path):
    """Call tools/test.py; returns the metrics and the predictions."""

    def run(scope, file, *arguments, **options):
        data = digits(LAYOUTS[scope])
        work_dir = tmp_path / 'work' / file.name
        out = work_dir / ('out' if scope == 'mmseg' else 'out.pkl')
        changes = without_workers(data, 'test')
        if scope == 'mmdet':
            annotations = data / 'annotations' / 'instances_val.json'
            changes.append(f'test_evaluator.ann_file={annotations}')
            changes.append(f'test_dataloader.dataset.indices={PICTURES[scope]}')
        result = call_tool(
            'tools/test.py', NANO[scope], file, '--work-dir', work_dir, '--out', out,
            *arguments, '--cfg-options', *changes, **options,
        )  # fmt: skip
        if result.returncode:
            return result.stderr
        (record,) = work_dir.glob('*/vis_data/run.json')
        assert json.loads(record.read_text())['checkpoint'] == file.name
        (log,) = work_dir.glob('*/*.json')
        return json.loads(log.read_text()), out

    return run


def check_masks(expected, actual):
    """They may differ where a probability is almost the threshold."""
    assert len(expected) == len(actual)
    for one, two in zip(expected, actual):
        one, two = decode(one), decode(two)
        assert (one != two).sum() <= max(1, 0.01 * (one | two).sum())


@pytest.fixture
def of_checkpoint(evaluate, whole, scope):
    """The metrics and predictions of a checkpoint."""
    return evaluate(scope, whole(scope)[0])


@pytest.mark.parametrize('scope', NANO)
def test_metrics(evaluate, whole, of_checkpoint, scope):
    """tools/test.py gives what it gives for the checkpoint."""
    (expected, out), (found, other) = of_checkpoint, evaluate(scope, whole(scope)[1])
    for record in (expected, found):
        for key in ('time', 'data_time'):
            del record[key]
    assert found == pytest.approx(expected, abs=1e-3)
    assert len(found) > 1
    if scope == 'mmseg':
        names = [path.name for path in sorted(out.iterdir())]
        assert len(names) == PICTURES[scope]
        for name in names:
            assert (out / name).read_bytes() == (other / name).read_bytes()
        return
    one, two = (pickle.loads(path.read_bytes()) for path in (out, other))
    assert len(one) == len(two) == PICTURES[scope]
    for sample, other in zip(one, two):
        if scope == 'mmpretrain':
            scores = other['pred_score'].numpy()
            np.testing.assert_allclose(scores, sample['pred_score'], atol=1e-5)
            assert other['pred_label'] == sample['pred_label'] == scores.argmax()
            continue
        sample, other = sample['pred_instances'], other['pred_instances']
        assert 2 < len(sample['scores']) == len(other['scores'])
        for key, tolerance in (('bboxes', 0.01), ('scores', 1e-4), ('labels', 0)):
            np.testing.assert_allclose(other[key], sample[key], atol=tolerance)
        check_masks(sample['masks'], other['masks'])
    if scope == 'mmdet':
        assert len(one[0]['pred_instances']['masks']) > 2


@pytest.mark.parametrize('scope', NANO)
def test_inference(call_tool, whole, digits, scope, tmp_path):
    """tools/infer.py, too. The names of the classes are those of the checkpoint."""
    folder = dict(mmdet='val', mmseg='images/validation', mmpretrain='val/0')[scope]
    found = []
    for file in whole(scope):
        call_tool(
            'tools/infer.py', digits(LAYOUTS[scope]) / folder, NANO[scope], file,
            '--out', tmp_path / file.name, '--score-thr', 0.2, '--device', 'cpu',
        )  # fmt: skip
        text = (tmp_path / file.name / 'results.json').read_text()
        found.append(json.loads(text.replace(file.name, '')))
        assert len(list((tmp_path / file.name / 'drawn').iterdir())) == len(found[-1])
    for one, two in zip(*found):
        key = 'instances' if scope == 'mmdet' else 'classes'
        for expected, actual in zip(one[key], two[key]):
            assert actual['name'] in CLASSES[scope]
            box, other = expected.pop('box', []), actual.pop('box', [])
            assert other == pytest.approx(box, abs=0.01)
            masks = [x.pop('mask') for x in (expected, actual) if 'mask' in x]
            check_masks(masks[:1], masks[1:])
            assert actual == pytest.approx(expected, abs=1e-4)
        assert len(one[key]) == len(two[key]) > 0


@pytest.mark.parametrize('scope', NANO)
def test_what_the_file_says_of_itself(whole, scope):
    session = onnxruntime.InferenceSession(str(whole(scope)[1]))
    said = session.get_modelmeta().custom_metadata_map
    assert said['task'] == TASKS[scope]
    assert said['channel_order'] == 'RGB' and said['normalization'] == 'inside'
    assert json.loads(said['mean']) == [123.675, 116.28, 103.53]
    assert json.loads(said['classes']) == list(CLASSES[scope])
    assert json.loads(said['palette'])[0] == [9, 200, 9]
    side = dict(mmdet=[128, 128], mmseg=[96, 96], mmpretrain=64)[scope]
    (resize,) = json.loads(said['preprocessing'])
    assert resize['type'] == 'Resize' and resize['scale'] == side
    assert said['config'] == NANO[scope].name
    divisor = 32 if scope == 'mmdet' else 1
    assert json.loads(said['pad_size_divisor']) == divisor
    images = session.get_inputs()[0]
    number = 1 if scope == 'mmdet' else 'batch'
    assert (images.name, images.shape) == ('images', [number, 3, 'height', 'width'])
    # The other inputs may be left out.
    assert len(session.get_inputs()) == 1
    settings = dict(mmdet=['score_threshold'], mmseg=['output_size'], mmpretrain=[])
    others = session.get_overridable_initializers()
    assert [x.name for x in others] == settings[scope]
    if scope == 'mmdet':
        assert json.loads(said['score_threshold']) == 0.05
        assert json.loads(said['mask_threshold']) == 0.5
        assert 'before padding' in said['box_frame']


@pytest.mark.parametrize('option', ['--ema', '--fuse-conv-bn', '--amp', '--tta'])
def test_options_that_change_a_model(evaluate, whole, option):
    name = option.strip('-').replace('-', '_')
    error = evaluate('mmseg', whole('mmseg')[1], option, check=False)
    assert f'{name} changes a model' in error and 'give the checkpoint' in error


def test_files_that_do_not_fit(evaluate, whole, tmp_path):
    other = whole('mmpretrain')[1]
    error = evaluate('mmseg', other, check=False)
    assert f'{other} is classification, and the config is segmentation' in error
    damaged = tmp_path / 'damaged.onnx'
    damaged.write_bytes(other.read_bytes()[:1000])
    error = evaluate('mmpretrain', damaged, check=False)
    assert error.startswith(f'Error: onnxruntime cannot read {damaged}: ')
    assert error.count('\n') == 1
    error = evaluate('mmpretrain', tmp_path / 'missing.onnx', check=False)
    assert error == f'Error: Checkpoint not found: {tmp_path}/missing.onnx\n'
    # What another program has exported says nothing of a task.
    foreign = onnx.load(str(other))
    del foreign.metadata_props[:]
    onnx.save(foreign, str(damaged))
    error = evaluate('mmpretrain', damaged, check=False)
    assert 'is no whole model of tools/export.py' in error


def test_another_number_of_classes(evaluate, whole, tmp_path):
    file = onnx.load(str(whole('mmseg')[1]))
    for entry in file.metadata_props:
        if entry.key == 'classes':
            entry.value = json.dumps(['a', 'b'])
    onnx.save(file, str(tmp_path / 'model.onnx'))
    error = evaluate('mmseg', tmp_path / 'model.onnx', check=False)
    assert 'has 2 classes, and model.decode_head.num_classes is 11' in error


def test_in_a_process_of_another_toolbox(whole):
    """What pastes masks is mmdet's, whatever the default scope is."""
    pytest.importorskip('mmseg')
    exported._mask_head.cache_clear()
    model = load_model(Config.fromfile(NANO['mmdet']), whole('mmdet')[1])
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    with DefaultScope.overwrite_default_scope('mmseg'):
        found = predict(model, 'detection', image).pred_instances
    assert found.masks.shape == (len(found), 64, 64) and len(found) > 0


def test_load_model(whole):
    cfg = Config.fromfile(NANO['mmseg'])
    file = whole('mmseg')[1]
    with pytest.raises(ValueError, match='fuse_conv_bn changes a model'):
        load_model(cfg, file, fuse_conv_bn=True)
    with pytest.raises(FileNotFoundError, match='missing.onnx'):
        load_model(cfg, file.with_name('missing.onnx'))
    model = load_model(cfg, file)
    assert model.dataset_meta['classes'] == list(CLASSES['mmseg'])
    with pytest.raises(ValueError, match="mode is 'loss'"):
        model([], [], mode='loss')
