# Copyright (c) mlla_mm authors. Licensed under the Apache License 2.0.
import copy
import os

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import DATA_SAMPLERS
from mmengine.runner import (
    EpochBasedTrainLoop,
    IterBasedTrainLoop,
    Runner,
    TestLoop,
    ValLoop,
)
from torch import nn

from mlla_mm.reproducible.loops import (
    CheckedTestLoop,
    CheckedValLoop,
    SeededEpochBasedTrainLoop,
    SeededIterBasedTrainLoop,
    train_step,
)
from mlla_mm.reproducible.seeding import UPDATE, seed_generators

from .test_preemption import EPOCHS, ITERATIONS, SEED, train


class Model(BaseModel):
    """Its loss does not depend on BatchNorm, so gradients of batches add up."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.bn = nn.BatchNorm1d(3, momentum=0.3)
        self.frozen_bn = nn.BatchNorm1d(3)

    def forward(self, inputs, mode):
        self.bn(inputs)
        self.frozen_bn(inputs)
        return dict(loss=self.linear(inputs).square().mean())


@pytest.fixture
def model():
    model = Model().double()
    model.frozen_bn.eval()
    return model


def run(
    model,
    batches,
    micro_batches,
    wrapper_type=OptimWrapper,
    first_alone=False,
    **options,
):
    wrapper = wrapper_type(
        torch.optim.SGD(model.parameters(), lr=0.1),
        accumulative_counts=micro_batches,
        clip_grad=dict(max_norm=0.5),
        **options,
    )
    return [
        train_step(
            model, [dict(inputs=x) for x in update], wrapper, (0, i), first_alone
        )
        for i, update in enumerate(batches)
    ]


def test_an_update_of_micro_batches_is_one_of_a_large_batch(model):
    data = torch.randn(3, 4, 5, 3, dtype=torch.double)  # 3 updates of 4 micro-batches
    whole = copy.deepcopy(model)
    logs = run(model, data, 4)
    expected = run(whole, data.reshape(3, 1, 20, 3), 1)
    assert [log['loss'].item() for log in logs] == pytest.approx(
        [log['loss'].item() for log in expected]
    )
    torch.testing.assert_close(model.linear.weight, whole.linear.weight)


@pytest.mark.parametrize('first_alone', [False, True])
@pytest.mark.parametrize('micro_batches', [1, 2, 3])
def test_running_statistics_are_those_of_as_many_processes(
    model, micro_batches, first_alone
):
    """Their mean, or the first one's."""
    data = torch.randn(2, micro_batches, 5, 3, dtype=torch.double)
    frozen = copy.deepcopy(model.frozen_bn.state_dict())
    processes = [copy.deepcopy(model.bn) for _ in range(micro_batches)]
    run(model, data, micro_batches, first_alone=first_alone)
    for update in data:
        for bn, batch in zip(processes, update):
            bn(batch)
    for name in ('running_mean', 'running_var'):
        theirs = torch.stack([getattr(bn, name) for bn in processes])
        expected = theirs[0] if first_alone else theirs.mean(dim=0)
        torch.testing.assert_close(getattr(model.bn, name), expected)
    assert model.bn.num_batches_tracked == 2
    for key, value in frozen.items():
        assert torch.equal(model.frozen_bn.state_dict()[key], value), key


def test_logs_are_means_over_micro_batches(model):
    """They may be numbers of Python, and integers."""

    def train_step(data, optim_wrapper):
        log = Model.train_step(model, data, optim_wrapper)
        size = len(data['inputs'])
        return dict(log, size=size, double=2.0 * size, count=torch.tensor(size))

    model.train_step = train_step
    batches = [[torch.randn(n, 3, dtype=torch.double) for n in (2, 5)]]
    (log,) = run(model, batches, 2)
    assert log['loss'].shape == ()
    found = {name: float(log[name]) for name in ('size', 'double', 'count')}
    assert found == dict(size=3.5, double=7.0, count=3.5)


class Drawing(Model):
    """Draws and keeps a random number for every batch."""

    def __init__(self):
        super().__init__()
        self.drawn = []

    def forward(self, inputs, mode):
        self.drawn.append(torch.rand(1).item())
        return super().forward(inputs, mode)


def test_random_numbers_are_those_of_as_many_processes(monkeypatch):
    """They differ by update and by process of the recipe."""

    def draws(processes, rank):
        monkeypatch.setattr('mlla_mm.reproducible.loops.get_rank', lambda: rank)
        micro_batches = 4 // processes
        model = Drawing()
        run(model, torch.randn(2, micro_batches, 5, 3), micro_batches)
        return torch.tensor(model.drawn).reshape(2, micro_batches)

    expected = []
    for update in range(2):
        for process in range(4):
            seed_generators(UPDATE, 0, update, process)
            expected.append(torch.rand(1).item())
    expected = torch.tensor(expected).reshape(2, 4)
    assert expected.unique().numel() == 8
    for processes in (1, 2, 4):
        parts = [draws(processes, rank) for rank in range(processes)]
        assert torch.equal(torch.cat(parts, dim=1), expected)


@pytest.mark.parametrize(
    ('setting', 'updates', 'evaluations'),
    [
        (
            {**EPOCHS, 'train_cfg': dict(EPOCHS['train_cfg'], val_interval=2)},
            *(15, [10, 15]),
        ),
        (ITERATIONS, 13, [4, 8, 12, 13]),
    ],
)
def test_seeds_and_evaluations_of_a_run(tmp_path, setting, updates, evaluations):
    record = []
    train(tmp_path, record, **setting)
    # The last model is evaluated at every interval.
    assert [entry[1] for entry in record if entry[0] == 'evaluation'] == evaluations
    expected = []
    for update in range(updates):
        seed_generators(UPDATE, SEED, update, 0)
        expected.append(torch.initial_seed())
    assert [entry[4] for entry in record if len(entry) == 6] == expected


@DATA_SAMPLERS.register_module()
class Pairs:
    """A batch sampler that has only what a data loader needs."""

    def __init__(self, sampler, batch_size):
        self.sampler = sampler

    def __iter__(self):
        indices = iter(self.sampler)
        return zip(indices, indices)

    def __len__(self):
        return len(self.sampler) // 2


def load(folder, **options):
    """The first update that a run with a data loader of these options loads."""
    loader = dict(
        batch_size=2,
        dataset=list(range(8)),
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
    loader.update(options)
    runner = Runner(
        nn.Identity(),
        str(folder),
        train_dataloader={k: v for k, v in loader.items() if v is not DELETED},
        train_cfg=dict(type='SeededEpochBasedTrainLoop', max_epochs=1),
        optim_wrapper=dict(),
        experiment_name=os.urandom(4).hex(),
    )
    return next(iter(runner.train_dataloader))


DELETED = object()


@pytest.mark.parametrize(
    'options, batch',
    [
        ({}, [0, 1]),
        (dict(collate_fn=None), [0, 1]),
        (dict(collate_fn=sum), 1),
        (dict(collate_fn=dict(type='default_collate')), torch.tensor([0, 1])),
        (dict(batch_sampler=dict(type='Pairs')), [0, 1]),
    ],
)
def test_data_loaders_as_mmengine_takes_them(tmp_path, options, batch):
    (found,) = load(tmp_path, **options)
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(batch))


def test_unknown_running_statistics():
    with pytest.raises(ValueError, match='running_statistics.*mean.*first.*last'):
        SeededEpochBasedTrainLoop(None, dict(), running_statistics='last')


@pytest.mark.parametrize('sampler', [None, DELETED, [0, 1, 2]])
def test_a_sampler_that_is_no_config(tmp_path, sampler):
    with pytest.raises(ValueError, match=r'train_dataloader.sampler.*DefaultSampler'):
        load(tmp_path, sampler=sampler)


@pytest.mark.parametrize('has_gpu', [False, True])
@pytest.mark.parametrize('setting', [{}, dict(pin_memory=False)])
def test_memory_is_pinned_for_a_gpu(has_gpu, setting, monkeypatch):
    loaders = []

    def init(self, runner, dataloader, *args, **kwargs):
        loaders.append(dataloader)
        self._max_epochs = self._max_iters = 1

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: has_gpu)
    for base in (EpochBasedTrainLoop, IterBasedTrainLoop, ValLoop, TestLoop):
        monkeypatch.setattr(base, '__init__', init)
    loader = dict(dataset=dict(), sampler=dict(type='DefaultSampler'), **setting)
    SeededEpochBasedTrainLoop(None, loader)
    SeededIterBasedTrainLoop(None, loader)
    CheckedValLoop(None, loader)
    CheckedTestLoop(None, loader)
    assert [loader['pin_memory'] for loader in loaders] == [has_gpu and not setting] * 4


def test_copies_to_the_gpu_do_not_wait(tmp_path, monkeypatch):
    kept = []
    to = torch.Tensor.to

    def record(self, *args, **kwargs):
        if kwargs.get('non_blocking') is not None:
            kept.append(kwargs['non_blocking'])
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, 'to', record)
    train(tmp_path, [], **EPOCHS)
    assert kept and all(kept)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_mixed_precision(model, dtype):
    data = torch.randn(3, 4, 5, 3, device='cuda')
    model = model.float().cuda()
    whole = copy.deepcopy(model)
    # PyTorch's own first scale can overflow in float16, which skips the update.
    run(model, data, 4, AmpOptimWrapper, dtype=dtype, loss_scale=128.0)
    run(whole, data, 4)
    torch.testing.assert_close(
        model.linear.weight, whole.linear.weight, rtol=2e-2, atol=2e-2
    )


# Two processes, each with three micro-batches. The script counts the reductions.
SCRIPT = """
import torch
from mmengine.dist import get_rank
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import DATA_SAMPLERS
from mmengine.runner import (
    EpochBasedTrainLoop,
    IterBasedTrainLoop,
    Runner,
    TestLoop,
    ValLoop,
)
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
import mlla_mm
from mlla_mm.reproducible.loops import train_step
from tests.test_reproducible.test_loops import Model

torch.distributed.init_process_group('gloo')
torch.manual_seed(0)
model = Model()
alone = Model()
alone.load_state_dict(model.state_dict())
wrapped = MMDistributedDataParallel(model, find_unused_parameters=True)
reductions = []

def hook(state, bucket):
    reductions.append(bucket.index())
    return allreduce_hook(state, bucket)

wrapped.register_comm_hook(None, hook)
data = [dict(inputs=torch.randn(5, 3)) for _ in range(6)]
for net, batches in (
    (wrapped, data[3 * get_rank():3 * get_rank() + 3]), (alone, data)
):
    optimizer = OptimWrapper(
        torch.optim.SGD(net.parameters(), lr=0.1), accumulative_counts=len(batches)
    )
    train_step(net, batches, optimizer, (0, 0))
assert len(reductions) == 1, reductions
torch.testing.assert_close(model.linear.weight, alone.linear.weight)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_gradients_are_reduced_once_an_update(run_tool, tmp_path):
    (tmp_path / 'script.py').write_text(SCRIPT)
    run_tool('python', tmp_path / 'script.py', processes=2)


def test_several_optimizers_are_refused():
    class Runner:
        optim_wrapper, model = dict(), nn.Module()

    loop = SeededEpochBasedTrainLoop.__new__(SeededEpochBasedTrainLoop)
    loop._runner, loop.micro_batches = Runner(), 2
    with pytest.raises(ValueError, match='needs one optimiser'):
        loop.run()
