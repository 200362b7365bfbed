# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mlla_mm import get_model
from mlla_mm.apis import load_model
from mlla_mm.checkpoints.reader import CheckpointError

from .. import checkpoints, reference
from ..nano import CONFIGS


@pytest.fixture(scope='module')
def official(tmp_path_factory):
    """The authors' ImageNet file of MLLA-T."""
    path = tmp_path_factory.mktemp('official') / 'MLLA_T.pth'
    torch.save(dict(model=checkpoints.official_classifier('t')), path)
    return path


@pytest.mark.parametrize(
    'name, parameters',
    [('t_8xb128', 24_392_200), ('s_8xb64', 43_015_048), ('b_8xb64', 95_983_960)],
)
@torch.no_grad()
def test_logits_equal_the_authors(name, parameters, tmp_path):
    """By name, and by config, from the authors' file."""
    pytest.importorskip('mmpretrain')
    arch, path = name[0], tmp_path / 'a.pth'
    torch.save(dict(model=checkpoints.official_classifier(arch)), path)
    cfg = Config.fromfile(CONFIGS / f'classification/mlla-{name}_in1k.py')
    configured = load_model(cfg, path, device='cpu')
    assert not configured.training and configured.dataset_meta == {}
    expected = reference.recorded(f'logits_mlla-{arch}_224x224')
    for model in (get_model(f'mlla-{arch}', pretrained=path).eval(), configured):
        assert sum(p.numel() for p in model.parameters()) == parameters
        logits = model(reference.image('224x224', 1))
        assert reference.relative_error(logits, expected) < 1e-5


def test_features_equal_the_authors(tmp_path):
    weights = reference.official_weights('mlla-t_downstream')
    torch.save(dict(model=weights), tmp_path / 'a.pth')
    model = get_model(
        'mlla-tiny', tmp_path / 'a.pth', features_only=True, out_indices=(1, 3)
    ).eval()
    with torch.no_grad():
        features = model(reference.image('96x132', 2))
    for i, feature in zip((1, 3), features):
        expected = reference.recorded(f'feat{i}_mlla-t_96x132')
        assert reference.relative_error(feature, expected) < 1e-5


def test_all_stages_are_the_default():
    model = get_model('mlla-t', features_only=True, drop_path_rate=0.3)
    assert model.out_indices == (0, 1, 2, 3)
    assert model.layers[-1].blocks[-1].drop_path.drop_prob == pytest.approx(0.3)


def test_our_checkpoints_plain_and_averaged(tmp_path):
    plain, averaged = get_model('mlla-t'), get_model('mlla-t')
    path = tmp_path / 'epoch_300.pth'
    torch.save(
        dict(state_dict=plain.state_dict(), state_dict_ema=averaged.state_dict()), path
    )
    for expected, ema in ((plain, False), (averaged, True)):
        actual = get_model('mlla-t', path, ema=ema).state_dict()
        for key, value in expected.state_dict().items():
            assert torch.equal(actual[key], value)


def test_our_classifiers_parameters_are_the_same():
    pytest.importorskip('mmpretrain')
    cfg = Config.fromfile(CONFIGS / 'classification/mlla-t_8xb128_in1k.py')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        theirs = MODELS.build(cfg.model)
    ours = get_model('mlla-t')
    shapes = {k: v.shape for k, v in theirs.state_dict().items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == shapes
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.eval()(images, mode='tensor')
        torch.testing.assert_close(ours.eval()(images), expected)


def test_another_number_of_classes(official, monkeypatch):
    log = []
    monkeypatch.setattr('mlla_mm.apis.model.print_log', lambda x, **_: log.append(x))
    model = get_model('mlla-t', official, num_classes=7)
    weights = reference.official_weights('mlla-t')
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 7)
    assert torch.equal(model.backbone.norm3.weight, weights['norm.weight'])
    assert model.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert log == [
        f'The linear layer starts fresh: {official} has 1000 classes, not 7.'
    ]
    assert get_model('mlla-t', num_classes=7).head.fc.out_features == 7


def test_wrong_arguments(official, tmp_path):
    with pytest.raises(ValueError, match="Unknown model 'mila-s'. Nearest: mlla-s, "):
        get_model('mila-s')
    with pytest.raises(ValueError, match='leave features_only'):
        get_model('mlla-t', num_classes=5, features_only=True)
    with pytest.raises(ValueError, match='add features_only=True'):
        get_model('mlla-t', out_indices=(1, 2))
    with pytest.raises(FileNotFoundError, match='wget -O'):
        get_model('mlla-t', tmp_path / 'MLLA_T.pth')
    with pytest.raises(CheckpointError, match='holds MLLA-T'):
        get_model('mlla-s', official)
    with pytest.raises(CheckpointError, match='no averaged weights'):
        get_model('mlla-t', official, ema=True)


@pytest.mark.parametrize('part', ['weight', 'bias'])
@pytest.mark.parametrize('shape', [(), (3,), (10**8,), (10**6, 0), (3, 4, 5)])
def test_linear_layers_that_are_none(tmp_path, part, shape):
    """They are refused, and no memory is reserved for 10**8 classes."""
    weights = checkpoints.official_classifier('t')
    weights[f'head.{part}'] = torch.empty(shape, dtype=torch.uint8)
    torch.save(dict(model=weights), tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=f'head.fc.{part}: '):
        get_model('mlla-t', tmp_path / 'a.pth')


@pytest.mark.parametrize(
    'meta, expected',
    [
        (dict(dataset_meta=dict(classes=['a', 'b'])), dict(classes=('a', 'b'))),
        (
            dict(CLASSES=('a',), PALETTE=[(0, 1, 255)]),
            dict(classes=('a',), palette=[(0, 1, 255)]),
        ),
        (
            dict(classes=['\x1b[2J', 1, ['deep']]),
            dict(classes=('\\x1b[2J', '1', '<list>')),
        ),
        (dict(classes='a', palette='random'), {}),
        (dict(classes=None, palette=[(0, 1, 256)]), {}),
        (dict(classes={'a': 1}, palette=[(0, 1)]), {}),
        (dict(palette=[0.5]), {}),
        (dict(dataset_meta=[1]), {}),
        (dict(dataset_meta=torch.ones(2)), {}),
        ({1: 2}, {}),
        ([1], {}),
    ],
)
def test_names_and_colours_of_a_checkpoint(tmp_path, meta, expected):
    pytest.importorskip('mmpretrain')
    cfg = Config.fromfile(CONFIGS / 'classification/mlla-nano_digits.py')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        weights = MODELS.build(cfg.model).state_dict()
    torch.save(dict(state_dict=weights, meta=meta), tmp_path / 'a.pth')
    model = load_model(cfg, tmp_path / 'a.pth', device='cpu')
    assert model.dataset_meta == expected


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg', 'mmpretrain'])
@torch.no_grad()
def test_batch_norm_in_the_convolutions(scope, nano):
    """No BatchNorm is left, and the features are the same."""
    cfg, checkpoint = nano(scope)
    model = load_model(cfg, checkpoint, device='cpu')
    fused = load_model(cfg, checkpoint, device='cpu', fuse_conv_bn=True)
    norms = [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not norms and not fused.training
    images = torch.randn(2, 3, 70, 64)
    for actual, expected in zip(fused.backbone(images), model.backbone(images)):
        assert reference.relative_error(actual, expected) < 1e-5
    if scope == 'mmseg':  # its heads have BatchNorm, too
        heads = (m.decode_head(m.backbone(images)) for m in (fused, model))
        assert reference.relative_error(*heads) < 1e-5


def test_cuda_graphs_of_the_backbone(nano, monkeypatch):
    # As where there is a GPU.
    monkeypatch.setattr('mlla_mm.apis.model._require_device', lambda device: None)
    monkeypatch.setattr(nn.Module, 'to', lambda model, device: model)
    for wanted in (False, True):
        model = load_model(*nano('mmpretrain'), device='cuda', cuda_graph=wanted)
        own = [name for name, part in model.named_modules() if 'forward' in vars(part)]
        assert own == ['backbone'] * wanted


def test_needs_none_of_the_optional_packages():
    optional = 'mmdet', 'mmseg', 'mmpretrain', 'onnx', 'sklearn', 'matplotlib'
    code = (
        'import sys\n'
        f'sys.modules.update(dict.fromkeys({optional}))\n'
        'import torch, mlla_mm, mlla_mm.apis.export\n'
        'model = mlla_mm.get_model("mlla-t", num_classes=3).eval()\n'
        'assert model(torch.rand(1, 3, 33, 40)).shape == (1, 3)\n'
        'assert "onnxruntime" not in sys.modules\n'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
