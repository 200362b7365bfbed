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
from mlla_mm.engine.parts import replace_sync_bn
from mlla_mm.models import MLLA, LinearAttentionSwin
from mlla_mm.ops import rotary
from mlla_mm.reproducible.loops import train_step

from ..nano import NANO, build
from ..pretended import OPS, autocast, describe, needs_pretended_cuda, needs_triton

pytestmark = needs_pretended_cuda

ARCH = dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
#: All designs of the study that go together, and the one with a recurrence.
STUDY = {
    'parallel': dict(
        block_design='sub',
        ape=(33, 65),
        cpe=2,
        token_mixer=dict(input_gate=True, shortcut=True, lepe=True, rope=True),
    ),
    'recurrent': dict(
        token_mixer=dict(
            input_gate=True,
            forget_gate=True,
            shortcut=True,
            scan_order='columns',
            decayed_normalizer=True,
        )
    ),
}


@pytest.mark.parametrize('ops', OPS)
@pytest.mark.parametrize('dtype', [None, 'float16', 'bfloat16'])
@pytest.mark.parametrize('with_cp', [False, True])
def test_backbone(ops, dtype, with_cp, monkeypatch):
    model = MLLA(ARCH, drop_path_rate=0.1, with_cp=with_cp)
    check_backbone(model, ops, dtype, monkeypatch)


@pytest.mark.parametrize(
    'ops, dtype, name',
    [
        ('naive', None, 'parallel'),
        ('eager', 'float16', 'parallel'),
        pytest.param('fused', 'bfloat16', 'parallel', marks=needs_triton),
        ('naive', 'bfloat16', 'recurrent'),
        ('eager', 'float16', 'recurrent'),
    ],
)
def test_study_backbone(ops, dtype, name, monkeypatch):
    model = LinearAttentionSwin(ARCH, drop_path_rate=0.1, **STUDY[name])
    # To pretend takes milliseconds for each operator, and so for each token.
    size = (33, 65) if name == 'parallel' else (9, 13)
    check_backbone(model, ops, dtype, monkeypatch, size)


def check_backbone(model, ops, dtype, monkeypatch, size=(33, 65)):
    """Maps and gradients are described as those on a CPU in float32."""
    images = torch.randn(2, 3, *size)
    wanted = copy.deepcopy(model)
    maps = wanted(images)
    torch.autograd.backward(maps, [torch.ones_like(x) for x in maps])
    monkeypatch.setenv('MLLA_OPS', ops)
    with pretended_cuda() as device:
        model, images = model.to('cuda'), images.to('cuda')
        with torch.no_grad(), autocast(dtype):
            model(images)  # builds the tables
        device.waits.clear()
        with autocast(dtype):
            found = model(images)
        backward(found, [torch.ones_like(x) for x in found])
        assert device.waits == []
        assert all(x.is_cuda for x in found)
        assert describe(found) == describe(maps)
        grads = [x.grad for x in model.parameters()]
        assert all(x.is_cuda for x in grads)
        assert describe(grads) == describe(x.grad for x in wanted.parameters())


def test_tables_of_both_devices_are_kept_apart():
    model, images = MLLA(ARCH), torch.randn(1, 3, 40, 64)
    before = model(images)
    tables, rotations = dict(rotary._TABLES), dict(rotary._ROTATIONS)
    other = copy.deepcopy(model)
    with pretended_cuda():
        other.to('cuda')(torch.randn(1, 3, 99, 70, device='cuda'))
        assert rotary._TABLES.keys().isdisjoint(tables)
    assert rotary._TABLES == tables
    assert rotary._ROTATIONS == rotations
    # All of them are real.
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)


@pytest.mark.parametrize('ops', OPS)
def test_a_table_on_the_cpu_is_found(ops, monkeypatch):
    build = rotary._build_tables

    def build_on_cpu(length, num_freqs, device, dtype):
        return build(length, num_freqs, torch.device('cpu'), dtype)

    monkeypatch.setattr(rotary, '_build_tables', build_on_cpu)
    monkeypatch.setenv('MLLA_OPS', ops)
    model = MLLA(ARCH)
    with pretended_cuda():
        model.to('cuda')
        with pytest.raises(RuntimeError, match='cpu.*cuda:0|cuda:0.*cpu'):
            model(torch.randn(1, 3, 64, 64, device='cuda'))


def load(scope, **backbone):
    """Config and model of a task, and two batches. May change the backbone."""
    if scope == 'mmdet' and not is_stand_in():
        pytest.skip("mmcv's compiled ops cannot pretend")
    cfg = Config.fromfile(NANO[scope])
    cfg.model.backbone.update(backbone)
    replace_sync_bn(cfg.model)
    batches = [synthetic_batch(cfg, 2, largest_size(cfg)) for _ in range(2)]
    for sample in (x for batch in batches for x in batch['data_samples']):
        sample.set_metainfo(dict(ori_shape=sample.get('img_shape')))
    return cfg, build(cfg), batches


def build_wrapper(model, cfg, amp):
    cfg = dict(copy.deepcopy(cfg), type='AmpOptimWrapper' if amp else 'OptimWrapper')
    cfg.pop('loss_scale', None)
    if amp:
        cfg.update(dtype=amp, loss_scale='dynamic' if amp == 'float16' else 1.0)
    return build_optim_wrapper(model, cfg)


def check_update(model, batches, wrapper, number=0):
    """Make an update, and look at the logs, the weights and the optimiser."""
    count_in_micro_batches(wrapper, len(batches), number, 9)
    before = describe(model.parameters())
    logs = train_step(model, copy.deepcopy(batches), wrapper, (0, number))
    assert all(value.is_cuda for value in logs.values())
    assert all(x.is_cuda for x in model.state_dict().values())
    assert describe(model.parameters()) == before
    # An update that the scaler skips would leave no averages.
    averages = [state['exp_avg'] for state in wrapper.optimizer.state.values()]
    assert len(averages) == sum(x.requires_grad for x in model.parameters())
    assert all(x.is_cuda for x in averages)
    return logs


def check_prediction(model, batch, amp):
    with torch.no_grad(), autocast(amp):
        found = model.eval().val_step(copy.deepcopy(batch))
    assert len(found) == len(batch['data_samples'])
    return found


@pytest.mark.parametrize(
    'amp, micro_batches, ops',
    [(None, 1, 'eager'), ('float16', 1, 'fused'), ('bfloat16', 2, 'naive')],
)
@pytest.mark.parametrize('scope', NANO)
def test_update_and_prediction(scope, amp, micro_batches, ops, monkeypatch):
    monkeypatch.setenv('MLLA_OPS', ops)
    cfg, model, batches = load(scope)
    with DefaultScope.overwrite_default_scope(scope), pretended_cuda():
        model = model.to('cuda').train()
        wrapper = build_wrapper(model, cfg.optim_wrapper, amp)
        check_update(model, batches[:micro_batches], wrapper)
        check_prediction(model, batches[0], amp)


@pytest.mark.parametrize('scope', NANO)
def test_study_in_each_task(scope):
    mixer = dict(input_gate=True, rope=True)
    cfg, model, batches = load(scope, type='LinearAttentionSwin', token_mixer=mixer)
    with DefaultScope.overwrite_default_scope(scope), pretended_cuda():
        model = model.to('cuda').train()
        wrapper = build_wrapper(model, cfg.optim_wrapper, 'float16')
        check_update(model, batches[:1], wrapper)
        check_prediction(model, batches[0], 'float16')


@pytest.mark.parametrize('amp', [None, 'float16', 'bfloat16'])
def test_mesa(amp):
    cfg, model, batches = load('mmpretrain')
    with DefaultScope.overwrite_default_scope('mmpretrain'), pretended_cuda():
        model = model.to('cuda').train()
        average = ModelEMA(model, 0.5)
        assert describe(average.module.parameters()) == describe(model.parameters())
        model.set_teacher(average.module)
        wrapper = build_wrapper(model, cfg.optim_wrapper, amp)
        for number, batch in enumerate(batches):
            assert 'loss_mesa' in check_update(model, [batch], wrapper, number)
            average.update(model)
        assert all(x.is_cuda for x in average.module.state_dict().values())
        check_prediction(average.module, batches[0], amp)
