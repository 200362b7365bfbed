# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.optim import AmpOptimWrapper, build_optim_wrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import nn

from mlla_mm.datasets.digits import make_ade20k, make_coco, make_imagenet
from mlla_mm.engine.hooks import DivergedError, StopOnInvalidLossHook

from ..nano import NANO

NAN, INF = float('nan'), float('inf')


class Model(BaseModel):
    """Its loss is the mean value of the images."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)

    def forward(self, inputs, data_samples, mode):
        value = torch.stack(list(inputs)).mean()
        return dict(
            loss_value=value * (1 + 0 * self.layer.weight.sum()),
            loss_other=torch.tensor(0.5, requires_grad=True),
            acc=torch.tensor(NAN),  # not a loss, so it is not checked
        )


def images(values):
    """One image for each value; the samples know their paths."""
    samples = [
        BaseDataElement(metainfo=dict(img_path=f'images/{i}.jpg'))
        for i in range(len(values))
    ]
    return [
        dict(inputs=torch.tensor([float(value)]), data_samples=sample)
        for value, sample in zip(values, samples)
    ]


def make_runner(work_dir, values, micro_batches=1, batch_size=2, **options):
    return Runner(
        model=Model(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=batch_size,
            sampler=dict(type='DefaultSampler', shuffle=False),
            dataset=images(values),
        ),
        train_cfg=dict(
            type='SeededEpochBasedTrainLoop',
            max_epochs=1,
            micro_batches=micro_batches,
        ),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.25)),
        param_scheduler=dict(type='ExponentialLR', gamma=0.5, by_epoch=False),
        custom_hooks=[dict(type='StopOnInvalidLossHook')],
        default_scope='mmengine',
        experiment_name=work_dir.name,
        **options,
    )


def replay(path):
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize('value', [NAN, INF, -INF])
def test_the_message_names_everything(tmp_path, value):
    runner = make_runner(tmp_path, [1, 2, 3, 4, 5, value, 7, 8])
    with pytest.raises(DivergedError) as stopped:
        runner.train()
    message = str(stopped.value)
    assert 'at iteration 3.' in message
    assert re.search(r'loss (nan|inf|-inf), loss_value \S+, loss_other 0.5', message)
    assert 'acc' not in message
    # The rate of the update, which the scheduler has not yet changed to the next one.
    assert 'learning rate 0.0625,' in message
    assert 'images images/4.jpg, images/5.jpg;' in message
    assert str(tmp_path / 'invalid_loss_iter_3_rank_0.pth') in message
    assert '--resume' not in message  # a resumed run would diverge again
    assert 'lower learning rate' in message


def test_the_batch_can_be_replayed(tmp_path):
    runner = make_runner(tmp_path, [1, 2, NAN, 4])
    with pytest.raises(DivergedError):
        runner.train()
    saved = replay(tmp_path / 'invalid_loss_iter_2_rank_0.pth')
    assert saved['iteration'] == 2
    assert saved['rank'] == 0
    assert saved['images'] == ['images/2.jpg', 'images/3.jpg']
    assert saved['learning_rates'] == {'lr': [0.125]}
    assert saved['losses']['loss_other'] == 0.5
    model = Model()
    batch = model.data_preprocessor(saved['data_batch'], training=True)
    assert model(**batch, mode='loss')['loss_value'].isnan()


def test_accumulated_batches_are_all_named(tmp_path):
    runner = make_runner(tmp_path, [1, 2, 3, NAN], micro_batches=2)
    with pytest.raises(DivergedError, match='at iteration 1.') as stopped:
        runner.train()
    names = re.search('images (.*);', str(stopped.value))[1].split(', ')
    assert sorted(names) == [f'images/{i}.jpg' for i in range(4)]
    saved = replay(tmp_path / 'invalid_loss_iter_1_rank_0.pth')
    assert len(saved['data_batch']) == 2


def test_a_full_disk_does_not_hide_the_cause(tmp_path):
    runner = make_runner(tmp_path, [NAN, NAN])
    (tmp_path / '.invalid_loss_iter_1_rank_0.pth.part').mkdir()
    with pytest.raises(DivergedError, match=r'loss nan.*not saved \('):
        runner.train()


def test_a_batch_that_cannot_be_saved_does_not_hide_the_cause(tmp_path):
    """Other processes would wait for this one for ever."""
    runner = Scaled()
    runner.optim_wrapper.loss_scaler, runner.work_dir = None, tmp_path
    hook, logs = StopOnInvalidLossHook(), dict(loss=torch.tensor(NAN))
    hook.before_train(runner)
    with pytest.raises(DivergedError, match=r'loss nan.*not saved \(.*lambda'):
        hook.after_train_iter(runner, 0, [lambda: 0], logs)
    assert not list(tmp_path.iterdir())


def test_finite_losses_go_through(tmp_path):
    make_runner(tmp_path, [1e30, -1e30, 0, 4]).train()
    assert not list(tmp_path.glob('invalid_loss*'))


class Scaler:
    """A dynamic scaler; the test sets its scale."""

    def __init__(self, scale):
        self._scale = torch.tensor(scale)

    def is_enabled(self):
        return True

    def get_scale(self):
        return self._scale.item()


class Scaled:
    """A runner with mixed precision and MMEngine's training loop."""

    rank, iter, train_loop = 0, 0, None

    def __init__(self, scale=1024.0):
        self.model = nn.BatchNorm1d(2)
        self.optim_wrapper = SimpleNamespace(
            loss_scaler=Scaler(scale),
            should_update=lambda: True,
            get_lr=lambda: dict(lr=[0.1, 0.3], base_lr=[0.1, 0.3]),
        )


def run_scales(hook, runner, factors):
    hook.before_train(runner)
    for factor in factors:
        runner.optim_wrapper.loss_scaler._scale *= factor
        hook.after_train_iter(runner, 0, None, dict(loss=torch.tensor(1.0)))
        runner.iter += 1


def test_skipped_updates_are_no_error():
    runner = Scaled()
    # Any number is fine if an update between them is not skipped.
    run_scales(StopOnInvalidLossHook(max_skipped=3), runner, [0.5, 0.5, 1] * 50)
    assert runner.iter == 150


def test_endlessly_skipped_updates_are():
    runner = Scaled()
    with pytest.raises(DivergedError) as stopped:
        run_scales(StopOnInvalidLossHook(max_skipped=3), runner, [0.5, 1, *[0.5] * 9])
    message = str(stopped.value)
    assert runner.iter == 4
    assert 'at iteration 5.' in message
    assert 'skipped 3 updates one after another; the loss scale is 64.' in message
    assert 'loss 1, learning rate 0.1 to 0.3' in message


def test_accumulation_in_the_optimiser_wrapper_is_seen_through():
    runner = Scaled()
    updates = iter([False, True] * 6)
    runner.optim_wrapper.should_update = lambda: next(updates)
    # An update takes two iterations. The scale changes in the second one.
    with pytest.raises(DivergedError):
        run_scales(StopOnInvalidLossHook(max_skipped=3), runner, [1, 0.5] * 6)
    assert runner.iter == 5


def train_with_scaler(work_dir, values, max_skipped=50, **options):
    """Train with PyTorch's own scaler, on the CPU."""
    if not hasattr(torch.amp, 'GradScaler'):
        pytest.skip('no scaler for the CPU below PyTorch 2.3')
    runner = make_runner(work_dir, values, batch_size=1)
    with mock.patch.object(amp_optimizer_wrapper, 'is_cuda_available', lambda: True):
        runner.optim_wrapper = build_optim_wrapper(
            runner.model,
            dict(type='AmpOptimWrapper', optimizer=dict(type='SGD', lr=0.25)),
        )
    runner.optim_wrapper.loss_scaler = torch.amp.GradScaler('cpu', **options)
    (hook,) = (h for h in runner.hooks if isinstance(h, StopOnInvalidLossHook))
    hook.max_skipped = max_skipped
    runner.train()
    return runner


@pytest.mark.parametrize('value', [NAN, INF])
def test_mixed_precision_skips_an_invalid_loss(tmp_path, value):
    """The update is skipped, the loss scale halved, and the run goes on."""
    options = dict(init_scale=1024.0)
    values = [1, value, 3, value, value, 4]
    runner = train_with_scaler(tmp_path, values, max_skipped=3, **options)
    assert runner.iter == 6
    assert runner.model.layer.weight.isfinite().all()
    assert runner.optim_wrapper.loss_scaler.get_scale() == 1024 / 2**3
    assert not list(tmp_path.glob('invalid_loss*'))


def test_an_invalid_loss_that_is_not_skipped_ends_mixed_precision(
    tmp_path, monkeypatch
):
    def forward(self, inputs, data_samples, mode):
        value = torch.stack(list(inputs)).mean()
        return dict(loss=self.layer.weight.sum() + value)  # the gradient is 1

    monkeypatch.setattr(Model, 'forward', forward)
    with pytest.raises(DivergedError, match='at iteration 2.'):
        train_with_scaler(tmp_path, [1, NAN, 1])


def test_many_invalid_losses_in_a_row_end_mixed_precision(tmp_path):
    with pytest.raises(DivergedError) as stopped:
        train_with_scaler(tmp_path, [1, NAN, 1, *[NAN] * 5], max_skipped=3)
    message = str(stopped.value)
    assert 'at iteration 6.' in message and 'skipped 3 updates' in message
    # The last batch is saved.
    assert 'images images/5.jpg;' in message
    assert replay(tmp_path / 'invalid_loss_iter_6_rank_0.pth')['iteration'] == 6


def test_statistics_that_never_recover_end_mixed_precision(tmp_path, monkeypatch):
    def build(self):
        BaseModel.__init__(self)
        self.layer = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))

    def forward(self, inputs, data_samples, mode):
        return dict(loss=self.layer(torch.stack(list(inputs)).expand(2, 1)).mean())

    monkeypatch.setattr(Model, '__init__', build)
    monkeypatch.setattr(Model, 'forward', forward)
    with pytest.raises(DivergedError) as stopped:
        train_with_scaler(tmp_path, [1, INF, 1])
    message = str(stopped.value)
    assert 'at iteration 2.' in message and 'layer.1.running_mean' in message


def test_buffers_that_are_not_finite_by_intent(tmp_path, monkeypatch):
    """Masks of attention are -inf where it may not look."""

    def build(self):
        BaseModel.__init__(self)
        self.layer = nn.Linear(1, 1, bias=False)
        self.register_buffer('mask', torch.full((2, 2), -INF).triu(1))

    monkeypatch.setattr(Model, '__init__', build)
    assert train_with_scaler(tmp_path, [1, NAN, 1], init_scale=64.0).iter == 3


@pytest.mark.parametrize('factor', [1, 0.5])
def test_the_invalid_batch_of_several_is_named(tmp_path, factor):
    """The update, and what is known of its gradients, comes some batches later."""
    runner, hook = Scaled(), StopOnInvalidLossHook(max_skipped=1)
    runner.work_dir = tmp_path
    updates = iter([False, False, True])
    runner.optim_wrapper.should_update = lambda: next(updates)
    hook.before_train(runner)
    with pytest.raises(DivergedError) as stopped:
        for runner.iter, loss in enumerate([1.0, NAN, 2.0]):
            if runner.iter == 2:
                runner.optim_wrapper.loss_scaler._scale *= factor
            batch = images([runner.iter])
            hook.after_train_iter(runner, 0, batch, dict(loss=torch.tensor(loss)))
    assert runner.iter == 2
    message = str(stopped.value)
    assert 'at iteration 2.' in message and 'loss nan' in message
    assert ('skipped 1 updates' in message) == (factor < 1)
    saved = replay(tmp_path / 'invalid_loss_iter_2_rank_0.pth')
    assert saved['iteration'] == 2 and saved['data_batch'][0]['inputs'] == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_mixed_precision_on_a_gpu():
    """PyTorch's own scaler: gradients of inf, again and again."""
    layer = nn.Linear(1, 1).cuda()
    wrapper = AmpOptimWrapper(
        optimizer=torch.optim.SGD(layer.parameters(), lr=0.1), loss_scale='dynamic'
    )
    runner = SimpleNamespace(
        optim_wrapper=wrapper, rank=0, iter=0, train_loop=None, model=layer
    )
    hook = StopOnInvalidLossHook(max_skipped=5)
    hook.before_train(runner)
    with pytest.raises(DivergedError, match='skipped 5 updates'):
        for runner.iter in range(20):
            loss = layer(torch.ones(1, 1, device='cuda')).sum()
            loss.register_hook(lambda grad: grad * INF)
            wrapper.update_params(loss)
            hook.after_train_iter(runner, 0, None, dict(loss=torch.ones(1).cuda()))
    assert runner.iter == 4


def test_options():
    with pytest.raises(ValueError, match='max_skipped must be positive, got 0'):
        HOOKS.build(dict(type='StopOnInvalidLossHook', max_skipped=0))


# The loss of the second of two processes is not finite in the second iteration.
SCRIPT = """
import sys
from pathlib import Path
import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mlla_mm.engine import launch
from mlla_mm.datasets.digits import make_ade20k, make_coco, make_imagenet
from mlla_mm.engine.hooks import DivergedError
from tests.test_engine.test_invalid_loss import make_runner

cfg = Config(dict(model=dict(), launcher='pytorch'))
launch.set_up(cfg)
# The processes take turns: 0, 2 and 1, 3, then 4, 6 and 5, 7.
runner = make_runner(
    Path(sys.argv[1]), [1, 1, 1, 1, 1, float('nan'), 1, 1, 1, 1, 1, 1], cfg=cfg,
    launcher='pytorch',
)
try:
    runner.train()
except DivergedError as error:
    print(f'\\nstopped {get_rank()} {runner.iter} {str(error)!r}\\n', flush=True)
launch.tear_down()
"""


def test_all_processes_stop_together(run_tool, tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    output = run_tool(
        'python', tmp_path / 'script.py', tmp_path / 'work', processes=2
    ).stdout
    stopped = re.findall(r'^stopped (\d) (\d+) (.*)$', output, re.MULTILINE)
    assert sorted((rank, iteration) for rank, iteration, _ in stopped) == [
        ('0', '1'),
        ('1', '1'),
    ]
    (message,) = {text for _, _, text in stopped}
    assert 'rank 1: loss nan' in message
    assert 'rank 0' not in message
    assert 'images images/5.jpg, images/7.jpg;' in message
    saved = [path.name for path in (tmp_path / 'work').glob('invalid_loss*')]
    assert saved == ['invalid_loss_iter_2_rank_1.pth']


DATA = {
    # Images with a digit of each class.
    'mmdet': lambda out: make_coco(out, train=12, val=2, size=64),
    'mmseg': lambda out: make_ade20k(out, train=8, val=2, size=64),
    'mmpretrain': lambda out: make_imagenet(out, train=16, val=4, size=32),
}


@pytest.mark.parametrize('scope', NANO)
def test_every_task(run_tool, scope, tmp_path):
    """Real runs that diverge after one update with an absurd learning rate."""
    pytest.importorskip(scope)
    data = DATA[scope](tmp_path / 'data')
    result = run_tool(
        'python', 'tools/train.py', NANO[scope], '--work-dir', tmp_path / 'work',
        '--cfg-options', f'train_dataloader.dataset.data_root={data}/',
        'train_dataloader.batch_size=4', 'train_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False',
        'optim_wrapper.optimizer.lr=1e30', 'optim_wrapper.clip_grad=None',
        'val_cfg=None', 'val_dataloader=None', 'val_evaluator=None',
        'default_hooks.checkpoint.save_best=None', check=False,
    )  # fmt: skip
    assert result.returncode == 1
    message = result.stdout[result.stdout.index('Error: Training diverged') :]
    assert 'Traceback' not in result.stdout
    names = re.search('images (.*);', message)[1].split(', ')
    assert len(names) == 4
    assert all(Path(name).is_file() for name in names)
    (path,) = (tmp_path / 'work').glob('invalid_loss_iter_*_rank_0.pth')
    assert str(path) in message
    assert len(replay(path)['data_batch']['inputs']) == 4
