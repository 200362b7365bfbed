# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Segmentors as files, against mmseg's own label maps."""

import pytest
import torch

pytest.importorskip('mmseg')

from mlla_mm.compat import pytorch
from mlla_mm.export import ExportError, Options, export_model, whole_model
from mlla_mm.export.formats import write

from .. import decisive
from .runners import in_both_formats, open_file, skip_unless_supported

TRACE = (64, 96)
SIZES = [(33, 33), (101, 53)]


def decode_head(type, **options):
    return {
        'type': type,
        'in_channels': decisive.CHANNELS,
        'in_index': [0, 1, 2, 3],
        'channels': 8,
        'num_classes': 4,
        'norm_cfg': dict(type='BN'),
        **options,
    }


def head(type, **options):
    """A change of the model: another head, on all four stages unless options say so."""
    return {'decode_head': dict(decode_head(type, **options), _delete_=True)}


LAST_STAGE = dict(in_channels=decisive.CHANNELS[-1], in_index=3)
PADDED = {'data_preprocessor.test_cfg': dict(size_divisor=32)}
BINARY = {
    'decode_head.num_classes': 2,
    'decode_head.out_channels': 1,
    'decode_head.threshold': 0.4,
    'decode_head.loss_decode': dict(
        _delete_=True, type='CrossEntropyLoss', use_sigmoid=True
    ),
}
TESTED = {
    'upernet': [],
    'psp': [head('PSPHead', **LAST_STAGE, pool_scales=(1, 2, 3, 6))],
    'fcn': [head('FCNHead', **LAST_STAGE, num_convs=2)],
    'segformer': [head('SegformerHead')],
    'aspp': [head('ASPPHead', **LAST_STAGE, dilations=(1, 2))],
    'binary': [BINARY],
    'binary, padded': [BINARY, PADDED],
    'two classes': [{'decode_head.num_classes': 2}],
    'aligned corners': [{'decode_head.align_corners': True}],
    'padded': [PADDED],
    'padded with a value': [
        PADDED,
        {'data_preprocessor.pad_val': 3, 'decode_head.align_corners': True},
    ],
}
USUAL = {
    'torchscript': ('psp', 'segformer', 'two classes'),
    'onnx': ('aligned corners', 'binary, padded', 'fcn'),
}


def whole(model, **options):
    return whole_model(
        model, 'segmentation', reverse_channels=True, metadata={}, **options
    )


def check(model, run, size, output_size=None, batch=1, with_logits=False):
    """A file gives mmseg's labels, but where its logits are almost the same."""
    images = [decisive.picture(model, seed, size) for seed in range(batch)]
    wanted = torch.tensor(output_size or (0, 0))
    labels, *logits = run(torch.stack(images).flip(1).float(), wanted)
    height, width = output_size or size
    assert labels.shape == (batch, height, width)
    assert labels.dtype == torch.int64
    assert len(logits) == with_logits
    for i, image in enumerate(images):
        expected = decisive.predict(model, image, output_size)
        scores = expected.seg_logits.data
        assert scores.shape[-2:] == (height, width)
        if len(scores) == 1:
            near = (scores[0] - model.decode_head.threshold).abs() < 1e-4
        else:
            first, second = scores.topk(2, dim=0).values
            near = first - second < 1e-3
        assert near.float().mean() < 0.02
        wrong = labels[i] != expected.pred_sem_seg.data[0]
        assert not (wrong & ~near).any()
        # It tells something: several classes have several pixels.
        assert labels[i].unique().numel() > 1
        if with_logits:
            own = logits[0][i]
            own = own.sigmoid() if len(own) == 1 else own
            torch.testing.assert_close(own, scores, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('format, name', in_both_formats(TESTED, USUAL))
def test_segmentors(format, name, tmp_path):
    skip_unless_supported(format)
    model = decisive.segmentor(*TESTED[name])
    write(whole(model), format, tmp_path / 'model', Options(TRACE))
    run = open_file(format, tmp_path / 'model')
    for size in SIZES:
        check(model, run, size)
    # The frame of the picture before it was resized.
    check(model, run, (52, 71), (97, 33))


@pytest.mark.parametrize('format', ['torchscript', 'onnx'])
@pytest.mark.parametrize('changes', [[], [BINARY, PADDED]], ids=['many', 'binary'])
def test_logits_and_batches(format, changes, tmp_path):
    skip_unless_supported(format)
    model = decisive.segmentor(*changes)
    differences = export_model(
        whole(model, logits=True), format, tmp_path / 'model', Options(TRACE)
    )
    assert set(differences) == {'labels', 'maps'}
    run = open_file(format, tmp_path / 'model')
    check(model, run, (64, 96), batch=3, with_logits=True)
    check(model, run, (50, 45), (33, 80), batch=2, with_logits=True)


@pytest.mark.slow
@pytest.mark.skipif(not pytorch.TELLS_EXPORT, reason='needs PyTorch 2.7')
def test_torch_export(tmp_path):
    """A program has no settings: its labels have the size of the images."""
    model = decisive.segmentor()
    path = tmp_path / 'model.pt2'
    export_model(whole(model), 'torch-export', path, Options(TRACE))
    program = torch.export.load(str(path)).module()
    for size in SIZES:
        check(model, lambda images, _: program(images), size, batch=2)


@pytest.mark.parametrize(
    'changes, message',
    [
        (
            [{'test_cfg': dict(mode='slide', crop_size=(64, 64), stride=(32, 32))}],
            "mode = 'slide' .*mode='whole'",
        ),
        (
            [{'data_preprocessor.test_cfg': dict(size=(512, 512))}],
            'test_cfg.size pads to one size.*Use size_divisor',
        ),
        ([head('DAHead', **LAST_STAGE, pam_channels=4)], 'DAHead is not exported'),
        (
            [
                {'type': 'CascadeEncoderDecoder', 'num_stages': 2},
                {
                    'decode_head': [
                        decode_head('FCNHead', **LAST_STAGE),
                        decode_head('PointHead', norm_cfg=None),
                    ]
                },
            ],
            'CascadeEncoderDecoder is not exported.*part .backbone',
        ),
        (
            [{'data_preprocessor': dict(_delete_=True, type='BaseDataPreprocessor')}],
            'BaseDataPreprocessor is not exported',
        ),
    ],
)
def test_refused(changes, message):
    model = decisive.segmentor(*changes, sharp=False)
    with pytest.raises(ExportError, match=message):
        whole(model)
