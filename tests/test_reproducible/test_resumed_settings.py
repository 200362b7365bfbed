# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
"""Real runs of a tiny model, resumed under other configs.

A resumed run is compared with one of the same config that was not interrupted.
"""

import copy
import os
import re
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import OPTIMIZERS, PARAM_SCHEDULERS
from mmengine.runner import Runner
from torch import distributed, nn

from mlla_mm.checkpoints.reader import CheckpointError
from mlla_mm.engine.recipe import describe_run
from mlla_mm.reproducible.resume import newest_checkpoint
from mlla_mm.reproducible.resumed_settings import _settle_precision
from mlla_mm.reproducible.schedule_replay import replay

IMAGES = 20


class Tiny(BaseModel):
    def __init__(self, frozen=False):
        super().__init__()
        self.body = nn.Linear(2, 4).requires_grad_(not frozen)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 1)

    def forward(self, inputs, mode):
        outputs = self.head(self.norm(self.body(inputs)))
        if mode == 'loss':
            return dict(loss=outputs.square().mean())
        return list(outputs.detach())


class WithTwo(Tiny):
    def train_step(self, data, optim_wrapper):
        losses = self(**self.data_preprocessor(data, True), mode='loss')
        loss, logs = self.parse_losses(losses)
        for wrapper in optim_wrapper.values():
            wrapper.zero_grad()
        loss.backward()
        for wrapper in optim_wrapper.values():
            wrapper.step()
        return logs


class Score(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += [0.0] * len(data_samples)

    def compute_metrics(self, results):
        return dict(score=0.5)  # it never gets better


class Rates(Hook):
    """The hyperparameters in force in each iteration."""

    def __init__(self):
        self.found = {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        wrapper = runner.optim_wrapper
        wrappers = dict(wrapper.items()) if hasattr(wrapper, 'items') else {'': wrapper}
        self.found[runner.iter] = [
            {k: v for k, v in group.items() if k != 'params'}
            for one in wrappers.values()
            for group in one.param_groups
        ]


@pytest.fixture
def train(tmp_path, caplog):
    """Train and return the rates by iteration, the lines of the hook and the runner."""

    def run(
        name, length, resume=None, by_epoch=True, batch=4, optimizer=None,
        schedule=None, paramwise=True, ours=True, model=None, wrapper=None, hooks=(),
        interval=1, settings='ResumedSettingsHook', **more,
    ):  # fmt: skip
        unit, loop = ('epochs', 'Epoch') if by_epoch else ('iters', 'Iter')
        optimizer = {
            'type': 'AdamW',
            'lr': 0.1,
            'weight_decay': 0.05,
            **(optimizer or {}),
        }
        wrapper = wrapper or dict(optimizer=optimizer)
        if paramwise:
            wrapper['paramwise_cfg'] = dict(
                custom_keys=dict(body=dict(lr_mult=10), norm=dict(decay_mult=0.0))
            )
        data = [dict(inputs=torch.randn(2)) for _ in range(IMAGES)]
        rates = Rates()
        default_hooks = dict(
            checkpoint=dict(
                type='CheckpointHook', interval=interval, by_epoch=by_epoch
            ),
            resumed_state=dict(type='ResumedStateHook'),
            resumed_settings=dict(type=settings),
        )
        torch.manual_seed(0)
        runner = Runner(
            model or Tiny(),
            str(tmp_path / name),
            train_dataloader=dict(
                batch_size=batch, num_workers=0, dataset=data,
                sampler=dict(type=f'{"Default" if by_epoch else "Infinite"}Sampler'),
                collate_fn=dict(type='default_collate'),
            ),
            train_cfg=dict(
                type=f'{"Seeded" if ours else ""}{loop}BasedTrainLoop',
                **{f'max_{unit}': length},
            ),
            val_dataloader=dict(
                batch_size=4, dataset=data, sampler=dict(type='DefaultSampler'),
                collate_fn=dict(type='default_collate'),
            ),
            val_cfg=dict(),
            val_evaluator=[Score()],
            optim_wrapper=wrapper,
            param_scheduler=schedule,
            default_hooks=default_hooks,
            custom_hooks=[rates, *hooks],
            randomness=dict(seed=1),
            resume=resume is not None,
            load_from=resume and str(resume),
            experiment_name=f'{name}_{os.urandom(4).hex()}',
            default_scope='mmengine',
            **more,
        )  # fmt: skip
        runner.train()
        (log,) = (tmp_path / name).glob(f'*/{runner.timestamp}.log')
        lines = re.findall(r'From iteration \d+ on: .*', log.read_text())
        return SimpleNamespace(rates=rates.found, lines=lines, runner=runner)

    return run


POLY = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=4),
    dict(type='PolyLR', power=0.9, eta_min=1e-3, by_epoch=False),
]
STEPS = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=7),
    dict(type='MultiStepLR', by_epoch=True, milestones=[1, 3], gamma=0.1),
]
COSINE = [
    dict(type='CosineAnnealingLR', eta_min_ratio=0.01, convert_to_iter_based=True)
]
WARMUP_COSINE = dict(type='WarmupCosineLR', warmup=1, convert_to_iter_based=True)
MOMENTUM = [*STEPS, dict(type='CosineAnnealingMomentum', T_max=4, eta_min=0.5)]


def later(rates, first):
    return {i: x for i, x in rates.items() if i >= first}


@pytest.mark.parametrize('ours', [True, False], ids=['ours', 'MMEngine'])
@pytest.mark.parametrize(
    'schedule',
    [None, POLY, STEPS, COSINE, WARMUP_COSINE, MOMENTUM],
    ids=['none', 'poly', 'steps', 'cosine', 'warm-up', 'momentum'],
)
def test_nothing_is_said_or_changed_if_nothing_differs(train, tmp_path, schedule, ours):
    options = dict(schedule=schedule, ours=ours)
    expected = train('whole', 4, **options).rates
    path = tmp_path / 'whole/epoch_2.pth'
    resumed = train('resumed', 4, path, **options)
    assert resumed.lines == []
    assert resumed.rates == later(expected, 10)


CHANGES = {
    'longer': (dict(length=6), ['max_epochs 6 instead of 4']),
    'rate': (dict(optimizer=dict(lr=0.05)), ['learning rate 0.05 instead of 0.1']),
    'decay': (
        dict(optimizer=dict(weight_decay=0.1)),
        ['weight_decay 0.1 instead of 0.05 in 4 of 6 parameter groups'],
    ),
    'betas': (dict(optimizer=dict(betas=(0.8, 0.99))), ['betas']),
    'schedule': (dict(schedule=COSINE), ['schedule CosineAnnealingLR instead of']),
    'none': (dict(schedule=None), ['schedule constant instead of']),
    'batch': (
        dict(batch=2),
        ['total batch 2 instead of 4', '10 iterations an epoch instead of 5'],
    ),
    'much': (
        dict(batch=2, length=5, optimizer=dict(lr=0.3, weight_decay=0.0)),
        ['max_epochs 5 instead of 4', 'learning rate 0.3', 'weight_decay 0 instead'],
    ),
}


@pytest.mark.parametrize(
    'schedule, ours',
    [(POLY, True), (STEPS, True), (MOMENTUM, True), (STEPS, False)],
    ids=['poly', 'steps', 'momentum', 'MMEngine'],
)
@pytest.mark.parametrize('change', CHANGES)
def test_what_the_config_says_is_in_force(train, tmp_path, change, schedule, ours):
    changes, said = CHANGES[change]
    train('first', 4, schedule=schedule, ours=ours)
    options = {'length': 4, 'schedule': schedule, 'ours': ours, **changes}
    resumed = train('resumed', resume=tmp_path / 'first/epoch_2.pth', **options)
    expected = later(train('whole', **options).rates, 20 if 'batch' in changes else 10)
    assert resumed.rates == expected
    assert resumed.lines
    for text in said:
        if not ('betas' in said and schedule is MOMENTUM):
            assert any(text in line for line in resumed.lines), resumed.lines
    first = min(expected) + 1
    assert all(x.startswith(f'From iteration {first} on: ') for x in resumed.lines)
    # Of the groups without a factor.
    rate = min(group['lr'] for group in resumed.rates[min(expected)])
    at = [line for line in resumed.lines if 'the schedule is at' in line]
    assert all(f'at learning rate {rate:.6g}, not' in line for line in at)
    # What the run has learnt is still there.
    path = newest_checkpoint(tmp_path / 'resumed')
    steps = torch.load(path, weights_only=False)['optimizer']['state'][0]['step']
    assert steps == 10 + len(expected)
    # The next resumption finds nothing to change.
    again = train('again', resume=path, **{**options, 'length': options['length'] + 1})
    longer = r'max_epochs|\.end|\.total_iters|\.T_max|the schedule is at'
    assert all(re.search(longer, line) for line in again.lines), again.lines


@pytest.mark.parametrize('ours', [True, False], ids=['ours', 'MMEngine'])
@pytest.mark.parametrize(
    'changes',
    [dict(length=12), dict(optimizer=dict(lr=0.01)), dict(batch=2)],
    ids=['longer', 'rate', 'batch'],
)
def test_a_run_over_iterations(train, tmp_path, changes, ours):
    options = dict(schedule=POLY, by_epoch=False, ours=ours, interval=3)
    train('first', 9, **options)
    path = tmp_path / 'first/iter_6.pth'
    options = {'length': 9, **options, **changes}
    resumed = train('resumed', resume=path, **options)
    assert resumed.rates == later(train('whole', **options).rates, 6)
    assert all(x.startswith('From iteration 7 on') for x in resumed.lines)
    assert len(resumed.lines) >= 1
    if 'batch' in changes:
        assert resumed.lines == ['From iteration 7 on: total batch 2 instead of 4.']


def test_a_run_over_iterations_is_not_one_over_epochs(train, tmp_path):
    train('epochs', 2)
    train('iterations', 4, by_epoch=False)
    with pytest.raises(CheckpointError, match='counts epochs.*max_epochs'):
        train('a', 20, tmp_path / 'epochs/epoch_1.pth', by_epoch=False)
    with pytest.raises(CheckpointError, match='counts iterations.*max_iters'):
        train('b', 4, tmp_path / 'iterations/iter_3.pth')


def test_a_shorter_run(train, tmp_path):
    train('first', 4)
    for length in (1, 2):
        with pytest.raises(CheckpointError, match='max_epochs is .*to 3 or more'):
            train('short', length, tmp_path / 'first/epoch_3.pth')
    assert train('equal', 3, tmp_path / 'first/epoch_3.pth').rates == {}
    train('iterations', 4, by_epoch=False)
    with pytest.raises(CheckpointError, match='max_iters is 3. Set it to 4 or more'):
        train('short', 3, tmp_path / 'iterations/iter_4.pth', by_epoch=False)


REFUSED = {
    'kind': (dict(optimizer=dict(type='SGD')), 'kind.*no dampening'),
    'moments': (dict(optimizer=dict(amsgrad=True)), 'has no max_exp_avg_sq'),
    'groups': (dict(paramwise=False), '6 parameters in 1 groups.*6 parameters in 6'),
}


@pytest.mark.parametrize('change', REFUSED)
def test_what_cannot_be_applied_is_refused(train, tmp_path, change):
    changes, reason = REFUSED[change]
    train('first', 2)
    with pytest.raises(CheckpointError, match=f'epoch_1.pth.*{reason}.*load_from'):
        train('resumed', 2, tmp_path / 'first/epoch_1.pth', **changes)


def test_other_parameters_are_refused(train, tmp_path):
    train('first', 2, paramwise=False)
    larger = Tiny()
    larger.extra = nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match='8 parameters in 1 .* 6 parameters in 1'):
        path = tmp_path / 'first/epoch_1.pth'
        train('resumed', 2, path, model=larger, paramwise=False)


def test_a_begun_epoch_of_another_length_begins_anew(train, tmp_path):
    train('first', 3, schedule=POLY)
    path = tmp_path / 'first/epoch_2.pth'
    saved = torch.load(path, weights_only=False)
    # As PreemptionHook saves it after two of five iterations.
    saved['meta'].update(epoch=1, iter=7)
    begun = dict(epoch=1, iter=5, updates=5)
    saved['message_hub']['runtime_info']['epoch_begun'] = begun
    torch.save(saved, path)
    options = dict(schedule=POLY, batch=2)
    resumed = train('resumed', 3, path, **options)
    assert resumed.rates == later(train('whole', 3, **options).rates, 10)
    assert any('epoch 2, which begins anew' in line for line in resumed.lines)
    with pytest.raises(CheckpointError, match='max_epochs is 1'):
        train('short', 1, path, schedule=POLY)


PLATEAU = dict(
    type='ReduceOnPlateauLR', monitor='score', rule='greater', patience=1, end=99
)


def test_a_schedule_that_follows_a_metric_goes_on(train, tmp_path):
    schedule = [STEPS[0], PLATEAU]
    expected = train('whole', 9, schedule=schedule).rates
    train('first', 4, schedule=schedule)
    path = tmp_path / 'first/epoch_4.pth'
    resumed = train('resumed', 9, path, schedule=schedule)
    # MMEngine saves before it evaluates, so one evaluation is not counted.
    assert resumed.rates[34] == expected[34] != expected[40] == resumed.rates[40]
    (line,) = resumed.lines
    assert 'From iteration 21 on: train_cfg.max_epochs 9 instead of 4' in line
    patient = [STEPS[0], dict(PLATEAU, patience=9)]
    constant = train('patient', 8, path, schedule=patient)
    assert constant.rates[39][0]['lr'] == resumed.rates[20][0]['lr']
    assert any('.patience 9 instead of 1' in line for line in constant.lines)
    # What it has seen counts on, unless it looks for something else.
    assert constant.runner.param_schedulers[1].num_bad_epochs == 4
    turned = [STEPS[0], dict(patient[1], rule='less')]
    other = train('turned', 8, path, schedule=turned)
    assert other.runner.param_schedulers[1].num_bad_epochs == 3
    for changes in (
        dict(optimizer=dict(lr=0.2)), dict(schedule=[PLATEAU]), dict(batch=2),
        dict(schedule=[dict(STEPS[0], end=9), PLATEAU]), dict(schedule=STEPS),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match='ReduceOnPlateau has set its rate'):
            train('other', 8, path, **{'schedule': schedule, **changes})


def test_other_layers_may_be_frozen(train, tmp_path):
    options = dict(schedule=STEPS, paramwise=False)
    train('first', 2, **options)
    path = tmp_path / 'first/epoch_1.pth'
    assert train('resumed', 2, path, model=Tiny(frozen=True), **options).lines == []
    path = newest_checkpoint(tmp_path / 'resumed')
    thawed = train('thawed', 3, path, **options)
    assert not any('learning rate' in line for line in thawed.lines)
    saved = torch.load(newest_checkpoint(tmp_path / 'thawed'), weights_only=False)
    steps = [x['step'].item() for x in saved['optimizer']['state'].values()]
    assert steps == [10, 10, 15, 15, 15, 15]


def test_a_checkpoint_without_the_optimizer(train, tmp_path):
    expected = train('first', 4, schedule=POLY).rates
    path = tmp_path / 'first/epoch_2.pth'
    saved = torch.load(path, weights_only=False)
    del saved['optimizer']
    torch.save(saved, path)
    resumed = train('resumed', 4, path, schedule=POLY)
    assert any('moments start at zero' in line for line in resumed.lines)
    assert resumed.rates == later(expected, 10)


@pytest.mark.parametrize(
    'state', [7, {}, dict(param_groups=3, state={}), dict(param_groups=[1], state={})]
)
def test_a_state_that_no_training_saves(train, tmp_path, state):
    train('first', 2)
    path = tmp_path / 'first/epoch_1.pth'
    saved = torch.load(path, weights_only=False)
    torch.save(dict(saved, optimizer=state), path)
    with pytest.raises(CheckpointError, match='not as a training saves it'):
        train('resumed', 2, path)
    hostile = dict(saved, param_schedulers=[dict(param_name=[1]), 'x', None])
    torch.save(hostile, path)
    assert train('hostile', 2, path).rates


DAMAGES = {
    'rate': (['optimizer', 'param_groups', 2, 'lr'], 'x', 'lr of its optimiser is x'),
    'nan': (['optimizer', 'param_groups', 0, 'lr'], float('nan'), 'lr .* is nan'),
    'negative': (['optimizer', 'param_groups', 0, 'lr'], -1.0, 'lr .* is -1.0'),
    'betas': (['optimizer', 'param_groups', 5, 'betas'], None, 'has no betas'),
    'place': (['optimizer', 'param_groups', 1, 'params', 0], [], 'not as a training'),
    'twice': (['optimizer', 'param_groups', 1, 'params', 0], 0, 'not as a training'),
    'state': (['optimizer', 'state', 2], 3, 'not as a training'),
    'moment': (['optimizer', 'state', 2, 'exp_avg'], 'x', 'such as exp_avg'),
    'shape': (['optimizer', 'state', 1, 'exp_avg'], torch.zeros(3), 'as exp_avg'),
    'lacking': (['optimizer', 'state', 1, 'exp_avg'], None, 'has no exp_avg, which'),
    'step': (['optimizer', 'state', 0, 'step'], torch.tensor(-1.0), 'such as step'),
    'count': (['param_schedulers', 0, '_global_step'], [1], "schedulers' state"),
    'values': (['param_schedulers', 0, '_last_value', 1], 'x', "schedulers' state"),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_values_are_one_error(train, tmp_path, damage):
    keys, value, words = DAMAGES[damage]
    train('first', 2, schedule=POLY)
    path = tmp_path / 'first/epoch_1.pth'
    saved = torch.load(path, weights_only=False)
    part = saved
    for key in keys[:-1]:
        part = part[key]
    if value is None:
        del part[keys[-1]]
    else:
        part[keys[-1]] = value
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=f'{words}.*load_from') as caught:
        train('resumed', 2, path, schedule=POLY)
    assert '\n' not in str(caught.value)


def test_flags_of_logs_that_no_training_saves_are_left_out(train, tmp_path):
    train('first', 2)
    path = tmp_path / 'first/epoch_1.pth'
    saved = torch.load(path, weights_only=False)
    flags = saved['message_hub']['resumed_keys']
    flags.update({'train/lr': [1], 'gone': True, 'training_settings': False})
    torch.save(saved, path)
    assert train('resumed', 2, path).rates


@pytest.mark.parametrize('momentum', [0.0, 0.9])
def test_sgd_goes_on_with_and_without_momentum(train, tmp_path, momentum):
    train('first', 2, optimizer=dict(type='SGD', momentum=momentum))
    path = tmp_path / 'first/epoch_1.pth'
    for new in (0.0, 0.9):
        resumed = train('new', 2, path, optimizer=dict(type='SGD', momentum=new))
        assert {x['momentum'] for x in resumed.rates[5]} == {new}


def test_without_emahook_the_plain_weights_go_on(train, tmp_path):
    hook = dict(type='EMAHook')
    train('first', 2, hooks=[hook])
    path = tmp_path / 'first/epoch_1.pth'
    saved = torch.load(path, weights_only=False)
    average, plain = saved['state_dict'], saved['ema_state_dict']
    assert not torch.equal(average['head.weight'], plain['module.head.weight'])
    resumed = train('resumed', 1, path)
    weights = resumed.runner.model.state_dict()
    assert all(weights[k].equal(plain[f'module.{k}']) for k in weights)
    assert any('no EMAHook' in line for line in resumed.lines)
    again = train('again', 1, path, hooks=[hook])
    assert not any('EMAHook' in line for line in again.lines)


@pytest.mark.parametrize('key', ['state_dict', 'ema_state_dict'])
def test_emahook_resumes_no_weights_that_do_not_fit(train, tmp_path, key):
    kinds = ('EMAHook', 'FreshHeadsHook', 'CheckWeightsHook')
    hooks = [dict(type=kind) for kind in kinds]
    train('first', 2, hooks=hooks)
    path = tmp_path / 'first/epoch_1.pth'
    saved = torch.load(path, weights_only=False)
    name = 'head.weight' if key == 'state_dict' else 'module.head.weight'
    saved[key][name] = torch.ones(2, 4)
    torch.save(saved, path)
    with pytest.raises(CheckpointError, match=r'head.weight: \(2, 4\) in the file'):
        train('resumed', 2, path, hooks=hooks)


@OPTIMIZERS.register_module()
class Counting(torch.optim.SGD):
    """Counts its steps in its groups, as LAMB does; ``pace`` is no argument."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        for group in self.param_groups:
            group['pace'] = 0

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group['step'] = group.get('step', 0) + 1
            group['pace'] += 2


@pytest.mark.parametrize('rate', [0.1, 0.05])
def test_what_an_optimizer_counts_goes_on(train, tmp_path, rate):
    def options(rate):
        wrapper = dict(optimizer=dict(type='Counting', lr=rate))
        return dict(wrapper=wrapper, schedule=POLY, paramwise=False)

    train('first', 4, **options(0.1))
    path = tmp_path / 'first/epoch_2.pth'
    resumed = train('resumed', 4, path, **options(rate))
    assert bool(resumed.lines) == (rate != 0.1)
    assert not any('pace' in line or 'step' in line for line in resumed.lines)
    expected = train('whole', 4, **options(rate)).rates
    assert resumed.rates[10][0]['pace'] == 20
    assert resumed.rates == later(expected, 10)


@pytest.fixture
def group():
    """A process group of this process alone."""
    store = distributed.HashStore()
    distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize('change', [{}, dict(lr=0.02), dict(weight_decay=0.3)])
def test_zero_has_the_settings_of_its_optimizer(train, tmp_path, group, change):
    """Its own arguments do not name them."""

    def options(**more):
        zero = dict(type='ZeroRedundancyOptimizer', optimizer_type='AdamW', **more)
        return dict(optimizer=zero, schedule=POLY)

    train('first', 4, **options())
    path = tmp_path / 'first/epoch_2.pth'
    resumed = train('resumed', 4, path, **options(**change))
    assert bool(resumed.lines) == bool(change)
    expected = train('whole', 4, **options(**change)).rates
    assert resumed.rates == later(expected, 10)


def test_several_optimizers(train, tmp_path):
    def options(rate):
        model = WithTwo()
        sgd = dict(lr=0.1, momentum=0.9)
        parts = (model.body, dict(sgd)), (model.head, dict(sgd, lr=rate))
        wrappers = [
            OptimWrapper(torch.optim.SGD(x.parameters(), **y)) for x, y in parts
        ]
        wrapper = OptimWrapperDict(body=wrappers[0], head=wrappers[1])
        return dict(
            model=model, wrapper=wrapper, paramwise=False, schedule=STEPS, ours=False
        )

    train('first', 4, **options(0.1))
    path = tmp_path / 'first/epoch_2.pth'
    resumed = train('resumed', 4, path, **options(0.02))
    expected = train('whole', 4, **options(0.02)).rates
    assert resumed.rates == later(expected, 10)
    assert any('head: learning rate 0.02 instead of 0.1' in x for x in resumed.lines)
    assert not any('body:' in x for x in resumed.lines)


def test_the_checkpoints_settings_may_stay_in_force(train, tmp_path):
    expected = train('first', 4, schedule=POLY).rates
    path = tmp_path / 'first/epoch_2.pth'
    options = dict(schedule=POLY, optimizer=dict(lr=0.5), settings='NoHook')
    assert train('resumed', 4, path, **options).rates == later(expected, 10)


def test_loss_scales():
    """There is no GPU to save them on."""
    rates = dict(growth_factor=2.0, backoff_factor=0.5, growth_interval=2000)
    scaler = SimpleNamespace(state_dict=lambda: dict(scale=65536.0, **rates))
    mixed, plain = SimpleNamespace(loss_scaler=scaler), SimpleNamespace()
    saved = dict(loss_scaler=dict(rates, scale=8.0, growth_interval=50))
    state = copy.deepcopy(saved)
    assert _settle_precision(mixed, state) == []
    assert state['loss_scaler'] == dict(rates, scale=8.0)
    assert _settle_precision(plain, saved) == ['float32 instead of mixed precision']
    assert saved == {}
    assert _settle_precision(mixed, saved) == ['mixed precision instead of float32']
    assert _settle_precision(plain, saved) == []


def test_the_record_tells_the_rate_in_force(train, tmp_path):
    train('first', 3, schedule=POLY)
    rate = dict(type='AdamW', lr=0.03)
    scale = dict(enable=True, base_batch_size=8)
    cfg = Config(
        dict(
            model={}, optim_wrapper=dict(optimizer=rate), auto_scale_lr=scale,
            train_cfg=dict(max_epochs=4), train_dataloader=dict(batch_size=4),
        )
    )  # fmt: skip
    record = describe_run(cfg, 1)
    path = tmp_path / 'first/epoch_2.pth'
    more = dict(schedule=POLY, optimizer=rate, auto_scale_lr=scale)
    resumed = train('resumed', 4, path, **more)
    group = resumed.rates[10][2]
    assert record['learning rate'] == group['initial_lr'] == 0.015
    assert record['length'] == f'{resumed.runner.max_epochs} epochs'
    assert any('learning rate 0.015 instead of 0.1' in x for x in resumed.lines)


SCHEDULERS = [
    dict(type='StepLR', step_size=2), dict(type='MultiStepLR', milestones=[3, 3, 9]),
    dict(type='ConstantLR', factor=0.3, end=5), dict(type='ExponentialLR', gamma=0.9),
    dict(type='CosineAnnealingLR', T_max=4, eta_min=1e-4), dict(type='LinearLR', end=6),
    dict(type='PolyLR', power=2.0, end=9, begin=2),
    dict(type='OneCycleLR', eta_max=1.0),
    dict(type='CosineRestartLR', periods=[3, 4, 6], restart_weights=[1, 0.5, 0.2],
         eta_min=0.0),
    dict(type='WarmupCosineLR', warmup=3), dict(type='ExponentialMomentum', gamma=0.9),
]  # fmt: skip


@pytest.mark.parametrize('by_epoch', [False, True])
@pytest.mark.parametrize('config', SCHEDULERS, ids=lambda x: x['type'])
def test_schedules_are_replayed_as_they_are_stepped(config, by_epoch):
    def build():
        rates = [0.1, 0.01, 0.1, 0.2]
        groups = [dict(params=[nn.Parameter(torch.ones(1))], lr=x) for x in rates]
        wrapper = OptimWrapper(torch.optim.AdamW(groups, lr=0.3))
        config_ = dict(dict(end=100), by_epoch=by_epoch, **config)
        kinds = [
            config_,
            dict(type='LinearLR', by_epoch=False, start_factor=0.2, end=9),
        ]
        args = dict(optimizer=wrapper)
        return wrapper, [PARAM_SCHEDULERS.build(x, default_args=args) for x in kinds]

    fresh, fresh_schedulers = build()
    before = copy.deepcopy([x.state_dict() for x in fresh_schedulers])
    wrapper, schedulers = build()
    length = 3
    for done in range(40):
        found, states = replay(
            fresh_schedulers, fresh.param_groups, done // length, done, length
        )
        for group, expected in zip(found, wrapper.param_groups):
            assert group == {k: v for k, v in expected.items() if k != 'params'}
        assert states == [x.state_dict() for x in schedulers]
        wrapper.step()
        for scheduler in schedulers:
            if not scheduler.by_epoch:
                scheduler.step()
        if (done + 1) % length == 0:
            for scheduler in schedulers:
                if scheduler.by_epoch:
                    scheduler.step()
    assert [x.state_dict() for x in fresh_schedulers] == before
