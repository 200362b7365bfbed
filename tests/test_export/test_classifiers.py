# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Classifiers as files, against mmpretrain's own scores."""

import pytest
import torch

pytest.importorskip('mmpretrain')

from mmpretrain.structures import DataSample

from mlla_mm.compat import pytorch
from mlla_mm.export import (
    ExportedModel,
    ExportError,
    Options,
    export_model,
    whole_model,
)
from mlla_mm.export.formats import texts, write

from .. import decisive
from .runners import in_both_formats, open_file, skip_unless_supported

TRACE = (64, 96)
SIZES = [(33, 33), (101, 53)]


def head(type, **options):
    """A change of the model: another head for ten classes."""
    return {
        'head': dict(
            _delete_=True,
            type=type,
            **{'num_classes': 10, 'in_channels': decisive.CHANNELS[-1], **options},
        )
    }


def channels(number):
    """Changes for images of so many channels, each with its own statistics."""
    return {
        'backbone.in_channels': number,
        'data_preprocessor.mean': [100.0 + 9 * i for i in range(number)],
        'data_preprocessor.std': [50.0 + 7 * i for i in range(number)],
    }


MULTI_LABEL = head(
    'MultiLabelLinearClsHead', loss=dict(type='CrossEntropyLoss', use_sigmoid=True)
)
TESTED = {
    'linear': [],
    'bgr': [{'data_preprocessor.to_rgb': False}],
    'one channel': [channels(1)],
    'four channels': [channels(4)],
    'padded': [
        {'data_preprocessor.pad_size_divisor': 32, 'data_preprocessor.pad_value': 2}
    ],
    'not normalised': [{'data_preprocessor.mean': None, 'data_preprocessor.std': None}],
    'multi-label': [MULTI_LABEL],
    'backbone of mmpretrain': [
        {'backbone': dict(_delete_=True, type='ResNet', depth=18)},
        head('LinearClsHead', in_channels=512),
    ],
    'arcface': [head('ArcFaceClsHead')],
    'stacked': [head('StackedLinearClsHead', mid_channels=[12])],
}
USUAL = {
    'torchscript': ('bgr', 'not normalised', 'arcface', 'backbone of mmpretrain'),
    'onnx': ('four channels', 'multi-label', 'padded'),
}


def whole(model, **options):
    reverse = bool(model.data_preprocessor.to_rgb)
    return whole_model(
        model, 'classification', reverse_channels=reverse, metadata={}, **options
    )


def check(model, run, size, batch=1):
    """A file gives mmpretrain's scores, of channels as the network takes them."""
    images = [decisive.picture(model, seed, size) for seed in range(batch)]
    inputs = torch.stack(images).float()
    if model.data_preprocessor.to_rgb and inputs.shape[1] == 3:
        inputs = inputs.flip(1)
    (scores,) = run(inputs)
    expected = torch.stack(
        [decisive.predict(model, image).pred_score for image in images]
    )
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
    # It tells something: classes differ.
    assert (expected.amax(1) - expected.amin(1) > 0.05).all()


@pytest.mark.parametrize('format, name', in_both_formats(TESTED, USUAL))
def test_classifiers(format, name, tmp_path):
    skip_unless_supported(format)
    model = decisive.classifier(*TESTED[name])
    write(whole(model), format, tmp_path / 'model', Options(TRACE))
    run = open_file(format, tmp_path / 'model')
    for size in SIZES:
        check(model, run, size)
    check(model, run, (40, 70), batch=3)


@pytest.mark.parametrize('changes', [[], [channels(4)], [MULTI_LABEL]])
def test_compared(changes, tmp_path):
    model = decisive.classifier(*changes)
    path = tmp_path / 'model.pt'
    differences = export_model(whole(model), 'torchscript', path, Options(TRACE))
    assert set(differences) == {'scores'}
    check(model, torch.jit.load(str(path)), (50, 60), batch=2)


@pytest.mark.slow
@pytest.mark.skipif(not pytorch.TELLS_EXPORT, reason='needs PyTorch 2.7')
def test_torch_export(tmp_path):
    model = decisive.classifier()
    path = tmp_path / 'model.pt2'
    export_model(whole(model), 'torch-export', path, Options(TRACE))
    run = torch.export.load(str(path)).module()
    for size in SIZES:
        check(model, run, size, batch=2)


@pytest.mark.parametrize(
    'options, found',
    [
        (dict(thr=0.3), dict(label_threshold=0.3)),
        (dict(topk=2), dict(labels_per_image=2)),
        ({}, dict(label_threshold=0.5)),
    ],
)
def test_labels_of_an_image(options, found):
    """The file says which scores are labels."""
    model = decisive.classifier(head('MultiLabelLinearClsHead', **options))
    part = whole(model)
    names = ('label_threshold', 'labels_per_image')
    assert {k: part.metadata[k] for k in names if k in part.metadata} == found
    # What stands for the model in tools/test.py reads that.
    exported = ExportedModel(part.module, ['scores'], texts(part.metadata), True)
    image = decisive.picture(model, 0, (50, 60))
    expected = decisive.predict(model, image)
    with torch.no_grad():
        (sample,) = exported([image], [DataSample()])
    assert sample.pred_label.tolist() == expected.pred_label.tolist()
    assert len(sample.pred_label) not in (1, 10)


@pytest.mark.parametrize(
    'changes, named',
    [
        ([head('ConformerHead', in_channels=[64, 64])], 'ConformerHead'),
        (
            [
                {
                    'head': dict(
                        _delete_=True,
                        type='MultiTaskHead',
                        in_channels=decisive.CHANNELS[-1],
                        task_heads=dict(
                            one=dict(type='LinearClsHead', num_classes=2),
                        ),
                    )
                }
            ],
            'MultiTaskHead',
        ),
        ([{'head': None}], 'NoneType'),
    ],
)
def test_unknown_head(changes, named):
    """A head that predicts in another way is refused, and not written wrongly."""
    model = decisive.classifier(*changes, sharp=False)
    with pytest.raises(ExportError, match=f'{named} is not exported.*part .backbone'):
        whole(model)
