# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Checkpoints on every path into a model: what works, what is refused, what runs."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.infer import BaseInferencer
from mmengine.model import BaseModel, BaseModule
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import CheckpointLoader, Runner, load_checkpoint
from torch import nn
from torch.utils.data import DataLoader

from mlla_mm.checkpoints.publish import publish
from mlla_mm.checkpoints.reader import CheckpointError, trust_checkpoints
from mlla_mm.engine.options import add_hook
from mlla_mm.models import MLLA

from .. import checkpoints, reference

CONFIGS = Path(__file__).parents[2] / 'configs'
ARCH = dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))


class Small(BaseModel):
    """A model with the backbone, as a runner wants it."""

    def __init__(self, backbone=True):
        super().__init__()
        if backbone:
            self.backbone = MLLA(ARCH)
        self.head = nn.Linear(2, 1)

    def forward(self, inputs, mode='loss'):
        return dict(loss=self.head(inputs).sum())


def make_runner(tmp_path, model=None, **more) -> Runner:
    """A runner with the hook that the tools add."""
    return Runner(
        model=model or Small(),
        work_dir=str(tmp_path / 'work'),
        experiment_name=f'{tmp_path.name}-{torch.rand(1).item()}',
        custom_hooks=[dict(type='CheckWeightsHook'), *more.pop('custom_hooks', [])],
        **more,
    )


def load_from(tmp_path, path, model=None, **more):
    """What testing and training do with ``load_from``."""
    runner = make_runner(tmp_path, model, load_from=str(path), **more)
    runner.load_or_resume()
    return runner.model


def resume(tmp_path, path, epochs=2):
    runner = make_runner(
        tmp_path,
        load_from=str(path) if path else None,
        resume=path is not None,
        train_dataloader=DataLoader([dict(inputs=torch.ones(2))] * 4, batch_size=2),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1)),
        param_scheduler=dict(type='LinearLR', start_factor=0.1),
    )
    runner.train()
    return runner


def init_other_module(path):
    module = BaseModule(init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    module.init_weights()


def init_backbone(path):
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    MLLA(ARCH, init_cfg=init_cfg).init_weights()


class Inferencer(BaseInferencer):
    """MMEngine's own, with as little as it takes."""

    def _init_pipeline(self, cfg):
        return nn.Identity()

    visualize = postprocess = None


def infer(path, config=True):
    cfg = dict(model=dict(type='MLLA', arch=ARCH), default_scope='mmengine')
    Inferencer(Config(cfg) if config else None, str(path), device='cpu')


@pytest.fixture
def web(tmp_path, monkeypatch):
    """The address of a server of ``tmp_path``, PyTorch's cache elsewhere."""

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    server = ThreadingHTTPServer(
        ('127.0.0.1', 0), partial(Silent, directory=str(tmp_path))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


PATHS = {
    'load_from': load_from,
    'resume': resume,
    'init_cfg of the backbone': lambda tmp_path, path: init_backbone(path),
    'init_cfg of others': lambda tmp_path, path: init_other_module(path),
    'inference': lambda tmp_path, path: infer(path),
    'load_checkpoint': lambda tmp_path, path: load_checkpoint(Small(), str(path)),
    'converter': lambda tmp_path, path: publish(path, tmp_path / 'new.pth'),
}


@pytest.fixture
def trusting():
    trust_checkpoints(True)
    yield
    trust_checkpoints(False)


@pytest.fixture
def bad(tmp_path):
    """A file that makes ``tmp_path / 'ran'`` when it is loaded."""
    content = checkpoints.attacks(tmp_path / 'ran')['deep in weights']
    checkpoints.save_pickle(content, tmp_path / 'bad.pth', legacy=False)
    return tmp_path / 'bad.pth'


@pytest.mark.parametrize('name', PATHS)
def test_no_code_runs(tmp_path, bad, name):
    with pytest.raises(CheckpointError, match='bad.pth is not loaded'):
        PATHS[name](tmp_path, bad)
    assert not (tmp_path / 'ran').exists()


BLOCK = 'layers.{}.blocks.0.out_proj.weight'
NO_WEIGHTS = {
    'numbers for names': {1: torch.ones(1), BLOCK.format(0): torch.ones(4, 4)},
    'a stage of many': {BLOCK.format(10**9): torch.ones(4, 4)},
    'a stage of other digits': {BLOCK.format('\u0663'): torch.ones(4, 4)},
    'no axes': {BLOCK.format(0): torch.tensor(1.0)},
    'no tensors': {BLOCK.format(0): [1.0]},
    'control characters': {BLOCK.format(0): torch.ones(4, 4), '\x1b[2J': torch.ones(1)},
}


@pytest.mark.parametrize('name', PATHS)
@pytest.mark.parametrize('content', NO_WEIGHTS)
def test_weights_that_are_none(tmp_path, name, content):
    path = tmp_path / 'x.pth'
    torch.save({'state_dict': NO_WEIGHTS[content]}, path)
    any_model = name in ('init_cfg of others', 'inference', 'load_checkpoint')
    if any_model and content not in ('numbers for names', 'control characters'):
        PATHS[name](tmp_path, path)  # MMEngine goes on with what fits, nothing
        return
    with pytest.raises(CheckpointError, match='x.pth') as error:
        PATHS[name](tmp_path, path)
    assert '\x1b' not in str(error.value)


@pytest.mark.parametrize('name', PATHS)
def test_code_runs_if_it_is_trusted(tmp_path, bad, name, trusting):
    # It still is no checkpoint of anything.
    with pytest.raises(Exception):  # noqa: B017
        PATHS[name](tmp_path, bad)
        raise RuntimeError('MMEngine does not mind')
    assert (tmp_path / 'ran').exists()


def test_no_code_runs_from_the_web(tmp_path, bad, web):
    for load in (init_backbone, init_other_module, partial(load_from, tmp_path)):
        with pytest.raises(CheckpointError, match='bad.pth is not loaded'):
            load(f'{web}/bad.pth')
    assert len(list((tmp_path / 'cache').rglob('bad.pth'))) == 1
    with pytest.raises(CheckpointError, match='no.pth cannot be fetched .*404'):
        init_backbone(f'{web}/no.pth')
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize(
    'address, listing',
    [
        ('torchvision://net', 'get_torchvision_models'),
        ('modelzoo://net', 'get_torchvision_models'),
        ('open-mmlab://net', 'get_external_models'),
        ('openmmlab://net', 'get_external_models'),
        ('mmcls://net', 'get_mmcls_models'),
    ],
)
def test_named_models(tmp_path, bad, web, monkeypatch, address, listing):
    good = {'state_dict': {'backbone.a': torch.ones(1), 'head.a': torch.ones(2)}}
    torch.save(good, tmp_path / 'good.pth')
    module = 'mlla_mm.checkpoints.schemes'
    monkeypatch.setattr(f'{module}.{listing}', lambda: dict(net=f'{web}/good.pth'))
    weights = CheckpointLoader.load_checkpoint(address)['state_dict']
    assert list(weights) == (
        ['a'] if address.startswith('mmcls') else ['backbone.a', 'head.a']
    )
    monkeypatch.setattr(f'{module}.{listing}', lambda: dict(net=f'{web}/bad.pth'))
    with pytest.raises(CheckpointError):
        CheckpointLoader.load_checkpoint(address)
    assert not (tmp_path / 'ran').exists()


def test_all_schemes_of_mmengine_are_replaced():
    modules = {scheme.__module__ for scheme in CheckpointLoader._schemes.values()}
    assert modules == {'mlla_mm.checkpoints.schemes'}
    with pytest.raises(ValueError, match='pavi'):
        CheckpointLoader.load_checkpoint('pavi://x')


def test_our_own_runs_resume(tmp_path):
    first = resume(tmp_path, None)
    path = tmp_path / 'work' / 'epoch_2.pth'
    assert path.is_file()
    second = resume(tmp_path, path, epochs=3)
    assert (second.epoch, second.iter) == (3, 6)
    history = second.message_hub.get_scalar('train/loss').data[0]
    assert len(history) == 6
    assert list(history[:4]) == list(first.message_hub.get_scalar('train/loss').data[0])
    state = second.optim_wrapper.state_dict()['state']
    assert {int(entry['step']) for entry in state.values()} == {6}


def test_programs_in_a_checkpoint(tmp_path):
    """MMEngine executes configs that it finds in checkpoints."""
    resume(tmp_path, None)
    path = tmp_path / 'work' / 'epoch_2.pth'
    checkpoint = torch.load(path, weights_only=False)
    marker = tmp_path / 'ran'
    program = (
        f'open({str(marker)!r}, "w").close()\n'
        f'model = dict(type="MLLA", arch={ARCH!r})\n'
        'default_scope = "mmengine"\n'
    )
    checkpoint['meta'].update(config=program, cfg=program)
    checkpoint['message_hub']['runtime_info']['cfg'] = program
    torch.save(checkpoint, path)
    assert resume(tmp_path, path, epochs=3).epoch == 3
    with pytest.raises(ValueError, match='Cannot find the config'):
        infer(path, config=False)
    assert not marker.exists()
    trust_checkpoints(True)
    try:
        infer(path, config=False)
    finally:
        trust_checkpoints(False)
    assert marker.exists()


def build(task: str, name: str):
    """The model of a config, without pretrained weights."""
    package = dict(detection='mmdet', segmentation='mmseg', classification='mmpretrain')
    pytest.importorskip(package[task])
    cfg = Config.fromfile(CONFIGS / task / f'{name}.py')
    cfg.model.backbone.init_cfg = None
    if task == 'segmentation':
        from mlla_mm.engine.parts import replace_sync_bn

        replace_sync_bn(cfg.model)
    scope = f'{package[task]}-{torch.rand(1).item()}'
    with DefaultScope.overwrite_default_scope(package[task]):
        DefaultScope.get_instance(scope, scope_name=package[task])
        if task == 'classification':
            import mlla_mm.models.classifiers  # noqa: F401
        return MODELS.build(cfg.model)


DETECTOR = 'mask-rcnn_mlla-t_fpn_1x_coco'
SEGMENTOR = 'upernet_mlla-t_8xb2-160k_ade20k-512x512'


@pytest.mark.parametrize(
    'task, name', [('detection', DETECTOR), ('segmentation', SEGMENTOR)]
)
def test_official_detector_and_segmentor(tmp_path, task, name):
    model = build(task, name)
    heads = {
        key: torch.full_like(value, 0.5)
        for key, value in model.state_dict().items()
        if not key.startswith('backbone.')
    }
    backbone = reference.official_weights('mlla-t_downstream')
    weights = {**checkpoints.prefixed(backbone, 'backbone.'), **heads}
    for rotations in reference.official_rotations('mlla-t'):
        weights[f'backbone.{rotations}'] = torch.zeros(3, 3, 2)
    path, converted = tmp_path / 'official.pth', tmp_path / 'ours.pth'
    meta = dict(epoch=12, CLASSES=('a', 'b'), config='model = dict()', env_info='GCC')
    optimizer = dict(state={}, param_groups=[dict(lr=1e-4)])
    torch.save(dict(meta=meta, state_dict=weights, optimizer=optimizer), path)
    for file in (path, publish(path, converted)):
        for value in model.state_dict().values():
            value.zero_()
        model = load_from(tmp_path, file, model).eval()
        with torch.no_grad():
            features = model.backbone(reference.image('75x101', 2))
        for i, feature in enumerate(features):
            expected = reference.recorded(f'feat{i}_mlla-t_75x101')
            assert reference.relative_error(feature, expected) < 1e-5
        for key, value in heads.items():
            assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize('layout', ['official', 'training', 'module.', 'bare', 'ours'])
def test_official_classifier(tmp_path, layout):
    model = build('classification', 'mlla-t_8xb128_in1k')
    weights = checkpoints.official_classifier('t')
    path = tmp_path / 'x.pth'
    if layout == 'training':
        checkpoints.save_official_training(weights, path)
    elif layout == 'module.':
        torch.save({'model': checkpoints.prefixed(weights, 'module.')}, path)
    elif layout == 'bare':
        torch.save(weights, path)
    else:
        torch.save({'model': weights}, path)
    if layout == 'ours':
        path = publish(path, tmp_path / 'ours.pth')
    model = load_from(tmp_path, path, model).eval()
    with torch.no_grad():
        logits = model(reference.image('224x224', 1))
    expected = reference.recorded('logits_mlla-t_224x224')
    assert reference.relative_error(logits, expected) < 1e-5


def test_averaged_weights(tmp_path):
    model = build('classification', 'mlla-nano_digits')
    own = model.state_dict()
    theirs = {
        key.replace('backbone.norm3', 'norm').replace('head.fc', 'head'): value
        for key, value in own.items()
    }
    theirs = {key.replace('backbone.', ''): value for key, value in theirs.items()}
    plain = {key: value * 0 for key, value in theirs.items()}
    path = tmp_path / 'x.pth'
    checkpoints.save_official_training(plain, path, state_dict_ema=theirs)
    expected = {key: value.clone() for key, value in own.items()}
    cfg = Config(dict())
    add_hook(cfg, 'UseEMAWeightsHook')
    loaded = load_from(tmp_path, path, model, custom_hooks=cfg.custom_hooks)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, expected[key]), key
    for value in load_from(tmp_path, path, model).state_dict().values():
        assert not value.any()


def test_weights_that_fit_in_part(tmp_path):
    """MMEngine would go on with what fits."""
    path = tmp_path / 'x.pth'
    weights = Small().state_dict()
    del weights['backbone.norm0.weight']
    torch.save(dict(state_dict=weights), path)
    with pytest.raises(CheckpointError, match='norm0.weight: missing in the file'):
        load_from(tmp_path, path)
    weights = dict(Small().state_dict(), **{'head.weight': torch.ones(3, 2)})
    torch.save(dict(state_dict=weights), path)
    with pytest.raises(CheckpointError, match='of other classes.*load_from.*init_cfg'):
        load_from(tmp_path, path)
    # Neither counters of BatchNorm nor the wrapper of several processes are weights.
    weights = {
        f'module.{key}': value
        for key, value in Small().state_dict().items()
        if 'num_batches_tracked' not in key
    }
    torch.save(dict(state_dict=weights), path)
    loaded = load_from(tmp_path, path).state_dict()
    assert torch.equal(loaded['head.weight'], weights['module.head.weight'])


def test_weights_of_another_size_or_task(tmp_path):
    official = tmp_path / 'MLLA_T.pth'
    torch.save({'model': checkpoints.official_classifier('t')}, official)
    words = r'holds MLLA-T .*model is an MLLA .*configs/classification/\*mlla-t\*.py'
    with pytest.raises(CheckpointError, match=words):
        load_from(tmp_path, official, build('classification', 'mlla-nano_digits'))
    with pytest.raises(
        CheckpointError, match='holds a classifier, the model is a detector.*init_cfg'
    ):
        load_from(tmp_path, official, build('detection', DETECTOR))


def test_models_without_mlla(tmp_path):
    path = tmp_path / 'x.pth'
    weights = {'head.weight': torch.ones(1, 2), 'neck': torch.ones(1)}
    torch.save(dict(weights, **{'head.bias': torch.ones(1)}), path)
    model = load_from(tmp_path, path, Small(backbone=False))
    assert model.head.weight.tolist() == [[1, 1]]
    for content in (weights, dict(state_dict=MLLA(ARCH).state_dict())):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match='head.bias: missing in the file'):
            load_from(tmp_path, path, Small(backbone=False))
    torch.save({'state_dict': {'neck': torch.ones(1)}}, path)
    with pytest.raises(CheckpointError, match='The file holds no MLLA'):
        load_from(tmp_path, path)


def test_a_model_of_a_backbone_alone(tmp_path):
    """Its checkpoint has nothing but names with 'backbone.'."""
    model = Small()
    del model.head
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'x.pth')
    load_from(tmp_path, tmp_path / 'x.pth', model)


def test_the_check_comes_after_other_hooks(tmp_path):
    class Exchange(Hook):
        def after_load_checkpoint(self, runner, checkpoint):
            checkpoint['state_dict'] = runner.model.state_dict()

    path = tmp_path / 'x.pth'
    torch.save(dict(state_dict=MLLA(ARCH).state_dict()), path)
    load_from(tmp_path, path, custom_hooks=[Exchange()])
