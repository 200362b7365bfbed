# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""The configs that the pages in docs/ show, each under the path in its first line."""

import json
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, VISUALIZERS, DefaultScope
from mmengine.runner import Runner

from mlla_mm.checks.config import check_config
from mlla_mm.checks.data import require_data
from mlla_mm.datasets.digits import make_ade20k, make_coco, make_imagenet
from mlla_mm.engine.parts import replace_sync_bn
from mlla_mm.models import MLLA, LinearAttentionSwin

from ..processes import ROOT
from .examples import (
    CLONE,
    EXAMPLES,
    MODULES,
    RELIABLE,
    clone_mmdetection,
    copy_configs,
    shorten,
    small,
)

SCOPES = dict(detection='mmdet', segmentation='mmseg', classification='mmpretrain')


@pytest.fixture(scope='module')
def clone(tmp_path_factory) -> Path:
    """A folder with our configs and, beside them, those of the pages."""
    root = tmp_path_factory.mktemp('clone')
    copy_configs(root)
    return root


@pytest.fixture
def importable(clone, monkeypatch):
    """Modules of the pages are found, as where the tools are started."""
    monkeypatch.syspath_prepend(clone)


@pytest.fixture
def read(clone, request):
    """Read an example, with its task's scope, without pretrained weights."""

    def read_config(name: str) -> Config:
        path = f'configs/{name}.py'
        task = name.split('/')[0]
        pytest.importorskip(SCOPES[task])
        DefaultScope.get_instance(f'{request.node.name}', scope_name=SCOPES[task])
        cfg = Config.fromfile(clone / path)
        assert cfg.default_scope == SCOPES[task]
        cfg.model.backbone.pop('init_cfg', None)
        return cfg

    return read_config


def run(cfg: Config, work_dir: Path) -> dict:
    """Train for an epoch or two iterations, validate; returns the last metrics."""
    # Widths and heads of MLLA-T, with a block in each stage.
    cfg.model.backbone.arch = dict(
        embed_dims=64, depths=(1, 1, 1, 1), num_heads=(2, 4, 8, 16)
    )
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False, batch_size=2)
        small(loader.dataset.pipeline)
    cfg.train_dataloader.dataset.indices = 4
    cfg.val_dataloader.dataset.indices = 2
    if 'max_iters' in cfg.train_cfg:
        cfg.train_cfg.update(max_iters=2, val_interval=2)
    else:
        cfg.train_cfg.max_epochs = 1
    if cfg.model.data_preprocessor.get('size'):
        cfg.model.data_preprocessor.size = (32, 48)
    replace_sync_bn(cfg.model)
    if cfg.optim_wrapper.type == 'AmpOptimWrapper':  # needs a GPU
        cfg.optim_wrapper.type = 'OptimWrapper'
        cfg.optim_wrapper.pop('loss_scale')
    cfg.param_scheduler = None
    cfg.default_hooks.checkpoint = None
    cfg.update(work_dir=str(work_dir), log_level='ERROR')
    # Visualizers of a name are one, with one folder.
    cfg.visualizer.name = cfg.experiment_name = str(work_dir)
    Runner.from_cfg(cfg).train()
    (log,) = work_dir.glob('*/vis_data/scalars.json')
    return json.loads(log.read_text().splitlines()[-1])


def test_own_objects(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_coco('data/my_objects', train=4, val=2, size=64)
    cfg = read('detection/my_objects')
    cfg.model.train_cfg.rcnn.sampler.num = 64
    # A model that has learnt nothing detects something too.
    cfg.model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=10)
    # All four images have digits, so that none is left out.
    cfg.train_dataloader.dataset.filter_cfg = None
    metrics = run(cfg, tmp_path / 'work')
    assert {'coco/bbox_mAP', 'coco/segm_mAP'} < set(metrics)


def test_two_data_sets(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, count in (('my_objects', 20), ('more_objects', 30)):
        make_coco(f'data/{name}', train=count, val=2, size=64)
    cfg = read('detection/my_two_sets')
    check_config(cfg)
    counts = require_data(cfg, 'train').counts['train']
    data = DATASETS.build(cfg.train_dataloader.dataset)
    kept = [len(dataset) for dataset in data.datasets]
    # Images of rare classes are repeated.
    assert kept[0] <= 20 and kept[1] >= 30
    assert counts.images == kept[0] + len(data.datasets[1].dataset)
    assert len(data[len(data) - 1]['data_samples'].gt_instances)


def test_own_masks(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_ade20k('data/my_masks', train=4, val=2, size=64)
    metrics = run(read('segmentation/my_masks'), tmp_path / 'work')
    assert 0 <= metrics['mIoU'] <= 100


def test_own_images(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_imagenet('data/my_images', train=10, val=10, size=32)
    cfg = read('classification/my_images')
    assert cfg.optim_wrapper.paramwise_cfg.layer_decay_rate < 1
    metrics = run(cfg, tmp_path / 'work')
    assert {'accuracy/top1', 'ema_accuracy/top1'} < set(metrics)


def test_other_depth_and_width(read):
    cfg = read('classification/my_shallow')
    model = MODELS.build(cfg.model).eval()
    assert [len(stage.blocks) for stage in model.backbone.layers] == [2, 2, 6, 2]
    with torch.no_grad():
        assert model(torch.rand(1, 3, 32, 32), mode='tensor').shape == (1, 1000)


@pytest.mark.parametrize(
    'name, backbone',
    [
        ('classification/my_xca', MLLA),
        ('classification/my_xca_baseline', LinearAttentionSwin),
    ],
)
def test_a_new_attention(read, clone, importable, run_tool, tmp_path, name, backbone):
    """Its file and config are a user's, in whose folder our tool trains."""
    assert len(MODULES['my_attention.py'].splitlines()) <= 40
    make_imagenet(clone / 'data/imagenet', train=8, val=10, size=32)
    cfg = read(name)
    assert cfg.model.backbone.type == backbone.__name__
    shorten(cfg)
    cfg.model.backbone.arch = dict(
        embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)
    )
    cfg.model.head.in_channels = 128
    cfg.default_hooks.checkpoint = dict(type='WholeCheckpointHook', interval=1)
    cfg.dump(tmp_path / 'config.py')
    run_tool(
        'python', ROOT / 'tools' / 'train.py', tmp_path / 'config.py',
        '--work-dir', tmp_path / 'work', cwd=clone,
    )  # fmt: skip
    weights = torch.load(tmp_path / 'work/epoch_1.pth', weights_only=False)
    key = 'backbone.layers.1.blocks.0.attn.temperature'
    temperature = weights['state_dict'][key]
    assert temperature.shape == (2, 1, 1) and temperature.isfinite().all()
    assert (temperature != 1).all()  # it has been trained


@torch.no_grad()
def test_the_attention_of_the_page(importable):
    """Against its paper's formula, channel by channel."""
    from my_attention import CrossCovarianceAttention

    mixer = CrossCovarianceAttention(12, 3)
    mixer.temperature.uniform_(0.5, 2)
    q, k, v = torch.randn(3, 2, 4, 5, 12)
    y = mixer.attend(q, k, v)
    for c in range(12):
        head = range(c // 4 * 4, c // 4 * 4 + 4)
        query = q[0, ..., c] / q[0, ..., c].norm()
        scores = torch.stack(
            [(query * k[0, ..., d]).sum() / k[0, ..., d].norm() for d in head]
        )
        weights = (scores * mixer.temperature[c // 4]).flatten().softmax(0)
        expected = sum(w * v[0, ..., d] for w, d in zip(weights, head))
        torch.testing.assert_close(y[0, ..., c], expected)


def test_frozen_stages(read):
    backbone = MODELS.build(read('detection/my_frozen').model).train().backbone
    trained = {
        name.rsplit('.blocks')[0]
        for name, parameter in backbone.named_parameters()
        if parameter.requires_grad
    }
    assert {name.split('.weight')[0].split('.bias')[0] for name in trained} >= {
        'layers.1', 'layers.2', 'layers.3', 'norm1', 'norm2', 'norm3',
    }  # fmt: skip
    assert not any(
        name.startswith(('patch_embed', 'layers.0', 'norm0')) for name in trained
    )
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    assert all(stage.with_cp for stage in backbone.layers)


def test_another_head(read):
    cfg = read('segmentation/my_fcn')
    replace_sync_bn(cfg.model)
    model = MODELS.build(cfg.model).eval()
    assert type(model.decode_head).__name__ == 'FCNHead'
    assert not model.with_auxiliary_head
    with torch.no_grad():
        logits = model.encode_decode(
            torch.rand(1, 3, 64, 64), [dict(img_shape=(64, 64))]
        )
    assert logits.shape == (1, 150, 64, 64)


def test_another_model(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_coco('data/coco', train=4, val=2, size=64)
    cfg = read('detection/my_retinanet')
    for split in ('train', 'val'):
        cfg[f'{split}_dataloader'].dataset.update(
            ann_file=f'annotations/instances_{split}.json',
            data_prefix=dict(img=f'{split}/'),
            metainfo=dict(classes=tuple('0123456789')),
            filter_cfg=None,
        )
    cfg.val_evaluator.ann_file = 'data/coco/annotations/instances_val.json'
    cfg.model.bbox_head.num_classes = 10
    cfg.model.test_cfg.score_thr = 0.0
    metrics = run(cfg, tmp_path / 'work')
    assert 'coco/bbox_mAP' in metrics
    assert 'coco/segm_mAP' not in metrics


def test_in_a_clone_of_mmdetection(tmp_path, request):
    mmdet = pytest.importorskip('mmdet')
    theirs = Path(mmdet.__file__).parent / '.mim' / 'configs'
    if not theirs.is_dir():
        pytest.skip('mmdet is installed without its configs')
    clone_mmdetection(tmp_path, theirs)
    DefaultScope.get_instance(request.node.name, scope_name='mmdet')
    cfg = Config.fromfile(tmp_path / CLONE)
    # Their tools know MLLA by it.
    assert 'mlla_mm' in cfg.custom_imports.imports
    base = Config.fromfile(theirs / 'retinanet' / 'retinanet_r50_fpn_1x_coco.py')
    for key in ('optim_wrapper', 'param_scheduler', 'train_dataloader'):
        assert cfg[key] == base[key]
    assert cfg.model.bbox_head == base.model.bbox_head
    reliable = Config.fromfile(tmp_path / RELIABLE)
    ours = Config.fromfile(ROOT / 'configs/detection/mask-rcnn_mlla-t_fpn_1x_coco.py')
    for key in ('train_cfg', 'val_cfg', 'test_cfg', 'default_hooks'):
        assert reliable[key] == ours[key]
    model = MODELS.build(cfg.model).eval()
    assert model.backbone.state_dict().keys() == MLLA('tiny').state_dict().keys()
    with torch.no_grad():
        features = model.extract_feat(torch.rand(1, 3, 64, 64))
    # Strides 8 to 128.
    assert [tuple(x.shape[1:]) for x in features] == [
        (256, side, side) for side in (8, 4, 2, 1, 1)
    ]


def rates(cfg: Config) -> dict:
    """Groups of the optimiser by parameter name."""
    model = MODELS.build(cfg.model)
    cfg.optim_wrapper.type = 'OptimWrapper'
    cfg.optim_wrapper.pop('loss_scale', None)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: group
        for group in wrapper.optimizer.param_groups
        for p in group['params']
    }


def test_layer_wise_rates(read):
    cfg = read('classification/my_layer_decay')
    groups = rates(cfg)
    base = cfg.optim_wrapper.optimizer.lr
    # MLLA-T: the stem, 18 blocks, and what follows them.
    stem = groups['backbone.patch_embed.conv1.conv.weight']
    assert stem['lr'] == pytest.approx(base * 0.7**19)
    assert groups['head.fc.weight']['lr'] == base
    assert groups['backbone.norm3.weight']['weight_decay'] == 0


def test_rates_by_name(read):
    cfg = read('detection/my_rates')
    groups = rates(cfg)
    base = cfg.optim_wrapper.optimizer.lr
    for name, rate in {
        'backbone.patch_embed.conv1.conv.weight': 0.25,
        'backbone.layers.0.blocks.0.mlp.fc1.weight': 0.25,
        'backbone.layers.1.blocks.0.mlp.fc1.weight': 0.5,
        'backbone.layers.2.blocks.0.mlp.fc1.weight': 1,
        'roi_head.bbox_head.fc_cls.weight': 1,
    }.items():
        assert groups[name]['lr'] == pytest.approx(base * rate), name
    # What the page says about the keys of the base.
    assert groups['backbone.layers.2.blocks.0.norm1.weight']['weight_decay'] == 0
    assert groups['backbone.layers.1.blocks.0.norm1.weight']['weight_decay'] > 0


def test_shorter_schedule(read):
    cfg = read('segmentation/my_20k')
    assert cfg.train_cfg.max_iters == cfg.param_scheduler[1].end - 1 == 20000
    assert cfg.train_cfg.max_iters % cfg.train_cfg.val_interval == 0
    assert cfg.default_hooks.checkpoint.interval == 2000
    assert not cfg.default_hooks.checkpoint.by_epoch
    base = Config.fromfile(
        ROOT / 'configs/segmentation/upernet_mlla-t_8xb2-160k_ade20k-512x512.py'
    )
    assert cfg.param_scheduler[0] == base.param_scheduler[0]
    assert {**cfg.param_scheduler[1], 'end': 160001} == base.param_scheduler[1]


@pytest.mark.parametrize('name', ['tensorboard', 'wandb'])
def test_visualisation_backends(read, name, tmp_path):
    configs = dict(tensorboard='detection/my_tensorboard', wandb='detection/my_wandb')
    cfg = read(configs[name])
    visualizer = VISUALIZERS.build(
        ConfigDict(cfg.visualizer, name=f'docs_{name}', save_dir=str(tmp_path))
    )
    # They import their packages at the first use.
    kinds = [type(x).__name__ for x in visualizer._vis_backends.values()]
    assert kinds == ['LocalVisBackend', f'{name.capitalize()}VisBackend']


def test_mesa_with_another_backbone(read):
    cfg = read('classification/my_resnet_mesa')
    model = MODELS.build(cfg.model)
    model.set_teacher(MODELS.build(cfg.model).eval())
    from mmpretrain.structures import DataSample

    data = dict(
        inputs=[torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)] * 2,
        data_samples=[DataSample().set_gt_label(3) for _ in range(2)],
    )
    losses = model(**model.data_preprocessor(data, training=True), mode='loss')
    assert set(losses) == {'loss_ce', 'loss_mesa'}
    assert cfg.default_hooks.mesa.type == 'MESAHook'


def test_switches_together(read):
    cfg = read('classification/my_gates')
    model = MODELS.build(cfg.model).eval()
    for stage in model.backbone.layers:
        for block in stage.blocks:
            assert block.cpe1 is not None and block.cpe2 is None
            mixer = block.attn
            assert mixer.input_gate and mixer.normalization
            assert mixer.A_log is not None and mixer.D is not None
            assert mixer.scan_order == 'columns'
    with torch.no_grad():
        assert model(torch.rand(1, 3, 32, 64), mode='tensor').shape == (1, 1000)


def test_study_in_detection(read):
    cfg = read('detection/my_study')
    base = Config.fromfile(ROOT / 'configs/detection/mask-rcnn_mlla-t_fpn_1x_coco.py')
    assert 'arch' not in cfg.model.backbone
    model = MODELS.build(cfg.model).eval()
    with torch.no_grad():
        features = model.extract_feat(torch.rand(1, 3, 70, 100))
    assert [tuple(x.shape[1:]) for x in features[:2]] == [(256, 18, 25), (256, 9, 13)]
    # The page says that its keys are for the other rows.
    cfg.model.backbone.token_mixer = dict(forget_gate=True, shortcut=True)
    for name, group in rates(cfg).items():
        gate = name.endswith(('attn.A_log', 'attn.D'))
        expected = 0 if gate or 'norm' in name else 0.05
        assert group['weight_decay'] == expected, name
        assert group['lr'] == base.optim_wrapper.optimizer.lr
    assert any(name.endswith('attn.D') for name in rates(cfg))


def test_study_in_segmentation(read):
    cfg = read('segmentation/my_study')
    replace_sync_bn(cfg.model)
    model = MODELS.build(cfg.model).eval()
    assert all(block.attn.lepe for x in model.backbone.layers for block in x.blocks)
    with torch.no_grad():
        logits = model.encode_decode(
            torch.rand(1, 3, 64, 96), [dict(img_shape=(64, 96))]
        )
    assert logits.shape == (1, 150, 64, 96)


def test_study_starts_from_a_row():
    """The checkpoints that the pages name are those of rows of the same switches."""
    rows = ROOT / 'configs' / 'classification' / 'ablation'
    for task in ('detection', 'segmentation'):
        code = EXAMPLES[f'configs/{task}/my_study.py']
        (row,) = re.findall(r"'work_dirs/([\w-]+)/epoch_300\.pth'", code)
        trained = Config.fromfile(rows / f'{row}.py').model.backbone
        found = re.search(r'token_mixer=(dict\(.*\)),\n', code)
        assert trained.get('token_mixer') == (eval(found[1]) if found else None)


def test_every_example_is_tested():
    # By the text of this file: a worker may run some of its tests only.
    tested = re.findall(r"'(\w+tion/my_\w+)'", Path(__file__).read_text())
    assert {CLONE, RELIABLE, *(f'configs/{name}.py' for name in tested)} == set(
        EXAMPLES
    )
