# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mlla_mm.engine.ema import ModelEMA

pytest.importorskip('mmpretrain')
from mmpretrain.structures import DataSample  # noqa: E402

CONFIGS = Path(__file__).parents[2] / 'configs' / 'classification'


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmpretrain')


def build(name: str, **changes):
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    cfg.merge_from_dict(changes)
    return MODELS.build(cfg.model)


def build_nano(**changes):
    model = build('mlla-nano_digits', **changes)
    model.init_weights()
    return model


def batch(size: int = 4):
    samples = [
        DataSample().set_gt_score(torch.rand(10).softmax(0)).set_gt_label(0)
        for _ in range(size)
    ]
    return torch.randn(size, 3, 32, 32), samples


@pytest.mark.parametrize(
    'name, gflops',
    [
        ('t_8xb128', 4.149),
        pytest.param('s_8xb64', 7.278, marks=pytest.mark.slow),
        pytest.param('b_8xb64', 16.157, marks=pytest.mark.slow),
    ],
)
def test_flops(name, gflops):
    from mmengine.analysis import get_model_complexity_info

    model = build(f'mlla-{name}_in1k').eval()
    info = get_model_complexity_info(model, input_shape=(3, 224, 224))
    assert info['flops'] / 1e9 == pytest.approx(gflops, rel=1e-3)


def test_initial_head():
    model = build('mlla-t_8xb128_in1k')
    model.init_weights()
    assert model.head.fc.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert model.head.fc.bias.abs().max() == 0


def cross_entropy(logits, target):
    return -(target * logits.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize('weight', [1.0, 2.5])
def test_losses_are_the_definition(weight):
    model = build_nano(**{'model.mesa_weight': weight}).train()
    inputs, samples = batch()
    teacher = ModelEMA(build_nano(), 0.5).module
    model.set_teacher(teacher)
    losses = model.loss(inputs, samples)
    # There is no stochastic depth, so a second forward pass gives the same.
    logits = model(inputs)
    label = 0.9 * torch.stack([s.gt_score for s in samples]) + 0.1 / 10
    expected = dict(
        loss_ce=cross_entropy(logits, label),
        loss_mesa=weight * cross_entropy(logits, teacher(inputs).softmax(1)),
    )
    torch.testing.assert_close(losses, expected)
    sum(losses.values()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in model.parameters())


def test_without_teacher_or_weight_the_loss_is_the_heads():
    model = build_nano().eval()
    inputs, samples = batch()
    expected = dict(
        loss_ce=model.head.loss(model.extract_feat(inputs), samples)['loss']
    )
    torch.testing.assert_close(model.loss(inputs, samples), expected)
    model.set_teacher(ModelEMA(model, 0.5).module)
    assert 'loss_mesa' in model.loss(inputs, samples)
    model.set_teacher(None)
    torch.testing.assert_close(model.loss(inputs, samples), expected)
    model.set_teacher(ModelEMA(model, 0.5).module)
    model.mesa_weight = 0.0
    torch.testing.assert_close(model.loss(inputs, samples), expected)


def test_teacher_is_no_part_of_the_model():
    model = build_nano()
    parameters, state = list(model.parameters()), list(model.state_dict())
    teacher = ModelEMA(model, 0.5).module
    model.set_teacher(teacher)
    assert list(model.state_dict()) == state
    assert len(list(model.parameters())) == len(parameters)
    assert teacher not in set(model.modules())
    model.train()
    assert not any(module.training for module in teacher.modules())


def test_teacher_runs_under_the_students_autocast():
    model = build_nano().train()
    inputs, samples = batch()
    teacher = ModelEMA(model, 0.5).module
    model.set_teacher(teacher)
    dtypes = []
    for head in (model.head.fc, teacher.head.fc):
        head.register_forward_hook(lambda _, __, logits: dtypes.append(logits.dtype))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = model.loss(inputs, samples)
    assert dtypes == [torch.bfloat16, torch.bfloat16]
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_negative_weight():
    with pytest.raises(ValueError, match='mesa_weight must be at least 0, got -1'):
        build('mlla-nano_digits', **{'model.mesa_weight': -1.0})
