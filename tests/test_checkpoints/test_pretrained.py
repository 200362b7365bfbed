# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import logging

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModule
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mlla_mm.checkpoints import load_pretrained
from mlla_mm.checkpoints.fit import check_fit
from mlla_mm.checkpoints.layout import describe, find_weights, to_own_layout
from mlla_mm.checkpoints.reader import CheckpointError
from mlla_mm.models import MLLA

from .. import checkpoints, reference

NANO = dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))


@pytest.fixture(scope='module')
def official():
    """What the authors' ImageNet file of MLLA-T holds."""
    return checkpoints.official_classifier('t')


@pytest.fixture
def log(caplog):
    """The messages to MMEngine's logger."""
    logger = MMLogger.get_instance('weights', log_level='INFO')
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO)
    yield caplog
    logger.removeHandler(caplog.handler)


def start(path, arch='tiny', **init_cfg) -> MLLA:
    """A backbone from the file, its output norms set apart from their default."""
    model = MLLA(arch, init_cfg=dict(type='Pretrained', checkpoint=path, **init_cfg))
    for i in range(4):
        nn.init.constant_(getattr(model, f'norm{i}').weight, 7)
    model.init_weights()
    return model.eval()


def in_own_classifier(weights):
    own = {}
    for key, value in weights.items():
        first, rest = key.split('.', 1)
        first = {'norm': 'backbone.norm3', 'head': 'head.fc'}.get(
            first, f'backbone.{first}'
        )
        if 'rope' not in key:
            own[f'{first}.{rest}'] = value
    return own


LAYOUTS = {
    'official': lambda w: {'model': w},
    'state_dict': lambda w: {'state_dict': w},
    'bare': lambda w: w,
    'backbone.': lambda w: {'state_dict': checkpoints.prefixed(w, 'backbone.')},
    'module.': lambda w: {'model': checkpoints.prefixed(w, 'module.')},
    'both': lambda w: {'model': checkpoints.prefixed(w, 'module.backbone.')},
    'ours': lambda w: {'state_dict': in_own_classifier(w), 'meta': {'epoch': 3}},
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_classifier_starts_a_backbone(tmp_path, official, layout, log):
    path = str(tmp_path / 'MLLA_T.pth')
    torch.save(LAYOUTS[layout](official), path)
    model = start(path)
    state = model.state_dict()
    for name, value in official.items():
        if not name.startswith(('norm.', 'head.')) and 'rope' not in name:
            assert torch.equal(state[name], value), name
    # The classifier's norm is not an output norm of ours.
    for i in range(4):
        assert torch.equal(state[f'norm{i}.weight'], torch.full((64 * 2**i,), 7.0))
    (message,) = (r.getMessage() for r in log.records if 'Loaded' in r.getMessage())
    assert f'of MLLA-T (embed_dims 64, depths 2-4-8-4) from {path}' in message
    assert 'left out: head, norm3' in message
    assert ('rope.rotations' in message) == (layout != 'ours')
    assert 'fresh: norm0, norm1, norm2, norm3' in message


@pytest.mark.parametrize(
    'layout, arch, size, batch',
    [
        ('state_dict', 't', '75x101', 2),
        ('bare', 't', '96x132', 2),
        ('backbone.', 's', '64x96', 1),
        ('detector', 'b', '64x96', 1),
    ],
)
def test_downstream_checkpoints_start_a_backbone(tmp_path, layout, arch, size, batch):
    weights = reference.official_weights(f'mlla-{arch}_downstream')
    if layout == 'detector':
        content = checkpoints.prefixed(weights, 'backbone.')
        content['backbone.layers.0.blocks.0.attn.rope.rotations'] = torch.zeros(1)
        content['roi_head.bbox_head.fc_cls.weight'] = torch.zeros(81, 1024)
        content = {'state_dict': content, 'meta': {'CLASSES': ('a',)}}
    else:
        content = LAYOUTS[layout](weights)
    torch.save(content, tmp_path / 'x.pth')
    with torch.no_grad():
        features = start(str(tmp_path / 'x.pth'), arch)(reference.image(size, batch))
    for i, feature in enumerate(features):
        expected = reference.recorded(f'feat{i}_mlla-{arch}_{size}')
        assert reference.relative_error(feature, expected) < 1e-5


def tiny_files(tmp_path):
    """Plain weights of zeros and averaged ones of ones, in either layout."""
    state = MLLA(NANO).state_dict()
    plain = {key: torch.zeros_like(value) for key, value in state.items()}
    average = {key: torch.ones_like(value) for key, value in state.items()}
    ours, theirs = tmp_path / 'ours.pth', tmp_path / 'theirs.pth'
    prefixed = [checkpoints.prefixed(w, 'backbone.') for w in (plain, average)]
    torch.save(dict(state_dict=prefixed[0], state_dict_ema=prefixed[1]), ours)
    checkpoints.save_official_training(plain, theirs, state_dict_ema=average)
    return str(ours), str(theirs)


def mean(model):
    return model.layers[0].blocks[0].attn.qk.weight.mean().item()


def test_plain_or_averaged_weights(tmp_path):
    ours, theirs = tiny_files(tmp_path)
    with pytest.raises(CheckpointError, match='Choose with ema=False or ema=True'):
        start(ours, NANO)
    for path in (ours, theirs):
        assert mean(start(path, NANO, ema=False)) == 0
        assert mean(start(path, NANO, ema=True)) == 1
    assert mean(start(theirs, NANO)) == 0
    torch.save(MLLA(NANO).state_dict(), ours)
    with pytest.raises(CheckpointError, match='no averaged weights'):
        start(ours, NANO, ema=True)


def test_prefix_of_init_cfg(tmp_path):
    path = str(tmp_path / 'x.pth')
    state = {k: torch.ones_like(v) for k, v in MLLA(NANO).state_dict().items()}
    both = checkpoints.prefixed(state, 'teacher.')
    both.update(checkpoints.prefixed({k: v * 0 for k, v in state.items()}, 'backbone.'))
    torch.save(both, path)
    for prefix in ('teacher.', 'teacher'):  # as MMEngine takes both
        assert mean(start(path, NANO, prefix=prefix)) == 1
    assert mean(start(path, NANO, prefix='backbone.')) == 0


def test_address_in_init_cfg(tmp_path, monkeypatch):
    path = tmp_path / 'x.pth'
    torch.save({k: v * 0 for k, v in MLLA(NANO).state_dict().items()}, path)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'cache'))
    monkeypatch.setattr(
        torch.hub,
        'download_url_to_file',
        lambda url, to, digest: path.replace(to),
    )
    assert mean(start('https://example.org/f/a1b2/?dl=1', NANO)) == 0
    # From the cache: there is nothing to download any more.
    assert mean(start('https://example.org/f/a1b2/?dl=1', NANO)) == 0


def test_a_list_of_init_cfgs(tmp_path):
    """The pretrained weights come last, wherever they stand."""
    path = str(tmp_path / 'x.pth')
    state = MLLA(NANO).state_dict()
    torch.save({k: v * 0 for k, v in state.items() if 'norm3' not in k}, path)
    pretrained = dict(type='Pretrained', checkpoint=path)
    constant = dict(type='Constant', layer=['Linear', 'LayerNorm'], val=5)
    model = MLLA(NANO, init_cfg=[pretrained, constant])
    model.init_weights()
    assert mean(model) == 0
    assert (model.norm3.weight == 5).all()


class Other(BaseModule):
    def __init__(self, init_cfg):
        super().__init__(init_cfg)
        self.conv = nn.Conv2d(1, 1, 1)
        self.fresh = nn.Conv2d(1, 1, 1)
        nn.init.constant_(self.fresh.weight, 3)


@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmseg', 'mmpretrain'])
def test_each_module_of_a_model_starts_in_its_own_way(tmp_path, scope, log):
    """MLLA's from a classifier by our reader, another's from a part by MMEngine's."""
    if scope != 'mmengine':
        pytest.importorskip(scope)
    paths = [str(tmp_path / name) for name in ('mlla.pth', 'other.pth')]
    torch.save({k: v * 0 for k, v in MLLA(NANO).state_dict().items()}, paths[0])
    torch.save({'neck.conv.weight': torch.zeros(1, 1, 1, 1)}, paths[1])
    mlla, other = (dict(type='Pretrained', checkpoint=path) for path in paths)
    model = BaseModule()
    model.backbone = MLLA(NANO, init_cfg=mlla)
    model.neck = Other(dict(other, prefix='neck.'))
    with DefaultScope.overwrite_default_scope(scope):
        model.init_weights()
    assert mean(model.backbone) == 0
    assert model.neck.conv.weight == 0 and model.neck.fresh.weight == 3
    messages = [record.getMessage() for record in log.records]
    assert sum(message.startswith('Loaded') for message in messages) == 1
    assert any(f'load neck. in model from: {paths[1]}' in text for text in messages)
    (told,) = (m for m in messages if m.startswith('\nbackbone.patch_embed.conv1.conv'))
    assert f'Pretrained: load from {paths[0]}' in told


def test_averaged_weights_of_another_module(tmp_path):
    module = Other(dict(type='Pretrained', checkpoint='x.pth', ema=True))
    with pytest.raises(ValueError, match='ema=True is for .* and Other is none'):
        module.init_weights()


def drop(weights):
    weights.pop('layers.0.blocks.0.cpe1.weight')


def add(weights):
    weights['extra'] = torch.zeros(1)


def reshape(weights):
    weights['layers.1.blocks.0.norm1.bias'] = torch.zeros(3)


@pytest.mark.parametrize(
    'change, message',
    [
        (drop, r'cpe1.weight: missing in the file, \(64, 1, 3, 3\) in the model'),
        (add, r'extra: \(1,\) in the file, not part of the model'),
        (reshape, r'norm1.bias: \(3,\) in the file, \(128,\) in the model'),
    ],
)
def test_weights_that_do_not_fit(tmp_path, official, change, message):
    weights = dict(official)
    change(weights)
    torch.save({'model': weights}, tmp_path / 'x.pth')
    model = MLLA('tiny')
    before = model.layers[3].blocks[3].mlp.fc2.weight.clone()
    with pytest.raises(CheckpointError, match=r'x.pth do not fit .*\n.*' + message):
        load_pretrained(model, tmp_path / 'x.pth')
    assert torch.equal(model.layers[3].blocks[3].mlp.fc2.weight, before)


def outline(name):
    """Names and shapes of an official backbone, without numbers."""
    shapes = reference.official_shapes(f'mlla-{name}_downstream')
    return {key: torch.empty(shape, device='meta') for key, shape in shapes.items()}


@pytest.mark.parametrize(
    'name, own, words',
    [
        (
            's',
            outline('t'),
            ['The file holds MLLA-S (', 'configs/*/*mlla-s*.py', "'s'"],
        ),
        (
            'b',
            outline('s'),
            ['The file holds MLLA-B (', 'embed_dims 96, depths 3-6-21-6'],
        ),
        (
            't',
            MLLA(NANO).state_dict(),
            ['MLLA-T (', 'the model is an MLLA (embed_dims 8, depths 1-1-1-1)'],
        ),
    ],
)
def test_weights_of_another_size(name, own, words):
    with pytest.raises(CheckpointError) as error:
        check_fit(own, outline(name), 'x.pth')
    message = str(error.value)
    assert all(word in message for word in words)
    # Two shapes first, not all of them.
    lines = message.splitlines()
    assert len(lines) == 7
    assert all(' in the file, ' in line for line in lines[1:6])


def test_weights_of_a_size_that_was_not_published():
    with pytest.raises(CheckpointError, match="Set the backbone's arch to the numbers"):
        check_fit(outline('t'), MLLA(NANO).state_dict(), 'x.pth')


STUDY = dict(type='LinearAttentionSwin', arch=NANO, token_mixer=dict(forget_gate=True))


def test_the_study_backbone_starts_from_its_classifier(tmp_path, log):
    trained = MODELS.build(dict(STUDY, out_indices=3)).state_dict()
    weights = checkpoints.prefixed(trained, 'backbone.')
    weights['head.fc.weight'] = torch.ones(2, 64)
    path = tmp_path / 'x.pth'
    averaged = {key: value + 1 for key, value in weights.items()}
    torch.save(dict(state_dict=weights, state_dict_ema=averaged), path)
    start = dict(type='Pretrained', checkpoint=str(path), ema=True)
    model = MODELS.build(dict(STUDY, init_cfg=start))
    model.init_weights()
    for key, value in model.state_dict().items():
        if key.startswith('norm'):
            assert torch.equal(value, torch.full_like(value, key.endswith('weight')))
        else:
            assert torch.equal(value, trained[key] + 1), key
    text = 'tensors of a LinearAttentionSwin (embed_dims 8, depths 1-1-1-1) from'
    assert any(text in record.getMessage() for record in log.records)


@pytest.mark.parametrize(
    'file, model, words',
    [
        (
            STUDY,
            dict(type='MLLA', arch=NANO),
            ['holds a LinearAttentionSwin (', 'is an MLLA (', 'type LinearAttentionSw'],
        ),
        (
            dict(type='MLLA'),
            STUDY,
            ['holds MLLA-T (', 'is a LinearAttentionSwin (', 'of the type MLLA'],
        ),
        # No MLLA-S, which has the same numbers.
        (
            dict(STUDY, arch=dict(NANO, embed_dims=64, depths=(3, 6, 21, 6))),
            STUDY,
            ['holds a LinearAttentionSwin (embed_dims 64, depths 3-6-21-6)', 'arch to'],
        ),
        (
            STUDY,
            dict(STUDY, token_mixer=None),
            ['attn.A_log: (8, 8) in the file, not part of', "backbone's token_mixer"],
        ),
        (
            STUDY,
            dict(STUDY, token_mixer=dict(forget_gate=True, shortcut=True)),
            [
                'attn.D: missing in the file, (8,) in the model',
                "backbone's token_mixer",
            ],
        ),
        (STUDY, dict(STUDY, cpe=1), ['cpe1.weight: missing', "backbone's arguments"]),
        (
            dict(STUDY, ape=64),
            dict(STUDY, ape=224),
            ['ape: (16, 16, 8) in the file, (56, 56, 8) in', "backbone's arguments"],
        ),
        (STUDY, dict(STUDY, block_design='sub'), ["Check the backbone's arguments"]),
    ],
)
def test_weights_of_another_design(file, model, words):
    with torch.device('meta'):
        weights, own = (MODELS.build(x).state_dict() for x in (file, model))
    with pytest.raises(CheckpointError) as error:
        check_fit(own, weights, 'x.pth')
    for word in words:
        assert word in str(error.value)


def test_files_that_are_no_checkpoints(tmp_path):
    model = MLLA(NANO)
    with pytest.raises(FileNotFoundError, match='7a19712877cb4242889c'):
        load_pretrained(model, tmp_path / 'MLLA_T.pth')
    (tmp_path / 'page.pth').write_text('<html>')
    with pytest.raises(CheckpointError, match='web page'):
        load_pretrained(model, tmp_path / 'page.pth')
    for content in ({'epoch': 3}, {}, [torch.ones(1)], {'model': {'a': 1}}):
        torch.save(content, tmp_path / 'empty.pth')
        with pytest.raises(CheckpointError, match='holds no weights'):
            load_pretrained(model, tmp_path / 'empty.pth')
    torch.save({'conv.weight': torch.ones(1)}, tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match='The file holds no MLLA'):
        load_pretrained(model, tmp_path / 'other.pth')


def test_no_weights():
    with pytest.raises(CheckpointError) as caught:
        find_weights([1], 'x.pth')
    words = ['x.pth', 'no weights', "'model'", "'state_dict'"]
    assert all(word in str(caught.value) for word in words)


def averaged_by_mmengine(plain, average):
    """A checkpoint of MMEngine's EMAHook."""
    swapped = checkpoints.prefixed(plain, 'module.')
    return dict(state_dict=average, ema_state_dict=dict(swapped, steps=torch.tensor(2)))


def test_averages_of_mmengine(tmp_path):
    plain = {key: value * 0 for key, value in MLLA(NANO).state_dict().items()}
    average = {key: value + 1 for key, value in plain.items()}
    content = averaged_by_mmengine(plain, average)
    for ema, expected in ((None, average), (True, average), (False, plain)):
        found = find_weights(content, 'x.pth', ema)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    path = tmp_path / 'x.pth'
    torch.save(content, path)
    for ema, expected in ((None, 1), (True, 1), (False, 0)):
        assert mean(start(path, NANO, ema=ema)) == expected


@pytest.mark.parametrize('swapped', [5, dict(steps='x'), {'module.a': 'x'}])
def test_damaged_averages_of_mmengine(swapped):
    content = dict(state_dict=MLLA(NANO).state_dict(), ema_state_dict=swapped)
    with pytest.raises(CheckpointError, match="'ema_state_dict' is not as MMEngine's"):
        to_own_layout(content, 'x.pth')


@pytest.mark.parametrize('swapped', [{1: torch.ones(1)}, {'module.a': 1}, {}])
def test_plain_weights_that_are_none(swapped):
    content = dict(state_dict=dict(a=torch.ones(1)), ema_state_dict=swapped)
    with pytest.raises(CheckpointError, match='x.pth holds no weights'):
        find_weights(content, 'x.pth', ema=False)


def test_description():
    for name in 'tsb':
        network = describe(outline(name))
        assert (network.size, network.task, network.prefix) == (name, 'backbone', '')
    assert describe({'layers.0.blocks.0.attn.proj.weight': torch.ones(3, 3)}) is None


def test_other_checkpoints_are_left_alone():
    for content in (
        {'state_dict': {'a': torch.ones(1)}, 'meta': {}},
        {'model': {'a': torch.ones(1)}},
        {'a': torch.ones(1)},
        [1, 2],
        {'epoch': 3},
    ):
        assert to_own_layout(content, 'x.pth') is content


@pytest.mark.parametrize('averaged', [{1: torch.ones(1)}, {'a': 1}])
def test_averages_that_are_none(averaged):
    content = {'state_dict': MLLA(NANO).state_dict(), 'state_dict_ema': averaged}
    with pytest.raises(CheckpointError, match='x.pth holds no weights'):
        to_own_layout(content, 'x.pth')
    content['state_dict_ema'] = 1
    assert list(to_own_layout(content, 'x.pth')) == ['state_dict']


def test_layout_of_a_detector_stays():
    model = nn.ModuleDict(dict(backbone=MLLA(NANO), rpn_head=nn.Conv2d(1, 1, 1)))
    content = {'state_dict': model.state_dict(), 'meta': {'epoch': 1}, 'optimizer': {}}
    result = to_own_layout(content, 'x.pth')
    assert list(result) == ['state_dict', 'meta', 'optimizer']
    assert list(result['state_dict']) == list(content['state_dict'])
    assert result['state_dict']._metadata == content['state_dict']._metadata
