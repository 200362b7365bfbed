# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import copy
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from mlla_mm.engine.ema import ModelEMA, recipe_decay
from mlla_mm.engine.options import add_hook
from mlla_mm.models import MLLA

pytest.importorskip('mmpretrain')
from mmengine.dataset import default_collate  # noqa: E402
from mmpretrain.structures import DataSample  # noqa: E402

CONFIG = 'configs/classification/mlla-nano_digits.py'
ROOT = Path(__file__).parents[2]
RECIPE = 'configs/_base_/models/mlla_classifier.py'
ARCH = dict(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))
BATCH, BATCHES, EPOCHS = 4, 4, 8
START = int(0.25 * EPOCHS) * BATCHES
RUNNER_KEYS = (
    'model work_dir train_dataloader train_cfg optim_wrapper param_scheduler '
    'default_hooks custom_hooks load_from resume randomness default_scope '
    'log_processor experiment_name'
).split()
DECAY, WEIGHT, RATE = 0.9, 1.5, 2e-3


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmpretrain')


class Noise(Dataset):
    """Images of noise that depend on their index alone."""

    metainfo = dict(classes=tuple('0123456789'))

    def __len__(self):
        return BATCH * BATCHES

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        image = torch.from_numpy(rng.integers(0, 256, (3, 32, 32), dtype=np.uint8))
        return dict(inputs=image, data_samples=DataSample().set_gt_label(index % 10))


class Observer(Hook):
    """Seed every iteration; record losses and weights after it; stop when told."""

    priority = 'VERY_LOW'

    def __init__(self, stop_after=None):
        self.stop_after = stop_after
        self.losses, self.weights = [], []

    def before_train(self, runner):
        self.initial = copy.deepcopy(runner.model.state_dict())

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        seed(runner.iter)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(outputs['loss'].item())
        self.weights.append(copy.deepcopy(runner.model.state_dict()))

    def after_train_epoch(self, runner):
        if runner.epoch + 1 == self.stop_after:
            runner.train_loop.stop_training = True


def seed(iteration):
    torch.manual_seed(iteration)
    np.random.seed(iteration)


def config(work_dir) -> Config:
    cfg = Config.fromfile(ROOT / CONFIG)
    cfg.work_dir = str(work_dir)
    cfg.model.backbone.update(arch=ARCH, drop_path_rate=0.2)
    cfg.model.head.in_channels = 64
    cfg.model.mesa_weight = WEIGHT
    cfg.model.train_cfg = Config.fromfile(ROOT / RECIPE).model.train_cfg
    cfg.default_hooks.mesa.decay = DECAY
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=1)
    # Our loops would need a config of the data loader.
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=EPOCHS)
    cfg.param_scheduler.end = EPOCHS
    cfg.optim_wrapper.optimizer.lr = RATE
    cfg.randomness = dict(seed=0)
    for split in ('val', 'test'):
        cfg[f'{split}_dataloader'] = cfg[f'{split}_cfg'] = None
        cfg[f'{split}_evaluator'] = None
    return cfg


def run(cfg, stop_after=None):
    cfg.train_dataloader = DataLoader(
        Noise(), batch_size=BATCH, collate_fn=default_collate
    )
    cfg.experiment_name = f'{Path(cfg.work_dir).name}-{np.random.randint(1 << 30)}'
    runner = Runner(**{key: cfg[key] for key in RUNNER_KEYS if key in cfg})
    observer = Observer(stop_after)
    runner.register_hook(observer)
    runner.train()
    return runner, observer


def checkpoint(work_dir, epoch):
    path = Path(work_dir) / f'epoch_{epoch}.pth'
    return torch.load(path, map_location='cpu', weights_only=False)


class Reference(nn.Module):
    """The classifier without mmpretrain."""

    def __init__(self):
        super().__init__()
        self.backbone = MLLA(ARCH, drop_path_rate=0.2, out_indices=3)
        self.head = nn.ModuleDict(dict(fc=nn.Linear(64, 10)))

    def forward(self, images):
        (feature,) = self.backbone(images)
        return self.head.fc(F.adaptive_avg_pool2d(feature, 1).flatten(1))


def learning_rate(iteration):
    t, warmup = max(iteration - 1, 0), 2 * BATCHES
    low, least = RATE * 1e-3, RATE * 1e-2
    if t < warmup:
        return low + t * (RATE - low) / warmup
    cosine = math.cos(math.pi * t / (EPOCHS * BATCHES))
    return least + (RATE - least) * (1 + cosine) / 2


def train_by_hand(initial, preprocess):
    """Train in plain PyTorch; return losses, weights and average."""
    model = Reference().train()
    model.load_state_dict(initial)
    teacher = copy.deepcopy(model).eval()
    average = {key: value.clone() for key, value in model.state_dict().items()}
    groups = [
        dict(params=[p], weight_decay=0.05 if p.dim() > 1 else 0.0)
        for p in model.parameters()
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    losses = []
    for iteration in range(EPOCHS * BATCHES):
        first = iteration % BATCHES * BATCH
        data = default_collate([Noise()[first + i] for i in range(BATCH)])
        seed(iteration)
        mixed = preprocess(data, training=True)
        labels = torch.stack([sample.gt_score for sample in mixed['data_samples']])
        labels = 0.9 * labels + 0.1 / 10
        logits = model(mixed['inputs'])
        loss = -(labels * logits.log_softmax(1)).sum() / BATCH
        if iteration >= START:
            teacher.load_state_dict(average)
            with torch.no_grad():
                target = teacher(mixed['inputs']).softmax(1)
            loss = loss + WEIGHT * F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(iteration)
        optimizer.step()
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                average[key] = average[key].lerp(value, 1 - DECAY)
            else:
                average[key] = value.clone()
        losses.append(loss.item())
    return losses, model.state_dict(), average


def assert_equal(actual, expected):
    torch.testing.assert_close(dict(actual), dict(expected), rtol=0, atol=0)


def test_training_equals_a_plain_loop_also_when_resumed(tmp_path):
    runner, whole = run(config(tmp_path / 'whole'))
    losses, weights, average = train_by_hand(
        whole.initial, runner.model.data_preprocessor
    )
    assert len(losses) - START >= 20
    np.testing.assert_allclose(whole.losses, losses, rtol=1e-6)
    final = checkpoint(tmp_path / 'whole', EPOCHS)
    for actual, expected in (('state_dict', weights), ('state_dict_ema', average)):
        torch.testing.assert_close(
            dict(final[actual]), dict(expected), rtol=1e-5, atol=1e-7
        )

    _, before = run(config(tmp_path / 'parts'), stop_after=4)
    cfg = config(tmp_path / 'parts')
    cfg.resume = True
    _, after = run(cfg)
    assert len(before.losses) == 4 * BATCHES > START
    assert before.losses + after.losses == whole.losses
    resumed = checkpoint(tmp_path / 'parts', EPOCHS)
    assert_equal(resumed['state_dict'], final['state_dict'])
    assert_equal(resumed['state_dict_ema'], final['state_dict_ema'])


def average_by_hand(initial, weights, decay):
    average = {key: value.double() for key, value in initial.items()}
    for state in weights:
        for key, value in state.items():
            average[key] = decay * average[key] + (1 - decay) * value.double()
            if not value.is_floating_point():
                average[key] = value
    return average


class SkippingOptimWrapper(OptimWrapper):
    """Skips every other step, as a gradient scaler does after an overflow."""

    steps = 0

    def step(self, **kwargs):
        self.steps += 1
        if self.steps % 2:
            super().step(**kwargs)


@pytest.mark.parametrize('accumulated', [1, 2])
@pytest.mark.parametrize('wrapper', [OptimWrapper, SkippingOptimWrapper])
def test_one_update_per_optimiser_step(tmp_path, accumulated, wrapper):
    cfg = config(tmp_path)
    cfg.optim_wrapper.update(type=wrapper, accumulative_counts=accumulated)
    cfg.train_cfg.max_epochs = cfg.param_scheduler.end = 2
    cfg.param_scheduler.warmup = 0
    _, observer = run(cfg)
    expected = average_by_hand(
        observer.initial, observer.weights[accumulated - 1 :: accumulated], DECAY
    )
    actual = checkpoint(tmp_path, 2)['state_dict_ema']
    assert set(actual) == set(expected)
    for key, value in actual.items():
        torch.testing.assert_close(
            value.double(), expected[key].double(), rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize('accumulated', [1, 4])
def test_decay_follows_the_total_batch_size(tmp_path, accumulated):
    cfg = config(tmp_path)
    cfg.default_hooks.mesa = dict(type='MESAHook')
    cfg.optim_wrapper.accumulative_counts = accumulated
    cfg.train_cfg.max_epochs = cfg.param_scheduler.end = 2
    runner, _ = run(cfg)
    (hook,) = (h for h in runner.hooks if type(h).__name__ == 'MESAHook')
    assert hook.ema.decay == 0.9996 ** (BATCH * accumulated / 4096)


def test_recipe_decay():
    assert 1 - recipe_decay(1024) == pytest.approx(1.00015e-4, rel=1e-5)
    assert 1 - recipe_decay(512) == pytest.approx(5.0009e-5, rel=1e-5)


def test_teacher_starts_at_a_quarter_and_leaves_at_the_end(tmp_path):
    class Seen(Hook):
        teaches = []

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            self.teaches.append('loss_mesa' in outputs)

    cfg = config(tmp_path)
    cfg.train_cfg.max_epochs = cfg.param_scheduler.end = 7
    cfg.custom_hooks = [Seen()]
    runner, _ = run(cfg)
    assert Seen.teaches == [False] * BATCHES + [True] * 6 * BATCHES
    runner.model.train()
    data = default_collate([Noise()[i] for i in range(BATCH)])
    data = runner.model.data_preprocessor(data, training=True)
    assert 'loss_mesa' not in runner.model(**data, mode='loss')


def test_average_starts_at_loaded_weights(tmp_path):
    cfg = config(tmp_path / 'first')
    cfg.train_cfg.max_epochs = cfg.param_scheduler.end = 2
    run(cfg)
    path = tmp_path / 'first' / 'epoch_2.pth'
    cfg = config(tmp_path / 'second')
    cfg.load_from = str(path)
    # The average hardly moves from its start.
    cfg.default_hooks.mesa.decay = 1 - 1e-12
    _, observer = run(cfg, stop_after=1)
    first = checkpoint(tmp_path / 'first', 2)
    assert_equal(observer.initial, first['state_dict'])
    average = checkpoint(tmp_path / 'second', 1)['state_dict_ema']
    for key, value in first['state_dict'].items():
        if value.is_floating_point():
            torch.testing.assert_close(average[key], value)


def test_resuming_a_checkpoint_without_average(tmp_path):
    run(config(tmp_path), stop_after=1)
    path = tmp_path / 'epoch_1.pth'
    plain = checkpoint(tmp_path, 1)
    del plain['state_dict_ema']
    torch.save(plain, path)
    cfg = config(tmp_path)
    cfg.resume = True
    with pytest.raises(ValueError, match="no averaged weights .'state_dict_ema'"):
        run(cfg)


def test_needs_a_mesa_classifier(tmp_path):
    cfg = config(tmp_path)
    cfg.model.type = 'ImageClassifier'
    del cfg.model['mesa_weight']
    with pytest.raises(ValueError, match='MESAClassifier, but the model is a Image'):
        run(cfg)


@pytest.mark.parametrize('kwargs', [dict(decay=1.0), dict(decay=-0.1)])
def test_bad_decay(kwargs):
    with pytest.raises(ValueError, match='decay must be in'):
        ModelEMA(nn.Linear(1, 1), **kwargs)


@pytest.fixture(scope='module')
def digits_imagenet(tmp_path_factory):
    from mlla_mm.datasets.digits import make_imagenet

    return make_imagenet(
        tmp_path_factory.mktemp('data') / 'digits', train=40, val=14, size=32
    )


def test_two_processes(tmp_path, digits_imagenet, run_tool):
    options = [
        f'{split}_dataloader.dataset.data_root={digits_imagenet}'
        for split in ('train', 'val', 'test')
    ]
    options += [
        'model.backbone.arch.embed_dims=8',
        'model.backbone.arch.num_heads=1,1,2,2',
        'model.head.in_channels=64',
        'train_dataloader.batch_size=4',
        'train_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False',
        'val_dataloader.batch_size=4',
        'train_cfg.max_epochs=2',
        'param_scheduler.end=2',
        'param_scheduler.warmup=1',
        'default_hooks.mesa.decay=None',
        'default_hooks.mesa.start=0.5',
        'optim_wrapper.accumulative_counts=2',
    ]
    result = run_tool(
        'python', 'tools/train.py', CONFIG, '--work-dir', tmp_path, '--seed', 0,
        '--launcher', 'pytorch', '--cfg-options', *options, processes=2,
    )  # fmt: skip
    assert 'EMA decay 0.99999844 for a total batch size of 16.' in result.stdout
    # 40 images are 5 batches of 2 x 4. The teacher starts in the second epoch.
    teaching = [line for line in result.stdout.splitlines() if 'loss_mesa' in line]
    assert teaching
    assert all(re.search(r'Epoch\(train\) +\[2\]', line) for line in teaching)
    pattern = r'(?<!ema_)accuracy/top1: [\d.]+ .* ema_accuracy/top1: [\d.]+'
    assert len(re.findall(pattern, result.stdout)) == 2
    last = checkpoint(tmp_path, 2)
    for kind in ('', 'ema_'):
        (best,) = tmp_path.glob(f'best_{kind}accuracy_top1_epoch_*.pth')
        saved = torch.load(best, map_location='cpu', weights_only=False)
        assert set(saved['state_dict_ema']) == set(saved['state_dict'])
        score = last['message_hub']['runtime_info'][f'best_score_{kind}accuracy/top1']
        evaluated = evaluate(tmp_path, best, digits_imagenet, ema=kind == 'ema_')
        assert evaluated['accuracy/top1'] == pytest.approx(score)


def evaluate(work_dir, path, data_root, ema):
    """Accuracy of a checkpoint's weights in one process."""
    cfg = Config.fromfile(ROOT / CONFIG)
    cfg.work_dir = str(work_dir / 'test')
    cfg.load_from = str(path)
    cfg.model.backbone.arch = dict(ARCH, depths=(1, 1, 2, 1))
    cfg.model.head.in_channels = 64
    cfg.test_dataloader.dataset.data_root = str(data_root)
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.experiment_name = path.stem
    if ema:
        add_hook(cfg, 'UseEMAWeightsHook')
    return Runner.from_cfg(cfg).test()


def test_ema_weights_are_asked_for_in_vain(tmp_path, digits_imagenet):
    path = tmp_path / 'plain.pth'
    torch.save(dict(state_dict={}), path)
    with pytest.raises(ValueError, match='no averaged weights'):
        evaluate(tmp_path, path, digits_imagenet, ema=True)
