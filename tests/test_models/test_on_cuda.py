# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Models on a pretended GPU: every tensor is on the device where it is used."""

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope

from benchmarks.peak_memory import largest_size, synthetic_batch
from benchmarks.pretended_cuda import backward, pretended_cuda
from mlla_mm.compat.mmcv_ext import is_stand_in
from mlla_mm.compat.openmmlab import count_in_micro_batches
from mlla_mm.engine.ema import ModelEMA
from mlla_mm.engine.options import replace_sync_bn
from mlla_mm.models import MLLA
from mlla_mm.ops import rotary, triton
from mlla_mm.reproducible.loops import train_step

from ..nano import NANO, build
from ..pretended import autocast, needs_pretended_cuda

pytestmark = needs_pretended_cuda

ARCH = dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
OPS = ['naive', 'eager', 'fused']


def describe(tensors):
    """Shapes, dtypes and strides. The stride of an axis of length 1 means nothing."""
    return [
        (x.shape, x.dtype, [s for n, s in zip(x.shape, x.stride()) if n > 1])
        for x in tensors
    ]


@pytest.fixture
def ops(request, monkeypatch):
    if request.param == 'fused' and not triton._has_triton():
        pytest.skip('needs Triton 3.3')
    monkeypatch.setenv('MLLA_OPS', request.param)
    return request.param


def on_cpu(model, images, monkeypatch):
    """Outputs and gradients of a copy of a model, by the definitions."""
    monkeypatch.setenv('MLLA_OPS', 'naive')
    model = copy.deepcopy(model)
    outputs = model(images)
    if outputs[0].requires_grad:
        sum(output.sum() for output in outputs).backward()
    return describe(outputs), describe(x.grad for x in model.parameters())


@pytest.mark.parametrize('ops', OPS, indirect=True)
@pytest.mark.parametrize('dtype', [None, 'float16', 'bfloat16'])
@pytest.mark.parametrize('with_cp', [False, True])
def test_backbone(ops, dtype, with_cp, monkeypatch):
    model = MLLA(ARCH, drop_path_rate=0.1, with_cp=with_cp)
    images = torch.randn(2, 3, 33, 65)
    outputs, grads = on_cpu(model, images, monkeypatch)
    monkeypatch.setenv('MLLA_OPS', ops)
    with pretended_cuda() as device:
        model, images = model.to('cuda'), images.to('cuda')
        with autocast(dtype):
            found = model(images)
            device.waits.clear()
            found = model(images)
        assert all(x.is_cuda for x in found)
        # Of LayerNorm, which autocast computes in float32.
        assert describe(found) == outputs
        backward(found, [torch.ones_like(x) for x in found])
        assert all(x.grad.is_cuda for x in model.parameters())
        assert describe(x.grad for x in model.parameters()) == grads
        # Nothing waits for the device, but for the first call's tables.
        assert device.waits == []


@pytest.mark.parametrize(
    'amp, micro_batches', [(None, 1), ('float16', 1), ('bfloat16', 2)]
)
@pytest.mark.parametrize('scope', NANO)
def test_updates_and_predictions(scope, amp, micro_batches):
    if scope == 'mmdet' and not is_stand_in():
        pytest.skip("mmcv's compiled ops cannot pretend")
    cfg = Config.fromfile(NANO[scope])
    replace_sync_bn(cfg.model)
    batches = [synthetic_batch(cfg, 2, largest_size(cfg)) for _ in range(micro_batches)]
    for sample in (x for batch in batches for x in batch['data_samples']):
        sample.set_metainfo(dict(ori_shape=sample.get('img_shape')))
    model = build(cfg)
    with DefaultScope.overwrite_default_scope(scope), pretended_cuda():
        model = model.to('cuda').train()
        teacher = None
        if scope == 'mmpretrain':
            teacher = ModelEMA(model, 0.5)
            model.set_teacher(teacher.module)
        wrapper = make_wrapper(model, cfg.optim_wrapper, amp, micro_batches)
        before = describe(model.parameters())
        for i in range(2):
            logs = train_step(model, copy.deepcopy(batches), wrapper, (0, i))
            assert all(value.is_cuda for value in logs.values())
            if teacher is not None:
                teacher.update(model)
                assert 'loss_mesa' in logs
        if amp == 'float16':
            assert wrapper.loss_scaler.is_enabled()
        # Each parameter was updated: the scaler skipped no update.
        states = wrapper.optimizer.state
        assert len(states) == sum(x.requires_grad for x in model.parameters())
        assert all(x['exp_avg'].is_cuda for x in states.values())
        assert describe(model.parameters()) == before
        for part in filter(None, (model, teacher and teacher.module)):
            assert all(x.is_cuda for x in part.state_dict().values())
            predict(part, batches[0], amp)


def make_wrapper(model, cfg, amp, micro_batches):
    cfg = dict(copy.deepcopy(cfg), type='AmpOptimWrapper' if amp else 'OptimWrapper')
    cfg.pop('loss_scale', None)
    if amp:
        cfg.update(dtype=amp, loss_scale='dynamic' if amp == 'float16' else 1.0)
    wrapper = build_optim_wrapper(model, cfg)
    count_in_micro_batches(wrapper, micro_batches, 0, 2)
    return wrapper


def predict(model, batch, amp):
    model.eval()
    with torch.no_grad(), autocast(amp):
        found = model.val_step(copy.deepcopy(batch))
    assert len(found) == len(batch['data_samples'])
