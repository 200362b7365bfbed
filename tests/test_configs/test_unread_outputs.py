# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Parts of a model that a loss does not depend on, under DistributedDataParallel.

It fails at the second update if a backward pass misses a parameter, in every process by
itself. One process shows it.
"""

import pytest
import torch
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, DefaultScope
from torch import distributed

from benchmarks.peak_memory import largest_size, synthetic_batch
from mlla_mm.checks.config import check_config
from mlla_mm.engine.parts import replace_sync_bn
from mlla_mm.models import MLLA

from ..nano import NANO

DET, SEG, CLS = NANO
for package in NANO:
    pytest.importorskip(package)


@pytest.fixture
def group():
    """A process group of this process alone."""
    store = distributed.HashStore()
    distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def config(scope: str, changes: dict) -> Config:
    cfg = Config.fromfile(NANO[scope])
    cfg.merge_from_dict(changes)
    replace_sync_bn(cfg.model)
    check_config(cfg)
    return cfg


def update(cfg: Config, objects: bool = True) -> torch.nn.Module:
    """Make three updates; returns the model, whose gradients are the last ones."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        model.init_weights()
        wrapped = MMDistributedDataParallel(model.train())
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1e-4, weight_decay=0.1)
        for _ in range(3):
            batch = synthetic_batch(cfg, 2, largest_size(cfg))
            for sample in [] if objects else batch['data_samples']:
                sample.gt_instances = sample.gt_instances[:0]
            losses = wrapped.train_step(batch, OptimWrapper(optimizer))
            assert losses['loss'].isfinite()
    return model


HEAD = dict(_delete_=True, channels=16, num_classes=11, norm_cfg=dict(type='BN'))
FCN = dict(HEAD, type='FCNHead', num_convs=1)
NO_AUXILIARY_HEAD = {'model.auxiliary_head': None}
LATE_LEVELS = {
    'model.neck.start_level': 1,
    'model.neck.num_outs': 4,
    'model.rpn_head.anchor_generator.strides': [8, 16, 32, 64],
    'model.roi_head.bbox_roi_extractor.featmap_strides': [8, 16, 32],
    'model.roi_head.mask_roi_extractor.featmap_strides': [8, 16, 32],
}
EARLY_LEVELS = {
    'model.neck.end_level': 2,
    'model.neck.num_outs': 3,
    'model.rpn_head.anchor_generator.strides': [4, 8, 16],
    'model.roi_head.bbox_roi_extractor.featmap_strides': [4, 8, 16],
    'model.roi_head.mask_roi_extractor.featmap_strides': [4, 8, 16],
}
STUDY = {
    'model.backbone.type': 'LinearAttentionSwin',
    'model.backbone.block_design': 'sub',
    'model.backbone.token_mixer': dict(
        input_gate=True, shortcut=True, lepe=True, rope=True
    ),
}
UNREAD = {
    'FCN on the last output': (
        SEG, {'model.decode_head': dict(FCN, in_channels=256, in_index=3),
              **NO_AUXILIARY_HEAD},
    ),
    'FCN on a middle output': (
        SEG, {'model.decode_head': dict(FCN, in_channels=64, in_index=1),
              **NO_AUXILIARY_HEAD},
    ),
    'two heads on two outputs': (
        SEG, {'model.decode_head': dict(FCN, in_channels=256, in_index=-1)},
    ),
    'DeepLabV3+': (
        SEG, {'model.decode_head': dict(
                  HEAD, type='DepthwiseSeparableASPPHead', dilations=(1, 2),
                  in_channels=256, in_index=3, c1_in_channels=32, c1_channels=8),
              **NO_AUXILIARY_HEAD},
    ),
    'FPN of late levels': (DET, LATE_LEVELS),
    'FPN of early levels': (DET, EARLY_LEVELS),
    'PAFPN': (DET, {'model.neck.type': 'PAFPN', **LATE_LEVELS}),
    'FPN without masks': (
        DET, {**LATE_LEVELS, 'model.roi_head.mask_head': None},
    ),
    'classifier with all outputs': (CLS, {'model.backbone.out_indices': (0, 1, 2, 3)}),
    'FCN on a middle output of the study': (
        SEG, {'model.decode_head': dict(FCN, in_channels=64, in_index=1),
              **NO_AUXILIARY_HEAD, **STUDY},
    ),
    'FPN of late levels of the study': (DET, {**LATE_LEVELS, **STUDY}),
}  # fmt: skip
BACKBONES = {
    'trained': {},
    'recomputed': {'with_cp': True},
    'norms fixed': {'norm_eval': True},
    'stem frozen': {'frozen_stages': 0},
    'a stage frozen, recomputed': {'frozen_stages': 1, 'with_cp': True},
    'three stages frozen': {'frozen_stages': 3, 'norm_eval': True},
    'all frozen': {'frozen_stages': 4},
}


@pytest.mark.parametrize('case', UNREAD)
def test_outputs_that_nobody_reads(group, case):
    scope, changes = UNREAD[case]
    model = update(config(scope, changes))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('options', BACKBONES.values(), ids=BACKBONES)
@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (1, 3)])
def test_frozen_and_unread(group, options, out_indices):
    head = dict(FCN, in_channels=256, in_index=len(out_indices) - 1)
    backbone = dict(options, out_indices=out_indices)
    model = update(
        config(
            SEG,
            {
                'model.decode_head': head,
                **NO_AUXILIARY_HEAD,
                **{f'model.backbone.{key}': x for key, x in backbone.items()},
            },
        )
    )
    assert model.backbone.frozen_stages == options.get('frozen_stages', -1)


def test_images_without_objects(group):
    """A process may get no object at all, whatever the others get."""
    update(config(DET, {}), objects=False)


def test_what_fails_without_it(group, monkeypatch):
    monkeypatch.setattr(
        'mlla_mm.models.backbones.staged._read_together', lambda maps, norms: maps
    )
    for case in ('FCN on the last output', 'FPN of late levels'):
        scope, changes = UNREAD[case]
        with pytest.raises(RuntimeError, match='Expected to have finished reduction'):
            update(config(scope, changes))


def test_unread_norms_do_not_train():
    """In one process not even by weight decay: they have no gradient."""
    arch = dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    every = MLLA(arch)
    last = MLLA(arch, out_indices=3)
    last.load_state_dict(every.state_dict(), strict=False)
    images = torch.rand(2, 3, 64, 64)
    for model in (every, last):
        model(images)[-1].square()[:, 0].mean().backward()
    unread = {f'norm{i}.{kind}' for i in range(3) for kind in ('weight', 'bias')}
    gradients = {name: p.grad for name, p in every.named_parameters()}
    assert {name for name, grad in gradients.items() if grad is None} == unread
    for name, parameter in last.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name
